"""Attention whose scores depend on where the tokens are, and which keeps few of them until the backward pass.

Letters: B images, H heads, T queries, S keys, d numbers a head, n buckets of a table, R tables read at once.

    scores[t, s] = prior[t, s] * (scale * q[t] . k[s]) + sum_r lookup[t, ids[r, t, s]]
                                                       + sum_r of_keys[s, ids_of_keys[r, s, t]]
    out[t] = sum_s softmax(scores)[t, s] * (v[s] + sum_r values[ids_of_values[r, t, s]])

`prior` is SP-ViT's (arXiv 2206.07662), lookups and values are iRPE's (arXiv 2107.14222) on keys, queries and values. A
lookup is a small matrix product made beforehand, by which its table gets its gradient; the values of a bucket are
multiplied once, by the sum of its probabilities: no score needs a vector of its own.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Part = tuple[slice, slice]  # images, heads

KEPT = 2**22  # probabilities of a call (16 MiB of float32) up to which they are kept: a few percent of a ViT-S's step
CACHED = 2**18  # scores that stay in a core's second-level cache (one MiB of float32), from forward product to backward


class Encoding(NamedTuple):
    """Places of the tokens, as far as scores and values depend on them. Ids are int64, for all images or for each."""

    prior: Tensor | None = None  # (H, T, S), multiplies the scaled products
    lookup: Tensor | None = None  # (B, H, T, n), read at `ids` (R, 1 or B, T, S)
    ids: Tensor | None = None
    of_keys: Tensor | None = None  # (B, H, S, n), read at `ids_of_keys` (R, 1 or B, S, T)
    ids_of_keys: Tensor | None = None
    values: Tensor | None = None  # (1 or H, n, d), read at `ids_of_values` (R, 1 or B, T, S)
    ids_of_values: Tensor | None = None


PLAIN = Encoding()


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    encoding: Encoding = PLAIN,
    dropout: Callable[[Tensor], Tensor] | None = None,
    fused: bool = True,
) -> Tensor:
    """Attention of queries q (B, H, T, d) to keys k and values v (B, H, S, d): (B, H, T, d).

    Softmax and sums are float32 (float64 of float64), products are in autocast's type or else in v's. Every argument
    that is no id has its gradient; without an encoding, this is torch's own.

    In autograd's own steps unless `fused`, with `dropout` (a module or function that is given the probabilities
    (B, H, T, S)), and while torch.compile looks on.
    """
    kind = q.device.type
    narrow = torch.is_autocast_enabled(kind) and v.dtype != torch.float64  # which autocast leaves alone
    dtype = torch.get_autocast_dtype(kind) if narrow else v.dtype
    q, k, v = (q if scale == 1 else q * scale).to(dtype), k.to(dtype), v.to(dtype)
    if fused and dropout is None and all(part is None for part in encoding):
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)
    if fused and dropout is None and not torch.compiler.is_compiling():
        out, sums = _Fused.apply(q, k, v, *encoding)
    else:
        with torch.autocast(kind, enabled=False):
            out, sums = _explicit(q, k, v, encoding, dropout)
    if encoding.values is None or sums is None:
        return out
    with torch.autocast(kind, enabled=False):  # a table for all heads is one large product
        values = encoding.values.to(dtype)
        return out + sums.to(dtype) @ (values[0] if len(values) == 1 else values)


def project(attention: Any, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Project as timm's Attention: q (B, H, T, d), k and v (B, H, S, d) of all tokens x (B, T, D), or k and v of those
    at keys (B, S)."""
    B, H, d = x.shape[0], attention.num_heads, attention.head_dim
    if keys is None:
        q, k, v = attention.qkv(x).view(B, -1, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
    sizes = [H * d, 2 * H * d]
    weights = attention.qkv.weight.split(sizes)
    biases = attention.qkv.bias.split(sizes) if attention.qkv.bias is not None else (None, None)
    of_keys = x.gather(1, keys[..., None].expand(-1, -1, x.shape[-1]))
    q = F.linear(x, weights[0], biases[0]).view(B, -1, H, d).transpose(1, 2)
    k, v = F.linear(of_keys, weights[1], biases[1]).view(B, -1, 2, H, d).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, at: Encoding, dropout: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    scores = _wide(q @ k.mT)
    if at.prior is not None:
        scores = scores * at.prior
    if at.lookup is not None and at.ids is not None:
        for table in at.ids:
            scores = scores + _read(_wide(at.lookup), table)
    if at.of_keys is not None and at.ids_of_keys is not None:
        for table in at.ids_of_keys:
            scores = scores + _read(_wide(at.of_keys), table).mT
    probabilities = scores.softmax(-1)
    if dropout is not None:
        probabilities = dropout(probabilities)
    out = probabilities.to(v.dtype) @ v
    if at.values is None or at.ids_of_values is None:
        return out, None
    sums = probabilities.new_zeros(*probabilities.shape[:3], at.values.shape[1])
    for table in at.ids_of_values:
        sums = sums.scatter_add(-1, table[:, None].expand_as(probabilities), probabilities)
    return out, sums


class _Fused(torch.autograd.Function):
    """Compute `_explicit` a slice of images and heads at a time, whose scores never leave the cache. The backward pass
    computes them again, unless the probabilities of all slices were few enough to keep."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, *encoding: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        at = Encoding(*encoding)
        B, H, T, d = q.shape
        wide = _wide_type(q.dtype)
        few = at.prior is None and any(ctx.needs_input_grad) and B * H * T * k.shape[2] <= KEPT
        kept = q.new_empty((B, H, T, k.shape[2]), dtype=wide) if few else None
        ctx.save_for_backward(q, k, v, kept, *encoding)
        out = q.new_empty(B, T, H, d).transpose(1, 2)  # heads beside each other in memory: they are merged next
        sums = None if at.values is None else q.new_zeros((B, H, T, at.values.shape[1]), dtype=wide)
        for part, P, products in _slices(q, k, 2):
            P = P if kept is None else kept[part]
            _probabilities(P, products, part, q, k, at)
            out[part] = P.to(v.dtype) @ v[part]
            if sums is not None and at.ids_of_values is not None:
                _add_by_bucket(sums[part], _of(part, at.ids_of_values), P)
        return out, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_sums: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, kept, *encoding = ctx.saved_tensors
        at: Any = Encoding(*encoding)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        wide = _wide_type(q.dtype)
        d_prior, d_lookup, d_of_keys = (
            None if tensor is None else torch.zeros(tensor.shape, dtype=wide, device=q.device)
            for tensor in (at.prior, at.lookup, at.of_keys)
        )
        for part, P, d_P, products in _slices(q, k, 3):
            if kept is None:
                _probabilities(P, products, part, q, k, at)
            else:
                P = kept[part]
            d_v[part] = P.to(v.dtype).mT @ d_out[part]
            if d_sums is not None and at.ids_of_values is not None:
                _fill(d_P, d_sums[part], _of(part, at.ids_of_values))
            _add_product(d_P, d_out[part], v[part], fresh=at.ids_of_values is None)
            d_scores = torch._softmax_backward_data(d_P, P, -1, wide)
            if d_lookup is not None:
                _add_by_bucket(d_lookup[part], _of(part, at.ids), d_scores)
            if d_of_keys is not None:
                _add_by_bucket(d_of_keys[part], _of(part, at.ids_of_keys), d_scores.mT)
            if d_prior is not None:
                d_prior[part[1]] += products.mul_(d_scores).sum(0)
                d_scores *= at.prior[part[1]]
            d_scores = d_scores.to(q.dtype)
            d_q[part] = d_scores @ k[part]
            d_k[part] = d_scores.mT @ q[part]
        d_prior, d_lookup, d_of_keys = (
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in ((d_prior, at.prior), (d_lookup, at.lookup), (d_of_keys, at.of_keys))
        )
        return d_q, d_k, d_v, *Encoding(prior=d_prior, lookup=d_lookup, of_keys=d_of_keys)


def _probabilities(scores: Tensor, products: Tensor, part: Part, q: Tensor, k: Tensor, at: Encoding) -> None:
    """Fill `scores` with the softmax of one part's scores and, with a prior, `products` with what it multiplied."""
    fresh = at.lookup is None or at.ids is None
    if at.lookup is not None and at.ids is not None:
        _fill(scores, at.lookup[part], _of(part, at.ids))
    if at.prior is None:
        _add_product(scores, q[part], k[part], fresh)
    else:
        _add_product(products, q[part], k[part], fresh=True)
        heads = at.prior[part[1]]
        torch.mul(products, heads, out=scores) if fresh else scores.addcmul_(products, heads)
    if at.of_keys is not None and at.ids_of_keys is not None:
        for table in _of(part, at.ids_of_keys):
            scores += _read(_wide(at.of_keys[part]), table).mT
    torch.softmax(scores, -1, out=scores)


def _fill(scores: Tensor, lookup: Tensor, tables: Tensor) -> None:
    """Set scores (B, H, T, S) to the sum of lookup (B, H, T, n) at tables (R, 1 or B, T, S)."""
    lookup = _wide(lookup)
    torch.gather(lookup, -1, tables[0][:, None].expand_as(scores), out=scores)
    for table in tables[1:]:
        scores += _read(lookup, table)


def _add_product(scores: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """Add a (B, H, T, d) times b (B, H, S, d) to scores (B, H, T, S); if `fresh`, set them to it."""
    if a.dtype == scores.dtype:  # one pass over the scores instead of two
        flat = scores.flatten(0, 1)
        torch.baddbmm(flat, a.flatten(0, 1), b.flatten(0, 1).mT, beta=0 if fresh else 1, out=flat)
    elif fresh:
        scores.copy_(a @ b.mT)
    else:
        scores += a @ b.mT


def _slices(q: Tensor, k: Tensor, num_buffers: int) -> Iterator[tuple[Any, ...]]:
    """(part, buffer, ...): images and heads to work on together, and room for their scores (B, H, T, S), used again and
    again. As many as the caches of the cores hold; on a GPU all."""
    B, H, T, S = *q.shape[:3], k.shape[2]
    room = max(1, CACHED * torch.get_num_threads() // (T * S)) if q.device.type == "cpu" else B * H
    heads, images = min(H, room), min(B, max(1, room // H))
    buffers = [q.new_empty((images, heads, T, S), dtype=_wide_type(q.dtype)) for _ in range(num_buffers)]
    for image in range(0, B, images):
        for head in range(0, H, heads):
            part = slice(image, min(image + images, B)), slice(head, min(head + heads, H))
            shape = part[0].stop - image, part[1].stop - head, T, S
            yield part, *(buffer.flatten()[: math.prod(shape)].view(shape) for buffer in buffers)


def _of(part: Part, ids: Tensor) -> Tensor:
    return ids if ids.shape[1] == 1 else ids[:, part[0]]


def _read(lookup: Tensor, table: Tensor) -> Tensor:
    """Read lookup (B, H, T, n) at table (1 or B, T, S): (B, H, T, S)."""
    return lookup.gather(-1, table[:, None].expand(*lookup.shape[:3], table.shape[-1]))


def _add_by_bucket(sums: Tensor, tables: Tensor, numbers: Tensor) -> None:
    """Add numbers (B, H, T, S) to sums (B, H, T, n) of their buckets; tables (R, 1 or B, T, S)."""
    for table in tables:
        sums.scatter_add_(-1, table[:, None].expand_as(numbers), numbers)


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_type(tensor.dtype))
