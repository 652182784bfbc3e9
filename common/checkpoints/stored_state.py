"""Reading state.pt back: never more than tensors, numbers and names, and put in place only where everything fits.

A checksum says that a file is whole, not that it is honest: whoever made the folder made the checksum, too.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import Refusal
from ..training.averages import Averages
from ..training.random_state import set_random_state
from .public import load_exactly
from .storage import STATE

WRONG = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError)  # what odd contents lead to


def read_state(path: Path) -> dict[str, Any]:
    """Read the dictionary in a state.pt to the CPU; nothing is executed. Raises Refusal for anything else."""
    try:
        with zipfile.ZipFile(path) as packed:  # torch stores; what is deflated may be a thousand times its size
            if any(item.compress_type != zipfile.ZIP_STORED for item in packed.infolist()):
                raise ValueError("it is compressed")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's, torch's: whatever a forged file leads to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _strange(path, f"it cannot be read as tensors, numbers and names ({reason:.150})") from None
    if not isinstance(state, dict):
        raise _strange(path, f"it holds a {type(state).__name__}, expected a dictionary")
    step = state.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise _strange(path, f"its step is {step!r:.40}, expected a number from 0")
    return state


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the state in a checkpoint folder step_*. Raises Refusal if it is not of the step in that name."""
    state = read_state(folder / STATE)
    if state["step"] != int(folder.name[5:]):
        raise _strange(folder / STATE, f"it is of step {state['step']}")
    return state


def restore(
    state: dict[str, Any],
    module: nn.Module,
    optimizer: Any,
    averages: Averages,
    accelerator: Accelerator,
    steps: int,
    where: Path,
) -> int:
    """Put a state that was read from `where` into the module (unwrapped), its prepared optimizer, the log's averages,
    the scaler and the random generators; returns its step. Raises Refusal for what does not fit, or is not finite."""
    if state["step"] > steps:
        raise _strange(where, f"it is of step {state['step']}, and the training has {steps}")
    weights, moments, random = (state.get(name) for name in ("task", "optimizer", "random"))
    if not isinstance(weights, dict) or not all(map(_plain, weights.values())):
        raise _strange(where, "its weights are no dictionary of tensors")
    current = module.state_dict()
    for name in current.keys() & weights.keys():
        if weights[name].dtype != current[name].dtype:
            raise _strange(where, f"{name} is of {weights[name].dtype}, expected {current[name].dtype}")
        if not bool(torch.isfinite(weights[name]).all()):
            raise _strange(where, f"{name} is not finite")
    load_exactly(module, weights, str(where))
    _restore_optimizer(optimizer, moments, where)
    try:
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        index, count = accelerator.process_index, accelerator.num_processes
        averages.load(state.get("averages", []), index, count, accelerator.device)
        processes = len(random)  # type: ignore[arg-type]
        if processes == count:
            set_random_state(random[index])  # type: ignore[index]
    except WRONG as error:
        raise _strange(
            where, f"its random state, averages or scaler are none ({str(error).splitlines()[0]:.100})"
        ) from None
    if processes != accelerator.num_processes:
        accelerator.print(
            f"note: the run was interrupted with {processes} processes and goes on with {accelerator.num_processes}: "
            "the samples are the same, the losses not to the last bit"
        )
    return state["step"]


def _restore_optimizer(optimizer: Any, state: Any, where: Path) -> None:
    before = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        for expected, group in zip(before, optimizer.param_groups, strict=True):
            for name, value in expected.items():
                numbers = isinstance(value, (int, float)) and isinstance(group[name], (int, float))
                if not numbers and type(group[name]) is not type(value):
                    raise ValueError(f"{name} is {group[name]!r:.40}")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for name, value in optimizer.state.get(parameter, {}).items():
                    if not _plain(value) or (value.dim() and value.shape != parameter.shape):
                        raise ValueError(f"{name} of a weight of shape {tuple(parameter.shape)} has another")
                    if not bool(torch.isfinite(value).all()):
                        raise ValueError(f"{name} is not finite")
    except WRONG as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _strange(where, f"its optimizer does not fit this model ({reason:.150})") from None


def _plain(value: Any) -> bool:
    """Return whether `value` is a tensor that copies as it is."""
    return type(value) is Tensor and value.layout == torch.strided and not value.is_quantized


def _strange(path: Path, what: str) -> Refusal:
    return Refusal(
        f"{path} is no state to go on from: {what}. It is not as poslabel writes it, though its checksum is right; "
        "remove that checkpoint's folder to go on from the one before, or restore a copy you trust"
    )
