"""Run a recipe for several seeds, judge each run, and add one row to RESULTS.md.

    python benchmarks/results.py quickstart
    python benchmarks/results.py quickstart --seeds 0 1 2 data=fashion-mnist data_root=PATH epochs=5
    python benchmarks/results.py compare --objectives-of mp3 --judge builtin data_root=PATH

Each seed is a run of its own below runs/results/: weights, order and crops differ, and so do the untrained backbone it
is compared with and the probe. A row says what was measured by which command on which commit; nothing is typed in.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import datetime
import json
import re
import statistics
import subprocess
import time
from typing import Any

from omegaconf import OmegaConf

from common import config as configuration
from common.config import flat

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "RESULTS.md"
HEADER = """# Results

Every row was written by the command in its last column (`benchmarks/results.py`); no number here was typed in. Accuracies
are in percent on the test split, mean ± standard deviation over seeds; each seed has its own weights, order, crops, its own
untrained backbone of the same architecture, and its own probe. Features: of the last block, frozen: the mean patch token, or
the class token where an objective trains it. k-NN: k = 20, cosine, temperature 0.07. Linear: the learning rate chosen on a
tenth of the training images. Cost: milliseconds of an optimizer step, data included, in the fastest of the logged intervals
(the machine is shared); a dash where it was not noted. Time is that of one pretraining, without evaluation. Published figures are other people's, on other models and data: they stand
in a column of their own, and there is none for these small settings.

| recipe | data | images seen | commit | seeds | features | k-NN: random | k-NN: pixels | k-NN: **pretrained** | linear: random | linear: pixels | linear: **pretrained** | position, held out | cost | published | hardware | time | command |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


def run(script: str, *words: str) -> None:
    """One of our scripts as a child process; its output goes to the screen."""
    subprocess.run([sys.executable, str(ROOT / script), *words], check=True)


def records(path: Path, key: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that have `key`."""
    return [record for record in map(json.loads, path.read_text().splitlines()) if key in record]


def held_out_accuracy(path: Path) -> float | None:
    """The last position accuracy on held-out images in a metrics.jsonl: of `absolute`, else of `relative`; None where
    neither was trained."""
    line = records(path, "val/loss")[-1]
    return line.get("val/absolute/accuracy", line.get("val/relative/accuracy"))


def step_cost(path: Path, batch: int) -> float:
    """Milliseconds of an optimizer step in the fastest logged interval of a metrics.jsonl."""
    return 1000 * batch / max(record["images_per_second"] for record in records(path, "images_per_second"))


def objectives_of(recipe: str) -> list[str]:
    """The objectives of a recipe, and the position embedding they ask for, as words for another one."""
    content: Any = OmegaConf.to_container(configuration.read_yaml(configuration.find_recipe(recipe, "pretrain")))
    words = {f"objectives.{name}": value for name, value in flat(content["objectives"]).items()}
    if "position_embedding" in content["model"]:
        words["model.position_embedding"] = content["model"]["position_embedding"]
    return [f"{name}={value}" for name, value in words.items()]


def spread(values: list[float]) -> str:
    """`84.1 ± 0.2`, in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


def main() -> None:
    """Train, judge, write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe of configs/pretrain, or the path of one")
    parser.add_argument("words", nargs="*", help="key=value words for pretrain/run.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives-of", metavar="RECIPE", help="take the objectives of another recipe")
    parser.add_argument("--judge", metavar="SPEC", help="labelled images to judge on (default: those of the training)")
    parser.add_argument("--linear", nargs=argparse.REMAINDER, default=[], help="further words for evaluate/linear.py")
    arguments = parser.parse_intermixed_args()
    told = [word.removeprefix("objectives.") for word in arguments.words if word.startswith("objectives.")]
    told += [f"objectives of {arguments.objectives_of}"] if arguments.objectives_of else []
    data = [word for word in arguments.words if word.startswith("data=")]
    stem = re.sub(r"[^\w.-]+", "-", "-".join([Path(arguments.recipe).stem, *told, *data]))
    judged = ["--data", arguments.judge] if arguments.judge else []
    found: dict[str, list[float]] = {}
    minutes: list[float] = []
    costs: list[float] = []
    about: dict[str, Any] = {}
    for seed in arguments.seeds:
        folder = ROOT / "runs" / "results" / f"{stem}-s{seed}"
        begun = time.perf_counter()
        borrowed = objectives_of(arguments.objectives_of) if arguments.objectives_of else []
        words = [*borrowed, *arguments.words, f"seed={seed}", f"run={folder}", "--overwrite"]
        run("pretrain/run.py", arguments.recipe, *words)
        minutes.append((time.perf_counter() - begun) / 60)
        run("evaluate/knn.py", "--ckpt", str(folder), "--seed", str(seed), *judged)
        run("evaluate/linear.py", "--ckpt", str(folder), "--seed", str(seed), *judged, *arguments.linear)
        for name in ("knn", "linear"):
            report = json.loads((folder / "evaluate" / f"{name}.json").read_text())
            values = report["values"]
            description = json.loads((folder / "backbone.json").read_text())
            kind = description["pooling"]
            for row in ("random", "pixels", "subject"):
                of_row = "pixels" if row == "pixels" else kind
                found.setdefault(f"{name} {row}", []).append(values[row][of_row]["accuracy"])
        position = held_out_accuracy(folder / "metrics.jsonl")
        found.setdefault("position", []).extend([] if position is None else [position])
        costs.append(step_cost(folder / "metrics.jsonl", description["training"]["batch"]))
        about = {"report": report, "training": description["training"], "kind": kind}
    machine, training = about["report"]["hardware"], about["training"]
    hidden = [word if not word.startswith("data_root=") else "data_root=PATH" for word in arguments.words]
    options = ["--objectives-of", arguments.objectives_of] if arguments.objectives_of else []
    options += ["--judge", arguments.judge] if arguments.judge else []
    command = " ".join(
        ["python benchmarks/results.py", arguments.recipe, *options, *hidden, "--seeds", *map(str, arguments.seeds)]
    )
    row = [
        ", ".join([Path(arguments.recipe).stem, *told]) + (" (LEAK allowed)" if training["audit"] == "leak" else ""),
        Path(training["data"]).name + (f", judged on {arguments.judge}" if arguments.judge else ""),
        f"{training['images_seen']:,}",
        str(training["commit"]),
        ", ".join(map(str, arguments.seeds)),
        {"mean": "mean patch", "class": "class token"}[about["kind"]],
        *(spread(found[f"{name} {row}"]) for name in ("knn", "linear") for row in ("random", "pixels", "subject")),
        spread(found["position"]) if found["position"] else "–",
        f"{min(costs):.0f} ms",
        "none",
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {training['precision']}",
        f"{statistics.fmean(minutes):.1f} min",
        f"`{command}` ({datetime.date.today()})",
    ]
    line = "| " + " | ".join(row) + " |\n"
    RESULTS.write_text((RESULTS.read_text() if RESULTS.exists() else HEADER) + line)
    print(line)


if __name__ == "__main__":
    main()
