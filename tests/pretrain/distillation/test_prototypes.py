"""Prototype arithmetic against the formulas, written out in NumPy float64 with loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.distillation.prototypes import (
    Centre,
    crops_cross_entropy,
    cross_entropy,
    entropy,
    marginal_entropy,
    sinkhorn,
)

PRECISIONS = [(torch.float64, 1e-6), (torch.float32, 1e-5)]


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max()
    return z - math.log(sum(math.exp(value) for value in z))


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(z))


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def dino_loss(logits: np.ndarray, targets: np.ndarray, images: int, temperature: float) -> float:
    """Every pair of a teacher crop and another student crop, one after the other."""
    V, G = len(logits) // images, len(targets) // images
    terms = [
        -targets[g * images + b] @ log_softmax(logits[v * images + b] / temperature)
        for g in range(G)
        for v in range(V)
        for b in range(images)
        if v != g
    ]
    assert len(terms) == G * (V - 1) * images
    return float(np.mean(terms))


def balanced(logits: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """Sinkhorn as DINOv2 writes it: Q is (K, N); rows to sum 1/K, columns to sum 1/N, and N at the end."""
    Q = np.exp(logits / temperature - (logits / temperature).max()).T
    K, N = Q.shape
    Q /= Q.sum()
    for _ in range(iterations):
        for k in range(K):
            Q[k] /= Q[k].sum() * K
        for n in range(N):
            Q[:, n] /= Q[:, n].sum() * N
    return (Q * N).T


@pytest.mark.parametrize(("dtype", "within"), PRECISIONS)
@pytest.mark.parametrize(("V", "G"), [(2, 2), (5, 2), (4, 3)])
def test_crops_loss_is_the_mean_over_pairs(V: int, G: int, dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    B, K, temperature = 3, 7, 0.1
    logits = torch.randn(V * B, K, dtype=dtype, requires_grad=True)
    targets = torch.randn(G * B, K, dtype=dtype).div(0.5).softmax(1)
    loss = crops_cross_entropy(logits, targets, B, temperature)
    assert loss.item() == pytest.approx(
        dino_loss(array(logits), array(targets), B, temperature), abs=within, rel=within
    )
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    nudge = 1e-6
    for row, k in ((0, 0), (V * B - 1, 3), (B, 6)):  # a global crop, the last crop, the second global crop
        ends = []
        for sign in (1, -1):
            moved = array(logits).copy()
            moved[row, k] += sign * nudge
            ends.append(dino_loss(moved, array(targets), B, temperature))
        slope = 3 * (ends[0] - ends[1]) / (2 * nudge)
        assert gradient[row, k].item() == pytest.approx(slope, abs=max(within, 1e-6))


@pytest.mark.parametrize(("dtype", "within"), PRECISIONS)
def test_cross_entropy_of_rows(dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(70, 5, dtype=dtype, requires_grad=True)  # more rows than are handled at a time
    targets = torch.randn(70, 5, dtype=dtype).softmax(1)
    losses = cross_entropy(logits, targets, 0.2)
    by_hand = [-target @ log_softmax(row / 0.2) for row, target in zip(array(logits), array(targets), strict=True)]
    torch.testing.assert_close(losses.double(), torch.tensor(by_hand), atol=within, rtol=within)
    weights = torch.rand(70, dtype=dtype)
    (ours,) = torch.autograd.grad((losses * weights).sum(), logits)
    naive = -(targets * (logits / 0.2).log_softmax(1)).sum(1)
    (theirs,) = torch.autograd.grad((naive * weights).sum(), logits)
    torch.testing.assert_close(ours, theirs, atol=within, rtol=within)


def test_no_rows_have_no_loss_and_a_gradient() -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    losses = cross_entropy(logits, torch.zeros(0, 4), 0.1)
    losses.sum().backward()
    assert losses.shape == (0,) and logits.grad.shape == (0, 4)


def test_a_second_backward_is_refused() -> None:
    """The gradient is scaled where it lies."""
    loss = cross_entropy(torch.randn(2, 3, requires_grad=True), torch.full((2, 3), 1 / 3), 1.0).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_large_logits_have_finite_losses() -> None:
    logits = torch.tensor([[50.0, -50.0, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([[0.0, 1.0, 0.0]]), 0.04).sum()
    loss.backward()
    assert loss.item() == pytest.approx(100 / 0.04)
    torch.testing.assert_close(logits.grad, torch.tensor([[25.0, -25.0, 0.0]]))


@pytest.mark.parametrize(("dtype", "within"), PRECISIONS)
def test_sinkhorn_is_the_published_one(dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    logits = 0.3 * torch.randn(8, 16, dtype=dtype) + 0.3 * torch.randn(8, 1, dtype=dtype)
    found = sinkhorn(logits, 0.04)
    assert found.dtype == dtype
    np.testing.assert_allclose(array(found), balanced(array(logits), 0.04), atol=within, rtol=0)
    # A shift of one row changes what three iterations find, so none may be slipped in.
    shifted = logits - logits.amax(1, keepdim=True)
    assert (sinkhorn(shifted, 0.04) - found).abs().max() > 0.01


@pytest.mark.parametrize(("dtype", "within"), PRECISIONS)
def test_sinkhorn_of_groups_balances_each_by_itself(dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    logits, groups = 0.2 * torch.randn(11, 6, dtype=dtype), torch.tensor([0, 3, 0, 1, 1, 0, 3, 1, 0, 3, 1])
    found = sinkhorn(logits, 0.1, groups=groups, num_groups=4)  # nobody is in group 2
    for group in (0, 1, 3):
        rows = groups == group
        np.testing.assert_allclose(array(found[rows]), balanced(array(logits[rows]), 0.1), atol=within, rtol=0)
    many = sinkhorn(logits.double(), 0.1, 200, groups, 4)[groups == 0].sum(0)
    torch.testing.assert_close(many, torch.full((6,), 4 / 6, dtype=torch.double), atol=1e-6, rtol=0)


@pytest.mark.parametrize("groups", [None, torch.tensor([0, 1, 0, 1])])
def test_sinkhorn_does_not_overflow(groups: Tensor | None) -> None:
    """+-50 over 0.04 is e^2500. Rows and columns in different orders of magnitude, as float64 sees them in logs."""
    logits = torch.tensor([[50.0, -50, 0], [-50, -50, 50], [49.99, 50, -50], [-50, 0.1, 0.11]])
    found = sinkhorn(logits, 0.04, groups=groups, num_groups=2)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(4))
    parts = [list(range(4))] if groups is None else [[0, 2], [1, 3]]
    for rows in parts:
        logs = array(logits[rows]) / 0.04
        for _ in range(3):
            logs = logs - np.logaddexp.reduce(logs, 0)
            logs = logs - np.logaddexp.reduce(logs, 1)[:, None]
        np.testing.assert_allclose(array(found[rows]), np.exp(logs), atol=2e-3)  # float32 of 2500: 1e-4 in the exponent
        exact = sinkhorn(logits.double(), 0.04, groups=groups, num_groups=2)[rows]
        np.testing.assert_allclose(array(exact), np.exp(logs), atol=1e-6)  # of 49.99's float32, on both sides


def test_sinkhorn_of_nothing() -> None:
    assert sinkhorn(torch.zeros(0, 3), 0.1).shape == (0, 3)
    assert sinkhorn(torch.zeros(0, 3), 0.1, groups=torch.zeros(0, dtype=torch.long), num_groups=2).shape == (0, 3)


@pytest.mark.parametrize("parts", [1, 3])
def test_centre_moves_once_by_the_mean_of_all_parts(parts: int) -> None:
    torch.manual_seed(0)
    centre, steps, expected = Centre(4).double(), torch.randn(2, 6, 4, dtype=torch.double), np.zeros(4)
    for logits in steps:
        for part in logits.chunk(parts):
            before = centre.centre.clone()
            centre.note(part)
            assert torch.equal(centre.centre, before)  # fixed within a step
        centre.commit()
        expected = 0.9 * expected + 0.1 * array(logits).mean(0)
    np.testing.assert_allclose(array(centre.centre), expected, atol=1e-12)
    centre.commit()  # nobody noted anything
    np.testing.assert_allclose(array(centre.centre), expected, atol=1e-12)


def test_a_forgotten_step_does_not_move_the_centre() -> None:
    centre = Centre(2, momentum=0.5)
    centre.note(torch.full((3, 2), float("nan")))
    centre.forget()
    centre.note(torch.tensor([[2.0, 4.0]]))
    centre.commit()
    assert centre.centre.tolist() == [1.0, 2.0]
    assert list(centre.state_dict()) == ["centre"]


def test_entropies_by_hand() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(entropy(rows), torch.tensor([0, 0, math.log(2)]))
    assert marginal_entropy(rows).item() == pytest.approx(math.log(2))
    assert marginal_entropy(rows[:1]).item() == 0
