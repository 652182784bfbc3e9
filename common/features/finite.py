"""Features that are not finite: found once, between extraction and use, and refused with their cause.

A NaN loses every comparison, so that k-NN and linear heads would answer from it with an accuracy and an interval.
Letters: K images, D feature width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import Refusal

CHUNK = 16_384  # images that are looked at at a time: features may be mapped from a file
SAME = 1e-6  # of the largest number: features that vary by less are one vector and its rounding
FAINT = 1e-12  # a norm by which nothing is divided any more, as in torch's normalize
IN_FP32 = "use --precision fp32, or, if it was, weights of an earlier checkpoint"
OTHER_WEIGHTS = "the file is damaged or its training diverged: use an earlier checkpoint, or fetch it again"


def not_finite(features: Mapping[str, Tensor]) -> Tensor:
    """Mask (K,) of images that have a NaN or an infinity in one of their `features` (K, ...), or numbers of such a size
    that their length, by which similarities are divided, is one; "index" is none."""
    result: Tensor | None = None
    for name, values in features.items():
        if name == "index":
            continue
        bad = [~torch.isfinite(length(some)).cpu() for some in values.split(CHUNK)]
        of_kind = torch.cat(bad) if bad else torch.zeros(0, dtype=torch.bool)
        result = of_kind if result is None else result | of_kind
    return torch.zeros(0, dtype=torch.bool) if result is None else result


def length(features: Tensor) -> Tensor:
    """Norms (K,) float32 of features (K, ...), as similarities know them: infinite above about 1e19."""
    return torch.linalg.vector_norm(features.flatten(1), dim=1, dtype=torch.float32)


def is_constant(features: Tensor) -> bool:
    """Whether all images have the same features (K, D), but for rounding, or none to speak of."""
    low, high = features[0].float(), features[0].float()
    for some in features.split(CHUNK):
        low, high = torch.minimum(low, some.amin(0)), torch.maximum(high, some.amax(0))
    largest = torch.maximum(low.abs(), high.abs()).max()
    return len(features) > 1 and float((high - low).max()) <= max(SAME * float(largest), FAINT)


def spoiled(state: Mapping[str, Tensor]) -> str:
    """Describe the weights that are not finite; empty if all are."""
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if not bad:
        return ""
    first = state[bad[0]]
    kind = "NaN" if torch.isnan(first).any() else "infinity"
    count = int((~torch.isfinite(first)).sum())
    return f"{len(bad)} of its {len(state)} tensors, first {bad[0]} ({kind}, {count:,} of {first.numel():,} numbers)"


def refuse_spoiled(state: Mapping[str, Tensor] | None, name: str) -> None:
    """Raises Refusal if weights are not finite that a training would begin from; None are not loaded from anywhere."""
    if words := spoiled(state or {}):
        raise Refusal(f"{name}: the weights are not finite in {words}; {OTHER_WEIGHTS}")
