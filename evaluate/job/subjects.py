"""The subject of an evaluation: a checkpoint, weights that timm publishes, an untrained backbone, or raw pixels."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from common import config as configuration
from common.batches.views import PRESETS, View, height_width
from common.checkpoints import public, storage
from common.checkpoints.pretrained import POSITION_TENSORS, TIMM, resized, timm_model, without_pooling
from common.checkpoints.public import build, describe, load_exactly
from common.data import Images
from common.data.location import location_of
from common.errors import Refusal
from common.features.extraction import RAW
from common.features.whitened import fill, filters_for, stem_of
from common.models import Backbone, ModelConfig, create, sp_vit, swin
from common.models.create import no_architecture
from common.models.plan import TokenPlan
from common.paths import expanded
from common.processes.launch import ROOT

RANDOM = "random"  # --ckpt: an untrained backbone
DEFAULTS: dict[str, Any] = {"position": "full", "pools": "mean", "crops": "all", "teacher": False, "local": False}


@dataclass
class Subject:
    """Subject of an evaluation: how it is built, and its weights unless it has none."""

    name: str
    description: dict[str, Any]  # as in backbone.json
    state: dict[str, Tensor] | None  # weights by name; None: untrained
    folder: Path  # where its reports go
    file: Path | None = None  # of the weights, beside which a classifier may lie
    images: Images | None = None  # training images: an untrained stem begins as patches of theirs
    workers: int = 0  # that read them

    @property
    def plan(self) -> TokenPlan:
        """Plan of its frozen features: the one it was trained under."""
        return TokenPlan(self.description["position"])

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the file of weights; None if there is none."""
        return self.description.get("weights_sha256") if self.state is not None else None

    @property
    def notes(self) -> list[str]:
        """Notes on what was left out of published weights, or resized, when they were loaded."""
        return self.description.get("loaded", [])

    def head(self) -> dict[str, Tensor] | None:
        """Read its classifier's linear layer, see `public.load_head`; None where it has none. Raises Refusal."""
        return None if self.file is None else public.load_head(self.file, self.description)

    def backbone(self, seed: int = 0) -> Backbone:
        """Build the frozen backbone, in eval mode; an untrained one is drawn from `seed`."""
        torch.manual_seed(seed)
        backbone = build(self.description)
        if self.state is not None:
            load_exactly(backbone.model, self.state, self.name)
        else:
            self._begin(backbone, seed)
        return backbone.eval()

    def _begin(self, backbone: Backbone, seed: int) -> None:
        """Let an untrained stem begin as one that is trained does, but from the evaluation's training images."""
        if self.images is not None and stem_of(backbone) is not None:
            fill(backbone, filters_for(backbone, self.images, seed, self.workers))

    def untrained(self) -> "Subject":
        """The baseline: the same architecture under the same position mode, never trained."""
        return Subject(RANDOM, self.description, None, self.folder, images=self.images, workers=self.workers)

    def for_finetuning(self, seed: int = 0, **kwargs: Any) -> tuple[Backbone, str]:
        """Build a backbone to train further: (it, with position encoding; a note on what was added, or empty).

        A backbone trained without position embedding gets a fresh one, as the architecture initialises it: labels may
        depend on where things are. `kwargs`: further arguments of the architecture, such as drop_path_rate.
        """
        torch.manual_seed(seed)
        backbone = build(self.description | {"position": "full", "kwargs": self.description["kwargs"] | kwargs})
        if self.state is None:
            self._begin(backbone, seed)
            return backbone, ""
        fresh = {}
        if self.description["position"] == "none":
            state = backbone.model.state_dict()
            fresh = {name: tensor for name, tensor in state.items() if name.endswith(POSITION_TENSORS)}
        load_exactly(backbone.model, self.state | fresh, self.name)
        note = f"trained without position embedding; finetuned with a fresh one ({', '.join(fresh)})" if fresh else ""
        return backbone, note


def subject_of(ckpt: str, like: str | None = None, weights: str | None = None, raw: bool = False) -> Subject:
    """Subject of --ckpt: a run folder, a weights file, `random` (of the architecture of `like`), `timm:NAME` or, if
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
    backbone, _, description = public.load_backbone(ckpt)
    file = Path(ckpt) / storage.WEIGHTS if Path(ckpt).is_dir() else Path(ckpt)
    run, folder = file.parent.resolve().name, file.parent / "evaluate"
    name = run if file.name == storage.WEIGHTS else file.stem
    if (beside := storage.BESIDE.get(file.name)) is not None:  # what was measured of the newest weights stays
        name, folder = f"{run} {beside}", folder / beside
    return Subject(name, description, backbone.model.state_dict(), folder, file)


def at_size(subject: Subject, size: Any, crop: float | None) -> tuple[Subject, str]:
    """(the subject for images of another size and test crop, what was done to it).

    A learned absolute position embedding is resized, bicubic; sines and cosines are those of the new grid. Raises
    Refusal where the architecture does not take the size.
    """
    about = subject.description
    new = list(height_width(size)) if size is not None else list(about["size"])
    changed = about | {"size": new, "crop": about.get("crop", 0.875) if crop is None else crop}
    if new == list(about["size"]):
        return dataclasses.replace(subject, description=changed), ""
    try:
        backbone = public.build(changed)
    except Refusal as refusal:  # it names the options of pretraining
        reason = str(refusal).partition("; change views.global.size")[0]
        raise Refusal(f"--size {'x'.join(map(str, new))}: {reason}; choose another --size") from None
    changed |= {"grid": list(backbone.grid)}
    if subject.state is None:
        return dataclasses.replace(subject, description=changed), ""
    old = tuple(about.get("grid") or public.build(about).grid)
    state, own = dict(subject.state), backbone.model.state_dict()
    note = f"{about['size'][0]}x{about['size'][1]} px before, {new[0]}x{new[1]} now"
    if "pos_embed" in own and (about["position"] == "none" or about.get("position_embedding") == "sincos"):
        state["pos_embed"] = own["pos_embed"]  # the former is to be replaced by a fresh one, of this shape
    elif resized(state, own, old, backbone.grid):
        (h, w), (new_h, new_w) = old, backbone.grid
        note += f": position embedding resized from {h}x{w} to {new_h}x{new_w} patches"
    return dataclasses.replace(subject, description=changed, state=state), note


@dataclass
class _Recipe:
    """Options of a pretraining recipe that are read here."""

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
    """Description of an untrained backbone, from a checkpoint's own or from a pretraining recipe."""
    path = Path(expanded(word))
    recipe_file = configuration.find_recipe(word, "pretrain")
    if path.suffix == ".safetensors" or (path.is_dir() and not recipe_file.is_file()):
        return public.load_backbone(path)[2]
    path = recipe_file
    recipe: Any = OmegaConf.to_container(configuration.read_yaml(path, _Recipe))
    model = configuration.merge(
        OmegaConf.structured(ModelConfig), recipe.get("model") or {}, f"{path} (model)", ModelConfig
    )
    try:
        view = (recipe.get("views") or {}).get("global", {})
        preset = PRESETS.get(view.get("preset"), {}).get("global", {})
        size = view.get("size", preset.get("size", View().size))
        objectives = {name: options or {} for name, options in (recipe.get("objectives") or {}).items()}
        trained = {name: options for name, options in objectives.items() if options.get("weight", 1.0) > 0}
        positions = {options.get("position", facts_of(name)["position"]) for name, options in trained.items()}
        pools = {facts_of(name)["pools"] for name in trained}
    except (AttributeError, TypeError):
        raise Refusal(f"{path} is no pretraining recipe: expected mappings under views, global, objectives") from None
    # as pretraining has it: evaluated with position encoding if any objective was trained with it, were it in part
    position = "none" if positions == {"none"} else "full"
    backbone = create(configuration.to_object(model, ModelConfig), size)
    pooling = "class" if backbone.num_prefix_tokens and "class" in pools else "mean"
    training = location_of(recipe).options()
    return describe(backbone, position, pooling, training)


def _published(name: str, weights: str | None) -> Subject:
    """Load timm's own weights: from the file `weights`, timm's cache, or the hub."""
    if reason := no_architecture(name):
        raise Refusal(f"--ckpt {TIMM}{name}: {reason}")
    model, notes, file = timm_model(name, weights, f"--ckpt {TIMM}{name}", "--weights ")
    config: dict[str, Any] = model.pretrained_cfg
    crop = config.get("crop_pct") or 0.875
    kwargs, mean, std = swin.form(model) | sp_vit.form(model), list(config["mean"]), list(config["std"])
    options = ModelConfig(name, kwargs, mean=mean, std=std, crop=crop)
    backbone = create(options, list(config["input_size"][1:]))
    state, left_out = without_pooling(model.state_dict(), backbone)
    load_exactly(backbone.model, state, f"timm:{name}")
    description = describe(backbone, "full", "class" if backbone.num_prefix_tokens else "mean", {})
    description |= {"loaded": notes + left_out, "weights_sha256": storage.sha256(file)}
    return Subject(f"timm:{name}", description, state, Path("runs", f"timm-{name}", "evaluate"))


@functools.cache
def facts_of(name: str) -> dict[str, Any]:
    """position, pools, crops, teacher and local of an objective of pretraining, as configs/objectives.yaml says or else
    by default: evaluations know nothing else of objectives."""
    facts = yaml.safe_load((ROOT / "configs" / "objectives.yaml").read_text(encoding="utf-8"))
    return DEFAULTS | facts.get(name, {})
