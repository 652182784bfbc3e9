"""One step of DINO, ours beside the same step assembled from the public package lightly: time, memory, its parts.

    python benchmarks/dino_step.py                          # ViT-S/16, 2x224 + 8x96, K = 65,536, batch 8: everything
    python benchmarks/dino_step.py time --precision fp32 --attention fused --rounds 9
    python benchmarks/dino_step.py shipped                  # ours as we ship it: precision and attention measured
    python benchmarks/dino_step.py memory
    python benchmarks/dino_step.py parts                    # where the time of each side's step goes

A step is student and teacher forward, loss, backward, DINO's clipping of each tensor at 3.0, AdamW (fused), and the
average that moves the teacher; no random depth, no frozen last layer, images on the device already. Three sides:
`lightly` as its documented example has it (each view through backbone and head, then the loss), `lightly, grouped` as
its own ImageNet benchmark has it (one pass per resolution), and ours, through the calls of the training loop. Before
anything is timed all sides take the same weights and images, and their losses over two steps are compared: a benchmark
of different computations is none. lightly's images are normalised beforehand, ours are bytes.
In `time` and `parts` the sides alternate in one process, so that a noisy machine disturbs all alike, and ratios are of
each round's own first row. In `memory` each has a process of its own, whose peak is the largest resident set of three
steps, less that after the imports (on a GPU: the most memory allocated).
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry, set_threads

# isort: split
import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import statistics
import subprocess
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from accelerate import Accelerator
from timm.models import vision_transformer
from torch import Tensor, nn

from benchmarks.memory import peak
from common.batches.samples import Batch
from common.batches.views import View
from common.errors import Refusal
from common.models import ModelConfig, create
from common.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from common.models.create import set_attention
from common.training import precision as choice
from common.training.optim import clip_gradients, parameter_groups
from common.training.schedules import Schedule
from pretrain.task import build, resolve

KINDS = ("lightly", "lightly, grouped", "ours", "ours, logged")  # logged: a step whose diagnostics are computed
CLIP, MOMENTUM, DECAY, RATE = 3.0, 0.996, 0.04, 1e-4
TEACHER, STUDENT = 0.04, 0.1  # temperatures
WARMUP = 2  # steps; their losses are compared
# Losses are about 11. In fp32 the first update of AdamW enlarges what rounding left; under autocast lightly computes
# its loss in bf16, whose numbers near 11 are 0.06 apart, and ours is fp32.
CLOSE = {"fp32": 1e-4, "bf16": 0.1}
BOUNDS = {"equal": 1.00, "shipped": 0.90}  # on ours / lightly, in time and in memory


class Variant(NamedTuple):
    """One row of a table: a side and how it computes."""

    kind: str
    precision: str
    attention: str


@dataclass
class Side:
    """One training step in its parts."""

    forward: Callable[[], Tensor]  # () -> the loss, under autocast or not
    after: dict[str, Callable[[], Any]]  # what follows the backward pass, in order
    modules: dict[str, nn.Module]  # what `parts` times the forward pass of
    student: list[nn.Parameter]  # in the same order on every side
    teacher: list[nn.Parameter]
    precision: str
    device: torch.device

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of the forward pass."""
        lower = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if lower else contextlib.nullcontext()

    def step(self, mark: Callable[[str], None] = lambda part: None) -> Tensor:
        """One step; its loss. `mark` hears the name of each part when it is over."""
        with self.autocast():
            loss = self.forward()
        mark("forward")
        loss.backward()
        mark("backward")
        for part, act in self.after.items():
            act()
            mark(part)
        wait(self.device)
        return loss.detach()


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def crops(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(global, local) views as bytes, crop-major: (2B, 3, H, W) and (8B, 3, h, w)."""
    draw = torch.Generator().manual_seed(1)
    B, device = arguments.batch, torch.device(arguments.device)
    shapes = [(2 * B, arguments.size), (arguments.local_crops * B, arguments.local_size)]
    both = (torch.randint(0, 256, (rows, 3, s, s), dtype=torch.uint8, generator=draw) for rows, s in shapes)
    return tuple(images.to(device) for images in both)  # type: ignore[return-value]


def ours(variant: Variant, arguments: argparse.Namespace) -> Side:
    """Our step, by the calls that the training loop makes."""
    config = ModelConfig(arguments.model, kwargs={"dynamic_img_size": True}, attention=variant.attention)
    views = {
        "global": View(size=arguments.size, count=2),
        "local": View(size=arguments.local_size, count=arguments.local_crops),
    }
    options = {
        "prototypes": arguments.prototypes,
        "teacher_temperature": TEACHER,
        "student_temperature": STUDENT,
        "freeze_last_layer": 0.0,
    }
    device = torch.device(arguments.device)
    task: Any = build(create(config, arguments.size), resolve({"dino": options}), views).to(device).train()
    seen = dict(zip(views, crops(arguments), strict=True))
    batch = Batch(seen, torch.arange(arguments.batch, device=device))
    task.momentum = Schedule("constant", MOMENTUM, MOMENTUM)
    objective = task.objectives["dino"]
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    accelerator = Accelerator(cpu=device.type == "cpu")
    optimizer = torch.optim.AdamW(parameter_groups(task, DECAY), lr=RATE, fused=True)

    def forward() -> Tensor:
        task.begin_step(0.5, variant.kind == "ours, logged")
        return task(batch)["loss"]

    return Side(
        forward,
        {
            "clip": lambda: (task.before_update(), clip(accelerator, parameters)),
            "optimizer": lambda: (optimizer.step(), optimizer.zero_grad()),
            "teacher": lambda: task.after_step(taken=True),
        },
        {
            "student backbone": task.backbone,
            "teacher backbone": task.teacher,
            "student head": objective.head,
            "teacher head": objective.teacher_head,
        },
        [*task.backbone.model.parameters(), *objective.head.parameters()],
        [*task.teacher.model.parameters(), *objective.teacher_head.parameters()],
        variant.precision,
        device,
    )


def clip(accelerator: Accelerator, parameters: list[nn.Parameter]) -> float:
    """DINO's clipping, the same function on every side: lightly leaves it to the trainer. Waits for the norm."""
    return float(clip_gradients(accelerator, parameters, CLIP, "per_tensor"))


# timm antialiases the position embedding of local crops, and neither ours nor DINO does
vision_transformer.resample_abs_pos_embed = partial(vision_transformer.resample_abs_pos_embed, antialias=False)


class Crossing(nn.Module):
    """lightly's student or teacher: a timm ViT's class token, and lightly's head."""

    def __init__(self, arguments: argparse.Namespace, attention: str) -> None:
        super().__init__()
        from lightly.models.modules import DINOProjectionHead

        self.backbone: Any = timm.create_model(
            arguments.model, num_classes=0, img_size=arguments.size, dynamic_img_size=True
        )
        set_attention(self.backbone, attention)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's note that this weight_norm is the old one
            self.head = DINOProjectionHead(self.backbone.num_features, output_dim=arguments.prototypes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images, (rows, K)."""
        return self.head(self.backbone(images))

    def ordered(self) -> list[nn.Parameter]:
        """Its parameters in the order of ours; the norms of the prototypes are fixed at 1."""
        return [parameter for name, parameter in self.named_parameters() if not name.endswith("weight_g")]


def theirs(variant: Variant, arguments: argparse.Namespace) -> Side:
    """The step of lightly's example (documentation), or of its ImageNet benchmark where crops are grouped."""
    from lightly.loss import DINOLoss
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    device = torch.device(arguments.device)
    student = Crossing(arguments, variant.attention).to(device).train()
    teacher = Crossing(arguments, variant.attention).to(device)
    deactivate_requires_grad(teacher)
    criterion = DINOLoss(arguments.prototypes, TEACHER, TEACHER, student_temp=STUDENT).to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    both = [(images.float() / 255 - mean) / std for images in crops(arguments)]
    views = [view for images in both for view in images.split(arguments.batch)]
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    accelerator = Accelerator(cpu=device.type == "cpu")
    optimizer = torch.optim.AdamW(parameter_groups(student, DECAY), lr=RATE, fused=True)

    def one_by_one() -> Tensor:
        teacher_out = [teacher(view) for view in views[:2]]
        return criterion(teacher_out, [student(view) for view in views])

    def grouped() -> Tensor:
        with torch.no_grad():
            teacher_out = teacher(both[0]).chunk(2)
        student_out = torch.cat([student(images) for images in both])
        return criterion(teacher_out, student_out.chunk(len(views)))

    def follow() -> None:
        update_momentum(student.backbone, teacher.backbone, m=MOMENTUM)
        update_momentum(student.head, teacher.head, m=MOMENTUM)

    return Side(
        grouped if variant.kind == "lightly, grouped" else one_by_one,
        {
            "clip": lambda: clip(accelerator, parameters),
            "optimizer": lambda: (optimizer.step(), optimizer.zero_grad()),
            "teacher": follow,
        },
        {
            "student backbone": student.backbone,
            "teacher backbone": teacher.backbone,
            "student head": student.head,
            "teacher head": teacher.head,
        },
        student.ordered(),
        teacher.ordered(),
        variant.precision,
        device,
    )


def make(variant: Variant, arguments: argparse.Namespace) -> Side:
    """The side of a row, its weights drawn anew."""
    torch.manual_seed(0)
    return (ours if variant.kind.startswith("ours") else theirs)(variant, arguments)


@torch.no_grad()
def align(sides: list[Side]) -> None:
    """Give every side's student and teacher the first one's student weights."""
    for side in sides:
        for weights in (side.student, side.teacher):
            for mine, first in zip(weights, sides[0].student, strict=True):
                assert mine.shape == first.shape, f"{tuple(mine.shape)} is not {tuple(first.shape)}"
                mine.copy_(first)


def check(variants: list[Variant], sides: list[Side]) -> None:
    """Warm up, and compare the losses of each precision. Raises Refusal where they differ: not the same step then."""
    first: dict[str, list[float]] = {}
    for variant, side in zip(variants, sides, strict=True):
        losses = [float(side.step()) for _ in range(WARMUP)]
        those = first.setdefault(variant.precision, losses)
        if not max(abs(a - b) for a, b in zip(losses, those, strict=True)) < CLOSE[variant.precision]:
            raise Refusal(f"benchmark: not the same step: losses {losses} of {row(variant)}, {those} of another side")
    for precision, losses in first.items():
        print(f"losses of {WARMUP} steps, {precision}: " + ", ".join(f"{loss:.5f}" for loss in losses))


def alternate(sides: list[Side], rounds: int) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of each side's steps, round by round: of the clock, and of all cores together."""
    clock: list[list[float]] = [[] for _ in sides]
    cores: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds):
        order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))  # nobody always follows the same
        for i in order:
            begun = time.perf_counter(), time.process_time()
            sides[i].step()
            clock[i].append(time.perf_counter() - begun[0])
            cores[i].append(time.process_time() - begun[1])
    return clock, cores


def measure_time(variants: list[Variant], arguments: argparse.Namespace, title: str, bound: float) -> None:
    """Print one table of times: ratios to the first row and to the next, each with the ratio of the cores' time, which
    is the steadier one where a machine is shared."""
    sides = [make(variant, arguments) for variant in variants]
    align(sides)
    print(f"\ntime of a step, {title}, {arguments.rounds} alternating rounds; core: the same of all cores' time")
    check(variants, sides)
    clock, cores = alternate(sides, arguments.rounds)
    print(
        f"{'':36}{'ms':>9}{'fastest':>9}{'images/s':>10}" + f"{'to first':>10}{'core':>7}{'to second':>11}{'core':>7}"
    )
    for i, variant in enumerate(variants):
        middle = statistics.median(clock[i])
        numbers = f"{row(variant):36}{middle * 1e3:9.1f}{min(clock[i]) * 1e3:9.1f}{arguments.batch / middle:10.2f}"
        for base, width in ((0, 10), (1, 11)):
            numbers += f"{paired(clock, i, base):{width}.3f}{paired(cores, i, base):7.3f}"
        print(numbers + (f"  aim {bound:.2f}" if variant.kind == "ours" else ""), flush=True)


def paired(seconds: list[list[float]], i: int, base: int) -> float:
    """Median over the rounds of side i's time over that of side `base` in the same round."""
    base = min(base, len(seconds) - 1)
    return statistics.median(mine / other for mine, other in zip(seconds[i], seconds[base], strict=True))


def row(variant: Variant) -> str:
    return f"{variant.kind} ({variant.precision}, {variant.attention})"


def measure_memory(variants: list[Variant], arguments: argparse.Namespace, title: str, bound: float) -> None:
    """Print one table of peaks, each of a process of its own."""
    print(f"\npeak memory of three steps, {title}, a process each")
    print(f"{'':36}{'MiB':>9}{'ratio':>8}{'above imports':>15}{'ratio':>8}")
    base = None
    for variant in variants:
        before, top = in_child(arguments, variant)
        base = base or (top, top - before)
        print(
            f"{row(variant):36}{top:9,.0f}{top / base[0]:8.3f}{top - before:15,.0f}{(top - before) / base[1]:8.3f}"
            + (f"  aim {bound:.2f}" if variant.kind == "ours" else ""),
            flush=True,
        )


def in_child(arguments: argparse.Namespace, variant: Variant) -> tuple[float, float]:
    """(MiB before, MiB at the peak) that a child process of ours reports."""
    same = {name: getattr(arguments, name) for name in (*SIZES, "model", "device", "threads")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in same.items() if value is not None]
    words += [f"--side={variant.kind}", f"--precision={variant.precision}", f"--attention={variant.attention}"]
    command = [sys.executable, __file__, "one", *words]
    before, top = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-2:]
    return float(before), float(top)


def one(arguments: argparse.Namespace) -> None:
    """In a child: three steps of one side."""
    import lightly.loss
    import lightly.models.modules  # noqa: F401  # on every side, so that what is subtracted is the same

    before = peak(arguments.device)
    side = make(Variant(arguments.side[0], arguments.precision[0], arguments.attention[0]), arguments)
    align([side])
    for _ in range(3):
        side.step()
    print(before, peak(arguments.device))


class Clock:
    """Seconds of each part of a step, told by hooks on its modules."""

    def __init__(self, side: Side) -> None:
        self.side, self.seconds = side, defaultdict[str, float](float)
        self.since: dict[str, float] = {}
        self.last = 0.0
        self.first_head = 0.0  # when the backward pass reached the head
        for name, module in side.modules.items():
            module.register_forward_pre_hook(partial(self.begin, name))
            module.register_forward_hook(partial(self.end, name))
        head = side.modules["student head"]
        head.register_full_backward_pre_hook(partial(self.begin, "backward: head"))
        head.register_full_backward_hook(partial(self.end, "backward: head"))

    def now(self) -> float:
        wait(self.side.device)
        return time.perf_counter()

    def begin(self, name: str, *_: Any) -> None:
        """A hook: the part begins."""
        self.since[name] = self.now()
        if name == "backward: head":
            self.first_head = self.first_head or self.since[name]

    def end(self, name: str, *_: Any) -> None:
        """A hook: the part is over."""
        self.seconds[name] += self.now() - self.since[name]

    def mark(self, part: str) -> None:
        """The part since the last mark is over; what hooks saw of it is told apart."""
        now, whole = self.now(), self.now() - self.last
        if part == "forward":
            self.seconds["loss, and the rest"] = whole - sum(self.seconds.values())
        elif part == "backward":
            self.seconds["backward: loss"] = self.first_head - self.last
            rest = whole - self.seconds["backward: loss"] - self.seconds["backward: head"]
            self.seconds["backward: backbone"] = rest
        else:
            self.seconds[part] = whole
        self.last = now

    def step(self) -> dict[str, float]:
        """One step: {part: seconds}, and the whole."""
        self.seconds.clear()
        self.first_head = 0.0
        begun = self.last = self.now()
        self.side.step(self.mark)
        return dict(self.seconds) | {"whole step": self.now() - begun}


def measure_parts(variants: list[Variant], arguments: argparse.Namespace, title: str) -> None:
    """Print where the time of a step goes, side by side; medians over the rounds."""
    sides = [make(variant, arguments) for variant in variants]
    align(sides)
    clocks = [Clock(side) for side in sides]
    rounds = [[clock.step() for clock in clocks] for _ in range(arguments.rounds + 1)][1:]  # the first warms up
    print(f"\nparts of a step in ms, {title}")
    print(f"{'':22}" + "".join(f"{variant.kind:>20}" for variant in variants))
    for part in PARTS:
        middle = [statistics.median(each[i].get(part, 0.0) for each in rounds) * 1e3 for i in range(len(sides))]
        print(f"{part:22}" + "".join(f"{value:20.1f}" for value in middle), flush=True)


def shipped(arguments: argparse.Namespace) -> Variant:
    """Ours, in the precision and with the attention that a recipe's `auto` would choose here."""
    side = ours(Variant("ours", "fp32", "fused"), arguments)
    both = nn.ModuleList([side.modules["student backbone"], side.modules["teacher backbone"]])
    best = choice.choose("auto", "auto", both, lambda images: side.forward(), side.device)  # of all images each time
    print(f"as shipped: {best.precision}, {best.attention} attention")
    return Variant("ours", best.precision, best.attention)


def tables(arguments: argparse.Namespace) -> Iterator[tuple[list[Variant], str, float]]:
    """(rows, title, bound on the rows of ours) of each table that was asked for."""
    kinds = arguments.side or list(KINDS)
    if arguments.what != "shipped":
        for precision, attention in itertools.product(arguments.precision, arguments.attention):
            title = f"{precision}, {attention} attention on all sides"
            yield [Variant(kind, precision, attention) for kind in kinds], title, BOUNDS["equal"]
    if arguments.what in (None, "shipped"):
        best = shipped(arguments)
        rivals = [Variant("lightly", "fp32", "fused"), Variant("lightly, grouped", "fp32", "fused")]
        rivals.append(Variant("lightly, grouped", "bf16", "fused"))
        yield [*rivals, best], "ours as shipped", BOUNDS["shipped"]


PARTS = (
    "student backbone", "teacher backbone", "student head", "teacher head", "loss, and the rest",
    "backward: loss", "backward: head", "backward: backbone", "clip", "optimizer", "teacher", "whole step",
)  # fmt: skip
SIZES = {"size": 224, "local_size": 96, "local_crops": 8, "batch": 8, "prototypes": 65_536}


def main(argv: list[str]) -> None:
    """Parse arguments, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="?", choices=["time", "memory", "parts", "shipped", "one"], help="default: all but `one`")
    add("--model", default="vit_small_patch16_224")
    for name, value in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, default=value)
    add("--precision", choices=["fp32", "bf16"], nargs="*", default=["fp32", "bf16"])
    add("--attention", choices=["fused", "explicit"], nargs="*", default=["fused"])
    add("--side", choices=KINDS, nargs="*", help="rows of the tables; the first is what ratios are of")
    add("--rounds", type=int, default=5)
    add("--threads", type=int)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("lightly") is None:
        raise Refusal("benchmark: the package lightly is not installed: pip install --no-deps lightly lightly_utils")
    threads = set_threads(arguments.threads)[0]
    if arguments.what == "one":
        return one(arguments)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {threads} threads"
    versions = f"torch {torch.__version__}, timm {timm.__version__}, lightly {importlib.metadata.version('lightly')}"
    print(
        f"{arguments.model}, 2x{arguments.size} + {arguments.local_crops}x{arguments.local_size}, batch "
        f"{arguments.batch}, K {arguments.prototypes:,}; {versions}; {where}"
    )
    for variants, title, bound in tables(arguments):
        if arguments.what in (None, "time", "shipped"):
            measure_time(variants, arguments, title, bound)
        if arguments.what in (None, "memory", "shipped"):
            measure_memory(variants, arguments, title, bound)
        if arguments.what in (None, "parts") and title != "ours as shipped":
            measure_parts(variants, arguments, title)


if __name__ == "__main__":
    entry(main)()
