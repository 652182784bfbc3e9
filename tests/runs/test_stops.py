"""Runs as processes: a disk that does not answer, a worker that is killed, an output nobody reads."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from runs.children import TINY, Run, alive, descendants

from common.processes.stopping import GRACE

pytestmark = pytest.mark.slow


@pytest.fixture
def data(images, tmp_path):
    """A copy of the images, to be taken away."""
    return shutil.copytree(images, tmp_path / "images")


def stall(folder):
    """Put a pipe that nobody writes to in the place of every image."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.unlink()
        os.mkfifo(path)


def begun(train, data, run, *words, **options):
    """A child that has taken a step and now finds no image that can be read."""
    child = train.start(TINY, f"data={data}", f"run={run}", "steps=100000", "tensorboard=false", *words, **options)
    child.said("step 2/")
    stall(data)
    time.sleep(2)
    return child


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGTERM), (1, signal.SIGHUP), (3, signal.SIGINT)])
def test_a_disk_that_does_not_answer(train, data, tmp_path, workers, number):
    child = begun(train, data, tmp_path / "run", f"loader.workers={workers}")
    workers_of = descendants(child.process.pid)
    child.process.send_signal(number)
    ended = child.wait(60)  # about 5 s where nothing else runs
    last = Run(tmp_path / "run").steps[-1]
    assert ended.status == (130 if number == signal.SIGINT else 0)
    assert f"stopped after step {last} of" in ended.stdout and "Traceback" not in ended.stderr
    assert Run(tmp_path / "run").checkpoints[-1] == last
    assert not any(map(alive, workers_of))


def test_two_processes_end_in_time(train, data, tmp_path):
    child = begun(train, data, tmp_path / "run", "loader.workers=1", processes=2)
    below, saved = descendants(child.process.pid), Run(tmp_path / "run").checkpoints
    child.process.send_signal(signal.SIGTERM)
    ended = child.wait(GRACE + 30)
    assert ended.status != 0 and "the last checkpoint is intact" in ended.stderr
    assert Run(tmp_path / "run").checkpoints == saved
    assert not any(map(alive, below))


def test_workers_go_with_a_killed_process(train, data, tmp_path):
    child = begun(train, data, tmp_path / "run", "loader.workers=2")
    workers = descendants(child.process.pid)
    assert len(workers) == 2
    child.process.send_signal(signal.SIGKILL)
    child.wait(20)
    time.sleep(1)
    assert not any(map(alive, workers))


@pytest.mark.parametrize("output", ["| head -1", ">&-", ">&- 2>&-"])
def test_a_run_goes_on_without_a_reader(images, tmp_path, output):
    words = [str(TINY), f"data={images}", f"run={tmp_path / 'run'}", "steps=6", "loader.workers=0"]
    script = f'"$@" {output}; echo ${{PIPESTATUS[0]}} > {tmp_path}/status'
    subprocess.run(
        ["bash", "-c", script, "-", sys.executable, "pretrain/run.py", *words], cwd=TINY.parents[2], timeout=120,
        capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "status").read_text() == "0\n"
    assert Run(tmp_path / "run").steps == [1, 2, 3, 4, 5, 6]
