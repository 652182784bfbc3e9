"""What an evaluation leaves behind: a table for the eye, and a JSON file with all one needs to judge or repeat it."""

import contextlib
import datetime
import json
import platform
import statistics
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from common import config as configuration
from common.batches.unreadable import BAD_FILES, write_list
from common.checkpoints.storage import sha256, write_atomically
from common.errors import Refusal
from common.features.extraction import KINDS, PIXELS, RAW, digest
from common.features.metrics import wilson
from common.processes.launch import active_pil
from evaluate.job.arguments import LABELS
from evaluate.job.evaluation import Evaluation
from evaluate.job.patches import FILTERS, SIDE, described

FORMAT = 1  # of reports; those written before there was a number read as 1
CHOSEN = "chosen"  # the kind of features of a protocol in which several compete for one number
WILSON = "95 %, Wilson, over test images; it covers neither seeds nor training"


def write(
    job: Evaluation,
    protocol: Mapping[str, Any],
    values: Mapping[str, Any],
    judged: int,
    outcomes: "Outcomes | None" = None,
    interval: str | None = WILSON,
) -> None:
    """Write the report of `job` to its `out`, in one piece; `judged` test images were classified.

    protocol: at least its "id", and by what its heads were chosen, "selection".
    values: {row: {kind: entry}}, each entry with at least what `accuracies` returns; rows are subject, random, pixels,
    patches.
    outcomes: of every number in `values`; NAME.outcomes.npz beside the report has them, so that runs can be compared
    image by image. `interval`: what those in `values` are.
    """
    assert {"id", "selection"} <= protocol.keys()
    description, training = job.subject.description, job.subject.description.get("training", {})
    transform = {"name": "evaluation", "size": description["size"], "crop": job.crop, "interpolation": "bicubic"}
    state = job.subject.state
    job.out.parent.mkdir(parents=True, exist_ok=True)
    listed = job.out.with_suffix(f".{BAD_FILES}")
    listed.unlink(missing_ok=True)
    write_list(listed, job.look.bad)
    content = {
        "format": FORMAT,
        "evaluation": job.name,
        "protocol": {"transform": transform, "precision": job.precision, **protocol},
        "patches": described() if "patches" in values else None,
        "subject": _described(job),
        "weights_sha256": job.subject.weights_sha256,
        "weights_digest": digest(state) if state is not None else None,
        "step": training.get("step"),
        "data": _data(job, judged),
        "seeds": job.seeds,
        "values": values,
        "interval": interval,
        "warnings": job.warnings,
        "outcomes": _write_outcomes(job.out, outcomes, values) if outcomes is not None else None,
        "command": configuration.command_line(),
        "hardware": hardware(job.device, job.threads),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - job.began, 1),
    }
    write_atomically(job.out, lambda aside: aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def _described(job: Evaluation) -> dict[str, Any]:
    description, training = job.subject.description, job.subject.description.get("training", {})
    return {
        "name": job.subject.name,
        "ckpt": job.arguments.ckpt,
        "model": {name: description[name] for name in ("name", "kwargs", "size", "mean", "std")}
        if not job.raw
        else None,
        "position": description["position"] if not job.raw else None,
        "recipe": training.get("recipe"),
        "trained_on": training.get("data"),
        "audit": training.get("audit"),
        "loaded": job.subject.notes,
    }


def _data(job: Evaluation, judged: int) -> dict[str, Any]:
    return {
        "spec": job.spec,
        "location": {name: value for name, value in job.location.options().items() if value and name != "data"},
        "note": job.note,
        "classes": list(job.classes),
        "train": {"images": len(job.train), "fingerprint": job.train.fingerprint()},
        "looked_at": {"images": job.look.looked, "unreadable": len(job.look.bad), "max_bad": str(job.limit.max_bad)},
        "not_read": list(dict.fromkeys(images.left_out for images in (job.train, job.test) if images.left_out)),
        "test": {"images": len(job.test), "fingerprint": job.test.fingerprint(), "judged": judged},
    }


def _write_outcomes(out: Path, outcomes: "Outcomes", values: Mapping[str, Any]) -> dict[str, str]:
    arrays = {
        f"{row}/{kind}": np.stack(by_seed)
        for row, kinds in outcomes.by_row.items()
        for kind, by_seed in kinds.items()
        if kind in values[row]
    }
    arrays["index"] = np.asarray(outcomes.index, dtype=np.int64)
    for name, array in arrays.items():
        assert name == "index" or array.shape[1] == len(arrays["index"]), (name, array.shape)
    file = out.with_suffix(".outcomes.npz")

    def save(aside: Path) -> None:
        with aside.open("wb") as opened:  # np.savez would add .npz to a name
            np.savez_compressed(opened, **arrays)  # type: ignore[arg-type]  # its other argument is a bool
        out.unlink(missing_ok=True)  # an earlier report: stopped from here on, there is none, not one that is damaged

    write_atomically(file, save)
    return {"file": file.name, "sha256": sha256(file)}


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a report: (content, outcomes: "index" and "row/kind", as `write` stores them; empty if it has none).

    Raises Refusal for what is no report, for one of another format, and for outcomes that are missing or not its own.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(content, dict) and {"evaluation", "protocol", "values", "data"} <= content.keys()
    except (OSError, ValueError) as error:
        raise Refusal(f"{path} cannot be read as a report: {error}; evaluate again") from None
    if not known:
        raise Refusal(f"{path} is no report of an evaluation: expected evaluation, protocol, data and values in it")
    if content.get("format", 1) != FORMAT:
        raise Refusal(
            f"{path} has report format {content['format']}, this version reads format {FORMAT}: update poslabel, or "
            "evaluate again"
        )
    outcomes = content.get("outcomes")
    if outcomes is None:
        return content, {}
    name, expected = (outcomes.get("file"), outcomes.get("sha256")) if isinstance(outcomes, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(expected, str) or Path(name).name != name:
        raise Refusal(f"{path} is no whole report: its outcomes are {outcomes!r:.60}, expected a file and its sha256")
    file = path.with_name(name)
    if not file.is_file() or sha256(file) != expected:
        state = "does not match it (SHA-256 differs)" if file.is_file() else "is missing"
        raise Refusal(f"{path}: {file.name}, what became of each test image, {state}; evaluate again")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return content, {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise Refusal(f"{path}: {file.name} cannot be read as arrays: {error}; evaluate again") from None


class Outcomes:
    """Collector of the outcome of each test image, row by row and seed by seed, for `write`: for an accuracy whether
    each was right, bool; for an mIoU (C, 3) counts of pixels: intersection, predicted, labelled."""

    def __init__(self, index: Any = ()) -> None:
        self.index = index  # (K,) which test images
        self.by_row: dict[str, dict[str, list[np.ndarray]]] = {}

    def add(self, row: str, kind: str, outcomes: Tensor | np.ndarray) -> None:
        """Add outcomes (K, ...) of the next seed."""
        array = outcomes.cpu().numpy() if isinstance(outcomes, Tensor) else outcomes
        self.by_row.setdefault(row, {}).setdefault(kind, []).append(array)


def show_in_tensorboard(job: Evaluation, pictures: Iterable[tuple[str, np.ndarray]]) -> bool:
    """Add (name, picture (H, W, 3)) to the run's TensorBoard log, if it has one; returns whether it has."""
    folder = job.subject.folder.parent / "tb"
    if job.subject.state is None or job.arguments.out is not None or not folder.is_dir():
        return False
    from torch.utils.tensorboard import SummaryWriter  # seconds

    step = job.subject.description.get("training", {}).get("step", 0)
    with SummaryWriter(str(folder), filename_suffix=f".{job.name}") as writer:
        for name, picture in pictures:
            writer.add_image(name, picture, step, dataformats="HWC")
    return True


def leak_note(description: Mapping[str, Any]) -> str:
    """Note for tables of a checkpoint whose recipe leaks the answer; else empty."""
    if description.get("training", {}).get("audit") != "leak":
        return ""
    return "its recipe leaks the answer of its position task, and was run with allow_leak=true"


def tell(job: Evaluation, what: str, table: str, frozen: bool = True) -> None:
    """Print a table, what it is about, and where its report is. `frozen`: whether the backbone is as it was trained."""
    description = job.subject.description
    position = "" if description["position"] == "full" or not frozen else ", without position embedding"
    size = "x".join(map(str, description["size"]))
    subject = (
        f"{LABELS[job.arguments.ckpt]} ({size} px)"
        if job.raw
        else f"{job.subject.name} ({description['name']}, {size} px{position})"
    )
    job.say(f"\n{what} of {subject} on {job.spec}")
    if leak := leak_note(description):
        job.say(leak)
    images = f"{len(job.train):,} training and {len(job.test):,}" if len(job.train) else f"{len(job.test):,}"
    job.say(f"{images} test images, {len(job.classes)} classes; {job.note}")
    job.say("\n".join([f"\n{table}", *(f"warning: {line}" for line in job.warnings), f"\nreport: {job.out}"]))


def accuracies(values: Sequence[float], test_images: int) -> dict[str, Any]:
    """Entry of a report for one number: its mean over seeds, each of them, their spread, the interval of the mean."""
    mean = statistics.fmean(values)
    low, high = wilson(mean, test_images)
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"accuracy": mean, "by_seed": list(values), "std": spread, "interval": [low, high]}


def ordered(values: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """Yield (row, kind, entry) of a report's values, in the order of a table."""
    for row in LABELS:
        for kind in (CHOSEN, *KINDS, *RAW):
            if kind in values.get(row, {}):
                yield row, kind, values[row][kind]


def percent(entry: Mapping[str, Any]) -> str:
    """Format as `71.3`, or `71.3 ±0.4` over several seeds."""
    spread = "" if entry.get("std") is None else f" ±{100 * entry['std']:.1f}"
    return f"{100 * entry['accuracy']:.1f}{spread}"


def interval(entry: Mapping[str, Any]) -> str:
    """Format as `70.1-72.5`."""
    low, high = entry["interval"]
    return f"{100 * low:.1f}-{100 * high:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format columns of text, the first two to the left and numbers to the right."""
    widths = [max(len(line[at]) for line in [header, *rows]) for at in range(len(header))]
    lines = []
    for line in [header, ["-" * width for width in widths], *rows]:
        left = [word.ljust(width) for word, width in zip(line[:2], widths, strict=False)]
        right = [word.rjust(width) for word, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    return "\n".join(lines)


def kind_name(row: str, kind: str, size: Sequence[int]) -> str:
    """Name of a kind of features in tables."""
    if row == "patches":
        return f"{FILTERS} of {SIDE}x{SIDE}"
    if row == "pixels":
        return "x".join(str(min(side, PIXELS)) for side in size)
    return {"class": "class token", "mean": "mean patch", "both": "class + mean"}[kind]


def hardware(device: torch.device, threads: int) -> dict[str, Any]:
    """Hardware that the evaluation ran on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration, IndexError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"device": device.type, "cpu": cpu, "gpu": gpu, "threads": threads}


def versions() -> dict[str, str]:
    """Versions that the numbers may depend on."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, "torch": torch.__version__, "timm": timm.__version__, "PIL": active_pil()}
