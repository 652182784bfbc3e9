"""What several tests need: a folder of images, training as a child process, and training in this process."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy threads on a shared core spin: up to 25 times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contextlib
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
for place in (ROOT / "tests", ROOT):  # whatever pytest's import mode
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from children import TINY, Train


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes long; runs with -m slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: choose it with -m slow"))


# ----------------------------------------------------------------------------------------------------------- the images


def photo(rng: np.random.Generator, kind: int) -> Image.Image:
    """A smooth picture of some shape: sky above, ground below, and a lamp on the left, in the middle or on the right."""
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


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Children of this session; none outlives it."""
    trainer = Train(tmp_path_factory.mktemp("children"))
    yield trainer
    for child in trainer.children:
        child.kill()


@contextlib.contextmanager
def training_here() -> Iterator[Callable[..., int]]:
    """A function that is pretrain.run.main in this process; everything global is put back."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from pretrain import run

    def forget() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    def main(*words: object) -> int:
        forget()
        with torch.random.fork_rng():
            return run.main([str(word) for word in words])

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    try:
        yield main
    finally:
        forget()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
    from common.tracking import Tracker

    def plan(number: int, do: Callable[[], object], write: Callable = Tracker.write) -> None:
        def written(self: Tracker, step: int, record: dict) -> None:
            write(self, step, record)
            if step == number:
                do()

        monkeypatch.setattr(Tracker, "write", written)

    return plan


@pytest.fixture(scope="session")
def tiny(images: Path) -> tuple[str, ...]:
    """The words of a tiny run: recipe and data; no loader processes."""
    return str(TINY), f"data={images}", "loader.workers=0"
