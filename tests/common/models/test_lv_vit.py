"""LV-ViT: the published model to the last digit, MixToken, the auxiliary head, files of other sizes."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from by_hand import vit as by_hand
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor
from torch.nn import functional as F

from common.batches.mixing import NO_BOX
from common.errors import Refusal
from common.models.lv_vit import LvVit, checkpoint_filter_fn

PUBLISHED = json.loads((Path(__file__).parents[2] / "fixtures/sp_vit.json").read_text())
TINY: dict[str, Any] = {
    "img_size": 32,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 3.0,
    "num_classes": 5,
    "skip_lam": 2.0,
}


def make(**kwargs: Any) -> LvVit:
    torch.manual_seed(0)
    return timm.create_model("lvvit_s", **{**TINY, **kwargs})


def images(*size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tensors(**sizes: Any) -> LvVit:
    """A model whose parameters are nothing but shapes."""
    with torch.device("meta"):
        return timm.create_model(weight_init="skip", **sizes)


# ---------------------------------------------------------------------------- what was published


@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
def test_tokens_and_logits_are_those_of_the_formulas(size: tuple[int, int]) -> None:
    model = make(img_size=size).double().eval()
    state = by_hand.redraw(model)
    x = images(*size)
    grid = (size[0] // 16, size[1] // 16)
    tokens = np.stack([by_hand.encode(state, by_hand.stem(state, image), grid, 2, 2.0) for image in x.numpy()])
    np.testing.assert_allclose(model.forward_features(x).detach(), tokens, rtol=0, atol=1e-10)
    said = [by_hand.logits(state, each) for each in tokens]
    np.testing.assert_allclose(model(x).detach(), said, rtol=0, atol=1e-10)
    np.testing.assert_allclose(model.forward_head(torch.tensor(tokens)).detach(), said, rtol=0, atol=1e-10)


def test_parameters_have_the_published_names() -> None:
    model = make()
    stem = {f"patch_embed.conv{i}.weight" for i in (1, 2, 3)} | {
        f"patch_embed.bn{i}.{name}"
        for i in (1, 2, 3)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    blocks = {
        f"blocks.{i}.{name}"
        for i in (0, 1)
        for name in (
            *(f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias")),
            "attn.qkv.weight",
            *(f"{layer}.{part}" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2") for part in ("weight", "bias")),
        )
    }
    both = {f"{layer}.{p}" for layer in ("patch_embed.proj", "norm", "head", "aux_head") for p in ("weight", "bias")}
    assert set(model.state_dict()) == stem | blocks | both | {"cls_token", "pos_embed"}
    assert {type(block) for block in model.blocks} == {Block}  # timm's own: what runs those runs these


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("lvvit_t", (8_534_720, 8_565_440, 8_625_920, 8_675_840, 8_733_440)),
        ("lvvit_s", (26_151_824, 26_200_976, 26_297_744, 26_377_616, 26_469_776)),
        ("lvvit_m", (55_830_544, 55_896_080, 56_025_104, 56_131_600, 56_254_480)),
        ("lvvit_l", (150_021_968, 150_120_272, 150_313_808, 150_473_552, 150_657_872)),
    ],
)
def test_parameters_are_as_many_as_published(name: str, counts: tuple[int, ...]) -> None:
    for size, count in zip((224, 288, 384, 448, 512), counts, strict=True):
        model = tensors(model_name=name, img_size=size)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.pretrained_cfg["crop_pct"] == (0.9 if name[-1] in "ts" else 1.0)
    assert model.pretrained_cfg["interpolation"] == "bicubic"


def test_without_dense_logits_it_is_the_smaller_published_model() -> None:
    model = tensors(model_name="lvvit_s", return_dense=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_766_824


def test_parameters_are_drawn_as_published() -> None:
    model = timm.create_model("lvvit_t", depth=2, num_classes=100)
    for name, parameter in model.named_parameters():
        if name.startswith("aux_head") or (name.endswith("bias") and "patch_embed" not in name):
            assert not parameter.any(), name
        elif parameter.ndim > 1 and "patch_embed" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
    rates = [getattr(block.drop_path1, "drop_prob", 0) for block in make(depth=3, drop_path_rate=0.2).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


# ---------------------------------------------------------------------------- MixToken


def test_dense_logits_go_back_to_their_own_image() -> None:
    model = make(img_size=(32, 48)).double()
    state = by_hand.redraw(model)
    model.train()
    for i in (1, 2, 3):
        getattr(model.patch_embed, f"bn{i}").eval()
    x, grid, box = images(32, 48), (2, 3), (0, 1, 2, 3)
    said, dense, told = model(x, box=box)
    assert told == box
    patches = [by_hand.stem(state, image).reshape(2, 3, -1) for image in x.numpy()]
    tokens = []
    for own, other in (patches, patches[::-1]):
        mixed = own.copy()
        mixed[0:2, 1:3] = other[0:2, 1:3]
        tokens.append(by_hand.encode(state, mixed.reshape(6, -1), grid, 2, 2.0))
    for b in (0, 1):
        np.testing.assert_allclose(said[b].detach(), by_hand.linear(state, "head", tokens[b][0]), rtol=0, atol=1e-10)
        for n in range(6):
            where = 1 - b if n % 3 >= 1 else b  # the tokens of image b in the box went through the other sequence
            expected = by_hand.linear(state, "aux_head", tokens[where][1 + n])
            np.testing.assert_allclose(dense[b, n].detach(), expected, rtol=0, atol=1e-10)


def test_boxes_are_drawn_in_training_only_and_by_torch() -> None:
    model = make(img_size=224, depth=1).train()
    x = torch.zeros(2, 3, 224, 224)
    torch.manual_seed(3)
    boxes = [model(x)[2] for _ in range(4)]
    torch.manual_seed(3)
    np.random.seed(5)  # the authors draw from NumPy's global state, which workers share
    assert [model(x)[2] for _ in range(4)] == boxes
    assert len(set(boxes)) > 1
    assert make(mix_token=False).train()(torch.zeros(2, 3, 32, 32))[2] == NO_BOX
    with pytest.raises(ValueError, match="training"):
        model.eval()(x, box=(0, 0, 1, 1))


# ---------------------------------------------------------------------------- the heads


def test_the_auxiliary_head_counts_once_it_is_trained() -> None:
    model = make(mix_token=False).double().eval()
    x = images(32, 32, count=4)

    def of_class() -> Tensor:
        return model.head(model.forward_features(x)[:, 0])

    assert torch.equal(model(x), of_class())
    for weight, changes in ((0.0, False), (1.0, True)):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        said, dense, _ = model(x)
        loss = F.cross_entropy(said, torch.arange(4)) + weight * F.cross_entropy(
            dense.flatten(0, 1), torch.arange(16) % 5
        )
        loss.backward()
        optimizer.step()
        model.eval()
        assert torch.equal(model(x), of_class()) != changes
    tokens = model.forward_features(x)
    assert torch.allclose(model(x), model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).amax(1))
    loaded = make().double().eval()
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (4, 7)
    assert torch.equal(model(x), of_class())
    assert not model.aux_head.weight.any()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_without_classes_or_dense_logits() -> None:
    x = torch.randn(2, 3, 32, 32)
    features = make(num_classes=0)
    assert not [name for name in features.state_dict() if "head" in name]
    for model in (features.train(), features.eval()):
        assert torch.equal(model(x), model.forward_features(x)[:, 0])
    plain = make(return_dense=False)
    assert plain.train()(x).shape == (2, 5)
    assert "aux_head.weight" not in plain.state_dict()
    reset = make()
    reset.reset_classifier(0)
    assert reset.train()(x).shape == (2, 12)


# ---------------------------------------------------------------------------- files and sizes


def test_position_embedding_is_resized_as_published() -> None:
    case = PUBLISHED["pos_embed"]
    model = make(img_size=64, embed_dim=2, num_heads=1)
    state = {**model.state_dict(), "pos_embed": torch.tensor(case["old"])}
    for wrapped in (state, {"state_dict": state, "epoch": 3}, {"model": {f"module.{k}": v for k, v in state.items()}}):
        filtered = checkpoint_filter_fn(wrapped, model)
        assert torch.allclose(filtered["pos_embed"], torch.tensor(case["new"]), atol=1e-6)
        model.load_state_dict(filtered)


def test_a_model_that_changes_its_size_is_one_that_was_loaded_at_that_size(caplog: pytest.LogCaptureFixture) -> None:
    small, large = make(img_size=(32, 48)).eval(), make(img_size=(64, 32)).eval()
    by_hand.redraw(small)
    with caplog.at_level(logging.INFO), pytest.raises(Refusal, match="7 entries"):
        checkpoint_filter_fn(small.state_dict(), large)
    with caplog.at_level(logging.INFO):
        large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large, old_grid=(2, 3)))
    assert "from 2x3 to 4x2" in caplog.text
    x = torch.randn(2, 3, 64, 32)
    dynamic = make(img_size=(32, 48), dynamic_img_size=True).eval()
    dynamic.load_state_dict(small.state_dict())
    assert torch.allclose(dynamic(x), large(x), atol=1e-5)
    small.set_input_size((64, 32))
    assert torch.allclose(small(x), large(x), atol=1e-5)
    assert small.forward_intermediates(x, intermediates_only=True)[0].shape == (2, 12, 4, 2)


def test_published_files_are_read_by_timm(tmp_path: Path) -> None:
    author = make()
    by_hand.redraw(author)
    torch.save({"state_dict": author.state_dict()}, tmp_path / "author.pth.tar")
    overlay = {"file": str(tmp_path / "author.pth.tar"), "num_classes": 5}
    same = make(pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), author.state_dict().values(), strict=True))
    other = make(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, img_size=64)
    assert torch.equal(other.blocks[1].mlp.fc1.weight, author.blocks[1].mlp.fc1.weight)
    assert other.head.weight.shape == (3, 12)
    assert not other.aux_head.weight.any()
    assert make(pretrained=True, pretrained_cfg_overlay=overlay, return_dense=False).aux_head is None


def test_round_trip_through_safetensors(tmp_path: Path) -> None:
    model, x = make().eval(), torch.randn(1, 3, 32, 32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = timm.create_model("lvvit_s", **TINY).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(model(x), other(x))


# ---------------------------------------------------------------------------- as timm's models are


def test_checkpointing_changes_no_gradient() -> None:
    grads = []
    for enable in (False, True):
        model = make(mix_token=False).double().train()
        by_hand.redraw(model)
        model.set_grad_checkpointing(enable)
        said, dense, _ = model(images(32, 32))
        (said.square().sum() + dense.square().sum()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


def test_groups_of_the_optimizer() -> None:
    model = make()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert decayed == {n for n, p in model.named_parameters() if p.ndim > 1} - {"pos_embed", "cls_token"}
    scales = {
        names[id(parameter)]: group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert scales["cls_token"] == scales["patch_embed.conv1.weight"] < scales["blocks.0.attn.qkv.weight"]
    assert scales["blocks.0.attn.qkv.weight"] < scales["blocks.1.attn.qkv.weight"] < scales["aux_head.weight"] == 1


def test_intermediates_and_features_only() -> None:
    model, x = make(num_classes=5).eval(), torch.randn(1, 3, 32, 32)
    final, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(maps[-1].flatten(2).mT, final[:, 1:])
    wrapped = timm.create_model("lvvit_s", features_only=True, out_indices=(0, 1), **{**TINY, "num_classes": 0})
    assert [tuple(each.shape) for each in wrapped(x)] == [(1, 12, 2, 2)] * 2
    assert wrapped.feature_info.reduction() == [16, 16]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"img_size": 40}, "img_size=40: expected multiples of the stem's stride, 16 pixels, such as 32"),
        ({"img_size": (32, 10)}, "such as 32x16"),
        ({"patch_size": 8}, "patch_size=8"),
        ({"mix_token": True, "return_dense": False}, "mix_token=True needs return_dense=True"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"reg_tokens": 4}, "reg_tokens"),
        ({"class_token": False}, "class_token"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal) as refused:
        make(**options)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="built for"):
        make()(torch.zeros(1, 3, 48, 32))
    with pytest.raises(ValueError, match="multiples of 16"):
        make(dynamic_img_size=True)(torch.zeros(1, 3, 40, 32))
    model = make()
    with pytest.raises(Refusal, match="img_size=40"):
        model.set_input_size(40)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)  # as it was
