"""Transformer attribution (Chefer et al., arXiv 2012.09838): relevance walked back through the blocks of a plain ViT.

A layer hands on to its inputs, in proportion to what each contributed, the relevance that its output was given
(layer-wise relevance propagation). What arrives at the attention of a block is multiplied by the score's gradient
there. Norms, softmax, GELU, dropout, LayerScale and LV-ViT's 1/skip_lam hand on what they are given. Letters: B images,
H heads, d width of a head, T tokens, D width.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.layers import Mlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

EPSILON = 1e-9  # keeps a denominator away from 0


def divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide by a denominator whose magnitude grows by 1e-9 first; 0 where it is 0: nothing contributed there."""
    return numerator / (denominator + EPSILON * denominator.sign()).where(denominator != 0, torch.inf)


def linear(relevance: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Relevance of x (..., I) from that (..., O) of its product with `weight` (O, I); the bias has no part in it.

    Only positive contributions x_i w_oi count (alpha 1, beta 0), all of an output by one normaliser (section 3.1 of the
    paper).
    """
    above, below = x.clamp(min=0), x.clamp(max=0)
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    share = divided(relevance, above @ positive.T + below @ negative.T)
    return above * (share @ positive) + below * (share @ negative)


def product(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Relevances of a (..., I, J) and b (..., J, K) from that of a @ b: a half each, in proportion to the terms."""
    share = divided(relevance, a @ b)
    return a * (share @ b.mT) / 2, b * (a.mT @ share) / 2


def added(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Relevances of a and b (B, T, D) from that of a + b: in proportion, then rescaled.

    The sums of the two over an image's T and D become |sum of a's| to |sum of b's| parts of all relevance: otherwise
    terms that cancel would grow without bound (section 3.2 of the paper).
    """
    share = divided(relevance, a + b)
    parts = a * share, b * share
    sums = [part.sum((1, 2), keepdim=True) for part in parts]
    total = relevance.sum((1, 2), keepdim=True)
    sizes = sums[0].abs() + sums[1].abs()
    first, second = (
        part * divided(divided(sum_of_part.abs() * total, sizes), sum_of_part)
        for part, sum_of_part in zip(parts, sums, strict=True)
    )
    return first, second


def cloned(relevances: Sequence[Tensor], x: Tensor) -> Tensor:
    """Relevance of x from those of its copies: x * sum of (R / x); 0 where x is 0."""
    return x * sum(divided(of_copy, x) for of_copy in relevances)


def start(tokens: Tensor, slope: Tensor) -> Tensor:
    """Relevance of the final tokens (B, T, D) from a relevance of 1 of each image's score; they sum to 1.

    The score is taken for what it is next to the tokens: linear in them, with its gradient there, `slope` (B, T, D), as
    the weights of `linear`. Of a class' logit this is exact, and what the paper does. Pooling and head are one linear
    layer then: were they two, a channel whose mean is negative would be credited to the tokens in which it is positive.
    """
    positive = (tokens * slope).clamp(min=0)
    return divided(positive, positive.sum((1, 2), keepdim=True))


def unsupported(model: Any) -> str | None:
    """Reason why there are no rules for the blocks of `model`; None if there are."""
    for block in getattr(model, "blocks", None) or [None]:
        attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        gated = getattr(attention, "gate", None) is not None
        if (type(block), type(attention), type(mlp)) != (Block, Attention, Mlp) or gated:
            kinds = ", ".join(type(part).__name__ for part in (block, attention, mlp)) + (
                " and a gate" if gated else ""
            )
            return f"its rules are known for the blocks of ViT, DeiT and LV-ViT; here they are {kinds}"
    return None


Record = dict[str, Tensor]  # what went through a block, by the names that `recording` gives


@contextlib.contextmanager
def recording(model: Any) -> Iterator[list[Record]]:
    """One `Seen` for each block of `model`, shallowest first, filled by the passes that are run meanwhile.

    Attention has to be explicit (`fused_attn` off): its probabilities are read where they are applied.
    """
    records: list[Record] = [{} for _ in model.blocks]
    hooks = []

    def keep(into: Record, before: str | None, after: str | None) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            for name, tensor in ((before, inputs[0]), (after, out)):
                if name is not None:
                    into[name] = tensor.detach()

        return hook

    try:
        for block, into in zip(model.blocks, records, strict=True):
            for module, before, after in (
                (block.norm1, "x", None),
                (block.attn.qkv, "normed", "qkv"),
                (block.attn.attn_drop, None, "probabilities"),
                (block.attn.proj, "mixed", None),
                (block.drop_path1, None, "attended"),
                (block.norm2, "between", None),
                (block.mlp.fc1, "normed2", None),
                (block.mlp.fc2, "hidden", None),
                (block.drop_path2, None, "thought"),
            ):
                hooks.append(module.register_forward_hook(keep(into, before, after)))
        yield records
    finally:
        for hook_handle in hooks:
            hook_handle.remove()


@torch.no_grad()
def relevances(model: Any, records: Sequence[Record], relevance: Tensor) -> list[Tensor]:
    """Relevances (B, H, T, T) of each block's attention, shallowest first, from that of the final tokens (B, T, D).

    In float64, whatever the model's type: quotients by a sum that nearly cancels lose digits at every block.
    """
    relevance, of_attentions = relevance.double(), []
    for block, record in zip(reversed(model.blocks), reversed(records), strict=True):
        relevance, of_attention = _block(block, {name: tensor.double() for name, tensor in record.items()}, relevance)
        of_attentions.append(of_attention)
    return of_attentions[::-1]


def _block(block: Any, record: Record, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevances of the tokens that enter the block (B, T, D), and of its attention (B, H, T, T)."""
    skipped, thought = added(relevance, record["between"], record["thought"])
    hidden = linear(thought, record["hidden"], block.mlp.fc2.weight.double())
    normed = linear(hidden, record["normed2"], block.mlp.fc1.weight.double())
    between = cloned((skipped, normed), record["between"])
    skipped, attended = added(between, record["x"], record["attended"])
    normed, of_attention = _attention(block.attn, record, attended)
    return cloned((skipped, normed), record["x"]), of_attention


def _attention(attention: Any, record: Record, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevances of the tokens that enter the attention (B, T, D), and of its probabilities (B, H, T, T)."""
    B, T, _ = record["qkv"].shape
    H, d = attention.num_heads, attention.head_dim
    q, k, v = record["qkv"].view(B, T, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = (_normed(norm, x) for norm, x in ((attention.q_norm, q), (attention.k_norm, k)))
    mixed = linear(relevance, record["mixed"], attention.proj.weight.double())
    mixed = mixed.view(B, T, H, d).transpose(1, 2)
    of_probabilities, of_v = product(mixed, record["probabilities"], v)
    of_q, of_k = product(of_probabilities, q * attention.scale, k.mT)
    of_qkv = torch.stack([of_q, of_k.mT, of_v]).permute(1, 3, 0, 2, 4).reshape(B, T, 3 * H * d)
    return linear(of_qkv, record["normed"], attention.qkv.weight.double()), of_probabilities


def _normed(norm: Any, x: Tensor) -> Tensor:
    """Queries or keys under timm's norm of them, which has the model's type."""
    weight = getattr(norm, "weight", None)
    return norm(x if weight is None else x.to(weight.dtype)).to(x.dtype)
