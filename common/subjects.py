"""What an evaluation judges, and what a pretraining may begin from: a checkpoint, weights that timm publishes, or an
untrained backbone."""

import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from omegaconf import OmegaConf
from timm.models._hub import download_cached_file as _from_url
from torch import Tensor, nn

from . import checkpoint
from . import config as configuration
from .checkpoint import build, describe, load_exactly
from .data.location import location_of
from .errors import Refusal
from .features import RAW
from .models import Backbone, ModelConfig, create, published
from .models.backbone import no_architecture
from .models.embeddings import resize_embedding
from .models.swin import alter, form
from .paths import expanded
from .plan import TokenPlan
from .transforms import PRESETS, View

RANDOM, TIMM = "random", "timm:"
POSITIONAL = ("absolute", "relative")  # objectives that are trained without position embedding unless they say so
OF_CLASS_TOKENS = (
    "dino",
    "koleo",
    "classification",
)  # objectives that train a class token, where there is one, to stand for an image
POSITION_TENSORS = ("pos_embed", "relative_position_bias_table")  # ViT, DeiT and NesT; Swin


@dataclass
class Subject:
    """Something to judge: how it is built, and its weights unless it has none."""

    name: str
    description: dict[str, Any]  # as in backbone.json
    state: dict[str, Tensor] | None  # weights by name; None: untrained
    folder: Path  # where its reports go

    @property
    def plan(self) -> TokenPlan:
        """How its frozen features are computed: as they were trained."""
        return TokenPlan(self.description["position"])

    @property
    def weights_sha256(self) -> str | None:
        """Of the weights' file; None if there is none."""
        return self.description.get("weights_sha256") if self.state is not None else None

    @property
    def notes(self) -> list[str]:
        """What was left out of published weights, or resized, when they were loaded."""
        return self.description.get("loaded", [])

    def backbone(self, seed: int = 0) -> Backbone:
        """The frozen backbone, in eval mode; an untrained one is drawn from `seed`."""
        torch.manual_seed(seed)
        backbone = build(self.description)
        if self.state is not None:
            load_exactly(backbone.model, self.state, self.name)
        return backbone.eval()

    def untrained(self) -> "Subject":
        """The baseline: the same architecture under the same position mode, never trained."""
        return Subject(RANDOM, self.description, None, self.folder)

    def for_finetuning(self, seed: int = 0, **kwargs: Any) -> tuple[Backbone, str]:
        """(a backbone to train further, with position encoding; what was added to it, or nothing).

        A backbone trained without position embedding gets a fresh one, as the architecture initialises it: labels may
        depend on where things are. `kwargs`: further arguments of the architecture, such as drop_path_rate.
        """
        torch.manual_seed(seed)
        backbone = build(self.description | {"position": "full", "kwargs": self.description["kwargs"] | kwargs})
        if self.state is None:
            return backbone, ""
        fresh = {}
        if self.description["position"] == "none":
            own = backbone.model.state_dict()
            fresh = {name: tensor for name, tensor in own.items() if name.endswith(POSITION_TENSORS)}
        load_exactly(backbone.model, self.state | fresh, self.name)
        note = f"trained without position embedding; finetuned with a fresh one ({', '.join(fresh)})" if fresh else ""
        return backbone, note


def find(ckpt: str, like: str | None = None, weights: str | None = None, raw: bool = False) -> Subject:
    """The subject of --ckpt: a run folder, a weights file, `random` (of the architecture of `like`), `timm:NAME` or, if
    `raw`, `pixels` or `patches` (in the size of `like`).

    `like`: a run, or a pretraining recipe, for `random`, `pixels`, `patches`. `weights`: a local file with the weights
    of `timm:NAME`, or FILE::PART where it holds several models. Raises Refusal.
    """
    if like is not None and ckpt not in (RANDOM, *RAW):
        raise Refusal(
            f"--like {like} names the architecture of --ckpt random, or the size of pixels and patches, and --ckpt is "
            f"{ckpt}: leave it out"
        )
    if weights is not None and not ckpt.startswith(TIMM):
        raise Refusal(f"--weights {weights} goes with --ckpt timm:NAME; give a checkpoint of poslabel as --ckpt FILE")
    if ckpt == RANDOM:
        description = _like(like or "quickstart")
        return Subject(RANDOM, description, None, Path("runs", f"random-{description['name']}", "evaluate"))
    if ckpt in RAW:
        if not raw:
            what = {"pixels": "raw pixels"}.get(ckpt, ckpt)
            raise Refusal(f"--ckpt {ckpt}: {what} have no backbone, which is needed here; use knn, linear or fewshot")
        description = _like(like or "quickstart")
        size = "x".join(map(str, description["size"]))
        return Subject(ckpt, description, None, Path("runs", f"{ckpt}-{size}", "evaluate"))
    if ckpt.startswith(TIMM):
        return _published(ckpt.removeprefix(TIMM), weights)
    backbone, _, description = checkpoint.load_backbone(ckpt)
    file = Path(ckpt) / checkpoint.WEIGHTS if Path(ckpt).is_dir() else Path(ckpt)
    run, folder = file.parent.resolve().name, file.parent / "evaluate"
    name = run if file.name == checkpoint.WEIGHTS else file.stem
    if file.name == checkpoint.STUDENT:  # what is found of the teacher stays
        name, folder = f"{run} student", folder / "student"
    return Subject(name, description, backbone.model.state_dict(), folder)


@dataclass
class _Recipe:
    """Of a pretraining recipe, the texts that are read here."""

    data: str
    data_root: str | None
    data_train: str | None
    data_validation: str | None
    data_image: str | None
    data_label: str | None
    data_range: str | None
    model: ModelConfig
    views: dict[str, View]


def _like(word: str) -> dict[str, Any]:
    """The description of an untrained backbone, from a checkpoint's own or from a pretraining recipe."""
    path = Path(expanded(word))
    recipe_file = configuration.find_recipe(word, "pretrain")
    if path.suffix == ".safetensors" or (path.is_dir() and not recipe_file.is_file()):
        return checkpoint.load_backbone(path)[2]
    path = recipe_file
    recipe: Any = OmegaConf.to_container(configuration.read_yaml(path, _Recipe))
    model = configuration.merge(
        OmegaConf.structured(ModelConfig), recipe.get("model") or {}, f"{path} (model)", ModelConfig
    )
    try:
        view = (recipe.get("views") or {}).get("global", {})
        preset = PRESETS.get(view.get("preset"), {}).get("global", {})
        size = view.get("size", preset.get("size", View().size))
        given = {name: options or {} for name, options in (recipe.get("objectives") or {}).items()}
        trained = {name: options for name, options in given.items() if options.get("weight", 1.0) > 0}
        positions = {
            options.get("position", "none" if name in POSITIONAL else "full") for name, options in trained.items()
        }
    except (AttributeError, TypeError):
        raise Refusal(f"{path} is no pretraining recipe: expected mappings under views, global, objectives") from None
    # as pretraining has it: evaluated with position encoding if any objective was trained with it, were it in part
    position = "none" if positions == {"none"} else "full"
    backbone = create(configuration.to_object(model, ModelConfig), size)
    pooling = "class" if backbone.num_prefix_tokens and trained.keys() & set(OF_CLASS_TOKENS) else "mean"
    training = location_of(recipe).options()
    return describe(backbone, position, pooling, training)


def _published(name: str, weights: str | None) -> Subject:
    """timm's own weights: from the file `weights`, timm's cache, or the hub."""
    if reason := no_architecture(name):
        raise Refusal(f"--ckpt {TIMM}{name}: {reason}")
    model, notes, file = _timm(name, weights, f"--ckpt {TIMM}{name}", "--weights ")
    config: dict[str, Any] = model.pretrained_cfg
    crop = config.get("crop_pct") or 0.875
    options = ModelConfig(name, form(model), mean=list(config["mean"]), std=list(config["std"]), crop=crop)
    backbone = create(options, list(config["input_size"][1:]))
    state, left_out = _without_pooling(model.state_dict(), backbone)
    load_exactly(backbone.model, state, f"timm:{name}")
    description = describe(backbone, "full", "class" if backbone.num_prefix_tokens else "mean", {})
    description |= {"loaded": notes + left_out, "weights_sha256": checkpoint.sha256(file)}
    return Subject(f"timm:{name}", description, state, Path("runs", f"timm-{name}", "evaluate"))


def _without_pooling(state: dict[str, Tensor], backbone: Backbone) -> tuple[dict[str, Tensor], list[str]]:
    """(`state` without an attention pooling that the backbone does without, a sentence about it if there is one)."""
    own = backbone.model.state_dict()
    kept = {key: value for key, value in state.items() if key in own or not key.startswith("attn_pool.")}
    return kept, ["its attention pooling is left out"] if len(kept) < len(state) else []


def _timm(
    name: str, weights: str | None, asked: str, option: str, altered: Mapping[str, bool] | None = None, **kwargs: Any
) -> tuple[Any, list[str], Path]:
    """(timm's model `name` with published weights, all of them, and no classifier; what was done to them; their file).

    `altered`: arguments of `alter`, for a Swin. Raises Refusal, which names what `asked` for it and the `option` that
    names a file.
    """
    file, _ = published.split_branch(weights) if weights is not None else (_fetched(name, asked, option), None)
    if not file.exists():
        raise Refusal(f"{option}{weights}: no such file; expected weights of {name} as published for timm")
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, **kwargs)
    except Exception as error:  # no such tag, in timm's own words
        raise Refusal(f"{asked}: {' '.join(str(error).split())[:300]}") from error
    alter(model, **(altered or {}))
    where = f"{asked}: {option}{weights}" if weights is not None else f"{asked}: {file}"
    return model, published.load(model, weights or str(file), where), file


def _fetched(name: str, asked: str, option: str) -> Path:
    """The file that timm publishes for `name`: from its cache, or fetched now. Raises Refusal."""
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
    """A file of weights of a model on the hub, safetensors if there is one."""
    repository, _, revision = repository.partition("@")
    usual = name or "pytorch_model.bin"
    safe = "model.safetensors" if name is None else f"{Path(name).stem}.safetensors".replace("pytorch_model", "model")
    for each in dict.fromkeys([safe, usual] if usual.endswith(".bin") else [usual]):
        try:
            return Path(hf_hub_download(repository, each, revision=revision or None))
        except EntryNotFoundError as error:
            absent = error
    raise absent


def _notice_missing_network() -> None:
    """Without a network the hub's client would try for a minute, line after line, before it looks into its cache."""
    address = urllib.parse.urlparse(hub.ENDPOINT)
    if urllib.request.getproxies() or not address.hostname:
        return  # names may be resolved elsewhere
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        hub.HF_HUB_OFFLINE = True


# ------------------------------------------------------------------------------------------- to train further from


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
    config, own, notes = backbone.config, backbone.model.state_dict(), list(source.notes)
    state = dict(source.state)
    kept = [name for name in own if name.endswith(POSITION_TENSORS)] if source.position == "none" else []
    if kept:
        notes.append("it was trained without position embedding, which is fresh")
    elif config.position_embedding == "sincos" and "pos_embed" in own:
        kept = ["pos_embed"]
        notes.append("position embedding stays sine-cosine")
    state |= {name: own[name] for name in kept}
    if "pos_embed" not in kept and resized(state, own, source.grid, backbone.grid):
        (h, w), (new_h, new_w) = source.grid, backbone.grid
        notes.append(f"position embedding resized from {h}x{w} to {new_h}x{new_w}")
    irpe = f", model.irpe={dict(config.irpe)}" if config.irpe is not None else ""
    size = f"{backbone.size[0]}x{backbone.size[1]}"
    this = f"model.name={config.name} with model.kwargs={dict(config.kwargs)}{irpe} at {size}"
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
                f"{asked}: no such run folder or file; expected timm:NAME, a run folder or a {checkpoint.WEIGHTS}"
            )
        try:
            trained, _, about = checkpoint.load_backbone(init)
        except Refusal as refusal:
            raise Refusal(f"{asked}: {refusal}") from None
        irpe = f", model.irpe={about['irpe']}" if about.get("irpe") is not None else ""
        name = f"{about['name']} with model.kwargs={about['kwargs']}{irpe} at {trained.size[0]}x{trained.size[1]}"
        state, heads = trained.model.state_dict(), _heads(trained.model)
        return _Source(name, state, trained.grid, about["position"], heads, list(about["mean"]), list(about["std"]), [])
    name = init.removeprefix(TIMM)
    if reason := no_architecture(name):
        raise Refusal(f"{asked}: {reason}")
    # one channel where the backbone has one: the kernels of the three are added up
    altered = {key.removeprefix("swin_"): value for key, value in form(backbone.model).items()}
    model, notes, _ = _timm(name, weights, asked, "model.weights=", altered, in_chans=backbone.channels)
    config: dict[str, Any] = model.pretrained_cfg
    state, left_out = _without_pooling(model.state_dict(), backbone)
    mean, std = (
        [sum(config[which]) / 3] if backbone.channels == 1 else list(config[which]) for which in ("mean", "std")
    )
    stem = getattr(model, "patch_embed", None)
    grid = tuple(getattr(stem, "grid_size", None) or backbone.grid)
    return _Source(name, state, grid, "full", _heads(model), mean, std, notes + left_out)  # type: ignore[arg-type]


def _heads(model: nn.Module) -> list[int]:
    """Attention heads of every module that has some."""
    return [module.num_heads for module in model.modules() if isinstance(getattr(module, "num_heads", None), int)]  # type: ignore[misc]


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in dict.fromkeys(numbers))


def resized(state: dict[str, Tensor], own: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Bring the position embedding in `state` (1, P + N, D), whose first P rows are of prefix tokens, to the new grid;
    whether that was needed and possible."""
    there, wanted = state.get("pos_embed"), own.get("pos_embed")
    if there is None or wanted is None or there.ndim != 3 or wanted.ndim != 3 or old == new:
        return False
    prefix = there.shape[1] - old[0] * old[1]
    if prefix != wanted.shape[1] - new[0] * new[1]:
        return False
    state["pos_embed"] = resize_embedding(there, old, new)
    return True
