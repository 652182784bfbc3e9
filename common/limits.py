"""What an option may be, said beside its type: choices are a `Literal`, numbers `Annotated[float, Range(above=0)]`."""

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .errors import Refusal, nearest


@dataclass(frozen=True)
class Range:
    """Finite numbers within these limits, or lists of them."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    length: int | None = None  # of a list; 0: any but none. None: a number, or a list where its type allows one
    rising: bool = False  # the numbers of a list never fall
    noun: str = ""  # what the number is, such as "a share of the patches"
    whole: bool = False  # whole numbers, also where the type allows any
    auto: bool = False  # or the word auto

    def __contains__(self, value: Any) -> bool:
        """Whether `value` is such a number, or a list of such numbers."""
        if self.auto and isinstance(value, str):
            return value == "auto"
        listed = hasattr(value, "__iter__") and not isinstance(value, str)
        numbers = list(value) if listed else [value]
        if self.length is not None and (not listed or len(numbers) != (self.length or max(1, len(numbers)))):
            return False
        kinds = int if self.whole else (int, float)
        if not all(isinstance(each, kinds) and not isinstance(each, bool) for each in numbers):
            return False
        inside = (self.at_least <= each <= self.at_most and self.above < each < self.below for each in numbers)
        return all(inside) and all(map(math.isfinite, numbers)) and (not self.rising or numbers == sorted(numbers))

    def __str__(self) -> str:
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        limits = [f"{word} {limit:.12g}" for word, limit in words.items() if math.isfinite(limit)]
        if math.isfinite(self.at_least) and math.isfinite(self.at_most):
            limits = [f"from {self.at_least:.12g} to {self.at_most:.12g}"]
        return ", ".join(limits + ["the smaller one first"] * self.rising)


Count = Annotated[int, Range(at_least=1)]
NotNegative = Annotated[float, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
Probability = Annotated[float, Range(at_least=0, at_most=1)]
Share = Annotated[float, Range(above=0, at_most=1)]
PatchShare = Annotated[float, Range(above=0, at_most=1, noun="a share of the patches")]
BelowOne = Annotated[float, Range(at_least=0, below=1)]
Shares = Annotated[list[float], Range(above=0, at_most=1, length=2, rising=True)]  # the smallest and the largest
AutoCount = Annotated[Any, Range(at_least=2, whole=True, auto=True)]
Betas = Annotated[list[float], Range(at_least=0, below=1, length=2)]  # of AdamW


def check(options: Any, prefix: str = "", flags: bool = False) -> None:
    """Raises Refusal for an option of a dataclass, or of one in it, that is none of its choices or outside its range.

    It is named PREFIX.lr=-1, or as one of the `flags`: --lr -1.
    """
    for name, hint in _hints(options.__class__).items():
        value = getattr(options, name)
        for key, each in value.items() if isinstance(value, dict) else [("", value)]:
            if dataclasses.is_dataclass(each):
                check(each, f"{prefix}{name}.{key}{'.' * bool(key)}", flags)
        if wanted := expected(hint, value):
            raise Refusal(f"{flag(name)} {value}: {wanted}" if flags else f"{prefix}{name}={value!r}: {wanted}")


def flag(name: str) -> str:
    """The command line's flag for an option."""
    return f"--{name.replace('_', '-')}"


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema, include_extras=True)


def expected(hint: Any, value: Any) -> str | None:
    """Describe what a value of the type `hint` should be; None if `value` is that."""
    if value is None and type(None) in parts_of(hint):
        return None
    choices = choices_of(hint)
    if choices and value not in choices:
        return f"expected one of {', '.join(choices)}{nearest(str(value), choices)}"
    whole = int in parts_of(hint)
    for limits in parts_of(hint):
        if isinstance(limits, Range) and (value not in limits or (whole and not isinstance(value, int))):
            noun = limits.noun or {None: "a number", 0: "numbers", 2: "two numbers"}[limits.length]
            noun = "auto or " * limits.auto + noun.replace("number", "whole number", whole or limits.whole)
            near = nearest(str(value), ["auto"]) if limits.auto else ""
            within = f" of {limits}" if str(limits).startswith("at") else f"{',' * bool(limits.noun)} {limits}"
            return f"expected {noun}{within}{near}"
    return None


def choices_of(hint: Any) -> tuple[str, ...]:
    """The words that the type `hint` allows; none where it allows any."""
    return tuple(
        word for part in parts_of(hint) if typing.get_origin(part) is Literal for word in typing.get_args(part)
    )


def parts_of(hint: Any) -> list[Any]:
    """The types and ranges that the type `hint` is made of, its unions and annotations taken apart."""
    if typing.get_origin(hint) in (Annotated, typing.Union, types.UnionType):
        return [part for inner in typing.get_args(hint) for part in parts_of(inner)]
    return [hint]
