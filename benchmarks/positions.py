"""What the positional objectives cost beside the backbone: time and peak memory of a training step.

    python benchmarks/positions.py                          # ViT-S/16 at 224, batch 16: time, memory, all pairs
    python benchmarks/positions.py time --precision bf16 --rounds 9
    python benchmarks/positions.py memory
    python benchmarks/positions.py pairs

A bare step is forward, backward and AdamW of the same backbone, whole grid, no position embedding, with the mean square
of its tokens as the loss. In `time` the variants alternate in one process, so that a noisy machine disturbs all alike,
and ratios are of each round's own bare step. In `memory` and `pairs` each variant has a process of its own, whose peak
is the largest resident set (on a GPU: the most memory allocated).
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import set_threads

# isort: split
import argparse
import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.memory import peak
from common.batches.samples import Batch
from common.batches.views import View
from common.models import Features, ModelConfig, create
from common.models.plan import PlanSpec, TokenPlan
from common.training.optim import parameter_groups
from pretrain import objectives
from pretrain.automatic import suited
from pretrain.task import build, resolve

DROPPOS = {"keep": 0.25, "position": "partial", "position_keep": 0.25, "smoothing": 1.0, "decoder": {"blocks": 2}}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, float | None, float | None]] = {
    # name: model options, objectives, bound on time, bound on memory
    "bare backbone": ({}, None, None, None),
    "absolute (linear)": ({}, {"absolute": {}}, 1.05, None),
    "absolute (half)": ({}, {"absolute": {"head": "half"}}, None, None),
    "relative (half, 4N pairs)": ({}, {"relative": {}}, 1.10, 1.15),
    "relative (separable)": ({}, {"relative": {"head": "separable"}}, None, None),
    "relative (regression)": ({}, {"relative": {"head": "regression"}}, None, None),
    "relative (all pairs)": ({}, {"relative": {"pairs": "all"}}, None, None),
    "jigsaw (keep 0.5)": ({}, {"absolute": {"head": "mlp", "keep": 0.5}}, None, None),
    "mp3 (context 0.25)": ({}, {"absolute": {"context": 0.25}}, 1.10, None),
    "droppos (keep 0.25)": (
        {"position_embedding": "sincos"}, {"absolute": DROPPOS | {"attentive": "kept"}}, 0.40, None,
    ),
    "droppos, attentive=image": (
        {"position_embedding": "sincos"}, {"absolute": DROPPOS | {"attentive": "image"}}, None, None,
    ),
}  # fmt: skip
SLOW = ("relative (all pairs)",)  # minutes a step on a CPU: in `memory` and `pairs` only, unless asked for
SIDES = (14, 20, 28)  # grids of `pairs`: N = 196, 400, 784


def stepper(variant: str, arguments: argparse.Namespace, precision: str) -> Callable[[], None]:
    """One optimizer step as a function."""
    options, wanted, *_ = VARIANTS[variant]
    device, batch, size = torch.device(arguments.device), arguments.batch, arguments.size
    torch.manual_seed(0)
    backbone = create(ModelConfig(arguments.model, attention=arguments.attention, **options), size)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    loss: Callable[[], torch.Tensor]
    if wanted is None:
        backbone.use_plans({PlanSpec(position="none")})
        module: torch.nn.Module = backbone.to(device)
        loss = lambda: backbone(images, TokenPlan("none")).tokens.float().square().mean()  # noqa: E731
    else:
        chosen, _ = suited(resolve(wanted), backbone.grid, backbone.has_class_token)
        task = build(backbone, chosen, {"global": View(size=size)})
        rng = np.random.default_rng(0)
        drawn = {name: [draw(rng) for _ in range(batch)] for name, draw in task.draws.items()}
        draws = {
            f"{name}/{what}": torch.from_numpy(np.stack([each[what] for each in samples]))
            for name, samples in drawn.items()
            for what in samples[0]
        }
        data = Batch({"global": images}, torch.arange(batch), draws).to(device)
        module, loss = task.to(device), lambda: task(data)["loss"]
    optimizer = torch.optim.AdamW(parameter_groups(module, 0.05), lr=1e-4, fused=True)

    def step() -> None:
        lower = precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16) if lower else contextlib.nullcontext():
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure_time(arguments: argparse.Namespace, precision: str) -> None:
    """Print one table of times."""
    names = arguments.variant or [name for name in VARIANTS if name not in SLOW]
    steps = {name: stepper(name, arguments, precision) for name in dict.fromkeys(["bare backbone", *names])}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - begun)
    print(f"\ntime of a step, {precision}, {arguments.attention} attention, {arguments.rounds} alternating rounds")
    print(f"{'':28}{'ms':>9}{'ratio of medians':>18}{'median of ratios':>18}{'bound':>8}")
    bare = times["bare backbone"]
    for name, values in times.items():
        paired = statistics.median(value / base for value, base in zip(values, bare, strict=True))
        ratio = statistics.median(values) / statistics.median(bare)
        middle = statistics.median(values) * 1e3
        print(f"{name:28}{middle:9.1f}{ratio:18.3f}{paired:18.3f}{VARIANTS[name][2] or '':>8}")


def in_child(arguments: argparse.Namespace, *words: str) -> tuple[float, float]:
    """(MiB before, MiB at the peak) that a child process of ours reports."""
    same = [
        f"--{name}={getattr(arguments, name)}" for name in ("model", "size", "batch", "device", "attention", "threads")
    ]
    command = [sys.executable, __file__, *words, *(word for word in same if not word.endswith("=None"))]
    before, top = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
    return float(before), float(top)


def measure_memory(arguments: argparse.Namespace, precision: str) -> None:
    """Print one table of peaks."""
    print(f"\npeak memory of two steps, {precision}, a process each")
    print(f"{'':28}{'MiB':>9}{'ratio':>9}{'above imports':>15}{'ratio':>9}{'bound':>8}")
    bare = None
    for name in dict.fromkeys(["bare backbone", *(arguments.variant or VARIANTS)]):
        before, top = in_child(arguments, "one", f"--variant={name}", f"--precision={precision}")
        bare = bare or (top, top - before)
        print(
            f"{name:28}{top:9,.0f}{top / bare[0]:9.3f}{top - before:15,.0f}{(top - before) / bare[1]:9.3f}"
            f"{VARIANTS[name][3] or '':>8}",
            flush=True,
        )


def measure_pairs(arguments: argparse.Namespace) -> None:
    """Print how the memory of `relative` over all pairs grows with the grid."""
    print("\nrelative head over all ordered pairs, one image, width 384, forward and backward, fp32, a process each")
    print(f"{'N':>5}{'pairs':>9}{'classes':>9}{'MiB above imports':>19}{'pairs concatenated: MiB':>25}{'seconds':>9}")
    for side in SIDES:
        begun = time.perf_counter()
        before, top = in_child(arguments, "head", f"--side={side}")
        seconds, N = time.perf_counter() - begun, side * side
        classes, concatenated = (2 * side - 1) ** 2, N * N * 2 * 384 * 4 / 2**20
        numbers = f"{N:5}{N * N:9,}{classes:9,}{top - before:19,.0f}{concatenated:25,.0f}{seconds:9.1f}"
        print(numbers, flush=True)


def one(arguments: argparse.Namespace) -> None:
    """In a child: two steps of one variant."""
    before = peak(arguments.device)
    step = stepper(arguments.variant[0], arguments, arguments.precision[0])
    step()
    step()
    print(before, peak(arguments.device))


def head(arguments: argparse.Namespace) -> None:
    """In a child: `relative` over all pairs of one image's random tokens."""
    size = 16 * arguments.side
    torch.manual_seed(0)
    backbone = create(ModelConfig("vit_small_patch16_224", {"depth": 1}), size)
    objective = objectives.build("relative", objectives.options("relative", {"pairs": "all"}), backbone)
    tokens = torch.randn(1, arguments.side**2, backbone.width, device=arguments.device, requires_grad=True)
    features = Features(tokens, tokens[:, :0], backbone.grid)
    before = peak(arguments.device)
    objective.to(arguments.device)({"tokens": features}, {})["loss"].backward()
    assert tokens.grad is not None and tokens.grad.abs().sum() > 0
    print(before, peak(arguments.device))


def main() -> None:
    """Parse arguments, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="?", choices=["time", "memory", "pairs", "one", "head"], help="default: time, memory and pairs")
    add("--model", default="vit_small_patch16_224")
    add("--size", type=int, default=224)
    add("--batch", type=int, default=16)
    add("--precision", choices=["fp32", "bf16"], nargs="*", default=["fp32", "bf16"])
    add("--attention", choices=["fused", "explicit"], default="explicit")
    add("--variant", choices=VARIANTS, nargs="*")
    add("--rounds", type=int, default=7)
    add("--threads", type=int)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--side", type=int, default=14)
    arguments = parser.parse_args()
    threads = set_threads(arguments.threads)[0]
    if arguments.what in ("one", "head"):
        return {"one": one, "head": head}[arguments.what](arguments)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {threads} threads"
    print(f"{arguments.model} at {arguments.size}, batch {arguments.batch}; torch {torch.__version__}, {where}")
    for precision in arguments.precision:
        if arguments.what in (None, "time"):
            measure_time(arguments, precision)
    for precision in arguments.precision:
        if arguments.what in (None, "memory"):
            measure_memory(arguments, precision)
    if arguments.what in (None, "pairs"):
        measure_pairs(arguments)


if __name__ == "__main__":
    main()
