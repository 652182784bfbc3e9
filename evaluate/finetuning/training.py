"""Finetuning with labels: what is trained, what a training leaves behind, and how it is judged.

Letters: B images, K classes.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from common.batches import mixing
from common.batches.sampler import StepSampler
from common.batches.samples import Batch, Samples
from common.batches.views import FIRST_VIEW, View
from common.checkpoints import public
from common.checkpoints.storage import HEAD
from common.data import Images
from common.features.extraction import digest
from common.processes import collectives
from common.processes.stopping import StopSignal
from common.training import ema
from common.training.task import Task
from evaluate.finetuning.options import FinetuneConfig, num_steps, rate_of
from evaluate.job.classifier import Classifier, answers
from evaluate.job.evaluation import Evaluation
from evaluate.job.subjects import Subject
from evaluate.job.training import Training, train

LABELS = "classifier"  # the purpose under which a batch holds its labels


# ----------------------------------------------------------------------------------------------- what is trained


class Finetuning(Task):
    """What is trained: a batch of images in, {"loss"} out. It moves the average of the weights, `average`, if there is
    one."""

    def __init__(self, classifier: Classifier, config: FinetuneConfig) -> None:
        super().__init__()
        self.classifier, self.config = classifier, config
        self.average: Any = ema.copy_of(classifier) if config.ema is not None else None

    def train(self, mode: bool = True) -> "Finetuning":
        """Set the mode as every module does, except that the average stays in eval mode."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with smoothed, and on request mixed, labels."""
        labels = batch.draws[f"{LABELS}/label"]
        targets = F.one_hot(labels, self.classifier.head.out_features).float()
        if mixtures := batch.mixtures.get(FIRST_VIEW):
            targets = mixing.mix_targets(targets, mixing.shares(mixtures, len(labels)).to(labels.device))
        logits = self.classifier(batch.mixed().views[FIRST_VIEW])
        return {"loss": F.cross_entropy(logits, targets, label_smoothing=self.config.smoothing)}

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
        training = {
            "finetuned": self.identity,
            "label_names": list(self.job.classes),
            "head_sha256": public.write_weights(folder / HEAD, classifier.head),
            "step": step,
            "data": self.identity["data"],
            "precision": self.job.precision,
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
        shares, images_of = judge(judged, self.job)
        for earlier in self.history:
            earlier.pop("images", None)
        epoch = step / (len(self.job.train) // self.config.batch)
        self.history.append({"step": step, "epoch": epoch, **shares, "images": images_of})
        return {f"test/accuracy{'' if name == 'raw' else '_ema'}": share for name, share in shares.items()}


def begins_with(description: Mapping[str, Any], pooling: str, classes: Sequence[str]) -> bool:
    """Whether a checkpoint's classifier fits these classes, in their order, on features pooled so."""
    names = description.get("training", {}).get("label_names")
    return description.get("pooling") == pooling and names == list(classes)


def view_of(config: FinetuneConfig, size: Sequence[int]) -> View:
    """How a training crop is made."""
    return View(
        list(size),
        scale=[config.scale, 1.0],
        flip=config.flip,
        jitter=config.jitter,
        grayscale=0.0,
        auto_augment=config.rand_augment,
        erasing=config.erasing,
        mixup=config.mixup,
        cutmix=config.cutmix,
        mix=config.mix,
        switch=config.switch,
        mix_by=config.mix_by,
    )


def finetune(
    job: Evaluation,
    config: FinetuneConfig,
    subject: Subject,
    images: Images,
    seed: int,
    identity: Mapping[str, Any],
    folder: Path,
    accelerator: Accelerator,
    stop: StopSignal,
) -> tuple[list[dict[str, Any]], str]:
    """Finetune `subject` in a folder of its own below `folder`: (the looks at the test images, the last one last; what
    was added to the backbone). `images`: those of `job.train`, however they are read; `identity`: what all trainings of
    this report have in common."""
    backbone, note = subject.for_finetuning(seed, drop_path_rate=config.drop_path)
    classifier = Classifier(backbone, identity["pooling"], len(job.classes))
    head = subject.head() if subject.state is not None else None
    if head is not None and begins_with(subject.description, identity["pooling"], job.classes):
        classifier.head.load_state_dict({name: head[name] for name in ("weight", "bias")})
        note = "; ".join(
            filter(None, (note, "begins with the checkpoint's own classifier, as the classes are its own"))
        )
    steps, per_epoch = num_steps(config, len(job.train)), len(job.train) // config.batch
    task = Finetuning(classifier, config)
    weights = digest(subject.state) if subject.state is not None else None
    name = f"{'random' if weights is None else 'trained'}-seed{seed}"
    identity = {**identity, "weights": weights, "seed": seed}
    training = FinetuneTraining(folder / name, job, config, identity, task, accelerator)
    if job.arguments.resume and (history := training.result()) is not None:
        job.say("done before")
        return history, note
    view = view_of(config, job.size)
    mean, std = backbone.config.mean, backbone.config.std
    samples = Samples(images, {FIRST_VIEW: view}, seed, backbone.channels, labelled=[LABELS], colours=(mean, std))
    sampler = functools.partial(StepSampler, repeats=config.repeats)
    every = max(1, round(config.judge_every * per_epoch)) if config.judge_every else steps
    train(training, samples, sampler, rate_of(config, steps, per_epoch)[0], steps, every, stop)
    return training.history, note


def judge(classifiers: Mapping[str, Any], job: Evaluation) -> tuple[dict[str, float], dict[str, str]]:
    """Judge each classifier on the test images, see `answers`: (accuracies, for each whether every image was right, and
    which images could be "read": bits in hexadecimal, see `bits`)."""
    at, said = answers(classifiers, job)
    assert job.test.labels is not None
    whole = {name: np.zeros(len(job.test), bool) for name in ("read", *classifiers)}
    whole["read"][at] = True
    for name, classes in said.items():
        whole[name][at] = classes[:, 0] == job.test.labels[at]
    shares = {name: float(whole[name].sum() / len(at)) for name in classifiers}
    return shares, {name: np.packbits(each).tobytes().hex() for name, each in whole.items()}


def bits(text: str, count: int) -> np.ndarray:
    """(count,) bool of hexadecimal digits that `judge` made."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)
