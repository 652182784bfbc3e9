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
import contextlib
import importlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common import config as configuration
from common import data
from common.batches.transforms import evaluation
from common.batches.unreadable import NO_LIMIT
from common.checkpoints import public, storage
from common.checkpoints.pretrained import RANDOM
from common.checkpoints.storage import HEAD, sha256
from common.data import Images, Unreadable
from common.data.location import changed
from common.errors import Refusal
from common.features.extraction import shown
from common.features.finite import refuse_spoiled
from common.models import Backbone, Features
from common.models.plan import TokenPlan
from common.paths import expanded
from evaluate.exporting import timm_files
from evaluate.exporting.timm_files import difference, scores
from evaluate.job import subjects
from evaluate.job.arguments import add_data, data_options
from evaluate.job.evaluation import only_first
from evaluate.job.report import leak_note
from evaluate.job.subjects import Subject

KINDS = ("timm", "safetensors", "onnx")
FILES = {"timm": timm_files.FILES[0], "safetensors": storage.WEIGHTS, "onnx": "model.onnx"}
BESIDE = {"timm": timm_files.FILES[1:], "safetensors": (storage.DESCRIPTION,), "onnx": ()}
CARD = "README.md"
TOLERANCE = 1e-4  # between features, which a final norm has brought to about 1, and logits, of the largest
LEVELS = 0.5  # of 255, between our images and those of timm's transform, on average: Pillow and torch round differently
OPSET = 18
ONNX = ("onnx", "onnxscript", "onnxruntime")


def main(argv: list[str]) -> int:
    """Arguments -> files -> the same images through each -> model card. Returns the exit status."""
    arguments = options().parse_args(argv)
    if not only_first("export"):
        return 0
    set_threads(arguments.threads)
    if arguments.images < 1:
        raise Refusal(f"--images {arguments.images}: expected at least 1")
    if arguments.ckpt == RANDOM:
        raise Refusal("--ckpt random: nothing was trained, so there is nothing to export; give a run folder")
    subject = subjects.find(arguments.ckpt, None, arguments.weights)
    head = public.load_head(arguments.ckpt, subject.description) if arguments.head else None
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
            checks.append(tried(kind, Path(aside), source, sample))
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
    """The options of this script."""
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
    """Raises Refusal if a file would be replaced unasked, or where a run's own would be, asked or not."""
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out {out} is a file: give a folder")
    if (out / "state").is_dir() or (out / "config.yaml").is_file():
        raise Refusal(
            f"--out {out} is a run folder, whose own files have these names: give another, such as {out}/export"
        )
    names = [*(name for kind in kinds for name in (FILES[kind], *BESIDE[kind])), CARD]
    names += [HEAD] if with_head and "safetensors" in kinds else []
    if (there := [name for name in names if (out / name).exists()]) and not force:
        raise Refusal(f"{out} has {', '.join(there)} already: replace with --force, or give another folder with --out")


@dataclass
class Sample:
    """Images that files are tried on."""

    images: Tensor  # uint8 (b, C, h, w), under the evaluation transform
    pictures: Images  # the same and those that cannot be read, whole
    where: str  # what they are, in words


def real_images(subject: Subject, arguments: argparse.Namespace) -> Sample:
    """The first images that can be read."""
    about, training = subject.description, subject.description.get("training", {})
    where = changed(training, data_options(arguments))
    spec, whole = where.spec, data.open_data(where)
    some = whole.subset(range(min(len(whole), arguments.images)))
    batches = shown(some, tuple(about["size"]), about.get("crop", 0.875), len(about["mean"]), limit=NO_LIMIT)
    pixels = [batch for batch, _ in batches]
    if not pixels:
        raise Refusal(f"data={spec}: none of the first {len(some)} images can be read; give other images with --data")
    images = torch.cat(pixels)
    return Sample(images, some, f"{len(images)} images of {spec}")


# ------------------------------------------------------------------------------------------------------------ the files


@dataclass
class Source:
    """What is exported."""

    subject: Subject
    backbone: Backbone
    head: dict[str, Tensor] | None  # of a finetuned classifier, see checkpoint.load_head
    recipe: timm_files.Recipe | None  # how timm builds it, if a file for timm is written

    @property
    def about(self) -> dict[str, Any]:
        """The description of the backbone."""
        return self.subject.description


@dataclass
class Shown:
    """How far timm's own transform is from ours, on the same pictures."""

    levels: float  # mean difference of a value, of 255, in the image where it is largest
    most: float  # largest difference of a value, of 255
    tokens: float  # largest difference of a feature


@dataclass
class Check:
    """One file, and how far what it gives is from the backbone's."""

    kind: str
    file: Path
    difference: float
    logits: float | None  # as a share of the largest; None without a head
    digest: str
    shape: tuple[int, ...]  # of what it says of an image: of patches and, from timm, prefix tokens before them
    shown: Shown | None = None  # of timm

    @property
    def words(self) -> str:
        """The differences, in words."""
        logits = "" if self.logits is None else f", of logits {self.logits:.1e}"
        through = self.shown and (
            f", through timm's own transform {self.shown.tokens:.1e} (pixels by up to {self.shown.most:.0f} of 255)"
        )
        return f"largest difference {self.difference:.1e}{logits}{through or ''}"

    @property
    def fault(self) -> str:
        """What is wrong with the file; nothing if it can be used. NaN is wrong too."""
        if not self.difference <= TOLERANCE:
            return f"features differ by more than {TOLERANCE:g}"
        if self.logits is not None and not self.logits <= TOLERANCE:
            return f"logits differ by more than {TOLERANCE:g}"
        if self.shown is not None and not self.shown.levels <= LEVELS:
            return f"timm's own transform shows other images, by {self.shown.levels:.1f} of 255 on average"
        return ""


@torch.no_grad()
def tried(kind: str, folder: Path, source: Source, sample: Sample) -> Check:
    """Write the file of `kind` into `folder`, read it as its user would, and compare on `sample`."""
    file, images, head, about = folder / FILES[kind], sample.images, source.head, source.about
    expected = source.backbone(images, source.subject.plan)
    logits, by_timm = None, None
    if kind == "safetensors":
        again, plan, same = write_checkpoint(file, source)
        found = again(images, plan)
        output, prefix = found.tokens, found.prefix
        tokens = output
        logits = scores(found, about["pooling"], same) if head is not None else None
    elif kind == "timm":
        assert source.recipe is not None
        source.recipe = timm_files.write(folder, source.recipe, source.backbone, about, head)
        model, config = timm_files.read(folder)
        output = model.forward_features(timm_files.normalised(images, config))
        tokens, prefix = split(output, expected)
        logits = model.forward_head(output) if head is not None else None
        by_timm = compared(model, config, source, sample)
    else:
        write_onnx(source, images, file)
        tokens, prefix, logits = run_onnx(file, images, expected, head is not None)
        output = tokens
    pairs = (tokens, expected.tokens), (prefix, expected.prefix)
    if any(a.shape != b.shape for a, b in pairs):
        raise RuntimeError(f"{file.name} gives {tokens.shape}, {prefix.shape}: expected {[b.shape for _, b in pairs]}")
    largest = max((a - b).abs().max().item() for a, b in pairs if b.numel())
    of_logits = None if logits is None else difference(logits, scores(expected, about["pooling"], head))
    return Check(kind, file, largest, of_logits, sha256(file), tuple(output.shape[1:]), by_timm)


def write_checkpoint(file: Path, source: Source) -> tuple[Backbone, TokenPlan, dict[str, Tensor] | None]:
    """Write a checkpoint that poslabel reads, and its head beside it; (backbone, plan, head) as they are read again."""
    about = {name: value for name, value in source.about.items() if name != "weights_sha256"}
    if source.head is not None:
        save_file(source.head, file.parent / HEAD)
        about["training"] = about["training"] | {"head_sha256": sha256(file.parent / HEAD)}
    elif "finetuned" in about.get("training", {}):
        about["training"] = about["training"] | {"head": False}
    public.export(file.parent, source.backbone, about)
    again, plan, description = public.load_backbone(file)
    return again, plan, public.load_head(file, description)


def compared(model: Any, config: dict[str, Any], source: Source, sample: Sample) -> Shown:
    """The same pictures through timm's own transform of `config` and through ours."""
    about, size = source.about, tuple(source.about["size"])
    if tuple(config["input_size"]) != (len(about["mean"]), *size):
        raise RuntimeError(f"timm reads an input size of {config['input_size']} in {timm_files.FILES[1]}")
    std = torch.tensor(about["std"]).view(-1, 1, 1)
    levels = most = tokens = 0.0
    for picture in readable(sample.pictures, len(about["mean"])):
        picture = timm_files.shaped(picture, size, about.get("crop", 0.875))
        theirs = timm_files.through_timm([picture], config)
        ours = evaluation(picture, size, about.get("crop", 0.875))[None]
        away = (theirs - timm_files.normalised(ours, about)).abs() * std * 255
        levels, most = max(levels, away.mean().item()), max(most, away.max().item())
        features = source.backbone(ours, source.subject.plan)
        found, _ = split(model.forward_features(theirs), features)
        tokens = max(tokens, (found - features.tokens).abs().max().item())
    return Shown(levels, most, tokens)


def readable(pictures: Images, channels: int) -> Iterable[Tensor]:
    """Whole pictures, uint8 (C, h, w), without those that cannot be read."""
    for i in range(len(pictures)):
        with contextlib.suppress(Unreadable):
            yield pictures.read(i, channels)


def split(output: Tensor, like: Features) -> tuple[Tensor, Tensor]:
    """(patches (B, N, D), prefix tokens (B, P, D)) of what timm's forward_features returns: tokens or a map.

    Without prefix tokens in `like`, of the backbone, there are none: CaiT's and XCiT's come in above the patches.
    """
    grid, num_patches = like.grid, like.tokens.shape[1]
    if output.ndim == 4:
        channels_last = tuple(output.shape[1:3]) == tuple(grid)
        output = output.flatten(1, 2) if channels_last else output.flatten(2).mT
    tokens, prefix = output[:, -num_patches:], output[:, :-num_patches]
    return tokens, prefix if like.prefix.shape[1] else like.prefix


# ----------------------------------------------------------------------------------------------------------------- ONNX


def need_onnx() -> None:
    """Raises Refusal unless the packages are there: they are no dependency of poslabel."""
    missing = []
    for name in ONNX:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise Refusal(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


class Pixels(nn.Module):
    """uint8 images to tokens, prefix and logits, in the position mode that the backbone was trained in."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.backbone, self.plan, self.pooling = source.backbone, source.subject.plan, source.about.get("pooling")
        self.head = source.head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) uint8 to (B, N, D), (B, P, D) if there are prefix tokens, and (B, K) if there is a head."""
        backbone = self.backbone
        features = backbone((images.float() / 255 - backbone.mean) / backbone.std, self.plan)
        prefix = (features.prefix,) if features.prefix.shape[1] else ()
        logits = (scores(features, str(self.pooling), self.head),) if self.head is not None else ()
        return (features.tokens, *prefix, *logits)


def write_onnx(source: Source, images: Tensor, file: Path) -> None:
    """Write `file`: input `images` uint8 (batch, C, H, W), outputs `tokens`, `prefix` and `logits`; any batch size.

    Raises Refusal if torch cannot translate this architecture.
    """
    backbone = source.backbone
    example = images.repeat(2, 1, 1, 1)[:2]  # of one image alone the batch size would be a constant
    explicit = [module for module in backbone.modules() if getattr(module, "fused_attn", None) is True]
    for module in explicit:  # autograd functions of ours cannot be translated
        module.fused_attn = False  # type: ignore[assignment]
    names = ["tokens", *(["prefix"] if backbone.num_prefix_tokens else []), *(["logits"] if source.head else [])]
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                Pixels(source).eval(), (example,), file, input_names=["images"], output_names=names,
                opset_version=OPSET, dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, dynamo=True,
                external_data=False,
            )  # fmt: skip
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Refusal(
            f"--to onnx: torch {torch.__version__} cannot translate {backbone.config.name}: {reason}"
        ) from error
    finally:
        for module in explicit:
            module.fused_attn = True  # type: ignore[assignment]


def run_onnx(file: Path, images: Tensor, like: Features, with_logits: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(tokens, prefix, logits if there are any) in onnxruntime. Raises Refusal if the batch size is fixed."""
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    if isinstance(session.get_inputs()[0].shape[0], int):
        raise Refusal(f"--to onnx: torch {torch.__version__} made a constant of the batch size; use another torch")
    values = session.run(None, {"images": images.numpy()})
    found = {out.name: torch.from_numpy(value) for out, value in zip(session.get_outputs(), values, strict=True)}
    return found["tokens"], found.get("prefix", like.prefix[:, :0]), found["logits"] if with_logits else None


@contextlib.contextmanager
def quiet() -> Any:
    """Without the exporter's own progress and notes."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


# ------------------------------------------------------------------------------------------------------- the model card


def card(source: Source, checks: list[Check], where: str) -> str:
    """The model card, Markdown with the head that model hubs read; it says only what is known."""
    subject, about, training = source.subject, source.about, source.about.get("training", {})
    h, w = about["size"]
    without = about["position"] == "none"
    parameters = sum(tensor.numel() for tensor in (subject.state or {}).values())
    irpe = f", iRPE {code(about['irpe'])}" if about.get("irpe") is not None else ""
    objectives = [
        f"{name} (position {options['position']})" if "position" in options else name
        for name, options in (training.get("objectives") or {}).items()
    ]
    rows = {
        "Architecture": f"`{about['name']}` {code(about['kwargs'])}{irpe}",
        "Input": f"{len(about['mean'])} channels, {h}x{w} pixels, the inner {about.get('crop', 0.875):.1%}",
        "Normalisation": f"values in [0, 1], minus {code(about['mean'])}, divided by {code(about['std'])}",
        "Output": f"{about['grid'][0]}x{about['grid'][1]} patch tokens of width {about['width']}, after "
        f"{about['num_prefix_tokens'] or 'no'} prefix tokens; final norm applied",
        "Pooling": f"{about['pooling']} (what the training made an image's feature)",
        "Position": "off: trained without position encoding" if without else "on",
        "Numbers": f"{parameters:,} in the state dict",
        "Recipe": said(training.get("recipe")),
        "Objectives": said(", ".join(objectives)),
        "Data": said(training.get("data")),
        "Training": f"{training['step']:,} of {training.get('steps', training['step']):,} steps, "
        f"{training.get('images_seen', 0):,} images seen, seed {training.get('seed')}, {training.get('precision')}"
        if "step" in training else said(None),
        "Audit": said(training.get("audit")) + (f": {leak}" if (leak := leak_note(about)) else ""),
        "Source": f"`{subject.name}`, SHA-256 of the weights `{subject.weights_sha256}`",
        "Command": f"`{configuration.command_line()}`",
        "Made with": f"torch {torch.__version__}, timm {timm.__version__}",
    }  # fmt: skip
    for name, reason in (training.get("audit_reasons") or {}).items():
        rows[f"Audit of {name}"] = reason
    if source.head is not None:
        names = training.get("label_names")
        named = f"{', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else "names not recorded"
        rows["Classes"] = f"{len(source.head['bias'])}: {named}; a linear layer on the pooled tokens"
    if "segmentation" in training:
        rows["Decoder"] = "of segmentation, which is in none of these files"
    task = "image-feature-extraction" if source.head is None else "image-classification"
    lines = ["---", "tags:", f"- {task}", *(["library_name: timm"] if source.recipe else []), "---"]
    lines += ["", f"# {subject.name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {cell(value)} |" for name, value in rows.items()]
    lines += ["", "## Files", "", f"Each was read back and compared with the backbone on {where}.", ""]
    lines += ["| File | Difference | SHA-256 |", "|---|---|---|"]
    lines += [f"| `{check.file.name}` | {check.words} | `{check.digest}` |" for check in checks]
    lines += with_timm(source, next(check for check in checks if check.kind == "timm")) if source.recipe else []
    if any(check.kind == "onnx" for check in checks):
        outputs = "`tokens` (batch, patches, width)" + (", `prefix`" if about["num_prefix_tokens"] else "")
        outputs += "" if source.head is None else f", `logits` (batch, {len(source.head['bias'])})"
        shape = f"(batch, {len(about['mean'])}, {h}, {w})"
        lines += ["", "## With ONNX", "", f"`model.onnx`: `images` uint8 {shape}, not normalised, to {outputs}."]
    return "\n".join(lines) + "\n"


def with_timm(source: Source, check: Check) -> list[str]:
    """What the card says of the files for timm: lines to run, and what they do not say."""
    recipe, about = source.recipe, source.about
    assert recipe is not None
    lines = ["", "## With timm", "", "In this folder; from elsewhere `local-dir:` and its path, from a model hub "]
    lines[-1] += "`hf-hub:OWNER/NAME`:"
    lines += ["", "```python", *timm_files.usage(recipe, ".", len(about["mean"])), "```", ""]
    lines += [f"`tokens` is {('batch', *check.shape)}; `config.json` holds mean, std, size, crop and interpolation. "]
    if about["size"][0] != about["size"][1]:
        lines[-1] += "Of an oblong image timm's transform may cut one pixel beside the training's. "
    lines[-1] += "In the training transparent images were laid over white."
    if recipe.head is None and not recipe.pools:
        above = check.shape[0] - about["grid"][0] * about["grid"][1]  # tokens that are no patches
        parts = {"class": "tokens[:, 0]", "mean": f"tokens[:, {above}:].mean(1)"}
        parts["both"] = f"torch.cat([{parts['class']}, {parts['mean']}], 1)"
        if len(check.shape) == 2:
            lines += ["", f"Pooled as in the training: `{parts[about['pooling']]}`; `model(images)` pools otherwise."]
    if about["position"] == "none":
        lines += ["", "Position is off by weights that add nothing, such as a position embedding of zeros."]
    return lines


def code(value: Any) -> str:
    """As code, on one line."""
    return f"`{value}`"


def said(value: Any) -> str:
    """What the description says; that it says nothing, where it does not."""
    return "not recorded" if value in (None, "", [], {}) else str(value)


def cell(text: str) -> str:
    """In a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    entry(main)()
