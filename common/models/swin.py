"""Positional Label's Swin (Zhang & Gong, arXiv 2206.04981), made of timm's: no relative position bias, a depthwise
convolution before every block and, in a version with absolute labels that they have deleted, a last stage that keeps
its grid.

Letters: B images, H x W patches of a stage, C its channels, M patches of a window, X windows of all images.

The convolution is residual, 3x3, zero-padded ("conditional position encoding", CPE, as in CPVT, arXiv 2102.10882, and
Twins). It is not free of position, as its place instead of the relative bias suggests: its zeros tell the border, and
each further block carries that word by one patch and, through windows, further; merging doubles the reach. A Swin that
trains on positional labels over it may answer without looking at the image. What `pretrain/audit.py` finds without any
relative bias: how often a head, trained on features of pure noise from an untrained Swin, finds a patch's place.

                              last grid   with the convolution        without
    Swin-T at 224             7x7         100 %: leak                 2.2 % (chance 2.0 %): asymmetric
    Swin-T, last grid kept    14x14       100 %: leak                 0.6 % (chance 0.5 %): asymmetric
    2 stages of 2 blocks, 32  4x4         100 %: leak                 7.3 % (chance 6.3 %): asymmetric
    the same, kept            8x8          69 %: leak                 1.6 % (chance 1.6 %): asymmetric

"asymmetric": windows that are merged or shifted treat places differently, but no head could use it. So the fair
baseline has the same convolution, and no label.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import Refusal

MERGED_FIRST = "layers.0.downsample.reduction.weight"  # only where patches are merged at the end of a stage


def alter(model: nn.Module, conv: bool = False, bias: bool = True, merge_last: bool = True) -> None:
    """Change a fresh SwinTransformer of timm in place, before it is trained; what is altered already stays as it is.

    conv        before each block, x + depthwise 3x3 convolution of x with zero padding and bias: 10 C parameters
    bias        False: no relative position bias, for good; no parameter of it is left
    merge_last  False: the last stage begins with LayerNorm(C), Linear(C -> 2C) without bias, and not with PatchMerging:
                its grid is that of the stage before (224 pixels: 14x14), and its windows are twice as wide, as many as
                there were

    Raises Refusal for another architecture or a value that is no bool. Other models pass where nothing is asked for.
    """
    asked = {"conv": (conv, False), "bias": (bias, True), "merge_last": (merge_last, True)}
    for name, (value, _) in asked.items():
        if not isinstance(value, bool):
            raise Refusal(f"model.kwargs.swin_{name}={value!r}: expected true or false")
    changed = [name for name, (value, usual) in asked.items() if value != usual]
    if not changed:
        return
    first = f"model.kwargs.swin_{changed[0]}={str(asked[changed[0]][0]).lower()}"
    if not isinstance(model, SwinTransformer):
        raise Refusal(
            f"{first} changes timm's SwinTransformer (swin_tiny_patch4_window7_224 and its like), and this model is of "
            f"class {type(model).__name__}: leave it out, or choose a Swin"
        )
    for stage in model.layers:
        for block in stage.blocks:  # type: ignore[union-attr]
            if conv and not isinstance(block, ConvolvedBlock):
                like = block.norm1.weight
                block.__class__ = ConvolvedBlock
                block.conv = Depthwise(
                    block.dim, block.dim, 3, padding=1, groups=block.dim, device=like.device, dtype=like.dtype
                )
            if not bias and not isinstance(block.attn, UnbiasedAttention):
                block.attn.__class__ = UnbiasedAttention
                del block.attn.relative_position_bias_table, block.attn.relative_position_index
    if not merge_last:
        _keep_last_grid(model, first)


class Depthwise(nn.Conv2d):
    """A depthwise 3x3 convolution whose weight gets gradients in its own strides, for DistributedDataParallel."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # From maps with channels last torch makes gradients in another order of equal memory, which these views undo.
        return super()._conv_forward(input, weight.flatten(1).unflatten(1, (1, 3, 3)), bias)


class ConvolvedBlock(SwinTransformerBlock):
    """A block that first adds a zero-padded depthwise 3x3 convolution of its input, over the whole map."""

    conv: Depthwise

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return super().forward(x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class UnbiasedAttention(WindowAttention):
    """Attention inside windows without a relative position bias; the masks of shifted windows stay."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(X, M, C) -> (X, M, C); `mask` (windows of an image, M, M): 0, or -100 where patches are no neighbours."""
        X, M, _ = x.shape
        q, k, v = self.qkv(x).reshape(X, M, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if mask is not None:  # windows of one image follow each other
            mask = mask.to(q.dtype).repeat(X // len(mask), 1, 1)[:, None]  # (X, 1, M, M): heads share it
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            out = self.attn_drop(self.softmax(scores if mask is None else scores + mask)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(X, M, -1)))

    def set_window_size(self, window_size: Any) -> None:
        """Change the window size; unlike timm's, there is no table to resize."""
        self.window_size = to_2tuple(window_size)
        self.window_area = self.window_size[0] * self.window_size[1]

    def reset_parameters(self) -> None:
        """Do nothing: timm's fills the table."""

    def _init_buffers(self) -> None:
        """Do nothing: timm's fills the table's index."""


# ------------------------------------------------------------------------------------------- a last stage that keeps


class Widening(nn.Module):
    """Layer in place of the last PatchMerging that keeps patches and doubles channels, as in the authors' Swin-T with
    absolute labels (its code is deleted); their released Swin-T, with relative labels, merges there too."""

    def __init__(self, norm: nn.Module, reduction: nn.Linear) -> None:
        super().__init__()
        self.norm, self.reduction = norm, reduction

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, 2C)."""
        return self.reduction(self.norm(x))


class KeptStage(SwinTransformerStage):
    """A stage that keeps the grid it is given."""

    def set_input_size(self, feat_size: Any, window_size: Any, always_partition: bool | None = None) -> None:
        """Change the input size; timm's method takes whatever is no Identity at a stage's beginning for a merging."""
        self.input_resolution = self.output_resolution = feat_size
        for block in self.blocks:
            block.set_input_size(feat_size, window_size, always_partition)  # type: ignore[operator]


class KeptSwin(SwinTransformer):
    """A Swin whose last stage keeps its grid."""

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Set the input size as timm does. A given window size holds for the last stage, too; else each one scales."""
        super().set_input_size(*args, **kwargs)
        self.feature_info[-1]["reduction"] = self.feature_info[-2]["reduction"]


def _keep_last_grid(model: SwinTransformer, asked: str) -> None:
    if isinstance(model, KeptSwin):
        return
    if len(model.layers) < 2:
        raise Refusal(f"{asked}: a Swin of one stage has no patch merging to do without; leave it out")
    stage: Any = model.layers[-1]
    old = stage.downsample.reduction.weight
    norm = type(stage.downsample.norm)(stage.dim, device=old.device, dtype=old.dtype)
    reduction = nn.Linear(stage.dim, len(old), bias=False, device=old.device, dtype=old.dtype)
    trunc_normal_(reduction.weight, std=0.02)  # as timm starts every Linear of a Swin
    stage.downsample = Widening(norm, reduction)
    stage.__class__, model.__class__ = KeptStage, KeptSwin
    windows: Any = model._ref_window_sizes  # of each stage, for set_input_size to scale
    windows = *windows[:-1], tuple(2 * side for side in windows[-1])
    model._ref_window_sizes = windows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, at how timm interpolates tables that are drawn anew below
        stage.set_input_size(stage.input_resolution, windows[-1])
    for block in stage.blocks:
        block.attn.reset_parameters()  # a table of its own, where there is one, and not an interpolated one
    model.feature_info[-1]["reduction"] = model.feature_info[-2]["reduction"]


# --------------------------------------------------------------------------------------------------- published files

PARTS = ("patch_embed", "layers", "norm", "head")  # of a Swin; what else a file has belongs to its positional labels


def published_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the tensors of a published Swin as timm names them now: (tensors, names of what was left out).

    Swin's authors merge patches at the end of a stage, timm at the beginning of the next: `downsample` is one stage
    further. Positional Label's Swin has the convolution under `cpe`, here `conv`, and the heads of its labels beside.
    """
    ends, labels = MERGED_FIRST in state, any(".cpe." in name for name in state)
    named, left_out = {}, set()
    for name, tensor in state.items():
        if labels and name.partition(".")[0] not in PARTS:
            left_out.add(name.partition(".")[0])
            continue
        if ends:
            name = re.sub(r"^layers\.(\d+)\.downsample", lambda at: f"layers.{int(at[1]) + 1}.downsample", name)
            name = re.sub(r"^head\.(?!fc\.)", "head.fc.", name)
        named[name.replace(".cpe.", ".conv.")] = tensor
    named.setdefault("head.fc.weight", torch.empty(0))  # else timm before 1.0.31 takes it for the authors' old layout
    return named, sorted(left_out)


def published_form(state: Mapping[str, Tensor]) -> dict[str, bool]:
    """The arguments of `alter` that make a Swin of timm one into which a published file's tensors `state` fit."""
    if not any(".cpe." in name for name in state):
        return {}
    named, _ = published_names(state)
    reductions = [tensor.shape for name, tensor in named.items() if name.endswith("downsample.reduction.weight")]
    merges = not reductions or max(reductions)[1] > max(reductions)[0]  # the last has the most channels
    return {
        "conv": True,
        "bias": any(name.endswith("relative_position_bias_table") for name in state),
        "merge_last": merges,
    }


def form(model: nn.Module) -> dict[str, bool]:
    """Keywords of model.kwargs by which `model` was altered; empty if it was not."""
    if not isinstance(model, SwinTransformer):
        return {}
    block: Any = model.layers[0].blocks[0]  # type: ignore[index, union-attr]
    changed = {
        "swin_conv": isinstance(block, ConvolvedBlock),
        "swin_bias": not isinstance(block.attn, UnbiasedAttention),
    }
    changed["swin_merge_last"] = not isinstance(model, KeptSwin)
    return changed if changed != {"swin_conv": False, "swin_bias": True, "swin_merge_last": True} else {}
