"""What an evaluation judges: a checkpoint, weights that timm publishes, or an untrained backbone."""

import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants as hub
from omegaconf import OmegaConf
from torch import Tensor

from . import checkpoint
from . import config as configuration
from .checkpoint import build, describe, load_exactly
from .errors import Refusal
from .models import Backbone, ModelConfig, create
from .plan import TokenPlan
from .transforms import View

RANDOM, TIMM = "random", "timm:"
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


def find(ckpt: str, like: str | None = None, weights: str | None = None) -> Subject:
    """The subject of --ckpt: a run folder, a weights file, `random` (of the architecture of `like`), or `timm:NAME`.

    `like`: a run, or a pretraining recipe, for `random`. `weights`: a local file with timm's weights for `timm:NAME`.
    Raises Refusal.
    """
    if like is not None and ckpt != RANDOM:
        raise Refusal(f"--like {like} names the architecture of --ckpt random, and --ckpt is {ckpt}: leave it out")
    if weights is not None and not ckpt.startswith(TIMM):
        raise Refusal(f"--weights {weights} goes with --ckpt timm:NAME; give a checkpoint of poslabel as --ckpt FILE")
    if ckpt == RANDOM:
        description = _like(like or "quickstart")
        return Subject(RANDOM, description, None, Path("runs", f"random-{description['name']}", "evaluate"))
    if ckpt.startswith(TIMM):
        return _published(ckpt.removeprefix(TIMM), weights)
    backbone, _, description = checkpoint.load_backbone(ckpt)
    file = checkpoint.find(ckpt)
    name = file.parent.resolve().name if file.name == checkpoint.WEIGHTS else file.stem
    return Subject(name, description, backbone.model.state_dict(), file.parent / "evaluate")


def _like(word: str) -> dict[str, Any]:
    """The description of an untrained backbone, from a checkpoint's own or from a pretraining recipe."""
    path = Path(word)
    if path.is_dir() or path.suffix == ".safetensors":
        return checkpoint.load_backbone(path)[2]
    path = configuration.find_recipe(word, "pretrain")
    recipe: Any = OmegaConf.to_container(configuration.read_yaml(path))
    model = configuration.merge(
        OmegaConf.structured(ModelConfig), recipe.get("model") or {}, f"{path} (model)", ModelConfig
    )
    try:
        size = (recipe.get("views") or {}).get("global", {}).get("size", View().size)
        objectives = [options or {} for options in (recipe.get("objectives") or {}).values()]
        positions = {options.get("position", "none") for options in objectives}
    except AttributeError:
        raise Refusal(f"{path} is no pretraining recipe: expected mappings under views, global, objectives") from None
    # as pretraining has it: evaluated with position encoding if any objective was trained with it, were it in part
    position = "none" if positions == {"none"} else "full"
    backbone = create(configuration.to_object(model, ModelConfig), size)
    training = {"data": recipe.get("data", "builtin"), "data_root": recipe.get("data_root")}
    return describe(backbone, position, "mean", training)


def _published(name: str, weights: str | None) -> Subject:
    """timm's own weights: from the file `weights`, timm's cache, or the hub."""
    if weights is not None and not Path(weights).is_file():
        raise Refusal(f"--weights {weights}: no such file; expected weights of {name} as published for timm")
    if not timm.is_model(name):
        create(ModelConfig(name), 224)  # refuses, with the nearest names
    overlay = {"file": weights} if weights is not None else None
    _notice_missing_network()
    try:  # timm unpickles with weights_only=True
        model: Any = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except Exception as error:  # no network, no such tag, no weights, other shapes: each in its own words
        source = weights or "timm's cache or the Hugging Face hub"
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Refusal(
            f"--ckpt timm:{name}: cannot load weights from {source} ({reason}); give a local file with --weights FILE"
        ) from error
    config: dict[str, Any] = model.pretrained_cfg
    crop = config.get("crop_pct") or 0.875
    backbone = create(
        ModelConfig(name, mean=list(config["mean"]), std=list(config["std"]), crop=crop), list(config["input_size"][1:])
    )
    own = backbone.model.state_dict()
    state = {key: value for key, value in model.state_dict().items() if key in own or not key.startswith("attn_pool.")}
    load_exactly(backbone.model, state, f"timm:{name}")
    description = describe(backbone, "full", "class" if backbone.num_prefix_tokens else "mean", {})
    if weights is not None:
        description["weights_sha256"] = checkpoint.sha256(Path(weights))
    return Subject(f"timm:{name}", description, state, Path("runs", f"timm-{name}", "evaluate"))


def _notice_missing_network() -> None:
    """Without a network the hub's client would try for a minute, line after line, before it looks into its cache."""
    address = urllib.parse.urlparse(hub.ENDPOINT)
    if urllib.request.getproxies() or not address.hostname:
        return  # names may be resolved elsewhere
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        hub.HF_HUB_OFFLINE = True
