"""Training as a child process or in this one, and what a run folder holds: for tests that kill, starve and watch."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"
RUN_UNTIL = ROOT / "tests" / "runs" / "run_until.py"
PATIENCE = 150.0  # seconds a child may take, on a machine that is busy with something else

# ---------------------------------------------------------------------------- the run it leaves


class Run:
    """What a run folder holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[int]:
        """The steps of metrics.jsonl, in its order."""
        return [record["step"] for record in self.metrics]

    @property
    def losses(self) -> list[str]:
        """The losses of metrics.jsonl, to the last bit."""
        return [float(record["loss"]).hex() for record in self.metrics]

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what a clock measured."""
        clock = ("images_per_second", "data_wait")
        return [{name: value for name, value in record.items() if name not in clock} for record in self.metrics]

    @property
    def checkpoints(self) -> list[int]:
        """Steps of which there is a checkpoint."""
        return sorted(int(path.name[5:]) for path in (self.path / "state").glob("step_*"))

    def scalars(self) -> dict[str, list[tuple[int, float]]]:
        """TensorBoard's numbers as TensorBoard reads them: name -> [(step, value)], in float32."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.path / "tb"), size_guidance={"scalars": 0})
        events.Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


# ---------------------------------------------------------------------------- training


@dataclass
class Ended:
    """A child process that has ended."""

    status: int
    stdout: str
    stderr: str


class Child:
    """A training process, or a launcher with two of them, in a process group of its own."""

    def __init__(self, process: subprocess.Popen, place: Path, processes: int) -> None:
        self.process, self.place, self.processes = process, place, processes

    def held(self) -> list[int]:
        """Wait until every training process has reached the step it was to wait at; their process ids."""
        deadline = time.monotonic() + PATIENCE
        while len(ids := [int(path.name) for path in (self.place / "held").iterdir()]) < self.processes:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the child never got to that step: {self.output()}")
            time.sleep(0.01)
        return ids

    def said(self, words: str) -> None:
        """Wait until it has printed `words`, or ended."""
        deadline = time.monotonic() + PATIENCE
        while words not in (self.place / "stdout").read_text() and self.process.poll() is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"the child never said {words!r}: {self.output()}")
            time.sleep(0.01)

    def wait(self, patience: float = PATIENCE) -> Ended:
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the child did not end within {patience:.0f} s: {self.output()}") from None
        return self.output()

    def output(self) -> Ended:
        return Ended(self.process.poll() or 0, (self.place / "stdout").read_text(), (self.place / "stderr").read_text())

    def kill(self) -> None:
        """End it and whatever it started; torchrun's processes have groups of their own."""
        for process in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()


class Train:
    """Starts pretrain/run.py with the tiny recipe as a child process, in an empty folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.children, self.count = root, list[Child](), itertools.count()

    def start(
        self,
        *words: object,
        processes: int = 1,
        until: str | None = None,
        launcher: list[str] | None = None,
        env: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> Child:
        """`until`: see run_until.py; `before` is called in the child before it becomes Python."""
        place = self.root / f"{next(self.count):03d}"
        (place / "held").mkdir(parents=True)
        around = {"RUN_UNTIL": until or "", "RUN_UNTIL_HELD": str(place / "held"), **(env or {})}
        script = str(RUN_UNTIL if until else ROOT / "pretrain" / "run.py")
        if launcher is None and processes > 1:
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
            launcher += ["--master-port", str(free_port())]
        if processes > 1:
            around["ACCELERATE_USE_CPU"] = "true"
        command = [sys.executable, *(launcher or []), script, *map(str, words)]
        with (place / "stdout").open("w") as out, (place / "stderr").open("w") as err:
            process = subprocess.Popen(
                command,
                cwd=place,
                env=os.environ | around,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=before,
            )
        child = Child(process, place, processes)
        self.children.append(child)
        return child

    def __call__(self, *words: object, patience: float = PATIENCE, **options: Any) -> Ended:
        return self.start(*words, **options).wait(patience)


def descendants(process: int) -> list[int]:
    """Process ids below `process`, from /proc."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(path.parent.name))
    found = list(parents.get(process, []))
    for child in found:  # grows while it is walked
        found += parents.get(child, [])
    return found


def alive(process: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def training_here() -> Iterator[Callable[..., int]]:
    """A function that is pretrain.run.main in this process; everything global is put back."""
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from tensorboard.summary.writer import event_file_writer

    from common.processes.stopping import HEEDED
    from pretrain import run

    # TensorBoard reads files of one second and one process in the order of their names, where 9 comes after 10.
    event_file_writer._global_uid._value = max(event_file_writer._global_uid._value, 1000)

    def forget() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    def main(*words: object) -> int:
        forget()
        try:
            with torch.random.fork_rng():
                return run.main([str(word) for word in words])
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # loader workers live as long as what refers to them
            raise

    handlers = {number: signal.getsignal(number) for number in HEEDED}
    threads = torch.get_num_threads()
    try:
        yield main
    finally:
        forget()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
