"""A folder of small oblong pictures, an annotator that nobody trained, and the file of their labels."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from common.processes import group

NAME, CLASSES, SIZE, GRID = "test_resnet", 7, 64, 2
IMAGES = 22


def write_pictures(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        path = folder / "ab"[i % 2] / f"picture.{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 20 + i % 3, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network that tells cells apart: its classifier is large."""
    file = tmp_path_factory.mktemp("weights") / "annotator.pth"
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=CLASSES)
    torch.nn.init.normal_(model.fc.weight, std=20.0)
    torch.save(model.state_dict(), file)
    return file


def words(pictures: Path, weights: Path, out: Path) -> list[str]:
    """Arguments that label `pictures`."""
    given = ["--annotator", f"timm:{NAME}", "--weights", weights, "--data", pictures, "--out", out]
    return [*map(str, given), "--size", str(SIZE), "--batch", "4", "--threads", "1"]


@pytest.fixture(scope="session")
def labelled(pictures: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of the pictures, by one uninterrupted run."""
    from pretrain.generate_labels import main

    out = tmp_path_factory.mktemp("labels") / "all.labels"
    assert main(words(pictures, weights, out)) == 0
    return out


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert group.join().num_processes == 1


@pytest.fixture(scope="session")
def labels(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of `images` by a network of their three classes."""
    from pretrain.generate_labels import main

    folder = tmp_path_factory.mktemp("three")
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3)
    torch.nn.init.normal_(model.fc.weight, std=20.0)  # type: ignore[arg-type, union-attr]
    torch.save(model.state_dict(), folder / "annotator.pth")
    assert main([*words(images, folder / "annotator.pth", folder / "all.labels"), "--top", "2"]) == 0
    return folder / "all.labels"
