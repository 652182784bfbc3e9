"""The ridge classifier: scikit-learn's, on standardised features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from common.features.ridge import ridge, scores


def data(M: int, D: int, classes: int) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(M)
    labels = torch.randint(0, classes, (M,), generator=rng) * 3 + 1  # 1, 4, 7, ...: with gaps
    features = torch.randn(M, D, generator=rng) * torch.rand(D, generator=rng) * 5 + 2
    features[:, 0] += labels
    features[:, -1] = 7  # constant: nothing to learn from, and nothing to divide by
    return features, labels, torch.randn(50, D, generator=rng) * 4


@pytest.mark.parametrize(("M", "D", "classes"), [(12, 40, 3), (90, 8, 5), (30, 30, 2)])
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_scores_are_scikit_learns(M: int, D: int, classes: int, penalty: float) -> None:
    features, labels, queries = data(M, D, classes)
    scaler = StandardScaler().fit(features.double().numpy())
    known, asked = (scaler.transform(part.double().numpy()) for part in (features, queries))
    targets = 2.0 * (labels.numpy()[:, None] == np.unique(labels)) - 1
    expected = Ridge(alpha=penalty * D).fit(known, targets).predict(asked)
    there, found = scores(features, labels, queries, penalty)
    assert there.tolist() == sorted(set(labels.tolist())) and found.shape == (50, len(there))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-8)
    classifier = RidgeClassifier(alpha=penalty * D).fit(known, labels.numpy())
    assert ridge(features, labels, queries, penalty).tolist() == classifier.predict(asked).tolist()


def test_what_is_separable_is_learned_from_one_image_of_each_class() -> None:
    centres = 5 * torch.eye(4)
    rng = torch.Generator().manual_seed(0)
    near = centres.repeat(5, 1) + 0.1 * torch.randn(20, 4, generator=rng)
    assert ridge(centres, torch.arange(4), near).tolist() == [0, 1, 2, 3] * 5


def test_one_image_alone() -> None:
    assert ridge(torch.ones(1, 3), torch.tensor([5]), torch.randn(2, 3)).tolist() == [5, 5]
