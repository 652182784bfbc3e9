"""What token labels are worth, from the annotator to larger images and other classes: a table of RESULTS.md.

    python benchmarks/token_labels.py PATH --fashion DIR --jobs 2

PATH is a folder with train/CLASS/ and test/CLASS/, such as CIFAR-10's images; DIR holds Fashion-MNIST's files. A small
ResNet is trained and annotates the training images; a plain ViT and an LV-ViT are trained with these labels and
without, by recipes called supervised/tokens_*; the LV-ViT is finetuned on larger images, and carried over to
Fashion-MNIST. Each is a process with one thread; what is finished is not repeated. All are judged on all test images.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import datetime
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from benchmarks.results import line, records, section_of, table
from benchmarks.supervised import ALIKE, RESULTS, interval, run
from common.features.metrics import wilson
from evaluate.job import bootstrap, report

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "token_labels"
LABELS = RUNS / "cifar10.labels"
WITH = ["objectives.token_labeling.labels=LABELS"]  # in whose place the file stands
WITHOUT = ["objectives.token_labeling.labels=null", "objectives.token_labeling.dense_weight=0"]
DONE = "token_labels.json"  # in a run's folder, written last: its words, and the minutes of a core that it trained
TITLE = "## Token labels"
COLUMNS = (
    "network", "recipe", "epochs", "top-1", "95 %", "minus", "difference", "95 % of it", "commit", "images/s",
    "minutes of a core", "hardware", "command",
)  # fmt: skip
TEXT = """
Written by `benchmarks/token_labels.py`: CIFAR-10's 50,000 training images, 1,000 of them held out for the monitors, one seed;
top-1 in percent on all 10,000 test images, intervals over these (Wilson; of differences paired by image, bootstrap), not over
seeds. The annotator labels the training images it was trained on. *Without*: the same recipe with the class of an image alone
(exchanged patches too). The larger LV-ViT goes on from the small one. The last two are judged on Fashion-MNIST's test images:
the small LV-ViT carried over, and the same network from scratch, both for half an epoch. Minutes are those of one
core for the training, its monitors included. Nothing is published for these networks and data.

"""  # noqa: E501


@dataclass(frozen=True)
class Training:
    """One network of the table."""

    name: str
    words: list[str]  # for pretrain/run.py, the recipe first
    minus: str = ""  # the network that it is compared with
    after: str = ""  # what has to be finished before
    fashion: bool = False
    init: str = field(default="")  # the network whose weights it begins with

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return RUNS / self.name.replace(", ", "-").replace(" ", "_")


TRANSFER = ["supervised/tokens_lvvit_transfer"]
CHAIN = [
    Training("annotator", ["supervised/tokens_annotator"]),
    Training("ViT without", ["supervised/tokens_vit", *WITHOUT]),
    Training("LV-ViT without", ["supervised/tokens_lvvit", *WITHOUT]),
    Training("ViT", ["supervised/tokens_vit", *WITH], "ViT without", "labels"),
    Training("LV-ViT", ["supervised/tokens_lvvit", *WITH], "LV-ViT without", "labels"),
    Training("LV-ViT at 96 px", ["supervised/tokens_lvvit_96", *WITH], "LV-ViT", "LV-ViT", init="LV-ViT"),
    Training("Fashion-MNIST from scratch", [*TRANSFER, "model.init=null"], fashion=True),
    Training("Fashion-MNIST", TRANSFER, "Fashion-MNIST from scratch", "LV-ViT", True, "LV-ViT"),
]
BY_NAME = {training.name: training for training in CHAIN}


def words_of(training: Training, data: Path, fashion: Path | None) -> list[str]:
    """Words for pretrain/run.py."""
    place = ["data=fashion-mnist", f"data_root={fashion}"] if training.fashion else [f"data={data}"]
    begun = [f"model.init={BY_NAME[training.init].folder}"] if training.init else []
    alike = [word for word in ALIKE if not word.startswith("monitor.")]
    words = [word.replace("=LABELS", f"={LABELS}") for word in training.words]
    return [*words, *begun, *place, *alike, f"run={training.folder}", "--overwrite"]


def trained(training: Training, data: Path, fashion: Path | None) -> None:
    """Train and judge a network, unless that was done with the same words. Raises Refusal."""
    words, done = words_of(training, data, fashion), training.folder / DONE
    log = training.folder.with_suffix(".log")
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["words"] == words:
        return
    log.unlink(missing_ok=True)
    minutes = run("pretrain/run.py", words, log)
    run("evaluate/validate.py", ["--ckpt", str(training.folder), "--threads", "1", "--workers", "0"], log)
    done.write_text(json.dumps({"words": words, "minutes": minutes}) + "\n", encoding="utf-8")
    print(f"{training.name}: {100 * right(training)[0].mean():.1f} %, {minutes:.1f} min of a core", flush=True)


def labelled(data: Path) -> None:
    """Let the annotator label the training images, unless it has."""
    if not LABELS.is_file():
        words = ["--annotator", str(BY_NAME["annotator"].folder), "--data", str(data), "--out", str(LABELS)]
        minutes = run("pretrain/generate_labels.py", [*words, "--threads", "1"], LABELS.with_suffix(".log"))
        print(f"labels: {minutes:.1f} min of a core", flush=True)


def right(training: Training) -> tuple[np.ndarray, np.ndarray]:
    """(whether each test image was right, which images these are)."""
    _, outcomes = report.read(training.folder / "evaluate" / "validate.json")
    return outcomes["subject/logits"][0], outcomes["index"]


def row(training: Training, command: str) -> list[str]:
    """Cells of a network."""
    hits, index = right(training)
    cells = ["–"] * 3
    if training.minus:
        others, same = right(BY_NAME[training.minus])
        assert np.array_equal(index, same), "judged on other images"
        drawn = bootstrap.distribution([hits[None], others[None]])
        gap = f"{100 * (hits.mean() - others.mean()):+.1f}"
        cells = [training.minus, gap, interval(bootstrap.quantiles(drawn[0] - drawn[1]))]
    content, _ = report.read(training.folder / "evaluate" / "validate.json")
    about = json.loads((training.folder / "backbone.json").read_text(encoding="utf-8"))["training"]
    machine = content["hardware"]
    speed = max(each["images_per_second"] for each in records(training.folder / "metrics.jsonl", "images_per_second"))
    low, high = wilson(float(hits.mean()), len(hits))
    return [
        training.name,
        " ".join(f"`{word}`" for word in training.words),
        f"{about['images_seen'] / (49_000 if not training.fashion else 59_000):.2g}",
        f"{100 * hits.mean():.1f}",
        f"{100 * low:.1f}-{100 * high:.1f}",
        *cells,
        str(about["commit"]),
        f"{speed:.0f}",
        f"{json.loads((training.folder / DONE).read_text(encoding='utf-8'))['minutes']:.1f}",
        f"{machine['gpu'] or machine['cpu']}, 1 thread, {about['precision']}",
        f"`{command}` ({datetime.date.today()})",
    ]


def written(text: str, rows: Sequence[Sequence[str]]) -> str:
    """RESULTS.md with this section, in place of the one before."""
    before, _, after = section_of(text, TITLE)
    return f"{before}\n{TITLE}\n{TEXT}{table(COLUMNS, rows)}{after}"


def main() -> None:
    """Train, annotate, judge, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", metavar="PATH", type=Path, help="folder with train/CLASS/ and test/CLASS/")
    add("--fashion", metavar="DIR", type=Path, help="folder with Fashion-MNIST's files (default: not carried over)")
    add("--jobs", type=int, default=1, help="trainings at a time, of one thread each")
    arguments = parser.parse_args()
    data, fashion = arguments.data.expanduser().resolve(), arguments.fashion
    chain = [training for training in CHAIN if fashion is not None or not training.fashion]
    RUNS.mkdir(parents=True, exist_ok=True)
    for waits_for in ("", "labels", "LV-ViT"):
        if waits_for == "labels":
            labelled(data)
        with ThreadPoolExecutor(arguments.jobs) as threads:
            stage = [training for training in chain if training.after == waits_for]
            for one in [threads.submit(trained, training, data, fashion) for training in stage]:
                one.result()
    command = "python benchmarks/token_labels.py PATH" + (" --fashion DIR" if fashion is not None else "")
    rows = [row(training, command) for training in chain]
    RESULTS.write_text(written(RESULTS.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print("".join(line(cells) for cells in rows))


if __name__ == "__main__":
    main()
