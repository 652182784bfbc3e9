"""What is trained: a backbone and the weighted sum of its objectives."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from common.errors import Refusal
from common.models import Backbone, Features
from common.sampling import Batch, Draw
from common.transforms import View
from pretrain import objectives
from pretrain.objectives import Objective, Pass


class Pretraining(nn.Module):
    """The only trainable module of a run: runs each distinct pass once and hands the features to every objective."""

    def __init__(self, backbone: Backbone, signals: Mapping[str, tuple[float, Objective]]) -> None:
        super().__init__()
        self.backbone = backbone
        self.weights = {name: weight for name, (weight, _) in signals.items()}
        self.objectives = nn.ModuleDict({name: objective for name, (_, objective) in signals.items()})

    def signals(self) -> Iterable[tuple[str, Objective]]:
        """(name, objective) of every objective."""
        return self.objectives.items()  # type: ignore[return-value]

    @property
    def draws(self) -> dict[str, Draw]:
        """What has to be drawn beside each sample, by objective."""
        return {name: objective.draw for name, objective in self.signals() if objective.draw is not None}

    @property
    def position(self) -> str:
        """The position mode that evaluation should use: "full" if any pass trained with it."""
        plans = {want.plan.position for _, objective in self.signals() for want in objective.passes.values()}
        return "full" if "full" in plans else "none"

    def features(self, batch: Batch) -> dict[Pass, Features]:
        """Features of every distinct pass."""
        wanted = dict.fromkeys(want for _, objective in self.signals() for want in objective.passes.values())
        return {want: self.backbone(batch.views[want.view], want.plan) for want in wanted}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": weighted sum, "absolute/loss": ..., "absolute/accuracy": ..., ...}; all but the loss without
        gradient."""
        features = self.features(batch)
        report: dict[str, Tensor] = {}
        total: Any = 0.0
        for name, objective in self.signals():
            own = {key: features[want] for key, want in objective.passes.items()}
            draws = {key.split("/", 1)[1]: value for key, value in batch.draws.items() if key.startswith(f"{name}/")}
            result = objective(own, draws)
            total = total + self.weights[name] * result["loss"]
            report |= {f"{name}/{key}": value.detach() for key, value in result.items()}
        return {"loss": total, **report}


def build(backbone: Backbone, chosen: Mapping[str, Any], views: Mapping[str, View]) -> Pretraining:
    """The task of a recipe, from the options of each objective (see `resolve`).

    Raises Refusal if none has a weight above 0, one asks for a view that is not there, or nobody asks for one.
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
    passes = [want for _, objective in signals.values() for want in objective.passes.values()]
    asked = {want.view for want in passes}
    if missing := asked - views.keys():
        raise Refusal(f"an objective asks for view {missing.pop()!r}, and `views:` has {', '.join(views)}")
    if idle := views.keys() - asked:
        raise Refusal(f"no objective looks at view {idle.pop()!r}: remove it from `views:`, or name it in an objective")
    backbone.fix_positions({want.plan.position for want in passes})
    return Pretraining(backbone, signals)


def resolve(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of every objective in a recipe: {name: Options}. Raises Refusal for unknown names and options."""
    return {name: objectives.options(name, given) for name, given in wanted.items()}
