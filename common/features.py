"""Frozen features: a backbone run once over a data set, so that every probe answers from the same numbers.

Letters: n images, of which K <= n could be read, D width.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from .checkpoint import write_atomically
from .data import Images, Unreadable
from .errors import Refusal
from .launch import ignore_signals
from .models import Backbone
from .plan import TokenPlan
from .precision import DTYPES
from .transforms import evaluation

KINDS = ("class", "mean", "both")
MOST_UNREADABLE = 0.01  # of the images; more is an error of the data set, not of a file
PIXELS = 32  # raw pixels are averaged down to this side: 150,528 numbers an image would fill any memory
FORMAT = 1  # of the cache: another number is extracted anew


class _Shown(Dataset):
    """Images under the evaluation transform; one that cannot be read is its error message."""

    def __init__(self, images: Images, size: tuple[int, int], crop: float, channels: int) -> None:
        self.images, self.size, self.crop, self.channels = images, size, crop, channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor | str:
        try:
            return evaluation(self.images.read(i, self.channels, contiguous=False), self.size, self.crop)
        except Unreadable as error:
            return str(error)


def _as_is(items: list[Tensor | str]) -> list[Tensor | str]:
    return items


def shown(
    images: Images,
    size: tuple[int, int],
    crop: float,
    channels: int,
    *,
    batch_size: int = 256,
    workers: int = 0,
    warn: Callable[[str], None] = print,
    tolerated: float = MOST_UNREADABLE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(uint8 (b, C, h, w), their indices (b,)) over all of `images` in order, under the evaluation transform.

    Images that cannot be read are left out and, at the end, counted and named to `warn`. Raises Refusal as soon as
    they are more than the `tolerated` share.
    """
    unreadable: list[str] = []
    start = 0
    for items in DataLoader(
        _Shown(images, size, crop, channels),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else a monitor would move the run's own random numbers
    ):
        unreadable += [item for item in items if isinstance(item, str)]
        if len(unreadable) > tolerated * len(images):
            raise Refusal(
                f"{len(unreadable)} of the first {start + len(items)} images in {images.where} cannot be read, more "
                f"than {tolerated:.0%} of its {len(images)}: {'; '.join(unreadable[:3])}; repair or remove them"
            )
        kept = [(image, start + at) for at, image in enumerate(items) if isinstance(image, Tensor)]
        start += len(items)
        if kept:
            yield torch.stack([image for image, _ in kept]), torch.tensor([index for _, index in kept])
    if unreadable:
        warn(f"{len(unreadable)} of {len(images)} images in {images.where} cannot be read and are left out: "
             f"{'; '.join(unreadable[:3])}{'; ...' if len(unreadable) > 3 else ''}")  # fmt: skip


@torch.no_grad()
def extract(
    backbone: Backbone,
    plan: TokenPlan | None,
    images: Images,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    warn: Callable[[str], None] = print,
    tolerated: float = MOST_UNREADABLE,
) -> dict[str, Tensor]:
    """{"mean": mean patch token (K, D), "class": class token (K, D), "index": (K,)}: final norm, float32, on the CPU.

    Rows are in image order; `index` says which image each row is, 0 ... n-1 unless some could not be read (`warn` is
    told which). Without prefix tokens (Swin, NesT, mean-pooled ViTs) there is no "class". `backbone` is on `device`;
    it is run in eval mode and left in the mode it was in.
    """
    dtype, kind = DTYPES[precision], torch.device(device).type
    was_training = backbone.training
    backbone.eval()
    parts: dict[str, list[Tensor]] = {"mean": [], "class": [], "index": []}
    try:
        for batch, index in shown(
            images,
            backbone.size,
            backbone.config.crop,
            backbone.channels,
            batch_size=batch_size,
            workers=workers,
            warn=warn,
            tolerated=tolerated,
        ):
            with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
                features = backbone(batch.to(device), plan)
            parts["mean"].append(features.tokens.float().mean(1).cpu())
            if features.prefix.shape[1]:
                parts["class"].append(features.prefix[:, 0].float().cpu())
            parts["index"].append(index)
    finally:
        backbone.train(was_training)
    return {name: torch.cat(part) for name, part in parts.items() if part}


def pixels(
    images: Images,
    size: tuple[int, int],
    crop: float,
    *,
    channels: int = 3,
    workers: int = 0,
    warn: Callable[[str], None] = print,
) -> dict[str, Tensor]:
    """{"pixels": raw pixels in [0, 1] (K, C * h * w), "index": (K,)} under the same evaluation transform.

    A side longer than 32 is averaged down to 32: what is compared is what images look like from afar.
    """
    small = (min(size[0], PIXELS), min(size[1], PIXELS))
    rows, kept = [], []
    for batch, index in shown(images, size, crop, channels, workers=workers, warn=warn):
        pixels = batch.float().div_(255)
        rows.append((pixels if small == size else F.adaptive_avg_pool2d(pixels, small)).flatten(1))
        kept.append(index)
    return {"pixels": torch.cat(rows), "index": torch.cat(kept)}


def pooled(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The kinds of features that probes report: class, mean and both side by side (K, 2 D), as far as there are any.

    A class token that no loss has trained is noise to a probe: report all three, always.
    """
    kinds = {kind: features[kind] for kind in ("class", "mean", "pixels") if kind in features}
    if "class" in kinds and "mean" in kinds:
        kinds["both"] = torch.cat([kinds["class"], kinds["mean"]], 1)
    return kinds


# ------------------------------------------------------------------------------------------------------- the cache


def digest(state: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of weights as they are in memory: random ones have no file."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode())
        total.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def cache_key(
    backbone: Backbone, plan: TokenPlan, images: Images, precision: str, device: torch.device | str
) -> dict[str, Any]:
    """All that decides what `extract` returns."""
    config = backbone.config
    return {
        "format": FORMAT,
        "weights": digest(backbone.model.state_dict()),
        "model": [config.name, dict(config.kwargs), list(config.mean), list(config.std), config.attention],
        "position": plan.position,
        "data": images.fingerprint(),
        "transform": ["evaluation", list(backbone.size), config.crop, backbone.channels],
        "precision": [precision, torch.device(device).type],
        "timm": timm.__version__,
    }


def cached(
    folder: Path | None,
    key: Mapping[str, Any],
    compute: Callable[[], dict[str, Tensor]],
    say: Callable[[str], None] = print,
) -> dict[str, Tensor]:
    """What `compute()` returned when it was last called for `key`, from `folder`/<hash of key>.safetensors.

    A file that is truncated, or whose own record of its key differs, is said to be so and computed anew. None as
    `folder` keeps nothing.
    """
    if folder is None:
        return compute()
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"
    if path.exists():
        try:
            return _read(path, text)
        except (SafetensorError, OSError, ValueError) as error:
            say(f"cached features {path} are not used ({error}): extracting them again")
    features = compute()
    folder.mkdir(parents=True, exist_ok=True)
    contents = {name: tensor.contiguous() for name, tensor in features.items()}
    write_atomically(path, lambda aside: save_file(contents, aside, metadata={"key": text, "digest": digest(contents)}))
    return features


def _read(path: Path, key: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:  # a file shorter than its header says is an error here
        metadata = file.metadata() or {}
        if metadata.get("key") != key:
            raise ValueError("made from other weights, data or settings")
        features = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    if metadata.get("digest") != digest(features):
        raise ValueError("its checksum is wrong")
    return features
