"""Linear classifiers that are solved and not trained: logistic regression, and the choice of its or ridge regression's
strength.

Letters: N images, D feature width, C classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.features.metrics import accuracy
from common.features.ridge import scores
from evaluate.probing.probe import HELD_OUT, Probe, hold_out

ITERATIONS, TOLERANCE = 1000, 1e-12  # DINOv2's (eval/log_regression.py)


class Logistic:
    """L2-penalised multinomial logistic regression of labels (N,) on features (N, D), for any number of penalties.

    Solved in the features' principal axes, each stretched by what bounds the curvature along it: the optimum is the
    same, and L-BFGS takes tens of steps to it in place of thousands, whatever the features' scales.
    """

    @torch.no_grad()
    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        x_ND = features.double()
        self.mean = x_ND.mean(0)
        x_ND = x_ND - self.mean  # which the unpenalised biases make good
        N, D = x_ND.shape
        basis = torch.linalg.qr(x_ND.T).Q if N < D else None  # no weights outside the images' span pay
        x_ND = x_ND if basis is None else x_ND @ basis
        self.spread, axes = torch.linalg.eigh(x_ND.T @ x_ND / N)
        self.axes = axes if basis is None else basis @ axes  # (D, min(N, D))
        self.x, self.targets = x_ND @ axes, F.one_hot(labels, num_classes).double()
        self.weights = self.targets.new_zeros(num_classes, len(self.spread) + 1)  # in the axes, biases last

    @torch.no_grad()
    def fit(
        self, strength: float, *, iterations: int = ITERATIONS, tolerance: float = TOLERANCE
    ) -> tuple[Tensor, Tensor]:
        """(weights (C, D), biases (C,)), float64, from where the last fit ended.

        Minimises half the squared weights plus `strength` times the summed cross-entropy; biases are not penalised:
        scikit-learn's C, also for two classes. It ends when no gradient of the mean loss exceeds `tolerance`, when a
        step changes the loss by less, or after `iterations` of L-BFGS.
        """
        N, C = self.targets.shape
        # of two classes scikit-learn knows one vector, the difference of ours: half its square is ours twice
        penalty = (1 if C > 2 else 2) / (strength * N)
        stretch = torch.cat([self.spread.clamp_min(0) / C + penalty, self.spread.new_tensor([1 / C])]).rsqrt()
        point = (self.weights / stretch).requires_grad_()
        solver = torch.optim.LBFGS(
            [point], max_iter=iterations, max_eval=2 * iterations, tolerance_grad=tolerance, tolerance_change=tolerance,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> float:
            unscaled = point.detach() * stretch
            weights, biases = unscaled[:, :-1], unscaled[:, -1]
            log_NC = (self.x @ weights.T + biases).log_softmax(1)
            error_CN = (log_NC.exp() - self.targets).T / N
            gradient = torch.cat([error_CN @ self.x + penalty * weights, error_CN.sum(1, keepdim=True)], 1)
            point.grad = gradient * stretch
            return (-(log_NC * self.targets).sum() / N + 0.5 * penalty * weights.square().sum()).item()

        solver.step(loss)
        self.weights = point.detach() * stretch
        weights = self.weights[:, :-1] @ self.axes.T
        return weights, self.weights[:, -1] - weights @ self.mean


@torch.no_grad()
def predicted(weights: Tensor, biases: Tensor, features: Tensor, chunk: int = 8192) -> Tensor:
    """The class (N,) of each image by (C, D), (C,) and features (N, D)."""
    return torch.cat([(some.double() @ weights.T + biases).argmax(1) for some in features.split(chunk)])


def solved(
    how: str,
    sides: tuple[Tensor, Tensor, Tensor, Tensor],
    num_classes: int,
    strengths: Sequence[float],
    *,
    seed: int = 0,
    after: Callable[[int, int], None] = lambda step, steps: None,
) -> Probe:
    """The classifier `how`, "logreg" (features L2-normalised) or "ridge" (standardised), on the `sides`: features
    (N, D) and labels (N,) to train on, and the same to judge on.

    Of several `strengths`, C or l2, the one that does best on 10 % of the training images when fitted to the others;
    then it is fitted to all of them, as DINOv2 does. `after(done, in all)` after each.
    """
    train, train_labels, test, test_labels = sides
    if how == "logreg":
        train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)

    def fitting(x: Tensor, y: Tensor) -> Callable[..., list[Tensor]]:
        solver = Logistic(x, y, num_classes) if how == "logreg" else None

        def fitted(strength: float, *queries: Tensor) -> list[Tensor]:
            if solver is not None:
                weights, biases = solver.fit(strength)
                return [predicted(weights, biases, each) for each in queries]
            classes, of_classes = scores(x, y, torch.cat(queries), strength / x.shape[1])
            return list(classes[of_classes.argmax(1)].split([len(each) for each in queries]))

        return fitted

    best = held_out = without = None
    chosen, rate = strengths[0], strengths[0]
    if len(strengths) > 1:
        fit, held = hold_out(train_labels, HELD_OUT, seed)
        fitted = fitting(train[fit], train_labels[fit])
        for done, strength in enumerate(sorted(strengths), 1):
            on_held, on_test = fitted(strength, train[held], test)
            share, seen = accuracy(on_held, train_labels[held]), accuracy(on_test, test_labels)
            if held_out is None or share > held_out:
                held_out, chosen, without = share, strength, seen
            if best is None or seen > best:
                best, rate = seen, strength
            after(done, len(strengths) + 1)
    (predictions,) = fitting(train, train_labels)(chosen, test)
    share = accuracy(predictions, test_labels)
    return Probe(
        share, chosen, held_out, share if best is None else best, rate if best is not None else chosen,
        predictions.cpu(), without_held_out=without,
    )  # fmt: skip
