"""Linear probe of frozen features, by the field's protocols: all heads trained at once, one chosen on held-out images.

    python evaluate/linear.py --ckpt runs/quickstart-001
    python evaluate/linear.py --ckpt runs/quickstart-001 --protocol dinov2
    accelerate launch evaluate/linear.py --ckpt random --like configs/pretrain/quickstart.yaml --seeds 0 1 2

`sweep` (the default) suits small data sets; dino, dinov2, dinov3, mae, ibot, logreg and ridge are as published. Writes
RUN/evaluate/linear.json and prints a table that includes the untrained backbone and raw pixels (--baselines adds
patches). Several processes extract the features together; one trains the heads.
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/linear.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from common.errors import Refusal
from common.features.extraction import RAW, depth
from common.training.tracking import clock
from evaluate.job.arguments import LABELS, parser
from evaluate.job.evaluation import Evaluation, begin, first_process, join_processes
from evaluate.job.frozen import Split, splits
from evaluate.job.report import CHOSEN, Outcomes, accuracies, interval, kind_name, ordered, percent, table, tell, write
from evaluate.probing.probe import EPOCHS, HELD_OUT, MOST_STEPS, Labelled, Probe, better, hold_out, probes, steps_of
from evaluate.probing.protocols import PROTOCOLS, Protocol, altered, chosen, described, of_quarters, sets
from evaluate.probing.quarters import NAME
from evaluate.probing.regression import solved
from evaluate.probing.views import batches, view


def main(argv: list[str]) -> int:
    """Arguments -> features -> heads -> report. Returns the exit status."""
    arguments = options().parse_args(argv)
    protocol = check(arguments)
    job = begin("linear_quarters" if arguments.readout == "quarters" else "linear", arguments, raw=True)
    if len(job.train) == len(job.classes):
        raise Refusal(
            f"data={job.spec} has one training image per class: expected two, to choose a learning rate on one"
        )
    changes = {name: getattr(arguments, name) for name in ("epochs", "batch", "rates", "optimizer")}
    protocol, modified = altered(protocol, changes, depth(job.subject.backbone()) if protocol.name == "mae" else 0)
    join_processes("the linear probe")
    probes_of: dict[str, dict[str, list[Probe]]] = {}
    outcomes = Outcomes()
    notes, fit = list(protocol.notes), 0
    for split in splits(job, protocol.blocks):
        parts = {name: part for name, part in split.train.items() if name != "both"}
        wanted, note = sets(protocol, parts, next(iter(parts.values())).shape[1])
        notes += [note] if note and note not in notes else []
        job.say(f"{protocol.name}: {', '.join(wanted)} of {LABELS[split.row]}")
        # the subject's features and raw pixels have no seed: only their heads' start, order and held-out images do
        for seed in job.seeds if split.seed is None else [split.seed]:
            for kind, result in answers(job, protocol, split, wanted, seed).items():
                probes_of.setdefault(split.row, {}).setdefault(kind, []).append(result)
                outcomes.add(split.row, kind, result.predictions == split.test_labels.cpu())
                if result.rate in result.diverged:
                    job.warn(
                        f"the head on {kind} of {LABELS[split.row]} diverged at every learning rate: its accuracy is "
                        "that of no head at all; lower --rates"
                    )
            fit = len(hold_out(split.train_labels, HELD_OUT, seed)[0])
        outcomes.index = split.test_index
    if not first_process():
        return 0
    if protocol.training and protocol.training.batch > fit and protocol.name != "sweep":
        modified.append(f"batch {fit:,}: all images there are")
    if protocol.training and not arguments.augment and protocol.name != "sweep":
        notes.append("trained on features of the evaluation transform; --augment trains on random crops, as published")
    facts = settings(job, protocol, modified, notes, fit)
    by = "" if facts["id"].startswith("linear/sweep") else f" by {facts['id']}"
    notes += [f"not as published: {', '.join(modified)}"] if modified and protocol.name != "sweep" else []
    judged = len(outcomes.index)
    values = {row: entries(kinds, judged) for row, kinds in probes_of.items()}
    write(job, facts, values, judged, outcomes)
    tell(job, f"linear probe accuracy (%){by}", shown(values, job.size, protocol, notes))
    return 0


def options() -> argparse.ArgumentParser:
    """The command line."""
    options = parser(__doc__ or "", crop=True, raw=True, readout=True)
    add = options.add_argument
    add("--protocol", default="sweep", metavar="NAME", help=f"{', '.join(PROTOCOLS)} (default: sweep)")
    add("--augment", action="store_true", help="train on random crops, each seen by the backbone once: slow")
    add("--epochs", type=float, help=f"of the heads (sweep: {EPOCHS}, {MOST_STEPS:,} steps at most)")
    add("--batch", type=int, help="feature vectors per step (sweep: 256)")
    add("--rates", type=float, nargs="+", help="learning rates for a batch of 256; C of logreg, l2 of ridge")
    add("--optimizer", choices=("sgd", "lars", "adamw"), help="of the heads")
    return options


def check(arguments: argparse.Namespace) -> Protocol:
    """The protocol. Raises Refusal for what it cannot do, and for a number outside its range."""
    protocol = chosen(arguments.protocol)
    if arguments.readout == "quarters":
        protocol = of_quarters(protocol)
        if arguments.augment:
            raise Refusal("--augment: the quarters of random crops are not made; leave it out, or --readout quarters")
    for name in ("epochs", "batch"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise Refusal(f"--{name} {value}: expected more than 0")
    for rate in arguments.rates or ():
        if not 0 < rate < math.inf:
            raise Refusal(f"--rates {rate}: expected numbers above 0")
    if arguments.augment and protocol.training is None:
        raise Refusal(
            f"--augment: {protocol.name} is solved once from features that stay as they are; leave it out, or choose a "
            "protocol that trains: sweep, dino, dinov2, dinov3, mae or ibot"
        )
    return protocol


def answers(
    job: Evaluation, protocol: Protocol, split: Split, wanted: Mapping[str, Sequence[str]], seed: int
) -> dict[str, Probe]:
    """{kind: result}: of class, mean and both, one of RAW; or all the protocol's features and the choice."""
    after = progress(job)
    if protocol.training is None:
        return {
            kind: solved(
                protocol.name, (split.train[kind], split.train_labels, split.test[kind], split.test_labels),
                len(job.classes), protocol.strengths, seed=seed, after=after,
            )
            for kind in wanted
        }  # fmt: skip
    labelled = Labelled(split.train, split.train_labels), Labelled(split.test, split.test_labels)
    train = partial(probes, *labelled, len(job.classes), training=protocol.training, seed=seed, after=after)
    if job.arguments.augment and split.row not in RAW:
        results = train(sets=wanted, batches=augmented(job, protocol, split, seed))
    elif protocol.apart:  # each as if it were alone, in the order of images that this seed has always meant
        results = {}
        for kind, parts in wanted.items():
            results |= train(sets={kind: parts}, generator=torch.Generator().manual_seed(seed))
    else:
        results = train(sets=wanted)
    return results | ({} if protocol.apart or split.row in RAW else {CHOSEN: reduce(better, results.values())})


def augmented(
    job: Evaluation, protocol: Protocol, split: Split, seed: int
) -> Callable[[Tensor, int, int], Iterator[Any]]:
    """What makes batches of random crops of the images that train the heads."""
    subject = job.subject if split.row == "subject" else job.subject.untrained()
    backbone = subject.backbone(split.seed or 0).to(job.device)

    def make(fit: Tensor, batch: int, steps: int) -> Iterator[Any]:
        job.say(f"{steps:,} passes of the backbone over {batch:,} crops each: slow")
        return batches(
            backbone, subject.plan, job.train.subset(split.train_index[fit.cpu()].numpy()), batch=batch, steps=steps,
            seed=seed, blocks=protocol.blocks, crop=view(job.size, protocol.interpolation),
            precision=job.precision, workers=job.arguments.workers,
        )  # fmt: skip

    return make


def progress(job: Evaluation, every: float = 15.0) -> Callable[[int, int], None]:
    """Tells how far it is and how long it will take, every so many seconds."""
    began = said = time.perf_counter()

    def after(step: int, steps: int) -> None:
        nonlocal said
        now = time.perf_counter()
        if now - said > every and step < steps:
            said = now
            job.say(f"step {step:,}/{steps:,}, ETA {clock((now - began) / step * (steps - step))}")

    return after


def settings(
    job: Evaluation, protocol: Protocol, modified: Sequence[str], notes: Sequence[str], fit: int
) -> dict[str, Any]:
    """What the report says of the protocol; `fit` images train the heads."""
    name = protocol.name + "-quarters" * (protocol.features == NAME) + "+augment" * job.arguments.augment
    words: dict[str, Any] = {
        "id": f"linear/{name}{'-modified' * bool(modified)}",
        **described(protocol),
        "modified": list(modified),
        "notes": list(notes),
        "selection": f"accuracy on {HELD_OUT:.0%} of the training images, stratified, which the heads never train on",
    }
    if protocol.training is None:
        refit = "; then fitted to all training images"
        words["selection"] = words["selection"] + refit if len(protocol.strengths) > 1 else "none"
        return words
    crops = f"random crops of scale 0.08 to 1 and flips, {protocol.interpolation}; raw pixels and patches as they are"
    off = "off: the features of the evaluation transform, extracted once"
    return words | {"steps": steps_of(protocol.training, fit), "augment": crops if job.arguments.augment else off}


def entries(kinds: Mapping[str, list[Probe]], judged: int) -> dict[str, Any]:
    """What the report says of one row: where features compete, of the choice and, in it, of each of them."""
    by_kind = {kind: entry_of(probes, judged) for kind, probes in kinds.items()}
    if CHOSEN not in by_kind:
        return by_kind
    return {CHOSEN: by_kind.pop(CHOSEN) | {"by_features": by_kind}}


def entry_of(probes: list[Probe], judged: int) -> dict[str, Any]:
    """What the report says of one kind of features of one row: one probe for each seed."""
    names = ("rate", "features", "epoch", "held_out", "best_rate", "best_features", "best_epoch", "difference")
    by_seed = {name: [getattr(probe, name) for probe in probes] for name in names}
    by_seed["diverged"] = [list(probe.diverged) for probe in probes]
    best = accuracies([probe.best_on_test for probe in probes], judged)
    return accuracies([probe.accuracy for probe in probes], judged) | {"best_on_test": best} | by_seed


def shown(values: Mapping[str, Any], size: Sequence[int], protocol: Protocol, notes: Sequence[str]) -> str:
    """The table, with what it should not be mistaken for."""
    rate = {"logreg": "C", "ridge": "l2"}.get(protocol.name, "lr")
    epochs = protocol.training is not None and protocol.training.every_epoch
    chosen = ["rate", "epoch"] if epochs else ["rate"]
    header = ["features of", "", "accuracy", "95 %", rate, *chosen[1:]]
    header += ["best on test*", "difference"]
    rows, edges = [], []
    for row, kind, numbers in ordered(values):
        names = "/".join(dict.fromkeys(numbers["features"])) if kind == CHOSEN else kind_name(row, kind, size)
        label = [LABELS[row], names]
        tried = ["/".join(f"{each:g}" for each in sorted(set(numbers[name]))) for name in chosen]
        gap = f"{100 * sum(numbers['difference']) / len(numbers['difference']):+.1f}"
        rows.append([*label, percent(numbers), interval(numbers), *tried, percent(numbers["best_on_test"]), gap])
        if protocol.training and len(protocol.training.rates) > 1 and max(protocol.training.rates) in numbers["rate"]:
            edges.append(" ".join(label))
    remarks = ["* the field's habit: the best head on the test images themselves; optimistic, to compare with papers"]
    if edges:
        remarks.append(f"the largest learning rate was chosen for {', '.join(edges)}: larger --rates may do better")
    return "\n".join([table(header, rows), *remarks, *notes])


if __name__ == "__main__":
    entry(main)()
