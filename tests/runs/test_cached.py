"""Runs that read their images from a cache: the same losses, stopped and killed while it is made."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import save
from runs.children import TINY, Run, Train, alive, descendants

from common.errors import Refusal


def test_a_full_cache_changes_no_loss_and_may_come_and_go(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path, at_step: Callable[..., None], capsys
) -> None:
    cache = tmp_path / "cache"
    without, cached = Run(tmp_path / "without"), Run(tmp_path / "cached")
    assert inside(*tiny, f"run={without.path}", "steps=8") == 0
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    capsys.readouterr()
    words = ["loader.cache=full", f"loader.cache_root={cache}"]
    assert inside(*tiny, f"run={cached.path}", "steps=8", *words) == 0
    said = capsys.readouterr().out
    assert "cache      96 images as they are: about " in said and f"in {cache}" in said and "made once" in said
    parts = list(cache.rglob("*.pixels"))
    assert len(parts) == 2
    shutil.rmtree(cache)  # made again by whoever needs it
    assert inside("--resume", cached.path) == 0
    assert len(list(cache.rglob("*.pixels"))) == 2
    assert cached.losses == without.losses
    assert inside("--resume", without.path, "steps=9", *words) == 0  # of the same pixels: no other run


def test_a_scaled_cache_is_another_run(inside: Callable[..., int], tiny: list[str], tmp_path: Path) -> None:
    run, words = Run(tmp_path / "run"), [f"loader.cache_root={tmp_path / 'cache'}", "steps=4"]
    assert inside(*tiny, f"run={run.path}", "loader.cache=12", *words) == 0
    other = Run(tmp_path / "other")
    assert inside(*tiny, f"run={other.path}", *words) == 0
    assert run.losses != other.losses
    for change in ("loader.cache=null", "loader.cache=full", "loader.cache=13"):
        with pytest.raises(Refusal, match=r"loader\.cache \(12 -> "):
            inside("--resume", run.path, change)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose decoding takes a while: ten parts of them."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(640):
        save(folder / f"{i:03d}.jpg", rng.integers(0, 256, (300, 300, 3), dtype=np.uint8), quality=95)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_stopped_while_they_make_it_go_on(
    train: Train, photographs: Path, tmp_path: Path, by: signal.Signals
) -> None:
    run, cache, draw = Run(tmp_path / "run"), tmp_path / "cache", random.Random(by)
    words = [str(TINY), f"data={photographs}", f"run={run.path}", "steps=3", "loader.cache=40"]
    words += [f"loader.cache_root={cache}", "monitor.held_out=0", "tensorboard=false"]
    cut = 0
    for _ in range(3):
        child = train.start(*words, processes=2)
        child.said("; made once")
        time.sleep(draw.uniform(0.0, 0.4))
        workers = [process for process in descendants(child.process.pid) if alive(process)]
        for process in workers:
            os.kill(process, by)
        ended = child.wait()
        assert not list(cache.rglob(".*.pixels.*")) or by == signal.SIGKILL
        if run.path.exists():  # it was faster than the signal
            break
        cut += 1
        assert (ended.status == 0) == (by == signal.SIGTERM), ended.stderr
    assert cut
    again = words + (["--overwrite"] if run.path.exists() else [])
    ended = train(*again, processes=2)
    assert ended.status == 0 and "640 images at 40 px" in ended.stdout, ended.stderr
    assert len(list(cache.rglob("*.pixels"))) == 10 and not list(cache.rglob(".*.pixels.*"))
    whole = Run(tmp_path / "whole")
    fresh = [word.replace(str(run.path), str(whole.path)).replace(str(cache), f"{cache}-2") for word in words]
    assert train(*fresh, processes=2).status == 0
    assert run.losses == whole.losses and len(run.losses) == 3
