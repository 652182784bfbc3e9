"""The supervised recipes: pairs that differ in their label alone, each trained at a size for tests; and positional
labels on the backbones that they name."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs.children import Run
from small import Noise, options_for

from common import positions
from common.batches.samples import Samples
from common.batches.views import View
from common.config import find_recipe
from common.data import Images
from common.models import ModelConfig, create
from evaluate.job.subjects import subject_of
from pretrain.config import load
from pretrain.objectives.absolute import Absolute
from pretrain.task import build

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "supervised"
SWIN = "swin_tiny_patch4_window7_224"
SMALL_SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}

# recipe with a label -> (its baseline, the label)
PAIRS = {
    "deit_small_absolute": ("deit_small", "absolute"),
    "deit_small_relative": ("deit_small", "relative"),
    "nest_tiny_absolute": ("nest_tiny", "absolute"),
    "nest_tiny_relative": ("nest_tiny", "relative"),
    "swin_tiny_absolute": ("swin_tiny_conv_14", "absolute"),
    "swin_tiny_relative": ("swin_tiny_conv", "relative"),
}
NAMES = sorted({*PAIRS, *(baseline for baseline, _ in PAIRS.values())})


def recipe(name: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(RECIPES / f"{name}.yaml"))


def test_every_recipe_is_one_of_a_pair_and_opens_with_its_command() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == NAMES
    for name in NAMES:
        first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
        assert first == f"# accelerate launch pretrain/run.py supervised/{name} data=PATH"
        assert find_recipe(f"supervised/{name}", "pretrain") == RECIPES / f"{name}.yaml"
        load(RECIPES / f"{name}.yaml", [])  # every option is known
    assert find_recipe("deit_small", "pretrain") == Path("deit_small")  # of another folder: by that name only


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_differ_in_their_label_alone(name: str) -> None:
    baseline, label = PAIRS[name]
    one, other = recipe(name), recipe(baseline)
    assert one["objectives"].pop(label)["weight"] == 0.5
    assert one.pop("allow_leak", False) == ("deit" not in name)
    one["views"].pop("place", None)
    assert one == other
    assert other["objectives"].keys() == {"classification"}


# ------------------------------------------------------------------------------------------------------- in training

SMALL = [
    "steps=2", "epochs=null", "batch=8", "precision=fp32", "model.attention=explicit", "threads=1", "log_every=1",
    "loader.workers=0", "tensorboard=false", "monitor.most=8", "monitor.bank=16", "optimizer.warmup=0.5",
]  # fmt: skip
SIZES: dict[str, tuple[int, list[str]]] = {
    "deit": (24, [f"model.kwargs.{word}" for word in ("embed_dim=32", "depth=2", "num_heads=2", "patch_size=8")]),
    "swin": (32, [f"model.kwargs.{name}={value}" for name, value in SMALL_SWIN.items()]),
    "nest": (64, []),  # timm lets nobody make it smaller
}


SLOW = ("nest_tiny_absolute", "nest_tiny_relative")  # as their twin, and no smaller


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NAMES])
def test_recipes_train(name: str, inside: Callable[..., int], images: Path, tmp_path: Path) -> None:
    size, kwargs = SIZES[name.split("_")[0]]
    words = [*SMALL, *kwargs, *(f"views.{view}.size={size}" for view in recipe(name)["views"])]
    words += [] if "nest" not in name else ["batch=2", "monitor.held_out=0"]
    assert inside(f"supervised/{name}", *words, f"data={images}", f"run={tmp_path / 'run'}") == 0
    last = Run(tmp_path / "run").metrics[-1]
    trained = {key.removesuffix("/loss") for key in last if key.endswith("/loss") and not key.startswith("val/")}
    assert trained == {"classification", *(label for recipe, (_, label) in PAIRS.items() if recipe == name)}
    assert 0 < last["classification/loss"] < 5 and last["classification/chance"] == pytest.approx(1 / 3)
    about = subject_of(str(tmp_path / "run")).description
    assert about["pooling"] == ("class" if "deit" in name else "mean")
    assert about["position"] == ("none" if "swin" in name else "full")
    assert about["training"]["audit"] == ("leak" if recipe(name).get("allow_leak") else "clean")
    if "swin" in name:
        assert about["grid"] == ([8, 8] if "absolute" in name or "14" in name else [4, 4])


# ----------------------------------------------------------------------------------- where labels attach: the last grid

BACKBONES: dict[str, tuple[str, dict[str, Any], Any, tuple[int, int], str]] = {
    # name, arguments, size, last grid, position of the positional passes
    "deit": ("deit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, [32, 64], (2, 4), "none"),
    "deit distilled": (
        "deit_tiny_distilled_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, 48, (3, 3), "none",
    ),
    "swin": (SWIN, SMALL_SWIN, [32, 48], (4, 6), "full"),
    "swin, position none": (SWIN, SMALL_SWIN, 32, (4, 4), "none"),
    "swin, paper": (SWIN, SMALL_SWIN | {"swin_conv": True, "swin_bias": False}, 32, (4, 4), "none"),
    "swin, paper, absolute": (
        SWIN, SMALL_SWIN | {"swin_conv": True, "swin_bias": False, "swin_merge_last": False}, 32, (8, 8), "none",
    ),
    "nest": ("nest_tiny", {}, 64, (4, 4), "full"),
    "nest, position none": ("nest_tiny", {}, 64, (4, 4), "none"),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_labels_are_of_the_last_grid_and_a_step_moves_everything(name: str) -> None:
    architecture, kwargs, size, grid, position = BACKBONES[name]
    torch.manual_seed(0)
    backbone = create(ModelConfig(architecture, dict(kwargs)), size)
    wanted: dict[str, Any] = {key: {"position": position} for key in ("absolute", "relative")}
    own = "full" if "deit" in name else position  # where a pass can have an embedding and another not
    wanted["classification"] = {"classes": 3, "position": own}
    made = build(backbone, options_for(wanted, backbone), {"global": View(size=list(backbone.size))})
    images = Images(Noise(), "noise", [0, 1, 2, 0, 1, 2, 0, 1], ["a", "b", "c"])
    views = {"global": View(size=list(backbone.size))}
    batch = Samples(images, views, 0, 3, made.draws, labelled=made.labelled).__getitems__([(0, i) for i in range(4)])

    features = made.features(batch)
    absolute = made.objectives["absolute"]
    assert isinstance(absolute, Absolute)
    inputs = made.inputs("absolute", batch, features)
    assert inputs[0]["tokens"].grid == grid == absolute.grid == backbone.grid
    assert torch.equal(absolute.answers(*inputs).labels, torch.arange(math.prod(grid)).expand(4, -1))
    report = made.judge(batch, features)
    assert report["absolute/loss"].item() == pytest.approx(math.log(math.prod(grid)), abs=0.5)
    assert report["relative/loss"].item() == pytest.approx(math.log(positions.num_offsets(grid)), abs=0.5)

    parameters = {key: parameter for key, parameter in made.named_parameters() if parameter.requires_grad}
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.0)
    report["loss"].backward()
    optimizer.step()
    assert not [key for key, parameter in parameters.items() if parameter.grad is None]
    assert not [key for key, parameter in parameters.items() if torch.equal(parameter, before[key])]
    fixed = {key for key, parameter in made.named_parameters() if not parameter.requires_grad}
    assert fixed == {
        key for key, _ in made.named_parameters() if name in ("swin, position none", "nest, position none")
        and key.endswith(("relative_position_bias_table", "pos_embed"))
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kwargs", "grid"),
    [
        ("nest_tiny", {}, (14, 14)),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, (14, 14)),
        (SWIN, {"depths": [1, 1, 1, 1]}, (7, 7)),
        (SWIN, {"depths": [1, 1, 1, 1], "swin_merge_last": False}, (14, 14)),
    ],
)
def test_grids_at_224(name: str, kwargs: dict[str, Any], grid: tuple[int, int]) -> None:
    backbone = create(ModelConfig(name, kwargs), 224)
    objective = Absolute(options_for({"absolute": {}}, backbone)["absolute"], backbone)
    assert objective.grid == backbone.grid == grid
    assert objective.chance == pytest.approx(1 / math.prod(grid))
