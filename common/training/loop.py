"""The only loop that trains a backbone."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..processes.stopping import Stopped
from .run import Run
from .step import take_step

Report = tuple[int, Callable[[int], dict[str, float | str]]]  # (every so many steps, what to measure then)
Comment = Callable[[int, Mapping[str, Any]], Mapping[str, str]]  # words about the numbers of a line, which join it


def fit(run: Run, reports: Sequence[Report] = (), comment: Comment | None = None) -> int:
    """Train from run.start to run.steps; returns the last step done, earlier if a signal asked to stop.

    Every `log_every` steps a line is logged, of means over the steps since the last one. A report's numbers join the
    line of its step. A signal ends a wait for a batch, or a step that is long (several processes: between its parts),
    as if the step had not begun; or a report, which then lacks numbers.

    Raises Refusal after too many steps in a row that were not finite, see `Run.count`.
    """
    run.task.train()
    run.progress.wait_for_first(f"step {run.start + 1}/{run.steps}  under way: {run.options.batch} images")
    for step in range(run.start + 1, run.steps + 1):
        try:
            outcome = take_step(run, step)
        except Stopped:
            run.save(step - 1)
            return step - 1
        run.count(step, outcome)
        record: dict[str, Any] = {}
        if run.is_logged(step):
            record = run.line(step)
            record |= comment(step, record) if comment is not None else {}
            run.progress.show(step, record)
        record |= _measured(
            run, step, [measure for every, measure in reports if step % every == 0 or step == run.steps]
        )
        if record:
            run.tracker.write(step, record)
        run.progress.step()
        due = outcome.taken and run.checkpoints.due(step)  # copies of a skipped step would drive out what was before
        with run.stop.within(run.longest):
            stopping, saving, run.slow = run.agree(run.stop.received is not None, due, run.slow)
        if stopping or saving or step == run.steps:
            run.save(step)
        if stopping:
            return step
    return max(run.start, run.steps)


def _measured(run: Run, step: int, reports: Sequence[Callable[[int], dict[str, float | str]]]) -> dict[str, Any]:
    """What the reports that are due say of `step`; a signal cuts them short."""
    if not reports:
        return {}
    begun, record = time.perf_counter(), dict[str, Any]()
    with contextlib.suppress(Stopped):
        for measure in reports:
            record |= measure(step)
    run.task.train()
    run.progress.tell(step, record, time.perf_counter() - begun)
    return record
