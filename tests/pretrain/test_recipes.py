"""The shipped recipes: what their comments say is true, and those with a teacher train, at a size for tests, with
everything they name."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from runs.children import ROOT, Run
from small import loaded, options_for

from common.batches.sampler import held_out
from common.batches.views import View, height_width
from common.data import labelled_splits, open_data
from common.models import ModelConfig, create
from common.models.plan import PlanSpec
from common.training.optim import parameter_groups
from evaluate.job.subjects import subject_of
from pretrain.automatic import momentum_for, prototypes_for, temperature_for
from pretrain.heads import HalfHead
from pretrain.task import build

RECIPES = {path.stem: path for path in sorted((ROOT / "configs").glob("[ps]*/*.yaml"))}

SMALL = [
    "steps=4", "epochs=null", "batch=8", "precision=fp32", "model.attention=explicit", "threads=1", "log_every=1",
    "loader.workers=0", "tensorboard=false", "monitor.most=8", "model.kwargs.embed_dim=32", "model.kwargs.depth=2",
    "model.kwargs.num_heads=2", "model.kwargs.patch_size=8", "views.global.size=24",
]  # fmt: skip
HEAD = ["hidden=16", "bottleneck=8"]
ASKED = {
    "dino": {"dino"},
    "dino_absolute": {"dino", "absolute"},
    "dino_relative": {"dino", "relative"},
    "dinov2": {"dino", "ibot", "koleo"},
    "dinov2_absolute": {"dino", "ibot", "koleo", "absolute"},
}


IN_BRIEF = ("dino_absolute", "dinov2")  # trained in the default tests


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name in IN_BRIEF else pytest.mark.slow) for name in ASKED]
)
def test_recipes_with_a_teacher(recipe: str, inside: Callable[..., int], images: Path, tmp_path: Path) -> None:
    words = [*SMALL, "views.local.size=16", "monitor.every=4", f"data={images}", f"run={tmp_path / 'run'}"]
    words += ["views.place.size=24"] if ASKED[recipe] & {"absolute", "relative"} else []
    words += [f"objectives.{name}.{word}" for name in ASKED[recipe] & {"dino", "ibot"} for word in HEAD]
    assert inside(recipe, *words) == 0
    last = Run(tmp_path / "run").metrics[-1]
    trained = {name.removesuffix("/loss") for name in last if name.endswith("/loss") and not name.startswith("val/")}
    assert trained == ASKED[recipe] and all(last[f"{name}/loss"] is not None for name in trained)
    assert {"rankme/student", "rankme/teacher", "knn/student", "ridge/teacher", "weight_decay"} <= last.keys()
    about = json.loads((tmp_path / "run" / "backbone.json").read_text())
    assert about["pooling"] == "class" and about["position"] == "full" and about["training"]["exported"] == "teacher"
    assert subject_of(str(tmp_path / "run")).backbone().num_prefix_tokens == 1


@pytest.mark.parametrize("recipe", ["sigreg", pytest.param("sigreg_absolute", marks=pytest.mark.slow)])
def test_recipes_that_compare_crops_without_a_teacher(
    recipe: str, inside: Callable[..., int], images: Path, tmp_path: Path
) -> None:
    words = [*SMALL, "views.local.size=16", "monitor.every=4", f"data={images}", f"run={tmp_path / 'run'}"]
    words += ["objectives.sigreg.width=16", "objectives.sigreg.out=8"]
    words += ["views.place.size=24"] if recipe == "sigreg_absolute" else []
    assert inside(recipe, *words) == 0
    last = Run(tmp_path / "run").metrics[-1]
    trained = {name.removesuffix("/loss") for name in last if name.endswith("/loss") and not name.startswith("val/")}
    assert trained == {"sigreg", *recipe.split("_")[1:]}
    assert last["sigreg/loss"] == pytest.approx(0.95 * last["sigreg/prediction"] + 0.05 * last["sigreg/sigreg"])
    assert {
        "sigreg/verdict",
        "sigreg/projection_std",
        "val/sigreg/sigreg",
        "knn/student",
        "ridge/student",
    } <= last.keys()
    about = json.loads((tmp_path / "run" / "backbone.json").read_text())
    assert about["pooling"] == "class" and about["position"] == "full" and about["training"]["exported"] == "student"


# ----------------------------------------------------------------------------------------- the figures in comments


def comment_of(path: Path) -> str:
    """The lines of a recipe that are for people."""
    return " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_comment_says_of_the_schedule_is_what_the_recipe_does(name: str) -> None:
    """Epochs, images a step, learning rate, warm-up, decay, clip and grid, wherever a comment names them."""
    comment, config = comment_of(RECIPES[name]), loaded(RECIPES[name])
    command = re.match(
        r"(?:accelerate launch|python) (?:pretrain/run|benchmarks/results).py (?:--natural PATH --recipe )?(\S*)",
        comment,
    )
    assert command is not None and command[1].rpartition("/")[2].removesuffix(".yaml") in (
        name,
        "" if name == "quickstart" else name,
    )
    side = height_width(config.views["global"].size)
    patch = config.model.kwargs.get("patch_size", 16)
    warmup = config.optimizer.warmup
    over = config.epochs * warmup if isinstance(warmup, float) and config.epochs else warmup
    over = float(over.split()[0]) if isinstance(over, str) and over != "auto" else over
    said: list[tuple[str, float]] = [
        (r"warm-up over (\d+) epochs", pytest.approx(over, abs=0.02)),
        (r"weight decay (0\.\d+)\b(?! to)", config.optimizer.weight_decay),
        (r"(?:, |schedule: )(\d+) epochs[ ,]", config.epochs),
        (r"epochs(?: \([^)]*\))?, ([\d,]+) images", config.batch),
        (r"drop path (0\.\d)", config.model.kwargs.get("drop_path_rate")),
        (r"a (\d+)x\d+ grid of patches", side[0] / patch),
        (r"(\d+)x\d+ patches of", side[0] / patch),
        (r"patches of (\d+)x\d+ pixels", patch),
        (r"own size \((\d+)x", side[0]),
    ]
    for pattern, value in said:
        for text in re.findall(pattern, comment):
            assert number(text) == value, (pattern, text)
    for rate, images in re.findall(r"(\d(?:\.\d+)?e-\d) for (\d+)(?: images| of them)", comment):
        assert float(rate) / int(images) * 256 == pytest.approx(config.optimizer.lr), rate


def test_what_comments_say_of_the_data_and_of_parts_is_computed() -> None:
    kept, out = held_out(len(open_data("builtin")), 0.1, loaded(RECIPES["quickstart"]).monitor.most)
    training, test, _ = labelled_splits("builtin")
    small = (ROOT / "configs" / "evaluate" / "finetune_small.yaml").read_text()
    readme = (ROOT / "README.md").read_text()
    for text, said in (
        (comment_of(RECIPES["quickstart"]), f"{len(kept):,} built-in images to train on, {len(out):,} held out"),
        (readme, f"builtin: {len(kept):,} images to train on, {len(out):,} held out"),
        (small, f"For the {len(training):,} built-in images"),
    ):
        assert said in text
    assert len(test) == 2000  # README: 12,000 pictures come with it, of which the training sees at most 10,000
    droppos = yaml.safe_load(RECIPES["droppos"].read_text())["objectives"]["absolute"]
    keep, told, _ = PlanSpec(droppos["keep"], "partial", droppos["position_keep"]).counts(14 * 14)
    assert f"({keep} of {14 * 14}), of which a quarter ({told})" in (said := comment_of(RECIPES["droppos"]))
    assert f"the other {keep - told} have" in said
    head = HalfHead(768, 14 * 14)
    assert f"({sum(p.numel() for p in head.parameters()):,} parameters)" in comment_of(RECIPES["apl"])
    images, batch = 1_281_167, loaded(RECIPES["dino"]).batch  # ImageNet
    sizes = f"({prototypes_for(images):,}; 0.04 to {temperature_for(images)}; {momentum_for(images, batch):.3f}"
    assert f"{sizes} at batch {batch})" in comment_of(RECIPES["dino"])


# ------------------------------------------------------------------------------------------- equal to the sources


def test_what_decays_and_how_fast_it_learns_is_as_in_the_sources() -> None:
    """DINO, DINOv2, iBOT, DropPos, LeJEPA: all of two dimensions and more decays; in their code tokens have three."""
    names = (
        "dino",
        "dino_absolute",
        "dino_relative",
        "dinov2",
        "dinov2_absolute",
        "droppos",
        "sigreg",
        "sigreg_absolute",
    )
    for recipe in RECIPES:
        config = loaded(RECIPES[recipe]).optimizer
        assert config.decay_tokens == (recipe in names), recipe
    small = {"patch_size": 8, "embed_dim": 16, "depth": 12, "num_heads": 2, "dynamic_img_size": True}
    head = {"prototypes": 8, "hidden": 8, "bottleneck": 4, "teacher_temperature": 0.04, "freeze_last_layer": 0.0}
    partial = {"position": "partial", "position_keep": 0.5}
    wanted = {"dino": head | {"last_layer": "weight_norm"}, "ibot": head, "absolute": partial}
    backbone = create(ModelConfig("vit_tiny_patch16_224", small), 16)
    made = build(backbone, options_for(wanted, backbone), {"global": View(size=16, count=2)})
    assert not made.objectives["ibot"].mask_token.any()  # iBOT and DINOv2 begin with zeros
    options = loaded(RECIPES["dinov2"]).optimizer
    learned = {id(parameter): name for name, parameter in made.named_parameters()}
    tokens = {"backbone.model.cls_token", "backbone.model.pos_embed"}
    tokens |= {"objectives.ibot.mask_token", "objectives.absolute.hidden_position"}
    for decay_tokens in (True, False):
        groups = parameter_groups(made, 0.04, options.layer_decay, options.patch_embed_lr, decay_tokens)
        found = {learned[id(p)]: group for group in groups for p in group["params"]}
        assert found.keys() == {name for name, p in made.named_parameters() if p.requires_grad}
        for name, group in found.items():
            matrix = made.get_parameter(name).ndim > 1 and name not in tokens
            decays = matrix or (decay_tokens and name in tokens)
            assert (group["decays"], group["weight_decay"]) == (decays, 0.04 if decays else 0.0), name
        rates = {name: found[name]["lr_scale"] for name in sorted(tokens)}
        of_stand_ins = 0.9**13 if decay_tokens else 1.0
        assert list(rates.values()) == pytest.approx([0.9**13, 0.9**13, of_stand_ins, of_stand_ins])
        assert found["backbone.model.patch_embed.proj.weight"]["lr_scale"] == pytest.approx(0.2 * 0.9**13)
