"""Numbers that losses are computed in."""

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """float32, or float64 where it already is: what losses are computed in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
