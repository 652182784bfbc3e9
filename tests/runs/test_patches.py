"""Runs whose patches are cut apart: the backbone's patches, the same after a break, and nothing of it in judging."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs.children import Run, Train

from common.batches.views import View
from common.checkpoints.public import load_backbone
from common.errors import Refusal
from pretrain.automatic import Facts, patched, resolve
from pretrain.config import PretrainConfig, stored_in

APART = ["views.global.gap=2", "views.global.patch_jitter=0.4", "views.global.patch_drop_colour=0.3"]


@pytest.mark.parametrize(
    ("size", "grid", "patch"), [(32, (4, 4), 8), ([16, 24], (2, 3), 8), ([32, 32], (4, 2), [8, 16])]
)
def test_patches_are_the_backbones(size: Any, grid: tuple[int, int], patch: Any) -> None:
    views = {"global": View(size, gap=2), "local": View(16, patch_jitter=0.1), "plain": View(33)}
    known, reasons = patched(views, grid)
    assert [view.patch for view in known.values()] == [patch, patch, None]
    told = f"views.global has {grid[0]}x{grid[1]} of them"
    assert reasons == {f"views.{name}.patch": told for name in ("global", "local")}
    assert patched(known, grid) == (known, {}) and views["global"].patch is None


def test_a_run_settles_them() -> None:
    config = PretrainConfig(batch=8, steps=1, views={"global": View(32, gap=2)}, objectives={"absolute": {}})
    settled = resolve(config, Facts(64, (4, 4), class_token=True))
    assert settled.options.views["global"].patch == 8 and config.views["global"].patch is None
    assert settled.reasons["views.global.patch"] == "views.global has 4x4 of them"


@pytest.mark.parametrize(
    ("views", "told"),
    [
        (
            {"global": View(32, patch=16)},
            r"views\.global\.patch=16: the backbone's patches have 8x8 pixels; expected patch=8, or patch=null",
        ),
        (
            {"global": View(32), "local": View(16, patch=[8, 4], gap=1)},
            r"views\.local\.patch=\[8, 4\]: the backbone's patches have 8x8 pixels",
        ),
        (
            {"global": View(33, gap=1)},
            r"views\.global: patches .* views\.global\.size=33 is no multiple .* 4x4: choose",
        ),
        ({"global": View(32), "local": View(12, gap=1)}, r"view: size=12 is no multiple of patch=8"),
    ],
)
def test_other_patches_are_refused(views: dict[str, View], told: str) -> None:
    with pytest.raises(Refusal, match=told):
        patched(views, (4, 4))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_it_goes_on_to_the_bit_and_is_judged_without_a_gap(
    inside: Callable[..., int], tiny: list[str], at_step: Callable, tmp_path: Path, workers: int
) -> None:
    def crash() -> None:
        raise KeyboardInterrupt

    words = [*tiny, *APART, "steps=5", "monitor.held_out=0", "tensorboard=false"]
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    assert inside(*words, f"run={whole.path}") == 0
    at_step(5, crash)
    with pytest.raises(KeyboardInterrupt):
        inside(*words, f"run={broken.path}")
    assert broken.checkpoints == [4] and stored_in(broken.path).views["global"].patch == 8
    at_step(0, crash)
    assert inside("--resume", broken.path, f"loader.workers={workers}") == 0
    assert broken.losses == whole.losses and broken.numbers == whole.numbers
    assert load_backbone(whole.path)[0].size == (16, 24)


@pytest.mark.slow
def test_a_run_from_before_there_were_gaps_goes_on(
    inside: Callable[..., int], tiny: list[str], at_step: Callable, tmp_path: Path
) -> None:
    def crash() -> None:
        raise KeyboardInterrupt

    words = [*tiny, "steps=5", "monitor.held_out=0", "tensorboard=false"]
    whole, early = Run(tmp_path / "whole"), Run(tmp_path / "early")
    assert inside(*words, f"run={whole.path}") == 0
    at_step(5, crash)
    with pytest.raises(KeyboardInterrupt):
        inside(*words, f"run={early.path}")
    stored = early.path / "config.yaml"
    options = yaml.safe_load(stored.read_text())
    for name in ("patch", "gap", "patch_at", "patch_jitter", "patch_drop_colour"):
        del options["views"]["global"][name]
    stored.write_text(yaml.safe_dump(options))
    at_step(0, crash)
    assert inside("--resume", early.path) == 0
    assert early.losses == whole.losses and stored_in(early.path).views["global"].gap == 0


@pytest.mark.slow
def test_two_processes_train_on_the_crops_of_one(train: Train, tiny: list[str], tmp_path: Path) -> None:
    still = ["model.kwargs.drop_path_rate=0", "model.kwargs.proj_drop_rate=0"]
    words = [*tiny, *APART, *still, "steps=2", "tensorboard=false", "monitor.held_out=0"]
    for processes in (1, 2):
        ended = train(*words, f"run={tmp_path / str(processes)}", processes=processes)
        assert ended.status == 0, ended.stderr
    one, two = (Run(tmp_path / str(processes)).metrics for processes in (1, 2))
    assert len(one) == 2
    assert one[0]["absolute/loss"] == pytest.approx(two[0]["absolute/loss"], abs=1e-5)
