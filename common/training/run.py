"""A training while it goes on: what is trained, on which batches, where its numbers go, and what may end it."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..batches.samples import Batch, Samples, loader
from ..batches.unreadable import Limit, Look, watch
from ..data import Images
from ..errors import Refusal
from ..processes.stopping import Stopped, StopSignal, at_once
from .checkpoints import Checkpoints
from .optim import Optimization
from .task import Outcome, Task
from .tracking import Progress, Tracker

SLOW = 5.0  # seconds of a step, from which on a signal ends it between its parts


@dataclass(frozen=True)
class Feed:
    """Where the batches of a training come from."""

    samples: Samples
    sampler: Callable[[int], Any]  # of this process, from a step on
    workers: int
    images: Images  # among which unreadable ones are counted
    limit: Limit
    look: Look

    def batches(self, start: int, device: torch.device) -> Any:
        """Return a loader of the batches after step `start`."""
        return loader(self.samples, self.sampler(start), self.workers, pin=device.type == "cuda")


@dataclass
class Run:
    """One training, from step `start` to `steps`."""

    accelerator: Accelerator
    task: nn.Module  # prepared
    optimization: Optimization  # its optimizer prepared
    checkpoints: Checkpoints
    batches: Iterator[Batch]
    tracker: Tracker
    progress: Progress
    stop: StopSignal
    start: int
    steps: int

    def __post_init__(self) -> None:
        self.module: Task = self.accelerator.unwrap_model(self.task)
        self.parameters = [parameter for parameter in self.task.parameters() if parameter.requires_grad]
        self.options, self.averages = self.checkpoints.options, self.checkpoints.averages
        self.skipped, self.skipped_in_a_row = int(getattr(self.module, "skipped", 0)), 0
        self.saved = self.logged = self.start  # the steps of the last checkpoint, and of the last line
        self.seconds = self.waited = self.longest = 0.0  # of the steps since the last line; of any step
        self.slow = True  # whether a signal is heeded within a step; of the first one nobody knows how long it takes

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        checkpoints: Checkpoints,
        task: Task,
        optimization: Optimization,
        feed: Feed,
        steps: int,
        seed: int,
        stop: StopSignal,
    ) -> Iterator["Run"]:
        """Prepare a task and its optimizer for all processes, go on from the newest checkpoint of its folder, if there
        is one, and open its log; all is closed at the end. Raises Refusal where the checkpoint is of another training.
        """
        accelerator, folder, options = checkpoints.accelerator, checkpoints.folder, checkpoints.options
        first = accelerator.is_main_process
        prepared, optimizer = accelerator.prepare(task, optimization.optimizer)
        torch.manual_seed(seed * 1_000_003 + accelerator.process_index)  # dropout differs between processes
        folder.mkdir(exist_ok=True)
        start = checkpoints.resume(prepared, optimizer, steps)
        tracker, progress = Tracker(folder, start, options.tensorboard, first), Progress(steps, start, first)
        fresh = feed.batches(start, accelerator.device)
        watched = watch(fresh, folder, feed.images, options.log_every, progress.say, feed.limit, feed.look)
        # Closed, the stream ends the loader's workers: they ignore signals, and an exit would wait for them for ever.
        with closing(watched) as batches, closing(progress), closing(tracker):
            optimization = replace(optimization, optimizer=optimizer)
            yield cls(accelerator, prepared, optimization, checkpoints, batches, tracker, progress, stop, start, steps)

    def is_logged(self, step: int) -> bool:
        """Whether `step` has a line in the log."""
        return step % self.options.log_every == 0 or step == self.steps

    # ------------------------------------------------------------------------------------------ within a step

    def heed(self, part: int) -> None:
        """Raises Stopped, in all processes, if a signal came to one of them before this part of a long step."""
        if part and self.slow and self.agree(self.stop.received is not None)[0]:
            raise Stopped(self.stop.received or signal.SIGTERM)

    @contextlib.contextmanager
    def interruptible(self, step: int) -> Iterator[None]:
        """Let a signal end what is inside, forward and backward of `step`, where steps are long and no other process
        waits for it: it raises Stopped."""
        alone = self.slow and self.accelerator.num_processes == 1
        lost = f"stopped in step {step}, of which nothing is kept; --resume begins it anew"
        with (
            self.stop.within(self.longest),
            at_once(alone, lost if self.saved == step - 1 else None),
            _through_python(self.task) if alone else contextlib.nullcontext(),
        ):
            yield

    def keep_bad_step(self, step: int, outcome: Outcome, random: dict[str, Any]) -> None:
        """Say why `step` was not taken; `random`: the random state that it began with. Every process calls it."""
        optimizer = self.optimization.optimizer
        self.checkpoints.keep_bad_step(step, self.task, optimizer, outcome, random, self.progress.say)

    # --------------------------------------------------------------------------------------------- after a step

    def count(self, step: int, outcome: Outcome) -> None:
        """Take what a step brought into the means of the next line. Raises Refusal after too many in a row that were
        not taken, or where the last ones were not."""
        self.averages.add(outcome.results, outcome.norm, outcome.taken)
        self.seconds, self.waited = self.seconds + outcome.seconds, self.waited + outcome.waited
        self.longest, self.slow = max(self.longest, outcome.seconds), outcome.seconds > SLOW
        self.skipped, self.skipped_in_a_row = (
            self.skipped + (not outcome.taken),
            0 if outcome.taken else self.skipped_in_a_row + 1,
        )
        in_a_row, ends = self.skipped_in_a_row, step == self.steps
        if in_a_row >= self.optimization.most_skipped or (ends and in_a_row > 1):
            raise Refusal(
                f"the loss or its gradient was not finite in {in_a_row} steps in a row up to step {step}: "
                "lower the learning rate, clip gradients, or use precision=bf16 or fp32; none of them was taken, and "
                "the last checkpoint is intact"
            )

    def line(self, step: int) -> dict[str, Any]:
        """Return the numbers of the steps since the last line: means over all parts and processes, rates, speed."""
        record = self.averages.means(self.accelerator)
        record |= {"lr": self.optimization.rate(step - 1), "skipped": self.skipped}
        if self.optimization.decay is not None:
            record["weight_decay"] = self.optimization.decay(step - 1)
        record["images_per_second"] = (step - self.logged) * self.options.batch / self.seconds
        record["data_wait"] = self.waited / self.seconds
        self.seconds, self.waited, self.logged = 0.0, 0.0, step
        return record

    def save(self, step: int) -> None:
        """Write a checkpoint of `step`, unless there is one. Every process calls it."""
        if step > self.saved:
            self.checkpoints.save(step, self.task, self.optimization.optimizer, self.tracker.sync)
            self.saved = step

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """For each wish, whether any process has it: a signal or a clock reaches one a step before the others."""
        if self.accelerator.num_processes == 1:
            return wishes
        flags = torch.tensor(wishes, dtype=torch.float32, device=self.accelerator.device)
        return tuple(value > 0 for value in self.accelerator.reduce(flags, "sum").tolist())  # type: ignore[union-attr]


def _through_python(task: nn.Module) -> AbstractContextManager[None]:
    """A context in which a backward pass comes by Python at every tensor that was saved for it, so that a signal is
    heard before it has ended. No number changes."""
    if any(module._compiled_call_impl is not None for module in task.modules()):
        return contextlib.nullcontext()  # compiled code takes no such hooks
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)  # type: ignore[return-value]
