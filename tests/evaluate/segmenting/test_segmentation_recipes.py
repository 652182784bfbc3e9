"""The recipes of segmentation: what they say, and that they ask for what is there."""

from pathlib import Path

import pytest
from backbones import LV

from common.config import load
from common.models import ModelConfig, create
from evaluate.segmenting.heads import usual_blocks
from evaluate.segmenting.options import SegmentationConfig, check, rate_of

RECIPES = sorted((Path(__file__).parents[3] / "configs" / "evaluate").glob("segmentation_*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    """Each opens with its command and tells what was published, and it asks for blocks that are there."""
    config, text = load(SegmentationConfig, path, []), path.read_text().replace("\n# ", " ")
    check(config)
    assert text.startswith(f"# accelerate launch evaluate/segmentation.py {path.stem} --ckpt RUN --data ")
    name = path.stem.removeprefix("segmentation_")
    if config.head == "linear":
        assert config.frozen and config.blocks is None and "ViT-S/16 47.0" in text
    else:
        single, several, accuracy, channels = {
            "lvvit_s": ("47.9", "48.6", "83.1", 256),
            "lvvit_m": ("49.4", "50.6", "83.5", 256),
            "lvvit_l": ("50.9", "51.8", "84.1", 512),
            "spvit_s": ("49.0", "49.8", "83.4", 256),
        }[name]
        assert f"mIoU {single} at one scale" in text
        assert f"{several} at several scales and mirrored, pixel accuracy {accuracy}" in text
        kwargs = LV | {"depth": {"s": 16, "m": 20, "l": 24}[name[-1]]}
        backbone = create(ModelConfig("lvvit_t", kwargs), 32)
        assert config.blocks == usual_blocks(backbone) and config.channels == channels and not config.frozen
    rate, repaired = rate_of(config)
    assert repaired is None
    assert rate(0) < 2e-6 * config.lr and rate(750) < 0.51 * config.lr and rate(config.steps - 1) < 1e-4 * config.lr
    assert rate(1500) == pytest.approx(config.lr, rel=0.01)


def test_there_is_a_recipe_for_each_published_model() -> None:
    assert {path.stem.removeprefix("segmentation_") for path in RECIPES} >= {
        "lvvit_s", "lvvit_m", "lvvit_l", "spvit_s", "ade20k_linear"
    }  # fmt: skip
