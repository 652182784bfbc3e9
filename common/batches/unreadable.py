"""Images that cannot be read: how many of them are too many, and what is said of them, before and while one trains.

One rule for pretraining and evaluations, `Limit`, over all images of a job: of training and test split together.
"""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from ..checkpoints.storage import write_atomically
from ..data import Images, Unreadable
from ..errors import Refusal
from ..features.metrics import wilson
from ..processes.launch import usable_cores
from .loading import Loader
from .samples import Batch

BAD_FILES = "bad_files.txt"
AUTO = "auto"  # a hundredth; of few images FEW, but no more than a tenth
FEW = 5
LOOKED, SECONDS = 2000, 10.0  # images that are looked at up front, at most, and for how long
OFTEN = 2.0  # seconds between lines about progress
NAMED = 5  # files that a warning names
LISTED = 200  # files that are named where this is asked for, or why nothing begins
SURE = 3.29  # standard deviations: 99.9 % of a normal distribution lie within


@dataclass(frozen=True)
class Limit:
    """Limit on unreadable images: how many of them a job bears.

    max_bad  the option, see `allowed`
    images   how many images the job has all told; None: as many as are being looked at
    option   how the option is written where this is used
    """

    max_bad: Any = AUTO
    images: int | None = None
    option: str = "max_bad="

    def check(self) -> "Limit":
        """Return itself, checked. Raises Refusal for a value that is no limit."""
        _meaning(self.max_bad, self.option)
        return self

    def allowed(self, images: int) -> int:
        """Return how many of this number of images may be unreadable; one more is too many.

        A share below 1 ("0.01", "1 %"): so much of them, rounded down. A whole number from 1: that many. 0: none.
        auto: a hundredth or, of less than 600 images, up to 5 that are no more than a tenth. Exact: 0.29 of 100 is 29.
        """
        total = images if self.images is None else self.images
        share, count = _meaning(self.max_bad, self.option)
        if share is None and count is None:
            return max(total // 100, min(FEW, total // 10))
        return count if share is None else int(share * total)  # type: ignore[return-value]

    def refuse(self, bad: int, looked: int, images: int, where: str, names: Sequence[str] = ()) -> None:
        """Raises Refusal if `bad` of the `looked` images, of `images` in all, are too many, or would be in all of them:
        at 99.9 % confidence, if those looked at are a sample."""
        total, allowed = images if self.images is None else self.images, self.allowed(images)
        sampled = looked < total and bad <= allowed
        expected = wilson(bad / looked, looked, SURE)[0] * total if sampled and looked else 0.0
        if bad <= allowed and expected <= allowed:
            return
        of = f"{total:,}" if looked >= total else f"{looked:,} looked at among {total:,}"
        more = f" (of all it would be {expected:,.0f} or more)" if sampled else ""
        some = "; ".join(names[:3]) + ("; …" if len(names) > 3 else "")
        raise Refusal(
            f"{bad:,} of {of} images in {where} cannot be read{more}, more than the {allowed:,} that "
            f"{self.option}{self.max_bad} allows{': ' if some else ''}{some}; mend or remove them, or allow more with "
            f"{self.option}N"
        )


def _meaning(value: Any, option: str) -> tuple[Fraction | None, int | None]:
    """Return (share, count), of which one is None; both are for auto. Raises Refusal."""
    text = str(value).strip()
    if text == AUTO:
        return None, None
    try:
        percent = text.endswith("%")
        number = Fraction(text.removesuffix("%").strip()) / (100 if percent else 1)
    except (ValueError, ZeroDivisionError):
        number, percent = Fraction(-1), False
    if 0 <= number < 1:
        return number, None
    if number >= 1 and number.denominator == 1 and not percent:
        return None, int(number)
    raise Refusal(
        f"{option}{value}: expected a share below 1 (0.01 or 1%), a whole number of images from 1, 0 for none, or auto"
    )


USUAL = Limit()


class _NoLimit(Limit):
    def allowed(self, images: int) -> int:
        return images


NO_LIMIT = _NoLimit()  # for those who decide together with others, or whom it does not concern


# ------------------------------------------------------------------------------------------------------- a look ahead


@dataclass
class Look:
    """Result of a look at the images before anything begins."""

    images: int = 0  # of all splits
    looked: int = 0  # of them; those kept in memory, which are always readable, included
    bad: list[str] = field(default_factory=list)  # messages: "name: reason"

    @property
    def is_whole(self) -> bool:
        """Whether all images were looked at."""
        return self.looked >= self.images

    def lines(self, instead: str, most: int = NAMED) -> list[str]:
        """Return the lines to print, none if all images can be read. `instead`: what becomes of the others."""
        if not self.bad:
            if self.is_whole:
                return []
            return [f"looked at {self.looked:,} of {self.images:,} images: all can be read"]
        of = f"{self.images:,}" if self.is_whole else f"{self.looked:,} looked at among {self.images:,}"
        lines = [f"warning: {len(self.bad):,} of {of} images cannot be read; {instead}:"]
        lines += [f"  {message}" for message in self.bad[:most]]
        return lines + ([f"  … and {len(self.bad) - most:,} more"] if len(self.bad) > most else [])


def look_at(
    splits: Sequence[Images],
    channels: int,
    say: Callable[[str], None] = print,
    stopped: Callable[[], bool] = lambda: False,
) -> Look:
    """Decode images of all `splits`, as far as LOOKED images and SECONDS go: all of a small data set, an even sample of
    a large one. Tells how far it has come, and ends early if `stopped`. A read that never returns is left behind."""
    kept = [images for images in splits if not images.in_memory]
    ends = np.cumsum([len(images) for images in kept])
    count = int(ends[-1]) if kept else 0
    chosen = np.arange(count) if count <= LOOKED else np.random.default_rng(0).permutation(count)[:LOOKED]
    todo, over = iter(chosen.tolist()), threading.Event()
    done: list[int] = []
    bad: list[tuple[int, str]] = []

    def work() -> None:
        for at in todo:
            if over.is_set():
                return
            split = int(np.searchsorted(ends, at, "right"))
            try:
                kept[split].read(at - int(ends[split]) + len(kept[split]), channels, contiguous=False)
            except Unreadable as error:
                bad.append((at, str(error)))
            done.append(at)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(16, usable_cores(), len(chosen)))]
    began = last_line = time.monotonic()
    for thread in threads:
        thread.start()
    while not over.is_set() and (busy := [thread for thread in threads if thread.is_alive()]):
        busy[0].join(0.05)
        now = time.monotonic()
        if now - last_line >= OFTEN:
            last_line = now
            say(f"looking at the images: {len(done):,} of {len(chosen):,} so far")
        if now - began > SECONDS or stopped():
            over.set()
    patience = time.monotonic() + 1.0
    for thread in threads:  # those at work end with the image they have; one that hangs is left behind
        thread.join(max(0.0, patience - time.monotonic()) if over.is_set() else None)
    total = sum(map(len, splits))
    return Look(total, total - count + len(done), [message for _, message in sorted(bad)])


def write_list(path: Path, messages: Sequence[str]) -> None:
    """Add the messages that are not yet in it to the list at `path`."""
    listed = read_list(path)
    fresh = [message for message in messages if message not in listed]
    if fresh:
        before = path.read_bytes() if path.exists() else b""
        lines = "".join(f"{message}\n" for message in fresh).encode(errors="backslashreplace")
        write_atomically(path, lambda aside: aside.write_bytes(before + lines))


def read_list(path: Path) -> set[str]:
    """Return the messages in a list, if there is one."""
    if not path.exists():
        return set()
    return set(path.read_text(encoding="utf-8", errors="backslashreplace").splitlines())


# ----------------------------------------------------------------------------------------------------- while it trains


def watch(
    batches: Loader, folder: Path, images: Images, together: int, say: Callable[[str], None], limit: Limit, look: Look
) -> Generator[Batch, None, None]:
    """Yield the same batches. Each unreadable file among them, and among those of `look`, is written to
    folder/bad_files.txt, and named on the screen once.

    Processes tell each other every `together` batches, so that all stop at once. Raises Refusal if unreadable files
    are more than `limit` allows, or no readable image is found in place of one.
    """
    path, process = folder / BAD_FILES, PartialState()
    known = set(look.bad)
    listed = read_list(path) | known  # said before
    if process.is_main_process:
        write_list(path, look.bad)
    fresh: list[str] = []
    hopeless = False
    total = len(images) if limit.images is None else limit.images
    with closing(iter(batches)) as stream:
        for number, batch in enumerate(stream, 1):
            fresh += [name for name in batch.unreadable if name not in known]
            hopeless |= batch.hopeless
            if process.num_processes == 1 or number % together == 0 or number == len(batches):
                reports = [(fresh, hopeless)]
                if process.num_processes > 1:
                    reports = gather_object(reports)
                names = sorted({name for names, _ in reports for name in names})
                known.update(names)
                unsaid = [name for name in names if name not in listed]
                listed.update(unsaid)
                if process.is_main_process:
                    write_list(path, unsaid)
                    for message in unsaid:
                        count = f"{len(known)} of {total} so far"
                        say(f"warning: unreadable image, another takes its place ({count}): {message}")
                if len(known) > limit.allowed(total):
                    limit.refuse(len(known), total, total, images.where, [f"they are listed in {path}"])
                if any(despair for _, despair in reports):
                    raise Refusal(
                        f"too many images in a row cannot be read, of {images.where}: {len(known)} of {total} so far; "
                        f"mend or remove those listed in {path}"
                    )
                fresh = []
            yield batch
