"""Position embeddings on another grid than the one they were learned on.

Letters: N = h*w patches, P prefix tokens, D width.
"""

import types
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor
from torch.nn import functional as F


def resize_embedding(embedding: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A position embedding (1, P+N, D) of grid `old` for grid `new`, the P entries before the grid kept.

    Bicubic without antialiasing, as the authors of DINO, DINOv2, iBOT, MAE, DeiT, iRPE, LV-ViT and SP-ViT do; timm
    antialiases, which leaves a random embedding less than half of its spread on DINO's local crops. DINO and its
    successors also add 0.1 to the number of patches (`scale_factor=(6 + 0.1) / 14`, against rounding), by which entries
    come to lie up to 0.2 of a learned patch nearer to the first: not done here.
    """
    if tuple(old) == tuple(new):
        return embedding
    prefix, patches = embedding.split([embedding.shape[1] - old[0] * old[1], old[0] * old[1]], 1)
    maps = patches.unflatten(1, tuple(old)).permute(0, 3, 1, 2)
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # bicubic in half precision would round
    maps = F.interpolate(maps, size=tuple(new), mode="bicubic", align_corners=False)
    return torch.cat([prefix, maps.permute(0, 2, 3, 1).flatten(1, 2).to(embedding.dtype)], 1)


def resize_without_antialiasing(model: Any) -> None:
    """Let an EVA with `dynamic_img_size` resize its position embedding as `resize_embedding` does. Other models that
    have one are run by our own code, or take one size only."""
    if isinstance(model, Eva) and model.dynamic_img_size and model.pos_embed is not None:
        # bound: a copy of the model gets a method of its own
        model._pos_embed = types.MethodType(_embed_eva, model)  # type: ignore[method-assign]


def _embed_eva(model: Any, maps: Tensor) -> tuple[Tensor, Tensor | None]:
    """Embed, as timm's hook: patches (B, h, w, D) to tokens (B, P+N, D) with position embedding, and the rotary
    embedding."""
    grid = (maps.shape[1], maps.shape[2])
    tokens, embedding = maps.flatten(1, 2), resize_embedding(model.pos_embed, model.patch_embed.grid_size, grid)
    tokens_before = (getattr(model, name, None) for name in ("cls_token", "reg_token"))
    prefix = [token.expand(tokens.shape[0], -1, -1) for token in tokens_before if token is not None]
    if model.no_embed_class:
        tokens = torch.cat([*prefix, tokens + embedding], 1)
    else:
        tokens = torch.cat([*prefix, tokens], 1) + embedding
    rotary = model.rope.get_embed(shape=grid) if model.rope is not None else None
    return model.pos_drop(tokens), rotary
