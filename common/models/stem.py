"""A patch embedding of filters that lie inside a patch, for plain ViTs: windows of `side` x `side` pixels at all valid
positions, contrast-normalised, times filters, a two-sided soft threshold, the mean over the positions, a projection.
Filters begin as whitened patches of images (`common.features.whitened`), after Coates and Ng (The importance of
encoding versus training with sparse coding and vector quantization, ICML 2011), and are trained.

Nothing is padded and no window crosses a patch's border, so that a token knows its patch and not its place.
Letters: B images, C channels, H x W pixels, N = h*w patches, P positions of a window in a patch, F filters, D width.
"""

from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import Refusal
from .lv_vit import LvVit
from .sp_vit import SpVit

FILTERS, SIDE = 200, 6  # usual numbers: filters, and pixels of a window's side
THRESHOLD = 0.25  # of the soft threshold, at first
CONTRAST = 10.0  # added to a window's variance, in units of pixels from 0 to 255, squared


def contrast_of(std: Any) -> float:
    """CONTRAST for images that were divided by 255 and by `std`, of which the mean over the channels counts: their
    windows' variances are of all channels together."""
    return CONTRAST / (255 * sum(std) / len(std)) ** 2


class FilterStem(nn.Module):
    """Patch embedding by filters: normalised images (B, C, H, W) to (B, N, D), or (B, h, w, D) if `dynamic`, which then
    takes every size that patches divide."""

    def __init__(
        self, own: PatchEmbed, channels: int, width: int, count: int, side: int, contrast: float, dynamic: bool
    ) -> None:
        super().__init__()
        self.img_size, self.grid_size, self.num_patches = own.img_size, own.grid_size, own.num_patches
        self.patch_size: tuple[int, int] = tuple(own.patch_size)  # type: ignore[assignment]
        self.side, self.contrast, self.dynamic = side, contrast, dynamic
        filters = F.normalize(torch.randn(count, channels * side * side), dim=1)  # until images give better ones
        self.filters = nn.Parameter(filters.view(count, channels, side, side))
        self.offsets = nn.Parameter(torch.zeros(count))  # what the mean window answers
        self.thresholds = nn.Parameter(torch.full((2 * count,), THRESHOLD))  # of the filters, and of their negatives
        self.norm = nn.LayerNorm(2 * count)
        self.proj = nn.Linear(2 * count, width)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def feat_ratio(self, as_scalar: bool = True) -> Any:
        """Pixels of a patch's side, as timm asks for them."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Grid of images of `size`."""
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    def forward(self, images: Tensor) -> Tensor:
        """Embed patches."""
        h, w = self._grid_of(images)
        tokens = self.proj(self.norm(self.answers(self._patches(images, h, w))))
        return tokens.view(-1, h, w, tokens.shape[-1]) if self.dynamic else tokens.view(-1, h * w, tokens.shape[-1])

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        (H, W), (height, width) = images.shape[-2:], self.patch_size
        if self.dynamic:
            assert H % height == 0 and W % width == 0, f"{H}x{W} is not divisible by patches of {height}x{width}"
        else:
            assert tuple(self.img_size) == (H, W), f"{H}x{W} pixels, and the model is for {self.img_size}"
        return self.dynamic_feat_size((H, W))

    def _patches(self, images: Tensor, h: int, w: int) -> Tensor:
        """Cut images into patches, (B N, C, height, width)."""
        (B, C), (height, width) = images.shape[:2], self.patch_size
        cut = images.reshape(B, C, h, height, w, width).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(B * h * w, C, height, width)

    def answers(self, patches: Tensor) -> Tensor:
        """Answer patches (B N, C, height, width) with (B N, 2 F): how much of each filter, or its negative, they have.

        A window less its mean, times a filter, is the window times the filter less its mean: one product, of windows
        that were only scaled. A patch is centred for the sake of rounding alone.
        """
        patches = patches - patches.mean((1, 2, 3), keepdim=True)
        scales = self._scales(patches).permute(1, 2, 0).flatten(0, 1)  # (P, B N)
        windows = patches.unfold(2, self.side, 1).unfold(3, self.side, 1)  # (B N, C, rows, columns, side, side)
        windows = windows.permute(2, 3, 0, 1, 4, 5).flatten(3).flatten(0, 1) * scales[..., None]  # (P, B N, C side^2)
        filters = self.filters.flatten(1)
        filters = filters - filters.mean(1, keepdim=True)
        above, below = self.thresholds.chunk(2)
        excess = torch.addmm(-self.offsets - above, windows.flatten(0, 1), filters.T)  # beyond the threshold
        excess = excess.view(*scales.shape, -1)
        return torch.cat([F.relu(excess).mean(0), F.relu(-(above + below) - excess).mean(0)], 1)

    def _scales(self, patches: Tensor) -> Tensor:
        """What windows are multiplied by so that their variance is 1, or less where there is no contrast:
        (B N, rows, columns), from sums over boxes."""
        count = patches.shape[1] * self.side**2
        sums = torch.stack([patches.sum(1), patches.square().sum(1)], 1)
        sums, squares = (F.avg_pool2d(sums, self.side, 1) * self.side**2).unbind(1)
        variance = (squares - sums.square() / count) / (count - 1)
        return (variance.clamp_min(0) + self.contrast).rsqrt()


def add_stem(model: Any, std: Any, filters: int = FILTERS, side: int = SIDE) -> Any:
    """Give a plain ViT of timm a `FilterStem` as patch embedding, in place; returns the model.

    `filters`: how many. `side`: of a window, in pixels. `std`: by which its images are divided, see `contrast_of`.
    Raises Refusal for what cannot be built.
    """
    name, own = type(model).__name__, getattr(model, "patch_embed", None)
    plain = isinstance(model, VisionTransformer) and not isinstance(model, (LvVit, SpVit))
    if not plain or type(own) is not PatchEmbed:
        raise Refusal(
            f"model.stem goes into a plain ViT or DeiT of timm, in place of one linear patch embedding, and this is "
            f"{name} with {type(own).__name__}: choose another model.name or leave model.stem out"
        )
    for option, value, least in (("filters", filters, 1), ("side", side, 2)):
        if type(value) is not int or value < least:
            raise Refusal(f"model.stem.{option}={value!r}: expected a whole number from {least}")
    if side > min(own.patch_size):
        height, width = own.patch_size
        raise Refusal(
            f"model.stem.side={side}: its windows lie inside a patch, which has {height}x{width} pixels here; expected "
            f"2 to {min(own.patch_size)}, or a larger model.kwargs.patch_size"
        )
    if own.dynamic_img_pad:
        raise Refusal("model.stem with dynamic_img_pad: padding tells a patch that it lies at the edge; leave one out")
    channels, width, dynamic = own.proj.in_channels, own.proj.out_channels, model.dynamic_img_size
    stem = FilterStem(own, channels, width, filters, side, contrast_of(std), dynamic)
    for hook in own._forward_hooks.values():  # published iRPE looks at the grid through one
        stem.register_forward_hook(hook)
    model.patch_embed = stem.to(own.proj.weight)
    return model
