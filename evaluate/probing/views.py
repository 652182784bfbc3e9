"""Training views for probes: random crops of the images through a frozen backbone, one pass for all heads.

Letters: B images, D width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.batches.sampler import StepSampler
from common.batches.samples import Samples, loader
from common.batches.views import Interpolation, View
from common.data import Images
from common.errors import Refusal
from common.features.extraction import pooled_blocks
from common.features.finite import IN_FP32, not_finite
from common.models import Backbone
from common.models.plan import TokenPlan
from common.training.precision import DTYPES

SCALE = [0.08, 1.0]  # RandomResizedCrop's own, which every protocol leaves as it is


def view(size: Sequence[int], interpolation: Interpolation) -> View:
    """RandomResizedCrop and horizontal flip, and nothing else."""
    return View(list(size), scale=list(SCALE), flip=0.5, jitter=0.0, grayscale=0.0, interpolation=interpolation)


@torch.no_grad()
def batches(
    backbone: Backbone,
    plan: TokenPlan | None,
    images: Images,
    *,
    batch: int,
    steps: int,
    seed: int,
    blocks: int,
    crop: View,
    precision: str = "fp32",
    workers: int = 0,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """`steps` batches of (features by name, labels (B,)) of random crops of labelled `images`.

    `backbone` is frozen, in eval mode, and is run where it is. An image that cannot be read is replaced by another,
    label and all.
    """
    samples = Samples(images, {"global": crop}, seed, backbone.channels, labelled=("probe",))
    sampler = StepSampler(len(images), batch, seed, steps)
    dtype, device = DTYPES[precision], backbone.mean.device
    for each in loader(samples, sampler, workers, pin=device.type == "cuda"):
        on_device = each.to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            parts = pooled_blocks(backbone, plan, on_device.views["global"], blocks)
        if (bad := not_finite(parts)).any():
            raise Refusal(
                f"the features of {int(bad.sum()):,} of {len(bad):,} crops of {images.where} are not finite: numbers "
                f"overflow; {IN_FP32}"
            )
        yield parts, on_device.draws["probe/label"]
