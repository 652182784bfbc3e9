"""What is measured while a run trains, on images held out of its training data. Never part of the loss."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common.data import Images
from common.features import extract
from common.loop import Report
from common.neighbors import knn
from common.pictures import board
from common.plan import PlanSpec
from common.sampling import HELD_OUT_EPOCH, Batch, Samples
from common.tracking import Tracker
from pretrain.assemble import Parts
from pretrain.objectives import Pass
from pretrain.task import Pretraining

Monitor = Callable[[int], dict[str, float | str]]
SHOWN = 8  # images on the board
NEIGHBORS = 20  # DINO's k


def reports(parts: Parts, task: Pretraining, tracker: Tracker) -> list[Report]:
    """The monitors of a run, each with how often it is asked."""
    if not len(parts.held_out):
        return []
    every, device, samples = parts.config.monitor.every or 1, parts.process.device, parts.held_out_samples()
    wanted: list[Monitor | None] = [validation(task, samples, 256, device)]
    if "absolute" in task.objectives:
        wanted.append(boards(task, samples, device, tracker))
    wanted.append(neighbors(task, parts.train, parts.held_out, parts.config.monitor.bank, device))
    return [(every, monitor) for monitor in wanted if monitor is not None]


def _batches(samples: Samples, size: int) -> list[list[tuple[int, int]]]:
    return [
        [(HELD_OUT_EPOCH, index) for index in range(first, min(first + size, len(samples)))]
        for first in range(0, len(samples), size)
    ]


def validation(task: Pretraining, samples: Samples, batch: int, device: torch.device) -> Monitor:
    """`val/...`: every statistic of the task on held-out images, cropped as in training, always the same crops.

    Beside the training numbers it shows memorisation, to which small data sets invite.
    """

    @torch.no_grad()
    def measure(step: int) -> dict[str, float | str]:
        task.eval()
        totals: dict[str, float] = {}
        for keys in _batches(samples, batch):
            for name, value in task(samples.__getitems__(keys).to(device)).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(keys) / len(samples)
        return {f"val/{name}": value for name, value in totals.items() if not name.endswith("/chance")}

    return measure


def boards(task: Pretraining, samples: Samples, device: torch.device, tracker: Tracker) -> Monitor:
    """The picture `board`: held-out images, and their patches where `absolute` believes they belong."""
    objective: Any = task.objectives["absolute"]
    want: Pass = objective.passes["tokens"]

    @torch.no_grad()
    def draw(step: int) -> dict[str, float | str]:
        task.eval()
        batch: Batch = samples.__getitems__([(HELD_OUT_EPOCH, i) for i in range(min(SHOWN, len(samples)))]).to(device)
        features = task.backbone(batch.views[want.view], want.plan)
        guesses = objective.logits({"tokens": features}).argmax(-1)
        tracker.picture("board", step, board(batch.views[want.view], guesses, task.backbone.grid))
        return {}

    return draw


def neighbors(task: Pretraining, train: Images, held_out: Images, bank: int, device: torch.device) -> Monitor | None:
    """`knn/accuracy`: held-out images classified by their 20 nearest training images (mean patch token, as in DINO).

    None where there are no labels.
    """
    if train.labels is None or held_out.labels is None or not len(held_out):
        return None
    labelled = np.flatnonzero(train.labels >= 0)
    chosen = np.sort(np.random.default_rng(0).permutation(labelled)[:bank])
    asked = np.flatnonzero(held_out.labels >= 0)
    if len(chosen) < NEIGHBORS or not len(asked):
        return None
    voters, judged = train.subset(chosen), held_out.subset(asked)
    voter_labels, judged_labels = torch.from_numpy(train.labels[chosen]), torch.from_numpy(held_out.labels[asked])
    # Unreadable images are named by `watch`, which judges them by the whole of the data.
    extracted = functools.partial(
        extract, task.backbone, PlanSpec(task.position), device=device, warn=lambda line: None, tolerated=1.0
    )

    @torch.no_grad()
    def measure(step: int) -> dict[str, float | str]:
        task.eval()
        known, new = extracted(images=voters), extracted(images=judged)
        if len(known.get("index", ())) < NEIGHBORS or "index" not in new:
            return {}
        guesses = knn(known["mean"], voter_labels[known["index"]], new["mean"], k=NEIGHBORS)
        return {"knn/accuracy": float((guesses == judged_labels[new["index"]]).float().mean())}

    return measure
