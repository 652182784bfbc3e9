"""pretrain/run.py, interrupted at a chosen point: `RUN_UNTIL=POINT python run_until.py [arguments of run.py]`.

step:N    after step N was recorded every process makes the file $RUN_UNTIL_HELD/<process id> and waits for a signal
crash:N   after step N was recorded a RuntimeError is raised
save:N    the process dies while it writes state.pt of step N: half of the file is there
"""

import io
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.processes import launch  # noqa: E402, F401  (first: it sets what torch reads when it is imported)

# isort: split
import torch  # noqa: E402

from common.processes import stopping  # noqa: E402
from common.training import tracking  # noqa: E402

DEADLINE = 120.0  # seconds to wait for the signal

what, _, number = os.environ["RUN_UNTIL"].partition(":")
received: list[int] = []


def noted(self: stopping.StopSignal, number: int, frame: object, note=stopping.StopSignal._note) -> None:
    received.append(number)
    note(self, number, frame)


def held(self: tracking.Tracker, step: int, record: dict, write=tracking.Tracker.write) -> None:
    write(self, step, record)
    if step == int(number) and what == "crash":
        raise RuntimeError("out of memory, say")
    if step == int(number):
        (Path(os.environ["RUN_UNTIL_HELD"]) / str(os.getpid())).touch()
        deadline = time.monotonic() + DEADLINE
        while not received and time.monotonic() < deadline:
            time.sleep(0.005)


def half_saved(state: dict, path: Path, save=torch.save) -> None:
    whole = io.BytesIO()
    save(state, whole)
    if state["step"] == int(number):
        Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    Path(path).write_bytes(whole.getvalue())


if __name__ == "__main__":
    stopping.StopSignal._note = noted  # type: ignore[method-assign]
    if what in ("step", "crash"):
        tracking.Tracker.write = held  # type: ignore[method-assign]
    else:
        torch.save = half_saved
    script = ROOT / "pretrain" / "run.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
