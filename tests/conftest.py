"""What several tests need: a folder of images, training as a child process, and training in this process."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy threads on a shared core spin: up to 25 times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # audits are cached, and not in the home of who runs the tests
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for `import common` and `from runs.children import ...`

from runs.children import TINY, Train, training_here  # noqa: E402

# ---------------------------------------------------------------------------- the images


def photo(rng: np.random.Generator, kind: int) -> Image.Image:
    """A smooth picture of some shape: sky above, ground below, a lamp left, in the middle or right."""
    height, width = (int(side) for side in rng.integers(28, 64, 2))
    ys, xs = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    sky, ground, lamp = rng.integers(100, 256, 3), rng.integers(0, 156, 3), rng.integers(0, 256, 3)
    glow = np.exp(-((xs - (0.25 + 0.25 * kind)) ** 2 + (ys - 0.5) ** 2) / 0.02)[..., None]
    pixels = ((1 - ys[..., None]) * sky + ys[..., None] * ground) * (1 - glow) + lamp * glow
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 JPEG and PNG files of mixed shapes in three sub-folders."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(96):
        place = folder / ("left", "middle", "right")[i % 3]
        place.mkdir(exist_ok=True)
        photo(rng, i % 3).save(place / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    return folder


# ---------------------------------------------------------------------------- training


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Children of this session; none outlives it."""
    trainer = Train(tmp_path_factory.mktemp("children"))
    yield trainer
    for child in trainer.children:
        child.kill()


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`inside(*words)`: pretrain.run.main in this process, in an empty folder; returns the exit status."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    with training_here() as main:
        yield main


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """`at_step(n, do)`: `do()` once step n was recorded, in a run of this process."""
    from common.training.tracking import Tracker

    def plan(number: int, do: Callable[[], object], write: Callable = Tracker.write) -> None:
        def written(self: Tracker, step: int, record: dict) -> None:
            write(self, step, record)
            if step == number:
                do()

        monkeypatch.setattr(Tracker, "write", written)

    return plan


@pytest.fixture(scope="session")
def tiny(images: Path) -> list[str]:
    """The words of a tiny run: recipe and data; no loader processes."""
    return [str(TINY), f"data={images}", "loader.workers=0"]
