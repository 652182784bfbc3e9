"""What linear heads cost: many against one with the backbone in the loop, and features once against once an epoch.

    python benchmarks/probe.py
    python benchmarks/probe.py --model vit_small_patch16_224 --size 224 --batch 32 --rounds 3
    python benchmarks/probe.py --optimizers --threads 1

`heads`: a step of all of DINOv2's 52 heads on random crops, against a step of one, with the same passes of the backbone
before them: at most 1.3 times one. `cache`: an epoch of DINOv2's 52 heads, and of one, from features that are there,
against an epoch that runs the backbone again: at least 20 times faster. All alternate in one process, so that a noisy
machine disturbs all alike, and ratios are of each round's own times. The images are the built-in ones.

`--optimizers` compares in their place a step of the sweep's thirteen heads, whose update is written out over all of
them at once, with the same heads as parameters of torch.optim.SGD, AdamW and timm's Lars, on features of noise.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import set_threads

# isort: split
import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.optim import Lars
from torch import Tensor

from common.data import open_data
from common.features.extraction import extract
from common.models import Backbone, ModelConfig, create
from evaluate.probing.probe import MOMENTUM, TRUST, Heads, HeadTraining, Parts, drawn
from evaluate.probing.protocols import PROTOCOLS, sets
from evaluate.probing.views import batches, view

BLOCKS, CLASSES = 4, 10
HEADS_BOUND, CACHE_BOUND = 1.3, 20.0


def made(every: bool, width: int, device: torch.device) -> list[Heads]:
    """DINOv2's 52 heads, or the one on the last class token with the largest rate."""
    protocol = PROTOCOLS["dinov2"]
    assert protocol.training is not None
    wanted, _ = sets(protocol, {"class", "mean", "class4", "mean4"}, width)
    sizes = {"class": width, "mean": width, "class4": BLOCKS * width}
    one = replace(protocol.training, rates=protocol.training.rates[-1:])
    chosen = [(parts, protocol.training) for parts in wanted.values()] if every else [(wanted["last"], one)]
    return [
        Heads(parts, sum(sizes[part] for part in parts), CLASSES, training, torch.Generator().manual_seed(0), device)
        for parts, training in chosen
    ]


def looped(backbone: Backbone, arguments: argparse.Namespace, every: bool) -> Callable[[], None]:
    """A step with the backbone in the loop, as a function; without `every`, one block and one head."""
    device = torch.device(arguments.device)
    images = open_data("builtin").subset(range(arguments.images))
    steps = len(images) // arguments.batch * 10_000
    stream = batches(
        backbone, None, images, batch=arguments.batch, steps=steps, seed=0, blocks=BLOCKS if every else 1,
        crop=view(backbone.size, "bicubic"),
    )  # fmt: skip
    heads = made(every, backbone.width, device)

    def step() -> None:
        parts, labels = next(stream)
        for each in heads:
            each.step(parts, labels, 1.0)
        synchronize(device)

    return step


def epochs(backbone: Backbone, arguments: argparse.Namespace, every: bool) -> tuple[Callable[[], None], ...]:
    """(an epoch from features that are there, an epoch that computes them), as functions."""
    device = torch.device(arguments.device)
    images = open_data("builtin").subset(range(arguments.images))
    assert images.labels is not None
    labels = torch.from_numpy(images.labels).to(device)

    def features() -> dict[str, Tensor]:
        found = extract(
            backbone, None, images, blocks=BLOCKS if every else 1, device=device, batch_size=arguments.batch
        )
        return {name: part.to(device) for name, part in found.items() if name != "index"}

    there, rng = features(), torch.Generator().manual_seed(0)
    heads = made(every, backbone.width, device)
    stream: list[Iterator] = [drawn(there, labels, arguments.batch, rng)]

    def cached() -> None:
        for _ in range(len(labels) // arguments.batch):
            parts, some = next(stream[0])
            for each in heads:
                each.step(parts, some, 1.0)
        synchronize(device)

    def again() -> None:
        stream[0] = drawn(features(), labels, arguments.batch, rng)
        cached()

    return cached, again


class ByLibrary(Heads):
    """The same heads, each a parameter (C, D) of its own with its rate, moved by an optimizer of torch or timm."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.weights_LCD, self.biases_LC = self.weights.transpose(0, 1).contiguous(), self.biases.T.contiguous()
        self.gradients = [torch.zeros_like(self.weights_LCD), torch.zeros_like(self.biases_LC)]
        groups = []
        for at, rate in enumerate(self.given):
            for several, gradients in zip((self.weights_LCD, self.biases_LC), self.gradients, strict=True):
                parameter = torch.nn.Parameter(several[at])
                parameter.grad = gradients[at]
                groups.append({"params": [parameter], "rate": rate, "lr": rate})
        if self.optimizer == "lars":
            for at, group in enumerate(groups):
                group |= {"always_adapt": at % 2 == 0}  # not the biases
            self.solver: torch.optim.Optimizer = Lars(groups, momentum=MOMENTUM, trust_coeff=TRUST)
            return
        groups = [{"params": a["params"] + b["params"], "rate": a["rate"], "lr": a["rate"]}
                  for a, b in zip(groups[::2], groups[1::2], strict=True)]  # fmt: skip
        adam = self.optimizer == "adamw"
        self.solver = (
            torch.optim.AdamW(groups, weight_decay=0, foreach=True)
            if adam
            else torch.optim.SGD(groups, momentum=MOMENTUM, foreach=True)
        )

    @torch.no_grad()
    def step(self, parts: Parts, labels: Tensor, share: float) -> None:
        x_BD = self.columns(parts)
        (L, C), B = self.biases_LC.shape, len(labels)
        x_BD = self._normalised(x_BD) if self.batch_norm else x_BD
        logits_LCB = (self.weights_LCD.view(L * C, -1) @ x_BD.T).view(L, C, B) + self.biases_LC[..., None]
        error_LCB = logits_LCB.softmax(1)
        error_LCB[:, labels, torch.arange(B, device=labels.device)] -= 1
        error_LCB /= B
        torch.mm(error_LCB.view(L * C, B), x_BD, out=self.gradients[0].view(L * C, -1))
        torch.sum(error_LCB, 2, out=self.gradients[1])
        for group in self.solver.param_groups:
            group["lr"] = group["rate"] * (B / 256) * share
        self.solver.step()


def optimizers(rounds: int, device: torch.device) -> dict[str, float]:
    """Time of a step by a library's optimizer, as a multiple of ours, for some numbers of classes and widths."""
    ratios = {}
    for classes, width, batch, steps in (
        (10, 192, 128, 50),
        (10, 768, 128, 50),
        (100, 384, 256, 15),
        (1000, 384, 256, 3),
    ):
        rng = torch.Generator().manual_seed(0)
        parts = {"all": torch.randn(batch, width, generator=rng).to(device)}
        labels = torch.randint(classes, (batch,), generator=rng).to(device)
        for name in ("sgd", "adamw", "lars"):
            training = HeadTraining(optimizer=name, normalise="batch" if name == "lars" else "none")
            made = [
                kind(["all"], width, classes, training, torch.Generator().manual_seed(0), device)
                for kind in (Heads, ByLibrary)
            ]  # fmt: skip

            def several(heads: Heads, steps: int = steps, parts: Parts = parts, labels: Tensor = labels) -> None:
                for _ in range(steps):
                    heads.step(parts, labels, 1.0)
                synchronize(device)

            times = timed({"ours": partial(several, made[0]), "library": partial(several, made[1])}, rounds)
            label = f"{name}, {classes} classes, width {width}, batch {batch}"
            ratios[label] = paired(times, "library", "ours")
            print(f"{label}: ours {1000 * statistics.median(times['ours']) / steps:.2f} ms a step, "
                  f"the library's {ratios[label]:.2f} times that")  # fmt: skip
    return ratios


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round, by turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - begun)
    return times


def paired(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def main() -> None:
    """Print both comparisons, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="vit_tiny_patch16_224")
    add("--patch", type=int, default=4)
    add("--size", type=int, default=32)
    add("--batch", type=int, default=128)
    add("--images", type=int, default=1280, help="of the built-in ones")
    add("--rounds", type=int, default=5)
    add("--threads", type=int)
    add("--device", default="cpu")
    add("--optimizers", action="store_true", help="ours against torch's and timm's")
    arguments = parser.parse_args()
    threads, _ = set_threads(arguments.threads)
    if arguments.optimizers:
        ratios = optimizers(arguments.rounds, torch.device(arguments.device))
        print(json.dumps({name: round(ratio, 2) for name, ratio in ratios.items()}))
        return
    torch.manual_seed(0)
    backbone = create(ModelConfig(arguments.model, {"patch_size": arguments.patch}), arguments.size)
    backbone.to(arguments.device).eval()
    print(
        f"{arguments.model}, patch {arguments.patch}, {arguments.size} px, batch {arguments.batch}, "
        f"{arguments.images} built-in images, {arguments.device}, {threads} threads, {arguments.rounds} rounds"
    )
    step = timed({"52": looped(backbone, arguments, True), "1": looped(backbone, arguments, False)}, arguments.rounds)
    heads = paired(step, "52", "1")
    print(f"heads: a step of 52 {1000 * statistics.median(step['52']):.0f} ms, of 1 "
          f"{1000 * statistics.median(step['1']):.0f} ms: {heads:.2f} times (at most {HEADS_BOUND})")  # fmt: skip
    ratios = {}
    for name, every in (("52", True), ("1", False)):
        cached, again = epochs(backbone, arguments, every)
        epoch = timed({"cached": cached, "again": again}, arguments.rounds)
        ratios[name] = paired(epoch, "again", "cached")
        print(f"cache, {name} head(s): an epoch {1000 * statistics.median(epoch['cached']):.0f} ms, with the backbone "
              f"{1000 * statistics.median(epoch['again']):.0f} ms: {ratios[name]:.0f} times faster "
              f"(at least {CACHE_BOUND:g})")  # fmt: skip
    print(json.dumps({"heads": round(heads, 3), "cache_52": round(ratios["52"], 1), "cache_1": round(ratios["1"], 1)}))


if __name__ == "__main__":
    main()
