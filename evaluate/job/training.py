"""One training of an evaluation, by a recipe: its folder, its checkpoints, and how it runs from the first to the last.

REPORT/trained-seed0/     metrics.jsonl, tb/, state/ while it lasts; at its end the weights and result.json
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from common import config as configuration
from common.batches.sampler import StepSampler
from common.batches.samples import Samples
from common.checkpoints import changes, storage
from common.errors import Refusal
from common.processes.stopping import StopSignal
from common.training.checkpoints import Checkpoints
from common.training.loop import fit
from common.training.optim import Optimization, parameter_groups
from common.training.run import Feed, Run
from evaluate.job import recipes
from evaluate.job.evaluation import Evaluation

RESULT = "result.json"


class Training(Checkpoints):
    """The folder of one training of a job, and what is trained. `identity`: facts that it must have in common with the
    one it continues, "seed" and "weights" (their digest; None: from scratch) among them."""

    learns_all = True  # the backbone too, not its head alone

    def __init__(
        self,
        folder: Path,
        job: Evaluation,
        config: Any,
        identity: Mapping[str, Any],
        task: Any,
        accelerator: Accelerator,
    ) -> None:
        super().__init__(folder, config, accelerator)
        self.job, self.config, self.identity, self.task = job, config, dict(identity), task
        self.history: list[dict[str, Any]] = []  # looks at the test images: {"step", ...}
        self.version: Any = changes.VERSION  # of what is resumed

    def result(self) -> list[dict[str, Any]] | None:
        """The history of a training that is done; None of one that is not. Raises Refusal if it was another one."""
        path = self.folder / RESULT
        if not path.exists():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        self._refuse_other(content["identity"])
        return content["history"]

    def facts(self) -> dict[str, Any]:
        """Return what a state holds beside the weights."""
        return {"identity": self.identity, "history": self.history}

    def accept(self, folder: Path, state: dict[str, Any]) -> None:
        """Take over the history of a state. Raises Refusal for that of another training."""
        identity, history = state.get("identity"), state.get("history")
        if not isinstance(identity, dict) or not isinstance(history, list):
            raise Refusal(f"{folder} is no checkpoint of such a training: remove it, or begin again with --overwrite")
        self._refuse_other(identity)
        self.history, self.version = list(history), changes.version_of(state)

    def _refuse_other(self, identity: Mapping[str, Any]) -> None:
        for name, now in {**self.identity, **recipes.earlier(self.job, identity)}.items():
            if identity.get(name) != now:
                raise Refusal(
                    f"--resume: {self.folder} was begun with {name} {identity.get(name)}, and now it is {now}: "
                    "give the same, or begin again with --overwrite"
                )

    def look(self, step: int) -> dict[str, float | str]:
        """Judge the test images after `step`, add that to the history, and return what the log says of it. Every
        process calls it."""
        raise NotImplementedError

    def is_judged(self, step: int) -> bool:
        """Whether the test images were looked at after `step`."""
        return bool(self.history) and self.history[-1]["step"] == step

    def finish(self) -> None:
        """Keep the result and the newest weights; the first process calls it."""
        self.export(self.folder, self.task, self.history[-1]["step"])
        content = json.dumps({"identity": self.identity, "history": self.history}, indent=2) + "\n"
        storage.write_atomically(self.folder / RESULT, lambda aside: aside.write_text(content, encoding="utf-8"))
        shutil.rmtree(self.folder / "state", ignore_errors=True)


def train(
    training: Training,
    samples: Samples,
    sampler: Callable[..., StepSampler],
    rate: Callable[[int], float],
    steps: int,
    every: int,
    stop: StopSignal,
) -> None:
    """Train to the last of `steps`, or until a signal asks to stop, going on from the newest checkpoint; look at the
    test images every so many steps, and keep what came of it. `rate`: the learning rate of a 0-based step."""
    job, config, accelerator, seed = training.job, training.config, training.accelerator, training.identity["seed"]
    processes = accelerator.process_index, accelerator.num_processes

    def sampler_from(start: int) -> StepSampler:
        return sampler(len(job.train), config.batch, seed, steps, start, *processes, config.accumulate)

    # layer decay spares what pretraining has learned: from scratch, or frozen, there is nothing to spare
    spared = config.layer_decay if training.identity["weights"] is not None and training.learns_all else None
    groups = parameter_groups(training.task, config.weight_decay, spared)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(config.betas))  # type: ignore[arg-type]
    optimization = Optimization(optimizer, rate, accumulate=config.accumulate, clip=config.clip)
    feed = Feed(samples, sampler_from, job.arguments.workers, job.train, job.limit, job.look)
    with Run.open(training, training.task, optimization, feed, steps, seed, stop) as run:
        if run.start:
            job.say(f"resumed after step {run.start} of {steps}")
        else:
            run.tracker.text("recipe", configuration.as_yaml(config), 0)
        if changed := changes.note(training.version, run.start, changes.sample_changes(samples.views)):
            job.say(f"warning: {changed}; for what it would have become, begin again with --overwrite")
        fit(run, [(every, training.look)])
    if stop.received is None:
        if not training.is_judged(steps):
            training.look(steps)  # a signal had ended the last look, or the process after it
        if accelerator.is_main_process:
            training.finish()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
