"""Few labels on frozen features: k images of each class, or a share of them, in several draws; ridge and logistic.

    python evaluate/fewshot.py --ckpt runs/quickstart-001
    python evaluate/fewshot.py --ckpt timm:vit_small_patch16_224.dino --data PATH --shots 1 5 --shares 0.01

Ridge regression as big_vision's, logistic regression as MSN's. Writes RUN/evaluate/fewshot.json and prints tables that
include the untrained backbone and raw pixels (--baselines adds patches). Several processes extract the features
together; one answers from them.
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/fewshot.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry  # first: it sets what torch reads when it is imported

# isort: split
import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import Refusal
from common.features.ridge import scores as ridge_scores
from evaluate.job.arguments import LABELS, parser
from evaluate.job.evaluation import Evaluation, begin, first_process, join_processes
from evaluate.job.frozen import Split, splits
from evaluate.job.report import Outcomes, accuracies, kind_name, ordered, percent, table, tell, write
from evaluate.probing import subsets
from evaluate.probing.protocols import L2
from evaluate.probing.regression import Logistic, predicted

SHOTS = (1, 5, 10, 25)  # big_vision's
SHARES = (0.01, 0.1)  # of the training images
DRAWS = 5
HEADLINE = "10-shot"
STRENGTH = 4000.0  # C; MSN's penalty (arXiv 2204.07141, logistic_eval.py), 0.00025 / N on the mean loss
ITERATIONS, TOLERANCE = 300, 1e-6  # of the logistic regression
Found = dict[str, dict[str, dict[str, dict[str, list[float]]]]]  # row, kind, subset, classifier: share by draw


def main(argv: list[str]) -> int:
    """Classify test images from few labelled ones. Returns the exit status."""
    arguments = options().parse_args(argv)
    check(arguments)
    job = begin("fewshot", arguments, raw=True)
    draws, skipped = possible(job, arguments)
    join_processes("low-shot evaluation")
    headline = HEADLINE if HEADLINE in draws else list(draws)[-1]
    shares: Found = {}
    outcomes = Outcomes()
    for split in splits(job):
        job.say(f"{', '.join(draws)}, {arguments.draws} draws each, of {LABELS[split.row]}")
        for seed in job.seeds if split.seed is None else [split.seed]:
            for name, draw in draws.items():
                for number in range(arguments.draws):
                    chosen = torch.from_numpy(draw(split.train_labels.cpu().numpy(), seed=seed, draw=number))
                    for kind, classifier, right in judge(split, chosen.to(split.train_labels.device), len(job.classes)):
                        by_name = shares.setdefault(split.row, {}).setdefault(kind, {}).setdefault(name, {})
                        by_name.setdefault(classifier, []).append(right.double().mean().item())
                        if (name, classifier) == (headline, "ridge"):
                            outcomes.add(split.row, kind, right)
        outcomes.index = split.test_index
    if not first_process():
        return 0
    judged = len(outcomes.index)
    values = {
        row: {kind: entry_of(by_name, headline, judged) for kind, by_name in kinds.items()}
        for row, kinds in shares.items()
    }
    protocol = {
        "id": "fewshot",
        "subsets": list(draws),
        "draws": arguments.draws,
        "drawn": "of each class as many, at random by (seed, draw); larger ones contain smaller ones of the same draw",
        "headline": f"ridge, {headline}",
        "ridge": f"features standardised, targets 1 and -1, l2 {L2:g}, intercept not penalised",
        "logreg": f"features L2-normalised, C {STRENGTH:g}, L-BFGS, at most {ITERATIONS} iterations",
        "selection": "none",
        "std": "over draws and seeds",
        "notes": skipped,
    }
    write(job, protocol, values, judged, outcomes)
    tell(job, "low-shot accuracy (%)", "\n".join([shown(values, list(draws), job.size), *skipped]))
    return 0


def options() -> argparse.ArgumentParser:
    """Parser of the command line."""
    options = parser(__doc__ or "", crop=True, raw=True)
    add = options.add_argument
    shots, shares = " ".join(map(str, SHOTS)), " ".join(map(str, SHARES))
    add("--shots", type=int, nargs="*", metavar="K", help=f"labelled images of each class (default: {shots})")
    add("--shares", type=float, nargs="*", metavar="P", help=f"shares of the training images (default: {shares})")
    add("--draws", type=int, default=DRAWS, help=f"of each (default: {DRAWS})")
    return options


def check(arguments: argparse.Namespace) -> None:
    """Raises Refusal for a number outside its range."""
    if arguments.draws < 1:
        raise Refusal(f"--draws {arguments.draws}: expected at least 1")
    for k in arguments.shots or ():
        if k < 1:
            raise Refusal(f"--shots {k}: expected at least 1")
    for share in arguments.shares or ():
        if not 0 < share <= 1:
            raise Refusal(f"--shares {share}: expected a number above 0 and at most 1")
    if arguments.shots == [] and arguments.shares == []:
        raise Refusal("--shots and --shares: both are empty; expected a number for one of them")


def possible(job: Evaluation, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Subsets that can be drawn: ({name: its draw}, notes on what is left out).

    Raises Refusal if one that was asked for cannot be drawn.
    """
    labels = job.train.labels
    assert labels is not None
    shots = partial(subsets.shots, classes=job.classes, where=job.spec)
    draws: dict[str, Any] = {}
    skipped = []
    for k in sorted(set(SHOTS if arguments.shots is None else arguments.shots)):
        try:
            shots(labels, k, 0)
        except Refusal as refusal:
            if arguments.shots is not None:
                raise
            skipped.append(f"{k}-shot is left out: {str(refusal).split(': ', 1)[1].split(';')[0]}")
            continue
        draws[f"{k}-shot"] = partial(shots, k=k)
    for share in sorted(set(SHARES if arguments.shares is None else arguments.shares)):
        draws[f"{100 * share:g} %"] = partial(subsets.share, part=share)
    return draws, skipped


def judge(split: Split, chosen: Tensor, num_classes: int) -> list[tuple[str, str, Tensor]]:
    """Judge every kind of features with the training images `chosen` (n,).

    Returns [(kind, classifier, whether each test image was right (K,))].
    """
    labels, results = split.train_labels[chosen], []
    for kind, features in split.train.items():
        few, test = features[chosen.to(features.device)], split.test[kind]
        classes, scores = ridge_scores(few, labels, test, L2 / few.shape[1])
        results.append((kind, "ridge", classes[scores.argmax(1)] == split.test_labels))
        solver = Logistic(F.normalize(few, dim=1), labels, num_classes)
        weights, biases = solver.fit(STRENGTH, iterations=ITERATIONS, tolerance=TOLERANCE)
        guesses = predicted(weights, biases, F.normalize(test, dim=1))
        results.append((kind, "logreg", guesses == split.test_labels))
    return results


def entry_of(by_name: Mapping[str, Mapping[str, list[float]]], headline: str, judged: int) -> dict[str, Any]:
    """Entry of the report for one kind of features of one row; accuracies are by draw, and seed after seed."""
    subsets = {
        name: {classifier: accuracies(shares, judged) for classifier, shares in shares_by_classifier.items()}
        for name, shares_by_classifier in by_name.items()
    }
    return subsets[headline]["ridge"] | {"subsets": subsets}


def shown(values: Mapping[str, Any], names: Sequence[str], size: Sequence[int]) -> str:
    """Format the values, one table for each classifier."""
    blocks = []
    for classifier, title in (("ridge", "ridge regression of"), ("logreg", "logistic regression of")):
        rows = [
            [LABELS[row], kind_name(row, kind, size), *(percent(entry["subsets"][name][classifier]) for name in names)]
            for row, kind, entry in ordered(values)
        ]
        blocks.append(table([title, "", *names], rows))
    return "\n\n".join([*blocks, "mean ± standard deviation over draws"])


if __name__ == "__main__":
    entry(main)()
