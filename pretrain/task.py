"""What is trained: a backbone and the weighted sum of its objectives."""

import contextlib
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import Refusal
from common.models import Backbone, Features
from common.sampling import Batch, Draw
from common.transforms import View, height_width
from pretrain import objectives
from pretrain.objectives import Objective, Pass, Positional


class Pretraining(nn.Module):
    """The only trainable module of a run: runs each distinct pass once and hands the features to every objective."""

    def __init__(self, backbone: Backbone, signals: Mapping[str, tuple[float, Objective]]) -> None:
        super().__init__()
        self.backbone = backbone
        self.weights = {name: weight for name, (weight, _) in signals.items()}
        self.objectives = nn.ModuleDict({name: objective for name, (_, objective) in signals.items()})
        wanted = (want for _, objective in signals.values() for want in objective.passes.values())
        self.passes = list(dict.fromkeys(wanted))

    def signals(self) -> Iterable[tuple[str, Objective]]:
        """(name, objective) of every objective."""
        return self.objectives.items()  # type: ignore[return-value]

    @property
    def positional(self) -> dict[str, Positional]:
        """The objectives that ask where patches are."""
        return {name: objective for name, objective in self.signals() if isinstance(objective, Positional)}

    @property
    def draws(self) -> dict[str, Draw]:
        """What has to be drawn beside each sample: the plan of every pass, and what objectives ask for."""
        num_patches = math.prod(self.backbone.grid)
        plans = {want.purpose: want.plan for want in self.passes if not want.plan.whole}
        drawn: dict[str, Draw] = {
            purpose: functools.partial(plan.draw, num_patches=num_patches) for purpose, plan in plans.items()
        }
        return drawn | {name: objective.draw for name, objective in self.signals() if objective.draw is not None}

    @property
    def position(self) -> str:
        """The position mode that evaluation should use: "full" if any pass trained with embeddings, were it a part."""
        return "none" if all(want.plan.position == "none" for want in self.passes) else "full"

    def begin_step(self, progress: float) -> None:
        """Tell every objective which share of the training is done: a function of the step alone, so that a resumed run
        hears the same."""
        for _, objective in self.signals():
            objective.progress = progress

    def features(self, batch: Batch) -> dict[Pass, Features]:
        """Features of every distinct pass."""
        found = {}
        for want in self.passes:
            plan = want.plan.plan(_of(batch.draws, want.purpose))
            hidden: Any = None if want.hidden is None else self.objectives[want.hidden].hidden_position
            with contextlib.nullcontext() if want.grad else torch.no_grad():
                found[want] = self.backbone(batch.views[want.view], plan, hidden)
        return found

    def inputs(self, name: str, batch: Batch, features: Mapping[Pass, Features]) -> tuple[dict, dict]:
        """What objective `name` is called with: its features and its draws."""
        passes: Mapping[str, Pass] = self.objectives[name].passes  # type: ignore[assignment]
        return {key: features[want] for key, want in passes.items()}, _of(batch.draws, name)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": weighted sum, "absolute/loss": ..., "absolute/accuracy": ..., ...}; all but the loss without
        gradient."""
        return self.judge(batch, self.features(batch))

    def judge(self, batch: Batch, features: Mapping[Pass, Features]) -> dict[str, Tensor]:
        """What `forward` returns, of features that are there already."""
        report: dict[str, Tensor] = {}
        total: Any = 0.0
        for name, objective in self.signals():
            result = objective(*self.inputs(name, batch, features))
            total = total + self.weights[name] * result["loss"]
            report |= {f"{name}/{key}": value.detach() for key, value in result.items()}
        return {"loss": total, **report}


def _of(draws: Mapping[str, Tensor], purpose: str) -> dict[str, Tensor]:
    start = f"{purpose}/"
    return {name[len(start) :]: value for name, value in draws.items() if name.startswith(start)}


def build(backbone: Backbone, chosen: Mapping[str, Any], views: Mapping[str, View]) -> Pretraining:
    """The task of a recipe, from the options of each objective (see `resolve`).

    Raises Refusal if none has a weight above 0, one asks for a view that is not there, or nobody asks for one, and
    where the backbone cannot run under an objective's plan.
    """
    signals: dict[str, tuple[float, Objective]] = {}
    for name, options in chosen.items():
        if not 0 <= options.weight < math.inf:
            raise Refusal(f"objectives.{name}.weight={options.weight}: expected a finite number, 0 or more")
        if options.weight > 0:
            signals[name] = (options.weight, objectives.build(name, options, backbone))
    if not signals:
        there = ", ".join(objectives.names())
        raise Refusal(f"no objective to train: add one to `objectives:` ({there}) with a weight above 0")
    task = Pretraining(backbone, signals)
    asked = {want.view for want in task.passes}
    if missing := asked - views.keys():
        raise Refusal(f"an objective asks for view {missing.pop()!r}, and `views:` has {', '.join(views)}")
    if idle := views.keys() - asked:
        raise Refusal(f"no objective looks at view {idle.pop()!r}: remove it from `views:`, or name it in an objective")
    for name, objective in task.positional.items():
        for want in objective.passes.values():
            if (size := height_width(views[want.view].size)) != backbone.size:
                raise Refusal(
                    f"objectives.{name}.view={want.view} is {size[0]}x{size[1]}, and labels are places in the grid of "
                    f"views.global, {backbone.size[0]}x{backbone.size[1]}: give both one size"
                )
    backbone.prepare({want.plan for want in task.passes})
    return task


def resolve(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of every objective in a recipe: {name: Options}. Raises Refusal for unknown names and options."""
    return {name: objectives.options(name, given) for name, given in wanted.items()}
