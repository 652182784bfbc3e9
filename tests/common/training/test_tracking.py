"""What a run leaves behind: every step once, in full precision, however often it was interrupted."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from runs.children import ROOT, Run
from safetensors import SafetensorError

from common.checkpoints.disk import DiskFull
from common.checkpoints.storage import write_atomically
from common.errors import Refusal
from common.processes.streams import Stream
from common.training.tracking import METRICS, Progress, Tracker, check_tensorboard, clock, cut, summary


def lines(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------- cutting back


@pytest.mark.parametrize(("last", "left"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])])
def test_cut(tmp_path, last, left):
    path = tmp_path / METRICS
    path.write_text("".join(json.dumps({"step": step, "loss": 0.1 * step}) + "\n" for step in (1, 2, 3)))
    cut(path, last)
    assert lines(path) == left
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "lo', '{"loss": 1.0}', "null", "3", "\x00\x00\x00", "{", '{"step": "3"}']
)
def test_a_torn_line_is_dropped(tmp_path, torn):
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    cut(path, 5)
    assert lines(path) == [1, 2]


def test_what_a_killed_cut_left_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / ".metrics.jsonl.4711").write_text('{"step"')
    cut(path, 1)
    assert path.read_text() == '{"step": 1}\n' and list(tmp_path.iterdir()) == [path]


def test_nothing_to_cut(tmp_path):
    cut(tmp_path / METRICS, 3)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- writing


def test_floats_keep_every_bit(tmp_path):
    tracker = Tracker(tmp_path, 0, tensorboard=False)
    loss = float(np.float32(0.1)) / 3
    tracker.write(1, {"loss": loss, "note": "words"})
    tracker.close()
    (record,) = Run(tmp_path).metrics
    assert record["loss"] == loss and record["note"] == "words"


def test_a_number_is_on_the_disk_as_soon_as_it_is_told(tmp_path):
    """A test, or a person, may read along; and a killed process has lost nothing."""
    tracker = Tracker(tmp_path, 0, tensorboard=False)
    tracker.write(1, {"loss": 1.0})
    assert lines(tmp_path / METRICS) == [1]
    tracker.close()


@pytest.mark.parametrize("start", [0, 3])
def test_after_a_resume_every_step_is_there_once(tmp_path, start):
    first = Tracker(tmp_path, 0, tensorboard=True)
    for step in range(1, 6):
        first.write(step, {"loss": float(step), "absolute/accuracy": 0.5})
    first.sync()  # and never closed: killed
    again = Tracker(tmp_path, start, tensorboard=True)
    for step in range(start + 1, 8):
        again.write(step, {"loss": 10.0 + step, "absolute/accuracy": 0.5})
    again.close()
    run = Run(tmp_path)
    assert run.steps == list(range(1, 8))
    expected = [(step, float(step) if step <= start else 10.0 + step) for step in range(1, 8)]
    assert [(record["step"], record["loss"]) for record in run.metrics] == expected
    assert run.scalars()["train/loss"] == expected
    assert [step for step, _ in run.scalars()["absolute/accuracy"]] == list(range(1, 8))


def test_pictures_are_files_too(tmp_path):
    tracker = Tracker(tmp_path, 0, tensorboard=True)
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255, 0, 0
    tracker.picture("board", 7, pixels)
    tracker.close()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / "board-00000007.png")), pixels)
    (tmp_path / "pictures" / ".board-00000008.png.123").write_bytes(b"half")  # of a process that was killed
    Tracker(tmp_path, 7, tensorboard=False).close()
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["board-00000007.png"]


def test_other_processes_write_nothing(tmp_path):
    tracker = Tracker(tmp_path, 3, tensorboard=True, active=False)
    tracker.write(4, {"loss": 1.0})
    tracker.picture("board", 4, np.zeros((2, 2, 3), np.uint8))
    tracker.sync()
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_without_tensorboard_the_run_is_refused_before_it_begins(monkeypatch):
    check_tensorboard(True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(Refusal, match=r"pip install tensorboard, or set tensorboard=false"):
        check_tensorboard(True)


# ---------------------------------------------------------------------------- showing

RECORD = {
    "loss": 1.23456,
    "absolute/loss": 1.0,
    "absolute/accuracy": 0.5,
    "absolute/chance": 0.25,
    "images_per_second": 1234.5,
    "data_wait": 0.031,
}


def test_a_line_in_a_file(capsys):
    progress = Progress(200, 100, active=True)
    progress.show(110, RECORD)
    progress.say("warning: so and so")
    progress.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 110/200  loss 1.2346  absolute 50.0% (chance 25.0%)  1,234 img/s  data_wait 3.1%  ")
    assert second == "warning: so and so"


def test_other_processes_say_nothing(capsys):
    progress = Progress(200, 100, active=False)
    progress.show(110, RECORD)
    progress.step()
    progress.say("nothing")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_summary_leaves_out_held_out_numbers():
    assert "val" not in summary(RECORD | {"val/absolute/accuracy": 0.4})


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3599.6, "1:00:00"), (7325, "2:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


# ---------------------------------------------------------------------------- a full disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize("what", ["metrics.jsonl", "tb", "a picture", "any file", "torch", "safetensors"])
def test_a_full_disk_is_said_with_the_file_and_the_room(tmp_path, monkeypatch, what):
    tracker = Tracker(tmp_path, 0, tensorboard=False)
    image = np.zeros((8, 8, 3), np.uint8)
    file = {"a picture": "board-00000003.png", "any file": "report.json"}.get(what, what)
    with contextlib.suppress(OSError), open("/dev/full", "w") as full, pytest.raises(DiskFull) as refusal:
        if what == "metrics.jsonl":
            tracker.file = full
            tracker.write(3, {"loss": 1.0})
        elif what == "tb":
            tracker.writer = SimpleNamespace(add_scalar=lambda *_: full.write("x" * 100_000))  # type: ignore[assignment]
            tracker.write(3, {"loss": 1.0})
        elif what == "a picture":
            monkeypatch.setattr(Image.Image, "save", lambda self, path, format: Path("/dev/full").write_bytes(b"x"))
            tracker.picture("board", 3, image)
        elif what == "any file":
            write_atomically(tmp_path / file, lambda aside: Path("/dev/full").write_text("x"), needed=12_345)
        else:  # in the words of each library
            error = {
                "torch": RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0\nframe #0"),
                "safetensors": SafetensorError(
                    "Error while serializing: I/O error: No space left on device (os error 28)"
                ),
            }[what]
            write_atomically(tmp_path / file, Mock(side_effect=error))
    message = str(refusal.value)
    assert file in message and "bytes are free" in message and "make room" in message and "\n" not in message
    assert ("12,345 are needed" in message) == (what == "any file")
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


# ---------------------------------------------------------------------------- what is printed


def test_a_stream_without_a_reader_is_silent(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    stream = Stream(io.FileIO(writing, "w"), io.TextIOWrapper(io.BytesIO(), "ascii"))
    print("nobody reads this \udcff", file=stream, flush=True)
    assert os.path.samestat(os.fstat(writing), os.stat(os.devnull))  # what others write there is gone, too
    print("nor this", file=stream, flush=True)
    if Path("/dev/full").exists():
        with open("/dev/full", "wb", buffering=0) as full:
            print("lost", file=Stream(full, io.TextIOWrapper(io.BytesIO(), "ascii")), flush=True)


CLOSED = """import os, sys
from common.processes import launch
files = [os.open(sys.argv[1], os.O_RDWR | os.O_CREAT) for _ in range(2)]
assert min(files) > 2, files
launch.protect()
print("out")
print("err", file=sys.stderr)
os.system("echo shell; echo shell >&2")
sys.exit(7)"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_are_nobodys(tmp_path, closed):
    """No file that is opened later gets their numbers, and what others print."""
    ended = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" "$2" {closed}', sys.executable, CLOSED, tmp_path / "file"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert ended.returncode == 7, ended.stderr
    assert (tmp_path / "file").read_bytes() == b""
    assert sorted(ended.stdout.split()) == (["out", "shell"] if closed == "2>&-" else [])
    assert sorted(ended.stderr.split()) == (["err", "shell"] if closed == ">&-" else [])
