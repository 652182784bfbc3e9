"""k-NN against a brute-force NumPy one, and on drawings."""

import numpy as np
import pytest
import torch

from common.features.metrics import accuracy, wilson
from common.features.neighbors import CENTRED, FIELD, FLOOR, WHITENED, knn, knn_many, treated


def brute_force(bank, labels, queries, k, temperature, num_classes, centre=0.0):
    """DINO's rule, one query at a time."""
    bank, queries = bank - centre, queries - centre
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    found = []
    for query in queries / np.linalg.norm(queries, axis=1, keepdims=True):
        similarity = bank @ query
        votes = np.zeros(num_classes)
        for at in np.argsort(-similarity)[:k]:
            votes[labels[at]] += np.exp(similarity[at] / temperature)
        found.append(votes.argmax())
    return np.array(found)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_equals_brute_force(chunk):
    rng = np.random.default_rng(0)
    bank, queries = 4 + rng.normal(size=(90, 5)), 4 + 3 * rng.normal(size=(23, 5))
    labels = rng.integers(0, 4, 90)
    given = torch.tensor(bank), torch.tensor(labels), torch.tensor(queries)
    by_hand = {CENTRED: bank.mean(0), FIELD: 0.0}
    for treatment, centre in by_hand.items():
        found = knn_many(*given, [1, 10, 90], num_classes=4, chunk=chunk, treatment=treatment)
        for k, guesses in found.items():
            assert guesses.tolist() == brute_force(bank, labels, queries, k, 0.07, 4, centre).tolist()
            assert torch.equal(guesses, knn(*given, k, treatment=treatment))
    assert torch.equal(knn(*given, 10), knn(*given, 10, treatment=CENTRED))  # what every script gets unasked


def test_centring_takes_out_what_all_images_have_in_common():
    """Two kinds of faint marks on a bright ground of varying brightness: as raw pixels are."""
    ground = torch.tensor([1.0, 1.0, 1.0, 1.0])
    marks = 0.01 * torch.tensor([[1.0, -1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]])
    bank = torch.stack([ground + marks[i % 2] + torch.tensor([0, 0, 0.002, -0.002]) * i for i in range(6)])
    labels = torch.arange(6) % 2
    query = (ground + marks[1])[None]
    centred, field = (knn(bank, labels, query, k=6, treatment=each) for each in (CENTRED, FIELD))
    assert centred.tolist() == [1]
    assert field.tolist() == [brute_force(bank.numpy(), labels.numpy(), query.numpy(), 6, 0.07, 2)[0]]
    shifted = knn(bank + 50, labels, query + 50, k=6)  # centred, a common ground of any brightness changes nothing
    assert shifted.tolist() == centred.tolist()


def test_vectors_of_zeros_are_like_nothing():
    bank, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1, 2])
    for treatment in (CENTRED, FIELD):
        assert knn(bank, labels, torch.tensor([[2.0, 0.0]]), k=3, treatment=treatment).tolist() == [0]
        assert knn(torch.ones(3, 2), labels, torch.ones(1, 2), k=3, treatment=treatment).item() in (0, 1, 2)
    with pytest.raises(ValueError, match="expected one of centred, field"):
        knn(bank, labels, bank, k=1, treatment="center")


def test_the_nearest_outvotes_two_farther_ones():
    #  class 0 points right; two of class 1 point up; the query points nearly right
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.1]])
    assert knn(bank, labels, query, k=3, treatment=FIELD).tolist() == [0]
    equal = knn(bank, labels, query, k=3, temperature=100.0, treatment=FIELD)  # votes nearly equal: the majority
    assert equal.tolist() == [1]


def test_a_small_temperature_does_not_overflow():
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert knn(bank, labels, torch.eye(3), k=2, temperature=1e-4).tolist() == [0, 1, 2]


def test_no_queries_and_too_many_neighbours():
    assert knn(torch.eye(3), torch.arange(3), torch.empty(0, 3), k=2).tolist() == []
    with pytest.raises(ValueError, match="3 bank images"):
        knn(torch.eye(3), torch.arange(3), torch.eye(3), k=4)


def test_metrics():
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0])) == 0.75
    low, high = wilson(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (
        0.4038,
        0.5962,
    )  # statsmodels' proportion_confint(50, 100, method="wilson")
    assert wilson(0.0, 10)[0] == 0 and 0.2 < wilson(0.0, 10)[1] < 0.35


def test_partly_whitened_by_hand():
    """Along every principal axis the spread becomes its own fourth root, but for the floor."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    bank = rng.normal(size=(400, 5)) * [30, 10, 3, 1, 0.2] @ axes.T + 7
    queries = rng.normal(size=(9, 5)) * [30, 10, 3, 1, 0.2] @ axes.T + 7
    centred = bank - bank.mean(0)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(bank))
    scale = (variances + FLOOR * variances.mean()) ** (-3 / 8)
    wanted = [(side - bank.mean(0)) @ directions * scale for side in (bank, queries)]
    wanted = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in wanted]
    mine, theirs = treated(torch.from_numpy(bank).float(), torch.from_numpy(queries).float(), WHITENED)
    np.testing.assert_allclose((theirs @ mine.T).numpy(), wanted[1] @ wanted[0].T, atol=2e-5)
    plain = treated(torch.from_numpy(bank).float(), torch.from_numpy(queries).float())
    assert (plain[1] @ plain[0].T - theirs @ mine.T).abs().max() > 0.1
    flat = torch.ones(6, 3)
    assert torch.isfinite(treated(flat, flat, WHITENED)[0]).all()
