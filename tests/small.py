"""Small backbones, and tasks on images of noise, for tests of objectives and of the audit; options of recipes."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch

from common.batches.samples import Samples
from common.batches.views import View
from common.data import Images
from common.models import Backbone, ModelConfig, create
from common.models.plan import TokenPlan
from pretrain.automatic import suited
from pretrain.config import PretrainConfig, load
from pretrain.task import Pretraining, build, resolve

NONE = TokenPlan("none")
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
BACKBONES = {
    "vit 3x3": ("vit_tiny_patch16_224", VIT, 24),
    "vit 2x3": ("vit_tiny_patch16_224", VIT, [16, 24]),
    "registers": ("vit_small_patch14_reg4_dinov2", VIT, 24),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT, 24),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4},
        32,
    ),
    "nest": ("nest_tiny", {}, 64),
}


def backbone(name: str = "vit 3x3") -> Backbone:
    architecture, kwargs, size = BACKBONES[name]
    torch.manual_seed(0)
    return create(ModelConfig(architecture, dict(kwargs)), size)


def options_for(wanted: dict[str, Any], made: Any) -> dict[str, Any]:
    """Options of objectives in which nothing is automatic that follows from the backbone."""
    return suited(resolve(wanted), made.grid, made.has_class_token)[0]


def task(wanted: dict[str, Any], name: str = "vit 3x3") -> Pretraining:
    made = backbone(name)
    return build(made, options_for(wanted, made), {"global": View(size=list(made.size))})


def loaded(recipe: Path) -> PretrainConfig:
    """Options of a pretraining recipe, of which many tests ask: it is read once."""
    return copy.deepcopy(_read(recipe))


_read = functools.cache(functools.partial(load, words=[]))


class Noise:
    """A source of random pictures."""

    def __init__(self, count: int = 8) -> None:
        self.pixels = torch.randint(0, 256, (count, 3, 40, 50), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, i: int, channels: int) -> torch.Tensor:
        return self.pixels[i]

    def name(self, i: int) -> str:
        return f"noise[{i}]"

    def identity(self) -> bytes:
        return b"noise"


def batch(made: Pretraining, count: int = 4) -> Any:
    torch.manual_seed(1)
    view = {"global": View(size=list(made.backbone.size))}
    samples = Samples(Images(Noise(), "noise"), view, seed=0, channels=3, draws=made.draws)
    return samples.__getitems__([(0, i) for i in range(count)])
