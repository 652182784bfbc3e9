"""What is measured and said before the first step, how often a run is measured, and batches for few images."""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs.children import TINY, Run
from torch import nn

from common.errors import Refusal
from common.processes import group
from common.processes.stopping import Stopped
from common.training import precision
from common.training.tracking import patient
from pretrain.assemble import assemble, optimization_for
from pretrain.config import MonitorConfig, PretrainConfig, load
from pretrain.monitoring import pace

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------ measuring


class Slow(nn.Module):
    """Takes a time that grows with the images, and twice as long in fp32."""

    def __init__(self, an_image: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.an_image, self.asked = an_image, list[int]()

    def forward(self, images: int) -> torch.Tensor:
        self.asked.append(images)
        time.sleep(self.an_image * images * (1 if torch.is_autocast_enabled("cpu") else 2))
        return self.weight * 2


@pytest.mark.parametrize(("an_image", "most"), [(0.02, 4), (0.0001, 32)])
def test_measuring_is_bounded_and_still_finds_the_faster(an_image: float, most: int) -> None:
    """As few images as the time allows: two at least."""
    module = Slow(an_image)
    begun = time.perf_counter()
    found = precision.choose("auto", "fused", module, module, CPU, budget=0.4)
    assert time.perf_counter() - begun < 4
    assert found.precision == "bf16" and module.weight.grad is None
    assert 2 <= max(module.asked) <= most and f"with {max(module.asked)} images" in found.why
    assert found.seconds == pytest.approx(an_image, rel=1.0)


def test_what_does_not_fit_is_not_tried() -> None:
    module = Slow(0.05)
    found = precision.choose("auto", "auto", module, module, CPU, budget=0.05)
    assert module.asked == [2] and (found.precision, found.attention) == ("fp32", "fused")
    assert "bf16 fused and fp32 explicit and bf16 explicit not tried" in found.why
    assert found.seconds == pytest.approx(0.1, rel=0.5)


def test_a_signal_is_heard_between_two_passes() -> None:
    module = Slow(0.0)

    def heed() -> None:
        if len(module.asked) == 3:
            raise Stopped(15)

    with pytest.raises(Stopped):
        precision.choose("auto", "auto", module, module, CPU, heed)
    assert len(module.asked) == 3 and module.weight.grad is None


def test_a_stop_while_measuring_writes_nothing(
    inside: Callable[..., int], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise Stopped(15)

    monkeypatch.setattr(precision, "choose", stopped)
    with pytest.raises(Stopped):
        inside(*tiny, "run=run", "precision=auto")
    assert list(Path.cwd().iterdir()) == []


def test_what_takes_long_is_told_while_it_does() -> None:
    lines: list[str] = []
    with patient("sleeping", lines.append, every=0.1):
        time.sleep(0.35)
    assert lines[0] == "sleeping" and 2 <= len(lines) <= 4 and lines[1] == "           … 0:00 so far"
    with patient("sleeping", lines.append, first=5.0):
        pass
    time.sleep(0.05)
    assert lines.count("sleeping") == 1


def job(**options: Any) -> Any:
    """What the words about a run's pace look at."""
    config = PretrainConfig(**options)
    return SimpleNamespace(
        config=config, process=SimpleNamespace(num_processes=1), pace=0.35, steps=1000,
        task=SimpleNamespace(objectives={"absolute": SimpleNamespace(compares=False)}), held_out=range(500), reasons={},
        train=SimpleNamespace(labels=None),
    )  # fmt: skip


def test_a_step_of_minutes_is_advised_against() -> None:
    line, tip = pace.expected(job(batch=1024))
    assert line == "pace       about 5:58 a step, 99:33:20 the whole run, by what was measured"
    assert "batch=64 makes it 0:22" in tip and "accumulate=16 keeps it, in parts of 0:22" in tip
    assert pace.expected(job(batch=64)) == ["pace       about 0:22 a step, 6:13:20 the whole run, by what was measured"]


# ------------------------------------------------------------------------------------------ monitors


@pytest.mark.parametrize(
    ("training", "every", "images"),
    [
        (10_000.0, 100, None),  # ten times 12 s are a tenth of it at most
        (300.0, 500, None),  # twice
        (100.0, 1000, 250),  # once, and not on all
        (1.0, 1000, 31),  # and no fewer, as drawing takes most of it
    ],
)
def test_measurements_take_a_tenth_of_the_time_at_most(training: float, every: int, images: int | None) -> None:
    parts = job(steps=1000)
    pace._choose(parts, training, pace.Cost(2.0, 0.02))
    assert (parts.config.monitor.every, parts.config.monitor.images) == (every, images)
    cost = (2.0 + 0.02 * (images or 500)) * 1000 / every
    assert cost <= 0.1 * training or images == 31
    assert f"{cost / training:.1%} of the training's time" in parts.reasons["monitor.every"]


@pytest.mark.slow
def test_what_is_given_is_kept_and_what_is_settled_is_stored(
    inside: Callable[..., int], tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny, "steps=2", "tensorboard=false", "objectives.relative.weight=0"]
    assert inside(*words, "run=settled", "monitor.every=null") == 0
    told = capsys.readouterr().out
    assert "auto       monitor.every = " in told and "pace       about" in told and "looking at them took" in told
    settled = load(Path("settled/config.yaml"), []).monitor
    assert settled.every is not None and settled.every % 1 == 0
    assert inside(*words, "run=given", "monitor.every=1") == 0
    assert load(Path("given/config.yaml"), []).monitor == MonitorConfig(every=1)
    assert Run(Path("given")).losses == Run(Path("settled")).losses  # when one looks changes nothing, dropout included


# ------------------------------------------------------------------------------------------ few images


def test_a_recipes_batch_is_lowered_to_what_few_images_fill(images: Path) -> None:
    config = load(TINY, [f"data={images}", "batch=256", "loader.workers=0"])
    with pytest.raises(Refusal, match="batch=256 is larger than the training data, 87 images"):
        assemble(dataclasses.replace(config), group.join(), typed={"batch"})
    parts = assemble(dataclasses.replace(config, accumulate=2), group.join(), typed=())
    assert parts.config.batch == 86 and "87 images to train on, fewer than the recipe's 256" in parts.reasons["batch"]
    assert optimization_for(parts.config, parts.task, 30).rate(3) == pytest.approx(0.05 * 86 / 256)  # the rate follows
    with pytest.raises(Refusal, match="is larger than the training data"):
        assemble(dataclasses.replace(config, accumulate=100), group.join(), typed=())


# ------------------------------------------------------------------------------------------ data


def waiting(workers: int, processes: int = 1) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(loader=SimpleNamespace(workers=workers, cache="full")),
        process=SimpleNamespace(num_processes=processes),
        task=SimpleNamespace(backbone=SimpleNamespace(size=(32, 48))),
    )


@pytest.mark.parametrize(
    ("workers", "processes", "advice"),
    [
        (0, 1, "loader.workers=7 decodes them beside the training"),
        (3, 1, "loader.workers=8 decodes on every core that this process has, 3 do now"),
        (3, 2, "loader.workers=4 decodes"),
        (8, 1, "every core decodes already: files whose shorter side is about 64 pixels"),
        (0, 8, "loader.workers=1 decodes"),
    ],
)
def test_a_training_that_waits_is_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch, workers: int, processes: int, advice: str
) -> None:
    monkeypatch.setattr(pace, "usable_cores", lambda: 8)
    told = pace.verdict_on_data(waiting(workers, processes), 0.63)
    assert told.startswith("data-bound: 63% of the time is spent waiting for images; ") and advice in told
    assert pace.verdict_on_data(waiting(workers, processes), 0.1).startswith("compute-bound: 10%")


def test_a_cache_is_advised_where_there_is_none_and_it_fits(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"data={images}", "loader.workers=0", f"loader.cache_root={tmp_path / 'cache'}"]
    parts = assemble(load(TINY, words), group.join())
    told = pace.verdict_on_data(parts, 0.63)
    assert re.search(r"; loader\.cache=18 would fit in 0\.1 MB$", told)  # views of 16x24
    monkeypatch.setattr(pace, "ALIKE", 100)
    assert pace.cache_advice(parts) == "loader.cache=full would fit in 0.6 MB"
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("common.caching.pixels.Cache.free", 1000)
    assert not pace.cache_advice(parts)
    monkeypatch.undo()
    for word in ("loader.cache=full", "loader.decode=scaled"):
        assert not pace.cache_advice(dataclasses.replace(parts, config=load(TINY, [*words, word])))
    assert not pace.cache_advice(assemble(load(TINY, ["data=builtin"]), group.join()))


def test_waiting_is_told_once_and_not_while_the_loader_starts() -> None:
    heard: list[str] = []
    read = pace.data_warning(waiting(1), heard.append)
    for step, wait in ((10, 0.9), (20, 0.9), (50, 0.9), (60, 0.1), (70, 0.9)):
        read(step, {"data_wait": wait})
    assert not heard  # the loader starts, or one line is slow
    for step in (80, 90, 100):
        read(step, {"data_wait": 0.5})
    (line,) = heard
    assert line.startswith("warning: step 80: data-bound: 50%")
