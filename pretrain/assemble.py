"""From options to parts: data, backbone, task, optimizer; and a reason for every automatic value."""

import dataclasses
import functools
import math
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from common import precision
from common.data import Images, open_data
from common.launch import ROOT, set_threads, usable_cores
from common.models import create
from common.optim import cosine, parameter_groups
from common.sampling import HELD_OUT_EPOCH, Samples, StepSampler, held_out
from pretrain.audit import Verdict, cached_audit
from pretrain.config import PretrainConfig, num_steps
from pretrain.task import Pretraining, build, resolve


@dataclass
class Parts:
    """Everything a run is made of, before it is prepared for many processes."""

    config: PretrainConfig  # no value in it is automatic any more
    process: PartialState
    images: Images
    train: Images
    held_out: Images
    task: Pretraining
    audit: Verdict
    samples: Samples
    steps: int
    per_epoch: int
    reasons: dict[str, str] = field(default_factory=dict)  # automatic value -> where it came from

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identity of the images, wherever they are kept."""
        return self.images.fingerprint()

    def sampler(self, start: int) -> StepSampler:
        """The sampler of this process from step `start` on."""
        config, process = self.config, self.process
        return StepSampler(
            len(self.train), config.batch, config.seed, self.steps, start,
            process.process_index, process.num_processes, config.accumulate,
        )  # fmt: skip

    def agree_on(self, run: Path | None) -> Path:
        """The run folder that the first process made, known to all."""
        shared = [run]
        if self.process.num_processes > 1:
            broadcast_object_list(shared)
        assert shared[0] is not None
        return shared[0]

    def held_out_samples(self) -> Samples:
        """The held-out images, cropped and drawn for as the training images are."""
        return Samples(self.held_out, self.samples.views, 0, self.samples.channels, self.task.draws)


def assemble(config: PretrainConfig, process: PartialState) -> Parts:
    """Build the parts of a run and settle every automatic value. Writes nothing. Raises Refusal for what cannot be."""
    config = dataclasses.replace(config)
    reasons: dict[str, str] = {}
    config.threads, reasons["threads"] = set_threads(config.threads)
    precision.refuse_impossible(config.precision, process.device)
    chosen = resolve(config.objectives)
    config.objectives = {name: dataclasses.asdict(options) for name, options in chosen.items()}

    images = open_data(config.data, "train", config.data_root)
    kept, out = held_out(len(images), config.monitor.held_out, config.monitor.most)
    train, aside = images.subset(kept), images.subset(out)

    torch.manual_seed(config.seed)
    backbone = create(config.model, config.views["global"].size)
    task = build(backbone, chosen, config.views)
    verdict = _audit(config, task, process)
    samples = Samples(train, config.views, config.seed, backbone.channels, task.draws)

    sampler = StepSampler(
        len(train), config.batch, config.seed, 1, 0, process.process_index, process.num_processes, config.accumulate
    )
    steps = num_steps(config, sampler.per_epoch)
    if config.steps is None:
        reasons["steps"] = f"{config.epochs:g} epochs of {sampler.per_epoch} steps"
        config.steps = steps
    elif config.epochs is not None:
        reasons["epochs"] = f"steps={config.steps} goes before epochs={config.epochs:g}"
        config.epochs = None
    if config.loader.workers is None:
        cores = usable_cores() // max(1, process.num_processes)
        config.loader.workers = max(1, min(8, cores - 1))
        reasons["loader.workers"] = f"{cores} usable cores per process, one of them for training"
    if config.monitor.every is None:
        config.monitor.every = math.ceil(steps / 10)
        reasons["monitor.every"] = "ten times in the run"
    _settle_precision(config, task, samples, process, reasons)
    if Path(config.data).exists():
        config.data = str(Path(config.data).resolve())
    return Parts(config, process, images, train, aside, task, verdict, samples, steps, sampler.per_epoch, reasons)


def _audit(config: PretrainConfig, task: Pretraining, process: PartialState) -> Verdict:
    """Whether the answer is in the question, found by the first process. Raises Leak unless the recipe allows it."""
    verdict: list[Any] = [None]
    if process.is_main_process:
        verdict = [cached_audit(config, task, functools.partial(print, flush=True))]
    if process.num_processes > 1:
        broadcast_object_list(verdict)
    if not config.allow_leak:
        verdict[0].refuse()
    return verdict[0]


def _settle_precision(
    config: PretrainConfig, task: Pretraining, samples: Samples, process: PartialState, reasons: dict[str, str]
) -> None:
    """Replace precision=auto and model.attention=auto by what the first process measures to be fastest."""
    if config.precision != "auto" and config.model.attention != "auto":
        return
    chosen: list[Any] = [None]
    if process.is_main_process:
        batch = samples.__getitems__([(HELD_OUT_EPOCH, i % len(samples)) for i in range(min(config.batch, 32))])
        task.to(process.device).train()
        chosen = [
            precision.choose(
                config.precision,
                config.model.attention,
                task,
                lambda: task(batch.to(process.device))["loss"],
                process.device,
            )
        ]
        task.to("cpu")
    if process.num_processes > 1:
        broadcast_object_list(chosen)
    was = config.precision, config.model.attention
    config.precision, config.model.attention, why = chosen[0]
    precision.set_attention(task.backbone, config.model.attention)
    for name, before in zip(("precision", "model.attention"), was, strict=True):
        if before == "auto":
            reasons[name] = why


def optimizer_for(config: PretrainConfig, task: Pretraining) -> torch.optim.Optimizer:
    """AdamW over the trained parameters."""
    groups = parameter_groups(task, config.optimizer.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(config.optimizer.betas), fused=True)  # type: ignore[arg-type]


def schedule_for(config: PretrainConfig, steps: int) -> Any:
    """Learning rate of a 0-based step: lr * batch / 256, warmed up, then cosine."""
    scale = config.batch / 256
    warmup = round(config.optimizer.warmup * steps)
    peak, floor = config.optimizer.lr * scale, config.optimizer.min_lr * scale
    return lambda step: cosine(step, steps, warmup, peak, floor)


def commit() -> str | None:
    """The commit of the checkout this code runs from, with "+" if it was changed; None outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "-uno", "--", ".", ":!RESULTS.md"]  # rows are added while runs go on
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")
