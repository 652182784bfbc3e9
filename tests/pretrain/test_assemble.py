"""From options to parts: what measuring leaves behind."""

from pathlib import Path
from typing import Any

import pytest
from runs.children import TINY
from small import options_for

from common import config as configuration
from common.batches.views import View
from common.errors import Refusal
from common.models import ModelConfig, create
from common.processes import group
from pretrain.assemble import assemble
from pretrain.config import PretrainConfig
from pretrain.task import build


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
