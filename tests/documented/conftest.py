"""A home folder with the images and runs that the documents name, so small that every command takes seconds."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
from documented.commands import ROOT
from pictures import write_idx
from runs.children import training_here
from safetensors.torch import save_file

from common import config as configuration

NARROW = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}  # in place of a recipe's ViT-S or -B
SHORT = [
    "epochs=null", "steps=2", "batch=4", "precision=fp32", "model.attention=explicit", "threads=1", "log_every=1",
    "loader.workers=0", "monitor.most=4", "monitor.bank=8",
]  # fmt: skip


def small(words: list[str], home: Path) -> list[str]:
    """Words of a training as documented, and others that make it a short one of a narrow model on small images."""
    given = [word.replace("hf:PATH", f"hf:{home}/labelled").replace("=PATH", f"={home}/fashion") for word in words]
    if "--resume" in words:
        return [*given, "steps=3"]
    recipe = next((word for word in words if "=" not in word and not word.startswith("--")), "quickstart")
    content = configuration.read_yaml(configuration.find_recipe(recipe, "pretrain"))
    shape = [f"model.kwargs.{name}={value}" for name, value in NARROW.items()]
    size = [f"views.{name}.size={32 if name == 'local' else 64}" for name in content.views]
    if "patch_size" in content.model.get("kwargs", {}):  # small as it is
        shape = size = []
    elif any(word.startswith("model.name=spvit") for word in words):  # of its own depth and width
        shape = []
    elif any(word.startswith("model.init=timm:") for word in words):  # of the depth and width of what is published
        shape = [f"model.weights={home}/weights.safetensors"]
    return [*given, *SHORT, *shape, *size]


@pytest.fixture(scope="session")
def furnished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """~/photos, ~/labelled, files in place of Fashion-MNIST's and of published weights, and two runs in ~/runs."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(images, home / "photos")
    for number, path in enumerate(sorted(images.rglob("*.*"))):
        place = home / "labelled" / ("test" if number % 4 == 0 else "train") / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    rng = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        write_idx(home / "fashion" / f"{stem}-images-idx3-ubyte.gz", rng.integers(0, 256, (64, 28, 28), dtype=np.uint8))
        write_idx(home / "fashion" / f"{stem}-labels-idx1-ubyte.gz", np.arange(64, dtype=np.uint8) % 10)
    weights = timm.create_model("vit_small_patch16_224", num_classes=0)
    save_file(weights.state_dict(), home / "weights.safetensors")
    with training_here() as main:
        for run, recipe, data in (("quickstart-001", "quickstart", "labelled"), ("photos", "vit_small", "photos")):
            assert main(*small([recipe, f"data={home}/{data}"], home), f"run={home}/runs/{run}") == 0
    return home


@pytest.fixture
def home(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder that ~ stands for, from which a command is typed: with our scripts, and runs of its own."""
    place = tmp_path / "here"
    shutil.copytree(furnished / "runs", place / "runs")
    for name in ("pretrain", "evaluate", "benchmarks", "Makefile"):
        (place / name).symlink_to(ROOT / name)
    for name in ("photos", "labelled", "fashion", "weights.safetensors"):
        (place / name).symlink_to(furnished / name)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(place)
    return place
