"""`token_labeling`: the published losses, mixed tokens that are labelled as what they show, and by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import BACKBONES, backbone, options_for
from torch import Tensor
from torch.nn import functional as F

from common.batches.mixing import NO_BOX, Box, Mixture, kept, swap_box
from common.batches.samples import Batch, Samples
from common.batches.views import View
from common.data import Images
from common.errors import Refusal
from common.models import Backbone, Features, ModelConfig, create
from pretrain import objectives
from pretrain.objectives import token_labeling
from pretrain.objectives.token_labeling import TokenLabeling
from pretrain.task import Pretraining, build
from pretrain.token_labels import maps

PUBLISHED = json.loads((Path(__file__).parents[2] / "fixtures/token_labels.json").read_text())["losses"]
CLS, AUX = torch.tensor(PUBLISHED["x_cls"]), torch.tensor(PUBLISHED["x_aux"])
SOFT, DENSE = torch.tensor(PUBLISHED["target_2d"]), torch.tensor(PUBLISHED["target_3d"])  # (B, C), (B, C, 2 + N)
BOX: Box = (0, 0, 1, 2)


def made_of(name: str = "vit 3x3", **options: Any) -> TokenLabeling:
    whole = backbone(name)
    wanted = {"token_labeling": {"classes": 3, **options}}
    return objectives.build("token_labeling", options_for(wanted, whole)["token_labeling"], whole)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ the published losses


def published(box: Box = NO_BOX, labels: list[int] | None = None, **options: Any) -> dict[str, float]:
    """Losses of two images whose logits are the fixture's: features are logits, and layers the identity. The fixture's
    logits are what a model gives that has put its exchanged patches back."""
    made = made_of(smoothing=0.15, labels="somewhere", **options)
    for layer in (made.head, made.head.dense):
        if layer is not None:
            layer.weight, layer.bias = torch.nn.Parameter(torch.eye(3)), torch.nn.Parameter(torch.zeros(3))
    features = Features(swap_box(AUX, (2, 2), box), CLS[:, None], (2, 2), box=box)
    draws = {"label": torch.tensor(labels or [0, 2]), "known": torch.tensor(2.0)}
    if box != NO_BOX:
        draws["shares"] = torch.tensor([[kept((2, 2), box), 1 - kept((2, 2), box)]] * 2)
    draws |= {"record": torch.zeros(2, 2, 1, 2, 2, dtype=torch.int16), "box": torch.tensor([[0.0, 0, 1, 1]] * 2)}
    draws |= {"size": torch.tensor([[8, 8]] * 2), "flip": torch.zeros(2, dtype=torch.bool)}
    return {name: value.item() for name, value in made({"image": features}, draws).items()}


@pytest.fixture
def maps_of_the_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    found = maps.Targets(DENSE[:, :, 1], DENSE[:, :, 2:].transpose(1, 2))
    monkeypatch.setattr(token_labeling.maps, "targets", lambda *_, **__: found)


@pytest.mark.parametrize(
    ("name", "box", "options"),
    [
        ("TokenLabelCE_3d_nomix", NO_BOX, {}),
        ("TokenLabelCE_3d_bbox_0_0_1_2", BOX, {}),
        ("TokenLabelCE_3d_bbox_gt", BOX, {"ground_truth": "published"}),
        ("TokenLabelCE_3d_w_cls1_dense0.5", BOX, {"dense_weight": 0.5}),
    ],
)
def test_losses_are_the_published_ones(maps_of_the_fixture: None, name: str, box: Box, options: dict[str, Any]) -> None:
    case = PUBLISHED[name]
    assert tuple(case["bbox"]) == box
    assert published(box, **options)["loss"] == pytest.approx(case["value"], abs=1e-6)


def test_one_label_an_image_is_relabelling(maps_of_the_fixture: None) -> None:
    """Map size 1: the published loss reads what the machine says of the whole crop, and nothing of the class."""
    report = published(dense_weight=0.0)
    assert report["loss"] == pytest.approx(PUBLISHED["TokenLabelSoftTarget(x_cls,target_3d[:,:,:2])"], abs=1e-6)
    assert report == published(dense_weight=0.0, labels=[1, 1]) | {"accuracy": report["accuracy"]}
    assert "dense_loss" not in report


@pytest.mark.parametrize(
    ("name", "box", "weight"),
    [
        ("SoftTarget(x_cls,target_2d)", NO_BOX, 0.0),
        ("TokenLabelCE_2d_nomix", NO_BOX, 1.0),
        ("TokenLabelCE_2d_bbox_0_0_1_2", BOX, 1.0),
        ("TokenLabelCE_2d_bbox_0_0_1_2_dense0", BOX, 0.0),
    ],
)
def test_without_dense_labels_patches_are_labelled_as_their_image(
    monkeypatch: pytest.MonkeyPatch, name: str, box: Box, weight: float
) -> None:
    monkeypatch.setattr(TokenLabeling, "targets", lambda *_: (SOFT, SOFT[:, None], torch.ones(2)))
    expected = PUBLISHED[name] if isinstance(PUBLISHED[name], float) else PUBLISHED[name]["value"]
    assert published(box, dense_weight=weight)["loss"] == pytest.approx(expected, abs=1e-6)


def test_the_class_is_mixed_in_both_directions(maps_of_the_fixture: None) -> None:
    """Of the fixture the machine says 0 and 1 and the classes are 0 and 2: it agrees once."""
    machine, truth = DENSE[:, :, 1].double(), DENSE[:, :, 0].double()
    logs = CLS.double().log_softmax(1)
    for name, shares in (("published", [0.5, 0.9]), ("sensible", [0.9, 0.5])):
        mixed = torch.tensor(shares)[:, None] * machine + (1 - torch.tensor(shares)[:, None]) * truth
        report = published(ground_truth=name, dense_weight=0.0)
        assert report["loss"] == pytest.approx(-(mixed * logs).sum(1).mean().item(), abs=1e-6)


# --------------------------------------------------------------------------------------------------------- by hand


def records(count: int = 4, seed: int = 0) -> np.ndarray:
    """Labels of images, (count, 2, k, H, W): two of three classes in each of 3x2 cells."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(count, 2, 3, 2)).astype(np.float16).view(np.uint16)
    ids = np.argsort(rng.random((count, 3, 3, 2)), 1)[:, :2].astype(np.uint16)
    return np.stack([scores, ids], 1).view(np.int16)


class Kept:
    """What is kept beside the images of `small.Noise`."""

    crop, size = None, (3, 2)

    def __init__(self) -> None:
        self.records = records(8)

    def read(self, i: int) -> dict[str, np.ndarray]:
        return {"record": self.records[i]}

    def blank(self) -> dict[str, np.ndarray]:
        return {"record": np.zeros_like(self.records[0])}


class Pictures:
    """Random oblong pictures."""

    def __len__(self) -> int:
        return 8

    def read(self, i: int, channels: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng(i).integers(0, 256, (channels, 40, 30), dtype=np.uint8))

    def name(self, i: int) -> str:
        return f"noise[{i}]"

    def identity(self) -> bytes:
        return b"noise"


NAMES = ["vit 3x3", "registers", "swin", "nest", "lvvit", "spvit"]
SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def network(name: str) -> Backbone:
    if name in BACKBONES:
        return backbone(name)
    torch.manual_seed(0)
    more = {"stem_width": 8} | ({"local_blocks": 1} if name == "spvit" else {})
    return create(ModelConfig(f"{name}_s", {**SMALL, **more}), 48)


def trained(name: str, told: list[int] | None = None, **options: Any) -> tuple[Pretraining, Batch]:
    """The objective on a backbone, in eval mode and with layers that say something, and four images with labels."""
    whole, view = network(name), View(size=1, flip=0.5, scale=[0.3, 0.9], auto_augment=options.pop("augment", None))
    view.size = list(whole.size)
    options = {"classes": 3, "labels": "somewhere", **options}
    made = build(whole, options_for({"token_labeling": options}, whole), {"global": view}).eval()
    torch.nn.init.normal_(made.objectives["token_labeling"].head.dense.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    beside = {} if options["labels"] is None else {"token_labeling": Kept()}
    images = Images(Pictures(), "noise", np.resize(told or [2, 0, 1, 2], 8), ["cat", "dog", "owl"])
    samples = Samples(images, {"global": view}, 0, 3, made.draws, made.collates, made.labelled, beside=beside)
    return made, samples.__getitems__([(0, i) for i in range(4)])


@pytest.mark.parametrize("name", NAMES)
def test_patches_of_any_backbone_learn_what_lies_where_they_lie(name: str) -> None:
    """The map of a crop asked at every one of its patches; the layers begin at zero, so the loss at that of a guess."""
    made, given = trained(name)
    objective: Any = made.objectives["token_labeling"]
    draws = {key.partition("/")[2]: value for key, value in given.draws.items()}
    features = made.backbone(given.views["global"])
    scores, ids = maps.unpack(draws["record"])
    wanted = maps.targets(scores, ids, 3, draws["box"], draws["flip"], features.grid, 0.1)
    head = objective.head
    logits = F.linear(features.pooled(objective.pools), head.weight, head.bias).double().log_softmax(-1)
    dense = F.linear(features.tokens, head.dense.weight, head.dense.bias).double().log_softmax(-1)
    of_image, of_patches = -(wanted.image * logits).sum(1).mean(), -(wanted.tokens * dense).sum(2).mean()
    report = made(given)
    assert report["token_labeling/class_loss"].item() == pytest.approx(of_image.item(), rel=1e-5)
    assert report["token_labeling/dense_loss"].item() == pytest.approx(of_patches.item(), rel=1e-5)
    assert report["loss"].item() == pytest.approx((of_image + of_patches).item(), rel=1e-5)
    agreement = (dense.argmax(-1) == wanted.tokens.argmax(-1)).double().mean()
    assert report["token_labeling/agreement"].item() == pytest.approx(agreement.item())
    accuracy = (logits.argmax(1) == torch.tensor([2, 0, 1, 2])).double().mean()
    assert report["token_labeling/accuracy"].item() == pytest.approx(accuracy.item())
    report["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in (*head.parameters(), made.backbone.model.norm.weight))


def test_labels_follow_a_rotated_crop() -> None:
    made, given = trained("vit 3x3", augment="rand-m9-n2-mstd0.5-inc1")
    still = {name: value for name, value in given.draws.items() if not name.endswith("/moves")}
    moved = given.draws["token_labeling/moves"][..., 1].abs().sum((1,)) > 0
    assert moved.any()
    one, other = made(given), made(Batch(given.views, given.index, still))
    assert one["token_labeling/dense_loss"] != other["token_labeling/dense_loss"]


@pytest.mark.parametrize("name", ["vit 3x3", "lvvit", "spvit"])
def test_exchanged_patches_are_labelled_as_what_they_show(name: str) -> None:
    """The class token sees both images, by the share of each; a patch goes through the other's blocks, and back."""
    made, given = trained(name)
    objective: Any = made.objectives["token_labeling"]
    mixture = Mixture(0.5, centre=(0.5, 0.9))
    given.mixtures["global"] = [mixture]
    report = made(given)
    features = made.features(given)[objective.passes["image"]]
    box = mixture.tokens((3, 3))
    assert features.box == box != NO_BOX
    unmixed = made.backbone(given.views["global"])
    assert not torch.allclose(features.tokens, unmixed.tokens)
    draws = {key.partition("/")[2]: value for key, value in given.draws.items()}
    scores, ids = maps.unpack(draws["record"])
    wanted = maps.targets(scores, ids, 3, draws["box"], draws["flip"], (3, 3), 0.1)
    share, head = kept((3, 3), box), objective.head
    mixed = share * wanted.image + (1 - share) * wanted.image[[1, 0, 3, 2]]
    logits = F.linear(features.pooled("class"), head.weight, head.bias).log_softmax(-1)
    assert report["token_labeling/class_loss"].item() == pytest.approx(-(mixed * logits).sum(1).mean().item(), rel=1e-5)
    dense = F.linear(features.tokens, head.dense.weight, head.dense.bias).log_softmax(-1).unflatten(1, (3, 3))
    labels = wanted.tokens.unflatten(1, (3, 3)).clone()  # of what each place shows: the reverse of putting back
    top, left, bottom, right = box
    labels[:, top:bottom, left:right] = wanted.tokens.unflatten(1, (3, 3))[[1, 0, 3, 2], top:bottom, left:right]
    assert report["token_labeling/dense_loss"].item() == pytest.approx(
        -(labels * dense).sum(-1).mean().item(), rel=1e-5
    )


def test_more_than_half_of_the_patches_decides_what_is_right() -> None:
    made, given = trained("vit 3x3", [2, 0, 1, 1])
    objective: Any = made.objectives["token_labeling"]
    torch.nn.init.zeros_(objective.head.weight)
    objective.head.bias.data = torch.tensor([9.0, 0, 0])  # it always says class 0
    for lam, right in ((1.0, 0.25), (0.1, 0.25), (0.0, 0.25)):
        given.mixtures["global"] = [Mixture(lam, centre=(0.5, 0.5))]
        assert made(given)["token_labeling/accuracy"].item() == right
    told = {"label": torch.tensor([2, 0, 1, 1]), "shares": torch.tensor([[0.2, 0.8]] * 4)}
    assert token_labeling._right(torch.zeros(4), told).tolist() == [True, False, False, False]


def test_only_the_papers_models_add_what_their_patches_say() -> None:
    for name, adds in (("vit 3x3", False), ("lvvit", True), ("spvit", True)):
        made, given = trained(name)
        objective: Any = made.objectives["token_labeling"]
        with torch.no_grad():
            features = made.backbone(given.views["global"])
            plain = F.linear(features.pooled("class"), objective.head.weight, objective.head.bias)
            dense = F.linear(features.tokens, objective.head.dense.weight, objective.head.dense.bias)
            said = objective.scores({"image": features})
        torch.testing.assert_close(said, plain + (0.5 * dense.amax(1) if adds else 0))


def test_images_without_class_take_part_by_their_dense_labels_alone() -> None:
    made, given = trained("vit 3x3", [-1, 0, -1, 2], ground_truth="sensible")
    nobody = trained("vit 3x3", [-1], ground_truth="sensible")[1]
    machine, _ = trained("vit 3x3")
    assert made(nobody)["loss"].item() == pytest.approx(machine(nobody)["loss"].item())
    assert made(nobody)["token_labeling/accuracy"] == 0
    assert made(given)["loss"].isfinite()
    without, none = trained("vit 3x3", [-1, 0, -1, 2], labels=None)
    each = [
        without(trained("vit 3x3", told, labels=None)[1])["loss"].item() for told in ([-1, 0, -1, -1], [-1, -1, -1, 2])
    ]
    assert without(none)["loss"].item() == pytest.approx(np.mean(each), rel=1e-6)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "name", "words"),
    [
        ({"pool": "class"}, "swin", "pool=class: swin_tiny_patch4_window7_224 has no class token here; use pool=mean"),
        ({"class_weight": 0, "dense_weight": 0}, "vit 3x3", "class_weight=0 and dense_weight=0 leave nothing to learn"),
        ({"ground_truth": "published"}, "vit 3x3", "ground_truth=published goes with dense labels: set labels=FILE"),
        ({"legacy_xy_swap": True}, "vit 3x3", "legacy_xy_swap=true goes with dense labels"),
        ({"view": "local"}, "vit 3x3", "view='local' in objectives.token_labeling: expected one of global"),
        ({"dense_weight": -1.0}, "vit 3x3", "dense_weight=-1.0: expected"),
    ],
)
def test_what_is_not_understood_is_refused(options: dict[str, Any], name: str, words: str) -> None:
    with pytest.raises(Refusal) as refusal:
        made_of(name, **options)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_mixed_pixels_and_patches_that_cannot_be_exchanged_are_refused() -> None:
    for name, view, others, words in (
        ("vit 3x3", {"mixup": 0.8}, {}, "mixup=0.8 and cutmix=0.0 mix pixels, .* mix_token=1 to exchange patches"),
        ("swin", {"mix_token": 1.0}, {}, "mix_token exchanges patches of .* runs swin_tiny"),
        ("vit 3x3", {"mix_token": 1.0}, {"absolute": {"keep": 0.5}}, "objectives.absolute runs .* with keep=0.5"),
    ):
        whole = backbone(name)
        chosen = options_for({"token_labeling": {"classes": 3}, **others}, whole)
        with pytest.raises(Refusal, match=words):
            build(whole, chosen, {"global": View(size=list(whole.size), **view)})  # type: ignore[arg-type]
