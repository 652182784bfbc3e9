"""A trained backbone for other programs, each file tried on real images before it is left behind.

    python evaluate/export.py --ckpt runs/quickstart-001
    python evaluate/export.py --ckpt runs/quickstart-001 --to timm safetensors onnx --out DIR --force

timm         model.safetensors and config.json, for timm.create_model("local-dir:DIR", pretrained=True) or a model
             hub: with normalisation, size and crop; position is off in it if the backbone was trained without
safetensors  backbone.safetensors and backbone.json, which poslabel reads as --ckpt
onnx         model.onnx, from uint8 images to tokens: normalisation is inside (needs onnx, onnxscript, onnxruntime)

A finetuned classifier (--ckpt RUN/evaluate/finetune/trained-seed0) keeps its head, and timm's file the names of its
classes. Writes RUN/export and there a model card, README.md. The exit status is 1, and the file named, if a file gives
features that differ from the backbone's by more than 1e-4, or if timm's own transform shows other images. One process.
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/export.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.commands import Parser
from common.processes.launch import entry, set_threads  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import os
import tempfile

import torch

from common import data
from common.batches.unreadable import NO_LIMIT
from common.checkpoints.storage import HEAD
from common.data.location import changed_location
from common.errors import Refusal
from common.features.extraction import Eye, shown
from common.features.finite import refuse_spoiled
from common.paths import expanded
from evaluate.exporting import timm_files
from evaluate.exporting.card import card
from evaluate.exporting.checks import BESIDE, FILES, KINDS, Sample, Source, write_and_compare
from evaluate.exporting.onnx import need_onnx
from evaluate.job import subjects
from evaluate.job.arguments import add_data, data_options
from evaluate.job.evaluation import only_first
from evaluate.job.subjects import RANDOM, Subject

CARD = "README.md"


def main(argv: list[str]) -> int:
    """Export a backbone, comparing each file with it on real images. Returns the exit status."""
    arguments = options().parse_args(argv)
    if not only_first("export"):
        return 0
    set_threads(arguments.threads)
    if arguments.images < 1:
        raise Refusal(f"--images {arguments.images}: expected at least 1")
    if arguments.ckpt == RANDOM:
        raise Refusal("--ckpt random: nothing was trained, so there is nothing to export; give a run folder")
    subject = subjects.subject_of(arguments.ckpt, None, arguments.weights)
    head = subject.head() if arguments.head else None
    kinds = list(dict.fromkeys(arguments.to))
    if "onnx" in kinds:
        need_onnx()
    recipe = timm_files.recipe(subject.description) if "timm" in kinds else None
    out = Path(arguments.out) if arguments.out else subject.folder.parent / "export"
    refuse_existing(out, kinds, head is not None, arguments.force)
    refuse_spoiled(subject.state, subject.name)
    refuse_spoiled(head, f"{HEAD} of {subject.name}")
    sample = real_images(subject, arguments)
    out.mkdir(parents=True, exist_ok=True)
    source = Source(subject, subject.backbone(), head, recipe)
    checks = []
    with tempfile.TemporaryDirectory(dir=out, prefix=".writing-") as aside:  # a file that fails is not left behind
        for kind in kinds:
            checks.append(write_and_compare(kind, Path(aside), source, sample))
            print(f"{FILES[kind]}: {checks[-1].words} on {sample.where}", flush=True)
        if wrong := [f"{FILES[check.kind]}: {check.fault}" for check in checks if check.fault]:
            print(f"error: {'; '.join(wrong)}; nothing was written", file=sys.stderr)
            return 1
        text = card(source, checks, sample.where)
        (Path(aside) / CARD).write_text(text, encoding="utf-8")
        for file in sorted(Path(aside).iterdir()):
            os.replace(file, out / file.name)
    if "segmentation" in subject.description.get("training", {}):
        print("note: its decoder of segmentation is in none of these files: the backbone alone is exported")
    channels = len(subject.description["mean"])
    lines = timm_files.usage(source.recipe, out, channels) if source.recipe else []
    print("\n".join([*lines, f"files: {out}"]), flush=True)
    return 0


def options() -> Parser:
    """Parser of the options of this script."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, type=expanded, metavar="RUN|FILE|timm:NAME", help="what is exported")
    words = "local weights of timm:NAME, or FILE::PART where there are several models"
    add("--weights", type=expanded, metavar="FILE", help=words)
    add("--to", nargs="+", choices=KINDS, default=["timm", "safetensors"], help="(default: timm safetensors)")
    add("--out", type=expanded, metavar="DIR", help="(default: RUN/export)")
    add("--force", action="store_true", help="replace files that are there")
    add("--no-head", dest="head", action="store_false", help="of a finetuned classifier, the backbone alone")
    add("--images", type=int, default=16, metavar="N", help="that the files are tried on (default: 16)")
    add_data(parser, "of those images (default: what the run was trained on)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the usable cores)")
    return parser


def refuse_existing(out: Path, kinds: list[str], with_head: bool, force: bool) -> None:
    """Raises Refusal if a file would be replaced without --force, or a run's own file at all."""
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out {out} is a file: give a folder")
    if (out / "state").is_dir() or (out / "config.yaml").is_file():
        raise Refusal(
            f"--out {out} is a run folder, whose own files have these names: give another, such as {out}/export"
        )
    names = [*(name for kind in kinds for name in (FILES[kind], *BESIDE[kind])), CARD]
    names += [HEAD] if with_head and "safetensors" in kinds else []
    if (existing := [name for name in names if (out / name).exists()]) and not force:
        raise Refusal(
            f"{out} has {', '.join(existing)} already: replace with --force, or give another folder with --out"
        )


def real_images(subject: Subject, arguments: argparse.Namespace) -> Sample:
    """Read the first --images images. Raises Refusal if none can be read."""
    description, training = subject.description, subject.description.get("training", {})
    location = changed_location(training, data_options(arguments))
    images = data.open_data(location)
    first = images.subset(range(min(len(images), arguments.images)))
    eye = Eye(tuple(description["size"]), description.get("crop", 0.875), len(description["mean"]), limit=NO_LIMIT)
    pixels = [batch for batch, _ in shown(first, eye)]
    if not pixels:
        raise Refusal(
            f"data={location.spec}: none of the first {len(first)} images can be read; give other images with --data"
        )
    shown_images = torch.cat(pixels)
    return Sample(shown_images, first, f"{len(shown_images)} images of {location.spec}")


if __name__ == "__main__":
    entry(main)()
