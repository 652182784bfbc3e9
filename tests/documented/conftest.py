"""A home folder with the images and runs that the documents name, so small that every command takes seconds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from documented.commands import ROOT, small
from pictures import write_idx, write_tar
from runs.children import training_here
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def furnished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """~/photos, ~/labelled, the same in ~/archives and ~/shards, files in place of Fashion-MNIST's and of published
    weights, and two runs in ~/runs."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(images, home / "photos")
    for number, path in enumerate(sorted(images.rglob("*.*"))):
        place = home / "labelled" / ("test" if number % 4 == 0 else "train") / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    for split, name in (("train", "train"), ("test", "val")):
        files = sorted(path for path in (home / "labelled" / split).rglob("*.*"))
        members = [(str(path.relative_to(home / "labelled" / split)), path.read_bytes()) for path in files]
        write_tar(home / "archives" / f"{name}.tar", members)
    for k in range(4):
        shard: list[tuple[str, bytes]] = []
        for name, content in members[k::4]:
            label = {"category": name.partition("/")[0]}
            shard += [(name, content), (f"{name.partition('.')[0]}.json", json.dumps(label).encode())]
        write_tar(home / "shards" / f"photos-{k:03d}.tar", shard)
    rng = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        write_idx(home / "fashion" / f"{stem}-images-idx3-ubyte.gz", rng.integers(0, 256, (64, 28, 28), dtype=np.uint8))
        write_idx(home / "fashion" / f"{stem}-labels-idx1-ubyte.gz", np.arange(64, dtype=np.uint8) % 10)
    weights = timm.create_model("vit_small_patch16_224", num_classes=0)
    save_file(weights.state_dict(), home / "weights.safetensors")
    with training_here() as main:
        for run, recipe, data in (("quickstart-001", "quickstart", "labelled"), ("photos", "vit_small", "photos")):
            assert main(*small([recipe, f"data={home}/{data}"], home), f"run={home}/runs/{run}") == 0
    label_and_train(home)
    return home


def label_and_train(home: Path) -> None:
    """~/labelled.labels, dense labels of the three classes, and an LV-ViT trained with them in ~/token_runs."""
    from pretrain.generate_labels import main as generate

    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), home / "annotator.pth")
    words = ["--annotator", "timm:test_resnet", "--weights", home / "annotator.pth", "--size", "64", "--threads", "1"]
    given = ["--data", home / "labelled", "--out", home / "labelled.labels"]
    assert generate([*map(str, [*words, *given])]) == 0
    given = [
        "supervised/tokens_lvvit",
        f"data={home}/labelled",
        f"objectives.token_labeling.labels={home}/labelled.labels",
    ]
    with training_here() as main:
        assert main(*small(given, home), f"run={home}/token_runs/tokens_lvvit") == 0


@pytest.fixture
def home(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder that ~ stands for, from which a command is typed: with our scripts, and runs of its own."""
    place = tmp_path / "here"
    shutil.copytree(furnished / "runs", place / "runs")
    for name in ("pretrain", "evaluate", "benchmarks", "Makefile"):
        (place / name).symlink_to(ROOT / name)
    folders = ("photos", "labelled", "archives", "shards", "fashion", "token_runs")
    for name in (*folders, "weights.safetensors", "labelled.labels"):
        (place / name).symlink_to(furnished / name)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(place)
    return place
