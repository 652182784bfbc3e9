"""k-nearest-neighbour classification of features: the probe that has nothing to train.

How features are treated before their cosine is decided here, for every script: `CENTRED` unless it says otherwise. What
all features have in common (the mean image of raw pixels, the mean token of a network) says nothing about classes, but
makes every cosine nearly 1; the field's protocol, DINO's, leaves it in, and understates raw pixels by as much as ten
points. `WHITENED` goes most of the way to equal variance in every direction, which several vectors side by side, or
raw pixels, need: else the few directions in which all images differ most decide who is near.

Letters: M bank images, Q queries, D feature width, k neighbours, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CENTRED, FIELD, WHITENED = "centred", "field", "whitened"
TREATMENTS = {  # as reports say it
    CENTRED: "centred: less the mean of the training features, then L2-normalised",
    FIELD: "the field's (DINO's): L2-normalised, not centred",
    WHITENED: "partly whitened: centred, along every principal axis of the training features divided by the standard "
    "deviation there to the power 3/4, then L2-normalised",
}
POWER = 0.75  # of the standard deviation; by held-out training images of CIFAR-10, of 0, 1/4, 1/2, 3/4 and 1 (LOG.md)
FLOOR = 0.01  # of the mean variance, added to that along every axis before it is whitened
PORTION = 65_536  # features that are summed at a time, in float64


@torch.no_grad()
def centre_of(bank: Tensor, treatment: str = CENTRED) -> Tensor:
    """Centre to subtract from all features before their cosine, (D,) float32: the mean of `bank` (M, D), or zeros."""
    if treatment not in TREATMENTS:
        raise ValueError(f"treatment {treatment!r}: expected one of {', '.join(TREATMENTS)}")
    total = bank.new_zeros(bank.shape[1], dtype=torch.float64)
    for some in bank.split(PORTION) if treatment != FIELD else ():
        total += some.double().sum(0)
    return (total / len(bank)).float()


@torch.no_grad()
def whitening(bank: Tensor, centre: Tensor) -> Tensor:
    """Matrix (D, D) float32 by which features less `centre` (D,) are partly whitened, from those of `bank` (M, D):
    V (L + FLOOR * mean L)^(-POWER / 2), where V are the principal axes and L the variances along them."""
    D = bank.shape[1]
    covariance = bank.new_zeros(D, D, dtype=torch.float64)
    for some in bank.split(PORTION):
        centred = some.float() - centre
        covariance += (centred.T @ centred).double() / len(bank)
    variances, axes = torch.linalg.eigh(covariance)
    floor = FLOOR * variances.clamp_min(0).mean()
    return (axes * (variances.clamp_min(0) + floor + torch.finfo(torch.float32).tiny).pow(-POWER / 2)).float()


def treated(bank: Tensor, queries: Tensor, treatment: str = CENTRED) -> tuple[Tensor, Tensor]:
    """Unit vectors of `bank` (M, D) and `queries` (Q, D), whose products are the similarities. Raises ValueError for an
    unknown treatment."""
    centre = centre_of(bank, treatment)
    if treatment == WHITENED:
        matrix = whitening(bank, centre)
        bank, queries = (bank.float() - centre) @ matrix, (queries.float() - centre) @ matrix
        centre = torch.zeros_like(centre)
    return unit_vectors(bank, centre), unit_vectors(queries, centre)


def unit_vectors(features: Tensor, centre: Tensor) -> Tensor:
    """Unit vectors of `features` (..., D) less `centre` (D,), float32, whose products are cosines.

    A vector of zeros stays one: its cosine to everything is 0.
    """
    return F.normalize(features.float() - centre, dim=-1)


def knn(bank: Tensor, labels: Tensor, queries: Tensor, k: int = 20, **options: Any) -> Tensor:
    """Predicted class of every query, (Q,), from the k bank images most alike; `options` as of `knn_many`."""
    return knn_many(bank, labels, queries, [k], **options)[k]


@torch.no_grad()
def knn_many(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    *,
    num_classes: int | None = None,
    temperature: float = 0.07,
    chunk: int = 1024,
    treatment: str = CENTRED,
) -> dict[int, Tensor]:
    """Predict for several k from one search: {k: class of every query (Q,)}; with FIELD, as DINO does (eval_knn.py).

    bank (M, D), labels (M,) in [0, C), queries (Q, D): as they are, they are treated here. A neighbour's vote is
    exp(cosine similarity / temperature). `chunk` queries are compared at a time: chunk * M similarities in memory.
    Raises ValueError if some k exceeds M.
    """
    if not 1 <= min(ks) <= max(ks) <= len(bank):
        raise ValueError(f"k in {sorted(ks)} neighbours of {len(bank)} bank images")
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    bank, queries = treated(bank, queries, treatment)
    predictions: dict[int, list[Tensor]] = {k: [] for k in ks}
    for some in queries.split(chunk):  # the last one may be shorter, also when there are few queries
        similarity, neighbors = (some @ bank.T).topk(max(ks), dim=1)  # (q, k) each, most alike first
        # less the largest: the ranking of the votes is the same, and a small temperature does not overflow
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        classes = labels[neighbors]  # (q, k)
        for k in ks:
            votes = weights.new_zeros(len(some), num_classes)
            votes.scatter_add_(1, classes[:, :k], weights[:, :k])
            predictions[k].append(votes.argmax(1))
    empty = labels.new_empty(0)
    return {k: torch.cat([empty, *chunks]) for k, chunks in predictions.items()}
