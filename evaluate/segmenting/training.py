"""What a segmentation trains: its loss, its checkpoints, and the steps. The loop is `common.training.loop.fit`.

Letters: B images, K classes, H x W pixels of a crop.
"""

import dataclasses
import functools
import io
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from common import config as configuration
from common.batches.sampler import StepSampler
from common.batches.samples import FIRST_VIEW, Batch, loader
from common.batches.unreadable import Limit, watch
from common.checkpoints import public, storage
from common.features.extraction import digest
from common.processes.stopping import StopSignal
from common.training.loop import fit
from common.training.optim import parameter_groups
from common.training.tracking import Progress, Tracker
from evaluate.finetuning.training import Training
from evaluate.job import recipes
from evaluate.job.evaluation import Evaluation
from evaluate.job.subjects import Subject
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


class Segmentation(nn.Module):
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


class SegmentationRun(Training):
    """The folder of one training: as of a finetuning, and at its end the decoder, and the counts of all test images."""

    counts: dict[str, np.ndarray] | None = None  # of the last look at the test images
    read: np.ndarray | None = None

    def save(self, step: int, task: Any, optimizer: Any, tracker: Tracker) -> None:
        """As of a finetuning; nothing of raw pixels, whose training is begun again in a minute."""
        if not isinstance(self.accelerator.unwrap_model(task).segmenter.backbone, RawPatches):
            super().save(step, task, optimizer, tracker)

    def export(self, folder: Path, task: Any, step: int) -> None:
        """Write the backbone, unless it is raw pixels, and the decoder that belongs to it."""
        segmenter = task.segmenter
        if not isinstance(segmenter.backbone, RawPatches):
            training = {"segmentation": self.identity, "step": step, "data": self.identity["data"]}
            position = segmenter.plan.position if segmenter.plan is not None else "full"
            about = public.describe(segmenter.backbone, position, "mean", training)
            public.export(folder, segmenter.backbone, about)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in segmenter.decoder.state_dict().items()}
        storage.write_atomically(folder / DECODER, lambda aside: save_file(state, aside))

    def finish(self, task: Any) -> None:
        """Keep the counts, the result and the newest weights; the first process calls it."""
        assert self.counts is not None and self.read is not None
        held = io.BytesIO()
        np.savez_compressed(held, **self.counts, **{READ: self.read})  # type: ignore[arg-type]
        storage.write_atomically(self.folder / COUNTS, lambda aside: aside.write_bytes(held.getvalue()))
        super().finish(task)

    def look(self, job: Evaluation, segmenter: Any, view: View, step: int) -> dict[str, float | str]:
        """Judge all test images after `step`; what a line of metrics.jsonl says of them."""
        channels = segmenter.backbone.channels
        self.counts, self.read = judge(segmenter, _scenes(job.test), view, channels, self.accelerator, *_reading(job))
        total = self.counts[SINGLE].sum(0)
        values = {"mIoU": mean_iou(total), "pixel_accuracy": pixel_accuracy(total)}
        self.history.append({"step": step, **values})
        return {f"test/{name}": value for name, value in values.items()}

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
    training = SegmentationRun(folder / name, about, config, accelerator)  # type: ignore[arg-type]
    training.earlier = functools.partial(recipes.earlier, job)
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
    if job.arguments.resume and (history := training.done()) is not None:
        job.say("done before")
        assert training.counts is not None and training.read is not None
        training.restore(segmenter)
        return Found(training.counts, training.read, segmenter.to(accelerator.device), view, history), note
    segmenter.decoder = together(segmenter.decoder, accelerator.device.type == "cuda")
    _train(job, config, training, Segmentation(segmenter, config.auxiliary), view, seed, stop)
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


def _train(
    job: Evaluation,
    config: SegmentationConfig,
    training: SegmentationRun,
    task: Segmentation,
    view: View,
    seed: int,
    stop: StopSignal,
) -> None:
    """The steps of a training, from where it was interrupted."""
    accelerator, steps = training.accelerator, config.steps
    main, backbone = accelerator.is_main_process, task.segmenter.backbone
    # layer decay spares what pretraining has learned: from scratch there is nothing to spare
    spare = config.layer_decay if training.identity["weights"] is not None and not is_frozen(config) else None
    groups = parameter_groups(task, config.weight_decay, spare)
    prepared, optimizer = accelerator.prepare(task, torch.optim.AdamW(groups, lr=0.0, betas=tuple(config.betas)))  # type: ignore[arg-type]
    torch.manual_seed(seed * 1_000_003 + accelerator.process_index)  # dropout differs between processes
    training.folder.mkdir(exist_ok=True)
    start = training.resume(prepared, optimizer, steps)
    if start:
        job.say(f"resumed after step {start} of {steps}")
    sampler = StepSampler(
        len(job.train), config.batch, seed, steps, start, accelerator.process_index, accelerator.num_processes,
        config.accumulate,
    )  # fmt: skip
    samples = Crops(job.train, {}, seed, backbone.channels).prepare(view.window, config, backbone.config.mean)
    fresh = loader(samples, sampler, job.arguments.workers, pin=job.device.type == "cuda")

    def look(step: int) -> dict[str, float | str]:
        return training.look(job, task.segmenter, view, step)

    progress = Progress(steps, start, main)
    tracker = Tracker(training.folder, start, config.tensorboard, main)
    if not start:
        tracker.text("recipe", configuration.as_yaml(config), 0)
    watched = watch(fresh, training.folder, job.train, config.log_every, progress.say, job.limit, job.look)
    with closing(watched) as batches, closing(progress), closing(tracker):
        fit(
            accelerator,
            prepared,
            batches,
            optimizer,
            rate_of(config)[0],
            steps=steps,
            start=start,
            accumulate=config.accumulate,
            clip=config.clip,
            log_every=config.log_every,
            images_per_step=config.batch,
            reports=[(config.judge_every or steps, look)],
            track=tracker.write,
            save=lambda step: training.save(step, prepared, optimizer, tracker),
            save_due=training.due,
            stop=stop,
            progress=progress,
            averages=training.averages,
        )
    if stop.received is None and training.counts is None:  # killed between its last step and its end
        look(steps)
    if stop.received is None and main:
        training.finish(task)
    accelerator.wait_for_everyone()
    accelerator.free_memory(prepared, optimizer)
