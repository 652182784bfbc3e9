"""The model card of an export: Markdown with the head that model hubs read."""

from typing import Any

import timm
import torch

from common import config as configuration
from common.features.classes import DENSE
from evaluate.exporting import timm_files
from evaluate.exporting.checks import Check, Source
from evaluate.job.report import leak_note


def card(source: Source, checks: list[Check], sample: str) -> str:
    """Write the model card: Markdown with the head that model hubs read; only what is known is in it."""
    task = "image-feature-extraction" if source.head is None else "image-classification"
    lines = ["---", "tags:", f"- {task}", *(["library_name: timm"] if source.recipe else []), "---"]
    lines += ["", f"# {source.subject.name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {cell(value)} |" for name, value in rows_of(source).items()]
    lines += ["", "## Files", "", f"Each was read back and compared with the backbone on {sample}.", ""]
    lines += ["| File | Difference | SHA-256 |", "|---|---|---|"]
    lines += [f"| `{check.file.name}` | {check.words} | `{check.digest}` |" for check in checks]
    lines += with_timm(source, next(check for check in checks if check.kind == "timm")) if source.recipe else []
    if any(check.kind == "onnx" for check in checks):
        lines += with_onnx(source)
    return "\n".join(lines) + "\n"


def rows_of(source: Source) -> dict[str, str]:
    """Rows of the card's table: facts about the backbone, its training and its origin."""
    subject, description, training = source.subject, source.description, source.description.get("training", {})
    h, w = description["size"]
    without = description["position"] == "none"
    parameters = sum(tensor.numel() for tensor in (subject.state or {}).values())
    irpe = f", iRPE {code(description['irpe'])}" if description.get("irpe") is not None else ""
    stem = f", stem {code(description['stem'])}" if description.get("stem") is not None else ""
    objectives = [
        f"{name} (position {options['position']})" if "position" in options else name
        for name, options in (training.get("objectives") or {}).items()
    ]
    rows = {
        "Architecture": f"`{description['name']}` {code(description['kwargs'])}{irpe}{stem}",
        "Input": f"{len(description['mean'])} channels, {h}x{w} pixels, the inner {description.get('crop', 0.875):.1%}",
        "Normalisation": f"values in [0, 1], minus {code(description['mean'])}, divided by {code(description['std'])}",
        "Output": f"{description['grid'][0]}x{description['grid'][1]} patch tokens of width {description['width']}, "
        f"after {description['num_prefix_tokens'] or 'no'} prefix tokens; final norm applied",
        "Pooling": f"{description['pooling']} (what the training made an image's feature)",
        "Position": "off: trained without position encoding" if without else "on",
        "Numbers": f"{parameters:,} in the state dict",
        "Recipe": recorded(training.get("recipe")),
        "Objectives": recorded(", ".join(objectives)),
        "Data": recorded(training.get("data")),
        "Training": f"{training['step']:,} of {training.get('steps', training['step']):,} steps, "
        f"{training.get('images_seen', 0):,} images seen, seed {training.get('seed')}, {training.get('precision')}"
        if "step" in training else recorded(None),
        "Audit": recorded(training.get("audit")) + (f": {leak}" if (leak := leak_note(description)) else ""),
        "Source": f"`{subject.name}`, SHA-256 of the weights `{subject.weights_sha256}`",
        "Command": f"`{configuration.command_line()}`",
        "Made with": f"torch {torch.__version__}, timm {timm.__version__}",
    }  # fmt: skip
    for name, reason in (training.get("audit_reasons") or {}).items():
        rows[f"Audit of {name}"] = reason
    if source.head is not None:
        names = training.get("label_names")
        named = f"{', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else "names not recorded"
        patches = (
            ", and half of the largest logit of a patch"
            if source.backbone.dense_share and DENSE[0] in source.head
            else ""
        )
        rows["Classes"] = f"{len(source.head['bias'])}: {named}; a linear layer on the pooled tokens{patches}"
    if "segmentation" in training:
        rows["Decoder"] = "of segmentation, which is in none of these files"
    return rows


def with_timm(source: Source, check: Check) -> list[str]:
    """Lines of the card about the files for timm: code to run, and caveats."""
    recipe, description = source.recipe, source.description
    assert recipe is not None
    lines = ["", "## With timm", "", "In this folder; from elsewhere `local-dir:` and its path, from a model hub "]
    lines[-1] += "`hf-hub:OWNER/NAME`:"
    lines += ["", "```python", *timm_files.usage(recipe, ".", len(description["mean"])), "```", ""]
    lines += [f"`tokens` is {('batch', *check.shape)}; `config.json` holds mean, std, size, crop and interpolation. "]
    if description["size"][0] != description["size"][1]:
        lines[-1] += "Of an oblong image timm's transform may cut one pixel beside the training's. "
    lines[-1] += "In the training transparent images were laid over white."
    if recipe.head is None and not recipe.pools:
        above = check.shape[0] - description["grid"][0] * description["grid"][1]  # tokens that are no patches
        parts = {"class": "tokens[:, 0]", "mean": f"tokens[:, {above}:].mean(1)"}
        parts["both"] = f"torch.cat([{parts['class']}, {parts['mean']}], 1)"
        if len(check.shape) == 2:
            lines += [
                "",
                f"Pooled as in the training: `{parts[description['pooling']]}`; `model(images)` pools otherwise.",
            ]
    if description["position"] == "none":
        lines += ["", "Position is off by weights that add nothing, such as a position embedding of zeros."]
    return lines


def with_onnx(source: Source) -> list[str]:
    """Lines of the card about the ONNX file."""
    description = source.description
    h, w = description["size"]
    outputs = "`tokens` (batch, patches, width)" + (", `prefix`" if description["num_prefix_tokens"] else "")
    outputs += "" if source.head is None else f", `logits` (batch, {len(source.head['bias'])})"
    shape = f"(batch, {len(description['mean'])}, {h}, {w})"
    return ["", "## With ONNX", "", f"`model.onnx`: `images` uint8 {shape}, not normalised, to {outputs}."]


def code(value: Any) -> str:
    """Format as code, on one line."""
    return f"`{value}`"


def recorded(value: Any) -> str:
    """The description's text, or a note that there is none."""
    return "not recorded" if value in (None, "", [], {}) else str(value)


def cell(text: str) -> str:
    """Format text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
