"""What evaluations know of pretraining's objectives: what configs/objectives.yaml says of them."""

import functools
from typing import Any

import yaml

from common.processes.launch import ROOT

DEFAULTS: dict[str, Any] = {"position": "full", "pools": "mean", "crops": "all", "teacher": False, "local": False}


@functools.cache
def _facts() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((ROOT / "configs" / "objectives.yaml").read_text(encoding="utf-8"))


def facts_of(name: str) -> dict[str, Any]:
    """position, pools, crops, teacher and local of an objective; the defaults where the file does not say."""
    return DEFAULTS | _facts().get(name, {})
