"""The flight record: what a step began with whose loss or gradient was not finite, so that it can be repeated.

    run/flight/step_00000123/
        state.pt      what a checkpoint after step 122 would hold, with each process's random state then
        record.json   the images, losses and gradient norm of the step
        config.yaml   every option as it was resolved

`pretrain/run.py --replay run/flight/step_00000123` makes the same step again (see `pretrain/replay.py`).
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from common import commands
from common import config as configuration
from common.checkpoints.run_folder import CONFIG
from common.checkpoints.storage import STATE, sha256, write_atomically
from common.checkpoints.stored_state import read_state
from common.errors import Refusal
from common.training.random_state import random_state

if TYPE_CHECKING:  # the command line knows records, the audit knows the command line, and a run's parts the audit
    from pretrain.checkpoints import Checkpoints

FLIGHT, RECORD = "flight", "record.json"
FORMAT = 1
MOST = 3  # records of a run: each is as large as a checkpoint, and the first tell most
NAMED = 3  # losses that a line names

Terms = list[dict[str, float]]  # of one process: {"loss": ..., "absolute/loss": ...} of every part of the step


@dataclass(frozen=True)
class Record:
    """record.json."""

    step: int  # from 1: the first step is 1
    device: str  # "cpu" or "cuda"
    torch: str  # its version
    commit: str | None
    gradient_norm: float
    terms: list[Terms]  # of every process and part
    keys: list[list[list[list[int]]]]  # of every process and part, the (epoch, index) of its images
    state_sha256: str

    @property
    def processes(self) -> int:
        """How many took the step together."""
        return len(self.terms)


class FlightRecorder:
    """Writes a record of each of the first steps that were not finite, and tells of all of them. A loop.Recorder."""

    def __init__(self, checkpoints: "Checkpoints", task: nn.Module, optimizer: Any, say: Callable[[str], None]) -> None:
        """`task` and `optimizer` as they were prepared; `say` prints a line."""
        self.checkpoints, self.task, self.optimizer, self.say = checkpoints, task, optimizer, say
        self.folder = checkpoints.run / FLIGHT
        self.left = MOST - len(list(self.folder.glob("step_*")))
        norms = (module for module in task.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
        self.running = [statistic for norm in norms for statistic in norm.buffers()]  # of batch norms: mostly none

    def begin(self) -> None:
        """Remember what forward passes change: the random state, and the running statistics of batch norms. All else is
        there when a step has gone wrong."""
        self.random = random_state()
        self.before = [statistic.clone() for statistic in self.running]

    def keep(self, step: int, results: Sequence[Mapping[str, Tensor]], norm: float, batches: Sequence[Any]) -> None:
        """Record `step`, of which nothing has been taken yet, and undo what its forward passes did to running
        statistics. Every process calls it; a full disk is told and borne."""
        for statistic, before in zip(self.running, self.before, strict=True):
            statistic.copy_(before)
        parts, accelerator = self.checkpoints.parts, self.checkpoints.accelerator
        epoch = (step - 1) // parts.per_epoch
        mine: dict[str, Any] = {
            "terms": [numbers(result) for result in results],
            "keys": [[[epoch, index] for index in batch.index.tolist()] for batch in batches],
            "random": self.random,
            "averages": self.checkpoints.averages.state(),
        }
        everybody = gather_object([mine]) if parts.process.num_processes > 1 else [mine]
        terms = [process["terms"] for process in everybody]
        scaler = accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1 and not strangers(terms):
            return  # an overflow of fp16: the scale of the loss is halved until there is none
        line = f"step {step} was not taken: {reason(terms, norm)}"
        if parts.process.is_main_process:
            random = [process["random"] for process in everybody]
            averages = [process["averages"] for process in everybody]
            keys = [process["keys"] for process in everybody]
            device, commit = accelerator.device.type, self.checkpoints.commit
            record = Record(step, device, torch.__version__, commit, norm, terms, keys, state_sha256="")
            self.say(f"{line}; {self._write(step, random, averages, record)}")

    def _write(self, step: int, random: list[dict[str, Any]], averages: list[dict[str, Any]], record: Record) -> str:
        """Write the record of `step`, or do not; returns which."""
        aside, final = self.folder / f".writing-{step:08d}", self.folder / f"step_{step:08d}"
        if final.exists():
            return f"it was recorded before: {command(final, len(random))}"
        if self.left < 1:
            return f"not recorded: there are {MOST} records in {self.folder}"
        self.left -= 1  # also if it fails: a disk does not become empty
        parts = self.checkpoints.parts
        try:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was cut short
            aside.mkdir(parents=True)
            write_atomically(
                aside / STATE,
                partial(torch.save, self.checkpoints.state(step - 1, self.task, self.optimizer, random, averages)),
            )
            told = as_text(replace(record, state_sha256=sha256(aside / STATE)))
            write_atomically(aside / RECORD, lambda path: path.write_text(told, encoding="utf-8"))
            options = configuration.as_yaml(parts.config)
            write_atomically(aside / CONFIG, lambda path: path.write_text(options, encoding="utf-8"))
            os.rename(aside, final)
        except (OSError, RuntimeError) as error:  # torch has a name of its own for a full disk
            shutil.rmtree(aside, ignore_errors=True)
            return f"warning: no record could be written to {self.folder}: {str(error).splitlines()[0]}"
        return f"recorded: {command(final, len(random))}"


def numbers(result: Mapping[str, Tensor]) -> dict[str, float]:
    """What a forward pass returned, as Python's numbers."""
    return {name: float(value.detach()) for name, value in result.items()}


def strangers(terms: Sequence[Terms]) -> list[str]:
    """The terms that are not finite, each with its value and, where there are several processes, whose it is."""
    found: dict[str, str] = {}
    for process, of_process in enumerate(terms):
        for part in of_process:
            for name, value in part.items():
                if not math.isfinite(value) and name.endswith("loss"):
                    where = f" in process {process}" if len(terms) > 1 else ""
                    found.setdefault(f"{name}{where}", f"{name} {value}{where}")
    return list(found.values())


def reason(terms: Sequence[Terms], norm: float) -> str:
    """Why a step was not taken."""
    wrong = strangers(terms)
    if not wrong:
        return f"every loss is finite and the gradient is not (norm {norm})"
    wrong.sort(key=lambda told: told.startswith("loss "))  # the sum last: it follows from the others
    more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    return f"the loss is not finite ({', '.join(wrong[:NAMED])}{more})"


def command(record: Path, processes: int) -> str:
    """What to type to repeat a recorded step."""
    return commands.command("pretrain", "--replay", record, processes=processes)


def as_text(record: Record) -> str:
    """A record as JSON, which has no word for NaN and infinities: they are strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value

    content = {"format": FORMAT, **plain(asdict(record))}.items()
    lines = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in content)
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(folder: Path) -> Record:
    """The record in a folder. Raises Refusal if there is none, or it cannot be read."""
    path = folder / RECORD
    missing = [name for name in (RECORD, STATE, CONFIG) if not (folder / name).is_file()]
    if missing:
        near = [*folder.glob("step_*"), *(folder / FLIGHT).glob("step_*")]
        there = [str(each) for each in sorted(near) if (each / RECORD).is_file()]
        hint = f"there are: {', '.join(there)}" if there else f"expected RUN/{FLIGHT}/step_00000123 or the like"
        raise Refusal(f"--replay {folder} is no record of a step ({missing[0]} is not in it); {hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise Refusal(f"{path} has another format than {FORMAT}: replay it with the version that wrote it")
        content["gradient_norm"] = float(content["gradient_norm"])
        content["terms"] = [
            [{name: float(value) for name, value in part.items()} for part in process] for process in content["terms"]
        ]
        return Record(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"{path} cannot be read as a record ({type(error).__name__}: {error})") from None


def state_of(folder: Path, record: Record) -> dict[str, Any]:
    """What the step began with. Raises Refusal if it is damaged."""
    path = folder / STATE
    if sha256(path) != record.state_sha256:
        raise Refusal(f"{path} is damaged (its checksum is not that in {RECORD}): take another record")
    return read_state(path)
