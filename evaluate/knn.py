"""k-nearest-neighbour accuracy of frozen features: cosine, votes exp(similarity / 0.07) as in DINO, nothing trained.

    python evaluate/knn.py --ckpt runs/quickstart-001
    accelerate launch evaluate/knn.py --ckpt timm:vit_small_patch16_224.dino --data PATH

The features of every row are centred: less the mean of the training features. The field's number, DINO's, which is not
centred, stands beside it. Writes RUN/evaluate/knn.json and prints a table that includes the untrained backbone and raw
pixels (--baselines adds patches). Several processes extract the features together; one answers from them.
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/knn.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry  # first: it sets what torch reads when it is imported

# isort: split
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import Refusal
from common.features.metrics import accuracy
from common.features.neighbors import CENTRED, FIELD, TREATMENTS, knn_many
from evaluate.job.arguments import LABELS, parser
from evaluate.job.evaluation import begin, first_process, join_processes
from evaluate.job.frozen import splits
from evaluate.job.report import Outcomes, accuracies, interval, kind_name, ordered, percent, table, tell, write

KS = (10, 20, 100, 200)  # DINO's
HEADLINE = 20
TEMPERATURE = 0.07


def main(argv: list[str]) -> int:
    """Classify test images by their nearest training images. Returns the exit status."""
    options = parser(__doc__ or "", crop=True, raw=True)
    options.add_argument("--k", type=int, nargs="+", metavar="K", help=f"numbers of neighbours (default: {KS})")
    arguments = options.parse_args(argv)
    job = begin("knn", arguments, raw=True)
    ks = possible(arguments.k, job.training_images)
    join_processes("k-NN")
    shares: dict[str, dict[str, dict[str, dict[int, list[float]]]]] = {}  # row, kind, treatment, k: share by seed
    headline = HEADLINE if HEADLINE in ks else max(ks)
    outcomes = Outcomes()
    for split in splits(job):
        for kind, features in split.train.items():
            by_treatment = shares.setdefault(split.row, {}).setdefault(kind, {})
            for treatment in (CENTRED, FIELD):
                guesses = knn_many(
                    features, split.train_labels, split.test[kind], ks,
                    num_classes=len(job.classes), temperature=TEMPERATURE, treatment=treatment,
                )  # fmt: skip
                by_k = by_treatment.setdefault(treatment, {})
                for k, guess in guesses.items():
                    by_k.setdefault(k, []).append(accuracy(guess, split.test_labels))
                if treatment == CENTRED:
                    outcomes.add(split.row, kind, guesses[headline] == split.test_labels)
        outcomes.index = split.test_index
    if not first_process():
        return 0
    judged = len(outcomes.index)
    values = {
        row: {kind: entry_of(by_treatment, headline, judged) for kind, by_treatment in kinds.items()}
        for row, kinds in shares.items()
    }
    protocol = {"id": f"knn/{CENTRED}", "k": ks, "headline": headline, "temperature": TEMPERATURE}
    protocol |= {"similarity": "cosine", "features": TREATMENTS[CENTRED]}
    protocol["beside"] = {"id": "knn/dino", "features": TREATMENTS[FIELD], "values": FIELD}
    protocol["selection"] = f"none: k = {headline} whatever comes out"
    write(job, protocol, values, judged, outcomes)
    tell(job, "k-NN accuracy (%)", shown(values, ks, headline, job.size))
    return 0


def possible(requested: Sequence[int] | None, images: int) -> list[int]:
    """Numbers of neighbours to use with so many training images. Raises Refusal if there are too few images."""
    ks = sorted(set(requested or KS))
    if ks[0] < 1:
        raise Refusal(f"--k {ks[0]}: expected at least 1")
    too_many = [k for k in ks if k > images]
    if too_many and (requested or len(too_many) == len(ks)):
        raise Refusal(
            f"{images} training images are fewer than k={too_many[0]} neighbours: "
            f"give more images, or --k with numbers up to {images}"
        )
    return [k for k in ks if k <= images]


def entry_of(by_treatment: Mapping[str, Mapping[int, list[float]]], headline: int, judged: int) -> dict[str, Any]:
    """Entry of the report for one kind of features: headline and every k, centred; "field": the same, not centred."""
    entries = {
        treatment: accuracies(by_k[headline], judged) | {"k": {str(k): accuracies(by_k[k], judged) for k in by_k}}
        for treatment, by_k in by_treatment.items()
    }
    return entries[CENTRED] | {FIELD: entries[FIELD]}


def shown(values: Mapping[str, Any], ks: Sequence[int], headline: int, size: Sequence[int]) -> str:
    """Format the values as a table."""
    header = ["features of", "", *(f"k={k}" for k in ks), f"95 % of k={headline}", f"k={headline}, DINO's*"]
    rows = [
        [LABELS[row], kind_name(row, kind, size)]
        + [percent(entry["k"][str(k)]) for k in ks]
        + [interval(entry), percent(entry[FIELD])]
        for row, kind, entry in ordered(values)
    ]
    note = "features are centred (less the mean of the training features); * the field's protocol: not centred"
    return f"{table(header, rows)}\n{note}"


if __name__ == "__main__":
    entry(main)()
