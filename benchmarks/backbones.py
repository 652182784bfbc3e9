"""What the papers' backbones cost beside plain ones: time and peak memory of forward and backward, and their MACs.

    python benchmarks/backbones.py                                    # 224 pixels, batch 8, one thread: everything
    python benchmarks/backbones.py time --pair irpe --precision fp32 --rounds 9
    python benchmarks/backbones.py memory --pair sp-vit --size 384
    python benchmarks/backbones.py time --pair stem --size 32 --batch 64 --precision fp32 --rounds 15
    python benchmarks/backbones.py macs
    python benchmarks/backbones.py --device cuda --batch 64           # on a GPU: several steps a turn, synchronised

A step is forward in training mode and backward, all classes and heads, drop path 0, no optimizer. Weights that begin
at zero (iRPE's tables, SP-ViT's prior) are drawn, so that no side has less to do. Every side of a table has the same
precision and the same attention setting; `auto` is timm's own choice, scaled_dot_product_attention for plain blocks
and ours for relative ones.
In `time` the sides alternate in one process, so that a noisy machine disturbs all alike: ratios to the first row are
of medians, of minima, of the cores' time (steadier than the clock where a machine is shared), and of each round, of
which the quartiles are shown. In `memory` each side has a process of its own; peak is the largest resident set of two
steps (on a GPU: the most memory allocated), shown whole and without what the imports took. Tables are Markdown.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry, set_threads

# isort: split
import argparse
import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import common.models  # noqa: F401  # registers iRPE, LV-ViT and SP-ViT with timm
from benchmarks.memory import peak
from common.models.backbone import IMAGENET_STD
from common.models.create import set_attention
from common.models.stem import add_stem


class Side(NamedTuple):
    """One row of a table: a model of timm's, or one part of it."""

    model: str
    kwargs: Mapping[str, Any] = MappingProxyType({})
    part: str = ""
    stem: Mapping[str, Any] | None = None  # options of a stem of filters
    time: float | None = None  # bounds on the ratios to the table's first row
    memory: float | None = None


DEIT = "deit_small_patch16_224"
DEEP = Side("vit_small_patch16_224", {"depth": 16, "mlp_ratio": 3.0, "qkv_bias": False})
WITHOUT_MIXING = {"mix_token": False}  # dense outputs, and no exchange of tokens, which costs a copy of them
LVVIT = Side("lvvit_s", WITHOUT_MIXING)
SMALL = Side("vit_tiny_patch16_224", {"patch_size": 8, "depth": 4})  # 192 wide
PAIRS: dict[str, dict[str, Side]] = {
    "irpe": {
        "DeiT-S": Side(DEIT),
        "iRPE on k": Side(f"{DEIT}_ctx_product_50_shared_k", time=1.08),
        "iRPE on q, k": Side(f"{DEIT}_ctx_product_50_shared_qk"),
        "iRPE on q, k, v": Side(f"{DEIT}_ctx_product_50_shared_qkv", time=1.25),
    },
    "lv-vit": {
        "ViT-S, 16 deep, MLP 3": DEEP,
        "LV-ViT-S": LVVIT,
        "its patch embedding": DEEP._replace(part="patch_embed"),
        "LV-ViT's stem": LVVIT._replace(part="patch_embed"),
        "LV-ViT's auxiliary head": LVVIT._replace(part="aux_head"),
    },
    "sp-vit": {
        "LV-ViT-S": LVVIT,
        "SP-ViT-S": Side("spvit_s", WITHOUT_MIXING, time=1.15, memory=1.10),
    },
    "stem": {
        "ViT, 192 wide, 4 deep": SMALL,
        "with a stem of 200 filters": SMALL._replace(stem={"filters": 200, "side": 6}),
    },
}
# Multiply-accumulates in millions at 224 pixels, of matrix products alone (arXiv 2107.14222; the second number is the
# authors' README, whose counter is not documented and counts more). Their values are looked up for each pair; summing
# probabilities by bucket first takes 45.4 instead of 178.8.
PUBLISHED = {
    "DeiT-S": "4598.9",
    "iRPE on k": "4644.3 (4659): k 45.4",
    "iRPE on q, k": "4689.7 (4706): q 45.4",
    "iRPE on q, k, v": "4868.5 (4885): v 178.8; by sums 4735.1: v 45.4",
}
WARMUP = 1


def make(side: Side, arguments: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """(module in training mode, its input) of a row."""
    torch.manual_seed(0)
    device, B = torch.device(arguments.device), arguments.batch
    model: Any = timm.create_model(side.model, img_size=arguments.size, drop_path_rate=0.0, **side.kwargs)
    if side.stem is not None:
        add_stem(model, IMAGENET_STD, **side.stem)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    set_attention(model, arguments.attention)
    model = model.to(device).train()
    if side.part == "aux_head":
        tokens = torch.randn(B, model.patch_embed.num_patches, model.embed_dim, device=device, requires_grad=True)
        return model.aux_head, tokens
    images = torch.randn(B, 3, arguments.size, arguments.size, device=device)
    return model.get_submodule(side.part), images


def stepper(side: Side, arguments: argparse.Namespace, precision: str) -> Callable[[], None]:
    """Forward and backward as a function."""
    module, given = make(side, arguments)
    lower = precision == "bf16"

    def step() -> None:
        for _ in range(arguments.steps):
            kind = given.device.type
            with torch.autocast(kind, dtype=torch.bfloat16) if lower else contextlib.nullcontext():
                outputs = module(given)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = sum(output.float().square().mean() for output in outputs if isinstance(output, Tensor))
            loss.backward()  # type: ignore[union-attr]
            module.zero_grad()
        if given.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def alternate(steps: list[Callable[[], None]], rounds: int) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of each side's turns, round by round: of the clock, and of all cores together."""
    clock: list[list[float]] = [[] for _ in steps]
    cores: list[list[float]] = [[] for _ in steps]
    for turn in range(-WARMUP, rounds):
        order = range(len(steps)) if turn % 2 == 0 else reversed(range(len(steps)))  # nobody always follows the same
        for i in order:
            begun = time.perf_counter(), time.process_time()
            steps[i]()
            if turn >= 0:
                clock[i].append(time.perf_counter() - begun[0])
                cores[i].append(time.process_time() - begun[1])
    return clock, cores


def measure_time(pair: str, arguments: argparse.Namespace, precision: str) -> None:
    """Print one table of times."""
    sides = PAIRS[pair]
    steps = [stepper(side, arguments, precision) for side in sides.values()]
    clock, cores = alternate(steps, arguments.rounds)
    print(f"\n{pair}, {precision}: time of a step, {arguments.rounds} alternating rounds\n")
    print("| | ms | fastest | images/s | of medians | of minima | of cores' time | each round's quartiles | bound |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for i, (name, side) in enumerate(sides.items()):
        middle, least = (which(clock[i]) / arguments.steps for which in (statistics.median, min))
        ratios = [which(clock[i]) / which(clock[0]) for which in (statistics.median, min)]
        busy = statistics.median(cores[i]) / statistics.median(cores[0])
        each = [mine / first for mine, first in zip(clock[i], clock[0], strict=True)]
        low, _, high = statistics.quantiles(each, method="inclusive") if len(each) > 1 else each * 3
        print(
            f"| {name} | {middle * 1e3:.1f} | {least * 1e3:.1f} | {arguments.batch / middle:.2f} | {ratios[0]:.3f} | "
            f"{ratios[1]:.3f} | {busy:.3f} | {low:.3f} to {high:.3f} | {side.time or ''} |",
            flush=True,
        )
    if pair == "lv-vit":
        explain(clock, arguments.steps)


def explain(clock: list[list[float]], steps: int) -> None:
    """Print what of LV-ViT's time its stem and auxiliary head explain, each measured alone in the same rounds."""
    print()
    for name, which in (("medians", statistics.median), ("minima", min)):
        plain, whole, embedding, stem, head = (which(times) / steps * 1e3 for times in clock)
        sum_ = plain - embedding + stem + head
        print(
            f"By {name}: {plain:.1f} - {embedding:.1f} (patch embedding) + {stem:.1f} (stem) + {head:.1f} (auxiliary "
            f"head) = {sum_:.1f} ms; LV-ViT takes {whole:.1f} ms, {whole / sum_:.3f} of that."
        )


def measure_memory(pair: str, arguments: argparse.Namespace, precision: str) -> None:
    """Print one table of peaks, each of a process of its own."""
    print(f"\n{pair}, {precision}: peak memory of two steps, a process each\n")
    print("| | MiB | ratio | above imports | ratio | bound |\n|---|---:|---:|---:|---:|---:|")
    first = None
    for name, side in PAIRS[pair].items():
        if side.part:
            continue
        before, top = in_child(arguments, pair, name, precision)
        first = first or (top, top - before)
        print(
            f"| {name} | {top:,.0f} | {top / first[0]:.3f} | {top - before:,.0f} | {(top - before) / first[1]:.3f} | "
            f"{side.memory or ''} |",
            flush=True,
        )


def in_child(arguments: argparse.Namespace, pair: str, row: str, precision: str) -> tuple[float, float]:
    """(MiB before, MiB at the peak) that a child process of ours reports."""
    same = {name: getattr(arguments, name) for name in ("size", "batch", "attention", "threads", "device")}
    words = [f"--{name}={value}" for name, value in same.items()]
    words += [f"--pair={pair}", f"--row={row}", f"--precision={precision}", "--steps=2"]
    command = [sys.executable, __file__, "one", *words]
    before, top = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-2:]
    return float(before), float(top)


def one(arguments: argparse.Namespace) -> None:
    """In a child: two steps of one side."""
    before = peak(arguments.device)
    stepper(PAIRS[arguments.pair[0]][arguments.row], arguments, arguments.precision[0])()
    print(before, peak(arguments.device))


def count(side: Side, arguments: argparse.Namespace) -> float:
    """Millions of multiply-accumulates of one image's forward pass: matrix products and convolutions, as torch counts
    them when they run."""
    alone = argparse.Namespace(**vars(arguments) | {"batch": 1, "device": "cpu", "attention": "explicit"})
    module, given = make(side, alone)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(given)
    return counter.get_total_flops() / 2e6


def show_macs(pair: str, arguments: argparse.Namespace) -> None:
    """Print what is counted beside what was published."""
    print(f"\n{pair}: millions of multiply-accumulates of one forward pass\n")
    print("| | counted | ratio | more than the row before | published, at 224 |\n|---|---:|---:|---:|---|")
    counted: dict[str, float] = {}
    for name, side in PAIRS[pair].items():
        counted[name] = count(side, arguments)
        first, *_ = counted.values()
        previous = list(counted.values())[-2:][0]
        more = "" if side.part or len(counted) == 1 else f"{counted[name] - previous:.1f}"
        print(f"| {name} | {counted[name]:.1f} | {counted[name] / first:.3f} | {more} | {PUBLISHED.get(name, '')} |")
    if pair == "lv-vit":
        plain, whole, embedding, stem, head = counted.values()
        sum_ = plain - embedding + stem + head
        print(f"\n{plain:.1f} - {embedding:.1f} + {stem:.1f} + {head:.1f} = {sum_:.1f}; LV-ViT: {whole:.1f}")


def main(argv: list[str]) -> None:
    """Parse arguments, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="?", choices=["macs", "time", "memory", "one"], help="default: all but `one`")
    add("--pair", choices=PAIRS, nargs="*", default=list(PAIRS))
    add("--row", help="of `one`: which side")
    add("--size", type=int, default=224)
    add("--batch", type=int, default=8)
    add("--precision", choices=["fp32", "bf16"], nargs="*", default=["fp32", "bf16"])
    add("--attention", choices=("auto", "fused", "explicit"), default="auto")
    add("--rounds", type=int, default=7)
    add("--steps", type=int, help="of each turn; default: 1, on a GPU 10")
    add("--threads", type=int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    arguments.steps = arguments.steps or (10 if arguments.device == "cuda" else 1)
    threads = set_threads(arguments.threads)[0]
    if arguments.what == "one":
        return one(arguments)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {threads} thread(s)"
    print(
        f"{arguments.size} pixels, batch {arguments.batch}, {arguments.attention} attention on all sides; "
        f"torch {torch.__version__}, timm {timm.__version__}; {where}"
    )
    for pair in arguments.pair:
        if arguments.what in (None, "macs"):
            show_macs(pair, arguments)
        for precision in arguments.precision:
            if arguments.what in (None, "time"):
                measure_time(pair, arguments, precision)
            if arguments.what in (None, "memory"):
                measure_memory(pair, arguments, precision)


if __name__ == "__main__":
    entry(main)()
