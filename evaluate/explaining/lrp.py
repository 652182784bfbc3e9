"""Transformer attribution (Chefer et al., arXiv 2012.09838): relevance walked back through the blocks of a plain ViT.

A layer hands on to its inputs, in proportion to what each contributed, the relevance that its output was given
(layer-wise relevance propagation). What arrives at the attention of a block is multiplied by the score's gradient
there. Norms, softmax, GELU, dropout, LayerScale and LV-ViT's 1/skip_lam hand on what they are given. Models of which
the paper says nothing are walked by its rules for what they are made of:

- SP-ViT (arXiv 2206.07662): the prior, which multiplies the scores and depends on no image, and the convolution after
  a block hand on what they are given. Where the class token joins its relevance ends: below it is a parameter.
- iRPE (arXiv 2107.14222): scores and outputs are sums (`added`) of plain attention's products and of products with
  tables. Those go in proportion to their terms too (`product`), but a table, being a parameter, keeps no half: queries
  and keys have all of what they look up (`looked_up`), probabilities of what they fetch for the values (`fetched`). A
  bias of the scores has no part in them, as a linear layer's.

Letters: B images, H heads, d width of a head, T tokens, D width, n buckets of a table, R tables read at once.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.layers import Mlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from common.models.irpe import RelativeAttention
from common.models.sp_vit import SpAttention, SpBlock

KINDS = ((Block, Attention), (Block, RelativeAttention), (SpBlock, Attention), (SpBlock, SpAttention))
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


def added(relevance: Tensor, *terms: Tensor) -> list[Tensor]:
    """Relevances of terms (B, ...) from that of their sum: in proportion, then rescaled.

    The sums over an image become |sum of the term's| parts of all relevance: otherwise terms that cancel would grow
    without bound (section 3.2 of the paper, of two terms).
    """
    share = divided(relevance, sum(terms))  # type: ignore[arg-type]
    parts = [term * share for term in terms]
    of_image = tuple(range(1, relevance.ndim))
    sums = [part.sum(of_image, keepdim=True) for part in parts]
    total, sizes = relevance.sum(of_image, keepdim=True), sum(each.abs() for each in sums)
    return [
        part * divided(divided(own.abs() * total, sizes), own)  # type: ignore[arg-type]
        for part, own in zip(parts, sums, strict=True)
    ]


def cloned(relevances: Sequence[Tensor], x: Tensor) -> Tensor:
    """Relevance of x from those of its copies: x * sum of (R / x); 0 where x is 0."""
    return x * sum(divided(of_copy, x) for of_copy in relevances)


def looked_up(relevances: Sequence[Tensor], x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Relevance of x (B, H, T, d) from those (B, H, T, S) of its `readings`, one of each of the R tables.

    A bucket has the sum of what its copies have, and x all of it in proportion to the terms of the product.
    """
    of_buckets = x.new_zeros(*x.shape[:3], table.shape[-1])
    for of_reading, each in zip(relevances, ids, strict=True):
        of_buckets.scatter_add_(-1, each[:, None].expand_as(of_reading), of_reading)
    return x * (divided(of_buckets, x @ table) @ table.mT)


def readings(x: Tensor, table: Tensor, ids: Tensor) -> list[Tensor]:
    """Read the products of x (B, H, T, d) and table (1 or H, d, n) at ids (R, 1 or B, T, S): R times (B, H, T, S)."""
    amounts = x @ table
    return [amounts.gather(-1, each[:, None].expand(*x.shape[:3], each.shape[-1])) for each in ids]


def fetched(relevance: Tensor, probabilities: Tensor, sums: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Relevance of probabilities (B, H, T, S) from that (B, H, T, d) of `sums` @ table (1 or H, n, d).

    A sum of a bucket has all in proportion to the terms of the product, and its probabilities in proportion to them.
    """
    share = divided(relevance, sums @ table) @ table.mT
    return probabilities * sum(share.gather(-1, each[:, None].expand_as(probabilities)) for each in ids)


def by_bucket(probabilities: Tensor, ids: Tensor, buckets: int) -> Tensor:
    """Sum probabilities (B, H, T, S) by bucket, ids (R, 1 or B, T, S): (B, H, T, buckets)."""
    sums = probabilities.new_zeros(*probabilities.shape[:3], buckets)
    for each in ids:
        sums.scatter_add_(-1, each[:, None].expand_as(probabilities), probabilities)
    return sums


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
        if (type(block), type(attention)) not in KINDS or type(mlp) is not Mlp or gated:
            kinds = ", ".join(type(part).__name__ for part in (block, attention, mlp)) + (
                " and a gate" if gated else ""
            )
            return f"its rules are known for the blocks of ViT, DeiT, iRPE, LV-ViT and SP-ViT; here they are {kinds}"
    return None


Record = dict[str, Tensor]  # what went through a block, by the names that `recording` gives


@contextlib.contextmanager
def recording(model: Any) -> Iterator[list[Record]]:
    """One record for each block of `model`, shallowest first, filled by the passes that are run meanwhile.

    Attention has to be explicit (`fused_attn` off): its probabilities are read where they are applied.
    """
    records: list[Record] = [{} for _ in model.blocks]
    hooks = []

    def keep(into: Record, before: str | None, *after: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, inputs: tuple[Tensor, ...], out: Any) -> None:
            if before is not None:
                into[before] = inputs[0].detach()
            outs = (out,) if isinstance(out, Tensor) else out
            into.update((name, tensor.detach()) for name, tensor in zip(after, outs, strict=bool(after)))

        return hook

    try:
        for block, into in zip(model.blocks, records, strict=True):
            attention = block.attn
            spatial = isinstance(attention, SpAttention)
            watched: list[tuple[Any, ...]] = [
                (block.norm1, "x"),
                (attention.qk, "normed", "qk") if spatial else (attention.qkv, "normed", "qkv"),
                (attention.attn_drop, None, "probabilities"),
                (attention.proj, "mixed"),
                (block.drop_path1, None, "attended"),
                (block.norm2, "between"),
                (block.mlp.fc1, "normed2"),
                (block.mlp.fc2, "hidden"),
                (block.drop_path2, None, "thought"),
            ]
            if spatial:
                watched.append((attention.v, None, "v"))
            if isinstance(attention, RelativeAttention):  # one for all layers; not called where iRPE is off
                watched.append((attention.bucket_ids, None, "ids", "mirrored"))
            hooks += [module.register_forward_hook(keep(into, *names)) for module, *names in watched]
        yield records
    finally:
        for hook_handle in hooks:
            hook_handle.remove()


def relevances(model: Any, records: Sequence[Record], relevance: Tensor) -> list[Tensor]:
    """Relevances (B, H, T, T) of each block's attention, shallowest first, from that of the final tokens (B, T, D).

    Where the class token joins late, T is smaller before.
    """
    return [of_attention for _, of_attention in walk(model, records, relevance)][::-1]


@torch.no_grad()
def walk(model: Any, records: Sequence[Record], relevance: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the relevances of the tokens that enter a block (B, T, D) and of its attention (B, H, T, T), the deepest
    block first, from that of the final tokens.

    In float64, whatever the model's type: quotients by a sum that nearly cancels lose digits at every block.
    """
    relevance = relevance.double()
    for block, record in zip(reversed(model.blocks), reversed(records), strict=True):
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in record.items()}
        relevance = relevance[:, -wide["x"].shape[1] :]  # a class token that joins after the block leaves here
        relevance, of_attention = _block(block, wide, relevance)
        yield relevance, of_attention


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
    B, T, _ = relevance.shape
    H, d = attention.num_heads, attention.head_dim
    if isinstance(attention, SpAttention):
        rows, weight = torch.cat([record["qk"], record["v"]], -1), torch.cat([attention.qk.weight, attention.v.weight])
    else:
        rows, weight = record["qkv"], attention.qkv.weight
    q, k, v = rows.view(B, T, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0)
    if not isinstance(attention, SpAttention):
        q, k = (_normed(norm, x) for norm, x in ((attention.q_norm, q), (attention.k_norm, k)))
    mixed = linear(relevance, record["mixed"], attention.proj.weight.double())
    mixed = mixed.view(B, T, H, d).transpose(1, 2)
    of_probabilities, of_v = _values(attention, record, mixed, v)
    of_q, of_k = _scores(attention, record, of_probabilities, q * attention.scale, k)
    of_qkv = torch.stack([of_q, of_k, of_v]).permute(1, 3, 0, 2, 4).reshape(B, T, 3 * H * d)
    return linear(of_qkv, record["normed"], weight.double()), of_probabilities


def _values(attention: Any, record: Record, relevance: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Relevances of probabilities (B, H, T, T) and values v (B, H, T, d) from that of what the heads put out."""
    probabilities = record["probabilities"]
    if "v" not in getattr(attention, "rpe_on", "") or "ids" not in record:
        return product(relevance, probabilities, v)
    table, ids = attention.rpe_v().double(), record["ids"]
    sums = by_bucket(probabilities, ids, table.shape[1])
    plain, encoded = added(relevance, probabilities @ v, sums @ table)
    of_probabilities, of_v = product(plain, probabilities, v)
    return cloned((of_probabilities, fetched(encoded, probabilities, sums, table, ids)), probabilities), of_v


def _scores(attention: Any, record: Record, relevance: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Relevances of scaled queries q and keys k (B, H, T, d) from that of the scores (B, H, T, T)."""
    on = attention.rpe_on if "ids" in record and attention.mode == "ctx" else ""
    lookups = []  # of queries [query, key], of keys [key, query]
    if "k" in on:
        lookups.append((q, attention.rpe_k().double(), record["ids"]))
    if "q" in on:
        lookups.append((k, attention.rpe_q().double() * attention.scale, record["mirrored"]))
    if not lookups:
        of_q, of_k = product(relevance, q, k.mT)
        return of_q, of_k.mT
    terms = [[each if x is q else each.mT for each in readings(x, table, ids)] for x, table, ids in lookups]
    plain, *encoded = added(relevance, q @ k.mT, *(each for some in terms for each in some))
    of_q, of_k = product(plain, q, k.mT)
    found = {"q": [of_q], "k": [of_k.mT]}
    for x, table, ids in lookups:
        parts, encoded = encoded[: len(ids)], encoded[len(ids) :]
        parts = [each if x is q else each.mT for each in parts]
        found["q" if x is q else "k"].append(looked_up(parts, x, table, ids))
    return cloned(found["q"], q), cloned(found["k"], k)


def _normed(norm: Any, x: Tensor) -> Tensor:
    """Queries or keys under timm's norm of them, which has the model's type."""
    weight = getattr(norm, "weight", None)
    return norm(x if weight is None else x.to(weight.dtype)).to(x.dtype)
