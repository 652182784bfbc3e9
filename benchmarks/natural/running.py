"""What the table of equal time is made of: the cost of a step of every row, its trainings, and what judges them.

    runs/natural/costs.json                     seconds of a step of the reference, and every row's ratio to it
    runs/natural/MINUTESmin-ROW-sSEED/          a run; its evaluate/ has the reports, evaluate/at-STEP/ those on the way
                                 done.json      what it was made of, written last: such a run is never repeated

A run that was killed goes on from its last checkpoint; one of a peer's package begins again.
"""

import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.natural import rows as settings
from benchmarks.natural.rows import EIGHTHS, PEERS, REFERENCE, ROOT, ROWS, Job, ratios, recipe_of, steps_in
from benchmarks.results import records
from common.checkpoints.storage import write_atomically
from common.errors import Refusal

ROUNDS = 3  # in which all rows take turns
SHORT, LINE = 60, 10  # steps of a run that is only timed, and of a line of its metrics; the first line is left out
DONE, ASKED = "done.json", "asked.json"
READOUTS = {"field": [], "quarters": ["--readout", "quarters"]}  # words for knn.py and linear.py
NAMES = {"field": "", "quarters": "_quarters"}  # how their reports are called


def run(script: str, words: Sequence[str], log: Path) -> None:
    """Run one of our scripts as a child process; what it says is added to `log`. Raises Refusal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        status = subprocess.run(
            [sys.executable, str(ROOT / script), *words],
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
            check=False,
        ).returncode
    if status:
        raise Refusal(f"{script} ended with status {status}; its words are in {log}")


def read(path: Path) -> Any:
    """The content of a JSON file; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def store(path: Path, content: Any) -> None:
    """Write a JSON file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def script_and_words(row: str, recipe: str, more: Sequence[str]) -> tuple[str, list[str]]:
    """(script, its words but for data, run, seed and steps) that train a row."""
    if row in PEERS:
        return "benchmarks/natural/peers.py", [PEERS[row], recipe, *more]
    return "pretrain/run.py", [recipe, *ROWS[row], *more]


def possible(rows: Sequence[str], asked_for: bool) -> list[str]:
    """The rows whose packages are there. Raises Refusal for a peer that was asked for by name and is not."""
    if importlib.util.find_spec("lightly") is not None:
        return list(rows)
    peers = [row for row in rows if row in PEERS]
    hint = "the package lightly is not installed: pip install --no-deps lightly lightly_utils"
    if peers and asked_for:
        raise Refusal(f"{peers[0]}: {hint}")
    if peers:
        print(f"left out, as {hint}: {', '.join(peers)}")
    return [row for row in rows if row not in PEERS]


# ------------------------------------------------------------------------------------------------- what a step costs


def seconds_of_a_step(metrics: Path, batch: int) -> float:
    """Median over the lines of a metrics.jsonl but for the first, in which things are warming up."""
    lines = records(metrics, "images_per_second")
    return batch / statistics.median(line["images_per_second"] for line in lines[1:] or lines)


def timed(rows: Sequence[str], recipe: str, data: str, more: Sequence[str]) -> list[dict[str, float]]:
    """Seconds of a step of each row in each of some rounds, in which they take turns."""
    batch = batch_of(recipe, more)
    short = [f"steps={SHORT}", "epochs=null", f"log_every={LINE}", f"monitor.every={SHORT}", "tensorboard=false"]
    rounds = []
    with tempfile.TemporaryDirectory() as place:
        for number in range(ROUNDS):
            rounds.append({})
            for row in rows:
                folder = Path(place) / "run"
                script, words = script_and_words(row, recipe, more)
                log = settings.RUNS / "costs.log"
                run(script, [*words, *short, f"data={data}", f"run={folder}", "--overwrite"], log)
                rounds[-1][row] = seconds_of_a_step(folder / "metrics.jsonl", batch)
                print(f"round {number + 1}, {row}: {1000 * rounds[-1][row]:.1f} ms a step", flush=True)
    return rounds


def batch_of(recipe: str, more: Sequence[str]) -> int:
    """Images of a step."""
    told = [word.removeprefix("batch=") for word in more if word.startswith("batch=")]
    return int(told[-1] if told else recipe_of(recipe)["batch"])


def costs(rows: Sequence[str], recipe: str, data: str, more: Sequence[str]) -> dict[str, float]:
    """{row: seconds of a step}, measured where that was not done before, always beside the reference.

    Raises Refusal where what was measured before is of another recipe or another machine.
    """
    path = settings.RUNS / "costs.json"
    about = {"recipe": recipe_of(recipe), "words": list(more), "machine": machine()}
    found = read(path) or about | {"rows": {}}
    for name, value in about.items():
        if found[name] != value:
            raise Refusal(f"{path} was measured with another {name}: move the folder away to begin another table")
    known = {row for row, entry in found["rows"].items() if entry["words"] == script_and_words(row, recipe, [])[1]}
    if missing := [row for row in rows if row not in known]:
        rounds = timed([REFERENCE, *(row for row in missing if row != REFERENCE)], recipe, data, more)
        found.setdefault("seconds", statistics.median(each[REFERENCE] for each in rounds))
        for row, ratio in ratios(rounds).items():
            words = script_and_words(row, recipe, [])[1]
            seconds = [each[row] for each in rounds]
            if row in missing:
                found["rows"][row] = {"words": words, "ratio": ratio, "seconds": seconds}
        store(path, found)
    return {row: found["seconds"] * found["rows"][row]["ratio"] for row in rows}


def machine() -> str:
    """What computes here, as far as it changes what a step costs."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"


# ----------------------------------------------------------------------------------------------- training and judging


def asked(job: Job, recipe: str, data: str, more: Sequence[str], seconds: float) -> dict[str, Any]:
    """What a run is made of."""
    script, words = script_and_words(job.row, recipe, more)
    steps = steps_in(job.minutes, seconds, job.row)
    words += [f"steps={steps}", "epochs=null", f"milestone_every={steps // 8}", f"seed={job.seed}", f"data={data}"]
    return {"script": script, "words": words, "recipe": recipe_of(recipe), "steps": steps, "seconds": seconds}


def is_done(job: Job) -> bool:
    """Whether a run was trained and judged."""
    return (job.folder / DONE).is_file()


def trained_and_judged(job: Job, wanted: Mapping[str, Any], data: str, baselines: Sequence[str]) -> None:
    """Train and judge a run, or what is left of that. Raises Refusal where one of other words is done already."""
    folder, log = job.folder, job.folder.with_name(f"{job.folder.name}.log")
    if (done := read(folder / DONE)) is not None:
        if differs := [name for name, value in wanted.items() if done[name] != value]:
            raise Refusal(f"{folder} was made with other {', '.join(differs)}: move it away to train it again")
        return
    begun = read(folder.with_name(f"{folder.name}.{ASKED}")) == wanted
    store(folder.with_name(f"{folder.name}.{ASKED}"), wanted)
    description = read(folder / "backbone.json") if begun else None
    if description is None or description["training"]["step"] < wanted["steps"]:
        if begun and job.row not in PEERS and (folder / "config.yaml").is_file():
            run(wanted["script"], ["--resume", str(folder)], log)
        else:
            run(wanted["script"], [*wanted["words"], f"run={folder}", "--overwrite"], log)
    for eighths in EIGHTHS:
        step = wanted["steps"] // 8 * eighths
        judged(folder / "state" / f"step_{step:08d}", folder / "evaluate" / f"at-{step}", job, data, ["knn"], [], log)
    judged(folder, folder / "evaluate", job, data, ["knn", "linear"], baselines, log)
    lines = records(folder / "metrics.jsonl", "images_per_second")
    batch = read(folder / "backbone.json")["training"]["batch"]
    steps = [0, *(line["step"] for line in lines)]
    took = sum((b - a) * batch / line["images_per_second"] for a, b, line in zip(steps, steps[1:], lines, strict=False))
    store(folder / DONE, {**wanted, "took": took / 60})
    shutil.rmtree(folder / "state", ignore_errors=True)  # gigabytes, of what is finished and judged
    for cache in folder.glob("evaluate/**/cache"):
        shutil.rmtree(cache, ignore_errors=True)


def judged(
    ckpt: Path, out: Path, job: Job, data: str, kinds: Sequence[str], baselines: Sequence[str], log: Path
) -> None:
    """Let evaluations of these kinds judge a checkpoint in both readouts, where they have not."""
    weights = read(ckpt / "backbone.json")["weights_sha256"]
    for kind in kinds:
        for readout, words in READOUTS.items():
            report = read(out / f"{kind}{NAMES[readout]}.json")
            if report is None or report["weights_sha256"] != weights:
                shared = ["--ckpt", str(ckpt), "--data", data, "--seed", str(job.seed), "--out", str(out)]
                run(f"evaluate/{kind}.py", [*shared, *words, "--baselines", *baselines], log)
