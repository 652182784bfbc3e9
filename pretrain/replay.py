"""`--replay RECORD`: take a recorded step again, from what it began with, and say what in it was not finite."""

import contextlib
import functools
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.batches.sampler import StepPart
from common.batches.samples import Batch
from common.checkpoints import changes
from common.errors import Refusal
from common.processes import group
from common.processes.stopping import Stopped, StopSignal, fetch
from common.training.loop import fit
from common.training.tracking import Progress
from pretrain import flight
from pretrain.assemble import Parts, assemble, fit_options, optimizer_for, schedule_for
from pretrain.checkpoints import Checkpoints, changed
from pretrain.config import PretrainConfig
from pretrain.task import Pretraining

NAMED = 10  # names of a list that are told


def replay(folder: Path, config: PretrainConfig, process: PartialState) -> int:
    """Repeat the step recorded in `folder`; nothing is written. Every process takes part. Returns the exit status: 0 if
    every number is what was recorded, to the bit, else 1.

    Raises Refusal if it was recorded by another number of processes, or with other images.
    """
    record = flight.read(folder)
    if record.processes != process.num_processes:
        raise Refusal(
            f"--replay {folder}: that step was taken by {record.processes} processes, not {process.num_processes}: "
            f"{flight.command(folder, record.processes)}"
        )
    parts = assemble(config, process, fresh=False)
    state = flight.state_of(folder, record)
    if not parts.images.has_fingerprint(state["fingerprint"]):
        raise Refusal(
            f"--replay {folder}: the images at data={config.data} are not those of the record (fingerprint "
            f"{parts.fingerprint}, not {state['fingerprint']}); point data= at the same images"
        )
    said = changes.note(changes.version_of(state), record.step, changed(parts))
    if said and process.is_main_process:
        print(f"warning: {said}; the numbers of this step may differ for that", flush=True)
    witness = _again(folder, record, parts, state)
    everybody: list[Any] = [(witness.terms, witness.first)]
    if process.num_processes > 1:
        everybody = gather_object(everybody)
    terms = [told for told, _ in everybody]
    rows = list(_rows(record, terms, witness.norm))
    if process.is_main_process:
        print("\n".join(_report(folder, record, rows, terms, [first for _, first in everybody], witness)), flush=True)
    return 0 if all(same(was, now) for _, was, now in rows) else 1


class _Enough(Exception):
    """The step is over."""


class _Witness:
    """Puts the random state of the step in place, and sees what fit sees of it. A loop.Observer and loop.Recorder."""

    def __init__(self, task: Pretraining, checkpoints: Checkpoints, state: dict, prepared: Any, hooked: bool) -> None:
        self.task, self.checkpoints, self.state, self.prepared = task, checkpoints, state, prepared
        self.hooked = hooked  # whether it looks at what every module returns
        self.terms: flight.Terms = []
        self.norm = math.nan
        self.gradients: list[str] = []  # parameters whose gradient, reduced and not clipped, is not finite
        self.first: str | None = None  # what first returned numbers that are not
        prepared[0].register_forward_hook(lambda _, __, result: self.terms.append(flight.numbers(result)))
        for name, module in task.named_modules() if hooked else ():
            if name:
                module.register_forward_hook(self._looking(name))

    def _looking(self, name: str) -> Any:
        def look(module: nn.Module, _: Any, result: Any) -> None:
            if self.first is None and not all(bool(torch.isfinite(each).all()) for each in _tensors(result)):
                self.first = f"{name} ({type(module).__name__})"

        return look

    def begin_step(self, progress: float, measured: bool) -> None:
        """See loop.Observer."""
        self.task.begin_step(progress, measured)

    def begin(self) -> None:
        """Everything as it was when the record's `begin` was called."""
        self.checkpoints.restore(self.state, *self.prepared)

    def before_update(self) -> None:
        """See loop.Observer."""
        self.task.before_update()
        named = [(name, parameter.grad) for name, parameter in self.task.named_parameters()]
        given = {name: grad for name, grad in named if grad is not None}
        self.gradients = [name for name, grad in given.items() if not bool(torch.isfinite(grad).all())]
        scaler = self.checkpoints.accelerator.scaler  # under which gradients of fp16 still are
        norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in given.values()]))
        self.norm = float(norm) / (scaler.get_scale() if scaler is not None else 1.0)

    def keep(self, step: int, results: Sequence[Mapping[str, Tensor]], norm: float, batches: Sequence[Any]) -> None:
        """See loop.Recorder. The norm of a gradient that is finite after all, nobody tells."""
        self.norm = norm

    def after_step(self, taken: bool) -> None:
        """One step is all."""
        raise _Enough


def _again(folder: Path, record: flight.Record, parts: Parts, state: dict[str, Any]) -> _Witness:
    """Take the recorded step in the one training loop, up to where it would change something."""
    config, process = parts.config, parts.process
    accelerator = group.accelerator(config.precision)
    if config.model.compile:
        parts.task.compile_backbones()
    task, optimizer = accelerator.prepare(parts.task, optimizer_for(config, parts.task))
    checkpoints = Checkpoints(folder, parts, accelerator, folder.name)
    witness = _Witness(parts.task, checkpoints, state, (task, optimizer), hooked=not config.model.compile)

    def batches() -> Iterator[Batch]:
        whole = np.array([index for of_process in record.keys for part in of_process for _, index in part])
        for keys in record.keys[process.process_index]:
            part = StepPart(((epoch, index) for epoch, index in keys), whole)
            yield fetch(functools.partial(parts.samples.__getitems__, part))

    def unused(*_: Any) -> Any:
        raise AssertionError("the step was to end before")

    stop = StopSignal()
    with contextlib.suppress(_Enough):
        fit(
            accelerator,
            task,
            batches(),
            optimizer,
            schedule_for(config, parts.steps),
            **(fit_options(parts) | {"observer": witness}),
            start=record.step - 1,
            track=unused,
            save=unused,
            save_due=unused,
            stop=stop,
            progress=Progress(parts.steps, record.step - 1, active=False),
            recorder=witness,
        )
        raise Stopped(stop.received or signal.SIGTERM)  # `fit` ended before the step did
    return witness


def _tensors(result: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned: a tensor, Features, or a container of them."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, (list, tuple)):
        for each in result:
            yield from _tensors(each)
    elif isinstance(result, dict) or hasattr(result, "__dataclass_fields__"):
        yield from _tensors(list(result.values() if isinstance(result, dict) else vars(result).values()))


def same(was: float, now: float) -> bool:
    """Whether two numbers are equal, and NaN is NaN."""
    return was == now or (math.isnan(was) and math.isnan(now))


def _rows(record: flight.Record, terms: Sequence[flight.Terms], norm: float) -> Iterator[tuple[str, float, float]]:
    """(what, as recorded, as it is now) of every number of the step; NaN beside a number that is on one side alone."""
    for process, (before, after) in enumerate(zip(record.terms, terms, strict=True)):
        for part, (was, now) in enumerate(zip(before, after, strict=True)):
            where = f"process {process}: " if len(terms) > 1 else ""
            where += f"part {part + 1}: " if len(before) > 1 else ""
            for name in {**was, **now}:
                yield where + name, was.get(name, math.nan), now.get(name, math.inf)
    yield "gradient norm", record.gradient_norm, norm


def _report(
    folder: Path,
    record: flight.Record,
    rows: Sequence[tuple[str, float, float]],
    terms: Sequence[flight.Terms],
    firsts: Sequence[str | None],
    witness: _Witness,
) -> Iterator[str]:
    """The lines to print."""
    yield f"step {record.step}, recorded in {folder} with torch {record.torch} on {record.device}"
    wide = max(len(name) for name, _, _ in rows)
    yield f"{'':{wide}}  {'recorded':>24}  {'again':>24}"
    for name, was, now in rows:
        marks = ["differs"] * (not same(was, now)) + ["not finite"] * (not math.isfinite(now))
        yield f"{name:{wide}}  {was!r:>24}  {now!r:>24}  {', '.join(marks)}".rstrip()
    losses = flight.strangers(terms)
    yield f"not finite: losses        {_listed(losses)}"
    for process, first in enumerate(firsts):
        whose = f" in process {process}" if len(firsts) > 1 else ""
        told = f"{first or 'none'}{whose}" if witness.hooked else "not looked for in a compiled model"
        yield f"not finite: first output  {told}"
    weights = [name for name, value in witness.state["task"].items() if not bool(torch.isfinite(value).all())]
    yield f"not finite: weights       {_listed(weights)}"
    gradients = f"all {len(witness.gradients)}, as the loss is not" if losses else _listed(witness.gradients)
    if not witness.gradients and not math.isfinite(witness.norm):
        gradients = "none; together they are too large for the type of their norm"
    yield f"not finite: gradients     {gradients}"
    different = [name for name, was, now in rows if not same(was, now)]
    if not different:
        yield f"reproduced: all {len(rows)} numbers are equal to the last bit"
        return
    here = f"torch {torch.__version__} on {witness.checkpoints.accelerator.device.type}"
    yield (
        f"not reproduced: {len(different)} of {len(rows)} numbers differ. Bits are promised on the same CPU with the "
        f"same versions: this is {here}, the record is of torch {record.torch} on {record.device}"
    )


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)}: {', '.join(names[:NAMED])}{more}"
