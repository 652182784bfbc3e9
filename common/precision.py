"""Precision and attention: what this device can do, and which of it is fastest for this model."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import Refusal
from .models.backbone import set_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORTH = 1.05  # a lower precision must be this much faster to be chosen


def refuse_impossible(precision: str, device: torch.device) -> None:
    """Raises Refusal if `device` cannot train in `precision`."""
    if precision == "fp16" and device.type == "cpu":
        raise Refusal(
            "precision=fp16 needs a GPU: on a CPU use precision=bf16 or fp32, or auto to measure which is faster"
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise Refusal(
            f"precision=bf16 needs a GPU of compute capability 8.0 or newer, and this is {name}: use fp16 or fp32"
        )


def choose(
    precision: str, attention: str, module: nn.Module, step: Callable[[], Tensor], device: torch.device
) -> tuple[str, str, str]:
    """Replace each `auto` by what is fastest for `step`, a forward pass of `module` that returns a loss.

    Returns (precision, attention, the measurement in words). The random state is left as it was, and no gradient stays.
    """
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    precisions = [precision] if precision != "auto" else ["fp32", "bf16"] if bf16 else ["fp32"]
    attentions = [attention] if attention != "auto" else ["fused", "explicit"]
    seconds: dict[tuple[str, str], float] = {}
    with torch.random.fork_rng():
        for how in attentions:
            set_attention(module, how)
            for what in precisions:
                seconds[what, how] = _time(step, DTYPES[what], device, module)
    base = min(value for (what, _), value in seconds.items() if what == precisions[0])
    best = min(seconds, key=lambda pair: seconds[pair] * (1.0 if pair[0] == precisions[0] else WORTH))
    set_attention(module, best[1])
    told = ", ".join(f"{what} {how} {base / value:.2f}x" for (what, how), value in seconds.items())
    return *best, f"measured on this {device.type}, speed relative to the best {precisions[0]}: {told}"


def _time(step: Callable[[], Tensor], dtype: torch.dtype, device: torch.device, module: nn.Module) -> float:
    """Seconds of the fastest of three forward and backward passes."""
    times = []
    for _ in range(4):  # the first warms up
        begun = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = step()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    module.zero_grad(set_to_none=True)
    return min(times[1:])
