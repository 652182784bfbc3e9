"""Where automatic options get their values: every `auto`, null and time such as "10 epochs", here and only here.

A value that is given wins. The rules say what they were made from: what the authors tuned on 1.28 million images does
not suit ten thousand. What has to be measured (precision, attention, the monitors' pace) is a `Settled` with more
values, made where it is measured.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from common.batches.sampler import StepSampler
from common.batches.views import View, height_width
from common.errors import Refusal, nearest
from common.limits import Range, expected
from common.models.plan import PlanSpec
from common.training import schedules
from common.training.ema import half_life
from pretrain import objectives
from pretrain.config import PretrainConfig, host_alone
from pretrain.task import resolve as options_of

AUTO = "auto"

# Prototypes: LightlyTrain has 1,024 up to 20,000 images and 65,536 above 500,000; DINO 65,536 on 1.28 million. One for
# every 16 to 20 images joins these points.
IMAGES_PER_PROTOTYPE = 16
PROTOTYPES = (64, 65_536)

# Teacher temperature at the end, by images: DINO's plain 0.04 on small data, its 0.07 on large. LightlyTrain goes down
# to 0.02 on small data; here a small ViT with 512 prototypes then gave all images two of them.
TEMPERATURES = ((20_000, 0.04), (500_000, 0.07))
FIRST_TEMPERATURE = 0.04  # DINO's
TEMPERATURE_EPOCHS, TEMPERATURE_MOST = 30, 0.3  # DINO's; LightlyTrain's cap

# Teacher momentum: DINO's 0.996 at batch 1024 has a half-life of 177,000 images, a seventh of ImageNet. The bounds are
# LightlyTrain's 0.99 on small data, and what DINO advises for small batches.
HALF_LIFE_EPOCHS = 1 / 7
MOMENTA = (0.99, 0.9995)

WARMUP_EPOCHS, WARMUP_MOST, WARMUP_REPAIRED = 10, 0.1, 0.3  # DINO's; caps as LightlyTrain has them
FREEZE_EPOCHS, FREEZE_MOST = 1, 0.1  # DINO's


@dataclass(frozen=True)
class Labels:
    """Knowledge of the labels of all images, those held out included."""

    where: str  # the images, in words
    classes: int
    images: int
    unlabelled: int = 0


@dataclass(frozen=True)
class Facts:
    """Facts that the rules start from, beside the options."""

    images: int  # to train on
    grid: tuple[int, int]  # of the backbone's patches
    class_token: bool  # whether the backbone has one
    labels: Labels | None = None  # where an objective reads them
    processes: int = 1
    cores: int = 1  # that this machine's processes may use
    threads: tuple[int, str] = (1, "given")  # of torch in each process, and where the number came from
    device: str = "cpu"  # that is trained on: its type
    lower_batch: bool = False  # whether a batch that is larger than the images becomes as large: nobody typed it


@dataclass(frozen=True)
class Settled:
    """Options without anything automatic."""

    options: PretrainConfig
    reasons: dict[str, str] = field(default_factory=dict)  # automatic value -> the rule it came from
    notes: list[str] = field(default_factory=list)  # what was repaired, and what looks unwise

    def having(self, values: Mapping[str, Any], reasons: Mapping[str, str]) -> "Settled":
        """The same with further values, {dotted name: value}, and their reasons."""
        return Settled(replaced(self.options, values), {**self.reasons, **reasons}, self.notes)


def replaced(options: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a dataclass with other `values`, {dotted name: value}; no part of `options` itself is changed."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        groups.setdefault(first, {})[rest] = value
    changes = {
        name: inner[""] if "" in inner else replaced(getattr(options, name), inner) for name, inner in groups.items()
    }
    return dataclasses.replace(options, **changes)


@dataclass
class _Rules:
    """Length of a run, and what the rules said on the way."""

    images: int
    batch: int
    steps: int
    per_epoch: int
    reasons: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def epochs(self) -> float:
        return self.steps / self.per_epoch

    def share(self, time: Any, where: str, repaired: float) -> float:
        """A time as a share of the training; `repaired`, and a note, where it is longer."""
        share, note = schedules.share(time, self.steps, self.per_epoch, where, instead=repaired)
        self.notes += [note] if note else []
        return share


def _batch(config: PretrainConfig, facts: Facts, values: dict[str, Any], reasons: dict[str, str]) -> int:
    """Return the images of a step, lowered, in `values`, to what few images fill. Raises Refusal where images are mixed
    in pairs and some would have no partner."""
    mixed = [name for name, view in config.views.items() if view.is_mixed]
    unit, batch = facts.processes * config.accumulate * (2 if mixed else 1), config.batch
    if facts.lower_batch and batch > facts.images >= unit:  # the learning rate follows by optimizer.scaling
        reasons["batch"] = f"there are {facts.images:,} images to train on, fewer than the recipe's {batch:,}"
        batch = values["batch"] = facts.images // unit * unit
    if mixed and batch % unit:
        raise Refusal(
            f"views.{mixed[0]} mixes images in pairs (mixup, CutMix, MixToken), and batch={batch} shared by "
            f"{facts.processes} processes x {config.accumulate} accumulation steps leaves some without a partner: "
            f"choose a multiple of {unit}"
        )
    return batch


def _export(
    config: PretrainConfig, chosen: Mapping[str, Any], facts: Facts, has_teacher: bool, reasons: dict[str, str]
) -> str:
    """Return which backbone is exported. Raises Refusal for what is not there."""
    if facts.labels is None:
        for option, wanted in (("average", config.average), ("monitor.validation", config.monitor.validation == "val")):
            if wanted:
                raise Refusal(f"{option} is for recipes that train a classifier: no objective of this one reads labels")
    if config.export == "auto":
        if config.average is not None:
            reasons["export"] = "the average of the weights is the better classifier"
            return "average"
        reasons["export"] = "its features are the better ones" if has_teacher else "no objective has a teacher"
        return "teacher" if has_teacher else "student"
    if config.export == "average" and config.average is None:
        raise Refusal("export=average: no average is kept; set average=0.9999 or the like, or export=student")
    if config.export in ("teacher", "both") and not has_teacher:
        trained = [name for name, options in chosen.items() if options.weight > 0]
        taught = [name for name in objectives.names() if objectives.find(name).taught]
        raise Refusal(
            f"export={config.export}: this run has no teacher, as none of its objectives ({', '.join(trained)}) "
            f"compares with one; use export=student, or add {' or '.join(taught)}"
        )
    return config.export


def resolve(config: PretrainConfig, facts: Facts) -> Settled:
    """Replace everything automatic in `config`, but for what must be measured, by a value. A pure function: nothing it
    is given changes, and resolving what was resolved changes nothing. Raises Refusal for what cannot be.
    """
    chosen, reasons = suited(options_of(config.objectives), facts.grid, facts.class_token)
    threads, source = facts.threads
    values: dict[str, Any] = {"threads": threads}
    reasons["threads"] = source
    values["views"], why_patches = patched(config.views, facts.grid)
    reasons |= why_patches
    batch = _batch(config, facts, values, reasons)
    per_epoch = StepSampler(
        facts.images, batch, config.seed, 1, processes=facts.processes, accumulate=config.accumulate
    ).per_epoch
    steps = config.steps or max(1, math.ceil((config.epochs or 0) * per_epoch))
    if config.steps is None:
        reasons["steps"] = f"{config.epochs:g} epochs of {per_epoch} steps"
        values["steps"] = steps
    elif config.epochs is not None:
        reasons["epochs"] = f"steps={config.steps} goes before epochs={config.epochs:g}"
        values["epochs"] = None

    rules = _Rules(facts.images, batch, steps, per_epoch, reasons)
    has_teacher = any(objectives.find(name).taught and options.weight > 0 for name, options in chosen.items())
    optimizer, teacher = config.optimizer, config.teacher
    warmup = WARMUP_EPOCHS, WARMUP_MOST, WARMUP_REPAIRED
    values["optimizer.warmup"] = _time(optimizer.warmup, "optimizer.warmup", *warmup, rules)
    values["optimizer.weight_decay"] = _schedule(
        optimizer.weight_decay, "optimizer.weight_decay", Range(at_least=0), rules
    )
    values["teacher.momentum"] = _momentum(teacher.momentum, teacher.half_life, rules, has_teacher)
    values["teacher.half_life"] = None  # said by the momentum from here on
    _refuse_lonely(dataclasses.replace(config, batch=batch), chosen, facts.processes)
    for name, options in sorted(chosen.items(), key=lambda item: getattr(item[1], "shared_head", False)):
        owner = objectives.find(name).head_of if getattr(options, "shared_head", False) else ""
        settled = _settled(f"objectives.{name}", options, owner, chosen.get(owner), rules)
        chosen[name] = dataclasses.replace(options, **settled, **_classes(name, options, facts.labels, rules))
    values["objectives"] = {name: dataclasses.asdict(options) for name, options in chosen.items()}

    values["export"] = _export(config, chosen, facts, has_teacher, reasons)
    if config.augment == "auto":
        why = host_alone(config.views)
        values["augment"] = "device" if facts.device == "cuda" and not why else "host"
        if facts.device == "cuda":
            reasons["augment"] = why or "a GPU makes the crops of a batch together"
    elif config.augment == "device" and facts.device == "mps":
        raise Refusal("augment=device computes weights in float64, which mps has not; use augment=host (or auto)")
    if config.loader.workers is None:
        cores = facts.cores // facts.processes
        values["loader.workers"] = max(1, min(8, cores - 1))
        reasons["loader.workers"] = f"{cores} usable cores per process, one of them for training"
    return Settled(replaced(config, values), reasons, rules.notes)


def prototypes_for(images: int) -> int:
    """Prototypes that suit so many images: the power of two nearest (in ratio) to a sixteenth of them, bounded."""
    least, most = PROTOTYPES
    return min(most, max(least, 2 ** round(math.log2(images / IMAGES_PER_PROTOTYPE))))


def temperature_for(images: int) -> float:
    """Teacher temperature, at the end, that suits so many images: linear in their logarithm between two bounds."""
    (few, low), (many, high) = TEMPERATURES
    done = (math.log(images) - math.log(few)) / (math.log(many) - math.log(few))
    return round(low + (high - low) * min(1.0, max(0.0, done)), 3)


def momentum_for(images: int, batch: int) -> float:
    """Teacher momentum, at the start, whose half-life is a seventh of an epoch, within bounds; to six digits."""
    least, most = MOMENTA
    return min(most, max(least, round(0.5 ** (batch / (images * HALF_LIFE_EPOCHS)), 6)))


def suited(
    chosen: Mapping[str, Any], grid: tuple[int, int], class_token: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Options of objectives in which what follows from the backbone and from each other is automatic no more, and the
    reasons. Raises Refusal where `keep` leaves too few patches of the `grid`."""
    values, reasons = dict(chosen), dict[str, str]()
    for name, options in chosen.items():
        changes: dict[str, tuple[Any, str]] = {}
        if getattr(options, "loss_on", None) == AUTO:
            changes["loss_on"] = (
                ("hidden", "position=partial: those that are told their place know the answer")
                if options.position == "partial"
                else ("all", f"position={options.position} treats all patches alike")
            )
        if getattr(options, "pairs", None) == AUTO and math.prod(grid) > 1:  # of one patch nothing can be built
            with objectives.named(name):
                kept, _, _ = PlanSpec(options.keep).counts(math.prod(grid))
            changes["pairs"] = options.automatic_pairs(kept)
        if getattr(options, "pool", None) == AUTO:
            changes["pool"] = (
                ("class", "the model has a class token") if class_token else ("mean", "the model has no class token")
            )
        values[name] = dataclasses.replace(options, **{option: value for option, (value, _) in changes.items()})
        reasons |= {f"objectives.{name}.{option}": reason for option, (_, reason) in changes.items()}
    return values, reasons


def patched(views: Mapping[str, View], grid: tuple[int, int]) -> tuple[dict[str, View], dict[str, str]]:
    """Views whose patches are no longer automatic where something is done to them one by one, and the reasons. Raises
    Refusal for patches that are not those of the backbone, of such a `grid` on the view `global`."""
    height, width = height_width(views["global"].size)
    of_backbone = height // grid[0], width // grid[1]
    known, reasons = dict(views), dict[str, str]()
    for name, view in views.items():
        if view.patch is None and not view.by_patch:
            continue
        if height % grid[0] or width % grid[1]:
            raise Refusal(
                f"views.{name}: patches are to be changed one by one, and views.global.size={views['global'].size} is "
                f"no multiple of the backbone's grid, {grid[0]}x{grid[1]}: choose a size that is"
            )
        side = of_backbone[0] if of_backbone[0] == of_backbone[1] else list(of_backbone)
        if view.patch is None:
            known[name] = dataclasses.replace(view, patch=side)
            reasons[f"views.{name}.patch"] = f"views.global has {grid[0]}x{grid[1]} of them"
        elif height_width(view.patch, "patch") != of_backbone:
            raise Refusal(
                f"views.{name}.patch={view.patch}: the backbone's patches have {of_backbone[0]}x{of_backbone[1]} "
                f"pixels; expected patch={side}, or patch=null"
            )
    return known, reasons


def _settled(where: str, options: Any, shared: str, owner: Any, rules: _Rules) -> dict[str, Any]:
    """Values of what concerns a teacher in the options of one objective; `owner`: those of the objective `shared`
    whose head it uses, if it does."""
    rules_of = {"prototypes": _prototypes, "teacher_temperature": _temperature, "freeze_last_layer": _frozen}
    values = {}
    for name, rule in rules_of.items():
        value, option = getattr(options, name, None), f"{where}.{name}"
        if value == AUTO and name != "teacher_temperature" and hasattr(owner, name):
            values[name], rules.reasons[option] = getattr(owner, name), f"{shared}'s, whose head it shares"
        elif hasattr(options, name):
            values[name] = rule(value, option, rules)
    return values


def _automatic(value: Any, where: str, otherwise: str) -> bool:
    """Whether `value` is "auto". Raises Refusal if it was meant to be."""
    if isinstance(value, str) and value != AUTO and nearest(value, [AUTO]):
        raise Refusal(f"{where}={value!r}: expected auto or {otherwise}{nearest(value, [AUTO])}")
    return isinstance(value, str) and value == AUTO


def _time(value: Any, where: str, epochs: int, most: float, repaired: float, rules: _Rules) -> float:
    """A length of time as a share of the training; automatic: so many `epochs`, at most the share `most`."""
    if not _automatic(value, where, 'a time such as "10 epochs"'):
        return rules.share(value, where, repaired)
    share = min(most, epochs / rules.epochs)
    rules.reasons[where] = (
        f"{schedules.counted(share * rules.epochs, 'epochs')} of {schedules.counted(rules.epochs, 'epochs')}: "
        f"{schedules.counted(epochs, 'epochs')}, at most {most * 100:g} % of the training"
    )
    return share


def _frozen(value: Any, where: str, rules: _Rules) -> float:
    """The time for which prototypes stand still, as a share of the training."""
    return _time(value, where, FREEZE_EPOCHS, FREEZE_MOST, FREEZE_MOST, rules)


def _schedule(value: Any, where: str, limits: Range, rules: _Rules, repaired: float = 1.0) -> Any:
    """A number or schedule whose values lie within `limits`, as it was given but for a time in `over`."""
    if isinstance(value, Mapping):
        value = dict(value)
        if isinstance(value.get("over"), str):
            value["over"] = rules.share(value["over"], f"{where}.over", repaired)
    schedule = schedules.parse(value, where)
    moves = schedule.start != schedule.end
    hint = Annotated[Any, dataclasses.replace(limits, length=0 if moves else None)]
    if wanted := expected(hint, [schedule.start, schedule.end] if moves else schedule.start):
        raise Refusal(f"{where}={schedule}: {wanted}")
    return value


def _momentum(value: Any, images: float | None, rules: _Rules, has_teacher: bool) -> Any:
    """The teacher's momentum; `images` is the half-life that was asked for."""
    where = "teacher.momentum"
    automatic = _automatic(value, where, "a number in [0, 1]")
    if images is not None:
        if not automatic:
            raise Refusal(
                f"teacher.half_life={images:g} and teacher.momentum say the same thing twice: set one of them"
            )
        start, rule = 0.5 ** (rules.batch / images), "teacher.half_life"
    elif automatic:
        start = momentum_for(rules.images, rules.batch)
        wanted = rules.images * HALF_LIFE_EPOCHS
        rule = f"a seventh of an epoch, {wanted:,.0f}"
        if start in MOMENTA:
            rule += f", but the momentum not {'below' if start == MOMENTA[0] else 'above'} {start:g}"
    else:
        return _schedule(value, where, Range(at_least=0, at_most=1), rules)
    if has_teacher:
        rules.reasons[where] = (
            f"starts with a half-life of {half_life(start, rules.batch):,.0f} images at batch {rules.batch} ({rule})"
        )
    return {"schedule": "cosine", "start": start, "end": 1.0}


def _prototypes(value: Any, where: str, rules: _Rules) -> int:
    """A number of prototypes."""
    suits = prototypes_for(rules.images)
    if value == AUTO:
        rules.reasons[where] = (
            f"the power of two nearest to {rules.images:,} images / {IMAGES_PER_PROTOTYPE}, "
            f"from {PROTOTYPES[0]:,} to {PROTOTYPES[1]:,}"
        )
        return suits
    if value > max(rules.images, suits):
        rules.notes.append(
            f"{where}={value} is more than one prototype per image ({rules.images:,} images): "
            f"most will stay empty; about {suits} would make sense"
        )
    return value


def _temperature(value: Any, where: str, rules: _Rules) -> Any:
    """A teacher's temperature: a number or schedule above 0."""
    if not _automatic(value, where, "a number above 0"):
        return _schedule(value, where, Range(above=0), rules, TEMPERATURE_MOST)
    (few, low), (many, high) = TEMPERATURES
    end = temperature_for(rules.images)
    start = min(FIRST_TEMPERATURE, end)
    rule = (
        f"for {rules.images:,} images: {low:g} up to {few:,}, {high:g} from {many:,}, between linear in the logarithm"
    )
    if start == end:
        rules.reasons[where] = f"{end:g} {rule}"
        return end
    over = min(TEMPERATURE_MOST, TEMPERATURE_EPOCHS / rules.epochs)
    rules.reasons[where] = (
        f"ends at {end:g} {rule}; over {TEMPERATURE_EPOCHS} epochs, "
        f"at most {TEMPERATURE_MOST * 100:g} % of the training"
    )
    return {"schedule": "linear", "start": start, "end": end, "over": over}


def _refuse_lonely(config: PretrainConfig, chosen: Mapping[str, Any], processes: int) -> None:
    """Raises Refusal where an image would have no other to be told apart from."""
    for name, options in chosen.items():
        least = objectives.find(name).least_images
        if least < 2 or not options.weight:
            continue
        local = getattr(options, "local", False) is True
        parts = config.accumulate * (processes if local else 1)
        if config.batch // parts < least:
            where = f" on each of {processes} processes (local: true)" if local else ""
            raise Refusal(
                f"objectives.{name} needs at least two images per part of a step{where}: batch={config.batch} with "
                f"accumulate={config.accumulate} leaves {config.batch // parts}; set batch={least * parts} or more"
            )


def _classes(name: str, options: Any, labels: Labels | None, rules: _Rules) -> dict[str, int]:
    """Classes of an objective that reads labels: automatic those of the data. Notes how many images have none."""
    where = f"objectives.{name}"
    if labels is None or not objectives.find(name).labelled or not options.weight > 0:
        return {}
    if labels.unlabelled:
        rules.notes.append(
            f"{where}: {labels.unlabelled:,} of {labels.images:,} images have no label and take no part in it"
        )
    if options.classes == AUTO:
        rules.reasons[f"{where}.classes"] = f"the classes of {labels.where}"
        return {"classes": labels.classes}
    if options.classes < labels.classes:
        raise Refusal(f"{where}.classes={options.classes}, and {labels.where} has {labels.classes}: use classes=auto")
    return {}
