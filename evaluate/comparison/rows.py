"""The lines of a comparison: runs that differ in nothing but their seed, and the baselines that belong to them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.features.extraction import RAW
from evaluate.comparison.reports import APART, Run, listed
from evaluate.job.arguments import LABELS

TITLES = {
    "knn": "k-NN",
    "linear": "linear probe",
    "fewshot": "low-shot",
    "finetune": "finetuning",
    "validate": "classifier",
}
BASELINES = ("random", *RAW)
# Neither the samples nor what is learned from them depends on these, nor do runs of one recipe have them in common.
SEED_ONLY = ("seed", "run", "threads", "log_every", "checkpoint_every", "checkpoint_minutes", "keep",
             "milestone_every", "tensorboard", "allow_leak", "data_root")  # fmt: skip
# A group -> options in it, likewise.
SEED_ONLY_OF = {"monitor": ("every", "control_every"), "loader": ("workers", "cache_root")}
OF_RANDOM = ("name", "kwargs", "size", "crop", "mean", "std", "position", "position_embedding", "irpe", "stem",
             "pooling")  # fmt: skip
OF_RAW = ("size", "crop")


@dataclass(eq=False)
class Row:
    """A line of the table: the runs of one recipe, or a baseline and the runs whose reports have it."""

    label: str
    kind: str  # subject, random, pixels or patches
    runs: list[Run]

    @property
    def seeds(self) -> list[Any]:
        """Seeds of pretraining."""
        return [run.training.get("seed") for run in self.runs] if self.kind == "subject" else []


def rows(runs: Sequence[Run], baselines: Sequence[str] = ()) -> list[Row]:
    """The lines of a table: runs of one recipe together, in the order given, then the baselines asked for.

    There is one untrained baseline for each architecture (with its way to use positions) and one of raw pixels, and of
    patches, for each size, as often as they were judged in different ways. No two labels are the same.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = recipe_key(run)
        seeds = [other.training.get("seed") for other in groups.get(key, [])]
        groups.setdefault(key if run.training.get("seed") not in seeds else f"{key} {run.weights}", []).append(run)
    lines = [Row(label_of(group), "subject", group) for group in groups.values()]
    labels = [row.label for row in lines]
    for row in lines:
        if labels.count(row.label) > 1:
            row.label = ", ".join(run.name for run in row.runs)
    for kind in (name for name in BASELINES if name in baselines):
        alike = baseline_groups(runs, kind)
        for group in alike:
            word = LABELS[kind]
            suffix = f" (as {listed([run.name for run in group])})" if len(alike) > 1 else ""
            taken = any(row.label == word + suffix for row in lines)
            lines.append(Row(word + suffix + " (baseline)" * taken, kind, group))
    return lines


def baseline_groups(runs: Sequence[Run], kind: str) -> list[list[Run]]:
    """Runs that have a baseline in common: it is built alike, and what their reports have of it was judged alike."""
    what = OF_RANDOM if kind == "random" else OF_RAW
    groups: list[tuple[list[Any], dict[str, Any], list[Run]]] = []
    for run in runs:
        built = [run.description.get(name) for name in what] + [len(run.description["mean"])]
        judged = {
            name: (one.settings, one.test, one.train)
            for name, one in run.reports.items()
            if not one.stale and one.content["evaluation"] not in APART and kind in one.content["values"]
        }
        for other, ways, group in groups:
            if other == built and all(ways.get(name, way) == way for name, way in judged.items()):
                ways |= judged
                group.append(run)
                break
        else:
            groups.append((built, judged, [run]))
    return [group for _, _, group in groups]


def recipe_key(run: Run) -> str:
    """What runs of one recipe have in common, all but the seed."""
    if run.config is None:
        return str(run.weights)
    config = {name: value for name, value in run.config.items() if name not in SEED_ONLY}
    for group, left_out in SEED_ONLY_OF.items():
        if isinstance(options := config.get(group), dict):
            config[group] = {name: value for name, value in options.items() if name not in left_out}
    state = [run.training.get(name) for name in ("step", "data_fingerprint", "exported")]
    return json.dumps([config, state], sort_keys=True, default=str)


def label_of(group: Sequence[Run]) -> str:
    """What runs are called together: what their names begin with, and their seeds."""
    if len(group) == 1:
        return group[0].name
    first, last = min(run.name for run in group), max(run.name for run in group)
    shared = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    stem = first[:shared].rstrip("-_./ 0123456789") or group[0].name
    stem = stem.removesuffix("seed").removesuffix("s").rstrip("-_./ ") or stem
    return f"{stem} (seeds {', '.join(str(run.training.get('seed', '?')) for run in group)})"


def differing(config: Any, other: Any, path: str = "") -> list[str]:
    """`key=value` of every option in which `config` differs from `other`, but for those in `SEED_ONLY`
    and `SEED_ONLY_OF`."""
    if isinstance(config, dict) and isinstance(other, dict):
        names = [name for name in dict.fromkeys([*config, *other]) if path or name not in SEED_ONLY]
        return [
            line
            for name in names
            for line in differing(config.get(name), other.get(name), f"{path}.{name}" if path else str(name))
            if name not in SEED_ONLY_OF.get(path, ())
        ]
    return [] if config == other else [f"{path}={json.dumps(config, default=str)}"]


def title_of(column: str) -> str:
    """How a table calls a column."""
    return TITLES.get(column, column.replace("_", " "))
