"""How long a run will take, said before it begins; and how often it may be measured on held-out images."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from common.caching.pixels import FULL, Cache, size_of
from common.processes import collectives
from common.processes.launch import usable_cores
from common.training.tracking import clock
from pretrain.assemble import Parts, first_finds
from pretrain.automatic import replaced
from pretrain.monitoring import monitors

SHARE = 0.1  # of the run's time that measurements may take
TIMES = (10, 5, 3, 2, 1)  # measurements in a run
LEAST = 4  # held-out images of a measurement, at least
SMALL, LARGE = 2, 8  # images that a measurement is timed with
LONG = 10.0  # seconds that this may take, about
DEAR, TIMES_AS_LONG = 1.0, 3.0  # seconds of training on an image, from which on looking at one is taken to be thrice it
SLOW = 60.0  # seconds of a step, from which on there is advice
COMFORT = 30.0  # seconds that a step, or a part of one, is advised to take
WAITS, IN_A_ROW = 0.25, 2  # share of the time spent waiting for images, in so many lines, that is told
MARGIN = 8 / 7  # side of cached images, to that of the largest view: 256 for 224
ALIKE = 1.25  # a cache of whole images that is at most so much larger is advised in its place
SETTLED = 50  # steps after which the loader has started


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
    """Advise what to set if a step of so many seconds is too long to wait for."""
    if seconds <= SLOW:
        return []
    config, processes = parts.config, parts.process.num_processes
    an_image = seconds / config.batch
    batch = 2 ** max(1, int(math.log2(max(2.0, COMFORT / an_image))))
    batch = min(config.batch, math.ceil(batch / processes) * processes)
    pieces = math.ceil(seconds / COMFORT)
    whole = config.batch // processes
    pieces = next((n for n in range(pieces, whole + 1) if whole % n == 0), whole)
    line = (
        f"a step of {config.batch} images takes {clock(seconds)} on this machine: batch={batch} makes it "
        f"{clock(an_image * batch)}"
    )
    if pieces > config.accumulate:
        compares = any(objective.compares for objective in parts.task.objectives.values())
        parts_of = "has parts of" if compares else "keeps it, in parts of"
        line += f"; accumulate={pieces} {parts_of} {clock(seconds / pieces)} that are told one by one"
        line += ", each compared within itself" * compares
    return [line + "; or train on a GPU, or a smaller model"]


# ------------------------------------------------------------------------------------------ data


def verdict_on_data(parts: Parts, wait: float) -> str:
    """What a training that waits for images for the share `wait` of its time is bound by, and what to set."""
    if wait < WAITS:
        return f"compute-bound: {wait:.0%} of the time is spent waiting for images"
    workers = parts.config.loader.workers or 0
    cores = max(1, usable_cores() // parts.process.num_processes)
    if workers == 0 and cores > 1:
        help = f"loader.workers={cores - 1} decodes them beside the training, which decodes them itself now"
    elif workers < cores:
        help = f"loader.workers={cores} decodes on every core that this process has, {workers} do now"
    else:
        h, w = parts.task.backbone.size
        help = (
            f"every core decodes already: files whose shorter side is about {2 * min(h, w)} pixels, fewer crops of an "
            "image or more cores"
        )
    cache = cache_advice(parts)
    return f"data-bound: {wait:.0%} of the time is spent waiting for images; {'; '.join(filter(None, (help, cache)))}"


def cache_advice(parts: Parts) -> str:
    """What a cache of decoded images would be and take; nothing where images are not decoded, or it would not fit."""
    config = parts.config.loader
    if config.cache is not None or config.decode == "scaled" or parts.images.in_memory:
        return ""
    side = max(min(view.cut_size) for view in parts.samples.views.values())
    channels = parts.task.backbone.channels
    caches = {
        option: Cache.of(parts.images, option, channels, config.cache_root) for option in (round(MARGIN * side), FULL)
    }
    scaled, whole = (cache.num_bytes for cache in caches.values())
    option, needed = (FULL, whole) if whole <= ALIKE * scaled else (round(MARGIN * side), scaled)
    return f"loader.cache={option} would fit in {size_of(needed)}" if needed <= caches[option].free else ""


def data_warning(parts: Parts, say: Callable[[str], None]) -> Callable[[int, Mapping[str, Any]], None]:
    """Read each logged step, and tell once where IN_A_ROW lines one after the other wait for images, SETTLED steps
    after the first."""
    waited: list[float] = []
    first: list[int] = []
    told: list[int] = []

    def read(step: int, record: Mapping[str, Any]) -> None:
        first.append(step)
        waited.append(record["data_wait"])
        bound = step >= first[0] + SETTLED and len(waited) > IN_A_ROW and min(waited[-IN_A_ROW:]) >= WAITS
        if bound and not told:
            told.append(step)
            say(f"warning: step {step}: {verdict_on_data(parts, waited[-1])}")

    return read


# ------------------------------------------------------------------------------------------ monitors


def settle(parts: Parts, heed: Callable[[], None]) -> None:
    """Replace monitor.every=null by an interval at which measuring takes about a tenth of the run's time at most, and
    monitor.images=null by all images or, where one measurement would take more, by fewer. Raises Stopped."""
    if parts.config.monitor.every is not None:
        return
    step = step_seconds(parts)
    if step is None or not len(parts.held_out):
        every, reason = math.ceil(parts.steps / TIMES[0]), "ten times in the run"
        return _set(parts, {"monitor.every": every}, {"monitor.every": reason})
    if parts.pace is not None and parts.pace > DEAR:  # trying it would keep one waiting
        return _choose(parts, step * parts.steps, Cost(0.0, TIMES_AS_LONG * parts.pace, parts.pace))
    line = "measuring  what a look at held-out images costs"
    _choose(parts, step * parts.steps, first_finds(parts.process, line, 2.0, lambda: _costs(parts, heed)))


@dataclasses.dataclass
class Cost:
    """Seconds that measuring once takes: `fixed`, whatever the images, for drawing; for each held-out image; and for
    each labelled training image that votes."""

    fixed: float
    an_image: float
    a_voter: float = 0.0

    def of(self, images: int, voters: int = 0) -> float:
        """Seconds for so many."""
        return self.fixed + self.an_image * images + self.a_voter * voters


def _choose(parts: Parts, training: float, cost: Cost) -> None:
    """Set the interval and the number of images, for a run that trains for so many seconds."""
    config, every_image = parts.config.monitor, len(parts.held_out)
    reasons: dict[str, str] = {}

    def voters(chosen: int | None) -> int:
        return len(monitors.labelled(parts.train, dataclasses.replace(config, images=chosen))[0])

    def takes(chosen: int | None) -> float:
        return cost.of(min(chosen or every_image, every_image), voters(chosen))

    chosen = config.images
    times = next((times for times in TIMES if times * takes(chosen) <= SHARE * training), 1)
    if chosen is None and takes(chosen) > SHARE * training:
        enough = max(SHARE * training, 1.5 * cost.fixed)  # fewer images make no picture cheaper
        chosen = every_image  # fewer voters
        while chosen > LEAST and takes(chosen) > enough:
            chosen = max(LEAST, chosen // 2)
        reason = f"of {every_image:,} held out: more, or more that vote, would take longer"
        if 0 < voters(chosen) < monitors.NEIGHBORS:
            reason += f"; no k-NN, for which {monitors.NEIGHBORS} have to vote"
        reasons["monitor.images"] = reason
    images, share = min(chosen or every_image, every_image), times * takes(chosen) / max(1e-9, training)
    limit = f"at most {SHARE:.0%}"
    if share > SHARE:
        limit = f"more than {SHARE:.0%}, as the run is so short"
        limit += f": drawing alone takes {_short(cost.fixed)}" if cost.fixed > SHARE * training else ""
    reasons["monitor.every"] = (
        f"{'once, at the end' if times == 1 else f'{times} times in the run'}: looking at {images:,} held-out images "
        f"takes about {_short(takes(chosen))}, {share:.1%} of the training's time ({limit})"
    )
    _set(parts, {"monitor.every": math.ceil(parts.steps / times), "monitor.images": chosen}, reasons)


def _set(parts: Parts, values: dict[str, Any], reasons: dict[str, str]) -> None:
    parts.config = replaced(parts.config, values)
    parts.reasons |= reasons


def _short(seconds: float) -> str:
    return clock(seconds) if seconds >= 60 else f"{seconds:.2g} s"


def _costs(parts: Parts, heed: Callable[[], None]) -> Cost:
    """Time the monitors as they will run; where already two images take long, on those alone."""
    task, device, seconds = parts.task, parts.process.device, list[tuple[int, int, float, float]]()
    import matplotlib.figure  # noqa: F401  (else the first measurement would pay for it)

    task.to(device)
    started = time.perf_counter()
    with torch.random.fork_rng(), collectives.single_process():
        for size in (SMALL, SMALL, LARGE):  # the first warms up
            changed = {"monitor.images": min(size, len(parts.held_out)), "monitor.every": 1}
            judged = None if parts.validation is None else monitors.some(parts.validation, size)
            few = dataclasses.replace(parts, config=replaced(parts.config, changed), validation=judged)
            times, nowhere = list[float](), SimpleNamespace(picture=lambda *_: None)
            silent = nowhere, lambda line: None, lambda step, share: False
            for _, measure in monitors.reports(few, task, *silent):  # type: ignore[arg-type]
                begun = time.perf_counter()
                measure(0)
                heed()
                times.append(time.perf_counter() - begun)
            images, voters = few.config.monitor.images or 0, len(monitors.labelled(few.train, few.config.monitor)[0])
            seconds.append((images, voters, times[0], sum(times[1:])))  # frozen features; all else
            if time.perf_counter() - started + sum(times) > LONG:
                break
    task.train().begin_step(0.0, True)
    task.to("cpu")
    images, voters, extracting, other = seconds[-1]
    feature = extracting / (images + voters)  # a voter costs as much as a held-out image
    slope, fixed = other / images, 0.0
    if len(seconds) == 3 and images > seconds[1][0]:
        slope = max(0.0, (other - seconds[1][3]) / (images - seconds[1][0]))
        fixed = max(0.0, other - slope * images)
    return Cost(fixed, slope + feature, feature)
