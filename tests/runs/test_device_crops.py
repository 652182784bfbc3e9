"""Crops made on the device: chosen on a GPU, trained on as the host's are, gone on with to the bit, and shared."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from runs.children import ROOT, Run, Train

from common.batches.views import View
from common.errors import Refusal
from pretrain.automatic import Facts, resolve
from pretrain.config import PretrainConfig, stored_in

DINO = str(ROOT / "tests" / "fixtures" / "tiny_dino.yaml")


@pytest.mark.parametrize(
    ("asked", "device", "options", "settled", "reason"),
    [
        ("auto", "cpu", {}, "host", None),
        ("auto", "mps", {}, "host", None),
        ("auto", "cuda", {}, "device", "a GPU makes"),
        ("auto", "cuda", {"erasing": 0.25}, "host", r"views\.global\.erasing=0\.25"),
        ("auto", "cuda", {"auto_augment": "3a"}, "host", r"views\.global\.auto_augment=3a"),
        ("auto", "cuda", {"gap": 2}, "host", r"views\.global\.gap=2 is done .* patch by patch"),
        ("auto", "cuda", {"patch_jitter": 0.5}, "host", r"views\.global\.patch_jitter=0\.5"),
        ("auto", "cuda", {"patch_drop_colour": 0.1}, "host", r"views\.global\.patch_drop_colour=0\.1"),
        ("host", "cuda", {}, "host", None),
        ("device", "cpu", {}, "device", None),
    ],
)
def test_where_crops_are_made(
    asked: Any, device: str, options: dict[str, Any], settled: str, reason: str | None
) -> None:
    views = {"global": View(**options)}
    config = PretrainConfig(batch=8, steps=1, augment=asked, views=views, objectives={"absolute": {}})
    result = resolve(config, Facts(64, (14, 14), class_token=True, device=device))
    assert result.options.augment == settled
    said = result.reasons.get("augment")
    assert said is None if reason is None else re.match(reason, said or "")


def test_crops_are_not_made_where_there_is_no_float64() -> None:
    config = PretrainConfig(batch=8, steps=1, augment="device", objectives={"absolute": {}})
    with pytest.raises(Refusal, match=r"augment=device .*mps.* use augment=host"):
        resolve(config, Facts(64, (14, 14), class_token=True, device="mps"))


def test_a_run_from_before_there_was_a_choice_keeps_its_crops(tmp_path: Path) -> None:
    """On a GPU `auto` would change them in mid-training."""
    config = tmp_path / "config.yaml"
    config.write_text("steps: 3\nviews: {global: {size: 16}}\n")
    assert stored_in(tmp_path).augment == "host"
    for chosen in ("device", "host"):
        OmegaConf.save({"steps": 3, "augment": chosen}, config)
        assert stored_in(tmp_path).augment == chosen


@pytest.mark.slow
def test_it_trains_as_the_hosts_crops_do_and_goes_on_to_the_bit(
    inside: Callable[..., int], tiny: list[str], at_step: Callable, tmp_path: Path
) -> None:
    """No image is made so much smaller that a value differs; monitors and held-out losses look at the same crops."""

    def crash() -> None:
        raise KeyboardInterrupt

    words = [DINO, *tiny[1:], "steps=8", "monitor.every=4"]
    host, device, broken = (Run(tmp_path / name) for name in ("host", "device", "broken"))
    assert inside(*words, f"run={host.path}", "augment=host") == 0
    assert inside(*words, f"run={device.path}", "augment=device", "loader.workers=2") == 0
    assert device.losses == host.losses and device.numbers == host.numbers
    at_step(7, crash)
    with pytest.raises(KeyboardInterrupt):
        inside(*words, f"run={broken.path}", "augment=device")
    assert broken.checkpoints == [5]
    at_step(0, crash)
    assert inside("--resume", broken.path) == 0
    assert broken.losses == device.losses and broken.numbers == device.numbers


@pytest.mark.slow
def test_two_processes_train_on_the_crops_of_one(train: Train, tiny: list[str], tmp_path: Path) -> None:
    still = ["model.kwargs.drop_path_rate=0", "model.kwargs.proj_drop_rate=0"]
    words = [DINO, *tiny[1:], *still, "steps=2", "augment=device", "tensorboard=false", "monitor.held_out=0"]
    for processes in (1, 2):
        ended = train(*words, f"run={tmp_path / str(processes)}", processes=processes)
        assert ended.status == 0, ended.stderr
    one, two = (Run(tmp_path / str(processes)).metrics for processes in (1, 2))
    assert len(one) == 2
    for name in ("dino/loss", "absolute/loss"):
        assert one[0][name] == pytest.approx(two[0][name], abs=1e-5)
