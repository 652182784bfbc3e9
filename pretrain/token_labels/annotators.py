"""Annotators: classifiers that say of every cell of their last feature map what it shows.

A cell is classified by the model's own head, as an image of that one cell would be: for a linear classifier after
average pooling that is the classifier as a 1x1 convolution on the map (Re-labelling ImageNet, arXiv 2101.05022; Token
Labeling, arXiv 2104.10858). Of a vision transformer patch tokens are classified, by the layer that was trained on
them if it has one (`aux_head`, or that of a run with token labels).

Letters: B images, C classes, h x w cells, P prefix tokens, D width.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from common.checkpoints.pretrained import TIMM, fetched
from common.checkpoints.public import load_backbone, load_head
from common.checkpoints.published import differences, filter_of
from common.checkpoints.storage import sha256
from common.errors import Refusal
from common.features.classes import DENSE
from common.models import Backbone
from common.models.create import no_architecture
from common.models.plan import TokenPlan
from pretrain.token_labels.packed import MOST_CLASSES

MODES = ("bicubic", "bilinear")  # of resizing, as timm's descriptions name them


@dataclass
class Annotator:
    """A classifier of cells, on a device and in eval mode."""

    name: str
    dense: Callable[[Tensor], Tensor]  # uint8 (B, channels, height, width) -> float32 (B, C, h, w)
    modules: list[nn.Module]
    classes: int
    class_names: list[str] | None
    grid: tuple[int, int]  # (h, w)
    size: tuple[int, int]  # (height, width) in pixels
    channels: int
    interpolation: str
    weights_sha256: str

    def to(self, device: torch.device) -> "Annotator":
        """Move it to a device; returns itself."""
        for module in self.modules:
            module.to(device)
        return self


def open_annotator(name: str, weights: str | None, size: tuple[int, int] | None) -> Annotator:
    """Open `timm:NAME`, with its published weights or those of a local file, or a finetuned run of ours, for images of
    `size` (None: as it was trained). Raises Refusal for what is no classifier, or has no dense head."""
    if name.startswith(TIMM):
        annotator = _of_timm(name, weights, size)
    elif weights is not None:
        raise Refusal(f"--weights {weights} goes with --annotator timm:NAME, and --annotator is {name}")
    else:
        annotator = _of_run(name, size)
    if not 1 < annotator.classes <= MOST_CLASSES:
        raise Refusal(f"--annotator {name} has {annotator.classes:,} classes: expected 2 to {MOST_CLASSES:,}")
    return annotator


# ---------------------------------------------------------------------------------------------------- runs of ours


def _of_run(name: str, size: tuple[int, int] | None) -> Annotator:
    try:
        backbone, plan, description = load_backbone(name)
        head = load_head(name, description)
    except Refusal as refusal:
        raise Refusal(f"--annotator {name}: {refusal}") from None
    if head is None:
        raise Refusal(
            f"--annotator {name} has no classifier: expected timm:NAME, or a run that was trained with labels "
            "(evaluate/finetune.py)"
        )
    size = size or (backbone.size[0], backbone.size[1])
    if reason := backbone.why_not(size):
        raise Refusal(f"--annotator {name} cannot look at images of {size[0]}x{size[1]} pixels: {reason}")
    weight, bias = (head[name] for name in (DENSE if DENSE[0] in head else ("weight", "bias")))
    if weight.shape[1] > backbone.width:  # of a token beside itself
        weight = weight[:, : backbone.width] + weight[:, backbone.width :]
    linear = nn.Linear(*weight.shape[::-1])
    linear.load_state_dict({"weight": weight, "bias": bias})
    dense = _dense_of_run(backbone, plan, linear)
    with torch.no_grad():
        grid = dense(torch.zeros(1, backbone.channels, *size, dtype=torch.uint8)).shape[2:]
    training = description.get("training", {})
    return Annotator(
        name, dense, [backbone, linear], len(weight), training.get("label_names"), (grid[0], grid[1]), size,
        backbone.channels, MODES[0], description["weights_sha256"],
    )  # fmt: skip


def _dense_of_run(backbone: Backbone, plan: TokenPlan, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def dense(images: Tensor) -> Tensor:
        features = backbone(images, plan)
        return linear(features.tokens).float().transpose(1, 2).unflatten(2, features.grid)

    return dense


# ---------------------------------------------------------------------------------------------------- timm's models


def _of_timm(asked: str, weights: str | None, size: tuple[int, int] | None) -> Annotator:
    name = asked.removeprefix(TIMM)
    if reason := no_architecture(name):
        raise Refusal(f"--annotator {asked}: {reason}")
    file = fetched(name, f"--annotator {asked}", "--weights ") if weights is None else Path(weights)
    if not file.is_file():
        raise Refusal(f"--weights {file}: no such file; expected weights of {name} with its classifier")
    model = _loaded(name, file, size, asked).eval().requires_grad_(False)
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    mean, std = (torch.tensor(config[which]).view(-1, 1, 1) for which in ("mean", "std"))
    norm = _Normalise(mean, std)
    size = size or (config["input_size"][1], config["input_size"][2])
    try:
        with torch.no_grad(), _only_cells(model, asked):
            logits = dense_logits(model, norm(torch.zeros(1, len(mean), *size, dtype=torch.uint8)))
    except Refusal:
        raise
    except Exception as error:  # timm asserts and raises in many ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Refusal(
            f"--annotator {asked} has no dense head at {size[0]}x{size[1]}: {reason}; choose another --size, a "
            "convolutional network, or a vision transformer that classifies"
        ) from error
    mode = config.get("interpolation")
    return Annotator(
        asked, lambda images: dense_logits(model, norm(images)), [model, norm], logits.shape[1], None,
        (logits.shape[2], logits.shape[3]), size, len(mean), mode if mode in MODES else MODES[0], sha256(file),
    )  # fmt: skip


class _Normalise(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


def _loaded(name: str, file: Path, size: tuple[int, int] | None, asked: str) -> nn.Module:
    """The model `name` with all weights of a file, its classifier among them. Raises Refusal."""
    try:
        raw = load_state_dict(str(file), weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise Refusal(f"--annotator {asked}: {file} cannot be read as weights: {reason}") from None
    first = _built(name, size, asked)
    names = first.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    for classifier in (names,) if isinstance(names, str) else names:
        given = raw.get(f"{classifier}.weight")
        if given is None:
            raise Refusal(
                f"--annotator {asked}: {file} has no classifier ({classifier}.weight): expected the weights of {name} "
                "as they are published, with the classifier"
            )
    classes = {len(raw[f"{each}.weight"]) for each in ((names,) if isinstance(names, str) else names)}
    model = first if classes in (set(), {first.num_classes}) else _built(name, size, asked, num_classes=max(classes))
    try:
        state = filter_of(model)(dict(raw))
    except Exception as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise Refusal(f"--annotator {asked}: {file} holds the weights of another model: {reason}") from None
    if problems := differences(state, model.state_dict()):
        raise Refusal(f"--annotator {asked}: {file} holds the weights of another model: {problems}")
    model.load_state_dict(state)
    return model


def _built(name: str, size: tuple[int, int] | None, asked: str, **kwargs: Any) -> nn.Module:
    """The model, for images of `size` where its constructor wants to know."""
    if size is not None:
        kwargs["img_size"] = size
    try:
        try:
            return timm.create_model(name, pretrained=False, **kwargs)
        except TypeError:  # convolutional networks take any size, and no such argument
            kwargs.pop("img_size", None)
            return timm.create_model(name, pretrained=False, **kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Refusal(f"--annotator {asked}: timm cannot build it: {reason}") from None


def dense_logits(model: Any, images: Tensor) -> Tensor:
    """Logits of every cell, float32 (B, C, h, w), of one of timm's classifiers for normalised images. Raises ValueError
    for a model without a map of features."""
    features = model.forward_features(images)
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise ValueError("it gives no map of features")
    if features.ndim == 3:
        prefix = _prefix(model)
        tokens = features[:, prefix:]
        grid = _grid_of(model, images, tokens.shape[1])
        aux_head = getattr(model, "aux_head", None)
        if isinstance(aux_head, nn.Linear):
            logits = aux_head(tokens)
        else:  # as many of it as a head expects in front of a patch: it may read the class token, or the patches
            cells = tokens.flatten(0, 1)[:, None].expand(-1, prefix + 1, -1)
            logits = model.forward_head(cells).unflatten(0, tokens.shape[:2])
        return logits.float().transpose(1, 2).unflatten(2, grid)
    last = features.shape[-1] == model.num_features and getattr(model, "output_fmt", "NCHW") == "NHWC"
    cells = features if last else features.permute(0, 2, 3, 1)
    flat = cells.flatten(0, 2)
    logits = model.forward_head(flat[:, None, None] if last else flat[:, :, None, None])
    if logits.ndim != 2 or len(logits) != len(flat):
        raise ValueError(f"its head gives {tuple(logits.shape)} for {len(flat)} cells")
    return logits.float().unflatten(0, cells.shape[:3]).permute(0, 3, 1, 2)


def _prefix(model: Any) -> int:
    """Tokens before the patches."""
    told = getattr(model, "num_prefix_tokens", None)
    return int(getattr(model, "cls_token", None) is not None) if told is None else int(told)


def _grid_of(model: Any, images: Tensor, count: int) -> tuple[int, int]:
    """Grid (h, w) of `count` patch tokens: as the images are shaped. Raises ValueError if they form none."""
    H, W = images.shape[-2:]
    h = round((count * H / W) ** 0.5)
    if count < 2 or h < 1 or count % h or abs(h * W - count // h * H) > max(H, W):
        raise ValueError(f"{count} tokens form no grid on images of {H}x{W}")
    return h, count // h


@contextlib.contextmanager
def _only_cells(model: Any, asked: str) -> Iterator[None]:
    """Raises Refusal, inside, if the head looks at several cells at once."""

    def look(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
            h, w = module.kernel_size
            raise Refusal(
                f"--annotator {asked} has no dense head: its classifier looks at {h}x{w} cells at once; choose a "
                "network that pools before it classifies"
            )

    hooks: list[Any] = []
    head = model.forward_head

    def watched(*arguments: Any, **options: Any) -> Tensor:
        hooks.extend(module.register_forward_pre_hook(look) for module in model.modules())
        return head(*arguments, **options)

    if model.num_classes < 1 or not inspect.ismethod(head):
        raise Refusal(f"--annotator {asked} has no classifier, and so no dense head; choose one that classifies")
    model.forward_head = watched
    try:
        yield
    finally:
        del model.forward_head
        for hook in hooks:
            hook.remove()
