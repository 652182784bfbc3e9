"""Classifiers: a backbone with a linear layer on top, or a whole network as timm has it, and what they say of images.

Letters: B images, D width, K classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.batches.unreadable import NO_LIMIT
from common.batches.views import height_width
from common.checkpoints import storage
from common.checkpoints.pretrained import TIMM, timm_model
from common.commands import command
from common.errors import Refusal
from common.features.classes import DENSE, ClassHead, class_logits
from common.features.extraction import Eye, shown
from common.features.finite import IN_FP32, not_finite, refuse_spoiled
from common.models import Backbone
from common.models.create import no_architecture
from common.models.plan import TokenPlan
from common.training.precision import DTYPES
from evaluate.job.evaluation import Evaluation
from evaluate.job.subjects import RANDOM, Subject, at_size, subject_of

OPTION = "--weights "  # the option that names a file


class Classifier(nn.Module):
    """A backbone, its pooled final-norm tokens, and a linear layer; `dense`: with another on its patches."""

    def __init__(
        self, backbone: Backbone, pooling: str, num_classes: int, plan: TokenPlan | None = None, dense: bool = False
    ) -> None:
        super().__init__()
        if pooling != "mean" and not backbone.num_prefix_tokens:
            raise Refusal(f"--pool {pooling}: {backbone.config.name} has no class token; use --pool mean")
        self.backbone, self.pooling, self.plan = backbone, pooling, plan
        width = backbone.width * (2 if pooling == "both" else 1)
        self.head = ClassHead(width, num_classes, 0.01, backbone.width if dense else None)

    @property
    def num_classes(self) -> int:
        """How many classes it tells apart."""
        return self.head.out_features

    def forward(self, images: Tensor) -> Tensor:
        """Classify uint8 (B, C, H, W): logits (B, K), float32."""
        features = self.backbone(images, self.plan)
        return class_logits(features, self.pooling, self.head.tensors, self.backbone.dense_share).float()


class Network(nn.Module):
    """A network of timm's with the classifier that was published with it, and what its images are normalised by."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model, self.num_classes = model, int(model.num_classes)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Classify uint8 (B, C, H, W) as the network does in eval: logits (B, K), float32."""
        return self.model((images.float() / 255 - self.mean) / self.std).float()


# ----------------------------------------------------------------------------------------------------------- loading


def load(ckpt: str, weights: str | None, size: Any, crop: float | None) -> tuple[Subject, Classifier | Network]:
    """Load --ckpt with its classifier, for images of `size` and test `crop` (None: its own): (what its reports say of
    it, the network in eval mode).

    ckpt: a run or file that has a head, or timm:NAME, whose classifier is the one in the file `weights` or, without
    one, in what timm publishes. Raises Refusal for what has no classifier.
    """
    subject: Subject
    network: Classifier | Network
    if ckpt.startswith(TIMM):
        subject, network = _published(ckpt.removeprefix(TIMM), weights, size, crop)
    else:
        subject, network = _trained(ckpt, weights, size, crop)
    refuse_spoiled(network.state_dict(), subject.name)
    return subject, network.eval()


def _trained(ckpt: str, weights: str | None, size: Any, crop: float | None) -> tuple[Subject, Classifier]:
    if ckpt == RANDOM:
        raise Refusal(f"--ckpt {ckpt}: nothing was trained, so there is no classifier; give a run that was finetuned")
    subject = subject_of(ckpt, None, weights)
    head = subject.head()
    if head is None:
        found = sorted((subject.folder / "finetune").glob(f"*/{storage.HEAD}"))
        there = f"one that was finetuned from it is --ckpt {found[0].parent}" if found else (
            f"finetune it first ({command('finetune', '--ckpt', ckpt)}), or judge its features "
            f"({command('linear', '--ckpt', ckpt)})"
        )  # fmt: skip
        raise Refusal(f"--ckpt {ckpt} is a backbone without a classifier: {there}")
    subject, note = at_size(subject, size, crop)
    if note:
        subject.description["loaded"] = [*subject.notes, note]
    pooling = subject.description["pooling"]
    network = Classifier(subject.backbone(), pooling, len(head["bias"]), subject.plan, DENSE[0] in head)
    network.head.load_state_dict(head)
    return subject, network


def _published(name: str, weights: str | None, size: Any, crop: float | None) -> tuple[Subject, Network]:
    asked = f"--ckpt {TIMM}{name}"
    if reason := no_architecture(name):
        raise Refusal(f"{asked}: {reason}")
    known: Any = timm.get_pretrained_cfg(name)
    config: dict[str, Any] = known.to_dict() if known is not None else {}
    h, w = height_width(size) if size is not None else config["input_size"][1:]
    resized: dict[str, Any] = {"img_size": (h, w)} if config.get("fixed_input_size") else {}
    try:
        model, notes, file = timm_model(name, weights, asked, OPTION, num_classes=1, **resized)
    except AssertionError as error:  # of timm, while it resizes what is in the file
        raise Refusal(f"{asked} at {h}x{w} pixels: {' '.join(str(error).split())}; choose another --size") from None
    config = model.pretrained_cfg
    if (interpolation := config.get("interpolation")) not in (None, "bicubic"):
        notes.append(f"published with {interpolation} interpolation, shown with bicubic")
    mean, std = list(config["mean"]), list(config["std"])
    network = Network(model, mean, std).eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, len(mean), h, w))
    except Exception as error:  # timm asserts and raises in many ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Refusal(f"{asked} cannot look at {h}x{w} pixels: {reason}; choose another --size") from None
    description = {
        "name": name, "kwargs": {"num_classes": network.num_classes, **resized}, "size": [h, w], "mean": mean,
        "std": std, "crop": crop or config.get("crop_pct") or 0.875, "position": "full", "training": {},
        "loaded": notes, "weights_sha256": storage.sha256(file),
    }  # fmt: skip
    folder = Path("runs", f"timm-{name}", "evaluate")
    return Subject(f"{TIMM}{name}", description, model.state_dict(), folder), network


# ----------------------------------------------------------------------------------------------------------- asking


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
