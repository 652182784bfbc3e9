"""Build a backbone from its options: check them, let timm create the network, and alter it as they say."""

import importlib
import inspect
import math
import re
import warnings
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..errors import Refusal, nearest
from ..limits import check
from . import token_plans
from .backbone import Backbone, ModelConfig
from .embeddings import resize_without_antialiasing
from .irpe import add_irpe
from .stem import add_stem
from .swin import alter

CHANNELS = (1, 3)  # of an image: grey, RGB
SWIN = ("swin_conv", "swin_bias", "swin_merge_last")  # keywords of `alter`
NAME = re.compile(r"\w+(\.[\w-]+)?", re.ASCII)  # vit_small_patch16_224, swin_s3_tiny_224.ms_in1k
OF_THE_FACTORY = {  # what timm.create_model takes for itself: files, the network, and how a model is compiled or placed
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir",
    "scriptable", "exportable", "no_jit", "features_only", "device", "dtype",
}  # fmt: skip


def create(config: ModelConfig, size: Any) -> Backbone:
    """Create the backbone of `config` for images of `size` (pixels: one number, or height and width), with new weights.

    Raises Refusal for an unknown name, an argument timm does not take, or a size the
    architecture cannot be built for.
    """
    h, w = (size, size) if isinstance(size, int) else size
    check(config, "model.")
    _refuse_impossible(config)
    kwargs = timm_arguments(config, (h, w))
    try:
        model = _network(config, kwargs)
        if config.position_embedding == "sincos":
            _fix_sincos(model, config.name)
        resize_without_antialiasing(model)
        if config.checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        stem = getattr(model, "patch_embed", None)  # Twins has several, and none of this name
        patch = getattr(stem, "patch_size", (1, 1))
        patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        if h % patch[0] or w % patch[1]:  # timm would silently ignore the remainder
            raise ValueError(f"{h}x{w} is not divisible by its patch of {patch[0]}x{patch[1]}")
        if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
            raise Refusal("model.kwargs.patch_drop_rate: which patches were dropped would be lost; set `keep` instead")
        backbone = Backbone(model, config, (h, w))
    except Refusal:
        raise
    except Exception as error:  # timm asserts, raises TypeError or RuntimeError, each in its own words
        raise Refusal(
            f"timm cannot build model {config.name!r} for {h}x{w} pixels: "
            f"{' '.join(str(error).split()) or type(error).__name__}; "
            "change views.global.size, model.kwargs (patch_size, window_size, ...) or model.name"
        ) from error
    set_attention(backbone, config.attention)
    return backbone


def _network(config: ModelConfig, kwargs: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's notes on pretrained tags, which are not used here
        model = timm.create_model(config.name, **kwargs)
    alter(model, **{key.removeprefix("swin_"): config.kwargs[key] for key in SWIN if key in config.kwargs})
    if config.stem is not None:
        add_stem(model, config.std, **config.stem)
    if config.irpe is not None:
        add_irpe(model, **config.irpe)
    return model


def _refuse_impossible(config: ModelConfig) -> None:
    """Raise Refusal for a name, channels, means or options of iRPE or the stem that no backbone can have."""
    if reason := no_architecture(config.name):
        raise Refusal(f"model.name={config.name!r}: {reason}; timm.list_models('vit_*') lists names")
    in_chans = config.kwargs.get("in_chans", len(config.mean))
    if type(in_chans) is not int or in_chans not in CHANNELS or len(config.mean) not in CHANNELS:
        option = f"model.mean={list(config.mean)}"
        option = f"model.kwargs.in_chans={in_chans!r}" if "in_chans" in config.kwargs else option
        raise Refusal(
            f"{option}: images have 3 channels (RGB) or 1 (grey) here; transparency is laid over white when they are "
            "read, and further bands are not read: expected as many means and stds, and kwargs.in_chans=1 or none"
        )
    finite = all(map(math.isfinite, (*config.mean, *config.std)))
    if len(config.mean) != len(config.std) or min(config.std) <= 0 or not finite:
        raise Refusal(
            f"model.mean={list(config.mean)} and model.std={list(config.std)}: expected as many finite numbers each, "
            "and every std above 0"
        )
    for option, given, what, add, first in (
        ("irpe", config.irpe, "iRPE", add_irpe, 1), ("stem", config.stem, "the stem", add_stem, 2)
    ):  # fmt: skip
        known = list(inspect.signature(add).parameters)[first:]
        if unknown := sorted(set(given or {}) - set(known)):
            raise Refusal(
                f"model.{option}.{unknown[0]} is no option of {what}: expected {', '.join(known)}"
                f"{nearest(unknown[0], known)}"
            )


def no_architecture(name: Any) -> str | None:
    """Reason why `name` is no architecture, with or without a tag; None if it is one."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return "expected a plain name, such as swin_s3_tiny_224.ms_in1k: neither hf-hub: nor local-dir: nor a path"
    if not timm.is_model(name):
        return f"no architecture of timm {timm.__version__}{nearest(name, timm.list_models())}"
    return None


def refuse_arguments(name: str, kwargs: dict[str, Any]) -> None:
    """Raises Refusal unless all of `kwargs` are arguments of architectures like `name`, and plain values: numbers,
    words, true, false, null, and lists of them. Nothing else may reach timm from somebody's config or backbone.json."""
    known = _arguments(name) | set(SWIN)
    for word, value in kwargs.items():
        option = f"model.kwargs.{word}"
        if word in OF_THE_FACTORY:
            raise Refusal(
                f"{option} is no argument of an architecture and is not passed on to timm: leave it out (weights come "
                "from model.init and model.weights)"
            )
        if word not in known:
            raise Refusal(f"{option} is no argument of {name}{nearest(str(word), known)}")
        if not _plain(value):
            raise Refusal(f"{option}={value!r:.60}: expected a number, a word, true, false, null or a list of them")


def _arguments(name: str) -> set[str]:
    """Arguments of architectures like `name`."""
    module = importlib.import_module(timm.model_entrypoint(name.split(".")[0]).__module__)
    models = [
        model for model in vars(module).values() if isinstance(model, type) and hasattr(model, "forward_features")
    ]
    bases = {
        base for model in models for base in model.__mro__ if issubclass(base, nn.Module) and base is not nn.Module
    }
    known = {word for base in bases for word in inspect.signature(base.__init__).parameters}
    return known - OF_THE_FACTORY - {"self", "args", "kwargs"}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def shapes(config: ModelConfig, size: tuple[int, int]) -> dict[str, torch.Tensor] | None:
    """Tensors of the model that `create` would build, without memory for their numbers; None if it cannot be built.
    Raises Refusal as `create` does for names and arguments."""
    if reason := no_architecture(config.name):
        raise Refusal(f"model.name={config.name!r}: {reason}")
    kwargs = timm_arguments(config, size)
    try:
        with torch.device("meta"):
            return _network(config, kwargs).state_dict()
    except Exception:  # `create` says what is wrong, if anything is
        return None


def timm_arguments(config: ModelConfig, size: tuple[int, int]) -> dict[str, Any]:
    """Keywords with which `create` calls timm.create_model. Raises Refusal if they contradict each other, or if timm
    does not take one of them."""
    refuse_arguments(config.name, config.kwargs)
    sized = {"img_size": size} if "img_size" in _arguments(config.name) else {}  # a convolutional network takes any
    kwargs = {"num_classes": 0, **sized, **config.kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in SWIN}
    if len(config.mean) != 3 or "in_chans" in kwargs:
        kwargs.setdefault("in_chans", len(config.mean))
        if kwargs["in_chans"] != len(config.mean):
            raise Refusal(
                f"model.kwargs.in_chans={kwargs['in_chans']} but model.mean has {len(config.mean)} values: "
                "give one mean and one std per input channel"
            )
    module = timm.model_entrypoint(config.name.split(".")[0]).__module__.rsplit(".", 1)[-1]
    if module == "vision_transformer":
        # nothing here pools inside the model, and without a class token timm could not
        kwargs.setdefault("global_pool", "")
    if module in ("beit", "eva"):
        kwargs.setdefault("global_pool", "token")  # else, pooled, they normalise after pooling: no final norm on tokens
    if module in ("vision_transformer", "deit", "irpe"):
        kwargs.setdefault("fc_norm", False)  # else "the final norm" of average-pooled ViTs is an Identity
    return kwargs


def _fix_sincos(model: Any, name: str) -> None:
    """Replace the position embedding by fixed sines and cosines; prefix tokens get zeros, as in MAE."""
    embedding = getattr(model, "pos_embed", None)
    if not isinstance(model, VisionTransformer) or embedding is None or embedding.shape[-1] % 4:
        raise Refusal(
            f"model.position_embedding=sincos goes with a plain ViT or DeiT that has a position embedding and a width "
            f"that is a multiple of 4, and {name!r} is none"
        )
    grid = model.patch_embed.grid_size
    patches = token_plans.sincos(grid, embedding.shape[-1])  # type: ignore[arg-type]
    with torch.no_grad():
        embedding.zero_()
        embedding[0, embedding.shape[1] - len(patches) :] = patches
    embedding.requires_grad_(False)


def set_attention(model: nn.Module, attention: str) -> None:
    """Choose how attention is computed in every block: "fused", "explicit", or "auto" for timm's own choice."""
    if attention == "auto":
        return
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention == "fused"  # type: ignore[assignment]
