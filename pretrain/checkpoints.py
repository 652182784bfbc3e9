"""A run's checkpoints: what is stored beside the weights, which run a state belongs to, and how one goes on from it.

RUN/config.yaml                 every option, and the run's name, drawn at its birth
RUN/state/step_00000100/        checkpoints
RUN/flight/step_00000122/       checkpoints too: what step 123 began with, which was not finite
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf

from common import commands
from common import config as configuration
from common.batches.views import height_width
from common.checkpoints import changes, private, public, storage
from common.checkpoints.run_folder import CONFIG, commit
from common.data.images import KIND
from common.data.location import location_of
from common.errors import Refusal
from common.training.checkpoints import Checkpoints
from pretrain.assemble import Parts
from pretrain.config import MAY_GROW, SAME_PIXELS, PretrainConfig, may_change, store, stored_in
from pretrain.streaming.reading import Stream
from pretrain.task import Pretraining

FLIGHT = "flight"
MOST = 3  # bad steps of a run of which is kept what they began with: each as large as a checkpoint
NAME = re.compile(r"^# run ([0-9a-f]{16})$", re.MULTILINE)  # in config.yaml: it stays with a folder that is moved
NAMED = 5  # options that a refusal names


class PretrainCheckpoints(Checkpoints):
    """The checkpoints of a run of pretraining."""

    def __init__(self, run: Path, parts: Parts, accelerator: Accelerator, recipe: str) -> None:
        super().__init__(run, parts.config, accelerator)
        self.parts, self.config, self.recipe = parts, parts.config, recipe
        self.begun_from = parts.init  # what was done to the weights of model.init, which a resume does not load
        self.changed = ""  # where another version went on, and what it does otherwise
        self.commit = commit()
        self.name: str | None = None  # of the run that wrote what is resumed
        self.best: float | None = None  # share that the best classifier got right; None: not read from its file yet
        self.left = MOST - len(list((run / FLIGHT).glob("step_*")))

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of `step` is kept for good."""
        return self.config.milestone_every is not None and step % self.config.milestone_every == 0

    def save(self, step: int, task: torch.nn.Module, optimizer: Any, sync: Callable[[], None]) -> None:
        """Store everything that step + 1 depends on, with the backbone for evaluation. Raises Refusal, in all
        processes, for weights that are not finite: whoever continues from them would find out much later."""
        broken = not_finite(self.accelerator.unwrap_model(task))
        if broken is not None:
            last = max((self.folder / "state").glob("step_*"), default=None)
            raise Refusal(
                f"the weights are not finite after step {step} (such as {broken}): nothing was written; "
                + (
                    "there is no earlier checkpoint: begin again with a lower optimizer.lr"
                    if last is None
                    else f"the last checkpoint, {last}, is intact: begin again with a lower optimizer.lr, perhaps from "
                    f"its backbone (model.init={self.folder}), or continue from it with --resume {self.folder}"
                )
            )
        super().save(step, task, optimizer, sync)

    def facts(self) -> dict[str, Any]:
        """Return what a state says of its run."""
        return {
            "identity": {"run": name_of(self.folder), "options": json.dumps(learned(self.config))},
            "recipe": self.recipe,
            "begun_from": self.begun_from,
            "changed": self.changed,
            "fingerprint": self.parts.fingerprint,
            "ages": self.parts.ages,
            "steps": self.parts.steps,
        }

    def own(self, step: int) -> dict[str, Any]:
        """Return the position of this process in a stream behind `step`, where one is trained on, and its shards."""
        stream = self.parts.stream
        if stream is None:
            return {}
        return {"position": stream.positions.get(step, stream.begin_at).stored(), "shards": stream.source.num_shards}

    def accept(self, folder: Path, state: dict[str, Any]) -> None:
        """Take over what a state says of its run. Raises Refusal if that is another, or has other images."""
        print_, config = self.accelerator.print, self.config
        self.name = refuse_other(folder, state, self.folder, config)
        if not self.parts.images.has_fingerprint(str(state.get("fingerprint"))):
            raise Refusal(self._other_images(str(state.get("fingerprint"))))
        if self.parts.stream is not None:
            self._go_on(self.parts.stream, state)
        moved = stored_in(self.folder).data != config.data
        if not moved and (line := touched(str(state.get("ages", "")), self.parts.ages)):
            print_(f"warning: files at data={config.data} {line}")
        self.recipe = str(state.get("recipe", self.recipe))  # not the name of the folder that is resumed
        self.begun_from = str(state.get("begun_from", ""))
        self.changed = str(state.get("changed", ""))
        now = changes.note(changes.version_of(state), state["step"], changed(self.parts))
        if now and state["step"] < self.parts.steps:
            self.changed = "; ".join(filter(None, (self.changed, now)))
            print_(f"warning: {now}; for what it would have become, resume a copy with the version that wrote it")
        if isinstance(state.get("task"), dict):  # of runs from before it was counted
            state["task"].setdefault("skipped", torch.zeros((), dtype=torch.int64))

    def _go_on(self, stream: Stream, state: dict[str, Any]) -> None:
        """Let a stream begin where this process was. Raises Refusal for another number of processes or shards."""
        own = state["own"]
        if len(own) != stream.processes:
            raise Refusal(
                f"--resume {self.folder}: its stream was shared by {len(own)} processes, each with a position of its "
                f"own, and here are {stream.processes}: expected as many as before"
            )
        mine, shards = own[stream.rank], stream.source.num_shards
        if mine.get("shards", shards) != shards:
            raise Refusal(
                f"--resume {self.folder}: its stream has {mine['shards']:,} shards, ordered by their number, "
                f"and data={self.config.data} has {shards:,}: expected the same"
            )
        stream.go_on(state["step"], mine["position"])

    def resume(self, task: torch.nn.Module, optimizer: Any, steps: int) -> int:
        """Go on from the newest whole checkpoint; returns its step, 0 if there is none. What was changed at this resume
        is stored from now on."""
        step = super().resume(task, optimizer, steps)
        if self.accelerator.is_main_process:
            line = f"# run {self.name}" if self.name is not None else new_name()  # of runs from before there were names
            store(self.folder, self.config, None if name_of(self.folder) is not None else line)
        return step

    def export(self, folder: Path, task: Pretraining, step: int) -> None:
        """Write the backbone to be evaluated, the teacher's, the student's or the average's, with its classifier if
        labels trained one; with export=both the student's beside the teacher's."""
        wanted = self.config.export
        first, second = {"both": ("teacher", "student")}.get(wanted, (wanted, None))
        self._write(folder, task, step, first, storage.WEIGHTS, storage.HEAD)
        if second is not None:
            self._write(folder, task, step, second, storage.STUDENT, None)

    def _write(
        self, folder: Path, task: Pretraining, step: int, who: str, name: str, head: str | None, **more: Any
    ) -> None:
        """Write one backbone as `name` and, as `head`, the classifier on top of it; a teacher has none."""
        holder = task.average if who == "average" else task
        assert holder is not None
        backbone = task.teacher if who == "teacher" else holder.backbone
        assert backbone is not None  # `automatic` has refused a teacher, or an average, that is not there
        training, pooling = self._training(step) | {"exported": who} | more, task.pooling
        if head is not None and who != "teacher" and holder.classifying is not None:
            objective = holder.objectives[holder.classifying]
            layer = objective.classifier()
            assert layer is not None
            names = list(self.parts.images.classes or ())
            names += [str(label) for label in range(len(names), layer.out_features)]
            training |= {"label_names": names, "head_sha256": public.write_weights(folder / head, layer)}
            pooling = objective.pools
        public.export(folder, backbone, public.describe(backbone, task.position, pooling, training), name)

    def keep_best(self, task: Pretraining, step: int, share: float) -> bool:
        """Write the backbone and its classifier as the best ones, if they are: `share` of the judged images are right.
        The first process calls it."""
        if self.best is None:
            try:
                self.best = public.read_description(self.folder / storage.BEST)["training"]["right"]
            except (Refusal, KeyError):  # none yet, or a process was killed between two of its files
                self.best = -1.0
        if share <= self.best:
            return False
        who = "average" if task.average is not None else "student"
        self._write(self.folder, task, step, who, storage.BEST, storage.BEST_HEAD, right=share)
        self.best = share
        return True

    def _training(self, step: int) -> dict[str, Any]:
        config = self.config
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

    def keep_state(self, step: int, state: Callable[[], dict[str, Any]], task: Pretraining) -> str:
        """Keep the state before a bad step as a checkpoint under flight/, from which it can be taken again; returns
        what to say of it. A full disk is told and borne."""
        parent = self.folder / FLIGHT
        folder = parent / f"step_{step - 1:08d}"
        if folder.exists():
            return f"it was kept before: {self.repetition(folder, step)}"
        if (broken := not_finite(task)) is not None:
            return f"the weights were not finite before it (such as {broken}), and are not kept"
        if self.left < 1:
            return f"what it began with is not kept: there are {MOST} such checkpoints in {parent}"
        self.left -= 1  # also if it fails: a disk does not become empty
        try:
            private.write_checkpoint(parent, step - 1, state(), lambda to: self.export(to, task, step - 1))
        except OSError as error:
            return f"warning: what it began with could not be written to {parent}: {error}"
        return f"to take it again: {self.repetition(folder, step)}"

    def repetition(self, folder: Path, step: int) -> str:
        """What to type to take `step` again from the checkpoint before it."""
        processes = self.accelerator.num_processes
        words = ("--resume", folder, f"steps={step}", "diagnose=true")
        return commands.command("pretrain", *words, processes=processes)

    def seen(self) -> str:
        """Return what this process saw of the step that is not finite."""
        return self.parts.task.witness.seen() if self.parts.task.witness is not None else ""

    def _other_images(self, fingerprint: str) -> str:
        """Why images of another `fingerprint` are not those of this run."""
        earlier = ""
        if not fingerprint.startswith(KIND):
            earlier = (
                ". It was begun by an earlier version, which took Train/ and Test/ for classes (data_train=. reads all "
                "of a folder) and read what is linked twice: put copies in the places of links, or begin again"
            )
        return (
            f"--resume {self.folder}: the images at data={self.config.data} are not those it began with "
            f"(fingerprint {self.parts.fingerprint}, not {fingerprint}); point data= at the same images (and "
            f"data_train=, data_image=, data_label=, where they say what is read){earlier}"
        )


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


def not_finite(task: torch.nn.Module) -> str | None:
    """The name of a parameter that is not finite, if there is one. Processes hold equal weights, so all judge alike."""
    finite = torch.stack([parameter.detach().isfinite().all() for parameter in task.parameters()])
    if finite.all():
        return None
    return next(name for (name, _), fine in zip(task.named_parameters(), finite, strict=True) if not fine)


def new_name() -> str:
    """The line of config.yaml that names a new run."""
    return f"# run {secrets.token_hex(8)}"


def name_of(run: Path) -> str | None:
    """The name in a run's config.yaml; None for runs from before there was one."""
    match = NAME.search((run / CONFIG).read_text(errors="replace", encoding="utf-8"))
    return match.group(1) if match else None


def learned(config: PretrainConfig) -> dict[str, Any]:
    """The options that decide what is learned, as {dotted key: value}, in JSON's types."""
    whole = configuration.flat(OmegaConf.to_container(OmegaConf.structured(config)))
    kept = {name: value for name, value in whole.items() if not may_change(name) and name not in MAY_GROW}
    kept |= {name: values[0] for name, values in SAME_PIXELS.items() if kept[name] in values}
    return json.loads(json.dumps(kept, default=str))


def refuse_other(folder: Path, state: Mapping[str, Any], run: Path, config: PretrainConfig) -> str | None:
    """The name of the run that wrote the checkpoint in `folder`, whose content is `state`; None if it does not say.

    Raises Refusal if that is another run than `run`. A state from before there were names is asked what its backbone's
    description says: seed, batch and objectives.
    """
    about = state.get("identity")
    try:
        if about is None:
            training = json.loads((folder / storage.DESCRIPTION).read_text(encoding="utf-8"))["training"]
            theirs = {name: training[name] for name in ("seed", "batch", "objectives") if name in training}
            name = None
        else:
            theirs, name = json.loads(about["options"]), about["run"]
        theirs = configuration.flat(theirs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{folder} does not say which run it is of ({type(error).__name__}): {_help(run)}") from None
    mine, here = learned(config), name_of(run)
    differ = [f"{key}={theirs[key]}, here {mine[key]}" for key in sorted(mine.keys() & theirs.keys())
              if theirs[key] not in (mine[key], "auto")]  # fmt: skip  # auto: it was resolved later, where it was used
    if differ:
        more = f" and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
        raise Refusal(f"{folder} is of another run, with {'; '.join(differ[:NAMED])}{more}: {_help(run)}")
    if None not in (name, here) and name != here:
        raise Refusal(f"{folder} is of another run, {name} (config.yaml of this one says {here}): {_help(run)}")
    return name


def _help(run: Path) -> str:
    return (
        f"put back the state/ that {run} had, with its config.yaml; or resume the folder that the state came from; to "
        "begin from another run's weights there is model.init=RUN"
    )
