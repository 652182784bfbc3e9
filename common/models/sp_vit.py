"""SP-ViT: LV-ViT whose first blocks multiply every attention score by a learned function of the offset between its two
patches (arXiv 2206.07662), and whose every block ends in a depthwise convolution.

    scores[h, i, j] = P_h(j - i) * (q[h, i] . k[h, j]) / sqrt(d)       P_h: 2 -> d -> 1, a network of its own per head

P depends on the offset alone: it is evaluated on the (2h-1)(2w-1) offsets and read at (H, N, N), where the published
code evaluates it on N*N*D. The class token joins before block `local_blocks`. Parameters have the published names.
Letters: B images, N = h*w patches, P prefix tokens (0, then 1), D width, H heads, d = D/H.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import use_fused_attn
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..batches.mixing import NO_BOX, Box, Mixture, swap_box
from ..errors import Refusal
from .attention import Encoding, relative_attention
from .lv_vit import STRIDE, L, LvVit, M, Stem, checkpoint_filter_fn, described_as
from .names import register

Grid = tuple[int, int]

# ---------------------------------------------------------------------------- where the patches are


def tabulate(grid: Grid, reference: Grid | None = None, device: Any = None) -> tuple[Tensor, Tensor]:
    """Tabulate (offsets, index) of grid (h, w), whose patches are row-major.

    offsets ((2h-1)(2w-1), 2) float: (dx, dy), columns and rows from query to key in patches, row by row from the most
    negative. index (N*N,) int32: which of them is between query i and key j, at i*N + j. `reference` (h, w): scale the
    offsets so that the largest are those of that grid; the published code does not.
    """
    h, w = grid
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    dy, dx = (rows - rows[:, None] + h - 1, columns - columns[:, None] + w - 1)  # (h, h), (w, w) [query, key], from 0
    index = dy[:, None, :, None] * (2 * w - 1) + dx[None, :, None, :]
    steps = [torch.arange(1 - side, side, device=device, dtype=torch.get_default_dtype()) for side in grid]
    if reference is not None:
        steps = [step * ((to - 1) / max(side - 1, 1)) for step, to, side in zip(steps, reference, grid, strict=True)]
    offsets = torch.cartesian_prod(*steps).flip(1)
    return offsets, index.flatten().int()


class Offsets(nn.Module):
    """Buffers with `tabulate` of a grid: one for all layers of a model, and in no checkpoint."""

    offsets: Tensor
    index: Tensor

    def __init__(self, grid: Grid, reference: Grid | None = None, device: Any = None) -> None:
        super().__init__()
        self.reference = reference
        self.set_grid(grid, device)

    def reset_parameters(self) -> None:
        """Compute both again, where memory was newly allocated: a model that was made on the meta device."""
        self.set_grid(self.grid, self.offsets.device)

    def set_grid(self, grid: Grid, device: Any = None) -> None:
        """Change the grid in place, for every layer."""
        self.grid: Grid = (int(grid[0]), int(grid[1]))
        offsets, index = tabulate(self.grid, self.reference, device)
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("index", index, persistent=False)

    def at(self, grid: Grid) -> "Offsets":
        """Offsets of `grid`: these, or new ones if it is another grid (dynamic_img_size)."""
        return self if tuple(grid) == self.grid else Offsets(grid, self.reference, self.offsets.device).to(self.offsets)


# ---------------------------------------------------------------------------- the parts


class SpAttention(nn.Module):
    """Self-attention of the patches with the spatial prior (SP-SA, arXiv 2206.07662); it begins as plain attention:
    w2 = 0 and b2 = 1, so P = 1, and w1 has no gradient until w2 has moved.

    `fused_attn=False`: step by step, the probabilities (B, H, N, N) through `attn_drop`, which may be hooked.
    """

    def __init__(
        self, dim: int, num_heads: int, bias: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0, **dd: Any
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = use_fused_attn()
        self.qk = nn.Linear(dim, 2 * dim, bias=bias, **dd)
        self.v = nn.Linear(dim, dim, bias=bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.w1 = nn.Linear(2, dim, **dd)
        self.w2 = nn.Parameter(torch.empty(dim, 1, **dd))
        self.b2 = nn.Parameter(torch.empty(num_heads, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the prior 1."""
        nn.init.zeros_(self.w2)
        nn.init.ones_(self.b2)

    def prior(self, where: Offsets) -> Tensor:
        """P_h(j - i), (H, N, N): any sign, not normalised. Not in autocast's type, of which it would have 3 digits."""
        N = where.grid[0] * where.grid[1]
        with torch.autocast(where.offsets.device.type, enabled=False):
            hidden = F.relu(self.w1(where.offsets)).unflatten(1, (self.num_heads, -1))
            table = torch.einsum("mhd,hd->hm", hidden, self.w2.view(self.num_heads, -1)) + self.b2[:, None]
            return table.index_select(1, where.index).view(-1, N, N)

    def forward(self, x: Tensor, where: Offsets | None) -> Tensor:
        """Patches (B, N, D) on the grid of `where`; None: no prior, nothing that tells a patch its place."""
        B, N, D = x.shape
        q, k = self.qk(x).view(B, N, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        v = self.v(x).view(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        prior, scale = None if where is None else self.prior(where), self.scale
        if prior is not None and q.dtype != torch.float16:  # no scaled copy of q to keep; float16 needs it
            prior, scale = prior * scale, 1.0
        drops = self.training and self.attn_drop.p > 0
        dropout = self.attn_drop if drops or not self.fused_attn else None
        out = relative_attention(q, k, v, scale, Encoding(prior), dropout, self.fused_attn)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(B, N, D)))


class Convolution(nn.Module):
    """Depthwise 3x3 with zeros around the grid, added to the patches: they learn how near the border is."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd))

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        """Convolve (B, N, D) on `grid`: the same shape."""
        maps = patches.mT.unflatten(2, grid)  # a channels-last view; in (B, D, h, w) order it takes 3 times as long
        return patches + self.proj(maps).flatten(2).mT


class SpBlock(Block):
    """Block of timm, with the prior in its attention if `prior`, followed by the convolution of its patches."""

    def __init__(self, where: Offsets, prior: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        dim = kwargs["dim"]
        dd: dict[str, Any] = {name: kwargs.get(name) for name in ("device", "dtype")}
        if prior:
            self.attn = SpAttention(
                dim, kwargs["num_heads"], kwargs["qkv_bias"], kwargs["attn_drop"], kwargs["proj_drop"], **dd
            )
        self.pos_block = Convolution(dim, **dd)
        self.where = where

    def forward(self, x: Tensor, where: Offsets | None = None, position: bool = True) -> Tensor:  # type: ignore[override]
        """Tokens (B, P+N, D), class token first if P is 1. `where`: None is the grid the model was built for.
        position=False: without prior and convolution. Raises ValueError if the tokens do not fit the grid."""
        where = self.where if where is None else where
        h, w = where.grid
        P = x.shape[1] - h * w
        sp = isinstance(self.attn, SpAttention)
        if P not in ((0,) if sp else (0, 1)):
            raise ValueError(f"{x.shape[1]} tokens: expected {h}x{w} patches{'' if sp else ', or one more'}")
        y = self.norm1(x)
        y = self.attn(y, where if position else None) if sp else self.attn(y)
        x = x + self.drop_path1(self.ls1(y))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if not position:
            return x
        if P == 0:
            return self.pos_block(x, (h, w))
        return torch.cat([x[:, :P], self.pos_block(x[:, P:], (h, w))], 1)


# ---------------------------------------------------------------------------- the model


class SpVit(LvVit):
    """SP-ViT: an LvVit with `local_blocks` blocks of SP-SA before its class token joins.

    local_blocks: None is depth - 2, the paper's 14 (S) and 22 (L), and 18 for M, for which the authors' script says 10
    by giving no number. 0: no prior, and the class token and its position embedding are there from the beginning.
    legacy=True: plain attention in all blocks, the class token still joins at `local_blocks`: spvit_l as published.
    rescale_offsets: a grid such as 14 or (14, 14) whose offsets a model at another size shall see; the authors' see
    the offsets grow. Raises Refusal as LvVit does, and for local_blocks outside of 0 ... depth-1.
    """

    def __init__(
        self,
        img_size: int | Grid = 224,
        depth: int = 16,
        local_blocks: int | None = None,
        legacy: bool = False,
        rescale_offsets: int | Grid | None = None,
        **kwargs: Any,
    ) -> None:
        Stem.check(img_size, kwargs.get("patch_size"))
        local = max(depth - 2, 0) if local_blocks is None else local_blocks
        if not isinstance(local, int) or not 0 <= local < depth:
            raise Refusal(
                f"local_blocks={local!r} of depth {depth}: expected 0 to {depth - 1}, since the class token joins "
                "before that block"
            )
        for name in ("qk_norm", "scale_attn_norm", "block_fn", "attn_layer", "no_embed_class"):
            if kwargs.get(name):
                raise Refusal(
                    f"{name}={kwargs[name]}: not for SP-ViT, whose attention and class token are its own; leave it out"
                )
        h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
        reference = (rescale_offsets, rescale_offsets) if isinstance(rescale_offsets, int) else rescale_offsets
        if reference is not None and (len(reference) != 2 or min(reference) < 1):
            raise Refusal(f"rescale_offsets={rescale_offsets}: expected a grid, such as 14 or (14, 14)")
        where = Offsets((h // STRIDE, w // STRIDE), reference, kwargs.get("device"))
        numbers = itertools.count()

        def block(**options: Any) -> SpBlock:
            return SpBlock(where, next(numbers) < local and not legacy, **options)

        super().__init__(img_size, depth=depth, block_fn=block, no_embed_class=local > 0, **kwargs)
        self.where = where
        self.local_blocks = local

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the image size; the prior needs no resizing, its network is asked at other offsets."""
        super().set_input_size(img_size, patch_size)
        self.where.set_grid(self.patch_embed.grid_size, self.where.index.device)
        self.where.to(self.patch_embed.proj.weight.dtype)

    def _layers(self, images: Tensor, position: bool = True, box: Box = NO_BOX) -> Iterator[tuple[Tensor, int, Grid]]:
        """Yield (tokens (B, P+N, D) without the final norm, P, grid) after each block."""
        grid = self.grid_of(images)
        where = self.where.at(grid)
        tokens = swap_box(self.patch_embed(images), grid, box).flatten(1, -2)
        prefix: Any = self.cls_token
        for i, block in enumerate(self.blocks):
            if i == self.local_blocks:
                tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], 1)
            if i == 0:
                if position and self.pos_embed is not None:
                    tokens = tokens + self.position_embedding(grid)
                tokens = self.norm_pre(self.pos_drop(tokens))
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, where, position, use_reentrant=False)
            else:
                tokens = block(tokens, where, position)
            yield tokens, int(i >= self.local_blocks), grid

    def run(
        self,
        images: Tensor,
        wanted: Sequence[int],
        position: bool = True,
        norm: bool = True,
        mixture: Mixture | None = None,
    ) -> Iterator[tuple[Tensor, int, Grid]]:
        """Run images: (tokens (B, P+N, D), P, grid) of each of the `wanted` blocks, counted from 0 and shallowest
        first, the final norm applied if `norm`; P is 0 before the class token joins, and blocks above the deepest are
        not run. position=False: no position embedding, no prior and no convolution; what is left is what the zeros
        around the image tell in the stem. `mixture`: by which patches are exchanged after the stem."""
        box = NO_BOX if mixture is None else mixture.tokens(self.grid_of(images))
        for i, (tokens, P, grid) in enumerate(self._layers(images, position, box)):
            if i in wanted:
                yield self.norm(tokens) if norm else tokens, P, grid
            if i == wanted[-1]:
                return

    def forward_features(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False, box: Box = NO_BOX) -> Tensor:
        """Compute features like LvVit. Raises ValueError for a mask: it fits no block before the class token joins."""
        _refuse_masks(attn_mask, is_causal)
        tokens = x
        for tokens, _, _ in self._layers(x, box=box):  # noqa: B007
            pass
        return self.norm(tokens)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Any = None,
        is_causal: bool = False,
    ) -> Any:
        """Return intermediates as VisionTransformer does; blocks before the class token joins have no prefix tokens."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: expected NCHW or NLC")
        _refuse_masks(attn_mask, is_causal)
        take, deepest = feature_take_indices(
            len(self.blocks), indices if indices is None or isinstance(indices, int) else list(indices)
        )
        maps, prefixes, tokens = [], [], x
        for i, (tokens, P, grid) in enumerate(self._layers(x)):
            if i in take:
                prefix, patches = (self.norm(tokens) if norm else tokens).split([P, grid[0] * grid[1]], 1)
                prefixes.append(prefix)
                maps.append(patches if output_fmt == "NLC" else patches.mT.unflatten(2, grid).contiguous())
            if stop_early and i == deepest:
                break
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens:
                named["image_intermediates_prefix"] = prefixes
            return named if intermediates_only else {**named, "image_features": self.norm(tokens)}
        outputs = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return outputs if intermediates_only else (self.norm(tokens), outputs)


def _refuse_masks(attn_mask: Any, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("SP-ViT takes no attention mask: its first blocks have no class token, its last ones have")


# ---------------------------------------------------------------------------- files


def alter(model: SpVit, state: Mapping[str, Tensor]) -> None:
    """Give the blocks of a fresh model, in place, the prior where a published file's tensors `state` have it: the first
    ones, and the class token joins after them. Where none has, it joins where it did: spvit_l as published.

    What is no such file stays for its loading to refuse.
    """
    prior = [f"blocks.{i}.attn.w1.weight" in state for i in range(len(model.blocks))]
    count = sum(prior)
    if prior != sorted(prior, reverse=True) or count == len(prior) or model.local_blocks == 0:
        return
    model.local_blocks = count or model.local_blocks
    for block, wanted in zip(model.blocks, prior, strict=True):
        old: Any = block.attn
        if wanted != isinstance(old, SpAttention):
            biased = (old.qk if isinstance(old, SpAttention) else old.qkv).bias is not None
            make = partial(SpAttention, bias=biased) if wanted else partial(Attention, qkv_bias=biased)
            new = make(model.embed_dim, old.num_heads, attn_drop=old.attn_drop.p, proj_drop=old.proj_drop.p)
            block.attn = new.to(old.proj.weight.device, old.proj.weight.dtype)


def form(model: nn.Module) -> dict[str, Any]:
    """Keywords of model.kwargs that say which blocks of an SpVit have the prior; empty where the usual ones have."""
    if not isinstance(model, SpVit):
        return {}
    count = sum(isinstance(block.attn, SpAttention) for block in model.blocks)
    if count == 0 < model.local_blocks:
        return {"local_blocks": model.local_blocks, "legacy": True}
    return {} if count == len(model.blocks) - 2 else {"local_blocks": count}


# ---------------------------------------------------------------------------- the names

default_cfgs = generate_default_cfgs(
    {"spvit_s": described_as(0.9), "spvit_m": described_as(1.0), "spvit_l": described_as(1.0)}
)
for _name, _usual, _doc in (
    ("spvit_s", {}, "SP-ViT-S, 26.2 M parameters."),
    ("spvit_m", M, "SP-ViT-M, 56.0 M parameters; local_blocks=10 is what the authors' script trains."),
    ("spvit_l", L, "SP-ViT-L, 150 M parameters; legacy=True is what the authors' code builds, without any prior."),
):
    register(__name__, _name, _doc, SpVit, _usual, checkpoint_filter_fn)
