"""What a run leaves behind while it trains: metrics.jsonl, TensorBoard, pictures, and lines for the eye.

After a resume every step is there once: metrics.jsonl is cut back to the checkpoint, and TensorBoard is told to
forget what came after it.
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..checkpoints.disk import writing
from ..checkpoints.run_folder import open_for_good
from ..checkpoints.storage import sweep, write_atomically
from ..errors import Refusal
from ..printable import printable_lines

METRICS, TENSORBOARD, PICTURES = "metrics.jsonl", "tb", "pictures"

QUIET = 10.0  # seconds after which a part of a step is told


def check_tensorboard(wanted: bool) -> None:
    """Raises Refusal if TensorBoard's writer is `wanted` and cannot be had."""
    if not wanted:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise Refusal(
            f"tensorboard=true, but TensorBoard cannot be imported ({error}): pip install "
            "tensorboard, or set tensorboard=false"
        ) from None


class Tracker:
    """Writes what `fit` measures; a do-nothing on every process but the first."""

    def __init__(self, run: Path, start: int, tensorboard: bool, active: bool = True) -> None:
        self.run, self.active, self.writer = run, active, None
        self.words: dict[str, str] = {}  # as last told
        if not active:
            return
        again = (run / METRICS).exists()  # resumed, be it from the beginning: a run may end before its first checkpoint
        cut(run / METRICS, start)
        for left in (run / PICTURES).glob(".*"):  # by a process that was killed while it wrote one
            left.unlink(missing_ok=True)
        self.file = open_for_good(run / METRICS, "a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run / TENSORBOARD), purge_step=start + 1 if again else None)

    def write(self, step: int, record: dict[str, Any]) -> None:
        """One JSON line, floats in full precision, null for one that is not finite; in TensorBoard a scalar for each
        number, and words when they change."""
        if not self.active:
            return
        line = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in record.items()}  # fmt: skip  # JSON has no word for NaN
        with writing(self.run / METRICS):
            self.file.write(json.dumps({"step": step, **line}) + "\n")
            self.file.flush()
        if self.writer is None:
            return
        with writing(self.run / TENSORBOARD):
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name if "/" in name else f"train/{name}", value, step)
                elif self.words.get(name) != value:
                    self.words[name] = value
                    self.writer.add_text(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """A text of several lines, in TensorBoard alone, as it is written."""
        if self.writer is not None:
            self.writer.add_text(
                name, "".join(f"    {line}\n" for line in text.splitlines()), step
            )  # Markdown: as code

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """An RGB picture, uint8 (H, W, 3): run/pictures/<name>-<step>.png and TensorBoard."""
        if not self.active:
            return
        folder = self.run / PICTURES
        folder.mkdir(exist_ok=True)
        write_atomically(
            folder / f"{name}-{step:08d}.png", lambda aside: Image.fromarray(image).save(aside, format="PNG")
        )
        if self.writer is not None:
            with writing(self.run / TENSORBOARD):
                self.writer.add_image(name, image, step, dataformats="HWC")

    def sync(self) -> None:
        """Everything written so far reaches the disk: called before a checkpoint, which must not know more steps
        than they do."""
        if not self.active:
            return
        with writing(self.run / METRICS):
            self.file.flush()
            os.fsync(self.file.fileno())
        if self.writer is not None:
            with writing(self.run / TENSORBOARD):
                self.writer.flush()

    def close(self) -> None:
        """Flush and close."""
        if not self.active:
            return
        self.sync()
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def cut(path: Path, last: int) -> None:
    """Drop the lines of steps after `last`, and a line that a crash left half-written."""
    sweep(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace", encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, lambda aside: aside.write_text("".join(kept), encoding="utf-8"))


class Progress:
    """A bar on a terminal; a line at every log step in a file; nothing on other processes."""

    def __init__(self, steps: int, start: int, active: bool) -> None:
        self.steps, self.start, self.active = steps, start, active
        self.begun = time.perf_counter()
        self.first = contextlib.ExitStack()  # open until the first step
        self.measuring = 0.0  # seconds spent on held-out images
        self.told = self.stepped = self.begun  # when something was last said of a step, and when a step last ended
        self.bar = None
        if active and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def step(self) -> None:
        """One step is done."""
        self.first.close()
        self.told = self.stepped = time.perf_counter()
        if self.bar is not None:
            self.bar.update()

    def wait_for_first(self, line: str) -> None:
        """Say `line`, and how long it has taken, if the first step, or part of one, takes more than ten seconds."""
        if self.active:
            self.first.enter_context(patient(line, self.say, first=QUIET))

    def part(self, step: int, part: int, parts: int) -> None:
        """One of the parts of a step is done: told where nothing was for ten seconds."""
        now = time.perf_counter()
        self.first.close()
        if parts > 1 and part < parts and now - self.told > QUIET:
            self.told = now
            if self.bar is not None:
                self.bar.set_postfix_str(f"part {part} of {parts}")
            else:
                self.say(f"step {step}/{self.steps}  part {part} of {parts}, {clock(now - self.stepped)} so far")

    def show(self, step: int, record: dict[str, Any]) -> None:
        """Tell the numbers of a logged step."""
        if not self.active:
            return
        text = summary(record)
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            each = (time.perf_counter() - self.begun) / max(1, step - self.start)
            print(f"step {step}/{self.steps}  {text}  ETA {clock(each * (self.steps - step))}", flush=True)

    def tell(self, step: int, held_out: Mapping[str, Any], seconds: float) -> None:
        """Tell what was measured after `step` on images held out, and note how long it took."""
        self.measuring += seconds
        if self.active and (text := held_out_summary(held_out)):
            self.say(f"step {step}/{self.steps}  {text}")

    @property
    def share(self) -> float:
        """Share of the time since the beginning that measurements on held-out images took."""
        return self.measuring / max(1e-9, time.perf_counter() - self.begun)

    def say(self, line: str) -> None:
        """A line that does not tear the bar."""
        if self.active:
            line = printable_lines(line)
            tqdm.write(line) if self.bar is not None else print(line, flush=True)

    def close(self) -> None:
        """End the bar."""
        self.first.close()
        if self.bar is not None:
            self.bar.close()


def summary(record: dict[str, Any]) -> str:
    """The little of a record that one watches: loss, accuracy against chance, health, images/s, share of time spent
    waiting."""
    words = [f"loss {record['loss']:.4f}"]
    for name, value in record.items():
        task, _, what = name.rpartition("/")
        if what == "accuracy" and "/" not in task:
            words.append(f"{task} {value:.1%} (chance {record[f'{task}/chance']:.1%})")
        elif what == "verdict":
            words.append(f"{task} {value}")
    speed = record["images_per_second"]
    words += [f"{speed:,.0f} img/s" if speed >= 10 else f"{speed:.2g} img/s", f"data_wait {record['data_wait']:.1%}"]
    return "  ".join(words)


@contextlib.contextmanager
def patient(line: str, say: Callable[[str], None], first: float = 0.0, every: float = 30.0) -> Iterator[None]:
    """While what is inside goes on, say `line` after `first` seconds, and how long it took after each `every`: in a
    thread of its own, as one call may take minutes."""
    done, begun = threading.Event(), time.perf_counter()

    def tell() -> None:
        if first > 0:
            if done.wait(first):
                return
            say(line)
        while not done.wait(every):
            say(f"           … {clock(time.perf_counter() - begun)} so far")

    if first <= 0:
        say(line)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


NAMES = {"top1": "top-1", "top5": "top-5", "knn": "k-NN", "ridge": "ridge", "rankme": "effective rank"}


def held_out_summary(record: Mapping[str, Any]) -> str:
    """What a record says of images held out, or of test images; empty where it says nothing."""
    losses = [f"loss {record[name]:.4f}" for name in ("val/loss",) if name in record]
    words, noise = [], []
    for name, value in record.items():
        kind, _, rest = name.partition("/")
        if kind == "val" and rest.endswith("/accuracy"):
            words.append(f"{rest.removesuffix('/accuracy')} {value:.1%}")
        elif kind in NAMES:
            shown = f"{value:.1f}" if kind == "rankme" else f"{value:.1%}"
            several = f"{kind}/teacher" in record or f"{kind}/average" in record
            words.append(f"{NAMES[kind]} {f'of the {rest} ' if several else ''}{shown}")
        elif kind == "control" and rest.endswith("/noise"):
            task = rest.removesuffix("/noise")
            noise.append(f"{task} on noise {value:.1%} (chance {record.get(f'control/{task}/chance', math.nan):.1%})")
        elif kind == "test" and isinstance(value, float):
            words.append(f"{rest.replace('_', ' ')} {value:.1%}")
    said = losses + words + noise
    where = "test images" if any(name.startswith("test/") for name in record) else "held out"
    return f"{where}: {', '.join(said)}" if said else ""


def last_held_out(run: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, record) of the last measurement in metrics.jsonl that says something of images held out."""
    last = next(records_of(run, "val", "rankme", "test", "top1"), None)
    return None if last is None else (last["step"], {name: value for name, value in last.items() if value is not None})


def records_of(run: Path, *kinds: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics.jsonl that say something of one of these kinds, `KIND/WHAT`, the last one first."""
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines() if (run / METRICS).exists() else []
    for line in reversed(lines):
        if any(f'"{kind}/' in line for kind in kinds):
            yield json.loads(line)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
