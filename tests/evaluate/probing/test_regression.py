"""Logistic and ridge regression: scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch.nn import functional as F

from common.features.ridge import scores
from evaluate.probing.regression import Logistic, predicted, solved


def data(
    count: int, classes: int, seed: int = 0, width: int = 12, signal: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randperm(count, generator=rng) % classes
    return torch.randn(count, width, generator=rng) + signal * torch.eye(classes, width)[labels], labels


@pytest.mark.parametrize("count", [9, 150])  # fewer and more than there are features
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("strength", [0.001, 1.0, 50.0])
def test_logistic_regression_is_scikit_learns(count: int, classes: int, strength: float) -> None:
    features, labels = data(count, classes)
    features = features * torch.logspace(-1, 1, 12) + 3  # of many scales, and off centre
    weights, biases = Logistic(features, labels, classes).fit(strength, tolerance=1e-15)
    expected = LogisticRegression(C=strength, solver="newton-cg", tol=1e-10).fit(
        features.double().numpy(), labels.numpy()
    )
    ours = (weights - weights[:1])[1:] if classes == 2 else weights
    np.testing.assert_allclose(ours.numpy(), expected.coef_, atol=1e-5)
    bias = biases[1:] - biases[:1] if classes == 2 else biases - biases.mean()
    there = expected.intercept_ - (0 if classes == 2 else expected.intercept_.mean())
    np.testing.assert_allclose(bias.numpy(), there, atol=1e-5)
    unseen, _ = data(50, classes, seed=1)
    assert predicted(weights, biases, unseen, chunk=20).tolist() == expected.predict(unseen.double().numpy()).tolist()
    warm = Logistic(features, labels, classes)
    warm.fit(0.1)
    torch.testing.assert_close(warm.fit(strength, tolerance=1e-15)[0], weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [8, 200])
def test_ridge_of_any_size_is_scikit_learns(count: int) -> None:
    features, labels = data(count, 3)
    features[:, -1] = 7
    unseen, _ = data(40, 3, seed=1)
    classes, found = scores(features, labels, unseen, 1024.0 / features.shape[1])
    mean, spread = features.double().mean(0), features.double().std(0, correction=0)
    known, asked = ((x.double() - mean) / torch.where(spread > 0, spread, 1) for x in (features, unseen))
    targets = 2.0 * (labels.numpy()[:, None] == classes.numpy()) - 1
    expected = Ridge(alpha=1024.0).fit(known.numpy(), targets).predict(asked.numpy())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-8)


def test_the_strength_is_chosen_on_held_out_images_and_then_all_are_used() -> None:
    train, labels = data(200, 3, signal=2.0)
    test, truth = data(100, 3, seed=1, signal=2.0)
    strengths = (1e-6, 0.1, 10.0)
    found = solved("logreg", (train, labels, test, truth), 3, strengths)
    wrong = solved("logreg", (train, labels, test, (truth + 1) % 3), 3, strengths)
    assert (wrong.rate, wrong.held_out) == (found.rate, found.held_out) and found.rate != 1e-6
    assert torch.equal(wrong.predictions, found.predictions) and found.difference >= 0 and wrong.difference >= 0
    weights, biases = Logistic(F.normalize(train, dim=1), labels, 3).fit(found.rate)
    assert torch.equal(found.predictions, predicted(weights, biases, F.normalize(test, dim=1)))
    one = solved("ridge", (train, labels, test, truth), 3, [10.0])
    assert one.held_out is None and one.best_on_test == one.accuracy > 0.5 and one.difference == 0
