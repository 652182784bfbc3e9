"""The options of a finetuning, and what follows from them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from common.batches.views import height_width
from common.caching.pixels import check_option
from common.limits import BelowOne, Count, NotNegative, Positive, Probability, Share
from common.limits import check as check_limits
from common.paths import expanded, path_option
from common.training import ema, schedules
from evaluate.job import recipes


@dataclass
class FinetuneConfig(recipes.TrainingOptions):
    """Finetuning."""

    drop_path: BelowOne = 0.1
    size: Any = None
    """Pixels of training and test images: one number, or [height, width]; null: as in pretraining. The position
    embedding is resized."""
    crop: Share | None = None
    """Share of the short side that test images show; null: as the backbone says. Above 224 pixels 1.0 is usual."""
    pool: Literal["mean", "class", "both"] | None = None
    """Tokens that the head sees: mean, class or both; null: as the backbone was trained."""
    epochs: Positive = 10.0
    """Passes over the training images."""
    steps: Count | None = None
    """Optimizer steps; goes before epochs."""
    batch: Count = 256
    """Images per step over all processes; all there are, if fewer."""
    lr: Positive = 1e-3
    """Peak learning rate for 256 images; the rate used grows with the batch."""
    min_lr: NotNegative = 1e-6
    """Learning rate at the end, for 256 images."""
    warmup: Any = 0.1
    """How long the rate rises: a share of the steps, "5 epochs" or "500 steps"."""
    layer_decay: Share = 0.75
    """The rate of each block is this times that of the block above it; 1 from scratch, whatever is said here."""
    smoothing: BelowOne = 0.1
    """This much of each label is spread evenly over all classes."""
    mixup: NotNegative = 0.0
    """Alpha of mixup (MAE: 0.8); 0 is off."""
    cutmix: NotNegative = 0.0
    """Alpha of CutMix (MAE: 1.0); 0 is off. With both on, one is drawn for each step."""
    mix: Probability = 1.0
    """Probability that a step's images are mixed at all."""
    switch: Probability = 0.5
    """Probability of CutMix where both are on."""
    mix_by: Literal["batch", "pair", "element"] = "batch"
    """Who shares a draw: all images of a step (batch), two partners (pair), or nobody (element)."""
    rand_augment: str | None = None
    """RandAugment in timm's notation (MAE: rand-m9-mstd0.5-inc1), or another of its policies (original, 3a); null is
    off."""
    erasing: Probability = 0.0
    """Probability that a box of the crop becomes noise (MAE: 0.25)."""
    repeats: Count = 1
    """Crops of each image among neighbouring steps: repeated augmentation (DeiT: 3), with so many times fewer images in
    an epoch."""
    scale: Share = 0.35
    """Smallest share of an image that a training crop shows."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability of a change of colours; published recipes with RandAugment have none."""
    ema: BelowOne | None = None
    """Momentum of a moving average of the weights, which is judged beside the weights (DeiT: 0.99996); null: none."""
    judge_every: NotNegative = 1.0
    """Epochs between looks at the test images, besides the last; 0: only the last."""
    cache: Any = None
    """Decode each training image once and keep it on disk: 256 (or another number) scales its shorter side to at most
    so many pixels, full keeps it as it is; null: decoded whenever it is needed. Test images are not cached."""
    cache_root: str | None = field(default=None, metadata=path_option(expanded))
    """Folder of such caches; null: poslabel/decoded in the user's cache folder."""


def check(config: FinetuneConfig) -> None:
    """Raises Refusal for a number outside its range, or a word that is none of those known."""
    check_limits(config, flags=True)
    check_option(config.cache, "--cache ")
    if config.size is not None:
        height_width(config.size)


def fit_batch(config: FinetuneConfig, images: int, processes: int) -> tuple[FinetuneConfig, str]:
    """(the options with a batch that `images` fill and that can be shared, what was changed). Raises Refusal."""
    mixed = config.mixup > 0 or config.cutmix > 0
    batch, note = recipes.fit_batch(config.batch, config.accumulate, images, processes, of_each=2 if mixed else 1)
    return dataclasses.replace(config, batch=batch), note


def num_steps(config: FinetuneConfig, images: int) -> int:
    """Optimizer steps of one training."""
    return config.steps or max(1, round(config.epochs * (images // config.batch)))


def rate_of(config: FinetuneConfig, steps: int, per_epoch: int) -> tuple[Callable[[int], float], str | None]:
    """(learning rate of a 0-based step: scaled with the batch, warmed up, then a cosine; what was repaired). Raises
    Refusal for a warm-up that is no length of time."""
    share, note = schedules.share(config.warmup, steps, per_epoch, "--warmup", most=0.5)
    scale, warmup = config.batch / 256, round(share * steps)
    peak, floor = config.lr * scale, config.min_lr * scale
    return lambda step: schedules.rate(step, steps, warmup, peak, floor), note


def unwise(config: FinetuneConfig, images: int) -> list[str]:
    """What was repaired, and what looks unwise, in a training on so many images: a line each. Raises Refusal."""
    steps = num_steps(config, images)
    _, note = rate_of(config, steps, images // config.batch)
    notes = [note] if note else []
    half = ema.half_life(config.ema, 1) if config.ema is not None else 0.0
    if half > 0.25 * steps:
        notes.append(
            f"ema={config.ema:g} halves what a step has left in the average in {half:,.0f} steps, and there are "
            f"{steps:,}: it remembers its beginning"
        )
    return notes
