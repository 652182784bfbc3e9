"""The options of a finetuning, and what follows from them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.batches.transforms import height_width
from common.config import run_or_recipe
from common.errors import Refusal, nearest
from common.paths import path_option
from common.training import ema, schedules
from evaluate.job import recipes

POOLINGS = ("mean", "class", "both")


@dataclass
class FinetuneConfig:
    """Finetuning. A recipe file of configs/evaluate, flags, and key=value words all set these."""

    like: str | None = field(default=None, metadata=path_option(run_or_recipe))
    """Architecture of --ckpt random where --like says nothing: a run, or a pretraining recipe."""
    size: Any = None
    """Pixels of training and test images: one number, or [height, width]; null: as in pretraining. The position
    embedding is resized."""
    crop: float | None = None
    """Share of the short side that test images show; null: as the backbone says. Above 224 pixels 1.0 is usual."""
    pool: str | None = None
    """Tokens that the head sees: mean, class or both; null: as the backbone was trained."""
    epochs: float = 10.0
    """Passes over the training images."""
    steps: int | None = None
    """Optimizer steps; goes before epochs."""
    batch: int = 256
    """Images per step over all processes; all there are, if fewer."""
    accumulate: int = 1
    """Parts a step is computed in, one after the other, to save memory."""
    lr: float = 1e-3
    """Peak learning rate for 256 images; the rate used grows with the batch."""
    min_lr: float = 1e-6
    """Learning rate at the end, for 256 images."""
    warmup: Any = 0.1
    """How long the rate rises: a share of the steps, "5 epochs" or "500 steps"."""
    weight_decay: float = 0.05
    """Of matrices; biases, norms, position embeddings and tokens have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the two moments."""
    layer_decay: float = 0.75
    """The rate of each block is this times that of the block above it; 1 from scratch, whatever is said here."""
    clip: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    drop_path: float = 0.1
    """Share of the images that skip the last block; it grows linearly from 0 in the first."""
    smoothing: float = 0.1
    """This much of each label is spread evenly over all classes."""
    mixup: float = 0.0
    """Alpha of mixup (MAE: 0.8); 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix (MAE: 1.0); 0 is off. With both on, one is drawn for each step."""
    mix: float = 1.0
    """Probability that a step's images are mixed at all."""
    switch: float = 0.5
    """Probability of CutMix where both are on."""
    rand_augment: str | None = None
    """RandAugment in timm's notation (MAE: rand-m9-mstd0.5-inc1); null is off."""
    erasing: float = 0.0
    """Probability that a box of the crop becomes noise (MAE: 0.25)."""
    repeats: int = 1
    """Crops of each image among neighbouring steps: repeated augmentation (DeiT: 3), with so many times fewer images in
    an epoch."""
    scale: float = 0.35
    """Smallest share of an image that a training crop shows."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of a change of colours; published recipes with RandAugment have none."""
    ema: float | None = None
    """Momentum of a moving average of the weights, which is judged beside the weights (DeiT: 0.99996); null: none."""
    judge_every: float = 1.0
    """Epochs between looks at the test images, besides the last; 0: only the last."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; null leaves it to checkpoint_minutes."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints; 0 leaves it to checkpoint_every."""
    keep: int = 2
    """So many last checkpoints are kept until the training is done."""
    tensorboard: bool = True
    """Write TensorBoard's event files."""
    max_bad: str | None = None
    """Unreadable images that are borne, see --max-bad; null: as the run."""


ABOVE = ["epochs", "steps", "batch", "accumulate", "lr", "layer_decay", "scale", "repeats", "crop", "log_every"]
ABOVE += ["checkpoint_every", "keep"]  # 0 is too little
LEAST = ("min_lr", "weight_decay", "mixup", "cutmix", "clip", "judge_every", "checkpoint_minutes")
MOST = dict.fromkeys(("layer_decay", "mix", "switch", "erasing", "scale", "flip", "jitter", "crop"), 1.0)
MOST |= dict.fromkeys(("drop_path", "smoothing"), 0.99) | {"ema": 1 - 1e-9}


def check(config: FinetuneConfig) -> None:
    """Raises Refusal for a number outside its range, or a word that is none of those known."""
    recipes.refuse_range(config, ABOVE, LEAST, MOST)
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise Refusal(f"--betas {config.betas}: expected two numbers in [0, 1)")
    if config.pool is not None and config.pool not in POOLINGS:
        raise Refusal(f"--pool {config.pool}: expected {', '.join(POOLINGS)}{nearest(config.pool, POOLINGS)}")
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
