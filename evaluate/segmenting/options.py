"""The options of a segmentation, and what follows from them."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from common.batches.views import height_width
from common.errors import Refusal
from common.limits import BelowOne, Count, NotNegative, Positive, Probability, Range, Share, flag
from common.limits import check as check_limits
from common.training import schedules
from evaluate.job import recipes
from evaluate.segmenting.masks import ReduceZero

ONE_CYCLE = (25.0, 1e4)  # begins at 1/25 of the peak, ends at 1/10,000 of where it began (arXiv 1708.07120)


@dataclass
class SegmentationConfig(recipes.TrainingOptions):
    """Segmentation."""

    weight_decay: NotNegative = 0.01
    head: Literal["linear", "knn", "upernet"] = "linear"
    """linear (batch norm and a 1x1 convolution on final-norm tokens), knn (votes of patches), or upernet."""
    frozen: bool | None = None
    """Keep the backbone as it is; null: for linear and knn, and not for upernet."""
    blocks: list[int] | None = None
    """Four blocks, from 0, whose tokens upernet sees; null: as the architecture's authors, or a quarter apart."""
    channels: Count | None = None
    """Width of upernet's decoder (LV-ViT-S and -M: 256, -L: 512); null: 256."""
    reduce_zero_label: ReduceZero = "auto"
    """Whether label 0 means that a pixel has no class, and label 1 is the first one: yes, no, or auto: in ADE20K's
    layout without classes.txt, or with as many classes in it as the highest label says, or with 150; refused there if
    the labels leave it open; else not."""
    dropout: BelowOne = 0.1
    """Share of channels that are dropped before the last layer."""
    auxiliary: NotNegative = 0.4
    """Weight of the loss of upernet's auxiliary head."""
    size: Any = None
    """Pixels of training crops and of the test's windows: one number, or [height, width]; null: as in pretraining, of
    the built-in images at most their canvas. The position embedding is resized."""
    short: Count | None = None
    """Pixels of an image's short side before it is scaled, and in the test (ADE20K: 512); null: as it is stored."""
    long: Count | None = None
    """Most pixels of its long side, which goes before (ADE20K: 2048); null: four times `short`."""
    scale: Annotated[list[float], Range(above=0, length=2, rising=True)] = field(default_factory=lambda: [0.5, 2.0])
    """Smallest and largest factor by which training images are scaled."""
    most_of_one: Share = 0.75
    """Largest share of a training crop that one class may have: ten crops are tried; 1 tries one."""
    flip: Probability = 0.5
    """Probability of a mirror image in training."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue of training images as SSD does (arXiv 1512.02325)."""
    steps: Count = 500
    """Optimizer steps."""
    batch: Count = 16
    """Crops per step over all processes; all images there are, if fewer."""
    lr: Positive | None = None
    """Peak learning rate; as it is, whatever the batch. null: 0.01 of a frozen backbone's head, else 0.001."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end (poly, cosine)."""
    schedule: Literal["poly", "cosine", "one-cycle", "constant"] = "poly"
    """poly (by `power`), cosine, one-cycle (cosines up from a 25th and down to nothing), or constant."""
    power: Positive = 1.0
    """Exponent of poly; 1 is a straight line."""
    warmup: Any = 0.05
    """How long the rate rises: a share of the steps, or "1500 steps"."""
    warmup_start: Probability = 1e-6
    """Share of the rate with which a warm-up begins (ADE20K's recipes: 1e-6); one-cycle begins at a 25th."""
    layer_decay: Share | None = None
    """The rate of each block is this times that of the block above it; null: all alike."""
    mode: Literal["slide", "whole"] = "slide"
    """Test by windows of `size` whose logits are averaged where they overlap (slide), or on the whole image at once."""
    stride: Any = None
    """Pixels between windows: one number, or [down, across] (ADE20K: 341); null: two thirds of `size`."""
    multi_scale: bool = False
    """Also test at the `ratios` and mirrored, with probabilities averaged; printed beside."""
    ratios: Annotated[list[float], Range(above=0, length=0)] = field(
        default_factory=lambda: [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    )
    """Scales of the multi-scale test."""
    k: Count = 20
    """Neighbours that vote for a patch."""
    temperature: Positive = 0.07
    """A neighbour's vote weighs exp(similarity / temperature)."""
    bank: Count = 50_000
    """Most training patches that are kept to vote, drawn evenly from the training images."""
    judge_every: Annotated[int, Range(at_least=0)] = 0
    """Steps between looks at the test images, besides the last; 0: only the last."""


OF_VOTES = ("k", "temperature", "bank")
OF_TRAINING = (
    *("blocks", "channels", "dropout", "auxiliary", "scale", "most_of_one", "flip", "photometric", "steps", "batch"),
    *("accumulate", "lr", "min_lr", "schedule", "power", "warmup", "warmup_start", "weight_decay", "betas"),
    *("layer_decay", "clip", "drop_path", "judge_every", "checkpoint_every"),
)


def check(config: SegmentationConfig) -> None:
    """Raises Refusal for a number outside its range, or a word that is none of those known."""
    check_limits(config, flags=True)
    if config.blocks is not None and (len(config.blocks) != 4 or sorted(set(config.blocks)) != config.blocks):
        raise Refusal(f"--blocks {config.blocks}: expected four blocks, shallowest first")
    if config.head == "knn" and config.frozen is False:
        raise Refusal("--head knn trains nothing: leave out --end-to-end")
    for name in ("size", "stride"):
        if getattr(config, name) is not None:
            try:
                height_width(getattr(config, name))
            except Refusal:
                raise Refusal(
                    f"{flag(name)} {getattr(config, name)}: expected a number of pixels above 0, or [height, width]"
                ) from None


def refuse_unused(config: SegmentationConfig, said: Iterable[str]) -> None:
    """Raises Refusal if one of the options that were `said` does nothing with this head."""
    unused = OF_TRAINING if config.head == "knn" else OF_VOTES
    for name in said:
        if name in unused and getattr(config, name) is not None:
            other = "a head that is trained, linear or upernet" if config.head == "knn" else "--head knn"
            raise Refusal(f"{flag(name)} goes with {other}, and --head {config.head} is not: leave it out")


def is_frozen(config: SegmentationConfig) -> bool:
    """Whether the backbone is kept as it is."""
    return config.head != "upernet" if config.frozen is None else config.frozen


def peak_of(config: SegmentationConfig) -> float:
    """The peak learning rate."""
    return config.lr if config.lr is not None else 1e-2 if is_frozen(config) else 1e-3


def fit_batch(config: SegmentationConfig, images: int, processes: int) -> tuple[SegmentationConfig, str]:
    """(the options with a batch that `images` fill and that can be shared, what was changed). Raises Refusal."""
    batch, note = recipes.fit_batch(config.batch, config.accumulate, images, processes)
    return dataclasses.replace(config, batch=batch), note


def refuse_single(config: SegmentationConfig, processes: int) -> None:
    """Raises Refusal if upernet would see a single image at a time."""
    if config.head == "upernet" and processes == 1 and config.batch == config.accumulate:
        raise Refusal(
            "--head upernet pools an image to one value per channel, which batch norm cannot train on: 1 image per "
            f"step and accumulated part was given (--batch {config.batch}, --accumulate {config.accumulate}), and 2 "
            "are needed"
        )


def stride_of(config: SegmentationConfig, window: tuple[int, int]) -> tuple[int, int]:
    """Pixels between windows, down and across: usually two thirds of one. Raises Refusal for more than a window."""
    if config.stride is None:
        return max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3)
    stride = height_width(config.stride)
    if stride[0] > window[0] or stride[1] > window[1]:
        size = "x".join(map(str, window))
        raise Refusal(f"--stride {config.stride} leaves pixels out between windows of {size}: choose that at most")
    return stride


def rate_of(config: SegmentationConfig) -> tuple[Callable[[int], float], str | None]:
    """(learning rate of a 0-based step, what was repaired). Raises Refusal for a warm-up that is no length of time.

    poly is mmsegmentation's: (peak - min_lr) * (1 - step / steps) ** power + min_lr, which a linear warm-up multiplies
    by what grows from `warmup_start` to 1: the decay has begun by the time the warm-up ends. The others fall once they
    are warm.
    """
    steps, peak, floor = config.steps, peak_of(config), config.min_lr
    share, note = schedules.share(config.warmup, steps, steps, "--warmup", most=0.5)
    warm = round(share * steps)

    def rising(step: int) -> float:
        return 1.0 if step >= warm else config.warmup_start + (1 - config.warmup_start) * step / warm

    def rate(step: int) -> float:
        if config.schedule == "poly":
            return ((peak - floor) * (1 - step / steps) ** config.power + floor) * rising(step)
        done = max(0.0, (step - warm) / max(1, steps - warm))
        if config.schedule == "one-cycle":
            low = peak / ONE_CYCLE[0]
            if step < warm:
                return low + (peak - low) * (1 - math.cos(math.pi * step / warm)) / 2
            return low / ONE_CYCLE[1] + (peak - low / ONE_CYCLE[1]) * (1 + math.cos(math.pi * done)) / 2
        fallen = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1.0
        return (floor + (peak - floor) * fallen) * rising(step)

    return rate, note
