"""Ridge classification: a linear probe in closed form, for few labels and no patience.

Letters: M labelled images, Q queries, D feature width, C classes.
"""

import torch
from torch import Tensor

PORTION = 8192  # images that are standardised at a time
PENALTY = 0.1  # per feature; of 0.001 to 100 none is better for raw pixels and for an untrained ViT at once


@torch.no_grad()
def ridge(features: Tensor, labels: Tensor, queries: Tensor, penalty: float = PENALTY) -> Tensor:
    """Predicted class of every query, (Q,), by `scores`: that of the largest."""
    classes, scores_QC = scores(features, labels, queries, penalty)
    return classes[scores_QC.argmax(1)]


@torch.no_grad()
def scores(features: Tensor, labels: Tensor, queries: Tensor, penalty: float = PENALTY) -> tuple[Tensor, Tensor]:
    """Classes among `labels`, in order (C,), and scores of every query (Q, C), float64.

    features (M, D), labels (M,), queries (Q, D). Each feature is brought to mean 0 and standard deviation 1 over the M
    images; the targets are 1 for an image's own class and -1 for others; the intercept is not penalised. The squared
    weights are penalised by `penalty` * D, so that one number suits every width (scikit-learn's alpha is that product).
    big_vision's few-shot ridge differs: it appends a column of ones, whose weight, the intercept, it penalises too.
    """
    classes, class_of_image = labels.unique(return_inverse=True)
    targets_MC = 2 * torch.nn.functional.one_hot(class_of_image, len(classes)).double() - 1
    mean, spread = features.double().mean(0), features.double().std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1)
    M, D = features.shape
    intercept_C = targets_MC.mean(0)
    targets_MC = targets_MC - intercept_C
    eye = torch.eye(min(M, D), dtype=torch.float64, device=features.device)
    if M <= D:  # M equations in place of D: few images, many features
        x_MD = (features - mean) / spread
        weights_DC = x_MD.T @ torch.linalg.solve(x_MD @ x_MD.T + penalty * D * eye, targets_MC)
    else:  # in portions: the standardised images of a large set would not fit
        gram_DD, moments_DC = penalty * D * eye, targets_MC.new_zeros(D, len(classes))
        for x, targets in zip(features.split(PORTION), targets_MC.split(PORTION), strict=True):
            x_bD = (x - mean) / spread
            gram_DD += x_bD.T @ x_bD
            moments_DC += x_bD.T @ targets
        weights_DC = torch.linalg.solve(gram_DD, moments_DC)
    return classes, torch.cat([(x - mean) / spread @ weights_DC + intercept_C for x in queries.split(PORTION)])
