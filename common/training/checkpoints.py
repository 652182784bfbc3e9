"""The checkpoints of a training: what all kinds of training store, when, and how they go on from it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..checkpoints import changes, private
from ..checkpoints.stored_state import read_checkpoint, restore
from .averages import Averages
from .random_state import random_state
from .task import Outcome, non_finite_terms, reason


class TrainingOptions(Protocol):
    """Options of every recipe that a training has."""

    batch: int  # images of a step, over all processes
    log_every: int
    tensorboard: bool
    checkpoint_every: int | None
    checkpoint_minutes: float
    keep: int


class Checkpoints:
    """Writes and reads the checkpoints of one training. Each kind of training says what it stores beside the weights,
    and what it exports for others."""

    def __init__(self, folder: Path, options: TrainingOptions, accelerator: Accelerator) -> None:
        self.folder, self.options, self.accelerator = folder, options, accelerator
        self.averages = Averages()  # of the steps since the last line of the log
        self.saved = time.monotonic()

    # ----------------------------------------------------------------------------------- what a kind of training says

    def facts(self) -> dict[str, Any]:
        """Return what a state holds beside weights, moments and random states: numbers, texts, containers of them."""
        raise NotImplementedError

    def own(self, step: int) -> dict[str, Any]:
        """Return what this process alone knows of what follows `step`: numbers, texts, containers of them."""
        return {}

    def accept(self, folder: Path, state: dict[str, Any]) -> None:
        """Take over the facts of a `state` in `folder`. Raises Refusal if it is of another training."""
        raise NotImplementedError

    def export(self, folder: Path, task: Any, step: int) -> None:
        """Write to `folder` what others read of the `task`."""
        raise NotImplementedError

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of `step` is kept for good."""
        return False

    def keep_state(self, step: int, state: Callable[[], dict[str, Any]], task: Any) -> str:
        """Keep the state before `step`, which was not finite; returns what to say of it."""
        return ""

    def seen(self) -> str:
        """Return what this process saw of a bad step, beside its losses."""
        return ""

    # ------------------------------------------------------------------------------------------------ all trainings

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`, by steps or by this process's clock."""
        every, minutes = self.options.checkpoint_every, self.options.checkpoint_minutes
        by_clock = minutes > 0 and time.monotonic() - self.saved > 60 * minutes
        return by_clock or (every is not None and step % every == 0) or self.is_milestone(step)

    def save(self, step: int, task: nn.Module, optimizer: Any, sync: Callable[[], None]) -> None:
        """Store everything that step + 1 depends on, after `sync` has written the log. Every process calls it."""
        accelerator = self.accelerator
        mine = {"random": random_state(), "averages": self.averages.state(), "own": self.own(step)}
        everybody = self._gathered(mine)
        if accelerator.is_main_process:
            sync()
            module = accelerator.unwrap_model(task)
            state = self.state(step, module, optimizer, everybody)
            export, milestone = (lambda to: self.export(to, module, step)), self.is_milestone(step)
            private.save_state(self.folder, step, state, export, self.options.keep, milestone)
        self.saved = time.monotonic()
        accelerator.wait_for_everyone()

    def state(self, step: int, task: nn.Module, optimizer: Any, processes: list[dict[str, Any]]) -> dict[str, Any]:
        """Return all that step + 1 depends on, and its line of the log. `task` is unwrapped; `processes`: "random",
        "averages" and "own" of each."""
        scaler = self.accelerator.scaler
        return {
            "step": step,
            "version": changes.VERSION,
            **self.facts(),
            "task": task.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": [process["random"] for process in processes],
            "averages": [process["averages"] for process in processes],
            "own": [process["own"] for process in processes],
        }

    def resume(self, task: nn.Module, optimizer: Any, steps: int) -> int:
        """Go on from the newest whole checkpoint; returns its step, 0 if there is none. Raises Refusal for that of
        another training."""
        folder = private.newest_whole(self.folder, lambda line: self.accelerator.print(f"warning: {line}"))
        return 0 if folder is None else self.put(read_checkpoint(folder), folder, task, optimizer, steps)

    def put(self, state: dict[str, Any], folder: Path, task: nn.Module, optimizer: Any, steps: int) -> int:
        """Put a state, read from a checkpoint's `folder`, into a prepared task and its optimizer; returns its step."""
        self.accept(folder, state)
        module = self.accelerator.unwrap_model(task)
        return restore(state, module, optimizer, self.averages, self.accelerator, steps, folder)

    def keep_bad_step(
        self,
        step: int,
        task: nn.Module,
        optimizer: Any,
        outcome: Outcome,
        random: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Say why `step` was not taken and, where a kind of training does, keep what it began with, of which `random`
        is the random state. An overflow of fp16 is no accident: the scale of the loss is halved until there is none."""
        mine = {"terms": outcome.terms, "seen": self.seen(), "random": random, "averages": self.averages.state()}
        mine["own"] = self.own(step - 1)
        everybody = self._gathered(mine)
        terms, scaler = [process["terms"] for process in everybody], self.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1 and not non_finite_terms(terms):
            return
        if self.accelerator.is_main_process:
            module = self.accelerator.unwrap_model(task)
            kept = self.keep_state(step, lambda: self.state(step - 1, module, optimizer, everybody), module)
            lines = dict.fromkeys(process["seen"] for process in everybody)
            words = [f"step {step} was not taken: {reason(terms, outcome.norm)}", *lines, kept]
            say("; ".join(filter(None, words)))

    def _gathered(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        return gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]
