"""Run a recipe for several seeds, judge each run, and add one row to RESULTS.md.

    python benchmarks/results.py quickstart
    python benchmarks/results.py quickstart --seeds 0 1 2 data=fashion-mnist data_root=PATH epochs=5
    python benchmarks/results.py compare --objectives-of mp3 --judge builtin data_root=PATH
    python benchmarks/results.py --table                     # the rows in few columns, as README has them
    python benchmarks/results.py --natural PATH --minutes 60 # every objective for the same time: natural/table.py

Each seed is a run of its own below runs/results/: weights, order and crops differ, and so do the untrained backbone it
is compared with and the probe. A row says what was measured by which command on which commit; nothing is typed in.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry

# isort: split
import argparse
import datetime
import json
import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from common import config as configuration
from common.config import flat
from common.features.neighbors import FIELD

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "RESULTS.md"
HEADER = """# Results

Every row was written by the command in its last column (`benchmarks/results.py`); no number here was typed in. Accuracies
are in percent on the test split, mean ± standard deviation over seeds; each seed has its own weights, order, crops, its own
untrained backbone of the same architecture, and its own probe. Features: of the last block, frozen: the mean patch token, or
the class token where an objective trains it. k-NN: k = 20, cosine, temperature 0.07; *centred*: all rows' features less the
mean of the training features; *DINO's*: not centred, as the field has it. Linear: the learning rate chosen on a
tenth of the training images. Cost: milliseconds of an optimizer step, data included, in the fastest of the logged intervals
(the machine is shared). Time is that of one pretraining, without evaluation. A dash stands where something was not measured.
Published figures are other people's, on other models and data: they stand in a column of their own, and there is none for
these small settings.

"""  # noqa: E501
ROWS = {"random": "random", "pixels": "pixels", "patches": "patches", "subject": "**pretrained**"}  # as columns say
NUMBERS = ("k-NN, centred", "k-NN, DINO's", "linear")
COLUMNS = (
    "recipe", "data", "images seen", "commit", "seeds", "features",
    *(f"{number}: {word}" for number in NUMBERS for word in ROWS.values()),
    "position, held out", "cost", "published", "hardware", "time", "command",
)  # fmt: skip
SECTION = "\n## "  # what comes after the table: other benchmarks' own
MINUTES = "minutes.json"  # in a run's folder: how long it trained


def run(script: str, *words: str) -> None:
    """One of our scripts as a child process; its output goes to the screen."""
    subprocess.run([sys.executable, str(ROOT / script), *words], check=True)


def records(path: Path, key: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that have `key`."""
    return [record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if key in record]


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


def line(cells: Sequence[str]) -> str:
    """A line of the table."""
    return "| " + " | ".join(cells) + " |\n"


def section_of(text: str, title: str) -> tuple[str, str, str]:
    """(what is before, in, and after the section of that title) of RESULTS.md; `before` is all of it if it has none."""
    before, _, rest = text.partition(f"\n{title}\n")
    section, mark, after = rest.partition("\n## ")
    return before, section, mark + after


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return line(columns) + "|---" * len(columns) + "|\n" + "".join(map(line, rows))


def heading() -> str:
    """RESULTS.md without a row."""
    return HEADER + table(COLUMNS, [])


SUMMARY = {
    "recipe": "recipe", "data": "data", "k-NN, DINO's: random": "k-NN: untrained", "k-NN, DINO's: pixels": "pixels",
    "k-NN, DINO's: **pretrained**": "**pretrained**", "linear: random": "linear: untrained",
    "linear: pixels": "pixels", "linear: **pretrained**": "**pretrained**", "cost": "step",
}  # fmt: skip  # columns of README's table


def summary() -> str:
    """The rows of RESULTS.md in the columns of README's table, as Markdown; deviations of the pretrained alone."""
    own, _, _ = RESULTS.read_text(encoding="utf-8").partition(SECTION)
    rows = [row for row in own.splitlines() if row.startswith("| ")][1:]
    text = line(list(SUMMARY.values())) + "|---" * len(SUMMARY) + "|\n"
    for row in rows:
        cells = dict(zip(COLUMNS, row.strip("| ").split(" | "), strict=True))
        cells["data"] = cells["data"].replace(", judged on ", "/")
        text += line([cells[name] if "**" in name else cells[name].split(" ±")[0] for name in SUMMARY])
    return text


def trained(folder: Path, words: Sequence[str], anew: bool) -> float | None:
    """Minutes that a run took to train, which it is `anew`, or was by an earlier call; None where nobody noted it."""
    if anew:
        begun = time.perf_counter()
        run("pretrain/run.py", *words, f"run={folder}", "--overwrite")
        (folder / MINUTES).write_text(json.dumps((time.perf_counter() - begun) / 60) + "\n", encoding="utf-8")
    return json.loads((folder / MINUTES).read_text(encoding="utf-8")) if (folder / MINUTES).is_file() else None


def judged(folder: Path, seed: int, words: Sequence[str], linear: Sequence[str]) -> dict[str, float]:
    """{"k-NN, centred: random": share, ...} of a run, judged now."""
    shared = ["--ckpt", str(folder), "--seed", str(seed), "--baselines", "random", "pixels", "patches", *words]
    run("evaluate/knn.py", *shared)
    run("evaluate/linear.py", *shared, *linear)
    kind = json.loads((folder / "backbone.json").read_text(encoding="utf-8"))["pooling"]
    reports = {
        name: json.loads((folder / "evaluate" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("knn", "linear")
    }
    found = {}
    for row in reports["knn"]["values"]:
        of_row, word = kind if row in ("random", "subject") else row, ROWS[row]
        neighbors, probe = (reports[name]["values"][row][of_row] for name in ("knn", "linear"))
        entries = (neighbors, neighbors[FIELD], probe)
        found |= {f"{number}: {word}": entry["accuracy"] for number, entry in zip(NUMBERS, entries, strict=True)}
    return found


def main() -> None:
    """Train, judge, write the row."""
    if any(word.split("=")[0] == "--natural" for word in sys.argv[1:]):
        from benchmarks.natural import table as natural  # which imports this module

        natural.main(sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the rows in few columns, and measure nothing")
    parser.add_argument("recipe", nargs="?", help="a recipe of configs/pretrain, or the path of one")
    parser.add_argument("words", nargs="*", help="key=value words for pretrain/run.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives-of", metavar="RECIPE", help="take the objectives of another recipe")
    parser.add_argument("--judge", metavar="SPEC", help="labelled images to judge on (default: those of the training)")
    parser.add_argument("--no-training", action="store_true", help="judge the runs that an earlier call has trained")
    parser.add_argument("--linear", nargs=argparse.REMAINDER, default=[], help="further words for evaluate/linear.py")
    arguments = parser.parse_intermixed_args()
    if arguments.table:
        print(summary(), end="")
        return
    if arguments.recipe is None:
        parser.error("a recipe is expected")
    told = [word.removeprefix("objectives.") for word in arguments.words if word.startswith("objectives.")]
    told += [f"objectives of {arguments.objectives_of}"] if arguments.objectives_of else []
    data = [word for word in arguments.words if word.startswith("data=")]
    stem = re.sub(r"[^\w.-]+", "-", "-".join([Path(arguments.recipe).stem, *told, *data]))
    borrowed = objectives_of(arguments.objectives_of) if arguments.objectives_of else []
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    minutes: list[float | None] = []
    for seed in arguments.seeds:
        folder = ROOT / "runs" / "results" / f"{stem}-s{seed}"
        words = [arguments.recipe, *borrowed, *arguments.words, f"seed={seed}"]
        minutes.append(trained(folder, words, not arguments.no_training))
        spec = ["--data", arguments.judge] if arguments.judge else []
        for name, share in judged(folder, seed, spec, arguments.linear).items():
            found[name].append(share)
        position = held_out_accuracy(folder / "metrics.jsonl")
        found["position, held out"] += [] if position is None else [position]
        description = json.loads((folder / "backbone.json").read_text(encoding="utf-8"))
        found["cost"].append(step_cost(folder / "metrics.jsonl", description["training"]["batch"]))
    machine = json.loads((folder / "evaluate" / "knn.json").read_text(encoding="utf-8"))["hardware"]
    training, kind = description["training"], description["pooling"]
    hidden = [word if not word.startswith("data_root=") else "data_root=PATH" for word in arguments.words]
    options = ["--objectives-of", arguments.objectives_of] if arguments.objectives_of else []
    options += ["--judge", arguments.judge] if arguments.judge else []
    command = " ".join(
        ["python benchmarks/results.py", arguments.recipe, *options, *hidden, "--seeds", *map(str, arguments.seeds)]
    )
    cells = {name: spread(shares) if shares else "–" for name, shares in found.items()}
    cells |= {
        "recipe": ", ".join([Path(arguments.recipe).stem, *told]) + " (LEAK allowed)" * (training["audit"] == "leak"),
        "data": Path(training["data"]).name + (f", judged on {arguments.judge}" if arguments.judge else ""),
        "images seen": f"{training['images_seen']:,}",
        "commit": str(training["commit"]),
        "seeds": ", ".join(map(str, arguments.seeds)),
        "features": {"mean": "mean patch", "class": "class token"}[kind],
        "cost": f"{min(found['cost']):.0f} ms",
        "published": "none",
        "hardware": f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {training['precision']}",
        "time": "–" if None in minutes else f"{statistics.fmean(minutes):.1f} min",  # type: ignore[arg-type, type-var]
        "command": f"`{command}` ({datetime.date.today()})",
    }
    row = line([cells[name] for name in COLUMNS])
    own, mark, others = (RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else heading()).partition(SECTION)
    RESULTS.write_text(own + row + mark + others, encoding="utf-8")
    print(row)


if __name__ == "__main__":
    entry(lambda _: main())()
