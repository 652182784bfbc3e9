"""Checkpoints: the public backbone, and the private state that a run resumes from.

A run folder holds

    config.yaml                       every option as it was resolved
    metrics.jsonl, tb/, pictures/     what was measured
    backbone.safetensors, .json       the newest backbone: the public contract, all that evaluation needs
    student.safetensors, .json        with export=both: the student's, where the backbone above is the teacher's
    head.safetensors                  the classifier on top of that backbone, where labels trained one
    state/step_00000100/              one checkpoint: state.pt, its backbone, and manifest.json with checksums

A checkpoint is written aside, flushed to the disk and renamed, so that a folder named step_* is either whole or
damaged later; damage is found by its checksums. Nothing is unpickled without torch's weights_only.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import Refusal
from ..models import Backbone, ModelConfig, create
from ..models.create import no_architecture, refuse_arguments, shapes
from ..models.plan import PlanSpec, TokenPlan
from .published import differences
from .storage import BEST_HEAD, DESCRIPTION, FORMAT, HEAD, WEIGHTS, checkpoints_of, sha256, write_atomically, write_json

MOST_PIXELS = 8192  # of a side of the images that a backbone is for
POOLINGS = ("mean", "class", "both")
OF_TRAINING: dict[str, type] = {  # what is read of a description's `training`, where it is there
    "recipe init begun_from changed data data_root data_train data_validation data_image data_label data_range "
    "data_fingerprint max_bad audit precision commit exported": str,
    "step steps images_seen batch seed": int,
    "objectives audit_reasons": dict,
}
NOUNS = {str: "a text", int: "a whole number", dict: "a mapping"}


def describe(backbone: Backbone, position: str, pooling: str, training: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `backbone.json`: how to build the backbone, feed it, and how it was trained."""
    config = backbone.config
    return {
        "format": FORMAT,
        "name": config.name,
        "kwargs": dict(config.kwargs),
        "size": list(backbone.size),
        "mean": list(config.mean),
        "std": list(config.std),
        "crop": config.crop,
        "attention": config.attention,
        "position_embedding": config.position_embedding,
        "irpe": config.irpe,
        "stem": config.stem,
        "position": position,
        "pooling": pooling,
        "width": backbone.width,
        "grid": list(backbone.grid),
        "num_prefix_tokens": backbone.num_prefix_tokens,
        "training": training,
    }


def export(folder: Path, backbone: Backbone, description: dict[str, Any], name: str = WEIGHTS) -> None:
    """Write the weights `name` and the .json of that name into `folder`, each atomically, tied together by the weights'
    hash."""
    file = folder / name
    digest = write_weights(file, backbone.model)
    write_json(file.with_suffix(".json"), description | {"weights_sha256": digest})


def write_weights(file: Path, module: torch.nn.Module) -> str:
    """Write the state of a module as safetensors, atomically; returns the file's SHA-256."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    write_atomically(file, lambda aside: save_file(weights, aside))
    return sha256(file)


def weights_file(checkpoint: str | Path) -> Path:
    """Return the weights file that a --ckpt argument means: a run folder, a checkpoint folder or the file itself."""
    path = Path(checkpoint)
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS
        contents = ", ".join(sorted(item.name for item in path.iterdir())[:5]) or "nothing"
        raise Refusal(
            f"no checkpoint in {path}: expected {WEIGHTS} and {DESCRIPTION}, found {contents}; give a run folder "
            "that has reached its first checkpoint"
        )
    if not path.exists():
        raise Refusal(f"no checkpoint at {path}: give a run folder, a {WEIGHTS}, `random`, or `timm:NAME`")
    return path


def _paired(folder: Path) -> bool:
    """Return whether the two files of a backbone belong together."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        return description["weights_sha256"] == sha256(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _newest_pair(run: Path) -> Path | None:
    """Find the newest backbone under run/state: the run was killed, or is, between copying one file and the other."""
    return next((folder / WEIGHTS for folder in checkpoints_of(run) if _paired(folder)), None)


def read_description(weights: Path) -> dict[str, Any]:
    """Read the backbone.json beside `weights`, which has to be whole, of a format we know, and of these weights."""
    path = weights.with_suffix(".json")
    for attempt in range(5):  # a running run replaces the two files one after the other
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Refusal(f"{weights} is not a checkpoint of poslabel: {path.name} is missing beside it") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise Refusal(f"{path} is not a checkpoint description: it is no JSON ({error})") from None
        if not isinstance(description, dict) or "format" not in description:
            raise Refusal(f"{path} is not a checkpoint description: it has no `format`")
        if description["format"] != FORMAT:
            raise Refusal(
                f"{path} has checkpoint format {description['format']}, this version reads format {FORMAT}: "
                f"{'update poslabel' if str(description['format']) > str(FORMAT) else 'export it again'}"
            )
        missing = {"name", "kwargs", "size", "mean", "std", "position", "weights_sha256"} - description.keys()
        if missing:
            raise Refusal(f"{path} is not a whole checkpoint description: it lacks {', '.join(sorted(missing))}")
        if problem := _malformed(description):
            raise Refusal(f"{path} is not a checkpoint description that can be used: {problem}")
        if sha256(weights) == description["weights_sha256"]:
            return description
        time.sleep(0.2 * attempt)
    raise Refusal(
        f"{weights} does not match its {path.name} (SHA-256 differs): the file is damaged, half-copied or of another "
        "run; copy both again, or take an earlier one from the run's state/ folder"
    )


def _malformed(description: Mapping[str, Any]) -> str | None:
    """Name what in a backbone.json is of another type than `describe` writes, too large, or not known to the
    architecture; None if nothing is."""

    def numbers(value: Any, low: float, high: float) -> bool:
        return isinstance(value, list) and all(isinstance(each, (int, float)) and low <= each <= high for each in value)

    size, mean, std = (description[name] for name in ("size", "mean", "std"))
    sides = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)
    right = {
        "kwargs, expected a mapping": isinstance(description["kwargs"], dict),
        f"size, expected two whole numbers up to {MOST_PIXELS}": sides and numbers(size, 1, MOST_PIXELS),
        "mean, expected numbers": numbers(mean, -1e9, 1e9) and mean,
        "std, expected as many positive numbers as mean has": numbers(std, 1e-9, 1e9) and len(std) == len(mean),
        "position, expected full or none": description["position"] in ("full", "none"),
        "crop, expected a share": numbers([description.get("crop", 1.0)], 1e-9, 1),
        "irpe, expected a mapping": isinstance(description.get("irpe"), (dict, type(None))),
        "stem, expected a mapping": isinstance(description.get("stem"), (dict, type(None))),
        "pooling, expected mean, class or both": description.get("pooling", "mean") in POOLINGS,
        "loaded, expected a list of sentences": _all(description.get("loaded", []), list, str),
        "training, expected a mapping": isinstance(description.get("training", {}), dict),
    }
    if wrong := [what for what, is_right in right.items() if not is_right]:
        return f"its {wrong[0]}"
    training = description.get("training", {})
    for names, kind in OF_TRAINING.items():
        for name in names.split():
            if training.get(name) is not None and not isinstance(training[name], kind):
                return f"its training.{name}, expected {NOUNS[kind]}"
    if not _all(list((training.get("objectives") or {}).values()), list, dict):
        return "its training.objectives, expected a mapping of mappings"
    if reason := no_architecture(description["name"]):
        return f"its name {description['name']!r:.60}: {reason}"
    try:
        refuse_arguments(description["name"], description["kwargs"])
    except Refusal as refusal:
        return str(refusal)
    return None


def _all(values: Any, kind: type, of: type) -> bool:
    return isinstance(values, kind) and all(isinstance(each, of) for each in values)  # type: ignore[attr-defined]


def _refuse_others(description: Mapping[str, Any], state: Mapping[str, Any], where: str) -> None:
    """Raises Refusal where `description` is not of the weights `state`, before memory is taken for what it names."""
    most = max([MOST_PIXELS, *(side for tensor in state.values() for side in tensor.shape)])
    for name, value in description["kwargs"].items():
        limit = len(state) if name in ("depth", "depths") else most
        if wrong := [each for each in _numbers(value) if each > limit]:
            raise Refusal(f"{where} holds the weights of another model: its {name} is not {wrong[0]:g}")
    expected = shapes(_config_of(description), tuple(description["size"]))
    if expected is not None and (problems := differences(state, expected)):
        raise Refusal(f"{where} holds the weights of another model: {problems}")


def _numbers(value: Any) -> list[float]:
    """Return the numbers in a value, which may be a list of lists."""
    if isinstance(value, (list, tuple)):
        return [number for each in value for number in _numbers(each)]
    return [value] if isinstance(value, (int, float)) else []


def load_backbone(checkpoint: str | Path) -> tuple[Backbone, TokenPlan, dict[str, Any]]:
    """Rebuild a trained backbone from its two files alone: (backbone in eval mode, the plan it was trained under,
    description).

    Raises Refusal for a missing, damaged, foreign or newer checkpoint, and for weights of another model.
    """
    weights = _newest_pair(Path(checkpoint)) if Path(checkpoint).is_dir() and not _paired(Path(checkpoint)) else None
    weights = weights or weights_file(checkpoint)
    description = read_description(weights)
    try:
        state = load_file(weights)
    except Exception as error:
        raise Refusal(f"{weights} cannot be read as safetensors: {error}") from error
    _refuse_others(description, state, str(weights))
    try:
        backbone = build(description)
    except Refusal as refusal:  # of who wrote it: no option of a command can change that
        reason = str(refusal).partition("; change views.global.size")[0]
        raise Refusal(
            f"{weights.with_suffix('.json')} is not a checkpoint description that can be used: {reason}"
        ) from refusal
    load_exactly(backbone.model, state, str(weights))
    return backbone.eval(), TokenPlan(description["position"]), description


def build(description: dict[str, Any]) -> Backbone:
    """Create a freshly initialised backbone of the architecture that `description` names."""
    backbone = create(_config_of(description), list(description["size"]))
    backbone.use_plans({PlanSpec(position=description["position"])})
    return backbone


def _config_of(description: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(
        name=description["name"],
        kwargs=dict(description["kwargs"]),
        mean=list(description["mean"]),
        std=list(description["std"]),
        crop=description.get("crop", 0.875),
        attention=description.get("attention", "auto"),
        position_embedding=description.get("position_embedding", "learned"),
        irpe=description.get("irpe"),
        stem=description.get("stem"),
    )


def load_exactly(module: torch.nn.Module, state: dict[str, Any], where: str) -> None:
    """Load `state` into `module`, and name what does not fit: missing and extra keys, and shapes. Raises Refusal."""
    if problems := differences(state, module.state_dict()):
        raise Refusal(f"{where} holds the weights of another model: {problems}")
    module.load_state_dict(state)


def load_head(checkpoint: str | Path, description: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Read the linear layer of a classifier that labels trained, {"weight": (K, D or 2 D), "bias": (K,)} and, of one
    that classifies patches too, {"dense.weight": (K, D), "dense.bias": (K,)} (see `common.features.classes`); None for
    a backbone that has none, or was exported without it.

    Raises Refusal where it is missing, of another backbone, or fits neither its width nor its number of classes.
    """
    training = description.get("training", {})
    finetuned, digest = training.get("finetuned"), training.get("head_sha256")
    if (not isinstance(finetuned, dict) and digest is None) or training.get("head") is False:
        return None
    run = weights_file(checkpoint).parent
    files = [*(folder / HEAD for folder in (run, *checkpoints_of(run))), run / BEST_HEAD]
    present = [file for file in files if file.is_file()]
    fitting = [file for file in present if digest is None or sha256(file) == digest]
    if not fitting:
        reason = f"is of another backbone (SHA-256 differs from {DESCRIPTION})" if present else "is missing"
        raise Refusal(
            f"{run / HEAD} {reason}: it holds the classifier that was trained with {run / WEIGHTS}; copy it "
            "there, or, to export, leave the classifier out with --no-head"
        )
    try:
        head = load_file(fitting[0])
    except Exception as error:
        raise Refusal(f"{fitting[0]} cannot be read as safetensors: {error}") from error
    names = training.get("label_names")
    counted = len(names) if isinstance(names, list) else None
    num_classes = finetuned.get("classes") if isinstance(finetuned, dict) else counted
    pooling, of_patches = description.get("pooling"), description.get("width", 0)
    width = of_patches * (2 if pooling == "both" else 1)
    shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    of_image = {"weight": (num_classes, width), "bias": (num_classes,)}
    dense = {"dense.weight": (num_classes, of_patches), "dense.bias": (num_classes,)}
    if shapes not in (of_image, of_image | dense):
        raise Refusal(
            f"{fitting[0]} is not the classifier of {run / WEIGHTS}: expected weight ({num_classes}, {width}) and bias "
            f"({num_classes},) for {num_classes} classes and pooling {pooling}, found {shapes}"
        )
    if names is not None and not (isinstance(names, list) and len(names) == num_classes):
        raise Refusal(f"{run / DESCRIPTION} does not name the {num_classes} classes of {fitting[0]}: {names!r:.80}")
    return head
