"""The task over objectives with teachers and many crops: which passes are run, who follows whom, what is withheld."""

import copy
from typing import Any

import pytest
import torch
from small import Noise, backbone, options_for

from common.batches.samples import Samples
from common.batches.views import View
from common.data import Images
from common.errors import Refusal
from common.models import ModelConfig, create
from common.training import ema
from common.training.schedules import Schedule
from pretrain.objectives import Pass
from pretrain.task import Pretraining, build, resolve

HEAD = {"prototypes": 12, "hidden": 16, "bottleneck": 8, "teacher_temperature": 0.04, "freeze_last_layer": 0.0}
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
VIEWS = {"global": View(size=24, count=2), "local": View(size=16, count=3, scale=[0.1, 0.4])}


def made(wanted: dict[str, Any], views: dict[str, View] | None = None, **kwargs: Any) -> Pretraining:
    torch.manual_seed(0)
    model = create(ModelConfig("vit_tiny_patch16_224", VIT | kwargs), 24)
    return build(model, options_for(wanted, model), views or VIEWS)


def batch(task: Pretraining, views: dict[str, View] | None = None, count: int = 4) -> Any:
    torch.manual_seed(1)
    samples = Samples(Images(Noise(), "noise"), views or VIEWS, 0, 3, task.draws, task.collates)
    return samples.__getitems__([(0, i) for i in range(count)])


def runs(task: Pretraining) -> list[tuple[str, int, int]]:
    """(who, rows, side) of every run of a backbone from here on."""
    seen: list[tuple[str, int, int]] = []
    for who, model in (("student", task.backbone), ("teacher", task.teacher)):
        if model is not None:
            model.register_forward_pre_hook(lambda _, given, who=who: seen.append((who, *given[0].shape[::3])))
    return seen


def test_the_backbone_runs_once_for_each_resolution_and_plan() -> None:
    task = made({"dino": HEAD, "absolute": {}, "koleo": {}})
    seen = runs(task)
    task(batch(task))
    # dino and koleo share the global crops; the positional pass has a plan of its own and looks at the first crop
    assert sorted(seen) == [("student", 4, 24), ("student", 8, 24), ("student", 12, 16), ("teacher", 8, 24)]


def test_ibot_s_masked_pass_serves_dino_and_koleo_too() -> None:
    task = made({"dino": HEAD, "ibot": HEAD, "koleo": {}, "absolute": {}})
    seen = runs(task)
    task(batch(task))
    assert sorted(seen) == [("student", 4, 24), ("student", 8, 24), ("student", 12, 16), ("teacher", 8, 24)]


def test_views_of_one_size_run_together() -> None:
    views = {"global": View(size=24, count=2), "local": View(size=24, count=3), "place": View(size=24)}
    task = made({"dino": HEAD, "absolute": {"view": "place", "position": "full"}}, views)
    data = batch(task, views)
    seen = runs(task)
    together = task.features(data)
    assert sorted(seen) == [("student", 24, 24), ("teacher", 8, 24)]
    for want, features in together.items():
        model: Any = task.teacher if want.network == "teacher" else task.backbone
        alone = model(data.views[want.view][: len(features.tokens)])
        torch.testing.assert_close(features.tokens, alone.tokens)
        torch.testing.assert_close(features.prefix, alone.prefix)
    counts = {want.view: len(features.tokens) for want, features in together.items() if want.network == "student"}
    assert counts == {"global": 8, "local": 12, "place": 4}


def test_only_the_passes_that_are_asked_for() -> None:
    task = made({"dino": HEAD, "absolute": {}})
    data, seen = batch(task), runs(task)
    found = task.features(data, ["absolute"])
    assert seen == [("student", 4, 24)]
    (features,) = found.values()
    torch.testing.assert_close(features.tokens, task.features(data)[next(iter(found))].tokens)


def test_masked_patches_are_not_seen_and_their_places_are() -> None:
    task = made({"ibot": HEAD | {"mask_probability": 1.0, "mask_ratio": [0.3, 0.6]}}, {"global": VIEWS["global"]})
    data = batch(task, {"global": VIEWS["global"]})
    want = Pass(crops=None, mask_of="ibot")
    before = task.features(data)[want]
    masked = data.draws["ibot/masked"].transpose(0, 1).flatten(0, 1)  # crop-major, (8, 9)
    assert 0 < masked.sum() < masked.numel() and len(masked) == 8
    cells = masked.view(8, 1, 3, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = copy.copy(data)
    other.views = {"global": torch.where(cells, 255 - data.views["global"], data.views["global"])}
    torch.testing.assert_close(task.features(other)[want].tokens, before.tokens, rtol=0, atol=0)
    other.views = {"global": torch.where(cells, data.views["global"], 255 - data.views["global"])}
    assert not torch.equal(task.features(other)[want].tokens, before.tokens)
    with torch.no_grad():  # what stands in their place
        task.objectives["ibot"].mask_token += 1.0  # type: ignore[operator]
    assert not torch.equal(task.features(data)[want].tokens, before.tokens)


def test_the_teacher_follows_by_the_momentum_and_never_trains() -> None:
    task = made({"dino": HEAD}, drop_path_rate=0.5)
    task.momentum = Schedule("linear", 0.5, 1.0)
    task.train()
    assert task.teacher is not None and not task.teacher.training and task.backbone.training
    assert not any(parameter.requires_grad for teacher, _ in task.teachers() for parameter in teacher.parameters())
    pairs = list(task.teachers())
    assert len(pairs) == 2  # the backbone and dino's head
    with torch.no_grad():
        for _, student in pairs:
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
    before = [copy.deepcopy(teacher.state_dict()) for teacher, _ in pairs]
    task.begin_step(0.5, True)  # momentum 0.75
    task.after_step(taken=False)
    assert int(task.skipped) == 1
    for (teacher, _), old in zip(pairs, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in teacher.state_dict().items())
    task.after_step(taken=True)
    for (teacher, student), old in zip(pairs, before, strict=True):
        for name, value in teacher.named_parameters():
            expected = 0.75 * old[name].double() + 0.25 * student.get_parameter(name).double()
            torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
    assert int(task.skipped) == 1


def test_a_step_that_was_not_taken_commits_no_centre() -> None:
    task = made({"dino": HEAD, "ibot": HEAD | {"centering": "centre"}})
    data = batch(task)
    centres = {name: value for name, value in task.named_buffers() if name.endswith("centre.centre")}
    assert len(centres) == 2 and all(not value.any() for value in centres.values())
    for taken in (False, True):
        task.begin_step(0.0, False)
        task(data)
        task.after_step(taken)
        assert all(bool(value.any()) == taken for value in centres.values())
    once = {name: value.clone() for name, value in centres.items()}
    fresh = made({"dino": HEAD, "ibot": HEAD | {"centering": "centre"}})
    fresh.begin_step(0.0, False)
    fresh(data)
    fresh.after_step(True)
    for name, value in once.items():  # what the untaken step had noted was forgotten
        torch.testing.assert_close(value, fresh.get_buffer(name), rtol=0, atol=0)


def test_the_last_layer_is_frozen_at_first() -> None:
    task = made({"dino": HEAD | {"freeze_last_layer": 0.1}, "ibot": HEAD | {"freeze_last_layer": 0.1}})
    last = [value for name, value in task.named_parameters() if ".head.last." in name]
    assert len(last) == 2
    for progress, frozen in ((0.05, True), (0.1, False)):
        task.begin_step(progress, False)
        task(batch(task))["loss"].backward()
        task.before_update()
        assert [parameter.grad is None for parameter in last] == [frozen] * 2
    idle = [name for name, value in task.named_parameters() if value.requires_grad and value.grad is None]
    assert not idle


def test_adding_a_teacher_moves_no_positional_crop_and_no_plan() -> None:
    views = {"global": View(size=24)}
    alone = made({"absolute": {"keep": 0.5}}, views)
    beside = made({"absolute": {"keep": 0.5}, "dino": HEAD})
    one, two = batch(alone, views), batch(beside)
    torch.testing.assert_close(one.views["global"], two.views["global"][:4], rtol=0, atol=0)
    for name, value in one.draws.items():
        assert torch.equal(value, two.draws[name])
    first = alone.features(one, ["absolute"]), beside.features(two, ["absolute"])
    torch.testing.assert_close(*(next(iter(found.values())).tokens for found in first))


def test_evaluation_is_told_what_stands_for_an_image() -> None:
    assert made({"absolute": {}}, {"global": View(size=24)}).pooling == "mean"
    beside = made({"absolute": {}, "dino": HEAD})
    assert (beside.pooling, beside.position) == ("class", "full")


def test_an_average_in_bfloat16_is_refused() -> None:
    model = backbone()
    teacher = ema.copy_of(model).bfloat16()
    with pytest.raises(ValueError, match="an average needs float32"):
        ema.follow(teacher, model, 0.9)


def test_half_life() -> None:
    assert ema.half_life(0.996, 1024) == pytest.approx(177_094, rel=1e-4)  # DINO on ImageNet
    assert ema.half_life(0.5, 32) == pytest.approx(32)
    assert ema.half_life(1.0, 32) == float("inf")


@pytest.mark.parametrize(
    ("kwargs", "name", "remedy"),
    [
        ({"dynamic_img_size": False}, "vit_tiny_patch16_224", "model.kwargs.dynamic_img_size=true"),
        ({}, "swin", "model.kwargs.strict_img_size=false"),
    ],
)
def test_local_crops_that_the_backbone_refuses_are_said_when_it_is_built(
    kwargs: dict[str, Any], name: str, remedy: str
) -> None:
    with pytest.raises(Refusal) as refusal:
        if name == "swin":
            views = {"global": View(size=32, count=2), "local": View(size=16, count=3)}
            build(backbone("swin"), resolve({"dino": HEAD}), views)
        else:
            made({"dino": HEAD}, **kwargs)
    assert "objectives.dino looks at view local, 16x16" in str(refusal.value) and remedy in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_ibot_needs_a_mask_token() -> None:
    with pytest.raises(Refusal, match=r"`ibot` needs a backbone that takes a mask token"):
        build(backbone("swin"), resolve({"ibot": HEAD}), {"global": View(size=32, count=2)})


def test_dino_needs_two_crops() -> None:
    with pytest.raises(Refusal, match=r"views\.global\.count=1"):
        made({"dino": HEAD}, {"global": View(size=24)})
