"""Stopping when asked: signals that save, waits for data that a signal ends, and an end for what no signal reaches.

A stalled disk can hold a process in a call that never returns, where no Python handler runs. A thread of this module
reads the signals too (signal.set_wakeup_fd), says when a batch takes long, and ends a process that cannot end itself.
"""

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

# What asks a training to save and stop: SLURM sends SIGUSR1 or SIGUSR2 on request, grid engines SIGXCPU, and a terminal
# that closes SIGHUP. SIGQUIT (Ctrl-\) still ends a process as it is.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
HEEDED = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
INTERRUPTED = 128 + signal.SIGINT

STALLED = 60.0  # seconds one batch may take before somebody is told
GRACE = 10.0  # seconds after a signal in which a batch that others wait for may still come
IMPATIENT = 5.0  # seconds after the second Ctrl-C in which a process may end by itself
SLOWER, LEAST = 10.0, 60.0  # a step of several processes may take so many times the longest, and a minute more


class Stopped(BaseException):
    """Signal that ended a wait for data, in which nothing is half done. Not an Exception: no decoder may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.status = exit_status(number)


def exit_status(number: int) -> int:
    """Return the exit status of a process that stopped as asked: 130 after Ctrl-C, so that scripts stop, else 0."""
    return INTERRUPTED if number == signal.SIGINT else 0


class StopSignal:
    """Memory of a signal that asked to stop, so that the loop can finish its step and save. While a batch is waited
    for, the signal raises `Stopped` instead. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # else the others wait for what this process does
        self.asked: float | None = None  # when the first signal came; set by the thread, also where no handler runs
        self.interrupts = 0
        self.abrupt = False  # within `at_once`
        self.lost: str | None = None  # what to say where that ends the process
        self.number = signal.SIGTERM  # of the last signal; set by the thread
        self.limit: tuple[float, float] | None = None  # (since when, seconds) of what should end soon
        for number in HEEDED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, self._note)
        _watch.current = weakref.ref(self)
        _watch.start()

    def _note(self, number: int, frame: Any) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number
        if self.abrupt or (self.alone and _watch.waiting is not None):
            self.abrupt = False
            raise Stopped(number)

    @property
    def status(self) -> int:
        """Return the exit status of a run that stopped as asked."""
        return 0 if self.received is None else exit_status(self.received)

    def heed(self) -> None:
        """Raises Stopped if a signal asked to stop: for where nothing is half done."""
        if self.received is not None:
            raise Stopped(self.received)

    @contextlib.contextmanager
    def within(self, longest: float) -> Iterator[None]:
        """Limit the time of what runs inside and waits for other processes: after a signal it may take ten times
        `longest` (seconds) and a minute before this process ends without it. A process alone has no such limit."""
        if not self.alone:
            self.limit = time.monotonic(), LEAST + SLOWER * longest
        try:
            yield
        finally:
            self.limit = None


def fetch(following: Callable[[], T]) -> T:
    """Call `following`, which waits for data. Raises Stopped if a signal asked to stop, before or meanwhile."""
    stop = _watch.stop
    try:
        _watch.waiting = time.monotonic()
        if stop is not None and stop.alone and stop.received is not None:
            raise Stopped(stop.received)
        return following()
    finally:
        _watch.waiting = None


@contextlib.contextmanager
def at_once(wanted: bool = True, lost: str | None = None) -> Iterator[None]:
    """Let a signal, before or inside, raise Stopped as soon as Python runs: for work that may be left half done.

    One call can take minutes. `lost`: what is inside is all that would be lost, so that ten seconds after a signal the
    process ends with these words.
    """
    stop = _watch.stop
    if stop is None or not wanted:
        yield
        return
    stop.abrupt, stop.lost = True, lost
    try:
        stop.heed()
        yield
    finally:
        stop.abrupt, stop.lost = False, None


class _Watch:
    """Thread that sees signals and waits which the main thread cannot attend to. One for a process."""

    def __init__(self) -> None:
        self.waiting: float | None = None  # since when the main thread waits for a batch
        self.current: Callable[[], StopSignal | None] = lambda: None
        self.process = 0  # whose thread runs: a fork has none
        self.warned: float | None = None  # the wait that was warned of

    @property
    def stop(self) -> StopSignal | None:
        """StopSignal of this process, while somebody holds it."""
        return self.current()

    def start(self) -> None:
        """Start the thread, once, from the main thread."""
        if self.process == os.getpid() or threading.current_thread() is not threading.main_thread():
            return
        self.process = os.getpid()
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        os.set_blocking(reading, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._run, args=(reading,), name="stopping", daemon=True).start()

    def _run(self, reading: int) -> None:
        while True:
            if select.select([reading], [], [], 1.0)[0]:
                with contextlib.suppress(BlockingIOError):
                    self._seen(os.read(reading, 4096))
            self._look(time.monotonic())

    def _seen(self, numbers: bytes) -> None:
        stop = self.stop
        if stop is None:
            return
        stop.interrupts += numbers.count(signal.SIGINT)
        for number in numbers:
            stop.number = signal.Signals(number) if number in HEEDED else stop.number
        if any(number in HEEDED for number in numbers):
            stop.asked = stop.asked or time.monotonic()

    def _look(self, now: float) -> None:
        """Say that a batch takes long; end the process where it was asked to and cannot."""
        since, stop = self.waiting, self.stop
        if since is not None and now - since > STALLED and self.warned != since:
            self.warned = since
            complain(
                f"warning: no batch for {now - since:.0f} s, still waiting: is the disk that holds the images slow or "
                "gone, or are the loader's processes too few (loader.workers, --workers)?"
            )
        if stop is None or stop.asked is None:
            return
        if stop.interrupts > 1 and now - stop.asked > IMPATIENT:
            end(INTERRUPTED, "error: ended at the second Ctrl-C; what was saved before is intact")
        if stop.lost is not None and stop.alone and now - stop.asked > GRACE:
            end(exit_status(stop.number), stop.lost)
        if since is not None and now - max(stop.asked, since) > GRACE:
            end(1, f"error: asked to stop, and the batch that is waited for did not come within {GRACE:.0f} s: ended "
                   "without saving; the last checkpoint is intact")  # fmt: skip
        if stop.limit is not None and now - max(stop.asked, stop.limit[0]) > stop.limit[1]:
            end(1, f"error: asked to stop, and the other processes did not answer within {stop.limit[1]:.0f} s: ended "
                   "without saving; the last checkpoint is intact")  # fmt: skip


_watch = _Watch()
watch = _watch.start


def asked_to_stop() -> bool:
    """Return whether a signal asked one of several processes to stop, which then may lose each other."""
    stop = _watch.stop
    return stop is not None and not stop.alone and stop.received is not None


def complain(line: str) -> None:
    """Write a line to standard error, from any thread, whatever became of the stream."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def end(status: int, line: str) -> None:
    """End this process and its loader's at once, from any thread."""
    kill_children()
    complain(line)
    os._exit(status)


def kill_children() -> None:
    """Kill the processes that this one started to load data: they ignore other signals, and may be stuck in a read."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, ValueError):
            child.kill()


def ignore_signals(_worker: int) -> None:
    """Ignore signals in a loader's worker: the training process decides when to stop, also when a signal goes to the
    whole group; but none outlives it, not even one that is stuck in a read."""
    signal.set_wakeup_fd(-1)  # the parent's
    for number in HEEDED:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)


def die_with_parent(number: int) -> None:
    """Ask Linux for signal `number` when the process that started this one ends."""
    PR_SET_PDEATHSIG = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def lost_worker(error: BaseException) -> str | None:
    """Explain an error that means that a loader process was killed, or that shared memory is full; else None."""
    text = " ".join(str(error).split())
    if "Too many open files" in text:
        return "too many open files for the batches that are prepared ahead: raise the limit (ulimit -n 65536)"
    if "shared memory" in text or "/torch_" in text:
        return (
            f"shared memory (/dev/shm) is too small for the batches that are prepared ahead ({text[-120:]}): lower "
            "loader.workers (--workers of an evaluation; 0 needs none), or give the container more (--shm-size)"
        )
    if text.startswith("DataLoader worker (pid"):
        what = text[len("DataLoader worker ") :].partition(". ")[0].rstrip(". ")
        return (
            f"a process of the loader has ended, {what}: out of memory, or somebody stopped it; what was saved before "
            "is intact. Continue with fewer loader.workers (--workers of an evaluation)"
        )
    return None
