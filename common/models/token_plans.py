"""Token plans over timm's VisionTransformer and its DeiT subclass: our own short loop over their blocks.

timm's own forward cannot run a part of the grid: gathered tokens do not survive its reshapes. Letters: B images,
N = h*w patches, K of them kept, P prefix tokens, T = P + K tokens, S keys, D width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..batches.mixing import Mixture, swap_box
from .attention import project
from .embeddings import resize_embedding
from .irpe import RelativeAttention, Where
from .lv_vit import LvVit
from .plan import TokenPlan

PREFIX = ("cls_token", "dist_token", "reg_token")  # in timm's order


Masked = tuple[Tensor, Tensor]  # which patches are masked, (B, N) bool, and the mask token that stands for them, (D,)


def run(
    model: Any,
    images: Tensor,
    wanted: Sequence[int],
    plan: TokenPlan,
    hidden: Tensor | None = None,
    masked: Masked | None = None,
    norm: bool = True,
    mixture: Mixture | None = None,
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Run images: (tokens (B, T, D), grid) of each of the `wanted` blocks, counted from 0 and shallowest first; the
    final norm is applied to each if `norm`. Prefix tokens are always kept and always keys; blocks above the deepest are
    not run.

    `hidden` (D,): what stands for a hidden position embedding, with position "partial" (DropPos, arXiv 2309.03576).
    `masked`: patches that are not shown (iBOT, arXiv 2111.07832); their position embeddings are. `mixture`: by which
    embedded patches are exchanged between images, of whole grids only (MixToken, arXiv 2104.10858).
    """
    tokens, grid = embed(model, images, plan, hidden, masked, mixture)
    tokens = model.norm_pre(model.pos_drop(tokens))
    keys = None
    if plan.context is not None:
        P = model.num_prefix_tokens
        prefix = torch.arange(P, device=tokens.device).expand(tokens.shape[0], P)
        keys = torch.cat([prefix, plan.context + P], 1)  # (B, S), the same in every layer (MP3, arXiv 2207.07611)
    where = Where(grid, plan.kept, keys, off=plan.position == "none")
    for i, block in enumerate(model.blocks):
        if model.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(_block, block, tokens, where, use_reentrant=False)
        else:
            tokens = _block(block, tokens, where)
        if i in wanted:
            yield model.norm(tokens) if norm else tokens, grid
        if i == wanted[-1]:
            return


def embed(
    model: Any,
    images: Tensor,
    plan: TokenPlan,
    hidden: Tensor | None,
    masked: Masked | None = None,
    mixture: Mixture | None = None,
) -> tuple[Tensor, tuple[int, int]]:
    """Embed images: (prefix and kept patches with their position embeddings (B, T, D), grid)."""
    tokens = model.patch_embed(images)  # (B, N, D), or (B, h, w, D) with dynamic_img_size
    grid = tuple(tokens.shape[1:3]) if tokens.ndim == 4 else tuple(model.patch_embed.grid_size)
    tokens = tokens.flatten(1, -2)
    if mixture is not None:  # before its place is added to a patch: that stays
        tokens = swap_box(tokens, grid, mixture.tokens(grid))
    if masked is not None:
        where_BN, token = masked
        tokens = torch.where(where_BN[..., None], token.to(tokens.dtype), tokens)
    # .shape[0], here and elsewhere: torch.export makes a constant of len()
    tokens_before = (getattr(model, name, None) for name in PREFIX)
    prefix = [token.expand(tokens.shape[0], -1, -1) for token in tokens_before if token is not None]
    if plan.kept is not None:
        tokens = gather(
            tokens, plan.kept
        )  # here, not after the blocks: a quarter of the patches, a quarter of the work
    if plan.position != "none" and model.pos_embed is not None:
        of_prefix, of_patches = _embeddings(model, grid)
        if plan.kept is not None:
            of_patches = gather(of_patches.expand(tokens.shape[0], -1, -1), plan.kept)
        if plan.visible is not None:
            assert hidden is not None
            of_patches = torch.where(plan.visible[..., None], of_patches, hidden.to(of_patches.dtype))
        tokens = tokens + of_patches
        if of_prefix.shape[1]:
            prefix = [torch.cat(prefix, 1) + of_prefix]
    return torch.cat([*prefix, tokens], 1), grid


def _embeddings(model: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The position embedding as (prefix tokens' (1, P or 0, D), patches' (1, N, D)), resampled to `grid`."""
    first = 0 if model.no_embed_class else model.num_prefix_tokens
    embeddings = model.pos_embed
    if isinstance(model, LvVit):  # which resizes as its authors do
        embeddings = model.position_embedding(grid)
    elif model.dynamic_img_size:
        embeddings = resize_embedding(embeddings, model.patch_embed.grid_size, grid)
    return embeddings[:, :first], embeddings[:, first:]


def gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """Gather tokens (B, N, D) at indices (B, K): (B, K, D)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def _block(block: nn.Module, tokens: Tensor, where: Where) -> Tensor:
    part: Any = block
    relative = isinstance(getattr(block, "attn", None), RelativeAttention)
    if where.keys is None and not relative:
        return block(tokens)
    # timm's Block: `without_context` and `add_irpe` have seen to that
    inner = part.norm1(tokens)
    inner = part.attn(inner, where=where) if relative else _attend(part.attn, inner, where.keys)  # type: ignore[arg-type]
    tokens = tokens + part.drop_path1(part.ls1(inner))
    return tokens + part.drop_path2(part.ls2(part.mlp(part.norm2(tokens))))


def _attend(attention: Any, tokens: Tensor, keys: Tensor) -> Tensor:
    """timm's Attention where only tokens[keys] are keys and values; every token asks.

    Gathered rather than masked: a masked score is still computed, and flash attention takes no mask.
    """
    q, k, v = project(attention, tokens, keys)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if attention.fused_attn:
        dropout = attention.attn_drop.p if attention.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        out = attention.attn_drop((q * attention.scale @ k.transpose(-2, -1)).softmax(-1)) @ v
    out = attention.norm(out.transpose(1, 2).flatten(2))
    return attention.proj_drop(attention.proj(out))


def without_context(model: Any) -> str | None:
    """Reason why this model cannot run with `context`; None if it can."""
    for block in model.blocks:
        attention = getattr(block, "attn", None)
        if (
            type(block) is not Block
            or type(attention) not in (Attention, RelativeAttention)
            or getattr(attention, "gate", None) is not None
        ):
            return f"its blocks are {type(block).__name__} with {type(attention).__name__}, not timm's plain ones"
    return None


def sincos(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed sine-cosine position embeddings, (N, D): a quarter of the channels each for sine and cosine of the column,
    then of the row, at wavelengths from 2 pi to 10,000 * 2 pi patches (MoCo v3, arXiv 2104.02057; MAE)."""
    h, w = grid
    rates = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.cartesian_prod(torch.arange(h), torch.arange(w)).double().unbind(-1)
    angles = [columns[:, None] * rates, rows[:, None] * rates]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()
