"""Labelling: an annotator run once over all images, in all processes, into a packed file.

Images are labelled in batches that are the same whatever was done before and however many processes take part, so that
an interrupted file ends as the same bytes. Letters: b images of a batch, C classes, k of them kept, H x W cells.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset

from common.batches.crops import evaluation, resize
from common.batches.loading import Loader
from common.batches.unreadable import Limit, write_list
from common.data import Images, Unreadable
from common.errors import Refusal
from common.processes import collectives
from common.training.precision import DTYPES
from common.training.tracking import clock
from pretrain.token_labels import packed
from pretrain.token_labels.annotators import Annotator
from pretrain.token_labels.packed import LABELLED, NOT_YET, UNREADABLE, Header, Writer
from pretrain.token_labels.reader import digest, names_of

SAFE = 10.0  # seconds after which what was done is flushed to the disk
OFTEN = 5.0  # seconds between lines about progress


@dataclass(frozen=True)
class How:
    """Options of a labelling that decide its numbers."""

    top: int | None  # None: 5, or as many classes as there are
    crop: float | None  # None: whole images; else what of their tighter side is shown, in the centre
    batch: int
    precision: str


def shown(image: Tensor, annotator: Annotator, crop: float | None) -> Tensor:
    """An image as the annotator sees it: uint8 (C, H, W) -> uint8 (C, height, width)."""
    if crop is None:
        return resize(image, annotator.size, annotator.interpolation)
    return evaluation(image, annotator.size, crop, annotator.interpolation)


def header_for(annotator: Annotator, images: Images, how: How) -> Header:
    """What the file will say of itself. Raises Refusal for more classes of a cell than there are."""
    ends, names, named = names_of(images)
    top = min(5, annotator.classes) if how.top is None else how.top
    if not 1 <= top <= annotator.classes:
        raise Refusal(f"--top {top}: expected 1 to {annotator.classes}, the classes of {annotator.name}")
    return Header(
        images=len(images),
        names_bytes=len(names),
        names_crc=packed.index_crc(ends, names),
        named=named,
        channels=annotator.channels,
        classes=annotator.classes,
        class_names=annotator.class_names,
        top=top,
        grid=list(annotator.grid),
        size=list(annotator.size),
        crop=how.crop,
        annotator=annotator.name,
        weights_sha256=annotator.weights_sha256,
        precision=how.precision,
        batch=how.batch,
    )


def in_words(header: Header, out: Path) -> str:
    """What will be written, and the room for it."""
    size = header.places(len(header.encoded()))["end"]
    h, w = header.grid
    seen = "whole images, squashed" if header.crop is None else f"the central {header.crop:g} of images"
    return (
        f"annotator  {header.annotator}: {header.classes:,} classes, {seen} to {header.size[0]}x{header.size[1]}\n"
        f"labels     {out}: {header.images:,} images x {header.top} classes x {h}x{w} cells x 4 bytes = "
        f"{size / 2**20:,.1f} MiB; {shutil.disk_usage(out.absolute().parent).free / 2**20:,.0f} MiB are free"
    )


def refuse_no_room(header: Header, out: Path) -> None:
    """Raises Refusal where what is still to be written does not fit."""
    part = packed.part_of(out)
    there = part.stat().st_blocks * 512 if part.exists() else 0
    free, needed = shutil.disk_usage(out.absolute().parent).free, header.places(len(header.encoded()))["end"] - there
    if needed > free:
        raise Refusal(
            f"--out {out}: {needed:,} bytes are needed and {free:,} are free: make room, or lower --size or --top"
        )


class _Shown(Dataset):
    """Images as the annotator sees them, and digests of their pixels; one that cannot be read is its error message."""

    def __init__(self, images: Images, annotator: Annotator, crop: float | None) -> None:
        self.images, self.crop = images, crop
        self.seen = Annotator(**{**vars(annotator), "dense": None, "modules": []})  # nothing heavy goes to a worker

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | str:
        try:
            image = self.images.read(i, self.seen.channels, contiguous=False)
        except Unreadable as error:
            return str(error)
        return shown(image, self.seen, self.crop), digest(image)


def keep_best(logits: Tensor, top: int) -> np.ndarray:
    """Records (b, 2, k, H, W) of 16 bits of logits (b, C, H, W). Raises Refusal for logits that are no numbers."""
    scores, ids = logits.topk(top, 1)
    half = scores.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise Refusal(
            "the annotator's logits are not finite, or above 65,504: its weights are damaged, or no classifier"
        )
    packed_scores = half.cpu().numpy().astype("<f2").view("<u2")
    return np.stack([packed_scores, ids.cpu().numpy().astype("<u2")], 1)


class Labelling:
    """One run over the images of this process."""

    def __init__(
        self,
        annotator: Annotator,
        images: Images,
        how: How,
        out: Path,
        limit: Limit,
        workers: int,
        process: PartialState,
    ) -> None:
        self.annotator, self.images, self.how, self.out = annotator, images, how, out
        self.limit, self.workers, self.process = limit, workers, process
        self.header = header_for(annotator, images, how)
        self.messages: list[str] = []  # about images that cannot be read
        self.right = torch.zeros(2, dtype=torch.float64)  # images that were named right, of those with a label

    def run(self, say: Callable[[str], None]) -> None:
        """Label all images that are not labelled yet. Every process takes part. Raises Refusal if more images than
        the limit allows cannot be read."""
        with closing(Writer(self.out, self.header)) as writer:
            states = writer.states()
            n, size = len(states), self.how.batch
            todo = [range(at, min(at + size, n)) for at in range(0, n, size)]
            todo = [rows for rows in todo if (states[rows.start : rows.stop] == NOT_YET).any()]
            self.process.wait_for_everyone()  # nobody writes before all have looked
            if len(todo) * size < n:
                say(f"goes on    {n - sum(map(len, todo)):,} of {n:,} images are labelled already")
            self._label(todo[self.process.process_index :: self.process.num_processes], writer, say)
            self.process.wait_for_everyone()
            self._judge(writer.states(), say)

    def _label(self, todo: Sequence[range], writer: Writer, say: Callable[[str], None]) -> None:
        begun = safe = told = time.monotonic()
        done, total = 0, sum(map(len, todo)) * self.process.num_processes
        for rows, items in zip(todo, self._loaded(todo), strict=True):
            self._write(rows, items, writer)
            done += len(rows) * self.process.num_processes  # the others are about as far
            now = time.monotonic()
            if now - safe > SAFE:
                writer.commit()
                safe = now
            if now - told > OFTEN or done == len(rows) * self.process.num_processes:
                told = now
                speed = done / (now - begun)
                left = clock((total - done) / speed)
                say(f"labelled   {min(done, total):,} of {total:,} images, {speed:,.1f} img/s, ETA {left}")
        writer.commit()

    def _loaded(self, todo: Sequence[range]) -> Iterator[list[Any]]:
        if todo:  # of few images a process may have none
            yield from Loader(_Shown(self.images, self.annotator, self.how.crop), todo, self.workers)

    @torch.no_grad()
    def _write(self, rows: range, items: Sequence[tuple[Tensor, int] | str], writer: Writer) -> None:
        """Label a batch. An image that cannot be read is black to the annotator and marked: batches keep their size."""
        black = torch.zeros(self.annotator.channels, *self.annotator.size, dtype=torch.uint8)
        seen = [black if isinstance(item, str) else item[0] for item in items]
        bad = np.array([isinstance(item, str) for item in items])
        device = self.process.device
        dtype = DTYPES[self.how.precision]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = self.annotator.dense(torch.stack(seen).to(device))
        records = keep_best(logits, self.header.top)
        records[bad] = 0
        digests = np.array([0 if isinstance(item, str) else item[1] for item in items], np.uint32)
        writer.write(rows, records, digests, np.where(bad, UNREADABLE, LABELLED))
        self._compare(logits, rows, bad)
        self.messages += [item for item in items if isinstance(item, str)]
        if len(self.messages) > self.limit.allowed(len(self.images)):
            writer.commit()
            self.limit.refuse(len(self.messages), len(self.images), len(self.images), self.images.where, self.messages)

    def _compare(self, logits: Tensor, rows: range, bad: np.ndarray) -> None:
        labels = self.images.labels
        if labels is None or len(self.images.classes or ()) != self.header.classes:
            return
        label = labels[rows.start : rows.stop]
        known = (label >= 0) & ~bad
        guess = logits.mean((2, 3)).argmax(1).cpu().numpy()
        self.right += torch.tensor([((guess == label) & known).sum(), known.sum()])

    def _judge(self, states: np.ndarray, say: Callable[[str], None]) -> None:
        """Say what became of all images, and list those without labels. Raises Refusal if they are too many."""
        messages = gather_object(self.messages) if self.process.num_processes > 1 else self.messages
        right, known = collectives.total(self.right).tolist()
        if known:
            say(f"agrees     the mean of its cells names the class of {right / known:.1%} of {known:,.0f} images")
        bad = np.flatnonzero(states == UNREADABLE)
        listed = self.out.with_name(f"{self.out.name}.bad_files.txt")
        if len(bad) and self.process.is_main_process:
            told = {message.partition(": ")[0] for message in messages}
            names = [name for name in (self.images.name(int(i)) for i in bad) if name not in told]
            write_list(listed, [*messages, *(f"{name}: it could not be read" for name in names)])
        if len(bad):
            say(f"warning: {len(bad):,} of {len(states):,} images cannot be read and have no labels; see {listed}")
        total = len(self.images)
        if len(bad) > self.limit.allowed(total):
            self.limit.refuse(len(bad), total, total, self.images.where, [f"they are listed in {listed}"])
        if unfinished := int((states == NOT_YET).sum()):
            raise RuntimeError(f"{unfinished} records were not written")
