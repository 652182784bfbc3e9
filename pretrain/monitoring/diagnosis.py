"""`--resume CHECKPOINT diagnose=true`: steps taken again from a checkpoint, to see what in them is not finite."""

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

from common.checkpoints import private
from common.checkpoints.stored_state import read_checkpoint
from common.errors import Refusal
from common.processes import group
from common.processes.stopping import StopSignal
from common.training.run import Run
from common.training.step import take_step
from common.training.tracking import Progress, Tracker
from pretrain.assemble import Parts, optimization_for
from pretrain.checkpoints import PretrainCheckpoints


class _Unwritten(PretrainCheckpoints):
    def keep_state(self, *_: Any) -> str:
        return ""


def repeat(folder: Path, last: int | None, parts: Parts, stop: StopSignal) -> int:
    """Take the steps after the checkpoint in `folder` again, up to step `last` (None: one), and say what in them is not
    finite; nothing is written. Every process takes part. Returns the exit status: 1 if a step was not finite, else 0.

    Raises Refusal where the checkpoint is damaged, or of other images.
    """
    if (damage := private.damage_of(folder)) is not None:
        raise Refusal(f"--resume {folder}: that checkpoint is damaged ({damage}); take another")
    stored = read_checkpoint(folder)
    start, parts = stored["step"], dataclasses.replace(parts, steps=stored.get("steps", parts.steps))
    last = start + 1 if last is None else last
    if not start < last <= parts.steps:
        raise Refusal(f"steps={last}: the checkpoint {folder} is of step {start}, of a run of {parts.steps} steps: "
                      f"expected {start + 1} to {parts.steps}")  # fmt: skip
    accelerator = group.accelerator(parts.config.precision)
    optimization = optimization_for(parts.config, parts.task, parts.steps)
    task, optimizer = accelerator.prepare(parts.task, optimization.optimizer)
    checkpoints = _Unwritten(folder.parents[1], parts, accelerator, "")
    checkpoints.put(stored, folder, task, optimizer, parts.steps)
    optimization = dataclasses.replace(optimization, optimizer=optimizer)
    accelerator.print(f"again      {folder}: step {start + 1}" + (f" to {last}" if last > start + 1 else "") +
                      f" of {parts.steps}; nothing is written")  # fmt: skip
    tracker = Tracker(checkpoints.folder, start, tensorboard=False, active=False)
    progress = Progress(parts.steps, start, accelerator.is_main_process)
    bad = 0
    with closing(progress), closing(iter(parts.feed.batches(start, accelerator.device))) as batches:
        run = Run(
            accelerator, task, optimization, checkpoints, batches, tracker, progress, stop, start, parts.steps
        )  # fmt: skip
        task.train()
        for step in range(start + 1, last + 1):
            outcome = take_step(run, step)
            bad += not outcome.taken
            for part, terms in enumerate(outcome.terms, 1):
                where = f" part {part}" if len(outcome.terms) > 1 else ""
                numbers = ", ".join(f"{name} {value!r}" for name, value in terms.items() if name.endswith("loss"))
                progress.say(f"step {step}{where}  {numbers}, gradient norm {outcome.norm!r}")
    return 1 if bad else 0
