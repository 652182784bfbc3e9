"""Checkpoints and the reports that evaluations left of them: read, checked, and told from those that are out of date.

A report's column is the name of its file: RUN/evaluate/knn.json is in column "knn". Its settings are what two numbers
must have in common before one is held against the other: what its protocol says, but for paths and remarks, for what
only other numbers of the report depend on, and for what comes with a checkpoint: its own image size, and the features
that its training pooled.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from common import config as configuration
from common.checkpoints import public, storage
from common.checkpoints.run_folder import CONFIG
from common.data import Images, Location, labelled_splits
from common.data.location import changed_location, place
from common.errors import Refusal
from common.features.neighbors import FIELD
from evaluate.job import report

COLUMNS = ("knn", "linear", "fewshot", "finetune", "segmentation")  # in the order of a table; others come after them
APART = ("layers", "explain")  # their values are no accuracies of the whole subject
WHOLE_DATA = ("knn", "linear", "fewshot", "finetune")  # of which the fingerprint is that of the data as they are
NOT_CENTRED = "its k-NN is of features that are not centred"
SUPERSEDED = {"knn/dino": NOT_CENTRED, "layers/position+knn": NOT_CENTRED}  # by id: what earlier versions did otherwise
NO_SETTING = ("picture", "notes", "left_out")  # where something lies, and what was said
# by evaluation: of other numbers than the headline, or a sentence about it
OF_OTHERS = {"knn": ("k", "selection"), "fewshot": ("subsets",), "finetune": ("pixels",)}
OWN = "the checkpoint's own"
MOST, LONGEST = 6, 40  # settings that are named in one line, and letters of a value


@dataclass(eq=False)
class Report:
    """One report: its content, outcomes {"index", "row/kind"}, and why it is of no use now, if it is not."""

    path: Path
    content: dict[str, Any]
    outcomes: dict[str, np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)  # what others must have in common to be compared
    stale: str = ""
    note: str = ""  # what could not be checked

    @property
    def protocol(self) -> str:
        """Its id."""
        return str(self.content["protocol"].get("id", "?"))

    @property
    def superseded(self) -> str:
        """What an earlier version did otherwise, if its protocol is that of one."""
        return SUPERSEDED.get(self.protocol, "")

    @property
    def test(self) -> str:
        """Fingerprint of the test images."""
        return str(self.content["data"]["test"]["fingerprint"])

    @property
    def train(self) -> str:
        """Fingerprint of the training images."""
        return str(self.content["data"]["train"]["fingerprint"])

    @property
    def spec(self) -> str:
        """The data, as they are named."""
        return str(self.content["data"].get("spec", "?"))

    @property
    def metric(self) -> str:
        """What its headline number is."""
        return str(self.content["protocol"].get("metric", "accuracy"))


@dataclass(eq=False)
class Run:
    """A checkpoint that is compared."""

    word: str  # as it was given
    weights: Path  # absolute; a link to weights that lie elsewhere has its own reports, beside it
    description: dict[str, Any]
    config: dict[str, Any] | None  # as it was trained, where that is known
    name: str
    reports: dict[str, Report] = field(default_factory=dict)
    damaged: dict[str, Refusal] = field(default_factory=dict)  # reports that cannot be read, and why
    notes: list[str] = field(default_factory=list)  # what lies beside the reports and is none

    @property
    def folder(self) -> Path:
        """Folder of its reports."""
        folder = self.weights.parent / "evaluate"
        return folder / storage.BESIDE.get(self.weights.name, "")

    @property
    def home(self) -> Path:
        """Where it was trained: the folder of its logs."""
        return self.weights.resolve().parent

    @property
    def training(self) -> dict[str, Any]:
        """What its description says of how it was trained."""
        return self.description.get("training") or {}


def open_runs(words: Sequence[str]) -> list[Run]:
    """The runs, their descriptions checked against their weights. Raises Refusal for what is no run, for two times
    the same, and for two whose reports would lie in one folder."""
    runs: list[Run] = []
    for word in words:
        file = public.weights_file(word)
        weights = file.parent.resolve() / file.name
        earlier = next((run for run in runs if run.weights.resolve() == weights.resolve()), None)
        if earlier is not None:
            raise Refusal(f"{word} is the same run as {earlier.word}: give each run once")
        description = public.read_description(weights)
        path = weights.resolve().parent / CONFIG
        config: Any = OmegaConf.to_container(configuration.read_yaml(path)) if path.is_file() else None
        run = Run(word, weights, description, config, "")
        beside = next((other for other in runs if other.folder == run.folder), None)
        if beside is not None:
            raise Refusal(
                f"{word} and {beside.word} lie in one folder, where the reports of one would replace the other's: "
                "give each a folder of its own"
            )
        runs.append(run)
    for run, name in zip(runs, distinct([run.weights for run in runs]), strict=True):
        run.name = name
    return runs


def distinct(weights: Sequence[Path]) -> list[str]:
    """A short name of each: its folder's, with as many of the folders above as tell it from the others."""
    tails = [(*path.parent.parts, path.stem) if path.name != storage.WEIGHTS else path.parent.parts for path in weights]
    names = []
    for tail in tails:
        parts = 1 + (tail[-1] == "student" and len(tail) > 1)
        while parts < len(tail) and sum(other[-parts:] == tail[-parts:] for other in tails) > 1:
            parts += 1
        names.append("/".join(tail[-parts:]))
    return names


def read_reports(run: Run) -> None:
    """Read every report in the run's folder. What is damaged or of another format goes to `run.damaged`; a file of
    another name that is no report is left out, which is noted."""
    run.reports, run.damaged, run.notes = {}, {}, []
    for path in sorted(run.folder.glob("*.json")):
        try:
            content, outcomes = report.read(path)
            refuse_malformed(path, content, outcomes)
        except Refusal as refusal:
            if path.stem in (*COLUMNS, *APART):
                run.damaged[path.stem] = refusal
            else:
                run.notes.append(f"left out: {refusal}")
            continue
        one = Report(path, content, outcomes, settings(content, run.description))
        sha = run.description["weights_sha256"]
        if content.get("weights_sha256") != sha:
            one.stale = f"of other weights (SHA-256 {str(content.get('weights_sha256'))[:12]}, now {sha[:12]})"
        run.reports[path.stem] = one


def refuse_malformed(path: Path, content: Mapping[str, Any], outcomes: Mapping[str, np.ndarray]) -> None:
    """Raises Refusal unless a report has what is read here, and its outcomes fit each other."""
    try:
        expect(content["evaluation"], str, "evaluation")
        protocol = expect(content["protocol"], dict, "protocol")
        transform = expect(protocol.get("transform") or {}, dict, "protocol.transform")
        for name in ("size", "stride"):
            for number in expect(transform.get(name, []), list, f"protocol.transform.{name}"):
                expect(number, int, f"protocol.transform.{name}")
        expect(content.get("subject") or {}, dict, "subject")
        for side in ("train", "test"):
            images = expect(content["data"][side], dict, f"data.{side}")
            expect(images["fingerprint"], str, f"data.{side}.fingerprint")
            expect(images.get("images"), (int, NoneType), f"data.{side}.images")
        for entry in entries(content):
            expect(entry.value, (int, float), f"{entry.row}, {entry.features} {entry.setting}")
            for bound in (entry.low, entry.high, entry.std):
                expect(bound, (int, float, NoneType), f"interval or std of {entry.row}, {entry.features}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise Refusal(f"{path} is no whole report ({why}); evaluate again") from None
    index = outcomes.get("index")
    for name, each in outcomes.items():
        if index is None or index.ndim != 1 or (name != "index" and not fits(each, len(index))):
            raise Refusal(
                f"{path}: its outcomes do not fit each other ({name} has shape {each.shape}, of "
                f"{'unknown' if index is None else len(index)} test images); evaluate again"
            )


def expect(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    """`value`, if it is of this kind and, as a number, finite. Raises TypeError."""
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, float) and not isfinite(value)):
        raise TypeError(f"{what} is {value!r:.60}")
    return value


def fits(outcomes: np.ndarray, images: int) -> bool:
    """Whether these are (S, K) or (S, K, C, 3) numbers of so many images."""
    known = outcomes.ndim == 2 or (outcomes.ndim == 4 and outcomes.shape[-1] == 3)
    return known and outcomes.shape[0] > 0 and outcomes.shape[1] == images > 0 and outcomes.dtype.kind in "biuf"


def location_of_report(run: Run, one: Report, given: Mapping[str, str | None]) -> Location:
    """Where the images of a report are now: as `given`, else as it says, or the run where they are its own data."""
    parts = one.content["data"].get("location")
    own_data = run.training if one.spec == run.training.get("data") else {}
    return changed_location({**(own_data if parts is None else parts), "data": one.spec}, given)


def check_data(runs: Sequence[Run], given: Mapping[str, str | None]) -> None:
    """Mark reports as stale that are of other images than their data have now, or than the data that are `given`.

    Data that cannot be opened are not checked, and the report says so. A segmentation has data of its own, with masks:
    it stays, and says so.
    """
    data = place(str(given["data"])) if given.get("data") is not None else None
    for run in runs:
        for one in run.reports.values():
            evaluation = one.content["evaluation"]
            if one.stale:
                continue
            if data is not None and one.spec != data:
                if evaluation == "segmentation":
                    one.note = f"on data of its own, {one.spec}, not {data}"
                else:
                    one.stale = f"of {one.spec}, not {data}"
                continue
            if evaluation not in WHOLE_DATA:
                continue
            splits = splits_of(location_of_report(run, one, given))
            if isinstance(splits, Refusal):
                one.note = f"whether {one.spec} is what it was could not be checked: {splits}"
            elif not (splits[0].has_fingerprint(one.train) and splits[1].has_fingerprint(one.test)):
                one.stale = f"of other images than {one.spec} has now"
            else:  # reports of one kind of fingerprint are compared with those of another
                for side, images in zip(("train", "test"), splits, strict=True):
                    one.content["data"][side]["fingerprint"] = images.fingerprint()


@functools.cache
def splits_of(where: Location) -> tuple[Images, Images] | Refusal:
    """The labelled training and test images, or why they cannot be opened. Opened once: many runs share data."""
    try:
        train, test, _ = labelled_splits(where, download=False)
    except (Refusal, OSError) as error:
        return error if isinstance(error, Refusal) else Refusal(str(error))
    return train, test


class Entry(NamedTuple):
    """One number of a report."""

    row: str
    features: str
    setting: str  # what of the protocol it is, where that is not the headline
    metric: str
    value: float
    low: float | None
    high: float | None
    std: float | None = None  # over whatever the evaluation repeats: heads, draws


def entries(content: Mapping[str, Any]) -> Iterator[Entry]:
    """Every number of a report with the interval it has there: headlines, and other k, subsets, layers, methods."""
    metric = str(content["protocol"].get("metric", "accuracy"))
    for row, kinds in content["values"].items():
        for kind, entry in kinds.items():
            if content["evaluation"] == "explain":
                for method, values in entry.items():
                    if "gap" in values:
                        low, high = values["gap_interval"]
                        yield Entry(row, method, kind, "area below random", values["gap"], low, high)
            elif content["evaluation"] == "layers":
                for what in ("position", "knn"):
                    if what in entry:
                        yield _entry(row, kind, what, "accuracy", entry[what])
            else:
                yield _entry(row, kind, "", metric, entry)
                for k, values in entry.get("k", {}).items():
                    yield _entry(row, kind, f"k={k}", metric, values)
                for k, values in entry.get(FIELD, {}).get("k", {}).items():
                    yield _entry(row, kind, f"k={k}, not centred", metric, values)
                for name, by_classifier in entry.get("subsets", {}).items():
                    for classifier, values in by_classifier.items():
                        yield _entry(row, kind, f"{name}, {classifier}", metric, values)
                if "pixel_accuracy" in entry:
                    yield Entry(row, kind, "", "pixel accuracy", entry["pixel_accuracy"], None, None)


def _entry(row: str, kind: str, setting: str, metric: str, values: Mapping[str, Any]) -> Entry:
    low, high = values.get("interval") or (None, None)
    return Entry(row, kind, setting, metric, values["accuracy"], low, high, values.get("std"))


# ------------------------------------------------------------------------------------- how its numbers were obtained


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
    written = value if isinstance(value, str) else json.dumps(value)
    return written if len(written) <= LONGEST else written[: LONGEST - 1] + "…"
