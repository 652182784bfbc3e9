"""A trained backbone for other programs, each file tried on real images before it is left behind.

    python evaluate/export.py --ckpt runs/quickstart-001
    python evaluate/export.py --ckpt runs/quickstart-001 --to timm safetensors onnx --out DIR --force

timm         model.safetensors for timm.create_model(..., checkpoint_path=FILE); position is off in it if the
             backbone was trained without
safetensors  backbone.safetensors and backbone.json, which poslabel reads as --ckpt
onnx         model.onnx, from uint8 images to tokens: normalisation is inside (needs onnx, onnxscript, onnxruntime)

Writes RUN/export and there a model card, README.md. The exit status is 1, and the file named, if a file gives features
that differ from the backbone's by more than 1e-4. One process.
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/export.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.launch import entry, set_threads  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import contextlib
import importlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common import checkpoint, data, subjects
from common import config as configuration
from common.checkpoint import sha256
from common.data.location import changed
from common.errors import Refusal
from common.features import shown
from common.finite import refuse_spoiled
from common.models import Backbone
from common.models.backbone import timm_arguments
from common.models.irpe import PUBLISHED
from common.paths import expanded
from common.plan import TokenPlan
from common.protocol import Parser, add_data, alone, given_data
from common.report import leak_note
from common.subjects import RANDOM, Subject
from common.unreadable import NO_LIMIT

KINDS = ("timm", "safetensors", "onnx")
FILES = {"timm": "model.safetensors", "safetensors": checkpoint.WEIGHTS, "onnx": "model.onnx"}
CARD = "README.md"
TOLERANCE = 1e-4  # between features, which a final norm has brought to about 1
OPSET = 18
ONNX = ("onnx", "onnxscript", "onnxruntime")
SWIN_AS_IN_TIMM = {"swin_conv": False, "swin_bias": True, "swin_merge_last": True}


def main(argv: list[str]) -> int:
    """Arguments -> files -> the same images through each -> model card. Returns the exit status."""
    arguments = options().parse_args(argv)
    if not alone("export"):
        return 0
    set_threads(arguments.threads)
    if arguments.images < 1:
        raise Refusal(f"--images {arguments.images}: expected at least 1")
    if arguments.ckpt == RANDOM:
        raise Refusal("--ckpt random: nothing was trained, so there is nothing to export; give a run folder")
    subject = subjects.find(arguments.ckpt, None, arguments.weights)
    kinds = list(dict.fromkeys(arguments.to))
    if "onnx" in kinds:
        need_onnx()
    call = timm_call(subject) if "timm" in kinds else None
    out = Path(arguments.out) if arguments.out else subject.folder.parent / "export"
    refuse_existing(out, kinds, arguments.force)
    backbone = subject.backbone()
    images, where = real_images(subject, arguments)
    refuse_spoiled(subject.state, subject.name)
    out.mkdir(parents=True, exist_ok=True)
    checks = []
    with tempfile.TemporaryDirectory(dir=out, prefix=".writing-") as aside:  # a file that fails is not left behind
        for kind in kinds:
            checks.append(tried(kind, Path(aside), subject, backbone, images, call))
            print(f"{FILES[kind]}: largest difference {checks[-1].difference:.1e} on {where}", flush=True)
        if wrong := [check for check in checks if not check.difference <= TOLERANCE]:  # NaN is wrong too
            names = ", ".join(FILES[check.kind] for check in wrong)
            print(f"error: {names}: features differ by more than {TOLERANCE:g}; nothing was written", file=sys.stderr)
            return 1
        text = card(subject, checks, where, call)
        (Path(aside) / CARD).write_text(text, encoding="utf-8")
        for file in sorted(Path(aside).iterdir()):
            os.replace(file, out / file.name)
    print("\n".join([*(usage(call, out / FILES["timm"]) if call else []), f"files: {out}"]), flush=True)
    return 0


def options() -> Parser:
    """The options of this script."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", required=True, type=expanded, metavar="RUN|FILE|timm:NAME", help="what is exported")
    words = "local weights of timm:NAME, or FILE::PART where there are several models"
    add("--weights", type=expanded, metavar="FILE", help=words)
    add("--to", nargs="+", choices=KINDS, default=["timm", "safetensors"], help="(default: timm safetensors)")
    add("--out", type=expanded, metavar="DIR", help="(default: RUN/export)")
    add("--force", action="store_true", help="replace files that are there")
    add("--images", type=int, default=16, metavar="N", help="that the files are tried on (default: 16)")
    add_data(parser, "of those images (default: what the run was trained on)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the usable cores)")
    return parser


def refuse_existing(out: Path, kinds: list[str], force: bool) -> None:
    """Raises Refusal if a file would be replaced unasked, or where a run's own would be, asked or not."""
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out {out} is a file: give a folder")
    if (out / "state").is_dir() or (out / "config.yaml").is_file():
        raise Refusal(
            f"--out {out} is a run folder, whose own files have these names: give another, such as {out}/export"
        )
    names = [FILES[kind] for kind in kinds] + [CARD] + ([checkpoint.DESCRIPTION] if "safetensors" in kinds else [])
    if (there := [name for name in names if (out / name).exists()]) and not force:
        raise Refusal(f"{out} has {', '.join(there)} already: replace with --force, or give another folder with --out")


def real_images(subject: Subject, arguments: argparse.Namespace) -> tuple[Tensor, str]:
    """(the first images that can be read under the evaluation transform, uint8 (b, C, h, w); what they are)."""
    about, training = subject.description, subject.description.get("training", {})
    where = changed(training, given_data(arguments))
    spec, whole = where.spec, data.open_data(where)
    some = whole.subset(range(min(len(whole), arguments.images)))
    batches = shown(some, tuple(about["size"]), about.get("crop", 0.875), len(about["mean"]), limit=NO_LIMIT)
    pixels = [batch for batch, _ in batches]
    if not pixels:
        raise Refusal(f"data={spec}: none of the first {len(some)} images can be read; give other images with --data")
    images = torch.cat(pixels)
    return images, f"{len(images)} images of {spec}"


# ------------------------------------------------------------------------------------------------------------ the files


@dataclass
class Check:
    """One file, and how far the features that it gives are from the backbone's."""

    kind: str
    file: Path
    difference: float
    digest: str
    shape: tuple[int, ...]  # of what it says of an image: of patches and, from timm, prefix tokens before them


@torch.no_grad()
def tried(
    kind: str, folder: Path, subject: Subject, backbone: Backbone, images: Tensor, call: dict[str, Any] | None
) -> Check:
    """Write the file of `kind` into `folder`, read it as its user would, and compare on `images`."""
    file = folder / FILES[kind]
    expected = backbone(images, subject.plan)
    if kind == "safetensors":
        about = {name: value for name, value in subject.description.items() if name != "weights_sha256"}
        checkpoint.export(folder, backbone, about)
        again, plan, _ = checkpoint.load_backbone(file)
        found = again(images, plan)
        output, prefix = found.tokens, found.prefix
        tokens = output
    elif kind == "timm":
        assert call is not None
        save_file(state_for_timm(backbone, subject.description["position"]), file)
        model = timm.create_model(call["name"], checkpoint_path=str(file), **call["kwargs"]).eval()
        pixels = (images / 255 - backbone.mean) / backbone.std
        output = model.forward_features(pixels)  # type: ignore[operator]
        tokens, prefix = split(output, expected.grid, expected.prefix.shape[1])
    else:
        write_onnx(backbone, subject.plan, images, file)
        runtime = importlib.import_module("onnxruntime")
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        if isinstance(session.get_inputs()[0].shape[0], int):
            raise Refusal(f"--to onnx: torch {torch.__version__} made a constant of the batch size; use another torch")
        found = [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]
        tokens, prefix = found[0], found[1] if len(found) > 1 else expected.prefix[:, :0]
        output = tokens
    pairs = (tokens, expected.tokens), (prefix, expected.prefix)
    if any(a.shape != b.shape for a, b in pairs):
        raise RuntimeError(f"{file.name} gives {tokens.shape}, {prefix.shape}: expected {[b.shape for _, b in pairs]}")
    difference = max((a - b).abs().max().item() for a, b in pairs if b.numel())
    return Check(kind, file, difference, sha256(file), tuple(output.shape[1:]))


def split(output: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """(patches (B, N, D), prefix tokens (B, P, D)) of what timm's forward_features returns: tokens or a map."""
    if output.ndim == 4:
        channels_last = tuple(output.shape[1:3]) == tuple(grid)
        output = output.flatten(1, 2) if channels_last else output.flatten(2).mT
    return output[:, num_prefix_tokens:], output[:, :num_prefix_tokens]


def timm_call(subject: Subject) -> dict[str, Any]:
    """{"name": ..., "kwargs": ...}: the call of timm.create_model that builds what the backbone has inside.

    Raises Refusal where no such call does.
    """
    about = subject.description
    elsewhere = "use --to safetensors or onnx"
    if about.get("irpe") is not None:
        raise Refusal(
            f"--to timm: iRPE was added to {about['name']} after timm had built it, which no timm.create_model repeats "
            f"(the published {next(iter(PUBLISHED))} and others can be exported); {elsewhere}"
        )
    altered = {name: about["kwargs"].get(name, usual) for name, usual in SWIN_AS_IN_TIMM.items()}
    if altered != SWIN_AS_IN_TIMM:
        raise Refusal(f"--to timm: its Swin was altered ({altered}), which no timm.create_model repeats; {elsewhere}")
    backbone = checkpoint.build(about)
    if about["position"] == "none" and getattr(backbone.model, "rope", None) is not None:
        raise Refusal(
            f"--to timm: {about['name']} was trained without its rotary embedding, which timm would add; {elsewhere}"
        )
    return {"name": about["name"], "kwargs": timm_arguments(backbone.config, backbone.size)}


def state_for_timm(backbone: Backbone, position: str) -> dict[str, Tensor]:
    """The backbone's weights, under which timm's own forward does what the backbone does in that `position` mode.

    Without position: a position embedding of zeros adds nothing, iRPE's tables of zeros neither; SP-ViT's prior is 1
    and its convolutions are zero. What Swin, NesT and BEiT carry is zero already.
    """
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in backbone.model.state_dict().items()}
    if position == "none":
        for name, tensor in state.items():
            if name.endswith(("pos_embed", ".attn.w2")) or ".rpe_" in name or ".pos_block." in name:
                tensor.zero_()
            elif name.endswith(".attn.b2"):
                tensor.fill_(1)
    return state


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
    """uint8 images to (tokens, prefix), as the backbone's features in the position mode it was trained in."""

    def __init__(self, backbone: Backbone, plan: TokenPlan) -> None:
        super().__init__()
        self.backbone, self.plan = backbone, plan

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) uint8 to (B, N, D) and, if there are prefix tokens, (B, P, D)."""
        backbone = self.backbone
        features = backbone((images.float() / 255 - backbone.mean) / backbone.std, self.plan)
        return (features.tokens, features.prefix) if features.prefix.shape[1] else (features.tokens,)


def write_onnx(backbone: Backbone, plan: TokenPlan, images: Tensor, file: Path) -> None:
    """Write `file`: input `images` uint8 (batch, C, H, W), outputs `tokens` and `prefix`; any batch size.

    Raises Refusal if torch cannot translate this architecture.
    """
    example = images.repeat(2, 1, 1, 1)[:2]  # of one image alone the batch size would be a constant
    explicit = [module for module in backbone.modules() if getattr(module, "fused_attn", None) is True]
    for module in explicit:  # autograd functions of ours cannot be translated
        module.fused_attn = False  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                Pixels(backbone, plan).eval(), (example,), file, input_names=["images"],
                output_names=["tokens", "prefix"][: 1 + (backbone.num_prefix_tokens > 0)], opset_version=OPSET,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, dynamo=True, external_data=False,
            )  # fmt: skip
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Refusal(
            f"--to onnx: torch {torch.__version__} cannot translate {backbone.config.name}: {reason}"
        ) from error
    finally:
        for module in explicit:
            module.fused_attn = True  # type: ignore[assignment]


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


def usage(call: Mapping[str, Any], file: str | Path) -> list[str]:
    """Lines of Python that build the model with timm."""
    arguments = "".join(f", {name}={value!r}" for name, value in call["kwargs"].items())
    lines = ["import timm"]
    if not timm.model_entrypoint(call["name"].split(".")[0]).__module__.startswith("timm."):
        lines.append(
            f"import poslabel.common.models  # registers {call['name']}; in the repository: import common.models"
        )
    return [*lines, f'model = timm.create_model("{call["name"]}", checkpoint_path="{file}"{arguments}).eval()']


def card(subject: Subject, checks: list[Check], where: str, call: Mapping[str, Any] | None) -> str:
    """The model card, Markdown with the head that model hubs read; it says only what is known."""
    about, training = subject.description, subject.description.get("training", {})
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
    lines = ["---", "tags:", "- image-feature-extraction", *(["library_name: timm"] if call else []), "---"]
    lines += ["", f"# {subject.name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {cell(value)} |" for name, value in rows.items()]
    lines += ["", "## Files", "", f"Each was read back and compared with the backbone on {where}.", ""]
    lines += ["| File | Largest difference of a feature | SHA-256 |", "|---|---|---|"]
    lines += [f"| `{check.file.name}` | {check.difference:.1e} | `{check.digest}` |" for check in checks]
    if call:
        prefix = about["num_prefix_tokens"]
        feature = "tokens[:, 0]" if about["pooling"] == "class" else f"tokens[:, {prefix}:].mean(1)"
        lines += ["", "## With timm", "", "```python", *usage(call, FILES["timm"])]
        output = next(check.shape for check in checks if check.kind == "timm")
        lines += [f"tokens = model.forward_features(images)  # images normalised as above; {('batch', *output)}"]
        lines += ([f"feature = {feature}"] if len(output) == 2 else []) + ["```"]
        if without:
            lines += ["", "Position is off by weights that add nothing, such as a position embedding of zeros."]
    if any(check.kind == "onnx" for check in checks):
        outputs = "`tokens` (batch, patches, width)" + (" and `prefix`" if about["num_prefix_tokens"] else "")
        shape = f"(batch, {len(about['mean'])}, {h}, {w})"
        lines += ["", "## With ONNX", "", f"`model.onnx`: `images` uint8 {shape}, not normalised, to {outputs}."]
    return "\n".join(lines) + "\n"


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
