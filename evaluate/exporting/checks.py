"""Write each file of an export, read it back as its user would, and compare what it gives on real images."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from common.batches.crops import evaluation
from common.checkpoints import public, storage
from common.checkpoints.storage import HEAD, sha256
from common.data import Images, Unreadable
from common.models import Backbone, Features
from common.models.plan import TokenPlan
from evaluate.exporting import timm_files
from evaluate.exporting.onnx import Pixels, run_onnx, write_onnx
from evaluate.exporting.timm_files import difference, scores
from evaluate.job.subjects import Subject

KINDS = ("timm", "safetensors", "onnx")
FILES = {"timm": timm_files.FILES[0], "safetensors": storage.WEIGHTS, "onnx": "model.onnx"}
BESIDE = {"timm": timm_files.FILES[1:], "safetensors": (storage.DESCRIPTION,), "onnx": ()}
TOLERANCE = 1e-4  # between features, which a final norm has brought to about 1, and logits, of the largest
LEVELS = 0.5  # of 255, between our images and those of timm's transform, on average: Pillow and torch round differently


@dataclass
class Sample:
    """Images on which the files are compared with the backbone."""

    images: Tensor  # uint8 (b, C, h, w), under the evaluation transform
    pictures: Images  # the same and those that cannot be read, whole
    where: str  # name of the data set and number of images


@dataclass
class Source:
    """A backbone to export, with its head and the way timm builds it."""

    subject: Subject
    backbone: Backbone
    head: dict[str, Tensor] | None  # of a finetuned classifier, see public.load_head
    recipe: timm_files.Recipe | None  # how timm builds it, if a file for timm is written

    @property
    def description(self) -> dict[str, Any]:
        """The description of the backbone."""
        return self.subject.description


@dataclass
class Shown:
    """Differences between timm's own transform and ours, on the same pictures."""

    levels: float  # mean difference of a value, of 255, in the image where it is largest
    most: float  # largest difference of a value, of 255
    tokens: float  # largest difference of a feature


@dataclass
class Check:
    """A file that was written, and how far its features are from the backbone's."""

    kind: str
    file: Path
    difference: float
    logits: float | None  # as a share of the largest; None without a head
    digest: str
    shape: tuple[int, ...]  # of its tokens for an image: patches and, from timm, prefix tokens before them
    shown: Shown | None = None  # of timm

    @property
    def words(self) -> str:
        """The differences, in words."""
        logits = "" if self.logits is None else f", of logits {self.logits:.1e}"
        through = self.shown and (
            f", through timm's own transform {self.shown.tokens:.1e} (pixels by up to {self.shown.most:.0f} of 255)"
        )
        return f"largest difference {self.difference:.1e}{logits}{through or ''}"

    @property
    def fault(self) -> str:
        """Reason why the file cannot be used; empty if it can. NaN is a reason too."""
        if not self.difference <= TOLERANCE:
            return f"features differ by more than {TOLERANCE:g}"
        if self.logits is not None and not self.logits <= TOLERANCE:
            return f"logits differ by more than {TOLERANCE:g}"
        if self.shown is not None and not self.shown.levels <= LEVELS:
            return f"timm's own transform shows other images, by {self.shown.levels:.1f} of 255 on average"
        return ""


@torch.no_grad()
def write_and_compare(kind: str, folder: Path, source: Source, sample: Sample) -> Check:
    """Write the file of `kind` into `folder`, read it as its user would, and compare the two on `sample`."""
    file, images, head, description = folder / FILES[kind], sample.images, source.head, source.description
    expected = source.backbone(images, source.subject.plan)
    logits, by_timm = None, None
    if kind == "safetensors":
        again, plan, same = write_checkpoint(file, source)
        features = again(images, plan)
        tokens, prefix = features.tokens, features.prefix
        output = tokens
        logits = scores(again, features, description["pooling"], same) if head is not None else None
    elif kind == "timm":
        assert source.recipe is not None
        source.recipe = timm_files.write(folder, source.recipe, source.backbone, description, head)
        model, config = timm_files.read(folder)
        output = model.forward_features(timm_files.normalised(images, config))
        tokens, prefix = split(output, expected)
        logits = model.forward_head(output) if head is not None else None
        by_timm = compare_transforms(model, config, source, sample)
    else:
        write_onnx(Pixels(source.backbone, source.subject.plan, description.get("pooling"), head), images, file)
        tokens, prefix, logits = run_onnx(file, images, expected, head is not None)
        output = tokens
    pairs = (tokens, expected.tokens), (prefix, expected.prefix)
    if any(a.shape != b.shape for a, b in pairs):
        raise RuntimeError(f"{file.name} gives {tokens.shape}, {prefix.shape}: expected {[b.shape for _, b in pairs]}")
    largest = max((a - b).abs().max().item() for a, b in pairs if b.numel())
    said = scores(source.backbone, expected, description["pooling"], head)
    of_logits = None if logits is None else difference(logits, said)
    return Check(kind, file, largest, of_logits, sha256(file), tuple(output.shape[1:]), by_timm)


def write_checkpoint(file: Path, source: Source) -> tuple[Backbone, TokenPlan, dict[str, Tensor] | None]:
    """Write a checkpoint that poslabel reads, and its head beside it; returns (backbone, plan, head) read from them."""
    description = {name: value for name, value in source.description.items() if name != "weights_sha256"}
    if source.head is not None:
        save_file(source.head, file.parent / HEAD)
        description["training"] = description["training"] | {"head_sha256": sha256(file.parent / HEAD)}
    elif {"finetuned", "head_sha256"} & description.get("training", {}).keys():
        description["training"] = description["training"] | {"head": False}
    public.export(file.parent, source.backbone, description)
    again, plan, description = public.load_backbone(file)
    return again, plan, public.load_head(file, description)


def compare_transforms(model: Any, config: dict[str, Any], source: Source, sample: Sample) -> Shown:
    """Compare timm's own transform of `config` with ours on the same pictures."""
    description, size = source.description, tuple(source.description["size"])
    if tuple(config["input_size"]) != (len(description["mean"]), *size):
        raise RuntimeError(f"timm reads an input size of {config['input_size']} in {timm_files.FILES[1]}")
    std, transform = torch.tensor(description["std"]).view(-1, 1, 1), create_transform(**config, is_training=False)
    levels = most = tokens = 0.0
    for picture in readable(sample.pictures, len(description["mean"])):
        picture = timm_files.shaped(picture, size, description.get("crop", 0.875))
        theirs = transform(to_pil_image(picture))[None]
        ours = evaluation(picture, size, description.get("crop", 0.875))[None]
        away = (theirs - timm_files.normalised(ours, description)).abs() * std * 255
        levels, most = max(levels, away.mean().item()), max(most, away.max().item())
        features = source.backbone(ours, source.subject.plan)
        by_timm, _ = split(model.forward_features(theirs), features)
        tokens = max(tokens, (by_timm - features.tokens).abs().max().item())
    return Shown(levels, most, tokens)


def readable(pictures: Images, channels: int) -> Iterable[Tensor]:
    """Read whole pictures, uint8 (C, h, w), without those that cannot be read."""
    for i in range(len(pictures)):
        with contextlib.suppress(Unreadable):
            yield pictures.read(i, channels)


def split(output: Tensor, like: Features) -> tuple[Tensor, Tensor]:
    """Split tokens or a map from timm's forward_features into (patches (B, N, D), prefix tokens (B, P, D)).

    If `like`, the backbone's features, has no prefix tokens, there are none: CaiT's and XCiT's enter after the patches.
    """
    grid, num_patches = like.grid, like.tokens.shape[1]
    if output.ndim == 4:
        channels_last = tuple(output.shape[1:3]) == tuple(grid)
        output = output.flatten(1, 2) if channels_last else output.flatten(2).mT
    tokens, prefix = output[:, -num_patches:], output[:, :-num_patches]
    return tokens, prefix if like.prefix.shape[1] else like.prefix
