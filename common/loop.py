"""The only loop that trains a backbone."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .errors import Refusal
from .launch import StopSignal
from .tracking import Progress

MOST_SKIPPED = 50  # non-finite gradients in a row (fp16's loss scale needs a dozen to settle) before a run gives up

Report = tuple[int, Callable[[int], dict[str, float | str]]]  # (every so many steps, what to measure then)


def fit(
    accelerator: Accelerator,
    task: nn.Module,
    batches: Iterator[Any],
    optimizer: Any,
    schedule: Callable[[int], float],
    *,
    steps: int,
    start: int = 0,
    accumulate: int = 1,
    clip: float = 0.0,
    log_every: int = 10,
    images_per_step: int,
    reports: Sequence[Report] = (),
    track: Callable[[int, dict[str, Any]], None],
    save: Callable[[int], None],
    save_due: Callable[[int], bool],
    stop: StopSignal,
    progress: Progress,
    before_step: Callable[[float], None] | None = None,
) -> int:
    """Train from step `start` (already done) to `steps`; returns the last step done, earlier if `stop` was signalled.

    task(batch) -> {"loss", statistics}; schedule(step) -> learning rate of the 0-based optimizer step, which each
    group multiplies by its lr_scale; before_step(share of the training that is done), if given; a report's numbers join
    the record that `track` gets. A step whose gradient norm is not finite changes nothing and is counted. Raises
    Refusal after MOST_SKIPPED of those in a row.
    """
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    skipped = skipped_in_a_row = 0
    seconds = waited = 0.0
    since = start
    task.train()
    for step in range(start + 1, steps + 1):
        logged = step % log_every == 0 or step == steps
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = schedule(step - 1) * group["lr_scale"]
        if before_step is not None:
            before_step((step - 1) / steps)
        results: list[dict[str, Tensor]] = []
        for part in range(accumulate):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            last = part == accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(task):
                result = task(batch.to(accelerator.device))
                accelerator.backward(result["loss"] / accumulate)
            results.append({name: value.detach() for name, value in result.items()})
        norm = float(accelerator.clip_grad_norm_(parameters, clip or math.inf))  # type: ignore[arg-type]
        taken = math.isfinite(norm)  # of the all-reduced gradient: every process decides alike
        if taken or accelerator.scaler is not None:  # the fp16 scaler skips by itself, and must hear of it
            optimizer.step()
        optimizer.zero_grad()
        skipped, skipped_in_a_row = skipped + (not taken), 0 if taken else skipped_in_a_row + 1
        if skipped_in_a_row >= MOST_SKIPPED:
            raise Refusal(
                f"the gradient was not finite in {MOST_SKIPPED} steps in a row up to step {step}: lower optimizer.lr, "
                "clip gradients, or use precision=bf16 or fp32; the last checkpoint is intact"
            )
        seconds += time.perf_counter() - begun

        record: dict[str, Any] = {}
        if logged:
            record = _mean(accelerator, results)
            record |= {"lr": schedule(step - 1), "gradient_norm": norm, "skipped": skipped}
            record["images_per_second"] = (step - since) * images_per_step / seconds
            record["data_wait"] = waited / seconds
            seconds, waited, since = 0.0, 0.0, step
            progress.show(step, record)
        for every, measure in reports:
            if step % every == 0 or step == steps:
                record |= measure(step)
                task.train()
        if record:
            track(step, record)
        progress.step()
        stopping, saving = _agree(accelerator, stop.received is not None, save_due(step))
        if stopping or saving or step == steps:
            save(step)
        if stopping:
            return step
    return max(start, steps)


def _mean(accelerator: Accelerator, results: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Each number averaged over the accumulated parts and all processes."""
    table = torch.stack([torch.stack([value.float() for value in result.values()]) for result in results]).mean(0)
    table = accelerator.reduce(table, "mean")
    return dict(zip(results[0], table.tolist(), strict=True))  # type: ignore[union-attr]


def _agree(accelerator: Accelerator, stopping: bool, saving: bool) -> tuple[bool, bool]:
    """What any process wants, all do: a signal or a clock reaches one of them a step before the others."""
    if accelerator.num_processes == 1:
        return stopping, saving
    flags = torch.tensor([stopping, saving], dtype=torch.float32, device=accelerator.device)
    return tuple(value > 0 for value in accelerator.reduce(flags, "sum").tolist())  # type: ignore[union-attr, return-value]
