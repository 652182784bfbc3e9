"""Sizes chosen for the data set: what the authors tuned on 1.28 million images does not suit ten thousand.

`auto` is the default of every option here; a value that is given wins. The rules say what they were made from.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import Refusal, nearest
from common.training import schedules
from common.training.ema import half_life
from pretrain import objectives
from pretrain.config import PretrainConfig

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


@dataclass
class _Facts:
    """What the rules start from, and what they found."""

    images: int
    batch: int
    steps: int
    per_epoch: int
    reasons: dict[str, str]  # automatic value -> the rule it came from
    notes: list[str]  # repairs, and what looks unwise

    @property
    def epochs(self) -> float:
        return self.steps / self.per_epoch


def settle(
    config: PretrainConfig,
    chosen: Mapping[str, Any],
    images: int,
    steps: int,
    per_epoch: int,
    processes: int,
    reasons: dict[str, str],
) -> list[str]:
    """Replace every `auto`, and every time such as "10 epochs", by a value, in `config` and in the objectives' options
    `chosen`; returns a line for every repair and for what looks unwise.

    `images` to train on, `steps` in all, `per_epoch` of them an epoch. `reasons` is told the rule of each automatic
    value. Settling again changes nothing. Raises Refusal for a value out of range.
    """
    facts = _Facts(images, config.batch, steps, per_epoch, reasons, [])
    config.optimizer = dataclasses.replace(config.optimizer)  # the caller's own keep what they say
    config.teacher = dataclasses.replace(config.teacher)
    config.optimizer.warmup = _time(
        config.optimizer.warmup, "optimizer.warmup", WARMUP_EPOCHS, WARMUP_MOST, WARMUP_REPAIRED, facts
    )
    config.optimizer.weight_decay = _schedule(
        config.optimizer.weight_decay, "optimizer.weight_decay", 0.0, math.inf, facts
    )
    learns = any(hasattr(options, "teacher_temperature") for options in chosen.values())
    config.teacher.momentum = _momentum(config.teacher.momentum, config.teacher.half_life, facts, told=learns)
    config.teacher.half_life = None  # said by the momentum from here on
    _refuse_lonely(config, chosen, processes)
    owners = {name: options for name, options in chosen.items() if not getattr(options, "shared_head", False)}
    for name, options in {**owners, **chosen}.items():  # those who share a head after those who have one
        shared = "" if name in owners else objectives.find(name).head_of
        _settle_objective(f"objectives.{name}", options, shared, owners.get(shared), facts)
    return facts.notes


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


def _settle_objective(where: str, options: Any, shared: str, owner: Any, facts: _Facts) -> None:
    """Settle the options of one objective; `owner`: those of the objective `shared` whose head it uses, if it does."""
    for name in ("prototypes", "freeze_last_layer"):
        if (
            hasattr(options, name)
            and hasattr(owner, name)
            and _automatic(getattr(options, name), f"{where}.{name}", "a value")
        ):
            setattr(options, name, getattr(owner, name))
            facts.reasons[f"{where}.{name}"] = f"{shared}'s, whose head it shares"
    if hasattr(options, "prototypes"):
        options.prototypes = _prototypes(options.prototypes, f"{where}.prototypes", facts)
    if hasattr(options, "teacher_temperature"):
        options.teacher_temperature = _temperature(options.teacher_temperature, f"{where}.teacher_temperature", facts)
    if hasattr(options, "freeze_last_layer"):
        options.freeze_last_layer = _time(
            options.freeze_last_layer, f"{where}.freeze_last_layer", FREEZE_EPOCHS, FREEZE_MOST, FREEZE_MOST, facts
        )


def _automatic(value: Any, where: str, otherwise: str) -> bool:
    """Whether `value` is "auto". Raises Refusal if it was meant to be."""
    if isinstance(value, str) and value != AUTO and nearest(value, [AUTO]):
        raise Refusal(f"{where}={value!r}: expected auto or {otherwise}{nearest(value, [AUTO])}")
    return isinstance(value, str) and value == AUTO


def _time(value: Any, where: str, epochs: int, most: float, repaired: float, facts: _Facts) -> float:
    """A length of time as a share of the training; automatic: so many `epochs`, at most the share `most`."""
    if not _automatic(value, where, 'a time such as "10 epochs"'):
        found, note = schedules.share(value, facts.steps, facts.per_epoch, where, instead=repaired)
        facts.notes += [note] if note else []
        return found
    found = min(most, epochs / facts.epochs)
    facts.reasons[where] = (
        f"{schedules.counted(found * facts.epochs, 'epochs')} of {schedules.counted(facts.epochs, 'epochs')}: "
        f"{schedules.counted(epochs, 'epochs')}, at most {most * 100:g} % of the training"
    )
    return found


def _schedule(value: Any, where: str, least: float, most: float, facts: _Facts, repaired: float = 1.0) -> Any:
    """A number or schedule whose values lie in [least, most], as it was given but for a time in `over`."""
    if isinstance(value, Mapping):
        value = dict(value)
        if isinstance(value.get("over"), str):
            value["over"], note = schedules.share(
                value["over"], facts.steps, facts.per_epoch, f"{where}.over", instead=repaired
            )
            facts.notes += [note] if note else []
    found = schedules.parse(value, where)
    if not least <= min(found.start, found.end) <= max(found.start, found.end) <= most:
        within = f"of at least {least:g}" if most == math.inf else f"in [{least:g}, {most:g}]"
        raise Refusal(f"{where}={found}: expected {'numbers' if found.start != found.end else 'a number'} {within}")
    return value


def _momentum(value: Any, images: float | None, facts: _Facts, told: bool) -> Any:
    """The teacher's momentum; `images` is the half-life that was asked for. `told`: whether somebody has a teacher."""
    where = "teacher.momentum"
    automatic = _automatic(value, where, "a number in [0, 1]")
    if images is not None:
        if not automatic:
            raise Refusal(
                f"teacher.half_life={images:g} and teacher.momentum say the same thing twice: set one of them"
            )
        if not 0 < images < math.inf:
            raise Refusal(f"teacher.half_life={images:g}: expected a number of images above 0")
        start, rule = 0.5 ** (facts.batch / images), "teacher.half_life"
    elif automatic:
        start = momentum_for(facts.images, facts.batch)
        wanted = facts.images * HALF_LIFE_EPOCHS
        rule = f"a seventh of an epoch, {wanted:,.0f}"
        if start in MOMENTA:
            rule += f", but the momentum not {'below' if start == MOMENTA[0] else 'above'} {start:g}"
    else:
        return _schedule(value, where, 0.0, 1.0, facts)
    if told:
        facts.reasons[where] = (
            f"starts with a half-life of {half_life(start, facts.batch):,.0f} images at batch {facts.batch} ({rule})"
        )
    return {"schedule": "cosine", "start": start, "end": 1.0}


def _prototypes(value: Any, where: str, facts: _Facts) -> int:
    """A number of prototypes."""
    suits = prototypes_for(facts.images)
    if _automatic(value, where, "a whole number of at least 2"):
        facts.reasons[where] = (
            f"the power of two nearest to {facts.images:,} images / {IMAGES_PER_PROTOTYPE}, "
            f"from {PROTOTYPES[0]:,} to {PROTOTYPES[1]:,}"
        )
        return suits
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise Refusal(f"{where}={value!r}: expected auto or a whole number of at least 2")
    if value > max(facts.images, suits):
        facts.notes.append(
            f"{where}={value} is more than one prototype per image ({facts.images:,} images): "
            f"most will stay empty; about {suits} would make sense"
        )
    return value


def _temperature(value: Any, where: str, facts: _Facts) -> Any:
    """A teacher's temperature: a number or schedule above 0."""
    if not _automatic(value, where, "a number above 0"):
        settled = _schedule(value, where, -math.inf, math.inf, facts, TEMPERATURE_MOST)
        found = schedules.parse(settled, where)
        if min(found.start, found.end) <= 0:
            raise Refusal(f"{where}={found}: expected {'numbers' if found.start != found.end else 'a number'} above 0")
        return settled
    (few, low), (many, high) = TEMPERATURES
    end = temperature_for(facts.images)
    start = min(FIRST_TEMPERATURE, end)
    rule = (
        f"for {facts.images:,} images: {low:g} up to {few:,}, {high:g} from {many:,}, between linear in the logarithm"
    )
    if start == end:
        facts.reasons[where] = f"{end:g} {rule}"
        return end
    over = min(TEMPERATURE_MOST, TEMPERATURE_EPOCHS / facts.epochs)
    facts.reasons[where] = (
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
