"""The processes of a job: how they meet, and Accelerate over them in a given precision."""

import itertools
import os
import warnings
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, parse_flag_from_env

from ..errors import Refusal

# torch 2.15 announces a new name for `broadcast_buffers`, which older versions do not know.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)

# what a launcher's configuration may ask of accelerate, as it is where nothing was asked, and what is done instead
LAUNCHERS_OWN = (
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", "accumulate= is used"),
    ("ACCELERATE_DYNAMO_BACKEND", "no", "model.compile= is used"),
)


def join(cpu: bool = False) -> PartialState:
    """Join this process to the job's, on the CPU if `cpu` or nothing else is there. Raises Refusal if they cannot
    meet."""
    # Without cpu=True, accelerate on a machine without GPUs runs torchrun's processes as so many unrelated first ones.
    _refuse_other_plans()
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        process = PartialState(cpu=cpu)
    except (RuntimeError, ValueError, OSError) as error:  # torch's DistNetworkError is a RuntimeError
        raise Refusal(
            f"the processes of this job cannot meet at {where} ({str(error).splitlines()[0]}): is the port taken? "
            "Choose another with accelerate launch --main_process_port or torchrun --master-port"
        ) from None
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if process.num_processes != launched:
        raise Refusal(
            f"{launched} processes were launched and accelerate joined {process.num_processes}: "
            "set ACCELERATE_USE_CPU=true for CPUs, or launch with accelerate launch --multi_gpu"
        )
    if (line := note_missing()) is not None:
        print(line, flush=True)
    return process


def accelerator(precision: str) -> Accelerator:
    """Set up Accelerate over the joined processes in `precision`, which goes before what the launcher was given."""
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    mixed_precision = {"fp32": "no"}.get(precision, precision)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    job = Accelerator(
        mixed_precision=mixed_precision,
        kwargs_handlers=[ddp],
        cpu=PartialState().device.type == "cpu",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # or it divides the loss once more
        dynamo_backend="no",
    )
    if launched not in ("no", mixed_precision):
        job.print(f"note: the launcher asked for {launched}; precision={precision} is used")
    for variable, usual, option in LAUNCHERS_OWN:
        if (asked := os.environ.get(variable, usual).lower()) != usual:
            job.print(f"note: the launcher asked for {variable.removeprefix('ACCELERATE_').lower()}={asked}; {option}")
    return job


def _refuse_other_plans() -> None:
    """Raises Refusal where the launcher's configuration shares a model out in a way that is not ours."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise Refusal(
                f"the launcher asked for {name} (its configuration, or ACCELERATE_USE_{name}): poslabel trains whole "
                "copies of a model (DistributedDataParallel); answer no to it in accelerate config, or launch with "
                "torchrun"
            )


def note_missing() -> str | None:
    """Return the line about an `accelerate launch` of several processes that started one, as it does on CPUs."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "WORLD_SIZE" in os.environ:
        return None  # not started by it, or by one that starts several
    count = _wanted_processes()
    if count is None:
        count = 2 if "MASTER_ADDR" in os.environ else 1  # which it sets for several
    if count < 2:
        return None
    return (
        f"note: the launcher asked for {count} processes, and accelerate launch starts one where there is no GPU: one "
        f"process is used; for {count}: ACCELERATE_USE_CPU=true torchrun --nproc-per-node {count} ..."
    )


def _wanted_processes() -> int | None:
    """Find the num_processes of the `accelerate launch` that started this, in its command line or configuration."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace", encoding="utf-8").split("\0")
    except OSError:
        words = []
    given = dict(word.lstrip("-").replace("-", "_").split("=", 1) for word in words if word[:2] == "--" and "=" in word)
    given |= {a.lstrip("-").replace("-", "_"): b for a, b in itertools.pairwise(words) if a[:2] == "--"}
    try:
        if "num_processes" in given:
            return int(given["num_processes"])
        file = Path(given.get("config_file", default_config_file))
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None  # JSON is YAML
        return int(content["num_processes"]) if isinstance(content, dict) and "num_processes" in content else None
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return None
