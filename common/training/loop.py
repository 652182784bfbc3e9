"""The only loop that trains a backbone."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import Refusal
from ..processes.stopping import Stopped, StopSignal, at_once
from .averages import Averages
from .optim import clip_gradients
from .random_state import undo_later
from .tracking import Progress

SLOW = 5.0  # seconds of a step, from which on a signal ends it between its parts
MOST_SKIPPED = 50  # steps in a row that are not finite, before a run gives up; fp16's scale needs a dozen

Report = tuple[int, Callable[[int], dict[str, float | str]]]  # (every so many steps, what to measure then)


class Observer(Protocol):
    """Who is told of every optimizer step."""

    def begin_step(self, progress: float, measured: bool) -> None:
        """Before it: the share of the training that is done, and whether the step's statistics will be logged."""

    def before_update(self) -> None:
        """Its gradients are there, reduced over all processes, and not clipped yet."""

    def after_step(self, taken: bool) -> None:
        """After it; `taken` is False where the gradient was not finite and nothing changed."""


class Recorder(Protocol):
    """Who keeps what a step began with, in case it goes wrong."""

    def begin(self) -> None:
        """Before a step."""

    def keep(self, step: int, results: Sequence[Mapping[str, Tensor]], norm: float, batches: Sequence[Any]) -> None:
        """After a step that was not finite; nothing has changed yet. Every process calls it."""


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
    clip_by: str = "global",
    weight_decay: Callable[[int], float] | None = None,
    most_skipped: int = MOST_SKIPPED,
    skipped: int = 0,
    averages: Averages | None = None,
    log_every: int = 10,
    images_per_step: int,
    reports: Sequence[Report] = (),
    track: Callable[[int, dict[str, Any]], None],
    save: Callable[[int], None],
    save_due: Callable[[int], bool],
    stop: StopSignal,
    progress: Progress,
    observer: Observer | None = None,
    recorder: Recorder | None = None,
    read: Callable[[int, Mapping[str, Any]], Mapping[str, str]] | None = None,
) -> int:
    """Train from step `start` (already done) to `steps`; returns the last step done, earlier if `stop` was signalled.

    task(batch) -> {"loss", statistics}, each averaged over the parts and processes of a step (`Averages`): a loss whose
    count differs between them divides by the count of the whole step. schedule(step) -> learning rate of the 0-based
    optimizer step, which each group multiplies by its lr_scale; weight_decay(step), if given, for the groups that
    decay; `clip_by`: see `clip_gradients`; read(step, a logged record) -> words that join it; a report's numbers join
    the record that `track` gets.

    Every `log_every` steps a line is logged, of means over the steps since the last one (see `Averages`; `averages`:
    those of a checkpoint between two lines).

    A signal ends a wait for a batch, or a step that is long (several processes: between its parts), as if the step had
    not begun; or the report, which lacks numbers.

    A step whose loss on any process, or whose gradient, is not finite changes nothing, is counted from `skipped` on,
    and is given to the recorder. Raises Refusal after `most_skipped` of those in a row, or where the last ones are.
    """
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    skipped_in_a_row = 0
    seconds = waited = longest = 0.0
    since = saved = start
    averages = averages or Averages()
    slow = True  # whether a signal is heeded within a step; of the first one nobody knows how long it takes
    task.train()
    for step in range(start + 1, steps + 1):
        logged = step % log_every == 0 or step == steps
        begun = begun_step = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = schedule(step - 1) * group["lr_scale"]
            if weight_decay is not None and group["decays"]:
                group["weight_decay"] = weight_decay(step - 1)
        if observer is not None:
            observer.begin_step((step - 1) / steps, logged)
        if recorder is not None:
            recorder.begin()
        results: list[dict[str, Tensor]] = []
        used: list[Any] = []
        undo = undo_later(task) if accumulate > 1 or slow else None
        try:
            for part in range(accumulate):
                if part and slow and _agree(accelerator, stop.received is not None)[0]:
                    raise Stopped(stop.received or signal.SIGTERM)
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                last = part == accumulate - 1
                alone = slow and accelerator.num_processes == 1
                with (
                    contextlib.nullcontext() if last else accelerator.no_sync(task),
                    stop.within(longest),
                    at_once(
                        alone,
                        f"stopped in step {step}, of which nothing is kept; --resume begins it anew"
                        if saved == step - 1
                        else None,
                    ),
                    _through_python(task) if alone else contextlib.nullcontext(),
                ):
                    result = task(batch.to(accelerator.device))
                    accelerator.backward(_spread(result["loss"]) / accumulate)
                results.append({name: value.detach() for name, value in result.items()})
                used.append(batch)
                progress.part(step, part + 1, accumulate)
        except Stopped:  # no gradient was taken: all is as after the step before
            optimizer.zero_grad()
            if undo is not None:
                undo()
            if step - 1 > saved:
                save(step - 1)
            return step - 1
        if observer is not None:
            observer.before_update()
        with stop.within(longest):
            norm = float(clip_gradients(accelerator, parameters, clip, clip_by))
        taken = math.isfinite(norm)  # of the all-reduced gradient: every process decides alike
        if not taken and recorder is not None:
            recorder.keep(step, results, norm, used)
        averages.add(results, norm, taken)
        if taken:
            optimizer.step()
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # it has seen the gradient, and lowers the scale
        optimizer.zero_grad()
        if observer is not None:
            observer.after_step(taken)
        skipped, skipped_in_a_row = skipped + (not taken), 0 if taken else skipped_in_a_row + 1
        if skipped_in_a_row >= most_skipped or (step == steps and skipped_in_a_row > 1):
            raise Refusal(
                f"the loss or its gradient was not finite in {skipped_in_a_row} steps in a row up to step {step}: "
                "lower the learning rate, clip gradients, or use precision=bf16 or fp32; none of them was taken, and "
                "the last checkpoint is intact"
            )
        seconds += time.perf_counter() - begun
        longest = max(longest, time.perf_counter() - begun)

        record: dict[str, Any] = {}
        if logged:
            record = averages.means(accelerator)
            record |= {"lr": schedule(step - 1), "skipped": skipped}
            if weight_decay is not None:
                record["weight_decay"] = weight_decay(step - 1)
            if read is not None:
                record |= read(step, record)
            record["images_per_second"] = (step - since) * images_per_step / seconds
            record["data_wait"] = waited / seconds
            seconds, waited, since = 0.0, 0.0, step
            progress.show(step, record)
        due_now = [measure for every, measure in reports if step % every == 0 or step == steps]
        begun, held_out = time.perf_counter(), dict[str, Any]()
        with contextlib.suppress(Stopped):
            for measure in due_now:
                held_out |= measure(step)
        if due_now:
            task.train()
            progress.tell(step, held_out, time.perf_counter() - begun)
            record |= held_out
        if record:
            track(step, record)
        progress.step()
        due = taken and save_due(step)  # copies of a skipped step would drive out what was before
        with stop.within(longest):
            longer = time.perf_counter() - begun_step > SLOW
            stopping, saving, slow = _agree(accelerator, stop.received is not None, due, longer)
        if stopping or saving or step == steps:
            save(step)
            saved = step
        if stopping:
            return step
    return max(start, steps)


def _spread(loss: Tensor) -> Tensor:
    """The same loss; one that is not finite makes every gradient so, and by their sum every process hears of it."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def _through_python(task: nn.Module) -> Any:
    """A context in which a backward pass comes by Python at every tensor that was saved for it, so that a signal is
    heard before it has ended. No number changes."""
    if any(module._compiled_call_impl is not None for module in task.modules()):
        return contextlib.nullcontext()  # compiled code takes no such hooks
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)


def _agree(accelerator: Accelerator, *wishes: bool) -> tuple[bool, ...]:
    """What any process wants, all do: a signal or a clock reaches one of them a step before the others."""
    if accelerator.num_processes == 1:
        return wishes
    flags = torch.tensor(wishes, dtype=torch.float32, device=accelerator.device)
    return tuple(value > 0 for value in accelerator.reduce(flags, "sum").tolist())  # type: ignore[union-attr]
