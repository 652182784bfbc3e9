"""Classifiers: a backbone with a linear layer on top, and what it says of images.

Letters: B images, D width, K classes.
"""

from collections.abc import Mapping

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.batches.unreadable import NO_LIMIT
from common.errors import Refusal
from common.features.extraction import Eye, shown
from common.features.finite import IN_FP32, not_finite
from common.models import Backbone
from common.models.plan import TokenPlan
from common.training.precision import DTYPES
from evaluate.job.evaluation import Evaluation


class Classifier(nn.Module):
    """A backbone, its pooled final-norm tokens, and a linear layer."""

    def __init__(self, backbone: Backbone, pooling: str, num_classes: int, plan: TokenPlan | None = None) -> None:
        super().__init__()
        if pooling != "mean" and not backbone.num_prefix_tokens:
            raise Refusal(f"--pool {pooling}: {backbone.config.name} has no class token; use --pool mean")
        self.backbone, self.pooling, self.plan = backbone, pooling, plan
        self.head = nn.Linear(backbone.width * (2 if pooling == "both" else 1), num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Classify uint8 (B, C, H, W): logits (B, K), float32."""
        return self.head(self.backbone(images, self.plan).pooled(self.pooling)).float()


@torch.no_grad()
def answers(
    classifiers: Mapping[str, nn.Module], job: Evaluation, most: int = 1
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Ask each classifier about the test images, each process about its share of them, none twice: (indices (n,) of
    those that could be read, in order; for each classifier its `most` likeliest classes (n, most), likeliest first).

    Raises Refusal, in every process, for scores that are not finite and for more unreadable images than are borne.
    """
    process = PartialState()
    mine = np.arange(process.process_index, len(job.test), process.num_processes)
    for classifier in classifiers.values():
        classifier.eval()
    found: list[dict[str, np.ndarray]] = []
    eye = Eye(job.size, job.crop, len(job.subject.description["mean"]), job.arguments.workers, NO_LIMIT)
    dtype = DTYPES[job.precision]
    for images, index in shown(job.test.subset(mine), eye):  # without a limit: all decide together
        images = images.to(job.device)
        with torch.autocast(job.device.type, dtype=dtype, enabled=dtype != torch.float32):
            scores = {name: each(images) for name, each in classifiers.items()}
        said = {name: likeliest(each, most).cpu().numpy() for name, each in scores.items()}
        found.append({"at": mine[index.numpy()], "bad": not_finite(scores).numpy(), **said})
    if process.num_processes > 1:
        found = gather_object(found)
    at = np.concatenate([np.zeros(0, int), *(some["at"] for some in found)])
    lost = len(job.test) - len(at)
    if lost > job.limit.allowed(len(job.test)):
        job.limit.refuse(lost, len(job.test), len(job.test), job.test.where, ["they were named above"])
    if bad := int(sum(some["bad"].sum() for some in found)):
        raise Refusal(
            f"the scores of {bad:,} of {len(at):,} images in {job.test.where} are not finite: numbers overflow; "
            f"{IN_FP32}"
        )
    order = np.argsort(at)
    return at[order], {name: np.concatenate([some[name] for some in found])[order] for name in classifiers}


def likeliest(scores: Tensor, most: int) -> Tensor:
    """The classes (B, most) with the highest `scores` (B, K), highest first; of equal ones, the first class leads."""
    first = scores.argmax(1, keepdim=True)
    if most == 1:
        return first
    return torch.cat([first, scores.scatter(1, first, -torch.inf).topk(most - 1, 1).indices], 1)
