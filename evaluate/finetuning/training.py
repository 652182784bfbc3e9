"""Finetuning with labels: what is trained, what a training leaves behind, and how it is judged.

Letters: B images, K classes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from common.batches.sampler import generator
from common.batches.samples import Batch
from common.batches.unreadable import NO_LIMIT
from common.batches.views import View, height_width
from common.checkpoints import pretrained, public, storage
from common.checkpoints.storage import HEAD
from common.errors import Refusal
from common.features.extraction import Eye, digest, shown
from common.features.finite import IN_FP32, not_finite
from common.processes import collectives
from common.processes.stopping import StopSignal
from common.training import ema
from common.training.task import Task
from evaluate.finetuning import mixing
from evaluate.finetuning.augment import RepeatedSampler, StrongSamples
from evaluate.finetuning.classifier import Classifier
from evaluate.finetuning.options import FinetuneConfig, num_steps, rate_of
from evaluate.job.evaluation import Evaluation
from evaluate.job.subjects import Subject
from evaluate.job.training import Training, train

LABELS = "classifier"  # the purpose under which a batch holds its labels


# ----------------------------------------------------------------------------------------------- what is trained


def at_size(subject: Subject, size: Any, crop: float | None) -> tuple[Subject, str]:
    """(the subject for images of another size and test crop, what was done to it).

    A learned absolute position embedding is resized, bicubic; sines and cosines are those of the new grid. Raises
    Refusal where the architecture does not take the size.
    """
    about = subject.description
    new = list(height_width(size)) if size is not None else list(about["size"])
    changed = about | {"size": new, "crop": about.get("crop", 0.875) if crop is None else crop}
    if new == list(about["size"]):
        return dataclasses.replace(subject, description=changed), ""
    try:
        backbone = public.build(changed)
    except Refusal as refusal:  # it names the options of pretraining
        reason = str(refusal).partition("; change views.global.size")[0]
        raise Refusal(f"--size {'x'.join(map(str, new))}: {reason}; choose another --size") from None
    changed |= {"grid": list(backbone.grid)}
    if subject.state is None:
        return dataclasses.replace(subject, description=changed), ""
    old = tuple(about.get("grid") or public.build(about).grid)
    state, own = dict(subject.state), backbone.model.state_dict()
    note = f"{about['size'][0]}x{about['size'][1]} px before, {new[0]}x{new[1]} now"
    if "pos_embed" in own and (about["position"] == "none" or about.get("position_embedding") == "sincos"):
        state["pos_embed"] = own["pos_embed"]  # the former is to be replaced by a fresh one, of this shape
    elif pretrained.resized(state, own, old, backbone.grid):
        (h, w), (new_h, new_w) = old, backbone.grid
        note += f": position embedding resized from {h}x{w} to {new_h}x{new_w} patches"
    return dataclasses.replace(subject, description=changed, state=state), note


class Finetuning(Task):
    """What is trained: a batch of images in, {"loss"} out. It counts steps, and moves the average of the weights,
    `average`, if there is one."""

    def __init__(self, classifier: Classifier, config: FinetuneConfig, seed: int, steps: int) -> None:
        super().__init__()
        self.classifier, self.config, self.seed, self.steps = classifier, config, seed, steps
        self.average: Any = ema.copy_of(classifier) if config.ema is not None else None
        self.done = 0  # steps before this one

    def train(self, mode: bool = True) -> "Finetuning":
        """Set the mode as every module does, except that the average stays in eval mode."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with smoothed, and on request mixed, labels.

        What is mixed, and how, is a function of (seed, step): neither processes nor an interruption change it.
        """
        config, images = self.config, batch.views["global"]
        labels = batch.draws[f"{LABELS}/label"]
        targets = F.one_hot(labels, self.classifier.head.out_features).float()
        if config.mixup > 0 or config.cutmix > 0:
            rng, (h, w) = generator(self.seed, 0, self.done, "mixing"), images.shape[-2:]
            mixture = mixing.draw(rng, h, w, config.mixup, config.cutmix, config.mix, config.switch)
            images, targets = mixing.mix(images, targets, mixture)
        return {"loss": F.cross_entropy(self.classifier(images), targets, label_smoothing=config.smoothing)}

    def begin_step(self, progress: float, measured: bool) -> None:
        """Note which step it is: what is mixed depends on it."""
        self.done = round(progress * self.steps)

    def after_step(self, taken: bool) -> None:
        """Let the average follow, by timm's rule: from the first step on, and by a constant share."""
        if self.average is not None and taken:
            assert self.config.ema is not None
            ema.follow(self.average, self.classifier, self.config.ema)


# --------------------------------------------------------------------------------------------------- the training


class FinetuneTraining(Training):
    """The folder of one finetuning: at its end it holds the finetuned backbone, its head and result.json."""

    def export(self, folder: Path, task: Finetuning, step: int) -> None:
        """Write the finetuned backbone and its head: the average's, where there is one."""
        classifier = task.average if task.average is not None else task.classifier
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.head.state_dict().items()}
        storage.write_atomically(folder / HEAD, lambda aside: save_file(head, aside))
        training = {
            "finetuned": self.identity,
            "label_names": list(self.job.classes),
            "head_sha256": storage.sha256(folder / HEAD),
            "step": step,
            "data": self.identity["data"],
            "weights": "average" if task.average is not None else "last",
        }
        pooling = classifier.pooling
        public.export(folder, classifier.backbone, public.describe(classifier.backbone, "full", pooling, training))

    def look(self, step: int) -> dict[str, float | str]:
        """Judge the classifier, and the average, on all test images; of the last look the history says which were
        right, see `judge`."""
        task: Finetuning = self.task
        judged = {"raw": task.classifier} | ({"ema": task.average} if task.average is not None else {})
        collectives.take_buffers(task)  # a BatchNorm in the stem
        shares, images_of = judge(judged, self.job, self.accelerator)
        for earlier in self.history:
            earlier.pop("images", None)
        epoch = step / (len(self.job.train) // self.config.batch)
        self.history.append({"step": step, "epoch": epoch, **shares, "images": images_of})
        return {f"test/accuracy{'' if name == 'raw' else '_ema'}": share for name, share in shares.items()}


def finetune(
    job: Evaluation,
    config: FinetuneConfig,
    subject: Subject,
    seed: int,
    identity: Mapping[str, Any],
    folder: Path,
    accelerator: Accelerator,
    stop: StopSignal,
) -> tuple[list[dict[str, Any]], str]:
    """Finetune `subject` in a folder of its own below `folder`: (the looks at the test images, the last one last; what
    was added to the backbone). `identity`: what all trainings of this report have in common."""
    backbone, note = subject.for_finetuning(seed, drop_path_rate=config.drop_path)
    classifier = Classifier(backbone, identity["pooling"], len(job.classes))
    steps, per_epoch = num_steps(config, len(job.train)), len(job.train) // config.batch
    task = Finetuning(classifier, config, seed, steps)
    weights = digest(subject.state) if subject.state is not None else None
    name = f"{'random' if weights is None else 'trained'}-seed{seed}"
    identity = {**identity, "weights": weights, "seed": seed}
    training = FinetuneTraining(folder / name, job, config, identity, task, accelerator)
    if job.arguments.resume and (history := training.result()) is not None:
        job.say("done before")
        return history, note
    view = View(list(job.size), scale=[config.scale, 1.0], flip=config.flip, jitter=config.jitter, grayscale=0.0)
    samples = StrongSamples(job.train, {"global": view}, seed, backbone.channels, labelled=[LABELS])
    samples.set_strength(config.rand_augment, config.erasing, backbone.config.mean, backbone.config.std)
    sampler = functools.partial(RepeatedSampler, repeats=config.repeats)
    every = max(1, round(config.judge_every * per_epoch)) if config.judge_every else steps
    train(training, samples, sampler, rate_of(config, steps, per_epoch)[0], steps, every, stop)
    return training.history, note


@torch.no_grad()
def judge(
    classifiers: Mapping[str, Any], job: Evaluation, accelerator: Accelerator
) -> tuple[dict[str, float], dict[str, str]]:
    """Judge each classifier on the test images, each process on its share of them, none counted twice: (accuracies,
    for each whether every image was right, and which images could be "read": bits in hexadecimal, see `bits`)."""
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    mine = np.arange(rank, len(job.test), processes)
    part = job.test.subset(mine)
    assert part.labels is not None
    labels = torch.from_numpy(part.labels).to(device)
    backbone = next(iter(classifiers.values())).backbone
    for classifier in classifiers.values():
        classifier.eval()
    found: list[dict[str, np.ndarray]] = []
    eye = Eye(backbone.size, job.crop, backbone.channels, job.arguments.workers, NO_LIMIT)  # all decide together
    for images, index in shown(part, eye):
        images, known = images.to(device), labels[index.to(device)]
        with accelerator.autocast():
            scores = {name: each(images) for name, each in classifiers.items()}
        right = {name: (each.argmax(1) == known).cpu().numpy() for name, each in scores.items()}
        found.append({"at": mine[index.numpy()], "bad": not_finite(scores).numpy(), **right})
    if processes > 1:
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
    whole = {"read": np.zeros(len(job.test), bool)} | {name: np.zeros(len(job.test), bool) for name in classifiers}
    whole["read"][at] = True
    for name in classifiers:
        whole[name][at] = np.concatenate([some[name] for some in found])
    shares = {name: float(whole[name].sum() / len(at)) for name in classifiers}
    return shares, {name: np.packbits(each).tobytes().hex() for name, each in whole.items()}


def bits(text: str, count: int) -> np.ndarray:
    """(count,) bool of hexadecimal digits that `judge` made."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)
