"""How long a run will take, said before it begins; and how often it may be measured on held-out images."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from common import collectives
from common.stopping import Stopped
from common.tracking import clock, patient
from pretrain import monitors
from pretrain.assemble import Parts

SHARE = 0.1  # of the run's time that measurements may take
TIMES = (10, 5, 3, 2, 1)  # measurements in a run
LEAST = 32  # held-out images of a measurement, at least
SMALL, LARGE = 2, 8  # images that a measurement is timed with
SLOW = 60.0  # seconds of a step, from which on there is advice
COMFORT = 30.0  # seconds that a step, or a part of one, is advised to take


def step_seconds(parts: Parts) -> float | None:
    """Seconds that a step will take, by what was measured; None if nothing was."""
    return None if parts.pace is None else parts.pace * parts.config.batch / parts.process.num_processes


def expected(parts: Parts) -> list[str]:
    """Lines that say how long a step and the run will take, and what to set if a step takes more than a minute."""
    seconds = step_seconds(parts)
    if seconds is None:
        return []
    step = clock(seconds) if seconds >= 10 else f"{seconds:.3g} s"
    lines = [f"pace       about {step} a step, {clock(seconds * parts.steps)} the whole run, by what was measured"]
    return lines + [f"advice     {line}" for line in advice(parts, seconds)]


def advice(parts: Parts, seconds: float) -> list[str]:
    """What to set if a step of so many seconds is too long to wait for."""
    if seconds <= SLOW:
        return []
    config, processes = parts.config, parts.process.num_processes
    an_image = seconds / config.batch
    batch = 2 ** max(1, int(math.log2(max(2.0, COMFORT / an_image))))
    batch = min(config.batch, math.ceil(batch / processes) * processes)
    pieces = math.ceil(seconds / COMFORT)
    whole = config.batch // processes
    pieces = next((n for n in range(pieces, whole + 1) if whole % n == 0), whole)
    lines = [
        f"a step of {config.batch} images takes {clock(seconds)} on this machine: batch={batch} makes it "
        f"{clock(an_image * batch)}"
    ]
    if pieces > config.accumulate and not {"dino", "ibot", "koleo"} & parts.task.objectives.keys():
        lines[0] += f"; accumulate={pieces} keeps it, in parts of {clock(seconds / pieces)} that are told one by one"
    elif pieces > config.accumulate:
        lines[0] += (
            f"; accumulate={pieces} has parts of {clock(seconds / pieces)} that are told one by one, each compared "
            "within itself"
        )
    return [lines[0] + "; or train on a GPU, or a smaller model"]


# ------------------------------------------------------------------------------------------ monitors


def settle(parts: Parts, heed: Callable[[], None]) -> None:
    """Replace monitor.every=null by an interval at which measuring takes about a tenth of the run's time at most, and
    monitor.images=null by all images or, where one measurement would take more, by fewer. Raises Stopped."""
    config = parts.config.monitor = dataclasses.replace(parts.config.monitor)
    if config.every is not None:
        return
    step = step_seconds(parts)
    if step is None or not len(parts.held_out):
        config.every, parts.reasons["monitor.every"] = math.ceil(parts.steps / TIMES[0]), "ten times in the run"
        return
    found: list[tuple[Callable[[int], float] | float, ...] | int | None] = [None]
    if parts.process.is_main_process:
        try:
            say = functools.partial(print, flush=True)
            with patient("measuring  what a look at held-out images costs", say, first=2.0):
                found = [_costs(parts, heed)]
        except Stopped as stopped:
            found = [stopped.number]
    if parts.process.num_processes > 1:
        broadcast_object_list(found)
    if isinstance(found[0], int):
        raise Stopped(found[0])
    fixed, per_image = found[0]  # type: ignore[misc]
    _choose(parts, step * parts.steps, lambda images: fixed + per_image * images)  # type: ignore[operator]


def _choose(parts: Parts, training: float, cost: Callable[[int], float]) -> None:
    """Set the interval and the number of images: `training` seconds, and `cost(images)` of a measurement."""
    config, images = parts.config.monitor, len(parts.held_out)
    times = next((times for times in TIMES if times * cost(images) <= SHARE * training), None)
    if times is None and config.images is None:
        times = 1
        enough = max(SHARE * training, 1.5 * cost(0))  # fewer images make no picture cheaper
        while images > LEAST and cost(images) > enough:
            images = max(LEAST, images // 2)
        if images < len(parts.held_out):
            config.images = images
            parts.reasons["monitor.images"] = f"all {len(parts.held_out):,} would take longer"
    times = times or 1
    config.every = math.ceil(parts.steps / times)
    share = times * cost(images) / max(1e-9, training)
    limit = f"at most {SHARE:.0%}" if share <= SHARE else f"more than {SHARE:.0%}, as the run is so short"
    parts.reasons["monitor.every"] = (
        f"{'once, at the end' if times == 1 else f'{times} times in the run'}: looking at {images:,} held-out images "
        f"takes about {_short(cost(images))}, {share:.1%} of the training's time ({limit})"
    )


def _short(seconds: float) -> str:
    return clock(seconds) if seconds >= 60 else f"{seconds:.2g} s"


def _costs(parts: Parts, heed: Callable[[], None]) -> tuple[float, float]:
    """(seconds of a measurement whatever its images, seconds for each of them), of the monitors as they will run."""
    task, device = parts.task, parts.process.device
    import matplotlib.figure  # noqa: F401  (else the first measurement would pay for it)

    task.to(device)
    seconds = []
    sizes = [min(SMALL, len(parts.held_out)), min(LARGE, len(parts.held_out))]
    with torch.random.fork_rng(), collectives.alone():
        for size in (sizes[0], *sizes):  # the first warms up
            begun = time.perf_counter()
            nowhere: Any = _Nowhere()
            for _, measure in monitors.reports(_with(parts, size), task, nowhere, lambda line: None):
                measure(0)
                heed()
            seconds.append(time.perf_counter() - begun)
    task.train().begin_step(0.0, True)
    task.to("cpu")
    if sizes[0] == sizes[1]:
        return min(seconds), 0.0
    slope = max(0.0, (seconds[2] - seconds[1]) / (sizes[1] - sizes[0]))
    return max(0.0, seconds[1] - slope * sizes[0]), slope


def _with(parts: Parts, images: int) -> Parts:
    """The same, measured on so many held-out images."""
    few = dataclasses.replace(parts.config.monitor, images=images, every=1)
    return dataclasses.replace(parts, config=dataclasses.replace(parts.config, monitor=few))


class _Nowhere:
    """A tracker that keeps no picture."""

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """Nothing."""
