"""k-NN against a brute-force NumPy one, and on drawings."""

import numpy as np
import pytest
import torch

from common.metrics import accuracy, wilson
from common.neighbors import knn, knn_many


def brute_force(bank, labels, queries, k, temperature, num_classes):
    """DINO's rule, one query at a time."""
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
    bank, queries = rng.normal(size=(90, 5)), 3 * rng.normal(size=(23, 5))
    labels = rng.integers(0, 4, 90)
    found = knn_many(
        torch.tensor(bank), torch.tensor(labels), torch.tensor(queries), [1, 10, 90], num_classes=4, chunk=chunk
    )
    for k, guesses in found.items():
        assert guesses.tolist() == brute_force(bank, labels, queries, k, 0.07, 4).tolist()
        assert torch.equal(guesses, knn(torch.tensor(bank), torch.tensor(labels), torch.tensor(queries), k))


def test_the_nearest_outvotes_two_farther_ones():
    #  class 0 points right; two of class 1 point up; the query points nearly right
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.1]])
    assert knn(bank, labels, query, k=3).tolist() == [0]
    assert knn(bank, labels, query, k=3, temperature=100.0).tolist() == [1]  # votes nearly equal: the majority


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
