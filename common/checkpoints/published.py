"""Weights that others publish: a file is read, unwrapped, brought to timm's names, and loaded whole or not at all.

Whatever is left out, renamed into place or resized is said, and every refusal is one line with counts and an example.
"""

import argparse
import importlib
import inspect
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from ..errors import Refusal
from ..models import sp_vit, swin
from ..models.embeddings import resize_embedding
from ..models.sp_vit import SpVit

# Where a file holds one model several times: the first that it has is taken. An average of the weights goes before the
# weights, as in timm; "" stands for tensors under no wrapper at all.
PREFERRED = ("teacher", "target_encoder", "ema", "", "model", "state_dict", "module", "backbone", "encoder", "student")
BRANCH = "::"  # FILE::student: the part of FILE that is wanted
SHOWN = 4  # names of what is left out, at most
BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer and not the weights: fetch them with `git lfs pull`"),
    (b"<", "a web page and not weights: download the file itself again"),
    (b"\x89HDF", "an HDF5 file; expected safetensors, torch's format or .npz"),
)
BUFFERS = re.compile(r"^.*\.(?=relative_position_index$|attn_mask$)")  # of every block: named once
BLOCK_OF_NPZ = re.compile(r"encoderblock_(\d+)/")


def split_branch(weights: str) -> tuple[Path, str | None]:
    """Return (the file, the wanted part of it) of FILE or FILE::PART."""
    file, mark, branch = weights.rpartition(BRANCH)
    return (Path(file), branch) if mark and not Path(weights).exists() else (Path(weights), None)


def load(model: Any, weights: str, where: str) -> list[str]:
    """Give `model`, a model of timm, the weights of FILE or FILE::PART; returns what was done to them besides loading,
    a sentence each. A Swin or SP-ViT is first altered as the file's is (see `swin.alter`, `sp_vit.alter`).

    Every tensor of the model comes from the file and every tensor of the file's model is used. The classifier is left
    out where the model has none (num_classes=0); where it has one, it gets as many classes as the file's. A position
    embedding of another grid, tables of other windows and patches of another size are resized. Raises Refusal that
    begins with `where` for what is no such file or another model's, or has no classifier for a model with one.
    """
    file, branch = split_branch(weights)
    content = _read(file, where)
    if isinstance(content, np.lib.npyio.NpzFile):
        with content:
            return _load_npz(model, file, content, where)
    raw, notes = _unwrap(content, model, branch, where)
    if isinstance(model, SwinTransformer):
        swin.alter(model, **swin.published_form(raw))
    elif isinstance(model, SpVit):
        sp_vit.alter(model, raw)
    state, changed = _adapted(raw, model, where)
    if model.num_classes:
        weight = state.get(f"{_classifiers(model)[0]}.weight")
        _fit_classes(model, None if weight is None else weight.shape[0], where)
    model_state = model.state_dict()
    if problems := differences(state, model_state):
        raise _other(where, problems)
    state, types = _in_float32(state, model_state, where)
    model.load_state_dict(state)
    return [*notes, *changed, *types]


def _other(where: str, problems: str) -> Refusal:
    return Refusal(f"{where} holds the weights of another model: {problems}; give the timm:NAME that it is of")


def differences(state: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> str:
    """Say how the names and shapes in `state` differ from those of a model's, with counts and examples; "" where
    they are the same."""
    missing, extra = sorted(model_state.keys() - state.keys()), sorted(state.keys() - model_state.keys())
    shapes = [key for key in model_state.keys() & state.keys() if model_state[key].shape != state[key].shape]
    problems = [
        f"{len(names)} {what} (such as {names[0]})"
        for names, what in ((missing, "missing"), (extra, "unexpected"))
        if names
    ]
    if shapes:
        first = min(shapes)
        given, expected = (tuple(tensors[first].shape) for tensors in (state, model_state))
        problems.append(f"{len(shapes)} of another shape (such as {first}: {given}, expected {expected})")
    return ", ".join(problems)


# ------------------------------------------------------------------------------------------------ reading a file


def _read(file: Path, where: str) -> Any:
    """Return the content of a weights file, nothing of which is run: a mapping, or an opened .npz. Raises Refusal."""
    if file.is_dir():
        inside = sorted(item.name for item in file.iterdir() if item.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        raise Refusal(f"{where} is a folder: give the file in it ({', '.join(inside[:SHOWN]) or 'it has none'})")
    try:
        with file.open("rb") as opened:
            head = opened.read(512)
        if not head:
            raise Refusal(f"{where} is empty (0 bytes): download it again")
        for beginning, what in BEGINNINGS:
            if head.lstrip().startswith(beginning):
                raise Refusal(f"{where} is {what}")
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
            if names and all(name.endswith(".npy") for name in names):
                return np.load(file, allow_pickle=False)
        elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size:
            return load_file(file)
        elif head[:1] != b"\x80":  # how a pickle begins
            raise Refusal(f"{where} is no weights file: expected safetensors, torch's format or .npz")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of DINO's and MAE's checkpoints
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Refusal:
        raise
    except Exception as error:  # torch, safetensors and zipfile each have their own
        raise Refusal(f"{where} cannot be read: {_reason(file, error)}") from error
    if not isinstance(content, Mapping):
        raise Refusal(f"{where} holds a {type(content).__name__}: expected a mapping from names to tensors")
    return content


def _reason(file: Path, error: Exception) -> str:
    """Say on one line why torch, safetensors or zipfile could not read `file`."""
    unsafe = re.findall(r"GLOBAL ([\w.]+)", str(error))
    if unsafe and zipfile.is_zipfile(file):  # all of them, not the first
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(file)) or unsafe
    if unsafe := [name for name in unsafe if name != "argparse.Namespace"]:
        return (
            f"it holds Python objects ({', '.join(unsafe[:SHOWN])}), which could run code when they are loaded; save "
            "its tensors alone (torch.save(model.state_dict(), FILE)) where you trust it"
        )
    return " ".join(str(error).split())[:200] or type(error).__name__


def _flat(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return all tensors of nested mappings, their names joined with dots."""
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            tensors |= _flat(value, f"{prefix}{key}.")
    return tensors


def _unwrap(
    content: Mapping[Any, Any], model: Any, branch: str | None, where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return (the tensors of one model, under its own names; what was chosen and left out).

    A model is recognised by its first convolution: "teacher.backbone.patch_embed.proj.weight" says that there is one
    under "teacher.backbone". Where it has another name, common wrappers are opened and the rest is left to timm.
    """
    tensors = _flat(content)
    if not tensors:
        raise Refusal(f"{where} holds no tensors, but {', '.join(map(str, list(content)[:SHOWN])) or 'nothing'}")
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or "patch_embed.proj"
    anchor = f"{first if isinstance(first, str) else first[0]}.weight"
    prefixes = [name.removesuffix(anchor) for name in tensors if f".{name}".endswith(f".{anchor}")]
    if not prefixes:
        if branch is not None:
            raise Refusal(f"{where}: no part of it has {anchor}, so {BRANCH}{branch} cannot be found in it")
        inner: Mapping[Any, Any] = content
        while wrapper := next((word for word in ("state_dict", "model") if isinstance(inner.get(word), Mapping)), None):
            inner = inner[wrapper]
        return {name.removeprefix("module."): tensor for name, tensor in _flat(inner).items()}, []
    prefix = _chosen(prefixes, branch, where)
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    notes = []
    if prefix:
        others = [each.rstrip(".") or "the outermost" for each in prefixes if each != prefix]
        notes = [f"read from its {prefix.rstrip('.')}" + (f", not from {', '.join(others)}" if others else "")]
    outside = {_part(name, prefix) for name in tensors if not name.startswith(prefix)}
    named = {str(key) for key, value in content.items() if not isinstance(value, Tensor)}
    outside |= {key for key in named if not any(name.startswith(f"{key}.") for name in tensors)}
    return state, [*notes, *([f"left out: {_some(sorted(outside))}"] if outside else [])]


def _part(name: str, prefix: str) -> str:
    """Return the outermost wrapper of `name` that is not one of `prefix` too."""
    parts, shared = name.split("."), 0
    for one, other in zip(parts, prefix.split("."), strict=False):
        if one != other:
            break
        shared += 1
    return ".".join(parts[: shared + 1])


def _chosen(prefixes: list[str], branch: str | None, where: str) -> str:
    """Return the one of `prefixes` that is wanted, or usual. Raises Refusal that names them."""
    names = ", ".join(prefix.rstrip(".") or "the outermost" for prefix in prefixes)

    def has(prefix: str, word: str) -> bool:
        return any(word in part for part in prefix.split(".")) if word else not prefix

    if branch is not None:
        matching = [prefix for prefix in prefixes if prefix.rstrip(".") == branch]
        matching = matching or [prefix for prefix in prefixes if branch in prefix.split(".")]
        matching = matching or [prefix for prefix in prefixes if branch and has(prefix, branch)]
        if len(matching) != 1:
            raise Refusal(f"{where} has {len(matching)} models under {branch!r}; it has: {names}")
        return matching[0]
    best = next((some for word in PREFERRED if (some := [each for each in prefixes if has(each, word)])), prefixes)
    if len(best) > 1:
        raise Refusal(f"{where} holds {len(prefixes)} models: {names}; choose with FILE{BRANCH}NAME")
    return best[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# ---------------------------------------------------------------------------------------- bringing it to timm's names


def _adapted(raw: dict[str, Tensor], model: Any, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return (a state for `model`, by the filter that timm has for published files of this architecture, without the
    classifier; what was left out and resized). Raises Refusal where the filter cannot."""
    model_state = model.state_dict()
    source, left_out = swin.published_names(raw) if isinstance(model, SwinTransformer) else (dict(raw), [])
    notes = [f"left out: {_some(left_out)}"] if left_out else []
    notes += _resize_positions(source, model_state, model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, at how timm interpolates tables
            state = filter_of(model)(dict(source))
    except Refusal:
        raise
    except Exception as error:  # of another model: timm looks for what is not there
        problems = differences(_without_classifier(source, model)[0], model_state)
        reason = problems or " ".join(str(error).split())[:200] or type(error).__name__
        raise _other(where, reason) from error
    state, classifier = _without_classifier(state, model)
    named = any(name in raw for name in classifier) or any(name.startswith("head.") for name in raw)
    if named and not model.num_classes:
        notes.append("its classifier is left out")
    gone = source.keys() - state.keys() - set(classifier)
    if gone and state.keys() <= source.keys():  # nothing was renamed
        notes.append(f"left out: {_some(sorted({BUFFERS.sub('', name) for name in gone}))}")
    for name in state.keys() & model_state.keys():
        state[name], note = _channels(state[name], model_state[name], name)
        notes += [note] if note else []
    resized = [
        name for name in state.keys() & source.keys()
        if name != "pos_embed" and state[name].shape != source[name].shape and state[name].ndim == source[name].ndim
        and state[name].shape[:1] + state[name].shape[2:] != source[name].shape[:1] + source[name].shape[2:]
    ]  # fmt: skip
    for kind in sorted({name.rpartition(".")[2] if name.endswith("table") else name for name in resized}):
        names = sorted(name for name in resized if name.endswith(kind))
        before, after = ("x".join(map(str, each[names[0]].shape)) for each in (source, state))
        notes.append(f"{kind}{f' of {len(names)} blocks' if len(names) > 1 else ''} resized from {before} to {after}")
    return state, notes


def filter_of(model: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the function that brings a published state dict to the names and shapes of `model`."""
    architecture = model.pretrained_cfg["architecture"]
    module = importlib.import_module(timm.model_entrypoint(architecture).__module__)
    function = getattr(module, "checkpoint_filter_fn", None)
    if function is None:
        return lambda state: state
    parameters = inspect.signature(function).parameters
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in parameters else {}  # DeiT III's own names
    return lambda state: function(state, model, **options)


def _without_classifier(state: Mapping[str, Tensor], model: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Return (`state` without the classifier that this architecture is published with, its names)."""
    prefixes = tuple(f"{name}." for name in _classifiers(model))
    dropped = [name for name in state if prefixes and name.startswith(prefixes) and name not in model.state_dict()]
    return {name: tensor for name, tensor in state.items() if name not in dropped}, dropped


def _classifiers(model: Any) -> tuple[str, ...]:
    """Names of the layers that classify in this architecture: the first, and those of distillation or of patches."""
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _fit_classes(model: Any, count: int | None, where: str) -> None:
    """Give the classifier of `model` the `count` classes of a file's. Raises Refusal for None: the file has none."""
    if not count:
        raise Refusal(
            f"{where} holds no classifier ({_classifiers(model)[0]}): it is a backbone; give a file with one, or judge "
            "its features with evaluate/linear.py"
        )
    if count != model.num_classes:
        model.reset_classifier(count)


def _resize_positions(state: dict[str, Tensor], model_state: Mapping[str, Tensor], model: Any) -> list[str]:
    """Bring an absolute position embedding of another square grid in `state` to the model's, in place: bicubic without
    antialiasing, as its authors do; timm's filter would antialias."""
    table, target = state.get("pos_embed"), model_state.get("pos_embed")
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if table is None or target is None or grid is None or table.ndim != 3 or target.ndim != 3:
        return []
    h, w = grid
    likely = [target.shape[1] - h * w, 1, 0, 2]  # entries before the grid, of class and other tokens
    sides = [(math.isqrt(max(table.shape[1] - prefix, 0)), prefix) for prefix in likely]
    square = [(side, prefix) for side, prefix in sides if side and side * side + prefix == table.shape[1]]
    if table.shape[1] == target.shape[1] or not square or square[0][0] ** 2 == h * w:
        return []
    side = square[0][0]
    state["pos_embed"] = resize_embedding(table, (side, side), (h, w))
    return [f"position embedding resized from {side}x{side} to {h}x{w}"]


def _channels(tensor: Tensor, goal: Tensor, name: str) -> tuple[Tensor, str]:
    """Return (a first kernel of three channels made for the model's channels by timm's rule; what was done, or "")."""
    if not name.startswith("patch_embed.") or tensor.ndim != 4 or tensor.shape[0] != goal.shape[0] or goal.ndim != 4:
        return tensor, ""
    before, after = tensor.shape[1], goal.shape[1]
    if before == after or before != 3 or tensor.shape[2:] != goal.shape[2:]:
        return tensor, ""
    return adapt_input_conv(after, tensor), f"kernels of {before} channels made into kernels of {after}"


def _in_float32(
    state: dict[str, Tensor], goal: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return (`state` in the model's types; a note if they were others). Raises Refusal for what is no weight."""
    types = sorted({str(state[name].dtype).removeprefix("torch.") for name in state if goal[name].is_floating_point()})
    whole = {}
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.is_floating_point() != goal[name].is_floating_point() or tensor.is_complex():
            kind = str(tensor.dtype)
            if tensor.layout != torch.strided:
                kind += f" in the layout {tensor.layout}"
            kind = kind.replace("torch.", "")
            raise Refusal(f"{where}: {name} is of type {kind}, expected plain float32: it is quantised, or no weight")
        whole[name] = tensor.to(goal[name].dtype)
    wrong = [name for name, tensor in whole.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wrong:
        raise Refusal(
            f"{where} has {len(wrong)} tensors with numbers that are not finite (such as {wrong[0]}): its training "
            "failed, or the file is damaged; give another"
        )
    return whole, [] if types in ([], ["float32"]) else [f"stored as {', '.join(types)}, computed in float32"]


# ------------------------------------------------------------------------------------------------------ JAX's arrays


@torch.no_grad()
def _load_npz(model: nn.Module, file: Path, arrays: Any, where: str) -> list[str]:
    """Load the arrays of a JAX checkpoint by timm's own names for them, and check that nothing is left over on either
    side: timm fills what it finds."""
    sizes: dict[str, tuple[int, ...]] = {name: arrays[name].shape for name in arrays.files}
    blocks = {int(match[1]) for name in sizes if (match := BLOCK_OF_NPZ.search(name))}
    depth = len(getattr(model, "blocks", ()))
    name = model.pretrained_cfg["architecture"]  # type: ignore[index]
    if not hasattr(model, "load_pretrained") or not blocks:
        raise Refusal(f"{where}: timm reads .npz files of JAX's vision transformers only, and this is for {name}")
    if len(blocks) != depth:
        raise _other(where, f"{len(blocks)} blocks, and {name} has {depth}")
    if model.num_classes:
        biases = [shape for name, shape in sizes.items() if name.endswith("head/bias")]
        _fit_classes(model, biases[0][-1] if biases else None, where)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    try:
        model.load_pretrained(str(file))  # type: ignore[operator]
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _other(where, reason) from error
    empty = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if empty:
        raise _other(where, f"{len(empty)} missing (such as {empty[0]})")
    left_out = not model.num_classes and any("head/" in name for name in sizes)
    notes = ["its classifier is left out"] if left_out else []
    for part, entry in (("pos_embedding", "pos_embed"), ("embedding/kernel", "patch_embed.proj.weight")):
        before = next((shape for name, shape in sizes.items() if name.endswith(part)), None)
        after = dict(model.named_parameters()).get(entry)
        if before is not None and after is not None and math.prod(before) != after.numel():
            notes.append(f"{entry} resized from {'x'.join(map(str, before))} to {'x'.join(map(str, after.shape))}")
    return notes
