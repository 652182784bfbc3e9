"""One optimizer step: forward and backward for each of its parts, then the weights."""

import contextlib
import math
import time

import torch
from torch import Tensor

from ..processes.stopping import Stopped
from .random_state import Snapshot
from .run import Run
from .task import Outcome


def take_step(run: Run, step: int) -> Outcome:
    """Take step number `step`, from 1. Every process takes part.

    A step whose loss in any process, or whose gradient, is not finite changes nothing, and `run` is told. Raises
    Stopped where a signal ended it; then it is as if it had not begun.
    """
    begun, waited = time.perf_counter(), 0.0
    accelerator, task, optimization = run.accelerator, run.module, run.optimization
    optimization.set_rates(step)
    task.begin_step((step - 1) / run.steps, run.is_logged(step))
    before, results = Snapshot(task), list[dict[str, Tensor]]()
    try:
        for part in range(optimization.accumulate):
            run.heed(part)
            asked = time.perf_counter()
            batch = next(run.batches)
            waited += time.perf_counter() - asked
            is_last = part == optimization.accumulate - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(run.task), run.interruptible(step):
                result = run.task(batch.to(accelerator.device))
                accelerator.backward(_nan_if_not_finite(result["loss"]) / optimization.accumulate)
            results.append({name: value.detach() for name, value in result.items()})
            run.progress.part(step, part + 1, optimization.accumulate)
    except Stopped:  # no gradient was taken: all is as after the step before
        optimization.optimizer.zero_grad()
        before.put_back()
        raise
    task.before_update()
    with run.stop.within(run.longest):
        norm = float(optimization.clip_gradients(accelerator, run.parameters))
    outcome = Outcome(results, norm, waited, 0.0)
    if outcome.taken:
        optimization.optimizer.step()
    else:
        before.put_back_buffers()
        run.keep_bad_step(step, outcome, before.random)
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # it has seen the gradient, and lowers the scale
    optimization.optimizer.zero_grad()
    task.after_step(outcome.taken)
    return Outcome(results, norm, waited, time.perf_counter() - begun)


def _nan_if_not_finite(loss: Tensor) -> Tensor:
    """Multiply a loss that is not finite by NaN, so that the gradient, summed over all processes, is NaN in each."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
