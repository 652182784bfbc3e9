"""Precision and attention: what this device can do, and which of it is fastest for this model."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import Refusal
from ..models.create import set_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORTH = 1.05  # a lower precision must be this much faster to be chosen
BUDGET = 20.0  # seconds that measuring may take
COLD = 0.25  # share of them that the first pass may take, to be done once more
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

    It takes about `budget` seconds at most: on as few images as that needs (2 to 32), and what would not fit is not
    tried. `between` is called between passes and may raise. The random state is left as it was, and no gradient stays.
    """
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    precisions = [precision] if precision != "auto" else ["fp32", "bf16"] if bf16 else ["fp32"]
    attentions = [attention] if attention != "auto" else ["fused", "explicit"]
    pairs = [(what, how) for how in attentions for what in precisions]
    seconds: dict[tuple[str, str], float] = {}
    begun = time.perf_counter()

    def one(images: int, what: str) -> float:
        took = _pass(step, images, DTYPES[what], device)
        between()
        return took

    with torch.random.fork_rng():
        try:
            set_attention(module, attentions[0])
            few = one(FEW, precisions[0])  # warms up
            if few > COLD * budget:  # too slow to do it twice
                seconds[pairs.pop(0)], images = few, FEW
            else:
                few = one(FEW, precisions[0])
                left = budget - (time.perf_counter() - begun)
                images = min(MOST, max(FEW, int(FEW * left / (len(pairs) * PASSES * few))))
            while pairs:
                what, how = pairs[0]
                left = budget - (time.perf_counter() - begun)
                longest = max((took for (other, _), took in seconds.items() if other == what), default=few)
                if seconds and longest * images / FEW > left:
                    break
                set_attention(module, how)
                times = [one(images, what)]
                while len(times) < PASSES and sum(times) + times[-1] <= left / len(pairs):
                    times.append(one(images, what))
                seconds[pairs.pop(0)] = min(times[1:] or times) / images * FEW  # the first warms up
        finally:
            module.zero_grad(set_to_none=True)
    base = min(value for (what, _), value in seconds.items() if what == precisions[0])
    best = min(seconds, key=lambda pair: seconds[pair] * (1.0 if pair[0] == precisions[0] else WORTH))
    set_attention(module, best[1])
    told = ", ".join(f"{what} {how} {base / value:.2f}x" for (what, how), value in seconds.items())
    why = f"measured on this {device.type} with {images} images, speed relative to the best {precisions[0]}: {told}"
    if pairs:
        untried = " and ".join(" ".join(pair) for pair in pairs)
        why += f"; {untried} not tried, as that would have taken more than {budget:.0f} s"
    return Choice(*best, why, seconds[best] / FEW)


def _pass(step: Callable[[int], Tensor], images: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one forward and backward pass."""
    begun = time.perf_counter()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = step(images)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
