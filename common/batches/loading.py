"""Batches from loader processes: the one place that starts them, sizes what they prepare ahead, and ends them."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import fields, is_dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import Refusal
from ..processes.stopping import fetch, ignore_signals, lost_worker, watch

# More workers than cores are what was asked for; torch says so twice, in seven lines.
warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)

SHARED = Path("/dev/shm")
LOOKED_AT = 8  # images from which the bytes of a batch are guessed: whole ones differ in size
SHARE = 0.5  # of the free shared memory that one loader may fill: others use it too, and images differ in size
PAGE = 4096  # bytes: each tensor in shared memory begins a page of its own
_printed: set[str] = set()  # notes that this process has printed


def unchanged(items: Any) -> Any:
    """Return `items` as they are: the data set makes whole batches."""
    return items


class Loader:
    """Iterable of what `dataset` returns for each batch of `sampler`, in its order; of its items where that is None.

    Batches are prepared by `workers` processes, each `prefetch` ahead (0: in this one), as far as shared memory allows;
    `held` are in use at a time. While one is waited for, a signal raises `Stopped`; whoever leaves the iteration kills
    the processes. Raises Refusal for a process that was killed.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler | Sequence[Sequence[int]] | None,
        workers: int,
        *,
        prefetch: int = 2,
        held: int = 2,
        pin: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.dataset, self.sampler, self.workers = dataset, sampler, workers
        self.prefetch, self.held, self.pin = prefetch, held, pin
        self.say = say or _print

    def __len__(self) -> int:
        return len(self.dataset if self.sampler is None else self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Generator[Any, None, None]:
        watch()
        workers, prefetch = self._as_many_as_fit()
        before = set(active_children())
        batches: Iterator[Any] = iter(
            DataLoader(
                self.dataset,
                **({"batch_size": None} if self.sampler is None else {"batch_sampler": self.sampler}),  # type: ignore[arg-type]
                num_workers=workers,
                collate_fn=unchanged,
                pin_memory=self.pin,
                worker_init_fn=ignore_signals,
                prefetch_factor=prefetch if workers else None,
                generator=torch.Generator(),  # else starting workers would advance dropout's, unlike in a resumed run
            )
        )
        processes = [process for process in active_children() if process not in before]
        try:
            while True:
                try:
                    batch = fetch(batches.__next__)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if (reason := lost_worker(error)) is not None:
                        raise Refusal(reason) from error
                    raise
                yield batch
        finally:
            _end(batches, processes)

    def _as_many_as_fit(self) -> tuple[int, int]:
        """Return (processes, batches that each prepares ahead)."""
        free = _free()
        if not self.workers or free is None or not len(self):
            return self.workers, self.prefetch
        size = self._bytes()
        workers, prefetch = fitting(size, free, self.workers, self.prefetch, self.held)
        if (workers, prefetch) != (self.workers, self.prefetch):
            needed = size * (self.workers * self.prefetch + self.held)
            self.say(
                f"note: {SHARED} has {free / 1e6:,.1f} MB for this loader, and {self.workers} processes with "
                f"{self.prefetch} batches of {size / 1e6:,.1f} MB each need {needed / 1e6:,.1f} MB: "
                + (f"{workers} with {prefetch} are used" if workers else "images are decoded in the training process")
                + "; Docker has --shm-size"
            )
        return workers, prefetch

    def _bytes(self) -> int:
        """Return the bytes of shared memory of one batch, by those of some of its images."""
        if self.sampler is None:
            return tensor_bytes(fetch(lambda: self.dataset[0]))
        keys = next(iter(self.sampler))
        several = getattr(self.dataset, "__getitems__", None)
        if several is None:
            return tensor_bytes(fetch(lambda: self.dataset[keys[0]])) * len(keys)
        some = keys[:: -(-len(keys) // LOOKED_AT)]
        return tensor_bytes(fetch(lambda: several(some))) * len(keys) // len(some)


def fitting(size: int, free: int, workers: int, prefetch: int, held: int) -> tuple[int, int]:
    """Return (processes, batches that each prepares ahead) that fit `free` bytes, with batches of `size` bytes of which
    `held` are in use: fewer ahead first, then fewer processes, at last none, which need no shared memory."""
    for ahead in range(prefetch, 0, -1):
        if size * (workers * ahead + held) <= free:
            return workers, ahead
    fewer = free // max(1, size) - held
    return (min(workers, fewer), 1) if fewer > 0 else (0, prefetch)


def tensor_bytes(item: Any) -> int:
    """Return the bytes of shared memory that the tensors in `item` take on their way from a loader process."""
    if isinstance(item, Tensor):
        return -(-item.nbytes // PAGE) * PAGE
    if is_dataclass(item):
        return sum(tensor_bytes(getattr(item, field.name)) for field in fields(item))
    if isinstance(item, dict):
        return sum(map(tensor_bytes, item.values()))
    return sum(map(tensor_bytes, item)) if isinstance(item, (list, tuple)) else 0


def _free() -> int | None:
    """Return the bytes of shared memory that one loader of this process may use; None where it has no such limit."""
    try:
        disk = os.statvfs(SHARED)
    except (OSError, AttributeError):
        return None
    return int(SHARE * disk.f_bavail * disk.f_frsize / max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _print(line: str) -> None:
    if os.environ.get("RANK", "0") == "0" and line not in _printed:
        _printed.add(line)
        print(line, flush=True)


def _end(batches: Any, processes: Sequence[Any]) -> None:
    """Kill a loader's processes. They ignore gentler signals, and one that is stuck in a read would never be joined."""
    in_main_thread = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None  # torch's calls it an accident
    try:
        for process in processes:
            process.kill()
        deadline = time.monotonic() + 5.0
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if hasattr(batches, "_shutdown_workers"):  # or torch goes on watching the processes that are gone
            batches._shutdown_workers()
    finally:
        if in_main_thread:
            signal.signal(signal.SIGCHLD, handler)
