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

from common.processes.launch import active_pil, entry  # first: it sets what torch reads when it is imported

# isort: split
from contextlib import closing

from common.batches.samples import loader
from common.batches.unreadable import watch
from common.checkpoints.run_folder import WAIT, RunLock, create, refuse_existing
from common.printable import printable_lines
from common.processes import group
from common.processes.stopping import StopSignal
from common.training.loop import fit
from common.training.tracking import Progress, Tracker, check_tensorboard
from pretrain.assemble import assemble, fit_options, optimizer_for, schedule_for
from pretrain.checkpoints import Checkpoints, seed_process
from pretrain.command import parse, read, written
from pretrain.dry_run import dry_run
from pretrain.flight import FlightRecorder
from pretrain.monitoring import monitors, pace
from pretrain.replay import replay
from pretrain.summary import begun, ended


def main(argv: list[str]) -> int:
    """Options -> parts -> fit. Returns the exit status."""
    stop = StopSignal()
    arguments = parse(argv, __doc__ or "")
    config, run = read(arguments)
    process = group.join()
    if arguments.replay is not None:
        return replay(arguments.replay, config, process)
    lock = None  # keeps other processes from writing this run, for as long as it is referred to
    if arguments.resume is not None:
        lock = RunLock(arguments.resume, WAIT) if process.is_main_process else None
    elif run is not None and process.is_main_process:
        refuse_existing(run, arguments.overwrite)
    check_tensorboard(config.tensorboard)
    fresh_run = arguments.resume is None
    typed = {word.partition("=")[0] for word in arguments.words} if fresh_run else {"batch"}
    parts = assemble(config, process, fresh_run, stop, typed)
    if fresh_run:
        pace.settle(parts, stop.heed)
    if arguments.dry_run:
        return dry_run(parts, stop.heed)

    config = parts.config  # from here on the run folder is written
    if arguments.resume is None:
        if process.is_main_process:
            run = create(run, arguments.stem, written(config, parts.reasons), arguments.overwrite)
            lock = RunLock(run)
        run = parts.agree_on(run)
    assert run is not None and (lock is not None or not process.is_main_process)

    accelerator = group.accelerator(config.precision)
    seed_process(config.seed, process.process_index)
    if config.model.compile:
        parts.task.compile_backbones()
    task, optimizer = accelerator.prepare(parts.task, optimizer_for(config, parts.task))
    checkpoints = Checkpoints(run, parts, accelerator, arguments.stem)
    start = checkpoints.resume(task, optimizer)
    tracker = Tracker(run, start, config.tensorboard, process.is_main_process)
    if not start or arguments.words:  # the recipe, and where it changes
        tracker.text("recipe", written(config, parts.reasons), start)
    progress = Progress(parts.steps, start, process.is_main_process)
    accelerator.print(printable_lines(begun(parts, run, start, active_pil())))
    fresh = loader(parts.samples, parts.sampler(start), config.loader.workers or 0, process.device.type == "cuda")
    watched = watch(fresh, run, parts.images, config.log_every, progress.say, parts.limit, parts.look)
    # Closed, the stream ends the loader's workers: they ignore signals, and an exit would wait for them for ever.
    with closing(watched) as batches, closing(progress), closing(tracker):
        progress.wait_for_first(f"step {start + 1}/{parts.steps}  under way: {config.batch} images")
        done = fit(
            accelerator,
            task,
            batches,
            optimizer,
            schedule_for(config, parts.steps),
            **fit_options(parts),
            start=start,
            most_skipped=config.optimizer.most_skipped,
            skipped=int(parts.task.skipped),
            averages=checkpoints.averages,
            reports=monitors.reports(parts, accelerator.unwrap_model(task), tracker, progress.say),
            track=tracker.write,
            save=lambda step: checkpoints.save(step, task, optimizer, tracker),
            save_due=checkpoints.due,
            stop=stop,
            progress=progress,
            recorder=FlightRecorder(checkpoints, task, optimizer, progress.say),
            read=monitors.collapse_warnings(parts.task, progress.say),
        )
    accelerator.print(printable_lines(ended(parts, run, done, progress.share)))
    return stop.status if done < parts.steps else 0


if __name__ == "__main__":
    entry(main)()
