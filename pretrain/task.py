"""What is trained: a backbone and the weighted sum of its objectives, and the teacher that follows it."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common.batches import mixing
from common.batches.samples import Batch, Collate, Draw
from common.batches.views import View, height_width
from common.errors import Refusal
from common.models import Backbone, Features
from common.training import ema
from common.training.schedules import Schedule
from common.training.task import Task
from pretrain import objectives
from pretrain.monitoring.witness import Witness
from pretrain.objectives import Objective, Pass, Positional

T = TypeVar("T")


class Pretraining(Task):
    """The only trainable module of a run: runs each distinct pass once and hands the features to every objective."""

    skipped: Tensor
    objectives: Mapping[str, Objective]  # an nn.ModuleDict

    def __init__(self, backbone: Backbone, built: dict[str, Objective]) -> None:
        super().__init__()
        self.backbone = backbone
        self.weights: dict[str, float] = {name: objective.options.weight for name, objective in built.items()}
        self.objectives = nn.ModuleDict(built)  # type: ignore[arg-type, assignment]
        self.passes = list(dict.fromkeys(want for objective in built.values() for want in objective.passes.values()))
        self.teacher: Backbone | None = None
        if any(want.network == "teacher" for want in self.passes):
            self.teacher = ema.copy_of(backbone)  # type: ignore[assignment]
        self.momentum = Schedule("constant", 1.0, 1.0)  # of the teachers: who makes the task says which
        self.progress, self.measured = 0.0, True
        self.witness: Witness | None = None
        self.average: Pretraining | None = None  # of all weights, if one is wanted: see `keep_average`
        self.average_momentum = 1.0
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))  # steps that were not taken

    @property
    def views(self) -> set[str]:
        """Names of the views that are looked at."""
        return {want.view for want in self.passes}

    @property
    def positional(self) -> dict[str, Positional]:
        """The objectives that ask where patches are."""
        return {name: objective for name, objective in self.objectives.items() if isinstance(objective, Positional)}

    @property
    def draws(self) -> dict[str, Draw]:
        """Draws beside each sample: the plan of every pass, and what objectives ask for."""
        num_patches = math.prod(self.backbone.grid)
        plans = {want.purpose: want.plan for want in self.passes if not want.plan.whole}
        drawn: dict[str, Draw] = {
            purpose: functools.partial(plan.draw, num_patches=num_patches) for purpose, plan in plans.items()
        }
        return drawn | {
            name: objective.draw for name, objective in self.objectives.items() if objective.draw is not None
        }

    @property
    def labelled(self) -> list[str]:
        """The objectives that read labels."""
        return [name for name, objective in self.objectives.items() if objective.labelled]

    @property
    def collates(self) -> dict[str, Collate]:
        """Computations of objectives on their draws before a batch leaves the loader."""
        return {name: objective.collate for name, objective in self.objectives.items() if objective.collate is not None}

    @property
    def position(self) -> str:
        """The position mode that evaluation should use: "full" if any pass trained with embeddings, were it a part."""
        return "none" if all(want.plan.position == "none" for want in self.passes) else "full"

    @property
    def pooling(self) -> str:
        """Vector that stands for an image: the class token if an objective trains it, else the mean of the patches."""
        trained = any(objective.pools == "class" for objective in self.objectives.values())
        return "class" if trained and self.backbone.num_prefix_tokens else "mean"

    @property
    def classifying(self) -> str | None:
        """The objective with a classifier of the data's classes, if there is one."""
        return next((name for name, each in self.objectives.items() if each.classifier() is not None), None)

    def keep_average(self, momentum: float) -> None:
        """Let a copy of the backbone and of the objective that classifies follow, by this share of itself a step: by
        timm's rule, from the first step on."""
        name = self.classifying
        assert name is not None  # `automatic` has refused an average of what nobody judges
        self.average_momentum = momentum
        self.average = ema.copy_of(Pretraining(self.backbone, {name: self.objectives[name]}))  # type: ignore[assignment]

    def compile_backbones(self) -> None:
        """torch.compile of the backbone and its teacher."""
        # a graph for each resolution, plan and mask, in training and in evaluation: more than the default of 8
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        self.backbone.compile()
        if self.teacher is not None:
            self.teacher.compile()

    def train(self, mode: bool = True) -> "Pretraining":
        """Teachers stay in eval mode: no drop path."""
        super().train(mode)
        for teacher, _ in self.teachers():
            teacher.eval()
        if self.average is not None:
            self.average.eval()
        return self

    def teachers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(teacher, student) of everything that follows by an exponential moving average."""
        if self.teacher is not None:
            yield self.teacher, self.backbone
        for objective in self.objectives.values():
            yield from objective.teachers()

    def begin_step(self, progress: float, measured: bool = True) -> None:
        """Tell every objective which share of the training is done, and whether its statistics are looked at: functions
        of the step alone, so that a resumed run hears the same."""
        self.progress, self.measured = progress, measured
        if self.witness is not None:
            self.witness.begin_step()
        for objective in self.objectives.values():
            objective.begin_step(progress, measured)

    def before_update(self) -> None:
        """Between backward and clipping."""
        if self.witness is not None:
            self.witness.before_update(self)
        for objective in self.objectives.values():
            objective.before_update()

    def after_step(self, taken: bool) -> None:
        """Move the teachers and commit what the objectives counted; a step that was not taken changes nothing."""
        if not taken:
            self.skipped += 1
            return
        momentum = self.momentum.at(self.progress)
        for teacher, student in self.teachers():
            ema.follow(teacher, student, momentum)
        if self.average is not None:
            ema.follow(self.average.backbone, self.backbone, self.average_momentum)
            for name, objective in self.average.objectives.items():
                ema.follow(objective, self.objectives[name], self.average_momentum)
        for objective in self.objectives.values():
            objective.after_step(momentum)

    def features(self, batch: Batch, names: Collection[str] | None = None) -> dict[Pass, Features]:
        """Features of every distinct pass, or of those that the objectives `names` ask for.

        Crops of one size that are run in the same way go through the backbone together.
        """
        passes = self.passes
        if names is not None:
            passes = list(dict.fromkeys(want for name in names for want in self.objectives[name].passes.values()))
        groups: dict[Any, list[Pass]] = {}
        for want in passes:
            # what is drawn belongs to one view
            drawn = want.mask_of or not want.plan.whole or batch.tokens_of(want.view) is not None
            alike = dataclasses.replace(want, view=want.view if drawn else "", crops=None)
            groups.setdefault((alike, batch.views[want.view].shape[-2:]), []).append(want)
        features: dict[Pass, Features] = {}
        for members in groups.values():
            features |= self._run(batch, members)
        return features

    def _run(self, batch: Batch, passes: list[Pass]) -> dict[Pass, Features]:
        """Run the backbone once for passes that differ in their crops alone."""
        B, like = len(batch.index), passes[0]
        counts = {want: len(batch.views[want.view]) if want.crops is None else want.crops * B for want in passes}
        rows: dict[str, int] = {}  # of each view: as many as the pass with most crops of it
        for want, count in counts.items():
            rows[want.view] = max(rows.get(want.view, 0), count)
        parts = [batch.views[view][:count] for view, count in rows.items()]
        images = parts[0] if len(parts) == 1 else torch.cat(parts)
        hidden: Any = None
        if like.hidden_embedding_of is not None:
            hidden = self.objectives[like.hidden_embedding_of].hidden_position
        masked: Any = None
        if like.mask_of is not None:
            masks = batch.draws[f"{like.mask_of}/masked"].transpose(0, 1).flatten(0, 1)  # (B, crops, N): crop-major
            masked = masks[: len(images)], self.objectives[like.mask_of].mask_token
        backbone: Any = self.teacher if like.network == "teacher" else self.backbone
        with contextlib.nullcontext() if like.grad else torch.no_grad():
            plan = like.plan.plan(of_purpose(batch.draws, like.purpose))
            features = backbone(images, plan, hidden, masked, batch.tokens_of(like.view))
        first = dict(zip(rows, itertools.accumulate(rows.values(), initial=0), strict=False))
        return {want: _rows(features, first[want.view], count) for want, count in counts.items()}

    def inputs(self, name: str, batch: Batch, features: Mapping[Pass, Features]) -> tuple[dict, dict]:
        """Arguments of objective `name`: its features and its draws."""
        objective, draws = self.objectives[name], of_purpose(batch.draws, name)
        view: Any = objective.options.view if objective.labelled else None
        own = {key: features[want] for key, want in objective.passes.items()}
        if mixtures := batch.mixtures.get(view):
            grid = next(iter(own.values())).grid
            draws["shares"] = mixing.shares(mixtures, len(batch.index), grid).to(draws["label"].device)
        return own, draws

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": weighted sum, "absolute/loss": ..., "absolute/accuracy": ..., ...}; all but the loss without
        gradient."""
        batch = batch.mixed()
        return self.judge(batch, self.features(batch))

    def judge(self, batch: Batch, features: Mapping[Pass, Features]) -> dict[str, Tensor]:
        """Do as `forward`, with features that are computed already."""
        report: dict[str, Tensor] = {}
        total: Any = 0.0
        if self.teacher is not None and self.measured:
            report["teacher_momentum"] = torch.tensor(self.momentum.at(self.progress))
        for name, objective in self.objectives.items():
            result = objective(*self.inputs(name, batch, features))
            total = total + self.weights[name] * result["loss"]
            report |= {f"{name}/{key}": value.detach() for key, value in result.items()}
        return {"loss": total, **report}


def of_purpose(values: Mapping[str, T], purpose: str) -> dict[str, T]:
    """Values named "PURPOSE/what", by what they are."""
    start = f"{purpose}/"
    return {name[len(start) :]: value for name, value in values.items() if name.startswith(start)}


def _rows(features: Features, first: int, count: int) -> Features:
    """Features of `count` images from `first` on; the very same if that is all."""
    if first == 0 and count == len(features.tokens):
        return features
    rows = slice(first, first + count)
    return dataclasses.replace(features, tokens=features.tokens[rows], prefix=features.prefix[rows])


def build(backbone: Backbone, chosen: Mapping[str, Any], views: Mapping[str, View]) -> Pretraining:
    """The task of a recipe, from the options of each objective (see `resolve`).

    Raises Refusal if none has a weight above 0, one asks for a view that is not there, or nobody asks for one, and
    where the backbone cannot run under an objective's plan or on images of a view's size.
    """
    built = {name: objectives.build(name, options, backbone) for name, options in chosen.items() if options.weight > 0}
    left_out = (objectives.find(name).views_of(options) for name, options in chosen.items() if name not in built)
    exempt_views = {"global"}.union(*left_out)  # global sets the backbone's size, looked at or not
    if not built:
        known = ", ".join(objectives.names())
        raise Refusal(f"no objective to train: add one to `objectives:` ({known}) with a weight above 0")
    for objective in built.values():
        objective.connect(built, views)
    asked = {want.view: want for objective in built.values() for want in objective.passes.values()}
    if missing := asked.keys() - views.keys():
        raise Refusal(f"an objective asks for view {missing.pop()!r}, and `views:` has {', '.join(views)}")
    if unused_views := views.keys() - asked.keys() - exempt_views:
        raise Refusal(
            f"no objective looks at view {unused_views.pop()!r}: remove it from `views:`, or name it in an objective"
        )
    _check_passes(backbone, built, views)
    backbone.use_plans({want.plan for objective in built.values() for want in objective.passes.values()})
    return Pretraining(backbone, built)  # last: its teacher is a copy of the prepared backbone


def _check_passes(backbone: Backbone, built: Mapping[str, Objective], views: Mapping[str, View]) -> None:
    """Raises Refusal for a pass that cannot be run."""
    for name, objective in built.items():
        for want in objective.passes.values():
            size = height_width(views[want.view].size)
            if isinstance(objective, Positional) and size != backbone.size:
                raise Refusal(
                    f"objectives.{name}.view={want.view} is {size[0]}x{size[1]}, and labels are places in the grid of "
                    f"views.global, {backbone.size[0]}x{backbone.size[1]}: give both one size"
                )
            if want.crops is not None and want.crops > views[want.view].count:
                raise Refusal(
                    f"objectives.{name} looks at {want.crops} crops of view {want.view}, which has "
                    f"{views[want.view].count}: set views.{want.view}.count"
                )
            if views[want.view].mix_token > 0 and not (backbone.takes_mixture and want.plan.keep == 1):
                raise Refusal(
                    f"views.{want.view}.mix_token exchanges patches of whole grids of a ViT, LV-ViT or SP-ViT, and "
                    f"objectives.{name} runs {backbone.config.name} with keep={want.plan.keep:g}: use cutmix, or give "
                    "the objective a view of its own"
                )
            if want.crops != 1 and not want.plan.whole:
                raise ValueError(f"{name}: plans are drawn for one crop of an image, and {want} has several")
            if size != backbone.size and (reason := backbone.why_not(size)):
                raise Refusal(
                    f"objectives.{name} looks at view {want.view}, {size[0]}x{size[1]}, and model "
                    f"{backbone.config.name!r}, built for {backbone.size[0]}x{backbone.size[1]}, refuses that size "
                    f"({reason}): {_remedy(backbone)}, choose views.{want.view}.size, or remove the view"
                )


def _remedy(backbone: Backbone) -> str:
    if backbone.plain and not backbone.config.kwargs.get("dynamic_img_size"):
        return "set model.kwargs.dynamic_img_size=true"
    if "swin" in backbone.config.name and backbone.config.kwargs.get("strict_img_size", True):
        return "set model.kwargs.strict_img_size=false"
    return "use a plain ViT with model.kwargs.dynamic_img_size=true"


def resolve(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of every objective in a recipe: {name: Options}. Raises Refusal for unknown names and options."""
    return {name: objectives.options(name, given) for name, given in wanted.items()}
