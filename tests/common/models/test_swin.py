"""Positional Label's Swin: what is changed, counted and computed by hand; what its convolution tells of position."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small import options_for
from torch import Tensor, nn

from common.batches.views import View
from common.checkpoints import published
from common.checkpoints.public import describe, export, load_backbone
from common.errors import Refusal
from common.models import Backbone, ModelConfig, create, swin
from common.models.create import set_attention
from common.models.swin import alter
from common.training.optim import layer_ids
from pretrain.leaks.verdict import audit
from pretrain.task import build

NAME = "swin_tiny_patch4_window7_224"
SMALL: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
PAPER: dict[str, Any] = {"swin_conv": True, "swin_bias": False}
ABSOLUTE: dict[str, Any] = {**PAPER, "swin_merge_last": False}  # as the authors have it for absolute labels
VARIANTS: dict[str, dict[str, Any]] = {
    "conv": {"swin_conv": True},
    "no bias": {"swin_bias": False},
    "kept grid": {"swin_merge_last": False},
    "paper": PAPER,
    "paper, absolute": ABSOLUTE,
}


def made(size: Any = 32, **kwargs: Any) -> Backbone:
    torch.manual_seed(0)
    return create(ModelConfig(NAME, SMALL | {"drop_path_rate": 0.0} | kwargs), size)


def images(*size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ counted by hand


def count(size: int = 224, **changes: bool) -> int:
    model = timm.create_model(NAME, num_classes=0, img_size=size, device="meta")
    alter(model, **changes)
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_by_arithmetic() -> None:
    depths, widths, heads = (2, 2, 6, 2), (96, 192, 384, 768), (3, 6, 12, 24)
    plain = 27_519_354  # Swin-T's 28,288,354 without its classifier of 769 * 1000
    convolutions = sum(depth * width * (9 + 1) for depth, width in zip(depths, widths, strict=True))
    tables = 13 * 13 * sum(depth * number for depth, number in zip(depths, heads, strict=True))
    merging, linear = 2 * 4 * 384 + 4 * 384 * 768, 2 * 384 + 384 * 768
    assert count() == plain
    assert count(conv=True) == plain + convolutions
    assert count(bias=False) == plain - tables
    assert count(conv=True, bias=False) == plain + convolutions - tables
    assert count(conv=True, bias=False, merge_last=False) == plain + convolutions - tables - merging + linear
    wider = (27 * 27 - 13 * 13) * 2 * 24  # windows of 14 have larger tables
    assert count(merge_last=False) == plain - merging + linear + wider


def test_nothing_is_left_of_the_bias_and_names_are_as_told() -> None:
    state = made(**ABSOLUTE).model.state_dict()
    assert not [name for name in state if "relative_position" in name]
    assert state["layers.1.blocks.0.conv.weight"].shape == (32, 1, 3, 3)
    assert state["layers.1.blocks.0.conv.bias"].shape == (32,)
    assert state["layers.1.downsample.norm.weight"].shape == (16,)
    assert state["layers.1.downsample.reduction.weight"].shape == (32, 16)
    assert "layers.1.downsample.reduction.bias" not in state


# ----------------------------------------------------------------------------------------------- computed by hand


def test_the_convolution_is_residual_depthwise_and_zero_padded() -> None:
    block = made(**PAPER).model.layers[0].blocks[1].double()
    x = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    padded = torch.zeros(2, 10, 10, 16, dtype=torch.float64)
    padded[:, 1:9, 1:9] = x
    weight, summed = block.conv.weight, x + block.conv.bias
    for row in range(3):
        for column in range(3):
            summed = summed + padded[:, row : row + 8, column : column + 8] * weight[:, 0, row, column]
    seen: list[Tensor] = []
    block.norm1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    out = block(x)
    torch.testing.assert_close(seen[0], summed)
    nn.init.zeros_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)
    torch.testing.assert_close(block(summed), out)  # what follows is timm's block


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])  # windows that fit, and windows that are padded
def test_without_bias_is_timms_own_with_a_bias_of_zero(attention: str, strict: bool, size: tuple[int, int]) -> None:
    usual, without = (made(size, swin_bias=bias, strict_img_size=strict).double().eval() for bias in (True, False))
    for name, parameter in usual.model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.data.zero_()
    state = usual.model.state_dict()
    without.model.load_state_dict({name: state[name] for name in without.model.state_dict()})
    given = images(*size).double()
    set_attention(usual, "explicit")
    set_attention(without, attention)
    assert any(any(block.shift_size) for stage in without.model.layers for block in stage.blocks)
    torch.testing.assert_close(without(given).tokens, usual(given).tokens, atol=1e-12, rtol=1e-12)


def test_explicit_attention_shows_its_probabilities() -> None:
    backbone = made(**PAPER).eval()
    set_attention(backbone, "explicit")
    seen: list[Tensor] = []
    backbone.model.layers[0].blocks[1].attn.attn_drop.register_forward_hook(lambda _, __, out: seen.append(out))
    backbone(images(32, 32))
    assert seen[0].shape == (2 * 4, 1, 16, 16)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(8, 1, 16))
    assert (seen[0] < 1e-30).any()  # the mask of shifted windows


# -------------------------------------------------------------------------------------------- the last stage's grid


def test_the_last_stage_keeps_its_grid_in_one_window() -> None:
    model: Any = timm.create_model(NAME, device="meta")
    alter(model, merge_last=False)
    last = model.layers[-1]
    assert [block.window_size for block in last.blocks] == [(14, 14)] * 2
    assert [block.shift_size for block in last.blocks] == [(0, 0)] * 2
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 16]
    assert [info["num_chs"] for info in model.feature_info] == [96, 192, 384, 768]
    large: Any = timm.create_model(NAME, img_size=448, device="meta")
    alter(large, merge_last=False)
    assert [block.window_size for block in large.layers[-1].blocks] == [(14, 14)] * 2  # of 28x28, as 7 of 14x14
    assert [block.shift_size for block in large.layers[-1].blocks] == [(0, 0), (7, 7)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_grid_width_and_intermediates(variant: str) -> None:
    changes = VARIANTS[variant]
    backbone = made((32, 48), **changes).eval()
    grid = (4, 6) if changes.get("swin_merge_last", True) else (8, 12)
    features = backbone(images(32, 48, count=1))
    assert features.grid == backbone.grid == grid and features.tokens.shape == (1, grid[0] * grid[1], 32)
    final, maps = backbone.model.forward_intermediates(images(32, 48, count=1), norm=True)
    assert [tuple(each.shape) for each in maps] == [(1, 16, 8, 12), (1, 32, *grid)]
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), features.tokens)
    torch.testing.assert_close(final.permute(0, 3, 1, 2), maps[-1])
    for info, each in zip(backbone.model.feature_info, maps, strict=True):
        assert each.shape[1:] == (info["num_chs"], 32 // info["reduction"], 48 // info["reduction"])


@pytest.mark.parametrize("variant", ["no bias", "kept grid", "paper, absolute"])
def test_another_input_size_is_the_model_built_for_it(variant: str) -> None:
    moved, fresh = made(32, **VARIANTS[variant]).eval(), made((64, 32), window_size=[8, 4], **VARIANTS[variant]).eval()
    moved.model.set_input_size((64, 32))
    fresh.model.load_state_dict(moved.model.state_dict())
    torch.testing.assert_close(moved.model(images(64, 32)), fresh.model(images(64, 32)))
    moved.model.set_input_size((64, 32))  # nothing to do
    moved.model.set_input_size(patch_size=(2, 2), window_size=4)
    kept = not VARIANTS[variant].get("swin_merge_last", True)
    assert [info["reduction"] for info in moved.model.feature_info] == ([2, 2] if kept else [2, 4])
    assert moved.model.forward_features(images(64, 32)).shape[1:3] == ((32, 16) if kept else (16, 8))


def test_any_size_where_timm_takes_any() -> None:
    backbone = made(32, strict_img_size=False, **ABSOLUTE).eval()
    assert backbone(images(40, 56)).grid == (10, 14)
    assert made(32, **ABSOLUTE).why_not((40, 56)) is not None


# ------------------------------------------------------------------------------------------------- a model like any


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_gradients_reach_everything_and_checkpointing_changes_none(variant: str, attention: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = made((32, 48), **VARIANTS[variant])
        set_attention(backbone, attention)
        backbone.model.set_grad_checkpointing(checkpointing)
        backbone(images(32, 48)).tokens.square().mean().backward()
        for parameter in backbone.parameters():  # else DistributedDataParallel hangs, or warns
            assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_layer_decay_knows_the_new_parts() -> None:
    layers = layer_ids(made(**ABSOLUTE))
    for stage, block in ((0, 0), (0, 1), (1, 0), (1, 1)):
        own = [layer for name, layer in layers.items() if name.startswith(f"model.layers.{stage}.blocks.{block}.")]
        assert set(own) == {1 + 2 * stage + block}
    assert layers["model.layers.1.blocks.1.conv.weight"] == 4
    usual = layer_ids(made())
    assert {name: layer for name, layer in layers.items() if name in usual} == {
        name: layer for name, layer in usual.items() if name in layers
    }


def test_a_checkpoint_is_built_from_its_own_description(tmp_path: Path) -> None:
    backbone = made(**ABSOLUTE).eval()
    export(tmp_path, backbone, describe(backbone, "none", "mean", {}))
    again, plan, about = load_backbone(tmp_path)
    assert about["kwargs"]["swin_merge_last"] is False and about["grid"] == [8, 8]
    assert torch.equal(again(images(32, 32), plan).tokens, backbone(images(32, 32)).tokens)


def test_altering_twice_changes_nothing_more() -> None:
    model: Any = made(**ABSOLUTE).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    windows = model._ref_window_sizes
    alter(model, conv=True, bias=False, merge_last=False)
    alter(model)
    assert model._ref_window_sizes == windows
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("vit_tiny_patch16_224", {"swin_conv": True}, "model.kwargs.swin_conv=true changes timm's SwinTransformer"),
        ("swinv2_tiny_window8_256", {"swin_bias": False}, "model.kwargs.swin_bias=false"),
        (NAME, SMALL | {"swin_conv": "yes"}, "model.kwargs.swin_conv='yes': expected true or false"),
        (NAME, {"depths": (2,), "num_heads": (3,), "swin_merge_last": False}, "swin_merge_last=false: a Swin of one"),
    ],
)
def test_what_cannot_be_altered_is_refused(name: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal) as refusal:
        create(ModelConfig(name, dict(kwargs)), 256 if "v2" in name else 224 if "vit" in name else 32)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------------ what it tells of position


@pytest.mark.parametrize("merge_last", [True, False])
@pytest.mark.parametrize("conv", [True, False])
def test_the_audit_names_the_convolution(conv: bool, merge_last: bool) -> None:
    backbone = made(swin_conv=conv, swin_bias=False, swin_merge_last=merge_last)
    task = build(backbone, options_for({"absolute": {}}, backbone), {"global": View(size=32)})
    (found,) = audit(task.backbone, task.positional).objectives.values()
    named = [each for each in found.breaks if "convolution 3x3 with zero padding (layers.0.blocks.0.conv" in each]
    assert bool(named) == conv and any("windows of 4x4" in each for each in found.breaks)
    assert found.verdict == ("leak" if conv else "asymmetric")
    told = max(noise.accuracy / noise.chance for noise in found.noise)
    assert told > 10 if conv else told < 1.5


def test_the_authors_own_file_loads_strictly(tmp_path: Path) -> None:
    """Their names: `cpe` for the convolution, `downsample` at the end of a stage, masks of windows, heads of labels."""
    torch.manual_seed(0)
    kwargs = {
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "window_size": 4,
        "img_size": 32,
        "num_classes": 5,
    }
    source = timm.create_model("swin_tiny_patch4_window7_224", **kwargs)
    for merges in (True, False):
        swin.alter(source, conv=True, bias=False, merge_last=merges)
        mine = source.state_dict()
        theirs = {
            name.replace(".conv.", ".cpe.").replace("1.downsample", "0.downsample").replace("head.fc", "head"): tensor
            for name, tensor in mine.items()
        }
        theirs |= {"layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16), "relative_head.weight": torch.zeros(3, 32)}
        torch.save({"model": theirs, "epoch": 3}, tmp_path / "authors.pth")
        loaded = timm.create_model("swin_tiny_patch4_window7_224", **kwargs | {"num_classes": 0})
        said = published.load(loaded, str(tmp_path / "authors.pth"), "FILE")
        assert swin.form(loaded) == {"swin_conv": True, "swin_bias": False, "swin_merge_last": merges}
        own = loaded.state_dict()
        assert own.keys() == {name for name in mine if not name.startswith("head.")}
        assert all(torch.equal(own[name], mine[name]) for name in own)
        assert said == [
            "read from its model", "left out: epoch", "left out: relative_head", "its classifier is left out",
            "left out: attn_mask",
        ]  # fmt: skip
        last = [name for name in theirs if "layers.1.blocks.1." in name]
        deeper = {name.replace("blocks.1.", "blocks.2."): theirs[name].clone() for name in last}
        torch.save(theirs | deeper, tmp_path / "deeper.pth")
        with pytest.raises(
            Refusal, match=r"FILE holds the weights of another model: \d+ unexpected \(such as layers\.1"
        ):
            published.load(loaded, str(tmp_path / "deeper.pth"), "FILE")
