"""Beside a teacher too, an interrupted run goes on as if nothing had happened, in one process and in two."""

import os
import signal
from pathlib import Path

import pytest
from runs.children import Run, Train

TINY_DINO = Path(__file__).resolve().parents[1] / "fixtures" / "tiny_dino.yaml"
KILLED = 6  # after the checkpoint of step 5, in mid-epoch; a line with two processes, which log every third step


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_next_twenty_losses_are_those_of_an_uninterrupted_run(
    train: Train, images: Path, tmp_path: Path, processes: int
) -> None:
    words = [str(TINY_DINO), f"data={images}", "tensorboard=false"]
    if processes == 2:
        # what adds up between two lines is part of the state: means, and prototypes in use since the last
        words += ["log_every=3", "monitor.held_out=0"]
    peaceful, killed = tmp_path / "peaceful", tmp_path / "killed"
    ended = train(*words, f"run={peaceful}", processes=processes)
    assert ended.status == 0, ended.stderr
    assert f"{processes} x CPU" in ended.stdout
    child = train.start(*words, f"run={killed}", processes=processes, until=f"step:{KILLED}")
    for process in child.held():
        os.kill(process, signal.SIGKILL)
    child.kill()
    assert Run(killed).checkpoints == [5]
    resumed = train("--resume", killed, processes=processes)
    assert resumed.status == 0, resumed.stderr
    one, other = Run(peaceful), Run(killed)
    after = {record["step"]: record for record in one.numbers if record["step"] > 5}
    again = {record["step"]: record for record in other.numbers if record["step"] > 5}
    assert max(after) == 26 and len(after) == (21 if processes == 1 else 8)
    assert {step: again[step] for step in after} == after
    assert {"dino/loss", "ibot/loss", "koleo/loss", "sigreg/loss", "absolute/loss", "dino/prototypes_used"} <= after[
        26
    ].keys()
    assert (peaceful / "backbone.safetensors").read_bytes() == (killed / "backbone.safetensors").read_bytes()
