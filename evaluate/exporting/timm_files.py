"""Files from which timm rebuilds a trained backbone: model.safetensors, and config.json with its architecture,
its normalisation, size and crop, and, of a finetuned classifier, the names of its classes.

Letters: B images, N patches, P prefix tokens, D width, K classes.
"""

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from common.batches.crops import evaluation
from common.checkpoints import public
from common.errors import Refusal
from common.features.classes import DENSE, class_logits
from common.models import Backbone, Features
from common.models.create import timm_arguments
from common.models.irpe import PUBLISHED
from common.models.lv_vit import LvVit

FILES = ("model.safetensors", "config.json")
SWIN_AS_IN_TIMM = {"swin_conv": False, "swin_bias": True, "swin_merge_last": True}
GLOBAL_POOL = {"class": "token", "mean": "avg"}  # by our names for it
NO_SUCH_POOLING = (AssertionError, AttributeError, RuntimeError, TypeError, ValueError)  # in timm's words
SAME = 1e-4  # between pooled features and logits, of the largest: timm pools as the training did
INTERPOLATION, CROP_MODE = "bicubic", "center"  # of the one evaluation transform


@dataclass
class Recipe:
    """Recipe by which timm builds a backbone: timm.create_model(name, **kwargs)."""

    name: str
    kwargs: dict[str, Any]
    pools: bool = False  # whether model(images) is the feature, or with a head the logits, that were trained
    head: dict[str, Tensor] | None = None  # of a finetuned classifier: weight (K, D), bias (K,)
    label_names: list[str] = field(default_factory=list)

    @property
    def ours(self) -> bool:
        """Whether the architecture is registered by importing `common.models`, not by timm."""
        return not timm.model_entrypoint(self.name).__module__.startswith("timm.")


def recipe(description: Mapping[str, Any]) -> Recipe:
    """Recipe by which timm builds the network of a `description`. Raises Refusal if timm cannot."""
    elsewhere = "use --to safetensors or onnx"
    if description.get("irpe") is not None:
        raise Refusal(
            f"--to timm: iRPE was added to {description['name']} after timm had built it, which no timm.create_model "
            f"repeats (the published {next(iter(PUBLISHED))} and others can be exported); {elsewhere}"
        )
    if description.get("stem") is not None:
        raise Refusal(
            f"--to timm: a stem of filters (model.stem) was put into {description['name']} after timm had built it, "
            f"which no timm.create_model repeats; {elsewhere}"
        )
    altered = {name: description["kwargs"].get(name, usual) for name, usual in SWIN_AS_IN_TIMM.items()}
    if altered != SWIN_AS_IN_TIMM:
        raise Refusal(f"--to timm: its Swin was altered ({altered}), which no timm.create_model repeats; {elsewhere}")
    backbone = public.build(dict(description))
    if description["position"] == "none" and getattr(backbone.model, "rope", None) is not None:
        raise Refusal(
            f"--to timm: {description['name']} was trained without its rotary embedding, which timm would add; "
            f"{elsewhere}"
        )
    return Recipe(description["name"].split(".")[0], timm_arguments(backbone.config, backbone.size))


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


# ------------------------------------------------------------------------------------------------------- to be written


def data_config(description: Mapping[str, Any]) -> dict[str, Any]:
    """Input transform of the backbone, in the words of timm's pretrained_cfg."""
    return {
        "input_size": [len(description["mean"]), *description["size"]],
        "mean": list(description["mean"]),
        "std": list(description["std"]),
        "crop_pct": description.get("crop", 0.875),
        "crop_mode": CROP_MODE,
        "interpolation": INTERPOLATION,
    }


def write(
    folder: Path, made: Recipe, backbone: Backbone, description: Mapping[str, Any], head: dict[str, Tensor] | None
) -> Recipe:
    """Write the two files of FILES into `folder`; returns the recipe as it was written: with a pooling by which timm's
    model(images) is what was trained, and with `head`, {"weight": (K, D), "bias": (K,)}, if there is one.

    Raises Refusal where there is a head and no pooling of timm is the one that it was trained on.
    """
    state = state_for_timm(backbone, description["position"])
    names = description.get("training", {}).get("label_names") or []
    chosen = Recipe(made.name, made.kwargs)
    usual = made.kwargs | {"num_classes": 0 if head is None else len(head["bias"])}
    usual["global_pool"] = GLOBAL_POOL.get(description["pooling"])
    poolings = [usual, usual | {"use_fc_norm": False}]  # BEiT's and EVA's mean of patches: normalised before, not after
    for kwargs in poolings if usual["global_pool"] else ():
        try:
            model = _built(Recipe(made.name, kwargs), description, state, head)
            if _pools(model, backbone, description, head):
                chosen = Recipe(made.name, kwargs, True, head, list(names) if head is not None else [])
                break
        except NO_SUCH_POOLING:
            continue
    else:
        if head is not None:
            raise Refusal(
                f"--to timm: its classifier was trained on pooling={description['pooling']}, by which no head of "
                f"timm's {made.name} pools; use --to safetensors or onnx, or leave the classifier out with --no-head"
            )
        model = _built(chosen, description, state, None)
    labels = {"label_names": chosen.label_names} if chosen.label_names else {}
    save_for_hf(model, str(folder), model_config=labels, safe_serialization=True)
    return chosen


def _built(
    made: Recipe, description: Mapping[str, Any], state: dict[str, Tensor], head: dict[str, Tensor] | None
) -> Any:
    """Build timm's model with these weights, in eval mode; what it says of itself is true of them."""
    known = timm.get_pretrained_cfg(made.name)
    config = data_config(description) | {"architecture": made.name, "num_classes": made.kwargs.get("num_classes", 0)}
    for name in ("first_conv", "classifier", "fixed_input_size"):
        config[name] = getattr(known, name, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = timm.create_model(made.name, pretrained_cfg=config, **made.kwargs).eval()
    whole = state | (_head_for_timm(model, config["classifier"], head) if head is not None else {})
    model.load_state_dict(whole)
    return model


def _head_for_timm(model: nn.Module, classifiers: Any, head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The linear layer under timm's names, and that on patches where timm's model has one. Further heads are zero:
    where timm averages two of them, the first is doubled."""
    names = [classifiers] if isinstance(classifiers, str) else list(classifiers)
    state_of_model = model.state_dict()
    state = {
        name: torch.zeros_like(state_of_model[name]) for name in state_of_model if name.rpartition(".")[0] in names
    }
    factor = 2 if isinstance(model, VisionTransformerDistilled) else 1
    state |= {f"{names[0]}.{which}": factor * head[which].float() for which in ("weight", "bias")}
    if isinstance(model, LvVit):
        state |= {f"aux_head.{name.removeprefix('dense.')}": head[name].float() for name in DENSE if name in head}
    return state


@torch.no_grad()
def _pools(model: Any, backbone: Backbone, description: Mapping[str, Any], head: dict[str, Tensor] | None) -> bool:
    """Whether model(images) is the pooled feature (B, D), or the logits (B, K), that were trained."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, backbone.channels, *backbone.size, generator=generator)
    features = backbone(images, public.TokenPlan(description["position"]))
    expected = scores(backbone, features, description["pooling"], head)
    output = model(images)
    return output.shape == expected.shape and difference(output, expected) <= SAME


def scores(backbone: Backbone, features: Features, pooling: str, head: Mapping[str, Tensor] | None) -> Tensor:
    """Pooled features (B, D), or with a `head` its logits (B, K)."""
    if head is None:
        return features.pooled(pooling)
    return class_logits(features, pooling, {name: each.float() for name, each in head.items()}, backbone.dense_share)


def difference(output: Tensor, expected: Tensor) -> float:
    """Largest difference; of logits, as a share of the largest if that is beyond 1."""
    return ((output - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


# ------------------------------------------------------------------------------------------------ as a user reads them


def read(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Read the two files in `folder`: (timm's model in eval mode, its data config)."""
    level = logging.getLogger("timm").level
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    finally:
        logging.getLogger("timm").setLevel(level)
    return model, resolve_model_data_config(model)


def normalised(images: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Normalise uint8 (B, C, H, W) by the mean and std of timm's `config`."""
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (images / 255 - mean) / std


def shaped(picture: Tensor, size: tuple[int, int], crop: float) -> Tensor:
    """A picture of the very shape that is resized to before the crop, twice as large: timm rounds the longer side of
    any other shape up where the training rounds it down, unless the size is square."""
    if size[0] == size[1]:
        return picture
    return evaluation(picture, [2 * int(side / crop) for side in size], 1.0)


def import_line(made: Recipe) -> str | None:
    """Import line that makes timm know the architecture; None if timm has it."""
    if not made.ours:
        return None
    module = Backbone.__module__.rpartition(".")[0]
    other = "poslabel.common.models" if module == "common.models" else "common.models"
    context = "with poslabel installed" if module == "common.models" else "in the repository"
    return f"import {module}  # registers {made.name}; {context}: import {other}"


def usage(made: Recipe, folder: str | Path, channels: int) -> list[str]:
    """Lines of Python that build the model with timm and show it an image, exactly as one types them."""
    mode = "L" if channels == 1 else "RGB"
    source = json.dumps(f"local-dir:{folder}", ensure_ascii=False)
    lines = ["import timm", "from PIL import Image, ImageOps"]
    lines += [line] if (line := import_line(made)) else []
    lines += [
        f"model = timm.create_model({source}, pretrained=True).eval()",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
        f'image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("{mode}")',
        "images = transform(image)[None]",
        "tokens = model.forward_features(images)",
    ]
    if made.head is not None:
        lines += ["logits = model(images)"]
        lines += ['label = model.pretrained_cfg["label_names"][logits.argmax()]'] if made.label_names else []
    elif made.pools:
        lines += ["feature = model(images)"]
    return lines
