"""What a positional label beside the class is worth, where few images have a class: a table of RESULTS.md.

    python benchmarks/supervised.py PATH --shares 0.1                      # all variants, seeds 0, 1 and 2
    python benchmarks/supervised.py PATH steps=150 --shares 0.01 --variants absolute --jobs 2

PATH is a folder with train/CLASS/ and test/CLASS/, such as CIFAR-10's images. A share is drawn by the seed, as many
images of each class, and only these are trained on; every run is judged on all test images. Each run is a process with
one thread; one that is finished is not repeated. Positional Label (arXiv 2206.04981) is what is tried here: how large
the effect is on so small a network says nothing of the paper's.
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
import os
import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from benchmarks.results import line, records, section_of, spread, table
from common import config as configuration
from common.errors import Refusal
from evaluate.job import bootstrap, report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "RESULTS.md"
PLAIN = "plain"
SHARED = ["head=half", "weight=0.5", "position=full"]  # with these the classified tokens are asked, as the paper does


def _leaking(label: str) -> list[str]:
    return ["supervised/cifar10", *(f"objectives.{label}.{option}" for option in SHARED), "allow_leak=true"]


VARIANTS = {
    PLAIN: ["supervised/cifar10"],
    "absolute": ["supervised/cifar10_absolute"],
    "absolute, as in the paper": _leaking("absolute"),
    "relative": ["supervised/cifar10_relative"],
    "relative, as in the paper": _leaking("relative"),
    "absolute, keep 0.5": ["supervised/cifar10_absolute", "objectives.absolute.keep=0.5"],
    "absolute, keep 0.25": ["supervised/cifar10_absolute", "objectives.absolute.keep=0.25"],
    "plain, twice as long": ["supervised/cifar10"],  # the work of `absolute`, spent on the class alone
}  # words for pretrain/run.py, the recipe first
TWICE = "plain, twice as long"
# nothing is held out: the labelled images are few, and nothing is chosen
ALIKE = ["monitor.held_out=0", "tensorboard=false", "threads=1", "loader.workers=0"]
DONE = "supervised.json"  # in a run's folder, written last: what was asked for, and how long it trained
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's, by df
TITLE = "## Supervised training with positional labels"
COLUMNS = (
    "labels", "variant", "words", "steps", "commit", "seeds", "top-1", "minus plain", "95 %, images", "95 %, seeds",
    "position", "operations", "time", "hardware", "command",
)  # fmt: skip
KEY = 4  # of the columns, the first ones: what makes a row another one
TEXT = """
Written by `benchmarks/supervised.py`. CIFAR-10, a share of its 50,000 training images (of each class alike, drawn by the
seed), nothing else trained on; top-1 in percent on all 10,000 test images, mean ± standard deviation over seeds, after the
same number of steps. *Absolute*, *relative*: the label has a pass of its own, without position embedding, on a crop of its
own that is not flipped; no leak. *As in the paper*: asked of the tokens that are classified, whose embedding holds the
answer, flipped or not. *Keep*: the share of the patches that is asked. *Twice as long*: the plain recipe with twice the
steps. *Minus plain*: mean of the seeds' differences; a seed has the same labelled images, order and initial backbone.
*95 %, images*: other test images, the same trainings (bootstrap, paired by image). *95 %, seeds*: other seeds and labelled
images, the same test images (Student's t of the paired differences; wide for three). *Position*: right answers of the label
in the last logged steps, on training images. *Operations* of a step beside the plain one's (`--dry-run`). *Time* of one training,
on a machine that others use too. Nothing is published for this network and these data.

"""  # noqa: E501


@dataclass(frozen=True)
class Job:
    """One run: a variant, by some of the labels, by a seed."""

    share: float
    variant: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        name = self.variant.replace(", ", "-").replace(" ", "_")
        return ROOT / "runs" / "supervised" / f"{self.share:g}-{name}-s{self.seed}"


@dataclass
class Finished:
    """What came of a run."""

    right: np.ndarray  # (n,) whether each test image was
    index: np.ndarray  # (n,) which images
    training: dict[str, Any]  # as its checkpoint says
    hardware: dict[str, Any]
    minutes: float
    position: float | None  # right answers of the positional label


def subset(data: Path, share: float, seed: int) -> Path:
    """Folder whose train/ has links to `share` of the images of each class, one at least, and whose test/ is that of
    `data`. A smaller share of the same seed is part of a larger one. Raises Refusal for a folder without classes."""
    for part in ("train", "test"):
        if not any(path.is_dir() for path in data.glob(f"{part}/*")):
            raise Refusal(f"{data}: expected {part}/CLASS/ with images in it; found no folder {data / part}/CLASS")
    if share == 1:
        return data
    folder = ROOT / "build" / "supervised" / f"{share:g}-s{seed}"
    rng = np.random.default_rng(seed)
    for place in sorted(path for path in (data / "train").iterdir() if path.is_dir()):
        images = sorted(place.iterdir())
        chosen = rng.permutation(len(images))[: max(1, round(share * len(images)))]
        (folder / "train" / place.name).mkdir(parents=True, exist_ok=True)
        for image in (images[i] for i in chosen):
            link = folder / "train" / place.name / image.name
            if not link.is_symlink():
                link.symlink_to(image.resolve())
    if not (folder / "test").is_symlink():
        (folder / "test").symlink_to((data / "test").resolve())
    return folder


def words_of(variant: str, more: Sequence[str]) -> list[str]:
    """Words for pretrain/run.py of a variant, the recipe first."""
    recipe, *words = VARIANTS[variant]
    if variant == TWICE:
        given = [word.removeprefix("steps=") for word in more if word.startswith("steps=")]
        steps = given[-1] if given else recipe_of(recipe)["steps"]
        more = [*(word for word in more if not word.startswith("steps=")), f"steps={2 * int(steps)}"]
    return [recipe, *words, *more]


def recipe_of(name: str) -> dict[str, Any]:
    """What a recipe of ours says, with those that it inherits from."""
    content: Any = OmegaConf.to_container(configuration.read_yaml(configuration.find_recipe(name, "pretrain")))
    return content


def run(script: str, words: Sequence[str], log: Path) -> float:
    """Run one of our scripts as a child process with one thread; what it says is added to `log`. Returns the minutes
    that it kept a processor busy, which others on the machine lengthen little. Raises Refusal."""
    one = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *words], stdout=file, stderr=file, env=os.environ | one
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Refusal(f"{script} ended with status {process.returncode}; its words are in {log}")
    return (usage.ru_utime + usage.ru_stime) / 60


def asked(job: Job, more: Sequence[str]) -> dict[str, Any]:
    """What a run is made of: its words, and what its recipe says."""
    words = [*words_of(job.variant, more), *ALIKE, f"seed={job.seed}"]
    return {"words": words, "recipe": recipe_of(words[0])}


def is_done(job: Job, more: Sequence[str]) -> bool:
    """Whether a run was finished with the same words and recipe."""
    done = job.folder / DONE
    return done.is_file() and asked(job, more).items() <= json.loads(done.read_text(encoding="utf-8")).items()


def trained(job: Job, data: Path, more: Sequence[str]) -> None:
    """Train and judge a run, unless that is done. Raises Refusal."""
    if is_done(job, more):
        return
    place, wanted = subset(data, job.share, job.seed), asked(job, more)
    done, log = job.folder / DONE, job.folder.with_name(f"{job.folder.name}.log")
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    begun = time.perf_counter()
    run("pretrain/run.py", [*wanted["words"], f"data={place}", f"run={job.folder}", "--overwrite"], log)
    minutes = (time.perf_counter() - begun) / 60
    run("evaluate/validate.py", ["--ckpt", str(job.folder), "--threads", "1", "--workers", "0"], log)
    done.write_text(json.dumps(wanted | {"minutes": minutes}) + "\n", encoding="utf-8")
    print(f"{job.share:g} of the labels, {job.variant}, seed {job.seed}: {spread([finished(job).right.mean()])} %, "
          f"{minutes:.1f} min", flush=True)  # fmt: skip


def finished(job: Job) -> Finished:
    """Read what came of a run. Raises Refusal for a damaged report."""
    content, outcomes = report.read(job.folder / "evaluate" / "validate.json")
    training = json.loads((job.folder / "backbone.json").read_text(encoding="utf-8"))["training"]
    lines = records(job.folder / "metrics.jsonl", "images_per_second")
    label = next((name for name in training["objectives"] if name != "classification"), None)
    return Finished(
        right=outcomes["subject/logits"][0],
        index=outcomes["index"],
        training=training,
        hardware=content["hardware"],
        minutes=json.loads((job.folder / DONE).read_text(encoding="utf-8"))["minutes"],
        position=lines[-1][f"{label}/accuracy"] if label else None,
    )


def operations(variant: str, data: Path, more: Sequence[str]) -> float:
    """Count what a step does for each image, 10^9 operations forward and backward, as `--dry-run` does. Raises
    Refusal."""
    log = ROOT / "runs" / "supervised" / f"{variant}-operations.log"
    log.unlink(missing_ok=True)
    run("pretrain/run.py", [*words_of(variant, more), *ALIKE, f"data={data}", "--dry-run"], log)
    return float(re.findall(r"^FLOPs +([\d.]+) G", log.read_text(encoding="utf-8"), re.MULTILINE)[0])


def difference(these: Sequence[Finished], plain: Sequence[Finished]) -> tuple[float, Any, Any]:
    """(top-1 of these runs minus that of the plain ones, its interval over test images, and over seeds or None).

    The runs are paired by seed and by test image. Raises Refusal where they were not judged on the same images.
    """
    if any(not np.array_equal(run.index, plain[0].index) for run in [*these, *plain]):
        raise Refusal("these runs were not judged on the same test images: remove runs/supervised and run again")
    this, other = (np.stack([run.right for run in runs]) for runs in (these, plain))  # (S, n)
    by_seed = [float(gap) for gap in this.mean(1) - other.mean(1)]
    value, S = statistics.fmean(by_seed), len(by_seed)
    drawn = bootstrap.distribution([this, other])
    over_images = bootstrap.quantiles(drawn[0] - drawn[1])
    if S - 1 not in T_975:
        return value, over_images, None
    half = T_975[S - 1] * statistics.stdev(by_seed) / S**0.5
    return value, over_images, (value - half, value + half)


def interval(ends: tuple[float, float] | None) -> str:
    """`[+0.4, +2.9]`, in percent."""
    return f"[{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]" if ends else "–"


def row(
    share: float, variant: str, runs: Mapping[str, Mapping[int, Finished]], cost: float, more: Sequence[str], jobs: int
) -> list[str]:
    """Cells of a variant at a share of the labels, by the seeds that it and the plain one have; `cost` is the ratio of
    their operations, `more` and `jobs` are of the command."""
    seeds = [seed for seed in runs[variant] if seed in runs[PLAIN]]
    these, plain = ([runs[name][seed] for seed in seeds] for name in (variant, PLAIN))
    value, over_images, over_seeds = difference(these, plain)
    training, machine = these[0].training, these[0].hardware
    shown = [word for word in VARIANTS[variant] if "supervised/" not in word]
    leak = " (LEAK allowed)" * (training["audit"] == "leak")
    positions = [run.position for run in these if run.position is not None]
    command = ["python benchmarks/supervised.py PATH", *more, f"--shares {share:g} --seeds", *map(str, seeds)]
    return [
        f"{100 * share:g} %",
        variant + leak,
        " ".join([f"`{VARIANTS[variant][0]}`", *(f"`{word}`" for word in shown)]),
        f"{training['steps']:,}",
        ", ".join(dict.fromkeys(str(run.training["commit"]) for run in these)),
        ", ".join(map(str, seeds)),
        spread([float(run.right.mean()) for run in these]),
        "–" if variant == PLAIN else f"{100 * value:+.1f}",
        "–" if variant == PLAIN else interval(over_images),
        "–" if variant == PLAIN else interval(over_seeds),
        spread(positions) if positions else "–",
        f"{cost:.1f}",
        f"{statistics.fmean(run.minutes for run in these):.1f} min",
        f"{machine['gpu'] or machine['cpu']}, 1 thread, {jobs} at a time, {training['precision']}",
        f"`{' '.join(command)}` ({datetime.date.today()})",
    ]


def written(text: str, rows: Sequence[Sequence[str]]) -> str:
    """RESULTS.md with these rows in its section, in place of those that say the same of other runs."""
    before, section, after = section_of(text, TITLE)
    old = [old.strip("| ").split(" | ") for old in section.splitlines() if old.startswith("| ")][1:]
    kept = {tuple(cells[:KEY]): cells for cells in [*old, *rows]}
    order = list(VARIANTS)
    best = sorted(kept.values(), key=lambda cells: (float(cells[0].split()[0]), order.index(cells[1].split(" (")[0])))
    return f"{before}\n{TITLE}\n{TEXT}{table(COLUMNS, best)}{after}"


def queue(shares: Sequence[float], variants: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """Yield the runs in the order in which they are wanted: of each share the first seed of all variants first."""
    for share in shares:
        for seed in seeds:
            yield from (Job(share, variant, seed) for variant in variants)


def read(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line. Raises Refusal for a number outside its range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", metavar="PATH", type=Path, help="folder with train/CLASS/ and test/CLASS/")
    add("words", nargs="*", help="key=value words for pretrain/run.py, for all variants")
    add("--shares", type=float, nargs="+", default=[0.1, 0.01, 1.0], help="shares of the labels")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="beside the plain one")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--no-training", action="store_true", help="rows of the runs that earlier calls have finished")
    add("--jobs", type=int, default=1, help="trainings at a time, of one thread each")
    arguments = parser.parse_intermixed_args(argv)
    for share in arguments.shares:
        if not 0 < share <= 1:
            raise Refusal(f"--shares {share:g}: expected shares above 0 and up to 1, such as 0.1")
    if arguments.jobs < 1:
        raise Refusal(f"--jobs {arguments.jobs}: expected at least 1")
    return arguments


def main(argv: list[str]) -> None:
    """Train, judge, write the rows."""
    arguments = read(argv)
    variants = [name for name in VARIANTS if name == PLAIN or name in arguments.variants]
    data = arguments.data.expanduser()
    jobs = list(queue(arguments.shares, variants, arguments.seeds))
    if arguments.no_training:
        jobs = [job for job in jobs if is_done(job, arguments.words)]
    with ThreadPoolExecutor(arguments.jobs) as threads:
        list(threads.map(lambda job: trained(job, data, arguments.words), jobs))
    rows, counted = [], {name: operations(name, data, arguments.words) for name in variants}
    for share in arguments.shares:
        runs: dict[str, dict[int, Finished]] = {name: {} for name in variants}
        for job in (job for job in jobs if job.share == share):
            runs[job.variant][job.seed] = finished(job)
        for name in (name for name in variants if runs[name].keys() & runs[PLAIN].keys()):
            cost = counted[name] / counted[PLAIN]
            rows.append(row(share, name, runs, cost, arguments.words, arguments.jobs))
    RESULTS.write_text(written(RESULTS.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print("".join(line(cells) for cells in rows))


if __name__ == "__main__":
    entry(main)()
