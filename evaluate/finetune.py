"""Finetuning with labels: the whole backbone and a linear head, AdamW with layer decay, beside training from scratch.

    accelerate launch evaluate/finetune.py --ckpt runs/quickstart-001 --epochs 10
    accelerate launch evaluate/finetune.py --ckpt random --like configs/pretrain/quickstart.yaml --epochs 30

The last step's model is judged, never the best one. Writes RUN/evaluate/finetune.json. One process or many (DDP).
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/finetune.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.launch import StopSignal, entry  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from common import processes
from common.data import Images
from common.errors import Refusal
from common.features import shown
from common.loop import fit
from common.models import Backbone
from common.optim import parameter_groups
from common.probe import probe
from common.protocol import LABELS, Evaluation, begin, chosen_device, first_process, parser
from common.report import accuracies, interval, kind_name, ordered, percent, table, tell, write
from common.sampling import Batch, Samples, StepSampler, loader
from common.schedules import rate
from common.subjects import Subject
from common.tracking import Progress
from common.transforms import View

POOLINGS = ("mean", "class", "both")


class Classifier(nn.Module):
    """A backbone, its pooled final-norm tokens, and a linear layer."""

    def __init__(self, backbone: Backbone, pooling: str, num_classes: int) -> None:
        super().__init__()
        if pooling != "mean" and not backbone.num_prefix_tokens:
            raise Refusal(f"--pool {pooling}: {backbone.config.name} has no class token; use --pool mean")
        self.backbone, self.pooling = backbone, pooling
        self.head = nn.Linear(backbone.width * (2 if pooling == "both" else 1), num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> logits (B, classes), float32."""
        features = self.backbone(images)
        parts = {"mean": features.tokens.mean(1)}
        if self.pooling != "mean":
            parts["class"] = features.prefix[:, 0]
        return self.head(
            torch.cat([parts[kind] for kind in ("class", "mean") if self.pooling in (kind, "both")], 1)
        ).float()


class Finetuning(nn.Module):
    """What is trained: a batch of images in, {"loss"} out. Labels are looked up here: a `Batch` holds none."""

    labels: Tensor

    def __init__(self, classifier: Classifier, labels: Tensor, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.classifier, self.arguments = classifier, arguments
        self.register_buffer("labels", labels, persistent=False)  # (training images,)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with smoothed, and on request mixed, labels."""
        images = batch.views["global"]
        targets = F.one_hot(self.labels[batch.index.to(self.labels.device)], self.classifier.head.out_features).float()
        images, targets = mix(images, targets, self.arguments.mixup, self.arguments.cutmix)
        return {"loss": F.cross_entropy(self.classifier(images), targets, label_smoothing=self.arguments.smoothing)}


def mix(images: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Blend the batch with itself reversed (mixup, arXiv 1710.09412), or paste a box (CutMix, 1905.04899).

    images uint8 (B, C, H, W), targets (B, classes). `mixup`, `cutmix`: alphas of Beta(alpha, alpha), 0 is off;
    with both on, one of them is drawn for each batch, as timm does.
    """
    alphas = [("mixup", mixup), ("cutmix", cutmix)]
    enabled = [pair for pair in alphas if pair[1] > 0]
    if not enabled:
        return images, targets
    how, alpha = enabled[int(torch.randint(len(enabled), ()))]
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    if how == "mixup":
        images = (share * images + (1 - share) * images.flip(0)).round().to(torch.uint8)
    else:
        H, W = images.shape[-2:]
        h, w = (round(side * math.sqrt(1 - share)) for side in (H, W))
        top, left = int(torch.randint(H - h + 1, ())), int(torch.randint(W - w + 1, ()))
        other = images.flip(0)[..., top : top + h, left : left + w]
        images = images.clone()
        images[..., top : top + h, left : left + w] = other
        share = 1 - h * w / (H * W)  # of what was really pasted
    return images, share * targets + (1 - share) * targets.flip(0)


def main(argv: list[str]) -> int:
    """Arguments -> one training for each row and seed -> report. Returns the exit status."""
    stop = StopSignal()
    arguments = options().parse_args(argv)
    check(arguments)
    device = chosen_device(arguments.device)
    job = begin("finetune", arguments, device=device, quiet=not first_process())
    pooling = arguments.pool or job.subject.description.get("pooling", "mean")
    processes.join(cpu=device.type == "cpu")
    accelerator = processes.accelerator(job.precision)
    job.device = accelerator.device
    raw = job.pixels()  # also says which images can be read: a label must not meet another image
    job.train, job.test = job.train.subset(raw.train_index), job.test.subset(raw.test_index)
    arguments.batch = min(arguments.batch, len(job.train) // accelerator.num_processes * accelerator.num_processes)

    subjects = [("subject", job.subject)] if job.subject.state is not None else []
    subjects += [("random", job.subject.untrained())] if arguments.baselines or not subjects else []
    found: dict[str, dict[str, list[float]]] = {}
    notes: list[str] = []
    for row, subject in subjects:
        for seed in job.seeds:
            job.say(f"{LABELS[row] if row == 'random' else subject.name}, seed {seed}:")
            share, note = train(job, subject, seed, pooling, accelerator, stop)
            if stop.received is not None:
                job.say("stopped: no report is written")
                return stop.status
            found.setdefault(row, {}).setdefault(pooling, []).append(share)
            notes += [note] if note and note not in notes else []
    if not first_process():
        return 0
    if arguments.baselines:
        linear = [
            probe(
                raw.train["pixels"], raw.train_labels, raw.test["pixels"], raw.test_labels, len(job.classes), seed=seed
            )
            for seed in job.seeds
        ]
        found["pixels"] = {"pixels": [result.accuracy for result in linear]}
    values = {
        row: {kind: accuracies(shares, len(job.test)) for kind, shares in kinds.items()} for row, kinds in found.items()
    }
    write(job, protocol(arguments, job, pooling) | {"notes": notes}, values, len(job.test))
    rows = [
        [names[row], kind_name(row, kind, job.size), percent(entry), interval(entry)]
        for names in [LABELS | {"random": "from scratch", "pixels": "raw pixels, linear"}]
        for row, kind, entry in ordered(values)
    ]
    tell(job, "finetuning accuracy (%)", "\n".join([table(["training of", "", "accuracy", "95 %"], rows), *notes]))
    return 0


def options() -> argparse.ArgumentParser:
    """The command line."""
    options = parser(__doc__ or "", precision=None)
    add = options.add_argument
    add("--pool", choices=POOLINGS, help="tokens that the head sees (default: as the backbone was trained)")
    add("--epochs", type=float, default=10, help="passes over the training images (default: 10)")
    add("--steps", type=int, help="optimizer steps; goes before --epochs")
    add("--batch", type=int, default=256, help="images per step over all processes (default: 256, or all there are)")
    add("--lr", type=float, default=1e-3, help="peak learning rate for 256 images (default: 1e-3)")
    add("--min-lr", type=float, default=1e-6, help="learning rate at the end, for 256 images")
    add("--warmup", type=float, default=0.1, help="share of the steps over which the rate rises (default: 0.1)")
    add("--weight-decay", type=float, default=0.05)
    add(
        "--layer-decay",
        type=float,
        default=0.75,
        help="of the learning rate, per block; 1 from scratch (default: 0.75)",
    )
    add("--drop-path", type=float, default=0.1, help="share of the blocks dropped in the last block (default: 0.1)")
    add("--smoothing", type=float, default=0.1, help="of labels (default: 0.1)")
    add("--mixup", type=float, default=0.0, help="alpha (MAE's 100 epochs: 0.8; default: 0, off)")
    add("--cutmix", type=float, default=0.0, help="alpha (MAE's 100 epochs: 1.0; default: 0, off)")
    add(
        "--scale",
        type=float,
        default=0.35,
        help="smallest share of an image that a training crop shows (default: 0.35)",
    )
    add("--flip", type=float, default=0.5, help="probability of a horizontal flip (default: 0.5)")
    add("--jitter", type=float, default=0.8, help="probability of a change of colours (default: 0.8)")
    add("--clip", type=float, default=0.0, help="largest gradient norm (default: 0, off)")
    add("--no-baselines", dest="baselines", action="store_false", help="neither from scratch nor raw pixels")
    return options


def check(arguments: argparse.Namespace) -> None:
    """Raises Refusal for a number outside its range."""
    above = {"epochs", "batch", "lr", "layer_decay", "scale"} | ({"steps"} if arguments.steps is not None else set())
    most = {"warmup": 1, "layer_decay": 1, "drop_path": 0.99, "smoothing": 0.99, "scale": 1, "flip": 1, "jitter": 1}
    least = ("min_lr", "weight_decay", "mixup", "cutmix", "clip")
    for name in {*above, *most, *least}:
        value = getattr(arguments, name)
        low, high = ("above 0" if name in above else "at least 0"), most.get(name, math.inf)
        if not (value > 0 if name in above else value >= 0) or not value <= high or math.isinf(value):
            limit = "" if math.isinf(high) else f" and at most {high:g}"
            raise Refusal(f"--{name.replace('_', '-')} {value}: expected a number {low}{limit}")


def train(
    job: Evaluation, subject: Subject, seed: int, pooling: str, accelerator: Accelerator, stop: StopSignal
) -> tuple[float, str]:
    """(test accuracy after the last step, what was added to the backbone)."""
    arguments = job.arguments
    backbone, note = subject.for_finetuning(seed, drop_path_rate=arguments.drop_path)
    assert job.train.labels is not None
    task = Finetuning(Classifier(backbone, pooling, len(job.classes)), torch.from_numpy(job.train.labels), arguments)
    # layer decay spares what pretraining has learned: from scratch there is nothing to spare
    layer_decay = arguments.layer_decay if subject.state is not None else None
    groups = parameter_groups(task, arguments.weight_decay, layer_decay)
    prepared, optimizer = accelerator.prepare(task, torch.optim.AdamW(groups, lr=0.0))
    torch.manual_seed(
        seed * accelerator.num_processes + accelerator.process_index
    )  # drop path and mixing differ by rank

    view = View(
        list(job.size), scale=[arguments.scale, 1.0], flip=arguments.flip, jitter=arguments.jitter, grayscale=0.0
    )
    steps, scale = num_steps(arguments, len(job.train)), arguments.batch / 256
    sampler = StepSampler(
        len(job.train), arguments.batch, seed, steps, 0, accelerator.process_index, accelerator.num_processes
    )
    samples = Samples(job.train, {"global": view}, seed, backbone.channels)
    progress = Progress(steps, 0, first_process())
    try:
        fit(
            accelerator,
            prepared,
            iter(loader(samples, sampler, arguments.workers, pin=job.device.type == "cuda")),
            optimizer,
            lambda step: rate(
                step, steps, round(arguments.warmup * steps), arguments.lr * scale, arguments.min_lr * scale
            ),
            steps=steps,
            clip=arguments.clip,
            log_every=max(1, steps // 10),
            images_per_step=arguments.batch,
            track=lambda step, record: None,
            save=lambda step: None,
            save_due=lambda step: False,
            stop=stop,
            progress=progress,
        )
    finally:
        progress.close()
    share = judge(task.classifier, job.test, accelerator, job) if stop.received is None else math.nan
    accelerator.free_memory(prepared, optimizer)
    return share, note


@torch.no_grad()
def judge(classifier: Classifier, test: Images, accelerator: Accelerator, job: Evaluation) -> float:
    """Accuracy on `test`, each process on its share of the images, none counted twice."""
    classifier.eval()
    mine = test.subset(range(accelerator.process_index, len(test), accelerator.num_processes))
    assert mine.labels is not None
    labels = torch.from_numpy(mine.labels).to(accelerator.device)
    counts = torch.zeros(2, dtype=torch.float64 if accelerator.device.type != "mps" else torch.float32)
    counts = counts.to(accelerator.device)  # right, judged
    backbone = classifier.backbone
    for images, index in shown(mine, backbone.size, job.crop, backbone.channels, workers=job.arguments.workers):
        with accelerator.autocast():
            guesses = classifier(images.to(accelerator.device)).argmax(1)
        counts[0] += (guesses == labels[index.to(labels.device)]).sum()
        counts[1] += len(index)
    right, judged = accelerator.reduce(counts, "sum").tolist()  # type: ignore[union-attr]
    return right / judged


def num_steps(arguments: argparse.Namespace, images: int) -> int:
    """Optimizer steps of one training."""
    return arguments.steps or max(1, round(arguments.epochs * (images // arguments.batch)))


def protocol(arguments: argparse.Namespace, job: Evaluation, pooling: str) -> dict[str, Any]:
    """The settings, as the report tells them."""
    names = ["batch", "lr", "min_lr", "warmup", "weight_decay", "layer_decay", "drop_path", "clip"]
    names += ["smoothing", "mixup", "cutmix", "scale", "flip", "jitter"]
    return {
        "id": "finetune/adamw",
        "pooling": pooling,
        "steps": num_steps(arguments, len(job.train)),
        **{name: getattr(arguments, name) for name in names},
        "layer_decay_from_scratch": 1.0,
        "selection": "none: the model after the last step",
        "pixels": "a linear probe, as evaluate/linear.py" if arguments.baselines else None,
    }


if __name__ == "__main__":
    entry(main)()
