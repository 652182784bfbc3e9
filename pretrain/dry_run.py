"""`--dry-run`: what a recipe resolves to and what it will cost, measured; nothing is written."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.batches.sampler import HELD_OUT_EPOCH
from common.batches.unreadable import LISTED
from common.models.backbone import count_parameters
from common.models.create import set_attention
from common.processes import group
from common.training.precision import DTYPES
from common.training.tracking import clock, patient
from pretrain.assemble import Parts, optimization_for
from pretrain.command import written
from pretrain.monitoring.pace import advice, step_seconds, verdict_on_data
from pretrain.summary import decoders, trained_on

CALIBRATION, FEWEST = 20, 3  # steps, of which the first quarter warms up; at least so many
BUDGET = 30.0  # seconds that they take, about


def dry_run(parts: Parts, heed: Callable[[], None] = lambda: None) -> int:
    """Print options, parameters, FLOPs, memory and speed. Every process takes part. Returns the exit status.

    `heed` is called between steps and parts, and may raise.
    """
    config, process, images = parts.config, parts.process, parts.images
    accelerator = group.accelerator(config.precision)
    accelerator.print(written(config, parts.reasons))
    accelerator.print(f"# {decoders()}, {trained_on(parts)}, {parts.per_epoch} steps an epoch")
    said = [f"{what}: {words}" for what, words in (("splits", images.note), ("not read", images.left_out)) if words]
    for note in said + parts.notes:
        accelerator.print(f"# {note}")
    for line in parts.look.lines("others take their places", most=LISTED) or ["all images looked at can be read"]:
        accelerator.print(line)
    if parts.cache:
        accelerator.print(f"cache           {parts.cache}")
    accelerator.print(f"audit           {parts.audit.verdict}")
    share = config.batch // process.num_processes // config.accumulate
    begun = time.perf_counter()
    flops, activations = cost(parts, share)
    if parts.pace is None:  # of three passes of two images: roughly
        parts.pace = (time.perf_counter() - begun) / 2
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
    heed()
    speed, wait, how = _calibrate(parts, accelerator, heed)
    accelerator.print(f"speed           {speed:,.1f} images/s over {how}, {wait:.1%} of it waiting for data")
    accelerator.print(f"verdict         {verdict_on_data(parts, wait)}")
    accelerator.print(
        f"whole run       {parts.steps:,} steps, {clock(parts.steps * config.batch / speed)} "
        f"({parts.steps * config.batch / speed / 3600:.2f} h) without monitors"
    )
    for line in advice(parts, config.batch / speed):
        accelerator.print(f"advice          {line}")
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


def _calibrate(parts: Parts, accelerator: Any, heed: Callable[[], None]) -> tuple[float, float, str]:
    """(images/s over all processes, share of the time spent waiting for data, what was timed) of real steps on
    throw-away weights: 20 of them or, where that would take more than a minute, fewer, and of fewer images."""
    config, unit = parts.config, parts.process.num_processes * parts.config.accumulate
    expected = step_seconds(parts)
    batch = config.batch
    if expected is not None and FEWEST * expected > BUDGET:
        batch = max(2 * unit, int(config.batch * BUDGET / (FEWEST * expected)) // unit * unit)
        batch = min(batch, config.batch)
    optimization = optimization_for(config, parts.task, parts.steps)
    task, optimizer = accelerator.prepare(parts.task, optimization.optimizer)
    optimization.set_rates(1)
    timed = dataclasses.replace(parts, config=dataclasses.replace(config, batch=batch), steps=CALIBRATION)
    batches = iter(timed.feed.batches(0, accelerator.device))
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    seconds, waits = list[float](), list[float]()
    say = functools.partial(accelerator.print, flush=True)
    with patient(f"timing          up to {CALIBRATION} steps of {batch} images", say):
        # several processes have to take equally many
        alone = parts.process.num_processes == 1
        while len(seconds) < CALIBRATION and not (alone and len(seconds) >= FEWEST and sum(seconds) > BUDGET):
            begun, waited = time.perf_counter(), 0.0
            parts.task.begin_step(0.0, measured=False)
            for _ in range(config.accumulate):
                before = time.perf_counter()
                part = next(batches).to(accelerator.device)
                waited += time.perf_counter() - before
                accelerator.backward(task(part)["loss"] / config.accumulate)
                heed()
            parts.task.before_update()
            float(optimization.clip_gradients(accelerator, parameters))
            optimizer.step()
            optimizer.zero_grad()
            parts.task.after_step(taken=True)
            seconds.append(time.perf_counter() - begun)
            waits.append(waited)
    first = len(seconds) // 4 or 1  # those before warm up
    total = sum(seconds[first:])
    return (len(seconds) - first) * batch / total, sum(waits[first:]) / total, f"{len(seconds)} steps of {batch} images"
