"""`--dry-run`: what a recipe resolves to and what it will cost, measured; nothing is written."""

import time
from itertools import islice
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import processes
from common.launch import active_pil
from common.models.backbone import count_parameters, set_attention
from common.optim import clip_gradients
from common.precision import DTYPES
from common.sampling import HELD_OUT_EPOCH, loader
from common.tracking import clock
from common.unreadable import LISTED
from pretrain.assemble import Parts, optimizer_for, schedule_for
from pretrain.command import written

CALIBRATION = 20  # steps, of which the first quarter warms up


def dry_run(parts: Parts) -> int:
    """Print options, parameters, FLOPs, memory and speed. Every process takes part. Returns the exit status."""
    config, process, images = parts.config, parts.process, parts.images
    accelerator = processes.accelerator(config.precision)
    accelerator.print(written(config, parts.reasons))
    accelerator.print(f"# {active_pil()}, {len(parts.train):,} images, {parts.per_epoch} steps an epoch")
    said = [f"{what}: {words}" for what, words in (("splits", images.note), ("not read", images.left_out)) if words]
    for note in said + parts.notes:
        accelerator.print(f"# {note}")
    for line in parts.look.lines("others take their places", most=LISTED) or ["all images looked at can be read"]:
        accelerator.print(line)
    accelerator.print(f"audit           {parts.audit.verdict}")
    share = config.batch // process.num_processes // config.accumulate
    flops, activations = cost(parts, share)
    trained, frozen = (
        count_parameters(parts.task),
        sum(p.numel() for p in parts.task.parameters() if not p.requires_grad),
    )
    fixed = trained * 16 + frozen * 4  # fp32 weight, gradient and AdamW's two moments
    accelerator.print(
        f"parameters      {trained:,} trained ({count_parameters(parts.task.backbone):,} in the "
        f"backbone), {frozen:,} frozen"
    )
    accelerator.print(
        f"FLOPs           {flops / 1e9:.3f} G per image, forward and backward; "
        f"{flops * config.batch / 1e12:.3f} T per step"
    )
    accelerator.print(
        f"memory          {(fixed + activations) / 2**20:,.0f} MiB per process: {fixed / 2**20:,.0f} "
        "weights, gradients, moments; "
        f"{activations / 2**20:,.0f} activations kept for {share} images"
    )
    speed, wait = _calibrate(parts, accelerator)
    accelerator.print(
        f"speed           {speed:,.1f} images/s over {CALIBRATION} steps, {wait:.1%} of it waiting for data"
    )
    accelerator.print(
        f"whole run       {parts.steps:,} steps, {clock(parts.steps * config.batch / speed)} "
        f"({parts.steps * config.batch / speed / 3600:.2f} h) without monitors"
    )
    return 0


def cost(parts: Parts, images: int) -> tuple[float, float]:
    """(FLOPs of forward and backward per image, bytes of activations kept for the backward pass of `images` images).

    Counted on two images with explicit attention, whose matrix products the counter sees, and scaled.
    """
    task, device = parts.task, parts.process.device
    batch = parts.samples.__getitems__([(HELD_OUT_EPOCH, i % len(parts.samples)) for i in range(2)]).to(device)
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    task.to(device).train()
    precision = parts.config.precision
    autocast = torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")
    attention = parts.config.model.attention
    counter = FlopCounterMode(display=False)
    with torch.random.fork_rng():
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
            task(batch)["loss"]
        set_attention(task.backbone, "explicit")
        with counter:
            task(batch)["loss"].backward()
    set_attention(task.backbone, attention)
    task.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 2, sum(kept.values()) / 2 * images


def _calibrate(parts: Parts, accelerator: Any) -> tuple[float, float]:
    """(images/s over all processes, share of the time spent waiting for data) of real steps on throw-away weights."""
    config = parts.config
    task, optimizer = accelerator.prepare(parts.task, optimizer_for(config, parts.task))
    schedule = schedule_for(config, parts.steps)
    for group in optimizer.param_groups:
        group["lr"] = schedule(0) * group["lr_scale"]
    parts.steps, steps = CALIBRATION, parts.steps
    batches = iter(
        loader(parts.samples, parts.sampler(0), config.loader.workers or 0, parts.process.device.type == "cuda")
    )
    parts.steps = steps
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    begun = waited = 0.0
    for step in range(CALIBRATION):
        if step == CALIBRATION // 4:
            begun, waited = time.perf_counter(), 0.0
        parts.task.begin_step(0.0, measured=False)
        before = time.perf_counter()
        parts_of_step = list(islice(batches, config.accumulate))
        waited += time.perf_counter() - before
        for batch in parts_of_step:
            accelerator.backward(task(batch.to(accelerator.device))["loss"] / config.accumulate)
        parts.task.before_update()
        float(clip_gradients(accelerator, parameters, config.optimizer.clip, config.optimizer.clip_by))
        optimizer.step()
        optimizer.zero_grad()
        parts.task.after_step(taken=True)
    seconds = time.perf_counter() - begun
    return (CALIBRATION - CALIBRATION // 4) * config.batch / seconds, waited / seconds
