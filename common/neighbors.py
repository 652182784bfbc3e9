"""k-nearest-neighbour classification of features: the probe that has nothing to train.

Letters: M bank images, Q queries, D feature width, k neighbours, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def knn(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 20,
    *,
    num_classes: int | None = None,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """Predicted class of every query, (Q,), from the k bank images most alike; see `knn_many`."""
    return knn_many(bank, labels, queries, [k], num_classes=num_classes, temperature=temperature, chunk=chunk)[k]


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
) -> dict[int, Tensor]:
    """{k: predicted class of every query (Q,)} for several k from one search, as DINO does (eval_knn.py).

    bank (M, D), labels (M,) in [0, C), queries (Q, D): any scale, they are L2-normalised here. A neighbour's vote is
    exp(cosine similarity / temperature). `chunk` queries are compared at a time: chunk * M similarities in memory.
    Raises ValueError if some k exceeds M.
    """
    if not 1 <= min(ks) <= max(ks) <= len(bank):
        raise ValueError(f"k in {sorted(ks)} neighbours of {len(bank)} bank images")
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
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
