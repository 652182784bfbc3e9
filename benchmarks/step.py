"""What the positional objectives cost beside the backbone: one training step with them against one without.

    python benchmarks/step.py                       # ViT-S/16 at 224, and the quickstart's model
    python benchmarks/step.py --model quickstart --precision fp32

A bare step is forward, backward and AdamW of the same backbone with the mean square of its tokens as the loss. The
variants alternate in one process, so a noisy machine disturbs all alike; the table gives medians and their ratios.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.launch import set_threads

# isort: split
import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common.models import ModelConfig, create
from common.optim import parameter_groups
from common.plan import PlanSpec
from common.sampling import Batch
from common.transforms import View
from pretrain.task import build, resolve

MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "vit_small": ("vit_small_patch16_224", {}, 224, 8),
    "quickstart": ("vit_tiny_patch16_224", {"patch_size": 7, "embed_dim": 256, "depth": 4, "num_heads": 4}, 28, 64),
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "bare backbone": None,
    "absolute, linear head": {"absolute": {}},
    "absolute, half head": {"absolute": {"head": "half"}},
    "relative, default pairs": {"relative": {}},
    "absolute + relative": {"absolute": {}, "relative": {}},
}


def stepper(model: str, objectives: dict[str, Any] | None, precision: str, attention: str) -> Callable[[], None]:
    """One optimizer step as a function."""
    name, kwargs, size, batch = MODELS[model]
    torch.manual_seed(0)
    backbone = create(ModelConfig(name, dict(kwargs), attention=attention), size)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    loss: Callable[[], torch.Tensor]
    if objectives is None:
        backbone.fix_positions({"none"})
        module: torch.nn.Module = backbone
        loss = lambda: backbone(images, PlanSpec("none")).tokens.float().square().mean()  # noqa: E731
    else:
        task = build(backbone, resolve(objectives), {"global": View(size=size)})
        rng = np.random.default_rng(0)
        draws = {
            f"{name}/{what}": torch.from_numpy(np.stack([draw(rng)[what] for _ in range(batch)]))
            for name, draw in task.draws.items()
            for what in draw(rng)
        }
        data = Batch({"global": images}, torch.arange(batch), draws)
        module, loss = task, lambda: task(data)["loss"]
    optimizer = torch.optim.AdamW(parameter_groups(module, 0.05), lr=1e-4, fused=True)

    def step() -> None:
        lower = precision == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16) if lower else contextlib.nullcontext():
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(model: str, precision: str, attention: str, rounds: int) -> None:
    """Print one table."""
    steps = {name: stepper(model, objectives, precision, attention) for name, objectives in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - begun)
    print(f"\n{model}, batch {MODELS[model][3]}, {precision}, {attention} attention, {rounds} alternating rounds")
    print(f"{'':26}{'ms':>9}{'ratio of medians':>18}{'median of ratios':>18}")
    bare = times["bare backbone"]
    for name, values in times.items():
        paired = statistics.median(value / base for value, base in zip(values, bare, strict=True))
        ratio = statistics.median(values) / statistics.median(bare)
        print(f"{name:26}{statistics.median(values) * 1e3:9.1f}{ratio:18.3f}{paired:18.3f}")


def main() -> None:
    """Parse arguments, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="*", default=list(MODELS))
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--attention", choices=["fused", "explicit"], default="explicit")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, CPU, {set_threads(arguments.threads)[0]} threads")
    for model in arguments.model:
        for precision in arguments.precision:
            measure(model, precision, arguments.attention, arguments.rounds)


if __name__ == "__main__":
    main()
