"""How a number was obtained: the settings that two numbers must have in common before one is held against the other.

They are what a report's protocol says, but for paths and remarks, for what only other numbers of the report depend on,
and for what comes with a checkpoint: its own image size, and the features that its training pooled.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

NO_SETTING = ("picture", "notes", "left_out")  # where something lies, and what was said
OF_OTHERS = {  # by evaluation: of other numbers than the headline, or a sentence about it
    "knn": ("k", "selection"),
    "fewshot": ("subsets",),
    "finetune": ("pixels",),
}
OWN = "the checkpoint's own"
MOST, LONGEST = 6, 40  # settings that are named in one line, and letters of a value


def settings(content: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, Any]:
    """{name: value} of a report of the checkpoint described; inner names are joined by dots, null is left out."""
    skipped = (*NO_SETTING, *OF_OTHERS.get(content["evaluation"], ()))
    protocol = {name: value for name, value in content["protocol"].items() if name not in skipped}
    transform = dict(protocol.get("transform") or {})
    if transform.get("size", "none") == description["size"]:
        size, transform["size"] = transform["size"], OWN
        if transform.get("stride"):  # of sliding windows: a share of their size
            transform["stride"] = [round(step / side, 2) for step, side in zip(transform["stride"], size, strict=False)]
    protocol["transform"] = transform
    if protocol.get("pooling") == description.get("pooling", "mean"):
        protocol["pooling"] = OWN
    return dict(_flat(protocol))


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name}.")
        elif value is not None:
            yield path + name, value


def unlike(*several: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which these differ."""
    names = dict.fromkeys(name for each in several for name in each)
    return [name for name in names if any(each.get(name) != several[0].get(name) for each in several)]


def listed(names: list[str]) -> str:
    """The first of them."""
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")


def value_of(settings: Mapping[str, Any], name: str) -> str:
    """A value, shortened."""
    value = settings.get(name, "none")
    told = value if isinstance(value, str) else json.dumps(value)
    return told if len(told) <= LONGEST else told[: LONGEST - 1] + "…"
