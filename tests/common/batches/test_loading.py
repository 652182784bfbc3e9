"""Waiting for batches: what ends a wait, what is said of it, and how much is prepared ahead."""

import contextlib
import os
import signal
import threading
import time
from multiprocessing import active_children

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from common.batches import loading
from common.batches.loading import Loader, fitting, tensor_bytes
from common.batches.samples import Batch
from common.errors import Refusal
from common.processes import stopping
from common.processes.stopping import Stopped, StopSignal, at_once
from common.training import run

MB = 2**20


class Reads(Dataset):
    """The bytes of a file for each index but 0, which is at hand."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index:
            self.path.read_bytes()
        return torch.full((4,), index, dtype=torch.uint8)


class Counts(Reads):
    """The process and the index, at once."""

    def __getitem__(self, index):
        return torch.tensor([os.getpid(), index])


@pytest.fixture
def stop():
    """A StopSignal of this test alone."""
    handlers = {number: signal.getsignal(number) for number in stopping.HEEDED}
    yield StopSignal()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def signalled(number, after=0.3):
    """Send this process a signal in a while."""
    threading.Timer(after, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_is_heard_while_a_reader_never_returns(stop, tmp_path, workers, number):
    os.mkfifo(tmp_path / "fifo.jpg")
    batches = iter(Loader(Reads(tmp_path / "fifo.jpg"), [[0], [1], [2]], workers, say=print))
    assert [item.tolist() for item in next(batches)] == [[0] * 4]
    before = time.monotonic()
    signalled(number)
    with pytest.raises(Stopped) as stopped:
        next(batches)
    assert time.monotonic() - before < 5
    assert stopped.value.status == 0 and stop.received == number and stop.status == 0
    assert not active_children()  # killed, though stuck in a read, and joined


def test_a_stop_before_the_wait_ends_it_as_well(stop):
    stop.received = signal.SIGINT
    with pytest.raises(Stopped, match="SIGINT") as stopped:
        next(iter(Loader(Counts(None), [[0]], 0)))
    assert stopped.value.status == 130


@pytest.mark.parametrize("before", [False, True])
def test_work_that_may_be_left_half_done_ends_at_once(stop, before):
    done = []
    if before:
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped), at_once():
        done.append("begun")
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("ended")
    assert done == ([] if before else ["begun"]) and not stop.abrupt


@pytest.mark.parametrize("through", [True, False])
def test_a_backward_pass_is_left_before_its_end(stop, through):
    weight = torch.eye(256, requires_grad=True)
    with pytest.raises(Stopped), at_once():
        with run._through_python(nn.Linear(1, 1)) if through else contextlib.nullcontext():
            out = weight
            for _ in range(300):
                out = out @ weight
            signalled(signal.SIGTERM, 0.02)
            out.sum().backward()
        time.sleep(1)
    assert (weight.grad is None) == through


def test_a_call_that_python_cannot_leave_is_ended_with_words(stop, monkeypatch):
    """As the thread sees it: the second look is more than ten seconds after the signal."""
    ended = []
    monkeypatch.setattr(stopping, "end", lambda status, line: ended.append((status, line)))
    with at_once(lost="nothing is kept"):
        stopping._watch._seen(bytes([signal.SIGINT]))
        stopping._watch._look(stop.asked + 9)
        assert ended == []
        stopping._watch._look(stop.asked + 11)
    assert ended == [(130, "nothing is kept")]
    stopping._watch._look(stop.asked + 12)
    assert len(ended) == 1  # outside, what runs may be worth saving


def test_outside_a_wait_a_signal_is_only_noted_and_two_interrupts_end(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.status == 130
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_several_processes_wait_for_a_batch_a_while_and_then_end(stop, tmp_path, monkeypatch):
    """None may leave a step alone: the others are in it. What ends the wait here would end the process."""
    os.mkfifo(tmp_path / "fifo.jpg")
    ended = []

    def end(status, line):
        ended.append((status, line))
        (tmp_path / "fifo.jpg").write_bytes(b"at last")  # opens for who waits

    monkeypatch.setattr(stopping, "GRACE", 0.5)
    monkeypatch.setattr(stopping, "end", end)
    stop.alone = False
    signalled(signal.SIGTERM, 0.1)
    assert next(iter(Loader(Reads(tmp_path / "fifo.jpg"), [[1]], 0)))[0].tolist() == [1] * 4
    assert stop.received == signal.SIGTERM
    assert [status for status, _ in ended] == [1] and "the last checkpoint is intact" in ended[0][1]


def test_a_long_wait_is_told_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(stopping, "STALLED", 0.1)
    os.mkfifo(tmp_path / "fifo.jpg")
    threading.Timer(1.7, (tmp_path / "fifo.jpg").write_bytes, (b"at last",)).start()
    assert next(iter(Loader(Reads(tmp_path / "fifo.jpg"), [[1]], 0)))[0].tolist() == [1] * 4
    said = capfd.readouterr().err
    assert said.count("warning: no batch for") == 1 and "loader.workers" in said


def test_a_killed_process_is_one_line(tmp_path):
    batches = iter(Loader(Reads(tmp_path / "fifo.jpg"), [[0], [1], [2]], 1))
    os.mkfifo(tmp_path / "fifo.jpg")
    with pytest.raises(Refusal, match=r"pid.*Continue with fewer loader\.workers") as refusal:
        for _ in batches:
            (worker,) = active_children()
            os.kill(worker.pid, signal.SIGKILL)
    assert "\n" not in str(refusal.value)
    assert not active_children()


def test_whoever_leaves_kills_the_processes_and_others_go_on():
    """Also where torch would take their death for an accident of another loader's."""
    stays, goes = (iter(Loader(Counts(None), [[0], [1], [2], [3]], 1)) for _ in range(2))
    mine, theirs = int(next(stays)[0][0]), int(next(goes)[0][0])
    with contextlib.closing(goes):
        assert {child.pid for child in active_children()} == {mine, theirs}
    assert {child.pid for child in active_children()} == {mine}
    assert [int(batch[0][1]) for batch in stays] == [1, 2, 3]
    assert not active_children()


# ---------------------------------------------------------------------------- shared memory


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (10_000 * MB, (8, 4)),  # 34 batches of 38 MB: as asked
        (1_000 * MB, (8, 3)),  # 26 batches fit
        (400 * MB, (8, 1)),  # 10
        (200 * MB, (3, 1)),  # 5, of which 2 are in use
        (64 * MB, (0, 4)),  # Docker's: one
        (0, (0, 4)),
    ],
)
def test_what_fits_into_shared_memory(free, expected):
    assert fitting(38 * MB, free, workers=8, prefetch=4, held=2) == expected


def test_bytes_of_a_batch_are_those_of_its_tensors_by_pages():
    batch = Batch(
        {"global": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, torch.arange(2), {"a/b": torch.zeros(2, 513, 4)}
    )
    assert tensor_bytes(batch) == 4096 + 4096 + 5 * 4096
    assert tensor_bytes([(0, torch.zeros(4097, dtype=torch.uint8)), (1, "cannot be read")]) == 2 * 4096


def test_fewer_batches_are_prepared_where_shared_memory_is_small(monkeypatch):
    """Each item takes a page, each batch two: 12 pages hold 2 in use and 4 ahead."""
    notes = []
    data, batches = Counts(None), [[0, 1], [2, 3], [4, 5], [6, 7]]
    monkeypatch.setattr(loading, "_free", lambda: 12 * 4096)
    loader = Loader(data, batches, 3, prefetch=2, say=notes.append)
    assert loader._as_many_as_fit() == (3, 1)
    monkeypatch.setattr(loading, "_free", lambda: 4096)  # none fits: no process is started
    assert {int(item[0]) for batch in Loader(data, batches, 3, say=notes.append) for item in batch} == {os.getpid()}
    assert "3 with 1 are used" in notes[0] and "--shm-size" in notes[0]
    assert "decoded in the training process" in notes[1]


class Growing(torch.utils.data.Dataset):
    """Batches of one tensor, to which item i gives i pages."""

    def __len__(self) -> int:
        return 100

    def __getitems__(self, keys: list[int]) -> torch.Tensor:
        return torch.zeros(4096 * sum(keys), dtype=torch.uint8)


@pytest.mark.parametrize("keys", [[1], [1, 99, 1, 99, 1, 99], list(range(1, 33)), list(range(1, 100))])
def test_the_bytes_of_a_batch_are_guessed_from_several_of_its_items(keys: list[int]) -> None:
    """Its first would say a fiftieth."""
    guessed = Loader(Growing(), [keys], 1)._bytes()
    assert guessed == pytest.approx(4096 * sum(keys), rel=0.15)
