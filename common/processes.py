"""The processes of a job: how they meet, and Accelerate over them in a given precision."""

import os
import warnings

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env

from .errors import Refusal

# torch 2.15 announces a new name for `broadcast_buffers`, which older versions do not know.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)


def join(cpu: bool = False) -> PartialState:
    """This process among those of the job, on the CPU if `cpu` or there is nothing else. Raises Refusal if they cannot
    meet."""
    # Without cpu=True, accelerate on a machine without GPUs runs torchrun's processes as so many unrelated first ones.
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
    return process


def accelerator(precision: str) -> Accelerator:
    """Accelerate over the joined processes in `precision`, which goes before what the launcher was given."""
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    wanted = {"fp32": "no"}.get(precision, precision)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    made = Accelerator(mixed_precision=wanted, kwargs_handlers=[ddp], cpu=PartialState().device.type == "cpu")
    if launched not in ("no", wanted):
        made.print(f"note: the launcher asked for {launched}; precision={precision} is used")
    return made
