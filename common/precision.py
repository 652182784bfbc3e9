"""Precision and attention: what this device can do, and which of it is fastest for this model."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import Refusal
from .models.backbone import set_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORTH = 1.05  # a lower precision must be this much faster to be chosen
BUDGET = 20.0  # seconds that measuring may take
FEW, MOST = 2, 32  # images that are measured with
PASSES = 4  # of each kind, of which the first warms up


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


@dataclass
class Choice:
    """What was measured to be fastest."""

    precision: str
    attention: str
    why: str  # the measurement in words
    seconds: float  # for a forward and backward pass of one image


def choose(
    precision: str,
    attention: str,
    module: nn.Module,
    step: Callable[[int], Tensor],
    device: torch.device,
    between: Callable[[], None] = lambda: None,
    budget: float = BUDGET,
) -> Choice:
    """Replace each `auto` by what is fastest for `step(images)`, a forward pass of `module` that returns a loss.

    It takes about `budget` seconds at most, on as few images as that needs (from 2 to 32); `between` is called between
    passes and may raise. The random state is left as it was, and no gradient stays.
    """
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    precisions = [precision] if precision != "auto" else ["fp32", "bf16"] if bf16 else ["fp32"]
    attentions = [attention] if attention != "auto" else ["fused", "explicit"]
    pairs = [(what, how) for how in attentions for what in precisions]
    seconds: dict[tuple[str, str], float] = {}
    with torch.random.fork_rng():
        try:
            set_attention(module, attentions[0])
            for _ in range(2):  # the first warms up
                few = _pass(step, FEW, DTYPES[precisions[0]], device)
                between()
            images = min(MOST, max(FEW, int(FEW * budget / (len(pairs) * PASSES * few))))
            for what, how in pairs:
                set_attention(module, how)
                times = list[float]()
                while not times or (len(times) < PASSES and sum(times) + times[-1] <= 1.5 * budget / len(pairs)):
                    times.append(_pass(step, images, DTYPES[what], device))
                    between()
                seconds[what, how] = min(times[1:] or times)  # the first warms up
        finally:
            module.zero_grad(set_to_none=True)
    base = min(value for (what, _), value in seconds.items() if what == precisions[0])
    best = min(seconds, key=lambda pair: seconds[pair] * (1.0 if pair[0] == precisions[0] else WORTH))
    set_attention(module, best[1])
    told = ", ".join(f"{what} {how} {base / value:.2f}x" for (what, how), value in seconds.items())
    why = f"measured on this {device.type} with {images} images, speed relative to the best {precisions[0]}: {told}"
    return Choice(*best, why, seconds[best] / images)


def _pass(step: Callable[[int], Tensor], images: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one forward and backward pass."""
    begun = time.perf_counter()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = step(images)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
