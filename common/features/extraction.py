"""Frozen features: a backbone run once over a data set, so that every probe answers from the same numbers.

Letters: n images, of which K <= n could be read, D width. What is extracted is kept by feature_cache.py.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..batches.crops import evaluation
from ..batches.loading import Loader
from ..batches.unreadable import USUAL, Limit
from ..data import Images, Unreadable
from ..models import Backbone
from ..models.plan import TokenPlan
from ..training.precision import DTYPES

KINDS = ("class", "mean", "both")
RAW = ("pixels", "patches")  # features without a network: each is a row, a --ckpt and its row's only kind
PIXELS = 32  # raw pixels are averaged down to this side: 150,528 numbers an image would fill any memory
FORMAT = 3  # of the cache: another number is extracted anew


@dataclass(frozen=True)
class Eye:
    """How images are looked at: under the evaluation transform, by so many workers."""

    size: tuple[int, int]
    crop: float
    channels: int = 3
    workers: int = 0
    limit: Limit = USUAL  # of unreadable images
    batch_size: int = 256

    @classmethod
    def of(cls, backbone: Backbone, **others: Any) -> "Eye":
        """Eye of a backbone; `others`: workers, limit and batch_size."""
        return cls(backbone.size, backbone.config.crop, backbone.channels, **others)


class _Shown(Dataset):
    """Images as an eye sees them; one that cannot be read is its error message."""

    def __init__(self, images: Images, eye: Eye) -> None:
        self.images, self.eye = images, eye

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[int, Tensor | str]:
        try:
            pixels = self.images.read(i, self.eye.channels, contiguous=False)
            return i, evaluation(pixels, self.eye.size, self.eye.crop)
        except Unreadable as error:
            return i, str(error)


def _batches(
    images: Images, eye: Eye, batches: Sequence[Sequence[int]]
) -> Iterator[tuple[list[Tensor], list[int], list[str]]]:
    """Load each of `batches`: (images, their indices, messages about those that cannot be read).

    Raises Refusal as soon as more than the eye's limit allows of the whole data set cannot be read.
    """
    unreadable: list[str] = []
    loaded = 0
    for items in Loader(_Shown(images, eye), batches, eye.workers):
        messages = [item for _, item in items if isinstance(item, str)]
        unreadable, loaded = unreadable + messages, loaded + len(items)
        refuse_unreadable(unreadable, loaded, images, eye.limit)
        kept = [(item, i) for i, item in items if isinstance(item, Tensor)]
        yield [image for image, _ in kept], [i for _, i in kept], messages


def refuse_unreadable(unreadable: Sequence[str], loaded: int, images: Images, limit: Limit) -> None:
    """Raises Refusal if more of `images` than `limit` allows are among the `unreadable` of those `loaded`."""
    if len(unreadable) > limit.allowed(len(images)):  # not before: those loaded first are no sample
        limit.refuse(len(unreadable), loaded, len(images), images.where, unreadable)


def tell_unreadable(unreadable: Sequence[str], images: Images, warn: Callable[[str], None]) -> None:
    """Count and name to `warn` those of `images` that are left out, if there are any."""
    if unreadable:
        warn(f"{len(unreadable)} of {len(images)} images in {images.where} cannot be read and are left out: "
             f"{'; '.join(unreadable[:3])}{'; ...' if len(unreadable) > 3 else ''}")  # fmt: skip


def shown(images: Images, eye: Eye, warn: Callable[[str], None] = print) -> Iterator[tuple[Tensor, Tensor]]:
    """Show all of `images` in order: (uint8 (b, C, h, w), their indices (b,)).

    Images that cannot be read are left out and, at the end, counted and named to `warn`. Raises Refusal as soon as
    they are more than the eye's limit allows.
    """
    unreadable: list[str] = []
    for kept, index, messages in _batches(images, eye, _cut(range(len(images)), eye.batch_size)):
        unreadable += messages
        if kept:
            yield torch.stack(kept), torch.tensor(index)
    tell_unreadable(unreadable, images, warn)


def _cut(rows: range, most: int) -> list[range]:
    return [rows[at : at + most] for at in range(0, len(rows), most)]


@dataclass
class Part:
    """Features of some of the images, as `extract` returns them."""

    rows: range  # which images were to be read
    features: dict[str, Tensor]
    unreadable: list[str]  # messages


FeaturesOf = Callable[[Tensor], dict[str, Tensor]]  # uint8 (b, C, h, w) -> {kind: (b, ...)} on the CPU


def extract_parts(
    images: Images,
    eye: Eye,
    features_of: FeaturesOf,
    parts: Sequence[range],
    seen: Callable[[int], None] = lambda images: None,
) -> Iterator[Part]:
    """Extract features of one part of the images after another; `seen` is called with the size of each batch.

    No batch spans two parts, so that a part is the same numbers whichever other parts are asked for.
    """
    loader = _batches(images, eye, [batch for part in parts for batch in _cut(part, eye.batch_size)])
    for rows in parts:
        features: dict[str, list[Tensor]] = {"index": [torch.empty(0, dtype=torch.int64)]}
        unreadable = []
        for batch in _cut(rows, eye.batch_size):
            kept, index, messages = next(loader)
            unreadable += messages
            if kept:
                for name, tensor in features_of(torch.stack(kept)).items():
                    features.setdefault(name, []).append(tensor)
                features["index"].append(torch.tensor(index))
            seen(len(batch))
        yield Part(rows, {name: torch.cat(tensors) for name, tensors in features.items()}, unreadable)


def whole(images: Images, eye: Eye, features_of: FeaturesOf, warn: Callable[[str], None] = print) -> dict[str, Tensor]:
    """Extract {kind: features (K, ...), "index": (K,)} of all of `images`, of which K can be read.

    Rows are in image order; `index` says which image each row is, 0 ... n-1 unless some could not be read (`warn` is
    told which). Raises Refusal if more of `images` cannot be read than the eye's limit allows.
    """
    (part,) = extract_parts(images, eye, features_of, [range(len(images))])
    tell_unreadable(part.unreadable, images, warn)
    return part.features


def network(
    backbone: Backbone,
    plan: TokenPlan | None,
    *,
    blocks: int = 1,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    readout: Callable[[Backbone, TokenPlan | None, Tensor], dict[str, Tensor]] | None = None,
) -> FeaturesOf:
    """Features by a backbone: {"mean": mean patch token (b, D), "class": class token (b, D)}: final norm, float32, CPU.

    Without prefix tokens (Swin, NesT, mean-pooled ViTs) there is no "class". `blocks=4` adds "mean4" and "class4",
    (b, 4 D): those of the last four blocks side by side (of a hierarchical model: stages; of fewer where there are
    fewer), shallowest first, the final norm applied to each as `Backbone.layers` does; no "class4" where one of the
    blocks has no class token. `readout`: what is read off the backbone in place of that. `backbone` is on `device`; it
    is run in eval mode and left in the mode it was in.
    """
    dtype, kind = DTYPES[precision], torch.device(device).type

    @torch.no_grad()
    def features_of(batch: Tensor) -> dict[str, Tensor]:
        was_training = backbone.training
        backbone.eval()
        try:
            with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
                pixels = batch.to(device)
                features = readout(backbone, plan, pixels) if readout else pooled_blocks(backbone, plan, pixels, blocks)
        finally:
            backbone.train(was_training)
        return {name: tensor.cpu() for name, tensor in features.items()}

    return features_of


def extract(
    backbone: Backbone,
    plan: TokenPlan | None,
    images: Images,
    *,
    blocks: int = 1,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    warn: Callable[[str], None] = print,
    **eye: Any,
) -> dict[str, Tensor]:
    """Extract features of all of `images` by a `network`; `eye`: its workers, limit and batch_size."""
    features_of = network(backbone, plan, blocks=blocks, device=device, precision=precision)
    return whole(images, Eye.of(backbone, **eye), features_of, warn)


def raw_pixels(batch: Tensor) -> dict[str, Tensor]:
    """Raw pixels as features: {"pixels": in [0, 1] (b, C * h * w)}.

    A side longer than 32 is averaged down to 32: what is compared is what images look like from afar.
    """
    size = batch.shape[-2:]
    small = (min(size[0], PIXELS), min(size[1], PIXELS))
    pixels = batch.float().div_(255)
    return {"pixels": (pixels if small == size else F.adaptive_avg_pool2d(pixels, small)).flatten(1)}


def pooled_blocks(backbone: Backbone, plan: TokenPlan | None, images: Tensor, blocks: int) -> dict[str, Tensor]:
    """The features of a `network` on the device of the images, float32: {"mean": (B, D), "mean4": (B, 4 D), ...}."""
    layers = [layer.float() for layer in backbone.layers(images, min(blocks, depth(backbone)), plan)]
    features: dict[str, Tensor] = {}
    for suffix, several in [("", layers[-1:])] + ([(str(blocks), layers)] if blocks > 1 else []):
        kinds = ("mean", "class") if all(layer.prefix.shape[1] for layer in several) else ("mean",)
        features |= {f"{kind}{suffix}": torch.cat([layer.pooled(kind) for layer in several], 1) for kind in kinds}
    return features


def depth(backbone: Backbone) -> int:
    """Number of blocks; of a hierarchical model: of stages."""
    model = backbone.model
    return len(model.blocks if hasattr(model, "blocks") else model.feature_info)


def pooled(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The kinds of features that probes report: class, mean and both side by side (K, 2 D), as far as there are any.

    A class token that no loss has trained is noise to a probe: report all three, always.
    """
    kinds = {kind: features[kind] for kind in ("class", "mean", *RAW) if kind in features}
    if "class" in kinds and "mean" in kinds:
        kinds["both"] = torch.cat([kinds["class"], kinds["mean"]], 1)
    return kinds


# ------------------------------------------------------------------------------------------- what decides about them


def digest(state: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of weights as they are in memory: random ones have no file."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode())
        total.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def cache_key(
    backbone: Backbone, plan: TokenPlan, images: Images, precision: str, device: torch.device | str, blocks: int = 1
) -> dict[str, Any]:
    """Settings that determine the features by a `network`."""
    config = backbone.config
    return {
        "weights": digest(backbone.model.state_dict()),
        "model": [config.name, dict(config.kwargs), list(config.mean), list(config.std), config.attention],
        "position": plan.position,
        "precision": [precision, torch.device(device).type],
        "blocks": blocks,
        "timm": timm.__version__,
    } | shown_key(images, Eye.of(backbone))


def pixel_key(images: Images, eye: Eye) -> dict[str, Any]:
    """Settings that determine raw pixels."""
    return {"pixels": PIXELS} | shown_key(images, eye)


def shown_key(images: Images, eye: Eye) -> dict[str, Any]:
    """Settings that determine the images shown, as part of a cache's key."""
    transform = ["evaluation", list(eye.size), eye.crop, eye.channels]
    return {"format": FORMAT, "data": images.fingerprint(), "transform": transform}
