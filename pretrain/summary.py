"""What a run says of itself before its first step and after its last."""

import math
import shlex
from pathlib import Path
from typing import Any

import timm
import torch

from common.batches.unreadable import BAD_FILES
from common.commands import command
from common.decoding.decode import jpeg_decoder_name
from common.models.backbone import count_parameters
from common.processes.launch import active_pil
from common.training import schedules
from common.training.ema import half_life
from common.training.tracking import held_out_summary, last_held_out, records_of
from pretrain.assemble import Parts
from pretrain.config import OptimizerConfig
from pretrain.monitoring.pace import expected


def trained_on(parts: Parts) -> str:
    """What is trained on, in words."""
    if parts.stream is None:
        return f"{len(parts.train):,} images to train on"
    return (
        f"a stream of {parts.stream.source.num_shards:,} shards to train on, {parts.stream.block:,} samples shuffled "
        f"at a time, without its first {len(parts.images):,}"
    )


def begun(parts: Parts, run: Path, start: int) -> str:
    """A few lines: data, model, objectives, device, and every automatic value with its reason."""
    config, backbone, process = parts.config, parts.task.backbone, parts.process
    h, w = backbone.grid
    classes = "no labels read" if parts.images.labels is None else "labels for monitors only"
    if readers := parts.task.labelled:
        classes = f"labels read by {', '.join(readers)}"
    device = (
        torch.cuda.get_device_name(process.device)
        if process.device.type == "cuda"
        else f"CPU, {config.threads} threads"
    )
    lines = [
        f"run        {run}" + (f"  (resumed after step {start})" if start else ""),
        f"data       {parts.images.where}: {trained_on(parts)}, {len(parts.held_out):,} held out ({classes})",
        *([f"splits     {parts.images.note}"] if parts.images.note else []),
        *([f"not read   {parts.images.left_out}"] if parts.images.left_out else []),
        *([f"cache      {parts.cache}"] if parts.cache else []),
        f"model      {config.model.name} at {backbone.size[0]}x{backbone.size[1]}, grid {h}x{w}, "
        f"{count_parameters(backbone) / 1e6:.2f} M parameters",
        *(_objective(name, weight, parts) for name, weight in parts.task.weights.items()),
        *(f"labels     {source}" for source in parts.samples.beside.values()),
        *([f"begins     {parts.init}"] if parts.init else []),
        *([f"teacher    {_momentum(parts)}; export {config.export}"] if parts.task.teacher else []),
        f"optimizer  AdamW, {_clipping(config.optimizer)}",
        *(f"audit      {name}: {found.verdict}: {found.reason}" for name, found in parts.audit.objectives.items()),
        *(
            []
            if len(parts.held_out)
            else ["monitors   none: nothing is held out (monitor.held_out), so no controls either"]
        ),
        f"length     {parts.steps:,} steps of {config.batch} images"
        + (f", {parts.per_epoch:,} steps an epoch" if parts.stream is None else ""),
        f"device     {process.num_processes} x {device}; {config.precision}, {config.model.attention} attention, "
        f"{config.loader.workers} loader workers each",
        f"versions   torch {torch.__version__}, timm {timm.__version__}, {decoders()}",
    ]
    lines += expected(parts)
    lines += [f"auto       {name} = {_value(config, name)}: {reason}" for name, reason in parts.reasons.items()]
    lines += [f"warning    {note}" for note in parts.notes]
    lines += parts.look.lines(f"others take their places (all are listed in {run / BAD_FILES})")
    return "\n".join(lines)


def decoders() -> str:
    """What decodes images here: the PIL, and the package that JPEGs are decoded by."""
    return f"{active_pil()}, JPEGs by {jpeg_decoder_name()}"


def _objective(name: str, weight: float, parts: Parts) -> str:
    passes = parts.task.objectives[name].passes.values()
    plans = dict.fromkeys(str(want.plan) for want in passes if want.grad)
    return f"objective  {weight:g} x {name}, {'; '.join(plans)}"


def _momentum(parts: Parts) -> str:
    momentum = parts.task.momentum
    images = half_life(momentum.at(0.0), parts.config.batch)
    return f"momentum {momentum}: at first a half-life of {images:,.0f} images"


def _clipping(options: OptimizerConfig) -> str:
    if not options.clip:
        return "gradients are not clipped"
    whose = "all gradients together (global)" if options.clip_by == "global" else "each tensor's gradient (per_tensor)"
    return f"clipped to a norm of {options.clip:g} of {whose}"


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return str(schedules.parse(config, name)) if isinstance(config, dict) else config


def ended(parts: Parts, run: Path, done: int, looking: float) -> str:
    """Where everything is and what to do next; `looking`: share of the time that measurements took."""
    if done < parts.steps:
        resume = command("pretrain", "--resume", run)
        how = f"stopped after step {done} of {parts.steps}, saved" if done else "stopped before the first step was done"
        return f"{how}; continue with: {resume}"
    return "\n".join(
        [
            f"done: {done} steps. The backbone is in {run}",
            *_measured(run, looking),
            *_classified(run),
            *_judged(parts, run),
            *([f"  how it went:     tensorboard --logdir {shlex.quote(str(run.parent))}"] * parts.config.tensorboard),
        ]
    )


def _measured(run: Path, looking: float) -> list[str]:
    """What was last measured on images held out."""
    last = last_held_out(run)
    if last is None or not (text := held_out_summary(last[1])):
        return []
    share = f" (looking at them took {looking:.0%} of the time)" if looking else ""
    return [f"  at step {last[0]}:  {text}{share}"]


def _classified(run: Path) -> list[str]:
    """A table of how often the classifier was right after the last step and at its best, if labels trained one."""
    records = list(records_of(run, "top1"))
    if not records:
        return []
    who = "average" if "top1/average" in records[0] else "weights"
    best = max(reversed(records), key=lambda record: record[f"top1/{who}"])
    lines = ["  classifier               step   top-1   top-5    loss"]
    for name, record in (("last", records[0]), ("best", best)):
        for each in ("weights", "average"):
            if f"top1/{each}" in record:
                top5 = f"{record[f'top5/{each}']:.1%}" if f"top5/{each}" in record else "-"
                loss = record[f"nll/{each}"]
                lines.append(f"  {name + ', ' + each:20} {record['step']:>8,} {record[f'top1/{each}']:>7.1%} {top5:>7} "
                             f"{math.nan if loss is None else loss:>7.4f}")  # fmt: skip
    return lines


def _judged(parts: Parts, run: Path) -> list[str]:
    """How to judge the backbone: with its own images where they have labels, else with others'."""
    if parts.images.has_labels and len(parts.images.classes or ()) > 1:
        return [
            f"  how good is it:  {command('knn', '--ckpt', run)}",
            f"                   {command('linear', '--ckpt', run)}",
        ]
    return [
        f"  what it sees:    {command('explain' if parts.task.backbone.plain else 'layers', '--ckpt', run)}",
        f"  how good is it:  {command('knn', '--ckpt', run)} --data LABELLED",
        "                   (these have no labels; LABELLED: a folder with a sub-folder for each class, or builtin)",
    ]
