"""Exact resume: what is stored at a checkpoint, and how a run goes on from it."""

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from common.batches.views import height_width
from common.checkpoints import changes, private, public, storage
from common.checkpoints.run_folder import commit
from common.checkpoints.stored_state import read_checkpoint, restore
from common.data.images import KIND
from common.data.location import location_of
from common.errors import Refusal
from common.training.averages import Averages
from common.training.random_state import random_state
from common.training.tracking import Tracker
from pretrain import identity
from pretrain.assemble import Parts
from pretrain.config import store, stored_in
from pretrain.task import Pretraining


class Checkpoints:
    """Writes and reads the checkpoints of one run."""

    def __init__(self, run: Path, parts: Parts, accelerator: Accelerator, recipe: str) -> None:
        self.run, self.parts, self.accelerator, self.recipe = run, parts, accelerator, recipe
        self.averages = Averages()  # of the steps since the last line of the log
        self.begun_from = parts.init  # what was done to the weights of model.init, which a resume does not load
        self.changed = ""  # where another version went on, and what it does otherwise
        self.commit = commit()
        self.saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`, by steps or by this process's clock."""
        config = self.parts.config
        if config.checkpoint_every is not None and step % config.checkpoint_every == 0:
            return True
        if config.milestone_every is not None and step % config.milestone_every == 0:
            return True
        return config.checkpoint_minutes > 0 and time.monotonic() - self.saved > 60 * config.checkpoint_minutes

    def save(self, step: int, task: torch.nn.Module, optimizer: Any, tracker: Tracker) -> None:
        """Store everything that step + 1 depends on, with the backbone for evaluation. Every process calls it. Raises
        Refusal, in all of them, for weights that are not finite."""
        process, config, accelerator = self.parts.process, self.parts.config, self.accelerator
        self._refuse_broken(step, accelerator.unwrap_model(task))
        random, averages = [random_state()], [self.averages.state()]
        if process.num_processes > 1:
            random, averages = gather_object(random), gather_object(averages)
        if process.is_main_process:
            tracker.sync()
            private.save_state(
                self.run,
                step,
                self.state(step, task, optimizer, random, averages),
                lambda to: self._export(to, step, accelerator.unwrap_model(task)),
                config.keep,
                milestone=config.milestone_every is not None and step % config.milestone_every == 0,
            )
        self.saved = time.monotonic()
        accelerator.wait_for_everyone()

    def state(
        self, step: int, task: torch.nn.Module, optimizer: Any, random: list[dict[str, Any]], averages: list[Any]
    ) -> dict[str, Any]:
        """All that step + 1 depends on, and its line of the log; `random`, `averages`: `random_state()` and
        `Averages.state()` of every process."""
        scaler = self.accelerator.scaler
        return {
            "step": step,
            "identity": identity.stored(self.run, self.parts.config),
            "recipe": self.recipe,
            "begun_from": self.begun_from,
            "version": changes.VERSION,
            "changed": self.changed,
            "fingerprint": self.parts.fingerprint,
            "ages": self.parts.ages,
            "task": self.accelerator.unwrap_model(task).state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": random,
            "averages": averages,
        }

    def _export(self, folder: Path, step: int, task: Pretraining) -> None:
        """Write the backbone to be evaluated, the teacher's or the student's; with export=both the student's beside the
        teacher's."""
        wanted = self.parts.config.export
        first, second = {"both": ("teacher", "student")}.get(wanted, (wanted, None))
        for who, name in ((first, storage.WEIGHTS), (second, storage.STUDENT)):
            if who is None:
                continue
            backbone = task.teacher if who == "teacher" else task.backbone
            assert backbone is not None  # `assemble` has refused a teacher that is not there
            training = self._training(step) | {"exported": who}
            description = public.describe(backbone, task.position, task.pooling, training)
            public.export(folder, backbone, description, name)

    def _refuse_broken(self, step: int, task: Pretraining) -> None:
        """Raises Refusal if a weight is not finite: whoever continues from it would find out much later. Processes hold
        equal weights, so that all judge alike."""
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in task.parameters()])
        if finite.all():
            return
        broken = next(name for (name, _), fine in zip(task.named_parameters(), finite, strict=True) if not fine)
        last = max((self.run / "state").glob("step_*"), default=None)
        raise Refusal(
            f"the weights are not finite after step {step} (such as {broken}): nothing was written; "
            + (
                "there is no earlier checkpoint: begin again with a lower optimizer.lr"
                if last is None
                else f"the last checkpoint, {last}, is intact: begin again with a lower optimizer.lr, perhaps from its "
                f"backbone (model.init={self.run}), or continue from it with --resume {self.run}"
            )
        )

    def _training(self, step: int) -> dict[str, Any]:
        config = self.parts.config
        return {
            "recipe": self.recipe,
            "init": config.model.init,
            "begun_from": self.begun_from or None,
            "changed": self.changed or None,
            **location_of(vars(config)).options(),
            "max_bad": config.max_bad,
            "data_fingerprint": self.parts.fingerprint,
            "objectives": config.objectives,
            "audit": self.parts.audit.verdict,  # "leak" only where the recipe says allow_leak
            "audit_reasons": {name: found.reason for name, found in self.parts.audit.objectives.items()},
            "step": step,
            "steps": self.parts.steps,
            "images_seen": step * config.batch,
            "batch": config.batch,
            "seed": config.seed,
            "precision": config.precision,
            "commit": self.commit,
        }

    def load(self) -> dict[str, Any] | None:
        """The newest whole checkpoint, or None; what was changed at this resume is stored from now on.

        Raises Refusal if its data are not this run's.
        """
        print_ = self.accelerator.print
        folder = private.newest_whole(self.run, lambda line: print_(f"warning: {line}"))
        state = None if folder is None else read_checkpoint(folder)
        name = None
        if folder is not None and state is not None:
            name = identity.refuse_other(folder, state, self.run, self.parts.config)
            if not self.parts.images.has_fingerprint(str(state.get("fingerprint"))):
                raise Refusal(self._other_images(str(state.get("fingerprint"))))
            moved = stored_in(self.run).data != self.parts.config.data
            if not moved and (line := touched(str(state.get("ages", "")), self.parts.ages)):
                print_(f"warning: files at data={self.parts.config.data} {line}")
            self.recipe = str(state.get("recipe", self.recipe))  # not the name of the folder that is resumed
            self.begun_from = str(state.get("begun_from", ""))
            self.changed = str(state.get("changed", ""))
            now = changes.note(changes.version_of(state), state["step"], changed(self.parts))
            if now and state["step"] < self.parts.steps:
                self.changed = "; ".join(filter(None, (self.changed, now)))
                print_(f"warning: {now}; for what it would have become, resume a copy with the version that wrote it")
        if self.accelerator.is_main_process:
            line = f"# run {name}" if name is not None else identity.new_line()  # of runs from before there were names
            store(self.run, self.parts.config, None if identity.name_of(self.run) is not None else line)
        return state

    def _other_images(self, fingerprint: str) -> str:
        """Why images of another `fingerprint` are not those of this run."""
        earlier = ""
        if not fingerprint.startswith(KIND):
            earlier = (
                ". It was begun by an earlier version, which took Train/ and Test/ for classes (data_train=. reads all "
                "of a folder) and read what is linked twice: put copies in the places of links, or begin again"
            )
        return (
            f"--resume {self.run}: the images at data={self.parts.config.data} are not those it began with "
            f"(fingerprint {self.parts.fingerprint}, not {fingerprint}); point data= at the same images (and "
            f"data_train=, data_image=, data_label=, where they say what is read){earlier}"
        )

    def resume(self, task: torch.nn.Module, optimizer: Any) -> int:
        """Go on from the newest whole checkpoint; returns its step, 0 if there is none."""
        state = self.load()
        return 0 if state is None else self.restore(state, task, optimizer)

    def restore(self, state: dict[str, Any], task: torch.nn.Module, optimizer: Any) -> int:
        """Put `state` into the prepared task and optimizer, and the random generators; returns its step."""
        if isinstance(state.get("task"), dict):  # of runs from before it was counted
            state["task"].setdefault("skipped", torch.zeros((), dtype=torch.int64))
        module = self.accelerator.unwrap_model(task)
        return restore(state, module, optimizer, self.averages, self.accelerator, self.parts.steps, self.run / "state")


def changed(parts: Parts) -> list[str]:
    """What this version does otherwise with this run than version 1 would have."""
    config, shared = parts.config, parts.process.num_processes > 1
    said = changes.sample_changes(parts.samples.views)
    sizes = {height_width(view.size) for view in parts.samples.views.values()}
    embedding = getattr(parts.task.backbone.model, "pos_embed", None)
    if len(sizes) > 1 and embedding is not None and parts.task.position != "none":
        said.append("position embeddings are resized to other crops without antialiasing")
    labels = parts.train.labels
    readers = ", ".join(parts.task.labelled)
    partly = readers and labels is not None and bool((labels < 0).any())
    if partly and (shared or config.accumulate > 1):
        said.append(f"labels are counted over the whole step ({readers})")
    for name, objective in parts.task.objectives.items():
        said += [f"{line} ({name})" for line in objective.changed(parts.process.num_processes)]
    return said


def touched(before: str, now: str) -> str:
    """What was done to files whose `Images.ages` were others when the run began; or nothing."""
    (times, _, rest), (times_now, _, rest_now) = before.partition("-"), now.partition("-")
    if times and times_now and times != times_now:
        return "were written or exchanged since the run began, though those whose content was compared are as they were"
    if rest and rest_now and rest != rest_now:
        return (
            "were copied, renamed or exchanged since the run began: sizes and times of change are as they were, and so "
            "is the content of those that were compared"
        )
    return ""


def seed_process(seed: int, process_index: int) -> None:
    """Dropout's generator: one stream per process."""
    torch.manual_seed(seed * 1_000_003 + process_index)
