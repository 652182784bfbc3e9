"""Pretrain a vision transformer on positional labels.

accelerate launch pretrain/run.py                                          # the quickstart recipe
accelerate launch pretrain/run.py configs/pretrain/vit_small.yaml data=PATH run=runs/mine
accelerate launch pretrain/run.py --resume runs/mine
python pretrain/run.py --help
"""

import sys
from pathlib import Path

if not __package__:  # `python pretrain/run.py` puts pretrain/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry  # first: it sets what torch reads when it is imported

# isort: split
import functools
from collections.abc import Mapping
from typing import Any

from common.caching.building import Builders, read_cached
from common.caching.pixels import Cache
from common.checkpoints.run_folder import WAIT, RunLock, create, refuse_existing
from common.printable import printable_lines
from common.processes import group
from common.processes.stopping import StopSignal
from common.training.loop import fit
from common.training.run import Run
from common.training.tracking import check_tensorboard
from pretrain.assemble import Parts, assemble, optimization_for
from pretrain.checkpoints import PretrainCheckpoints
from pretrain.command import Arguments, parse, read, written
from pretrain.dry_run import dry_run
from pretrain.monitoring import monitors, pace
from pretrain.monitoring.diagnosis import repeat
from pretrain.monitoring.witness import Witness
from pretrain.summary import begun, ended


def main(argv: list[str]) -> int:
    """Options -> parts -> fit. Returns the exit status."""
    stop = StopSignal()
    arguments = parse(argv, __doc__ or "")
    config, run = read(arguments)
    process = group.join()
    lock = None  # keeps other processes from writing this run, for as long as it is referred to
    if process.is_main_process and arguments.resume is not None and arguments.checkpoint is None:
        lock = RunLock(arguments.resume, WAIT)
    elif process.is_main_process and run is not None and arguments.resume is None:
        refuse_existing(run, arguments.overwrite)
    check_tensorboard(config.tensorboard)
    is_fresh = arguments.resume is None
    parts = assemble(config, process, is_fresh, stop, arguments.typed)
    if config.loader.cache is not None:
        parts.cache = cached(parts, stop, arguments.dry_run)
    if config.diagnose:
        parts.task.witness = Witness(parts.task)
    if arguments.checkpoint is not None:
        return repeat(arguments.checkpoint, arguments.last, parts, stop)
    if is_fresh:
        pace.settle(parts, stop.heed)
    if arguments.dry_run:
        return dry_run(parts, stop.heed)
    if is_fresh:
        if process.is_main_process:
            run = create(run, arguments.stem, written(parts.config, parts.reasons), arguments.overwrite)
            lock = RunLock(run)
        run = parts.agree_on(run)
    assert run is not None and (lock is not None or not process.is_main_process)
    return train(run, parts, arguments, stop)


def cached(parts: Parts, stop: StopSignal, dry_run: bool) -> str:
    """Let images be read from a cache, see `read_cached`; what it is, in a line."""
    config = parts.config.loader
    cache = Cache.of(parts.images, config.cache, parts.task.backbone.channels, config.cache_root)
    largest = max(min(view.cut_size) for view in parts.samples.views.values())
    if cache.side is not None and cache.side < largest:
        parts.notes.append(
            f"loader.cache={cache.side} is smaller than views of {largest} pixels: all crops are enlarged"
        )
    say = functools.partial(print, flush=True) if parts.process.is_main_process else (lambda line: None)
    builders = Builders(parts.process, config.workers or 0, say, lambda: stop.received)
    images = (parts.images, parts.train, parts.held_out)
    return read_cached(images, cache, builders, parts.limit, "loader.cache=", dry_run)


def train(folder: Path, parts: Parts, arguments: Arguments, stop: StopSignal) -> int:
    """Train in a run folder, from its newest checkpoint if there is one. Returns the exit status."""
    config, task = parts.config, parts.task
    accelerator = group.accelerator(config.precision)
    if config.model.compile and not config.diagnose:
        task.compile_backbones()
    checkpoints = PretrainCheckpoints(folder, parts, accelerator, arguments.stem)
    optimization = optimization_for(config, task, parts.steps)
    with Run.open(checkpoints, task, optimization, parts.feed, parts.steps, config.seed, stop) as run:
        if not run.start or arguments.words:  # the recipe, and where it changes
            run.tracker.text("recipe", written(config, parts.reasons), run.start)
        accelerator.print(printable_lines(begun(parts, folder, run.start)))
        say = run.progress.say
        best = functools.partial(checkpoints.keep_best, task)
        slow, collapsed = pace.data_warning(parts, say), monitors.collapse_warnings(task, say)

        def comment(step: int, record: Mapping[str, Any]) -> dict[str, str]:
            slow(step, record)
            return collapsed(step, record)

        done = fit(run, monitors.reports(parts, task, run.tracker, say, best), comment)
    accelerator.print(printable_lines(ended(parts, folder, done, run.progress.share)))
    return stop.status if done < parts.steps else 0


if __name__ == "__main__":
    entry(main)()
