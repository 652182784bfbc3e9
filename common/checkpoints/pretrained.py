"""Weights to begin from: those of a run, of a file, or those that timm publishes."""

import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from timm.models._hub import download_cached_file as _from_url
from torch import Tensor, nn

from ..errors import Refusal
from ..models import Backbone
from ..models.create import no_architecture
from ..models.embeddings import resize_embedding
from ..models.swin import alter, form
from . import public, published, storage
from .public import load_exactly

TIMM = "timm:"
POSITION_TENSORS = ("pos_embed", "relative_position_bias_table")  # ViT, DeiT and NesT; Swin


def without_pooling(state: dict[str, Tensor], backbone: Backbone) -> tuple[dict[str, Tensor], list[str]]:
    """Return (`state` without an attention pooling that the backbone has not, a sentence about it if it had one)."""
    model_state = backbone.model.state_dict()
    kept = {key: value for key, value in state.items() if key in model_state or not key.startswith("attn_pool.")}
    return kept, ["its attention pooling is left out"] if len(kept) < len(state) else []


def timm_model(
    name: str, weights: str | None, asked: str, option: str, altered: Mapping[str, bool] | None = None, **kwargs: Any
) -> tuple[Any, list[str], Path]:
    """Return (timm's model `name` with published weights; what was done to them; their file).

    `altered`: arguments of `alter`, for a Swin. `kwargs`: of the architecture; num_classes=1 asks for the classifier,
    with as many classes as it was published with, else it is left out. Raises Refusal, which names what `asked` for it
    and the `option` that names a file.
    """
    file, _ = published.split_branch(weights) if weights is not None else (fetched(name, asked, option), None)
    if not file.exists():
        raise Refusal(f"{option}{weights}: no such file; expected weights of {name} as published for timm")
    try:
        model = timm.create_model(name, pretrained=False, **{"num_classes": 0, **kwargs})
    except Exception as error:  # no such tag, in timm's own words
        raise Refusal(f"{asked}: {' '.join(str(error).split())[:300]}") from error
    alter(model, **(altered or {}))
    where = f"{asked}: {option}{weights}" if weights is not None else f"{asked}: {file}"
    return model, published.load(model, weights or str(file), where), file


def fetched(name: str, asked: str, option: str) -> Path:
    """Return the file that timm publishes for `name`: from its cache, or fetched now. Raises Refusal."""
    _notice_missing_network()
    try:
        config = timm.models.get_pretrained_cfg(name)
        if config is None or not (config.hf_hub_id or config.url):
            raise ValueError(f"timm publishes no weights of {name}")
        if config.hf_hub_id:
            return _from_hub(config.hf_hub_id, config.hf_hub_filename)
        return Path(_from_url(config.url))  # type: ignore[arg-type]
    except Exception as error:  # no network, no such tag, no weights: each in its own words
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Refusal(
            f"{asked}: cannot load weights from timm's cache or the Hugging Face hub ({reason}); give a local file "
            f"with {option}FILE"
        ) from error


def _from_hub(repository: str, name: str | None) -> Path:
    """Fetch a file of weights of a model on the hub, safetensors if there is one."""
    repository, _, revision = repository.partition("@")
    usual = name or "pytorch_model.bin"
    safe = "model.safetensors" if name is None else f"{Path(name).stem}.safetensors".replace("pytorch_model", "model")
    for file in dict.fromkeys([safe, usual] if usual.endswith(".bin") else [usual]):
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except EntryNotFoundError as error:
            absent = error
    raise absent


def _notice_missing_network() -> None:
    """Make the hub's client look into its cache alone where there is no network: it would try for a minute."""
    address = urllib.parse.urlparse(hub.ENDPOINT)
    if urllib.request.getproxies() or not address.hostname:
        return  # names may be resolved elsewhere
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        hub.HF_HUB_OFFLINE = True


def begin_classifier(layer: nn.Linear, init: str, pooling: str, classes: Sequence[str]) -> str:
    """Give a fresh classifier of these `classes`, in their order, on features of this `pooling`, the weights of the
    classifier of model.init, if that is such a one. Returns what was done, in a line; nothing where there is none.

    A layer on patches comes with it, if both have one (`common.features.classes`). Raises Refusal for a damaged one.
    """
    if init.startswith(TIMM):
        return ""
    description = public.read_description(public.weights_file(init))
    head = public.load_head(init, description)
    if head is None:
        return ""
    if description.get("training", {}).get("label_names") != list(classes) or description.get("pooling") != pooling:
        return f"its classifier, of {len(head['bias'])} classes, is left out"
    own = layer.state_dict()
    layer.load_state_dict(own | {name: tensor for name, tensor in head.items() if name in own})
    return "its classifier, too, as the classes are the same"


def begin_from(backbone: Backbone, init: str | None, weights: str | None = None) -> str:
    """Give a fresh `backbone` the weights of model.init: `timm:NAME` (from the file `weights`, if given), a run folder
    or a backbone's file. Returns what was done, in a line; nothing without `init`.

    Every weight comes from there, except that an absolute position embedding is resized to another grid, and that it
    stays as it was made where the weights were trained without one, or where `backbone` has a fixed one. Call it before
    the backbone is prepared. Raises Refusal that names model.init.
    """
    if init is None or not init.startswith(TIMM):
        if weights is not None:
            raise Refusal(f"model.weights={weights} goes with model.init=timm:NAME, and model.init is {init}")
        if init is None:
            return ""
    with torch.random.fork_rng(devices=[]):  # the heads are those of a run from scratch
        source = _source(backbone, init, weights)
    config, model_state, notes = backbone.config, backbone.model.state_dict(), list(source.notes)
    state = dict(source.state)
    kept = [name for name in model_state if name.endswith(POSITION_TENSORS)] if source.position == "none" else []
    if kept:
        notes.append("it was trained without position embedding, which is fresh")
    elif config.position_embedding == "sincos" and "pos_embed" in model_state:
        kept = ["pos_embed"]
        notes.append("position embedding stays sine-cosine")
    state |= {name: model_state[name] for name in kept}
    if "pos_embed" not in kept and resized(state, model_state, source.grid, backbone.grid):
        (h, w), (new_h, new_w) = source.grid, backbone.grid
        notes.append(f"position embedding resized from {h}x{w} to {new_h}x{new_w}")
    size = f"{backbone.size[0]}x{backbone.size[1]}"
    this = f"model.name={config.name} with model.kwargs={dict(config.kwargs)}{_added(vars(config))} at {size}"
    try:
        load_exactly(backbone.model, state, f"model.init={init}")
    except Refusal as refusal:
        raise Refusal(f"{refusal}; it is {source.name}, and this is {this}") from None
    if source.heads != _heads(backbone.model):  # the one thing that no shape tells
        raise Refusal(
            f"model.init={init} has {_listed(source.heads)} attention heads a block, and {this} has "
            f"{_listed(_heads(backbone.model))}: set model.kwargs.num_heads alike"
        )
    if source.mean != list(config.mean) or source.std != list(config.std):
        notes.append(f"its images were normalised otherwise (model.mean={source.mean} model.std={source.std})")
    return "; ".join([f"weights of {init}", *notes, "the objectives' heads are fresh"])


@dataclass
class _Source:
    """Weights to begin from, and what has to be known of them."""

    name: str  # of the architecture, and how it differs from timm's
    state: dict[str, Tensor]
    grid: tuple[int, int]
    position: str
    heads: list[int]
    mean: list[float]
    std: list[float]
    notes: list[str]  # what was left out of a published file, or resized


def _source(backbone: Backbone, init: str, weights: str | None) -> _Source:
    asked = f"model.init={init}"
    if not init.startswith(TIMM):
        if not Path(init).exists():
            raise Refusal(
                f"{asked}: no such run folder or file; expected timm:NAME, a run folder or a {storage.WEIGHTS}"
            )
        try:
            trained, _, facts = public.load_backbone(init)
        except Refusal as refusal:
            raise Refusal(f"{asked}: {refusal}") from None
        size = f"{trained.size[0]}x{trained.size[1]}"
        name = f"{facts['name']} with model.kwargs={facts['kwargs']}{_added(facts)} at {size}"
        state, heads = trained.model.state_dict(), _heads(trained.model)
        mean, std = list(facts["mean"]), list(facts["std"])
        return _Source(name, state, trained.grid, facts["position"], heads, mean, std, [])
    name = init.removeprefix(TIMM)
    if reason := no_architecture(name):
        raise Refusal(f"{asked}: {reason}")
    # one channel where the backbone has one: the kernels of the three are added up
    altered = {key.removeprefix("swin_"): value for key, value in form(backbone.model).items()}
    model, notes, _ = timm_model(name, weights, asked, "model.weights=", altered, in_chans=backbone.channels)
    config: dict[str, Any] = model.pretrained_cfg
    state, left_out = without_pooling(model.state_dict(), backbone)
    mean, std = (
        [sum(config[which]) / 3] if backbone.channels == 1 else list(config[which]) for which in ("mean", "std")
    )
    stem = getattr(model, "patch_embed", None)
    grid = tuple(getattr(stem, "grid_size", None) or backbone.grid)
    return _Source(name, state, grid, "full", _heads(model), mean, std, notes + left_out)  # type: ignore[arg-type]


def _added(options: Mapping[str, Any]) -> str:
    """What was added to timm's own network, in words of options."""
    given = {name: options.get(name) for name in ("irpe", "stem")}
    return "".join(f", model.{name}={dict(value)}" for name, value in given.items() if value is not None)


def _heads(model: nn.Module) -> list[int]:
    """List the attention heads of every module that has some."""
    return [module.num_heads for module in model.modules() if isinstance(getattr(module, "num_heads", None), int)]  # type: ignore[misc]


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in dict.fromkeys(numbers))


def resized(state: dict[str, Tensor], target: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Bring the position embedding in `state` (1, P + N, D), whose first P rows are of prefix tokens, to the new grid;
    whether that was needed and possible."""
    table, goal = state.get("pos_embed"), target.get("pos_embed")
    if table is None or goal is None or table.ndim != 3 or goal.ndim != 3 or old == new:
        return False
    prefix = table.shape[1] - old[0] * old[1]
    if prefix != goal.shape[1] - new[0] * new[1]:
        return False
    state["pos_embed"] = resize_embedding(table, old, new)
    return True
