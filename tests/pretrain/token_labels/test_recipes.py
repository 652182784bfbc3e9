"""The recipes of LV-ViT and SP-ViT: published numbers, published sizes, and trainings at a size for tests."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from runs.children import Run
from small import loaded

from common.batches.views import height_width
from common.config import read_yaml
from common.errors import Refusal
from common.models.create import shapes
from pretrain.config import PretrainConfig

RECIPES = Path(__file__).resolve().parents[3] / "configs" / "supervised"
FIRST = [*(f"lvvit_{size}" for size in "tsml"), *(f"spvit_{size}" for size in "sml")]
LATER = [
    *(f"lvvit_{size}_{pixels}" for size in "tsml" for pixels in (384, 448, 512)),
    *(f"spvit_{size}_384" for size in "sml"),
]
NAMES = sorted([*FIRST, *LATER])
PUBLISHED = {  # top-1 on ImageNet-1k, in percent
    "lvvit_t": 79.1, "lvvit_s": 83.3, "lvvit_s_384": 84.4, "lvvit_m": 84.0, "lvvit_m_384": 85.4, "lvvit_m_448": 85.5,
    "lvvit_l_448": 86.2, "lvvit_l_512": 86.4, "spvit_s": 83.9, "spvit_s_384": 85.1, "spvit_m": 84.9,
    "spvit_m_384": 86.0, "spvit_l": 85.5, "spvit_l_384": 86.3,
}  # fmt: skip
PARAMETERS = {  # both layers of the classifier included: of the authors' code; of SP-ViT-L as its paper has it
    "lvvit_t": (8_534_720, 8_625_920, 8_675_840, 8_733_440),
    "lvvit_s": (26_151_824, 26_297_744, 26_377_616, 26_469_776),
    "lvvit_m": (55_830_544, 56_025_104, 56_131_600, 56_254_480),
    "lvvit_l": (150_021_968, 150_313_808, 150_473_552, 150_657_872),
    "spvit_s": (26_234_468, 26_380_388), "spvit_m": (55_969_440, 56_164_000), "spvit_l": (150_273_368, 150_565_208),
}  # fmt: skip


def recipe(name: str) -> Any:
    """What a recipe and those it inherits from say."""
    return OmegaConf.to_container(read_yaml(RECIPES / f"{name}.yaml", PretrainConfig))


def test_every_recipe_opens_with_its_command_and_says_what_was_published() -> None:
    assert sorted(path.stem for kind in ("lvvit", "spvit") for path in RECIPES.glob(f"{kind}_*.yaml")) == NAMES
    for name in NAMES:
        text = (RECIPES / f"{name}.yaml").read_text()
        more = f"data=PATH objectives.token_labeling.labels=LABELS run=runs/{name}"
        assert text.splitlines()[0] == f"# accelerate launch pretrain/run.py supervised/{name} {more}"
        comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        said = re.search(r"Published: (\d\d\.\d) % top-1", comment)
        assert (float(said.group(1)) if said else None) == PUBLISHED.get(name), name
        assert said or "No figure is published" in comment
        assert "arXiv 2104.10858" in comment or "arXiv 2206.07662" in comment


@pytest.mark.parametrize("name", NAMES)
def test_recipes_hold_the_published_numbers(name: str) -> None:
    """The authors' scripts and README (zihangJiang/TokenLabeling, ZhouYuxuanYX/SP-ViT); rates are for 256 images."""
    config = loaded(RECIPES / f"{name}.yaml")
    kind, size, *pixels = name.split("_")
    view, optimizer, objective = config.views["global"], config.optimizer, config.objectives["token_labeling"]
    assert height_width(view.size) == (int(pixels[0]),) * 2 if pixels else (224, 224)
    assert config.objectives.keys() == {"token_labeling"} and objective["smoothing"] == 0.1
    assert (config.model.name, config.model.crop) == (f"{kind}_{size}", 0.9 if size in "ts" else 1.0)
    assert config.model.kwargs == {"drop_path_rate": {"t": 0.1, "s": 0.1, "m": 0.2, "l": 0.3}[size]}
    policy = "rand-n3-m9-mstd0.5-inc1" if size == "l" else "rand-m9-mstd0.5-inc1"
    assert (view.mix_token, view.mixup, view.cutmix, view.erasing, view.auto_augment) == (1.0, 0, 0, 0.25, policy)
    assert (view.scale, view.flip, view.jitter) == ([0.08, 1.0], 0.5, 0.0)
    assert (config.average, optimizer.clip, optimizer.warmup) == (0.99992, 0.0, "5 epochs")
    rates = optimizer.lr * config.batch / 256, optimizer.min_lr * config.batch / 256
    if pixels:
        batch = {"s": 256, "m": 128, "l": 512}[size] if kind == "spvit" else 512
        assert rates == pytest.approx((5e-6, 5e-6)) and optimizer.schedule == "constant"
        assert (config.batch, config.epochs, optimizer.weight_decay) == (batch, 30, 1e-8)
        assert str(config.model.init).endswith(f"runs/{kind}_{size}")
    else:
        batch, lr = {"spvit_l": (800, 6e-4), "lvvit_l": (1024, 1e-3)}.get(name, (1024, 1.6e-3))
        assert rates == pytest.approx((lr, 1e-5)) and optimizer.schedule == "cosine" and config.model.init is None
        assert (config.batch, config.epochs, optimizer.weight_decay) == (batch, 310, 0.05)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_as_many_as_published(name: str) -> None:
    config = loaded(RECIPES / f"{name}.yaml")
    size = height_width(config.views["global"].size)
    tensors = shapes(config.model, size)
    assert tensors is not None
    trained = {key: tensor for key, tensor in tensors.items() if not re.search(r"running_|num_batches", key)}
    total = sum(tensor.numel() for tensor in trained.values()) + 2 * 1000 * (tensors["norm.weight"].shape[0] + 1)
    assert total == PARAMETERS["_".join(name.split("_")[:2])][(224, 384, 448, 512).index(size[0])]


# ------------------------------------------------------------------------------------------------------- in training

SMALL = [
    "steps=2", "epochs=null", "batch=8", "precision=fp32", "model.attention=explicit", "threads=1", "log_every=1",
    "loader.workers=0", "tensorboard=false", "monitor.most=8", "monitor.bank=16", "optimizer.warmup=0.5",
    "model.init=null", "views.global.size=32",
    *(f"model.kwargs.{word}" for word in ("embed_dim=24", "depth=3", "num_heads=2", "stem_width=8")),
]  # fmt: skip


@pytest.mark.parametrize("name", ["lvvit_s", "spvit_s"])
def test_recipes_train(name: str, inside: Callable[..., int], images: Path, labels: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [f"objectives.token_labeling.labels={labels}", f"data={images}", f"run={run}"]
    assert inside(f"supervised/{name}", *SMALL, *words) == 0
    last = Run(run).metrics[-1]
    assert 0 < last["token_labeling/dense_loss"] < 5 and last["token_labeling/chance"] == pytest.approx(1 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_recipes_dry_run(
    name: str,
    inside: Callable[..., int],
    images: Path,
    labels: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"objectives.token_labeling.labels={labels}", f"data={images}", f"run={tmp_path / 'run'}", "--dry-run"]
    assert inside(f"supervised/{name}", *SMALL, *words) == 0
    assert "whole run       2 steps" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_recipe_without_its_labels_or_its_first_run_is_refused(
    inside: Callable[..., int], images: Path, labels: Path, tmp_path: Path
) -> None:
    run = f"run={tmp_path / 'run'}"
    with pytest.raises(Refusal, match="labels LABELS: no such file or folder; expected one made by generate_labels"):
        inside("supervised/lvvit_s", *SMALL, f"data={images}", run)
    given = [word for word in SMALL if word != "model.init=null"]
    with pytest.raises(Refusal, match=r"model\.init=runs/spvit_s"):
        inside("supervised/spvit_s_384", *given, f"data={images}", run, f"objectives.token_labeling.labels={labels}")
    assert not (tmp_path / "run").exists()
