"""Linear probe of frozen features: heads for thirteen learning rates at once, one chosen on held-out training images.

    python evaluate/linear.py --ckpt runs/quickstart-001
    accelerate launch evaluate/linear.py --ckpt random --like configs/pretrain/quickstart.yaml --seeds 0 1 2

Writes RUN/evaluate/linear.json and prints a table that includes the untrained backbone and raw pixels. One process.
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/linear.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.launch import entry  # first: it sets what torch reads when it is imported

# isort: split
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import Refusal
from common.probe import EPOCHS, HELD_OUT, MOMENTUM, MOST_STEPS, RATES, Probe, num_steps, probe
from common.protocol import LABELS, alone, begin, parser
from common.report import accuracies, interval, kind_name, ordered, percent, table, tell, write


def main(argv: list[str]) -> int:
    """Arguments -> features -> heads -> report. Returns the exit status."""
    options = parser(__doc__ or "")
    add = options.add_argument
    add("--epochs", type=float, default=EPOCHS, help=f"of the heads (default: {EPOCHS}; {MOST_STEPS:,} steps at most)")
    add("--batch", type=int, default=256, help="feature vectors per step (default: 256)")
    add("--rates", type=float, nargs="+", default=list(RATES), help="learning rates for a batch of 256")
    arguments = options.parse_args(argv)
    for name in ("epochs", "batch"):
        if not getattr(arguments, name) > 0:
            raise Refusal(f"--{name} {getattr(arguments, name)}: expected more than 0")
    if not min(arguments.rates) > 0:
        raise Refusal(f"--rates {min(arguments.rates)}: expected numbers above 0")
    if not alone("the linear probe"):
        return 0
    job = begin("linear", arguments)
    if len(job.train) == len(job.classes):
        raise Refusal(
            f"data={job.spec} has one training image per class: expected two, to choose a learning rate on one"
        )
    found: dict[str, dict[str, list[Probe]]] = {}
    judged = 0
    for split in job.splits():
        job.say(f"{len(arguments.rates)} heads on {', '.join(split.train)} of {LABELS[split.row]}")
        # the subject's features and raw pixels have no seed: only their heads' start, order and held-out images do
        for seed in job.seeds if split.seed is None else [split.seed]:
            for kind, features in split.train.items():
                result = probe(
                    features, split.train_labels, split.test[kind], split.test_labels, len(job.classes),
                    seed=seed, rates=arguments.rates, batch=arguments.batch, epochs=arguments.epochs,
                )  # fmt: skip
                found.setdefault(split.row, {}).setdefault(kind, []).append(result)
        judged = len(split.test_labels)
    values = {row: {kind: entry_of(probes, judged) for kind, probes in kinds.items()} for row, kinds in found.items()}
    protocol = {
        "id": "linear/sweep",
        "optimizer": f"SGD, momentum {MOMENTUM}, no decay, cosine to 0 per step, learning rate * batch / 256",
        "rates": arguments.rates,
        "batch": arguments.batch,
        "steps": num_steps(round(len(job.train) * (1 - HELD_OUT)), arguments.batch, arguments.epochs),
        "features": "final norm, standardised by the training images' mean and variance",
        "selection": f"accuracy on {HELD_OUT:.0%} of the training images, stratified, which the heads never train on",
    }
    write(job, protocol, values, judged)
    tell(job, "linear probe accuracy (%)", shown(values, job.size, max(arguments.rates)))
    return 0


def entry_of(probes: list[Probe], judged: int) -> dict[str, Any]:
    """What the report says of one kind of features of one row: one probe for each seed."""
    return accuracies([probe.accuracy for probe in probes], judged) | {
        "rate": [probe.rate for probe in probes],
        "held_out": [probe.held_out for probe in probes],
        "best_on_test": accuracies([probe.best_on_test for probe in probes], judged),
        "best_rate": [probe.best_rate for probe in probes],
    }


def shown(values: Mapping[str, Any], size: Sequence[int], largest: float) -> str:
    """The table, with what it should not be mistaken for; `largest` is the highest learning rate that was tried."""
    header = ["features of", "", "accuracy", "95 %", "lr", "best on test*"]
    rows, edges = [], []
    for row, kind, found in ordered(values):
        label = [LABELS[row], kind_name(row, kind, size)]
        rates = "/".join(f"{rate:g}" for rate in sorted(set(found["rate"])))
        rows.append([*label, percent(found), interval(found), rates, percent(found["best_on_test"])])
        if largest in found["rate"]:
            edges.append(" ".join(label))
    notes = ["* the field's habit: the best head on the test images themselves; optimistic, to compare with papers"]
    if edges:
        notes.append(f"the largest learning rate was chosen for {', '.join(edges)}: larger --rates may do better")
    return "\n".join([table(header, rows), *notes])


if __name__ == "__main__":
    entry(main)()
