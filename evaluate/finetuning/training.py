"""Finetuning with labels: what is trained, the loop over it, and the checkpoints from which it goes on.

Letters: B images, K classes.
"""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from common import config as configuration
from common.batches.sampler import generator
from common.batches.samples import Batch, loader
from common.batches.unreadable import NO_LIMIT, watch
from common.batches.views import View, height_width
from common.checkpoints import changes, pretrained, private, public, storage
from common.checkpoints.storage import HEAD
from common.checkpoints.stored_state import read_checkpoint, restore
from common.errors import Refusal
from common.features.extraction import digest, shown
from common.features.finite import IN_FP32, not_finite
from common.processes import collectives
from common.processes.stopping import StopSignal
from common.training import ema
from common.training.averages import Averages
from common.training.loop import fit
from common.training.optim import parameter_groups
from common.training.random_state import random_state
from common.training.tracking import Progress, Tracker
from evaluate.finetuning import mixing
from evaluate.finetuning.augment import RepeatedSampler, StrongSamples
from evaluate.finetuning.classifier import Classifier
from evaluate.finetuning.options import FinetuneConfig, num_steps, rate_of
from evaluate.job import recipes
from evaluate.job.evaluation import Evaluation
from evaluate.job.subjects import Subject

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


class Finetuning(nn.Module):
    """What is trained: a batch of images in, {"loss"} out. It is also `fit`'s observer: it counts steps, and moves the
    average of the weights, `average`, if there is one."""

    def __init__(self, classifier: Classifier, config: FinetuneConfig, seed: int, steps: int) -> None:
        super().__init__()
        self.classifier, self.config, self.seed, self.steps = classifier, config, seed, steps
        self.average: Any = ema.copy_of(classifier) if config.ema is not None else None
        self.done = 0  # steps before this one

    def train(self, mode: bool = True) -> "Finetuning":
        """As every module; the average stays in eval mode."""
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
        """Before a step, of which `progress` of the training is done."""
        self.done = round(progress * self.steps)

    def before_update(self) -> None:
        """Gradients are there."""

    def after_step(self, taken: bool) -> None:
        """The average follows, by timm's rule: from the first step on, and by a constant share."""
        if self.average is not None and taken:
            assert self.config.ema is not None
            ema.follow(self.average, self.classifier, self.config.ema)


# ------------------------------------------------------------------------------------------------- checkpoints


class Training:
    """The folder of one training: metrics.jsonl, tb/, state/ while it lasts, and at its end the finetuned backbone,
    its head and result.json."""

    classes: Sequence[str] = ()  # names, in the order of the logits

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], config: FinetuneConfig, accelerator: Accelerator
    ) -> None:
        self.folder, self.identity, self.config, self.accelerator = folder, dict(identity), config, accelerator
        # {"step", "epoch", "raw", "ema"}, of looks at the test images; of the last one also "images", see `judge`
        self.history: list[dict[str, Any]] = []
        self.averages = Averages()  # of the steps since the last line of the log
        self.version: Any = changes.VERSION  # of what is resumed
        self.saved = time.monotonic()
        self.earlier: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda identity: {}  # see recipes.earlier

    def result(self) -> list[dict[str, Any]] | None:
        """The history of a training that is done; None of one that is not. Raises Refusal if it was another one."""
        path = self.folder / "result.json"
        if not path.exists():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        self._refuse_other(content["identity"])
        return content["history"]

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`, by steps or by this process's clock."""
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        by_clock = minutes > 0 and time.monotonic() - self.saved > 60 * minutes
        return by_clock or (every is not None and step % every == 0)

    def save(self, step: int, task: nn.Module, optimizer: Any, tracker: Tracker) -> None:
        """Store everything that step + 1 depends on. Every process calls it."""
        accelerator = self.accelerator
        random, averages = [random_state()], [self.averages.state()]
        if accelerator.num_processes > 1:
            random, averages = gather_object(random), gather_object(averages)
        if accelerator.is_main_process:
            whole: Any = accelerator.unwrap_model(task)
            state = {
                "step": step,
                "identity": self.identity,
                "version": changes.VERSION,
                "history": self.history,
                "task": whole.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "random": random,
                "averages": averages,
            }
            tracker.sync()
            private.save_state(self.folder, step, state, lambda to: self.export(to, whole, step), self.config.keep)
        self.saved = time.monotonic()
        accelerator.wait_for_everyone()

    def export(self, folder: Path, task: Finetuning, step: int) -> None:
        """Write the finetuned backbone and its head: the average's, where there is one."""
        classifier = task.average if task.average is not None else task.classifier
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.head.state_dict().items()}
        storage.write_atomically(folder / HEAD, lambda aside: save_file(head, aside))
        training = {
            "finetuned": self.identity,
            "label_names": list(self.classes),
            "head_sha256": storage.sha256(folder / HEAD),
            "step": step,
            "data": self.identity["data"],
            "weights": "average" if task.average is not None else "last",
        }
        pooling = classifier.pooling
        public.export(folder, classifier.backbone, public.describe(classifier.backbone, "full", pooling, training))

    def resume(self, task: nn.Module, optimizer: Any, steps: int) -> int:
        """Go on from the newest whole checkpoint; returns its step, 0 if there is none. Raises Refusal for that of
        another training."""
        accelerator = self.accelerator
        folder = private.newest_whole(self.folder, lambda line: accelerator.print(f"warning: {line}"))
        if folder is None:
            return 0
        state = read_checkpoint(folder)
        identity, history = state.get("identity"), state.get("history")
        if not isinstance(identity, dict) or not isinstance(history, list):
            raise Refusal(f"{folder} is no checkpoint of such a training: remove it, or begin again with --overwrite")
        self._refuse_other(identity)
        self.history = list(history)
        self.version = changes.version_of(state)
        return restore(state, accelerator.unwrap_model(task), optimizer, self.averages, accelerator, steps, folder)

    def finish(self, task: Finetuning) -> None:
        """Keep the result and the newest weights; the first process calls it."""
        self.export(self.folder, task, self.history[-1]["step"])
        content = json.dumps({"identity": self.identity, "history": self.history}, indent=2) + "\n"
        storage.write_atomically(self.folder / "result.json", lambda aside: aside.write_text(content, encoding="utf-8"))
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    def _refuse_other(self, identity: Mapping[str, Any]) -> None:
        for name, now in {**self.identity, **self.earlier(identity)}.items():
            if identity.get(name) != now:
                raise Refusal(
                    f"--resume: {self.folder} was begun with {name} {identity.get(name)}, and now it is {now}: "
                    "give the same, or begin again with --overwrite"
                )


# --------------------------------------------------------------------------------------------------- the training


def train(
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
    weights = digest(subject.state) if subject.state is not None else None
    name = f"{'random' if subject.state is None else 'trained'}-seed{seed}"
    training = Training(folder / name, {**identity, "weights": weights, "seed": seed}, config, accelerator)
    training.classes = job.classes
    training.earlier = functools.partial(recipes.earlier, job)
    if job.arguments.resume and (history := training.result()) is not None:
        job.say("done before")
        return history, note
    classifier = Classifier(backbone, identity["pooling"], len(job.classes))
    task = Finetuning(classifier, config, seed, num_steps(config, len(job.train)))
    # layer decay spares what pretraining has learned: from scratch there is nothing to spare
    groups = parameter_groups(task, config.weight_decay, config.layer_decay if subject.state is not None else None)
    prepared, optimizer = accelerator.prepare(task, torch.optim.AdamW(groups, lr=0.0, betas=tuple(config.betas)))  # type: ignore[arg-type]
    torch.manual_seed(seed * 1_000_003 + accelerator.process_index)  # drop path differs between processes
    training.folder.mkdir(exist_ok=True)
    start = training.resume(prepared, optimizer, task.steps)
    if start:
        job.say(f"resumed after step {start} of {task.steps}")
    _run(job, config, training, task, prepared, optimizer, start, stop)
    if stop.received is None and accelerator.is_main_process:
        training.finish(task)
    accelerator.wait_for_everyone()
    accelerator.free_memory(prepared, optimizer)
    return training.history, note


def _run(
    job: Evaluation,
    config: FinetuneConfig,
    training: "Training",
    task: Finetuning,
    prepared: nn.Module,
    optimizer: Any,
    start: int,
    stop: StopSignal,
) -> None:
    """The steps of a training from `start` on."""
    accelerator, steps, seed = training.accelerator, task.steps, task.seed
    images, per_epoch, backbone = len(job.train), len(job.train) // config.batch, task.classifier.backbone
    main, rank, processes = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    sampler = RepeatedSampler(
        images, config.batch, seed, steps, start, rank, processes, config.accumulate, repeats=config.repeats
    )
    view = View(list(job.size), scale=[config.scale, 1.0], flip=config.flip, jitter=config.jitter, grayscale=0.0)
    if changed := changes.note(training.version, start, changes.sample_changes({"global": view})):
        job.say(f"warning: {changed}; for what it would have become, begin again with --overwrite")
    samples = StrongSamples(job.train, {"global": view}, seed, backbone.channels, labelled=[LABELS])
    samples.set_strength(config.rand_augment, config.erasing, backbone.config.mean, backbone.config.std)
    fresh = loader(samples, sampler, job.arguments.workers, pin=job.device.type == "cuda")
    schedule, _ = rate_of(config, steps, per_epoch)

    def look(step: int) -> dict[str, float | str]:
        judged = {"raw": task.classifier} | ({"ema": task.average} if task.average is not None else {})
        collectives.take_buffers(task)  # a BatchNorm in the stem
        shares, images_of = judge(judged, job, accelerator)
        for earlier in training.history:
            earlier.pop("images", None)
        training.history.append({"step": step, "epoch": step / per_epoch, **shares, "images": images_of})
        return {f"test/accuracy{'' if name == 'raw' else '_ema'}": share for name, share in shares.items()}

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
            schedule,
            steps=steps,
            start=start,
            accumulate=config.accumulate,
            clip=config.clip,
            log_every=config.log_every,
            images_per_step=config.batch,
            reports=[(max(1, round(config.judge_every * per_epoch)) if config.judge_every else steps, look)],
            track=tracker.write,
            save=lambda step: training.save(step, prepared, optimizer, tracker),
            save_due=training.due,
            stop=stop,
            progress=progress,
            observer=task,
            averages=training.averages,
        )
    if stop.received is None and (not training.history or training.history[-1]["step"] != steps):
        look(steps)  # a signal had ended the last one


@torch.no_grad()
def judge(
    classifiers: Mapping[str, Any], job: Evaluation, accelerator: Accelerator
) -> tuple[dict[str, float], dict[str, str]]:
    """Of each classifier on the test images, each process on its share of them, none counted twice: (accuracies, for
    each whether every image was right, and which images could be "read": bits in hexadecimal, see `bits`)."""
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    mine = np.arange(rank, len(job.test), processes)
    part = job.test.subset(mine)
    assert part.labels is not None
    labels = torch.from_numpy(part.labels).to(device)
    backbone = next(iter(classifiers.values())).backbone
    for classifier in classifiers.values():
        classifier.eval()
    found: list[dict[str, np.ndarray]] = []
    sight = {"size": backbone.size, "crop": job.crop, "channels": backbone.channels}
    for images, index in shown(part, **sight, workers=job.arguments.workers, limit=NO_LIMIT):  # all decide together
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
