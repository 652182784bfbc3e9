"""RankMe against NumPy, and on features whose rank one sees."""

import math

import numpy as np
import pytest
import torch

from common.features.metrics import rankme


def written_out(features: np.ndarray) -> float:
    """RankMe (arXiv 2210.02885), equations 1 and 2."""
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize(("M", "D"), [(40, 7), (7, 40), (30, 30)])
def test_effective_rank_as_numpy_has_it(M: int, D: int) -> None:
    rng = torch.Generator().manual_seed(M)
    features = torch.randn(M, D, generator=rng) @ torch.diag(0.7 ** torch.arange(D)) + 0.3
    found = rankme(features)
    assert found == pytest.approx(written_out(features.numpy()), rel=1e-9)
    assert 1 < found < min(M, D)


def test_effective_rank_of_what_one_sees() -> None:
    assert rankme(torch.eye(5).repeat(3, 1)) == pytest.approx(5, rel=1e-4)
    line = torch.arange(1, 9.0)[:, None] * torch.tensor([[1.0, -2.0, 3.0]])
    assert rankme(line) == pytest.approx(1, rel=1e-4)
    assert rankme(torch.zeros(4, 3)) == 0
    assert math.isnan(rankme(torch.tensor([[1.0, math.nan]])))
