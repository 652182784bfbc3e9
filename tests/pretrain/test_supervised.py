"""The supervised recipes: published numbers, pairs that differ in their label alone, trainings at a size for tests; and
positional labels on the backbones that they name."""

import copy
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs.children import Run
from small import Noise, loaded, options_for

from common import positions
from common.batches.samples import Samples
from common.batches.views import View, height_width
from common.config import find_recipe, read_yaml
from common.data import Images
from common.models import ModelConfig, create
from common.models.create import shapes
from evaluate.job.subjects import subject_of
from pretrain.config import PretrainConfig
from pretrain.objectives.absolute import Absolute
from pretrain.task import build

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "supervised"
SWIN = "swin_tiny_patch4_window7_224"
SMALL_SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}

# architectures, with what tells the baseline of an absolute and of a relative label from the plain recipe
PLAIN = ("vit_base", "deit_small", "deit_base", "nest_tiny", "nest_small", "nest_base", "swin_tiny", "swin_base")
LARGEST = (
    "vit_base",
    "deit_base",
    "nest_base",
    "swin_base",
)  # those that the paper has figures of, Mini-ImageNet's too
BASELINES = {"absolute": "_conv_14", "relative": "_conv"}  # of Swin, whose network the label's source changes
# recipe with a label -> (its baseline, the label)
PAIRS = {
    f"{plain}_{label}{data}": (f"{plain}{changed if 'swin' in plain else ''}{data}", label)
    for plain in PLAIN
    for label, changed in BASELINES.items()
    for data in ("", "_mini")
    if not data or plain in LARGEST
} | {f"cifar10_{label}": ("cifar10", label) for label in BASELINES}
IRPE = [f"deit_{size}_irpe_{sides}" for size in ("tiny", "small", "base") for sides in ("k", "qk", "qkv")]
ALONE = ["deit_tiny", "swin_tiny", "swin_base", "swin_base_mini", *IRPE]  # nothing of a label is compared with them
NAMES = sorted({*PAIRS, *(baseline for baseline, _ in PAIRS.values()), *ALONE})


def recipe(name: str) -> Any:
    """What a recipe and those it inherits from say."""
    return copy.deepcopy(said(RECIPES / f"{name}.yaml"))


@functools.cache
def said(path: Path) -> Any:
    """What the recipe at `path` says, read once."""
    return OmegaConf.to_container(read_yaml(path, PretrainConfig))


def test_every_recipe_opens_with_its_command_and_says_what_was_published() -> None:
    written = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert [name for name in written if not name.startswith(("lvvit", "spvit", "tokens"))] == NAMES  # see token_labels
    for name in NAMES:
        text = (RECIPES / f"{name}.yaml").read_text()
        assert text.splitlines()[0] == f"# accelerate launch pretrain/run.py supervised/{name} data=PATH"
        comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        assert re.search(r"[Pp]ublished.{,60}\d\d\.\d\d? %|[Nn]o figure is published", comment), name
        assert "arXiv" in comment and ("base:" in text or "Different: " in comment), name
        assert "no mixup" not in comment.lower()
        assert find_recipe(f"supervised/{name}", "pretrain") == RECIPES / f"{name}.yaml"
    assert find_recipe("deit_small", "pretrain") == Path("deit_small")  # of another folder: by that name only


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_differ_in_their_label_alone(name: str) -> None:
    baseline, label = PAIRS[name]
    one, other = recipe(name), recipe(baseline)
    own = one["objectives"].pop(label)
    assert own["weight"] == 0.5
    leaks = one.pop("allow_leak", False)
    place = one["views"].pop("place", None)
    assert one == other
    assert other["objectives"].keys() == {"classification"}
    # a pass of its own, without embedding, on images that nothing was mixed into; or said to leak
    apart = own["position"] == "none" and own.get("view") == "place" and place is not None
    assert apart != leaks and leaks == ("swin" in name or "nest" in name)
    assert not apart or place["flip"] == 0.0 == View(**place).mixup == View(**place).cutmix


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_mini")])
def test_mini_imagenet_differs_in_its_schedule_alone(name: str) -> None:
    one, other = recipe(name), recipe(name.removesuffix("_mini"))
    assert one.pop("batch") == 256 and other.pop("batch") in (512, 1024)
    assert one.pop("average", None) == (0.9999 if "deit" in name else None)
    other.pop("average", None)
    assert one == other


def test_recipes_hold_the_published_numbers() -> None:
    """DeiT (arXiv 2012.12877, table 9; iRPE changes nothing), Swin (2103.14030, its config.py), NesT (2105.12723, its
    configs/imagenet_nest.py), Positional Label's ViT-B and Swin-T (its config.py)."""
    drops = {"tiny": 0.2, "small": 0.3, "base": 0.5}  # of Swin and NesT
    for name in (name for name in NAMES if not name.endswith("_mini") and "cifar10" not in name):
        given = recipe(name)
        optimizer, view, model = given["optimizer"], given["views"]["global"], given["model"]
        kind, size = name.split("_")[:2]
        labels = kind == "vit" or "swin_conv" in model["kwargs"]  # the released code of Positional Label
        assert (view["auto_augment"], view["erasing"], view["mixup"]) == ("rand-m9-mstd0.5-inc1", 0.25, 0.8)
        assert view["cutmix"] == (0.0 if kind == "vit" else 1.0)
        assert (view["scale"][0], view["jitter"]) == ((0.05, 0.8) if kind == "nest" else (0.08, 0.0))
        assert given["objectives"]["classification"]["smoothing"] == 0.1
        assert (optimizer["lr"], optimizer["min_lr"]) == (2.5e-4, 0.0 if kind == "nest" else 2.5e-6)  # for 256 images
        assert (optimizer["weight_decay"], optimizer["betas"]) == (0.05, [0.9, 0.999])
        assert (given["epochs"], given["batch"]) == ((150, 512) if labels else (300, 1024))
        absolute = "swin_merge_last" in model["kwargs"]
        epochs = 10 if absolute else {"vit": 10, "deit": 5, "swin": 20, "nest": 20}[kind]
        assert optimizer["warmup"] == f"{epochs} epochs"
        assert optimizer["clip"] == (5.0 if kind in ("vit", "swin") else 0.0)
        assert (given.get("repeats"), given.get("average")) == ((3, 0.99996) if kind == "deit" else (None, None))
        assert model["kwargs"].get("drop_path_rate") == {"vit": None, "deit": 0.1}.get(kind, drops[size])


# Parameters of backbone and classifier of 1,000 classes. In the authors' logs: DeiT with iRPE (microsoft/Cream), Swin
# (microsoft/Swin-Transformer). By hand: two more tables of a layer, 12 x 64 x 50 a side; ViT-B is DeiT-B without class
# token and its place; the convolutional Swins are below; CIFAR-10's ViT: patches, their places, blocks, norm. NesT:
# millions (arXiv 2105.12723, table 3).
PARAMETERS = {
    "vit_base": 86_567_656 - 2 * 768,
    "deit_tiny": 5_717_416, "deit_small": 22_050_664, "deit_base": 86_567_656,
    "deit_tiny_irpe_k": 5_755_816, "deit_tiny_irpe_qk": 5_755_816 + 38_400, "deit_tiny_irpe_qkv": 5_755_816 + 76_800,
    "deit_small_irpe_k": 22_089_064, "deit_small_irpe_qk": 22_127_464, "deit_small_irpe_qkv": 22_165_864,
    "deit_base_irpe_k": 86_606_056, "deit_base_irpe_qk": 86_606_056 + 38_400, "deit_base_irpe_qkv": 86_682_856,
    "swin_tiny": 28_288_354, "swin_base": 87_768_224,
    "cifar10": 96 * 3 * 8 * 8 + 96 + 16 * 96 + 4 * (12 * 96**2 + 13 * 96) + 2 * 96 + 1000 * (96 + 1),
    "nest_tiny": 17e6, "nest_small": 38e6, "nest_base": 68e6,
}  # fmt: skip
for size, width, heads, depths in (("tiny", 96, 3, (2, 2, 6, 2)), ("base", 128, 4, (2, 2, 18, 2))):
    stages = [(depth, width << at, heads << at) for at, depth in enumerate(depths)]
    # a table of 13 x 13 offsets for each head goes; nine weights and a bias for each channel come
    changed = sum(depth * (10 * channels - 169 * own) for depth, channels, own in stages)
    C = stages[-2][1]  # the last merging: from 4C channels with a norm to 2C, then from C to 2C
    merging = (2 * 4 * C + 4 * C * 2 * C) - (2 * C + C * 2 * C)
    PARAMETERS[f"swin_{size}_conv"] = PARAMETERS[f"swin_{size}"] + changed
    PARAMETERS[f"swin_{size}_conv_14"] = PARAMETERS[f"swin_{size}"] + changed - merging


@functools.cache
def counted(name: str) -> tuple[int, int]:
    """(parameters of the backbone, its width) of a recipe, built on the meta device."""
    config = loaded(RECIPES / f"{name}.yaml")
    tensors = shapes(config.model, height_width(config.views["global"].size))
    assert tensors is not None
    return sum(tensor.numel() for tensor in tensors.values()), tensors["norm.weight"].shape[0]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    backbone, width = counted(name)
    total = backbone + 1000 * (width + 1)
    published = PARAMETERS[name]
    assert total == (published if isinstance(published, int) else pytest.approx(published, rel=0.01))


def test_every_recipe_has_one_of_the_counted_backbones() -> None:
    models = {(recipe(name)["model"]["name"], str(recipe(name)["model"]["kwargs"])) for name in PARAMETERS}
    for name in NAMES:
        assert (recipe(name)["model"]["name"], str(recipe(name)["model"]["kwargs"])) in models, name


@pytest.mark.parametrize(
    ("name", "label", "parameters"),  # of the released heads, and of the relative one at 14x14
    [("vit_base_absolute", "absolute", 259_588), ("swin_tiny_relative", "relative", 508_201),
     ("vit_base_relative", "relative", 723_801)],
)  # fmt: skip
def test_heads_of_labels_are_the_papers(name: str, label: str, parameters: int) -> None:
    config = loaded(RECIPES / f"{name}.yaml")
    with torch.device("meta"):
        backbone = create(config.model, 224)
    wanted = {**config.objectives, "classification": {**config.objectives["classification"], "classes": 1000}}
    made = build(backbone, options_for(wanted, backbone), config.views)
    assert sum(p.numel() for p in made.objectives[label].parameters()) == parameters
    assert sum(p.numel() for p in made.objectives["classification"].parameters()) == 1000 * (768 + 1)


# ------------------------------------------------------------------------------------------------------- in training

SMALL = [
    "steps=2", "epochs=null", "batch=8", "precision=fp32", "model.attention=explicit", "threads=1", "log_every=1",
    "loader.workers=0", "tensorboard=false", "monitor.most=8", "monitor.bank=16", "optimizer.warmup=0.5",
]  # fmt: skip
VIT_SMALL = [f"model.kwargs.{word}" for word in ("embed_dim=32", "depth=2", "num_heads=2", "patch_size=8")]
SIZES: dict[str, tuple[int, list[str]]] = {
    "vit": (24, VIT_SMALL),
    "deit": (24, VIT_SMALL),
    "swin": (32, [f"model.kwargs.{name}={value}" for name, value in SMALL_SWIN.items()]),
    "nest": (64, ["batch=2", "monitor.held_out=0"]),  # timm lets nobody make it smaller
    "cifar10": (32, []),  # small as it is
}


def small(name: str) -> list[str]:
    """Words that make a recipe's training a short one of a small network on small images."""
    size, words = SIZES[name.split("_")[0]]
    return [*SMALL, *words, *(f"views.{view}.size={size}" for view in recipe(name)["views"])]


TRAINED = [
    *(
        "deit_small",
        "deit_small_absolute",
        "deit_small_relative",
        "deit_tiny_irpe_qkv",
        "vit_base_absolute",
        "nest_tiny",
    ),
    *("swin_tiny", "swin_tiny_conv", "swin_tiny_conv_14", "swin_tiny_absolute", "swin_tiny_relative"),
    *("nest_tiny_absolute", "nest_tiny_relative", "cifar10_absolute", "cifar10_relative"),
]
SLOW = (
    "cifar10_absolute",
    "cifar10_relative",
    "deit_small_relative",
    "nest_tiny",
    "nest_tiny_absolute",
    "nest_tiny_relative",
    "swin_tiny_absolute",
    "swin_tiny_relative",
    "vit_base_absolute",
)  # as a twin, or no smaller


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TRAINED]
)
def test_recipes_train(name: str, inside: Callable[..., int], images: Path, tmp_path: Path) -> None:
    assert inside(f"supervised/{name}", *small(name), f"data={images}", f"run={tmp_path / 'run'}") == 0
    last = Run(tmp_path / "run").metrics[-1]
    trained = {key.removesuffix("/loss") for key in last if key.endswith("/loss") and not key.startswith("val/")}
    assert trained == {"classification", *(label for recipe, (_, label) in PAIRS.items() if recipe == name)}
    assert 0 < last["classification/loss"] < 5 and last["classification/chance"] == pytest.approx(1 / 3)
    about = subject_of(str(tmp_path / "run")).description
    assert about["pooling"] == ("class" if "deit" in name else "mean")
    assert about["position"] == ("none" if "swin" in name and name != "swin_tiny" else "full")
    assert about["training"]["audit"] == ("leak" if recipe(name).get("allow_leak") else "clean")
    assert about["training"]["exported"] == ("average" if "deit" in name else "student")
    stored = Run(tmp_path / "run").path / "config.yaml"
    assert "base:" not in stored.read_text()
    assert ("auto_augment: rand-m9-mstd0.5-inc1" in stored.read_text()) == ("cifar10" not in name)
    if "swin" in name:
        assert about["grid"] == ([8, 8] if "absolute" in name or "14" in name else [4, 4])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in TRAINED])
def test_recipes_dry_run(
    name: str, inside: Callable[..., int], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*small(name), f"data={images}", f"run={tmp_path / 'run'}", "--dry-run"]
    assert inside(f"supervised/{name}", *words) == 0
    told = capsys.readouterr().out
    assert f"audit           {'leak' if recipe(name).get('allow_leak') else 'clean'}" in told
    assert "whole run       2 steps" in told and not (tmp_path / "run").exists()


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
