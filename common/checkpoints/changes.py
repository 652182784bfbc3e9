"""Changes in what this version makes of the same options and seed, for trainings that are resumed.

A state stores `VERSION`; one that lacks it is of version 1. Whoever changes samples or losses raises it, and says here,
or in `changed` of `pretrain.checkpoints` where a loss is changed, which trainings notice.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..batches.views import View

VERSION = 2
FIRST = 1  # of states from before there was a number


def version_of(state: Mapping[str, Any]) -> Any:
    """Return the version that wrote a state, whose content is not trusted."""
    return state.get("version", FIRST)


def sample_changes(views: Mapping[str, View]) -> list[str]:
    """List what has changed in the samples of these views since version 1."""
    coloured = [
        name
        for name, view in views.items()
        if view.grayscale or (view.jitter and any((view.brightness, view.contrast, view.saturation, view.hue)))
    ]
    colours = [f"colours of view {', '.join(coloured)} change as torchvision changes them"] if coloured else []
    return [*colours, "a crop that fits an image in none of ten tries lies in its centre"]


def note(version: Any, step: int, changes: Sequence[str]) -> str:
    """Return a clause for a training that another version wrote, up to `step`; "" if nothing changes for it."""
    if version == VERSION or not changes:
        return ""
    if version != FIRST:
        return f"up to step {step} it was trained by version {version!s:.20} of the samples, from there on by {VERSION}"
    return f"up to step {step} it was trained by an earlier version; from there on {'; '.join(changes)}"
