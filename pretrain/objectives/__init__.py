"""Training signals. One file = one objective; the file's name is its name in a recipe.

An objective says which passes of the backbone it wants (`passes`), what is drawn beside each sample (`draw`), and
turns the features of those passes into a loss and statistics. To add one: write `pretrain/objectives/NAME.py` with a
subclass `Name` of `Objective` that has `Options`; `objectives: {NAME: {...}}` in a recipe then finds it.
"""

import contextlib
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from common.batches.samples import Beside
from common.batches.unreadable import Limit
from common.batches.views import View
from common.config import merge, to_object
from common.data import Images
from common.errors import Refusal, nearest
from common.limits import check
from common.models import Backbone, Features
from common.models.plan import PlanSpec


@dataclass(frozen=True)
class Pass:
    """One run of the backbone that an objective asks for; equal passes of several objectives are run once, and crops of
    one size that are run in the same way are run together."""

    view: str = "global"
    plan: PlanSpec = field(default_factory=PlanSpec)
    grad: bool = True
    hidden_embedding_of: str | None = None  # with position "partial": the objective whose `hidden_position` is shown
    crops: int | None = 1  # the first so many crops of the view; None: all of them, crop after crop
    network: Literal["student", "teacher"] = "student"  # teacher: the one EMA backbone of the run, without gradient
    mask_of: str | None = None  # the objective whose patch mask, and whose `mask_token`, the images are run with

    @property
    def purpose(self) -> str:
        """Name under which its plan is drawn: the same for equal plans, whoever asks."""
        plan = self.plan
        return f"plan {self.view} keep {plan.keep} {plan.position} {plan.position_keep} context {plan.context}"


@dataclass(frozen=True)
class Verdict:
    """Health of an objective in a word or two, and what to try if it is not well."""

    name: str
    advice: str = ""  # empty: nothing to do


class Objective(nn.Module):
    """One training signal: its passes, its heads, its statistics."""

    Options: Any  # a dataclass; filled strictly from the recipe
    options: Any  # an instance of it
    passes: Mapping[str, Pass]  # the names under which it will find its features
    draw: Callable[[np.random.Generator], Mapping[str, np.ndarray]] | None = None  # per sample; picklable
    collate: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None  # of its stacked draws, more; picklable
    progress: float = 0.0  # share of the training that is done
    measured: bool = True  # whether this step's statistics are logged; else only the loss is wanted
    labelled: bool = False  # whether it is told the class of each image: its draw "label" (B,), -1 where there is none
    pools: str = "mean"  # what of the backbone it trains to stand for an image: "mean" patch, or "class" token if any
    crops_seen: str = "all"  # the crops of its view that it looks at: "all", or the "first" of each image
    taught: bool = False  # whether the teacher sees its crops too
    least_images: int = 1  # in each part of a step
    compares: bool = False  # whether its loss compares the images of a part of a step with each other
    head_of: str = ""  # with its option `shared_head`: the objective whose head it uses

    @classmethod
    def views_of(cls, options: Any) -> set[str]:
        """The views that it would look at under `options`; where its weight is 0 they may stay in the recipe."""
        return {options.view}

    def changed(self, processes: int) -> list[str]:
        """Differences of this version, on so many processes, from the one that wrote the first run folders."""
        return []

    def connect(self, others: Mapping[str, "Objective"], views: Mapping[str, View]) -> None:
        """Complete `passes`, share a pass or a head: called once, when every objective of the recipe is made."""

    def beside(self, images: Images, limit: Limit) -> Beside | None:
        """Open what it reads of each of `images` beside its pixels, which it finds among its draws; of so many as
        `limit` allows there may be nothing. Raises Refusal."""
        return None

    def begin_step(self, progress: float, measured: bool) -> None:
        """Forget what a step that was not taken left behind: called before every step."""
        self.progress, self.measured = progress, measured

    def before_update(self) -> None:
        """Withhold gradients, if need be: called between backward and clipping."""

    def after_step(self, momentum: float) -> None:
        """Commit centres and counts: called after a step that was taken, and only then."""

    def teachers(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        """(teacher, student) pairs of modules; after a step that was taken, the task moves the teacher."""
        return ()

    def classifier(self) -> nn.Linear | None:
        """Layer on what stands for an image whose outputs are the classes of the data, if it trains one."""
        return None

    def scores(self, features: Mapping[str, Features]) -> Tensor:
        """Scores of the classes, (B, K), float32, where it has a `classifier`."""
        raise NotImplementedError

    def verdict(self, numbers: Mapping[str, float]) -> Verdict | None:
        """Judge its health by its statistics, averaged over a logged step."""
        return None

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"loss": scalar that is trained on, and statistics: scalars without gradient}."""
        raise NotImplementedError


@dataclass
class Answers:
    """Answers of a positional objective to Q questions an image: patches, or pairs of them."""

    guesses: Tensor  # (B, Q) class it believes in
    labels: Tensor  # (B, Q) right class
    distances: Tensor  # (B, Q) between the two, in patches
    asked: Tensor | None = None  # (B, Q) bool: which of them count; None: all

    @property
    def counted(self) -> Tensor:
        """Which questions count, (B, Q) bool."""
        return torch.ones_like(self.labels, dtype=torch.bool) if self.asked is None else self.asked

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` (B, Q) over the questions that count."""
        return values.float().mean() if self.asked is None else (values * self.asked).sum() / self.asked.sum()

    def without(self, label: int) -> "Answers":
        """The same, where questions with this label do not count."""
        return dataclasses.replace(self, asked=self.counted & (self.labels != label))

    def accuracy(self) -> Tensor:
        """Share of right answers among those that count."""
        return self.mean(self.guesses == self.labels)


class Positional(Objective):
    """An objective that asks where patches are. The audit, the controls and the pictures read it in one way."""

    grid: tuple[int, int]
    chance: float  # accuracy of the best answer that ignores the image
    of_pairs: bool = False  # whether its classes are offsets between patches, not places
    same: float = 0.0  # of pairs: share of those of a patch with itself
    same_label: int = -1  # of pairs: the label of those, which content gives away without any leak

    def prior(self, same: float) -> Tensor:
        """Probability of each class of pairs, (C,), float64, where the share `same` of them is of a patch with itself:
        what whoever ignores the image can know."""
        raise NotImplementedError

    def answers(
        self, features: Mapping[str, Features], draws: Mapping[str, Tensor], origin: Tensor | None = None
    ) -> Answers:
        """Answer. `origin` (B, N): of images whose patches were shuffled, where the patch that lies at each place came
        from; the labels are then those of its old place."""
        raise NotImplementedError


def names() -> list[str]:
    """Objectives that exist: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> type[Objective]:
    """The objective class in the file `name`. Raises Refusal with the nearest names."""
    if name not in names():
        raise Refusal(f"unknown objective {name!r}{nearest(name, names())}; there are: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, name.title().replace("_", ""))


def options(name: str, given: Mapping[str, Any] | None) -> Any:
    """The `Options` of objective `name`, filled strictly. Raises Refusal for an unknown option, or a value of another
    type or outside its range."""
    schema = find(name).Options
    if given is not None and not isinstance(given, Mapping):
        raise Refusal(f"objectives.{name}={given!r}: expected options such as {{weight: 1.0}}")
    made = to_object(merge(OmegaConf.structured(schema), dict(given or {}), f"objectives.{name}", schema), schema)
    check(made, f"objectives.{name}.")
    return made


def build(name: str, options: Any, backbone: Backbone) -> Objective:
    """Objective `name` for the features of `backbone`. Raises Refusal if the two do not go together."""
    if backbone.grid[0] * backbone.grid[1] < 2:
        raise Refusal(
            f"{backbone.config.name} ends with a {backbone.grid[0]}x{backbone.grid[1]} grid on images of "
            f"{backbone.size[0]}x{backbone.size[1]}: one patch has no position to tell; use larger "
            "images or smaller patches"
        )
    for option, value in vars(options).items():
        if isinstance(value, str) and value == "auto":
            raise ValueError(f"objectives.{name}.{option}=auto: options are resolved first (pretrain.automatic)")
    with named(name):
        return find(name)(options, backbone)  # type: ignore[call-arg]


def crops_compared(name: str, options: Any, views: Mapping[str, View]) -> tuple[int, str | None]:
    """(crops of its view, its view of local crops if any) of objective `name`, which compares the crops of an image.
    Raises Refusal where there is nothing to compare."""
    view = options.view
    local = options.local or ("local" if "local" in views and view != "local" else None)
    if local == view:
        raise Refusal(f"objectives.{name}.local={local} is its view as well: local crops are a view of their own")
    count = views[view].count if view in views else 2  # where it is not, the task says so
    if count < 2:
        raise Refusal(
            f"objectives.{name} compares crops of an image, and views.{view}.count={count}: use 2 or more, "
            f"or views.{view}.preset=dino"
        )
    return count, local


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Put the objective's name before a Refusal that does not say whose option it is about."""
    try:
        yield
    except Refusal as refusal:
        if str(refusal).startswith("objectives."):
            raise
        raise Refusal(f"objectives.{name}: {refusal}") from None
