"""Rows of the table of equal time: the words that each adds to the common recipe, and how many steps it gets."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common import config as configuration
from common.errors import Refusal

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "natural"
REFERENCE = "absolute"  # what all rows are compared with: their cost, and their answers on each test image
EIGHTHS = (1, 2, 4)  # of the training, after which it is judged too


def _absolute(*more: str, weight: float = 1.0, head: str = "linear", position: str = "none") -> list[str]:
    words = [f"weight={weight}", f"head={head}", f"position={position}", *more]
    return [f"objectives.absolute.{word}" for word in words]


def _relative(head: str) -> list[str]:
    return ["objectives.relative.weight=1.0", f"objectives.relative.head={head}", "objectives.relative.position=none"]


PLACE = ["views.place.size=32", "views.place.scale=[0.5,1.0]", "views.place.flip=0.0", "views.place.jitter=0.0",
         "views.place.grayscale=0.0"]  # fmt: skip  # what a positional label looks at beside other objectives' crops
CROPS = [
    "model.kwargs.dynamic_img_size=true",
    "views.global.preset=dino", "views.global.size=32", "views.global.scale=[0.4,1.0]",
    "views.global.flip=0.5", "views.global.jitter=0.8", "views.global.grayscale=0.2",
    "views.global.blur=0.0", "views.global.solarise=0.0",
    "views.local.preset=dino", "views.local.size=16", "views.local.scale=[0.1,0.4]", "views.local.count=4",
    "views.local.blur=0.0",
]  # fmt: skip  # two whole crops and four small ones; pictures of 32 pixels are neither blurred nor solarised
DINO = [
    *CROPS, "optimizer.clip=3.0", "optimizer.clip_by=per_tensor",
    "teacher.momentum={schedule: cosine, start: 0.99, end: 1.0}",
    "objectives.dino.weight=1.0", "objectives.dino.prototypes=1024", "objectives.dino.hidden=512",
    "objectives.dino.bottleneck=128", "objectives.dino.teacher_temperature=0.04",
    "objectives.dino.centering=sinkhorn",
]  # fmt: skip
SIGREG = [*CROPS, "objectives.sigreg.weight=1.0", "objectives.sigreg.lam=0.05", "objectives.sigreg.width=512"]
DROPPOS = [
    "keep=0.25", "position_keep=0.25", "smoothing=1.0", "attentive=kept", "decoder.blocks=2",
    "decoder.width=128", "decoder.heads=4",
]  # fmt: skip
ROWS = {
    REFERENCE: _absolute(head="half"),
    "relative, half": _relative("half"),
    "relative, separable": _relative("separable"),
    "relative, regression": _relative("regression"),
    "relative, distance": _relative("distance"),
    "MP3": _absolute("context=0.25"),
    "Jigsaw-ViT": _absolute("keep=0.5", head="mlp"),
    "DropPos": [*_absolute(*DROPPOS, position="partial"), "model.position_embedding=sincos"],
    "absolute, gap": [*_absolute(head="half"), "views.global.gap=1"],
    "absolute, jitter": [*_absolute(head="half"), "views.global.patch_jitter=0.4"],
    "absolute, gap and jitter": [*_absolute(head="half"), "views.global.gap=1", "views.global.patch_jitter=0.4"],
    "absolute, gap, jitter, colour": [
        *_absolute(head="half"), "views.global.gap=1", "views.global.patch_jitter=0.4",
        "views.global.patch_drop_colour=0.5",
    ],
    "DINO": DINO,
    "DINO, absolute": [*DINO, *PLACE, *_absolute("view=place", weight=0.5)],
    "SIGReg": SIGREG,
    "SIGReg, absolute": [*SIGREG, *PLACE, *_absolute("view=place", weight=0.5)],
}  # fmt: skip  # name: words for pretrain/run.py
PEERS = {"lightly's MAE": "mae", "lightly's SimCLR": "simclr"}  # name: method of benchmarks/natural/peers.py
EVERY = (*ROWS, *PEERS)
BASELINES = {"untrained": "random", "pixels": "pixels", "patches": "patches"}  # name: what evaluations call it


@dataclass(frozen=True)
class Job:
    """One run: a row, by a seed, for some minutes."""

    row: str
    seed: int
    minutes: float

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        name = self.row.replace(", ", "-").replace(" ", "_").replace("'", "")
        return RUNS / f"{self.minutes:g}min-{name}-s{self.seed}"


def queue(rows: Sequence[str], seeds: Sequence[int], minutes: float) -> list[Job]:
    """The runs in the order in which they are wanted: the first seed of all rows first, the reference before others."""
    ordered = [name for name in EVERY if name == REFERENCE or name in rows]
    return [Job(row, seed, minutes) for seed in seeds for row in ordered]


def steps_in(minutes: float, seconds: float, row: str = REFERENCE) -> int:
    """Number of steps of `seconds` each in so many minutes: a multiple of 8, so that an eighth is a whole step.

    Raises Refusal where there are fewer than 8.
    """
    steps = int(minutes * 60 / seconds) // 8 * 8
    if steps < 8:
        raise Refusal(f"--minutes {minutes:g}: a step of {row} takes {seconds:.2f} s, and 8 are the least: give more")
    return steps


def ratios(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """{row: cost of its step over that of the reference}: medians over rounds, in each of which all rows took turns, so
    that whatever slows a round slows both."""
    return {row: statistics.median(each[row] / each[REFERENCE] for each in rounds) for row in rounds[0]}


def recipe_of(name: str) -> dict[str, Any]:
    """What the common recipe says."""
    content: Any = OmegaConf.to_container(configuration.read_yaml(configuration.find_recipe(name, "pretrain")))
    return content
