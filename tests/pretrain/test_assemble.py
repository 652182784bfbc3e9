"""From options to parts: what measuring leaves behind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs.children import TINY, Run
from small import options_for

from common import config as configuration
from common.batches.views import View
from common.checkpoints import public
from common.errors import Refusal
from common.features import whitened
from common.features.whitened import filters_for
from common.models import ModelConfig, create
from common.processes import group
from pretrain.assemble import assemble
from pretrain.config import PretrainConfig
from pretrain.task import build

STEM = ["model.stem={filters: 10, side: 6}", "loader.workers=0", "monitor.held_out=0.1"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer patches: the tests' images are all alike."""
    monkeypatch.setattr(whitened, "DRAWN", 1000)
    whitened._filters.cache_clear()


def test_measuring_the_speed_leaves_no_gradient(images: Path) -> None:
    """The first step would add them to its own."""
    words = [f"data={images}", "precision=auto", "model.attention=auto", "loader.workers=0"]
    parts = assemble(configuration.load(PretrainConfig, TINY, words), group.join())
    assert parts.config.precision != "auto" and "precision" in parts.reasons
    assert all(parameter.grad is None for parameter in parts.task.parameters())


def test_labels_are_places_in_the_global_views_grid() -> None:
    small: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "dynamic_img_size": True}
    views = {"global": View(size=[16, 24]), "local": View(size=[8, 16])}
    wanted = {"absolute": {"view": "local"}, "relative": {}}
    backbone = create(ModelConfig("vit_tiny_patch16_224", small), [16, 24])
    with pytest.raises(
        Refusal, match=r"objectives\.absolute\.view=local is 8x16, and labels .* 16x24: give both one size"
    ):
        build(backbone, options_for(wanted, backbone), views)


def test_a_stem_begins_as_patches_of_its_own_training_images(images: Path, few: None) -> None:
    """Before a teacher is copied from it, and with the heads that it has anyway."""

    def made(*words: str) -> Any:
        return assemble(configuration.load(PretrainConfig, TINY, [f"data={images}", *STEM, *words]), group.join())

    dino = ["objectives={dino: {prototypes: 16, hidden: 16, bottleneck: 8}, absolute: {}}", "views.global.count=2"]
    parts = made(*dino)
    backbones = [module for module in parts.task.modules() if type(module).__name__ == "FilterStem"]
    filters, offsets = filters_for(parts.task.backbone, parts.train, parts.config.seed)
    assert len(backbones) == 2  # student and teacher
    for stem in backbones:
        assert torch.equal(stem.filters, filters) and torch.equal(stem.offsets, offsets)
    whitened._filters.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.assemble.fill", lambda backbone, filters: None)
        unfilled = made(*dino)
    before, after = unfilled.task.state_dict(), parts.task.state_dict()
    ends = ("patch_embed.filters", "patch_embed.offsets")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith(ends)
    }
    assert not torch.equal(made(*dino, "seed=1").task.backbone.model.patch_embed.filters, filters)


def test_a_stem_is_filled_once_and_a_resumed_run_goes_on_with_what_it_learned(
    tiny: list[str], inside: Callable[..., int], few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [*tiny, STEM[0], "monitor.held_out=0", "tensorboard=false", "steps=8"]
    assert inside(*words, f"run={tmp_path}/whole") == 0
    part = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(part / "state" / "step_00000008")
    for name in ("backbone.safetensors", "backbone.json"):
        shutil.copy(part / "state" / "step_00000004" / name, part / name)
    monkeypatch.setattr("pretrain.assemble.filters_for", lambda *_: pytest.fail("the filters were made anew"))
    assert inside("--resume", part) == 0
    assert Run(part).losses == Run(tmp_path / "whole").losses
    trained, again = (public.load_backbone(run)[0].model.patch_embed for run in (tmp_path / "whole", part))
    assert torch.equal(trained.filters, again.filters)
    config = configuration.load(PretrainConfig, TINY, [*words[1:], f"model.init={part}"])
    begun = assemble(config, group.join()).task.backbone.model.patch_embed
    assert torch.equal(begun.filters, trained.filters) and torch.equal(begun.thresholds, trained.thresholds)
    assert (trained.thresholds != 0.25).all()
