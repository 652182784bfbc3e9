"""Which patches a vision transformer looks at, and which ones its answer rests on.

Attention is read where it is applied: by hooks on `attn_drop`, with `fused_attn` off. Letters: B images, H heads, T = P
+ N tokens, of which N are patches after P prefix tokens, D width, C classes.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import Refusal
from common.models import Backbone, Features
from common.models.plan import TokenPlan
from evaluate.explaining import lrp

Score = Callable[[Tensor], Tensor]  # features of images (B, D) to what is explained of each (B,), higher is more
SHARES = tuple(round(0.1 * step, 1) for step in range(10))  # of the patches that are deleted
PERCENTILES = (0.01, 0.99)  # of a principal component: they become black and full colour


@dataclass
class Attended:
    """Attention, gradients and features of one pass over B images."""

    probabilities: list[Tensor]  # (B, H, T, T) of each block, shallowest first; a query's row sums to 1
    gradients: list[Tensor]  # of the score, by the probabilities; empty without a score
    features: Features
    pooled: Tensor  # (B, D), what stands for an image
    score: Tensor | None  # (B,)
    relevances: list[Tensor] = field(default_factory=list)  # of the score, as gradients; empty without rules for them


def attend(
    backbone: Backbone, images: Tensor, plan: TokenPlan | None = None, pooling: str = "mean", score: Score | None = None
) -> Attended:
    """Run `backbone`, in eval mode, on images (B, C, H, W) and keep every attention; with `score`, its gradients too,
    and its relevance (lrp.py) unless that is `unsupported` or the plan takes patches away.

    A block that has no prefix tokens yet (SP-ViT's first ones) is given rows and columns of zeros for them. Raises
    Refusal for a backbone whose blocks are none of a plain ViT's.
    """
    was_training = backbone.training
    probabilities_seen: list[Tensor] = []
    relevances: list[Tensor] = []
    backbone.eval()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_watched(backbone, probabilities_seen))
            stack.enter_context(torch.set_grad_enabled(score is not None))
            recorded = None
            if score is not None and (plan is None or plan.whole) and unsupported(backbone) is None:
                recorded = stack.enter_context(lrp.recording(backbone.model))
            if score is not None:  # a backbone whose weights are frozen has gradients, too
                if images.dtype == torch.uint8:
                    images = (images.float() / 255 - backbone.mean) / backbone.std
                images = images.detach().requires_grad_(True)
            features = backbone(images, plan)
            pooled = features.pooled(pooling)
            scores = score(pooled) if score is not None else None
            gradients: Sequence[Tensor] = ()
            if scores is not None:  # images do not meet in eval mode: the sum's gradient is each one's own
                gradients = torch.autograd.grad(
                    scores.sum(), probabilities_seen, allow_unused=True, materialize_grads=True
                )
            if score is not None and recorded is not None:
                relevances = lrp.relevances(backbone.model, recorded, _start(features, pooling, score))
    finally:
        backbone.train(was_training)
    T = max(probabilities.shape[-1] for probabilities in probabilities_seen)
    return Attended(
        [_padded(maps.detach(), T) for maps in probabilities_seen],
        [_padded(maps, T) for maps in gradients],
        features,
        pooled.detach(),
        None if scores is None else scores.detach(),
        [_padded(maps, T) for maps in relevances],
    )


def unsupported(backbone: Backbone) -> str | None:
    """Reason why there is no transformer attribution for `backbone`; None if there is."""
    reason = lrp.unsupported(backbone.model)
    return reason and f"{backbone.config.name} has no transformer attribution: {reason}"


def _start(features: Features, pooling: str, score: Score) -> Tensor:
    """Relevance (B, T, D) of the final tokens."""
    P = features.prefix.shape[1]
    tokens = torch.cat([features.prefix, features.tokens], 1).detach().requires_grad_(True)
    pooled = replace(features, prefix=tokens[:, :P], tokens=tokens[:, P:]).pooled(pooling)
    (slope,) = torch.autograd.grad(score(pooled).sum(), tokens)
    return lrp.start(tokens.detach(), slope)


def attentions(backbone: Backbone) -> list[Any]:
    """Attention of each block of `backbone`. Raises Refusal if its blocks are none of a plain ViT's."""
    found = [getattr(block, "attn", None) for block in getattr(backbone.model, "blocks", None) or ()]
    complete = [hasattr(attention, "attn_drop") and hasattr(attention, "fused_attn") for attention in found]
    if not complete or not all(complete):
        raise Refusal(
            f"{backbone.config.name} ({type(backbone.model).__name__}) has no attention of every patch to every patch "
            "that could be shown: use a plain ViT, a DeiT, iRPE, LV-ViT or SP-ViT"
        )
    return found


@contextlib.contextmanager
def _watched(backbone: Backbone, probabilities: list[Tensor]) -> Iterator[None]:
    """Append the probabilities of every block to `probabilities`; afterwards attention is computed as before."""
    watched = attentions(backbone)
    fused = [attention.fused_attn for attention in watched]
    hooks = []
    try:
        for attention in watched:
            attention.fused_attn = False
            hook = attention.attn_drop.register_forward_hook(lambda _module, _input, out: probabilities.append(out))
            hooks.append(hook)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for attention, was in zip(watched, fused, strict=True):
            attention.fused_attn = was


def _padded(maps: Tensor, tokens: int) -> Tensor:
    missing = tokens - maps.shape[-1]
    return F.pad(maps, (missing, 0, missing, 0)) if missing else maps


# ------------------------------------------------------------------------------------------------------- attributions


def to_patches(relevance: Tensor, num_prefix_tokens: int, pooling: str) -> Tensor:
    """Relevance (..., N) of each patch for the image, from relevance (..., T queries, T keys).

    The class token's row where `pooling` is "class" and there is one, else the mean over the patches' rows.
    """
    P = num_prefix_tokens
    rows = relevance[..., 0, :] if pooling == "class" and P else relevance[..., P:, :].mean(-2)
    return rows[..., P:]


def rollout(probabilities: Sequence[Tensor]) -> Tensor:
    """Attention rollout (arXiv 2005.00928): (B, T, T), rows sum to 1. The mean over heads plus the identity, for the
    residual, is normalised by row; the blocks' are multiplied, the deepest first."""
    result = _identity(probabilities[0])
    for heads in probabilities:
        step = heads.mean(1) + _identity(heads)
        result = step / step.sum(-1, keepdim=True) @ result
    return result


def generic(probabilities: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Gradient times attention (arXiv 2103.15679): (B, T, T). R = identity, then of each block, the shallowest first,
    R <- R + mean over heads of (gradient * attention)^+ times R.

    Of relevances in place of probabilities it is transformer attribution (arXiv 2012.09838, section 3.3), in float64 as
    they are: where relevance is spread over all tokens it is small beside the identity.
    """
    result = _identity(probabilities[0])
    for heads, slope in zip(probabilities, gradients, strict=True):
        result = result + (slope * heads).clamp(min=0).mean(1) @ result
    return result


def _identity(heads: Tensor) -> Tensor:
    return torch.eye(heads.shape[-1], dtype=heads.dtype, device=heads.device).expand(len(heads), -1, -1)


def attributions(attended: Attended, pooling: str) -> dict[str, Tensor]:
    """Attributions {method: (B, N)}, higher is more relevant: the last block's attention, rollout and, after a pass
    with a score, gradient x attention and, where it is supported, transformer attribution."""
    P = attended.features.prefix.shape[1]
    maps = {"attention": attended.probabilities[-1].mean(1), "rollout": rollout(attended.probabilities)}
    if attended.gradients:
        maps["gradient x attention"] = generic(attended.probabilities, attended.gradients)
    if attended.relevances:
        maps["transformer attribution"] = generic(attended.relevances, attended.gradients)
    return {name: to_patches(relevance, P, pooling) for name, relevance in maps.items()}


# --------------------------------------------------------------------------------------------------------- the target


def similarity(neighbors: Tensor, centre: Tensor) -> Score:
    """Cosine between an image's feature and that of its neighbours, (B, D), both seen from the `centre` (D,) of all.

    What a backbone without classes can be asked: why this image lies where it lies. Its own feature would do as no
    target: a cosine has no slope where it is 1. Without the centre a feature that all images share would be explained.
    """
    towards = F.normalize(neighbors - centre, dim=-1)
    return lambda pooled: (F.normalize(pooled - centre, dim=-1) * towards).sum(-1)


def logit(weight: Tensor, bias: Tensor, labels: Tensor) -> Score:
    """Logit that a linear head, weight (C, D) and bias (C,), gives the class of each image, labels (B,)."""
    return lambda pooled: (pooled * weight[labels]).sum(-1) + bias[labels]


# ----------------------------------------------------------------------------------------------------------- fidelity


@torch.no_grad()
def deletion(
    backbone: Backbone,
    images: Tensor,
    orders: Tensor,
    score: Score,
    plan: TokenPlan | None = None,
    pooling: str = "mean",
    shares: Sequence[float] = SHARES,
) -> Tensor:
    """Score (B, shares) of uint8 images (B, C, H, W) with the first share of their patches deleted.

    orders: (B, N), patches in the order in which they go. A deleted patch has the mean colour of its image.
    """
    h, w = backbone.grid
    B, _, H, W = images.shape
    colours = images.float().mean((2, 3), keepdim=True).round().to(images.dtype)
    results = []
    for share in shares:
        gone = torch.zeros(B, h * w, dtype=torch.bool, device=images.device)
        gone.scatter_(1, orders[:, : round(share * h * w)], True)
        mask = gone.view(B, 1, h, w).repeat_interleave(H // h, 2).repeat_interleave(W // w, 3)
        results.append(score(backbone(torch.where(mask, colours, images), plan).pooled(pooling)))
    return torch.stack(results, 1)


def random_orders(images: int, num_patches: int, draws: int, seed: int) -> Tensor:
    """Draw permutations (draws, images, N) of the patches, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(draws, images, num_patches, generator=generator).argsort(-1)


def area(curves: Tensor, shares: Sequence[float] = SHARES) -> Tensor:
    """Mean height below curves (..., shares), by the trapezoidal rule: less is a steeper fall."""
    x = torch.tensor(shares, dtype=curves.dtype, device=curves.device)
    return torch.trapezoid(curves, x, dim=-1) / (x[-1] - x[0])


# -------------------------------------------------------------------------------------------- principal components


def components(tokens: Tensor, count: int = 3) -> Tensor:
    """The first `count` principal components of tokens (K, N, D), one basis for all: (K, N, count) in [0, 1].

    Deterministic: of each direction the entry of largest magnitude is positive. Values beyond the 1st and 99th
    percentile are cut off; a component without any spread is 0.5.
    """
    flat = tokens.detach().flatten(0, 1).double().cpu()
    centred = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    directions = vectors[:, -count:].flip(1)
    largest = directions.abs().argmax(0, keepdim=True)
    values = centred @ (directions * directions.gather(0, largest).sign())
    low, high = values.quantile(torch.tensor(PERCENTILES, dtype=values.dtype), 0)
    spread = high - low
    flat_ones = spread <= 1e-9 * values.abs().max().clamp(min=1e-30)
    scaled = ((values - low) / torch.where(flat_ones, 1.0, spread)).clamp(0, 1)
    return torch.where(flat_ones, 0.5, scaled).float().view(*tokens.shape[:2], count)


def summary(curves: Mapping[str, Tensor], random: Tensor) -> dict[str, dict[str, Any]]:
    """Summarise: {method: area under its mean curve, its gap below random's, with a 95 % interval over images}.

    curves: (B, shares) of each method; random: (draws, B, shares). `gap` is paired: the same images in both.
    """
    blind = area(random).mean(0)
    result: dict[str, dict[str, Any]] = {}
    for name, curve in curves.items():
        gap = blind - area(curve)
        half = 1.96 * gap.std().item() / len(gap) ** 0.5 if len(gap) > 1 else float("nan")
        result[name] = {
            "area": area(curve).mean().item(),
            "curve": curve.mean(0).tolist(),
            "gap": gap.mean().item(),
            "gap_interval": [gap.mean().item() - half, gap.mean().item() + half],
        }
    result["random"] = {"area": blind.mean().item(), "curve": random.mean((0, 1)).tolist()}
    return result
