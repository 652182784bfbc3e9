"""The options that every evaluation takes."""

import argparse
import os
from typing import Any

import torch

from common.commands import Parser
from common.data.location import OPTIONS
from common.errors import Refusal
from common.paths import expanded
from common.training.precision import DTYPES

LABELS = {"subject": "trained", "random": "random init", "pixels": "raw pixels", "patches": "patches"}  # a table's rows
BASELINES = ("random", "pixels")  # that stand beside what is judged unless asked otherwise; patches take their time

READOUTS = ("field", "quarters")


def parser(
    script: str,
    precision: str | None = "fp32",
    crop: bool = False,
    raw: bool = False,
    several: bool = False,
    readout: bool = False,
) -> Parser:
    """Parser with the options that every evaluation takes.

    script: docstring of the entry script. crop: adds --crop. raw: adds --baselines, and --ckpt may be pixels
    or patches. several: --ckpt takes checkpoints, and may be left out. readout: adds --readout.
    """
    parser = Parser(description=script, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    word = "RUN|FILE|random|pixels|patches|timm:NAME" if raw else "RUN|FILE|random|timm:NAME"
    many: dict[str, Any] = {"nargs": "+", "default": []} if several else {"required": True}
    add("--ckpt", **many, type=expanded, metavar=word, help="what is judged")
    add("--weights", type=expanded, metavar="FILE", help="local weights of timm:NAME; of a file with several models "
        "FILE::PART, such as FILE::student (default: the teacher, else an average, else the model)")  # fmt: skip
    size = ", size of `pixels` and `patches`" if raw else ""
    add("--like", type=expanded, metavar="RUN|RECIPE",
        help=f"architecture of `random`{size} (default: the quickstart recipe's)")  # fmt: skip
    add_data(parser, "images, labelled but for layers (default: what the run was trained on)")
    add("--seeds", "--seed", type=int, nargs="+", default=[0], metavar="N", help="of baselines and heads (default: 0)")
    add("--out", type=expanded, metavar="PATH", help="folder or .json file (default: RUN/evaluate)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    usual = precision or "as trained"
    add("--precision", choices=list(DTYPES), default=precision, help=f"of the backbone (default: {usual})")
    if raw:
        rows, usual = list(LABELS)[1:], " ".join(BASELINES)
        add("--baselines", nargs="*", choices=rows, default=list(BASELINES), metavar="NAME", help="rows beside it, of "
            f"{', '.join(rows)} (default: {usual}; patches take about a minute for 10,000 images)")  # fmt: skip
    if crop:
        add("--crop", type=float, metavar="SHARE", help="of the short side that is shown: 0.875, 224 of 256 pixels, is "
            "DINO's, DINOv2's and MAE's (default: as the checkpoint says; timm says 0.9 of many)")  # fmt: skip
    if readout:
        add("--readout", choices=READOUTS, default=READOUTS[0], help="field: one vector of the last block; quarters: "
            "the mean patch of every quarter of the image, of the block that held-out training images choose, over 4 "
            "grids half a patch apart: for backbones that learned from patches (default: field)")  # fmt: skip
    add("--max-bad", metavar="N|SHARE", help="unreadable images, of both splits together, that are borne: a share "
        "below 1 (0.01 or 1%%), a number from 1, 0 for none, or auto: a hundredth or, of less than 600, 5 but no more "
        "than a tenth (default: as the run, else auto)")  # fmt: skip
    add("--workers", type=int, default=0, metavar="N", help="processes that decode images (default: 0)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the usable cores)")
    return parser


def add_data(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add the options that say where images are; `purpose` is the help of --data."""
    add = parser.add_argument
    add("--data", type=expanded, metavar="SPEC", help=purpose)
    add("--data-root", type=expanded, metavar="DIR", help="where a named data set is looked for, and fetched to")
    add("--data-train", type=expanded, metavar="NAME", help="sub-folder, archive or split to train on")
    add("--data-validation", type=expanded, metavar="NAME", help="sub-folder, archive or split to judge on")
    add("--data-image", metavar="COLUMN", help="of the images in hf:; in shards, how their names end")
    add("--data-label", metavar="COLUMN", help="of their labels in hf:; in shards, field of .json")
    add("--data-range", metavar="LOW:HIGH", help="values of black and white in pictures of more than 8 bits")


def data_options(arguments: argparse.Namespace) -> dict[str, str | None]:
    """Values of the options of `add_data`, by the names that a run stores them under."""
    return {name: getattr(arguments, name) for name in OPTIONS.values()}


def chosen_device(requested: str | None) -> torch.device:
    """Device named by --device, else a GPU if there is one and ACCELERATE_USE_CPU is not set, else the CPU.

    Each of several processes takes another GPU, if there are enough. Raises Refusal if the device cannot be used.
    """
    without = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    try:
        device = torch.device(requested or ("cuda" if torch.cuda.is_available() and not without else "cpu"))
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count()))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).splitlines()[0]
        raise Refusal(f"--device {requested}: {reason}; expected cpu, or cuda on a machine with a GPU") from None
    return device
