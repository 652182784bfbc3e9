"""Numbers that change over the training, per optimizer step, and lengths of time as shares of it.

Progress is the share of the training that is done before a step: step / steps, in [0, 1).
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import Refusal, nearest
from ..limits import expected

Kind = Literal["constant", "linear", "cosine"]
KEYS = ("schedule", "start", "end", "over")
UNITS = ("epoch", "epochs", "step", "steps")
SPAN = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)\s*")


@dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end`."""

    schedule: Kind
    start: float
    end: float
    over: float = 1.0  # share of the training that it takes; `end` afterwards

    def at(self, progress: float) -> float:
        """The value when `progress` of the training is done."""
        if self.schedule == "constant":
            return self.start
        if progress >= self.over:
            return self.end
        done = progress / self.over
        if self.schedule == "linear":
            return self.start + (self.end - self.start) * done
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))

    def __str__(self) -> str:
        if self.schedule == "constant":
            return f"{self.start:.6g}"
        over = "" if self.over == 1 else f" over {self.over * 100:.3g} % of the training"
        return f"{self.schedule} {self.start:.6g} -> {self.end:.6g}{over}"


def parse(value: Any, where: str) -> Schedule:
    """The schedule that a recipe's `value` means: a number, or {schedule: cosine, start: 0.04, end: 0.4, over: 1.0}.

    `over` may be left out, and `end` where the schedule is constant. Raises Refusal, naming `where`, for anything else.
    """
    if not isinstance(value, Mapping):
        number = _number(value, where, "a number or {schedule: cosine, start: 0.04, end: 0.4, over: 1.0}")
        return Schedule("constant", number, number)
    for key in value:
        if key not in KEYS:
            raise Refusal(f"unknown option {key!r} in {where}{nearest(str(key), KEYS)}; there are: {', '.join(KEYS)}")
    for key in ("schedule", "start"):
        if key not in value:
            raise Refusal(f"{where}: {key} is missing: expected {{schedule: cosine, start: 0.04, end: 0.4, over: 1.0}}")
    kind = value["schedule"]
    if wanted := expected(Kind, kind):
        raise Refusal(f"{where}.schedule={kind!r}: {wanted}")
    start = _number(value["start"], f"{where}.start")
    if "end" not in value and kind != "constant":
        raise Refusal(f"{where}: end is missing: a {kind} schedule goes from start to end")
    end = _number(value.get("end", start), f"{where}.end")
    over = _number(value.get("over", 1.0), f"{where}.over", "a share of the training in [0, 1]")
    if not 0 <= over <= 1:
        raise Refusal(f"{where}.over={over:g}: expected a share of the training in [0, 1]")
    if kind == "constant" and end != start:
        raise Refusal(f"{where}: a constant schedule has one value, not {start:g} and {end:g}: set schedule: linear")
    return Schedule(kind, start, end, over)


def rate(step: int, steps: int, warmup: int, peak: float, floor: float = 0.0, kind: Kind = "cosine") -> float:
    """The learning rate of optimizer step `step` (0-based) of `steps`: linear to `peak` over `warmup` steps, then to
    `floor`; with kind "constant" it stays at `peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return Schedule(kind, peak, floor).at(done)


def share(
    value: Any, steps: int, per_epoch: int, where: str, most: float = 1.0, instead: float | None = None
) -> tuple[float, str | None]:
    """A length of time as a share of `steps` optimizer steps, `per_epoch` of which are an epoch; and what was repaired.

    `value`: a number in [0, 1], taken as it is, or "10 epochs", "0.5 epochs", "500 steps". Where that is more than
    `most` of the training, `instead` (or `most`) is used, and the message says so. Raises Refusal, naming `where`.
    """
    expected = 'a share of the training in [0, 1], or a time such as "10 epochs" or "500 steps"'
    if not isinstance(value, str):
        number = _number(value, where, expected)
        if not 0 <= number <= 1:
            raise Refusal(f"{where}={value}: expected {expected}")
        return number, None
    match = SPAN.fullmatch(value)
    if match is None or match[2] not in UNITS:
        raise Refusal(f"{where}={value!r}: expected {expected}{nearest(match[2], UNITS) if match else ''}")
    of_epochs = match[2].startswith("epoch")
    asked = float(match[1]) * (per_epoch if of_epochs else 1) / steps
    if asked <= most:
        return asked, None
    used = most if instead is None else instead
    whole, unit = (steps / per_epoch, "epochs") if of_epochs else (steps, "steps")
    limit = "the training" if most == 1 else f"{most * 100:.3g} % of the training"
    return used, (
        f"{where}={value.strip()} is longer than {limit} ({counted(whole, unit)}): {used * 100:.3g} % of it, "
        f"{counted(used * whole, unit)}, is used instead"
    )


def counted(number: float, unit: str) -> str:
    """`1.5 epochs`, `1 epoch`, `12,000 steps`: `unit` is the plural."""
    shown = f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
    return f"{shown} {unit.removesuffix('s') if shown == '1' else unit}"


def _number(value: Any, where: str, expected: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise Refusal(f"{where}={value!r}: expected {expected}")
    return float(value)
