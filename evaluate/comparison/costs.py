"""What a pretraining cost: images, floating-point operations of the backbone, hours of steps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.checkpoints.public import build
from common.errors import Refusal
from common.models.plan import PlanSpec
from common.training.tracking import METRICS
from evaluate.job.subjects import facts_of

BACKWARD = 2  # times the forward pass: the gradients of activations, and of weights
NOT_COUNTED = (
    "FLOPs: matrix products and convolutions of the backbone (a multiply-add is two), backward twice forward; not "
    "heads, losses, optimizer, monitors, recomputation, and DINO's masked crops as whole ones. Hours: training steps "
    "alone, on whatever machine that was; not monitors, checkpoints, or steps that an interruption lost"
)


class Cost(NamedTuple):
    """What is known of it."""

    images: int | None = None
    flops: float | None = None
    hours: float | None = None


def cost(description: Mapping[str, Any], config: Mapping[str, Any] | None, folder: Path) -> Cost:
    """Cost of the run in `folder`, up to the step of its checkpoint."""
    training = description.get("training") or {}
    images, step = training.get("images_seen"), training.get("step")
    if not isinstance(images, int) or not isinstance(step, int):
        return Cost()
    try:
        flops = images * per_image(description, config) if config is not None else None
    except (Refusal, KeyError, TypeError, AttributeError, ValueError, RuntimeError):
        flops = None  # a configuration from elsewhere: what is not known is not guessed
    return Cost(images, flops, hours(folder / METRICS, step, images / step) if step else None)


def per_image(description: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """Floating-point operations of the backbone for one training image and all its crops, forward and backward.

    Objectives that run the backbone alike share a pass; a teacher's has no backward.
    """
    views, passes = config["views"], set()
    for name, options in config["objectives"].items():
        options, facts = options or {}, facts_of(name)
        if options.get("weight", 1.0) <= 0:
            continue
        view = options.get("view", "global")
        plan = (options.get("keep", 1.0), options.get("position", "full"), options.get("context", 1.0))
        passes.add((view, facts["crops"] == "first", plan, 1 + BACKWARD))
        if facts["teacher"]:
            passes.add((view, False, plan, 1))
        local = options.get("local") or ("local" if "local" in views and view != "local" else None)
        if facts["local"] and local is not None:
            passes.add((local, False, plan, 1 + BACKWARD))
    total = 0.0
    for view, one, (keep, _, context), times in passes:
        crops = 1 if one else views[view]["count"]
        total += times * crops * forward(description, views[view]["size"], PlanSpec(keep, "full", 0.0, context))
    return total


def forward(description: Mapping[str, Any], size: int | list[int], spec: PlanSpec = PlanSpec()) -> float:  # noqa: B008
    """Floating-point operations of one image of `size` pixels through the backbone of a checkpoint's description.

    Counted as it runs, on one blank image: torch.utils.flop_counter.
    """
    backbone = build({**description, "attention": "explicit", "position": "full"}).eval()  # fused kernels may not count
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.zeros(1, backbone.channels, height, width, dtype=torch.uint8)
    patches = backbone.grid[0] * height // backbone.size[0] * (backbone.grid[1] * width // backbone.size[1])
    drawn = spec.draw(np.random.default_rng(0), patches)
    plan = spec.plan({name: torch.from_numpy(np.asarray(value))[None] for name, value in drawn.items()})
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(image, plan)
    return float(counter.get_total_flops())


def hours(path: Path, last: int, batch: float) -> float | None:
    """Hours of the training steps up to `last`, each of `batch` images, from the logged speeds; None without."""
    seconds, before = 0.0, 0
    for step, record in records(path):
        speed = record.get("images_per_second")
        if before < step <= last and isinstance(speed, (int, float)) and speed > 0:
            seconds += (step - before) * batch / speed
            before = step
    if not before:
        return None
    return seconds * last / before / 3600  # the last steps, if they were not logged, as fast as the others


def records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, record) of metrics.jsonl by step, the later of two of one step, without lines that were half-written."""
    by_step: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text(errors="replace", encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
            by_step[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(by_step.items())
