"""What a segmentation trains, its loss, and what a training leaves behind.

Letters: B images, K classes, H x W pixels of a crop.
"""

import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from common.batches.sampler import StepSampler
from common.batches.samples import Batch
from common.batches.unreadable import Limit
from common.batches.views import FIRST_VIEW
from common.checkpoints import public, storage
from common.features.extraction import digest
from common.processes.stopping import StopSignal
from common.training.task import Task
from evaluate.job.evaluation import Evaluation
from evaluate.job.subjects import Subject
from evaluate.job.training import Training, train
from evaluate.segmenting import heads
from evaluate.segmenting.data import IGNORED, Scenes
from evaluate.segmenting.inference import SINGLE, View, judge, view_of
from evaluate.segmenting.neighbors import Neighbors, RawPatches, collect
from evaluate.segmenting.norm import together
from evaluate.segmenting.options import SegmentationConfig, is_frozen, rate_of
from evaluate.segmenting.scores import mean_iou, pixel_accuracy
from evaluate.segmenting.transforms import MASK, Crops

DECODER = "decoder.safetensors"  # beside the backbone it belongs to
COUNTS = "counts.npz"  # of every test image, at the end
READ = "read"  # in it: which images could be read


@dataclasses.dataclass
class Found:
    """What was found of one row and seed: counts int64 (n, C, 3) by how images were tested, which of the n test images
    could be read, and the model."""

    counts: dict[str, np.ndarray]
    read: np.ndarray
    model: nn.Module
    view: View
    history: list[dict[str, Any]]


class Segmentation(Task):
    """A batch in, {"loss"} out: cross-entropy of the logits, resized to the crop, and of the auxiliary head's."""

    def __init__(self, segmenter: nn.Module, auxiliary: float) -> None:
        super().__init__()
        self.segmenter: Any = segmenter
        self.auxiliary = auxiliary

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Means over all pixels, in which ignored ones count as 0 (mmsegmentation's habit, and equal for any number of
        processes and parts); "pixel_accuracy" as a pair, right and known pixels, as parts have unequally many."""
        mask = batch.draws[MASK].long()
        output = self.segmenter(batch.views[FIRST_VIEW])
        logits = _resized(output["logits"], mask)
        loss = _cross_entropy(logits, mask)
        known = mask != IGNORED
        right = (logits.detach().argmax(1) == mask) & known
        found = {"loss": loss, "pixel_accuracy": torch.stack([right.sum(), known.sum()])}
        if "auxiliary" in output:
            found["auxiliary"] = _cross_entropy(_resized(output["auxiliary"], mask), mask)
            found["loss"] = loss + self.auxiliary * found["auxiliary"]
        return found


def _resized(logits: Tensor, mask: Tensor) -> Tensor:
    return F.interpolate(logits.float(), tuple(mask.shape[-2:]), mode="bilinear", align_corners=False)


def _cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction="sum") / mask.numel()


class SegmentationTraining(Training):
    """The folder of one training: at its end it holds the backbone, the decoder, and the counts of all test images."""

    counts: dict[str, np.ndarray] | None = None  # of the last look at the test images
    read: np.ndarray | None = None

    def __init__(self, *given: Any, view: View) -> None:
        super().__init__(*given)
        self.view, self.learns_all = view, not is_frozen(self.config)

    def save(self, step: int, task: Any, optimizer: Any, sync: Callable[[], None]) -> None:
        """Write a checkpoint; none of raw pixels, whose training is begun again in a minute."""
        if not isinstance(self.task.segmenter.backbone, RawPatches):
            super().save(step, task, optimizer, sync)

    def export(self, folder: Path, task: Any, step: int) -> None:
        """Write the backbone, unless it is raw pixels, and the decoder that belongs to it."""
        segmenter = task.segmenter
        if not isinstance(segmenter.backbone, RawPatches):
            training = {"segmentation": self.identity, "step": step, "data": self.identity["data"]}
            position = segmenter.plan.position if segmenter.plan is not None else "full"
            about = public.describe(segmenter.backbone, position, "mean", training)
            public.export(folder, segmenter.backbone, about)
        public.write_weights(folder / DECODER, segmenter.decoder)

    def finish(self) -> None:
        """Keep the counts, the result and the newest weights; the first process calls it."""
        assert self.counts is not None and self.read is not None
        held = io.BytesIO()
        np.savez_compressed(held, **self.counts, **{READ: self.read})  # type: ignore[arg-type]
        storage.write_atomically(self.folder / COUNTS, lambda aside: aside.write_bytes(held.getvalue()))
        super().finish()

    def look(self, step: int) -> dict[str, float | str]:
        """Judge all test images."""
        segmenter, job = self.task.segmenter, self.job
        channels = segmenter.backbone.channels
        self.counts, self.read = judge(
            segmenter, _scenes(job.test), self.view, channels, self.accelerator, *_reading(job)
        )
        total = self.counts[SINGLE].sum(0)
        values = {"mIoU": mean_iou(total), "pixel_accuracy": pixel_accuracy(total)}
        self.history.append({"step": step, **values})
        return {f"test/{name}": value for name, value in values.items()}

    def is_judged(self, step: int) -> bool:
        """Whether the last look is at hand: no checkpoint keeps its counts."""
        return self.counts is not None

    def done(self) -> list[dict[str, Any]] | None:
        """The looks of a training that is done, with its counts; None of one that is not."""
        history = self.result()
        if history is not None:
            with np.load(self.folder / COUNTS, allow_pickle=False) as arrays:
                self.counts = {name: arrays[name] for name in arrays.files if name != READ}
                self.read = arrays[READ]
        return history

    def restore(self, segmenter: Any) -> None:
        """Give a segmenter the weights of a training that is done."""
        where = str(self.folder)
        if not isinstance(segmenter.backbone, RawPatches):
            trained, _, _ = public.load_backbone(self.folder)
            public.load_exactly(segmenter.backbone.model, trained.model.state_dict(), where)
        public.load_exactly(segmenter.decoder, load_file(self.folder / DECODER), where)


def answer(
    job: Evaluation,
    config: SegmentationConfig,
    row: str,
    subject: Subject,
    seed: int,
    identity: Mapping[str, Any],
    folder: Path,
    accelerator: Accelerator,
    stop: StopSignal,
) -> tuple[Found | None, str]:
    """(what is found of `subject` as `row`, "subject", "random" or "pixels"; what was added to its backbone). None if
    it was stopped."""
    note = ""
    if is_frozen(config):
        backbone: Any = subject.backbone(seed)
    else:
        backbone, note = subject.for_finetuning(seed, drop_path_rate=config.drop_path)
    if row == "pixels":
        backbone = RawPatches(backbone)
    view = view_of(config, backbone)
    plan = subject.plan if is_frozen(config) else None
    if config.head == "knn":
        model = _neighbors(job, config, backbone, plan, view, seed, accelerator)
        counts, read = judge(model, _scenes(job.test), view, backbone.channels, accelerator, *_reading(job))
        return Found(counts, read, model, view, []), note
    name = f"{ {'subject': 'trained'}.get(row, row) }-seed{seed}"
    weights = digest(subject.state) if subject.state is not None and row == "subject" else None
    about = {**identity, "weights": weights, "seed": seed}
    torch.manual_seed(seed)  # the head is the same, whatever was drawn for the backbone
    segmenter = heads.make(
        config.head,
        backbone,
        len(job.classes),
        plan=plan,
        frozen=is_frozen(config),
        blocks=config.blocks,
        channels=config.channels,
        dropout=config.dropout,
    )
    task = Segmentation(segmenter, config.auxiliary)
    training = SegmentationTraining(folder / name, job, config, about, task, accelerator, view=view)
    if job.arguments.resume and (history := training.done()) is not None:
        job.say("done before")
        assert training.counts is not None and training.read is not None
        training.restore(segmenter)
        return Found(training.counts, training.read, segmenter.to(accelerator.device), view, history), note
    segmenter.decoder = together(segmenter.decoder, accelerator.device.type == "cuda")
    samples = Crops(job.train, {}, seed, backbone.channels).prepare(view.window, config, backbone.config.mean)
    steps = config.steps
    train(training, samples, StepSampler, rate_of(config)[0], steps, config.judge_every or steps, stop)
    if stop.received is not None:
        return None, note
    assert training.counts is not None and training.read is not None
    return Found(training.counts, training.read, segmenter, view, training.history), note


def _neighbors(
    job: Evaluation,
    config: SegmentationConfig,
    backbone: Any,
    plan: Any,
    view: View,
    seed: int,
    accelerator: Accelerator,
) -> Neighbors:
    backbone = backbone.to(accelerator.device)
    scenes = _scenes(job.train)
    bank, labels = collect(backbone, plan, scenes, view, config.bank, seed, accelerator, *_reading(job)[:2])
    return Neighbors(backbone, plan, bank, labels, config.k, config.temperature).to(accelerator.device)


def _scenes(images: Any) -> Scenes:
    assert isinstance(images, Scenes)
    return images


def _reading(job: Evaluation) -> tuple[int, Any, Limit]:
    return job.arguments.workers, job.say, job.limit
