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
from common.features.extraction import RAW
from common.features.metrics import accuracy
from common.features.neighbors import CENTRED, FIELD, TREATMENTS, WHITENED, knn, knn_many
from evaluate.job.arguments import LABELS, parser
from evaluate.job.evaluation import begin, first_process, join_processes
from evaluate.job.frozen import Split, splits
from evaluate.job.report import CHOSEN, Outcomes, accuracies, interval, kind_name, ordered, percent, table, tell, write
from evaluate.probing.probe import HELD_OUT, hold_out
from evaluate.probing.quarters import NAME

KS = (10, 20, 100, 200)  # DINO's
HEADLINE = 20
TEMPERATURE = 0.07


def main(argv: list[str]) -> int:
    """Classify test images by their nearest training images. Returns the exit status."""
    options = parser(__doc__ or "", crop=True, raw=True, readout=True)
    options.add_argument("--k", type=int, nargs="+", metavar="K", help=f"numbers of neighbours (default: {KS})")
    arguments = options.parse_args(argv)
    by_quarters = arguments.readout == "quarters"
    job = begin("knn_quarters" if by_quarters else "knn", arguments, raw=True)
    ks = possible(arguments.k, job.training_images)
    join_processes("k-NN")
    treatments = (WHITENED, CENTRED) if by_quarters else (CENTRED, FIELD)
    shares: dict[str, dict[str, dict[str, dict[int, list[float]]]]] = {}  # row, kind, treatment, k: share by seed
    blocks: dict[str, list[int]] = {}  # of each row that has several: those chosen, by seed
    headline = HEADLINE if HEADLINE in ks else max(ks)
    outcomes = Outcomes()
    for split in splits(job):
        names = {kind: kind for kind in split.train}
        if by_quarters and split.row not in RAW:
            block = best_block(split, len(job.classes), headline)
            blocks.setdefault(split.row, []).append(block)
            names = {CHOSEN: f"{NAME}{block}"}
        for kind, name in names.items():
            by_treatment = shares.setdefault(split.row, {}).setdefault(kind, {})
            for treatment in treatments:
                guesses = knn_many(
                    split.train[name], split.train_labels, split.test[name], ks,
                    num_classes=len(job.classes), temperature=TEMPERATURE, treatment=treatment,
                )  # fmt: skip
                by_k = by_treatment.setdefault(treatment, {})
                for k, guess in guesses.items():
                    by_k.setdefault(k, []).append(accuracy(guess, split.test_labels))
                if treatment == treatments[0]:
                    outcomes.add(split.row, kind, guesses[headline] == split.test_labels)
        outcomes.index = split.test_index
    if not first_process():
        return 0
    judged = len(outcomes.index)
    values = {
        row: {kind: entry_of(by_treatment, headline, judged) for kind, by_treatment in kinds.items()}
        for row, kinds in shares.items()
    }
    for row, chosen in blocks.items():
        values[row][CHOSEN]["blocks"] = chosen
    write(job, settings(ks, headline, treatments), values, judged, outcomes)
    tell(job, "k-NN accuracy (%)", shown(values, ks, headline, job.size, treatments))
    return 0


def best_block(split: Split, num_classes: int, k: int) -> int:
    """Number, from 1, of the block whose quarters tell most of the held-out training images from the others."""
    fit, held = hold_out(split.train_labels, HELD_OUT, 0)
    labels = split.train_labels
    rights = {
        kind: accuracy(
            knn(
                features[fit], labels[fit], features[held], min(k, len(fit)),
                num_classes=num_classes, temperature=TEMPERATURE, treatment=WHITENED,
            ),
            labels[held],
        )
        for kind, features in split.train.items()
    }  # fmt: skip
    return int(max(rights, key=lambda kind: rights[kind]).removeprefix(NAME))


def settings(ks: Sequence[int], headline: int, treatments: Sequence[str]) -> dict[str, Any]:
    """What the report says of the protocol; `treatments`: of the headline's features, and of those beside it."""
    first, beside = treatments
    protocol: dict[str, Any] = {
        "id": f"knn/{'quarters' if first == WHITENED else first}",
        "k": ks,
        "headline": headline,
    }
    protocol |= {"temperature": TEMPERATURE, "similarity": "cosine", "features": TREATMENTS[first]}
    name = "knn/dino" if beside == FIELD else f"knn/quarters-{beside}"
    protocol["beside"] = {"id": name, "features": TREATMENTS[beside], "values": beside}
    protocol["selection"] = f"none: k = {headline} whatever comes out"
    if first == WHITENED:
        protocol["selection"] += f"; the block by accuracy on {HELD_OUT:.0%} of the training images, stratified"
    return protocol


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
    """Entry of the report for one kind of features: headline and every k under the first treatment; by the name of the
    other, the same under that."""
    entries = {
        treatment: accuracies(by_k[headline], judged) | {"k": {str(k): accuracies(by_k[k], judged) for k in by_k}}
        for treatment, by_k in by_treatment.items()
    }
    first, beside = entries
    return entries[first] | {beside: entries[beside]}


def shown(
    values: Mapping[str, Any], ks: Sequence[int], headline: int, size: Sequence[int], treatments: Sequence[str]
) -> str:
    """Format the values as a table."""
    first, beside = treatments
    name = "DINO's*" if beside == FIELD else f"{beside}*"
    header = ["features of", "", *(f"k={k}" for k in ks), f"95 % of k={headline}", f"k={headline}, {name}"]
    rows = [
        [LABELS[row], quarters_of(entry["blocks"]) if kind == CHOSEN else kind_name(row, kind, size)]
        + [percent(entry["k"][str(k)]) for k in ks]
        + [interval(entry), percent(entry[beside])]
        for row, kind, entry in ordered(values)
    ]
    note = "features are centred (less the mean of the training features); * the field's protocol: not centred"
    if first == WHITENED:
        note = f"features are {TREATMENTS[first]}; * {TREATMENTS[beside]}"
    return f"{table(header, rows)}\n{note}"


def quarters_of(blocks: Sequence[int]) -> str:
    """Name of the features of the blocks that were chosen, one for each seed."""
    return f"quarters of block {'/'.join(map(str, dict.fromkeys(blocks)))}"


if __name__ == "__main__":
    entry(main)()
