"""Position against meaning, layer by layer: how well a linear probe tells where a single token is from, and how well
the mean token tells what the image shows (k-NN, where there are labels).

    python evaluate/layers.py --ckpt runs/quickstart-001
    python evaluate/layers.py --ckpt timm:vit_small_patch16_224.dino --data PATH --images 5000 --seeds 0 1 2

Writes RUN/evaluate/layers.json and the figure layers.png beside it, and prints a table. Beside every layer stand the
same layer of the untrained backbone and the raw pixels of single patches. One process.
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/layers.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry  # first: it sets what torch reads when it is imported

# isort: split
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common.batches.sampler import order
from common.checkpoints.storage import write_atomically
from common.data import Images
from common.errors import Refusal
from common.features.metrics import accuracy
from common.features.neighbors import CENTRED, TREATMENTS, knn
from common.models import Backbone, Features
from common.training.precision import DTYPES
from evaluate.explaining import layerwise
from evaluate.explaining.curves import Values, draw_layers
from evaluate.explaining.layerwise import Layer, groups, independent, patches, read_position, sample
from evaluate.job import frozen
from evaluate.job.arguments import LABELS, parser
from evaluate.job.evaluation import Evaluation, any_splits, begin, only_first
from evaluate.job.report import accuracies, interval, leak_note, percent, table, write

IMAGES, LEAST = 10_000, 10  # training images; a fifth as many are judged
K, TEMPERATURE = 20, 0.07
MEMORY = 2 << 30  # bytes of tokens at a time; deep and wide backbones are run once more for every such portion


def main(argv: list[str]) -> int:
    """Probe every layer of a backbone for position and meaning. Returns the exit status."""
    options = parser(__doc__ or "", crop=True)
    options.add_argument(
        "--images", type=int, default=IMAGES, metavar="N",
        help=f"training images at most; a fifth as many test images (default: {IMAGES:,})",
    )  # fmt: skip
    arguments = options.parse_args(argv)
    if arguments.images < LEAST:
        raise Refusal(f"--images {arguments.images}: expected at least {LEAST}")
    if not only_first("layers"):
        return 0
    job = begin("layers", arguments, splits=any_splits)
    job.train, job.test = some(job.train, arguments.images), some(job.test, arguments.images // 5)
    if len(job.train) < LEAST or len(job.test) < 2:
        raise Refusal(
            f"data={job.spec} has {len(job.train)} training and {len(job.test)} test images: expected at least {LEAST} "
            "and 2, to train a probe on some and judge it on others"
        )
    values, judged = measure(job)
    notes = remarks(job)
    protocol = {
        "id": f"layers/position+knn/{CENTRED}",
        "images": arguments.images,
        "position": {
            "probe": "softmax of one token, whitened by the training tokens; SGD, momentum 0.9, cosine to 0",
            "tokens": [layerwise.TRAIN_TOKENS, layerwise.TEST_TOKENS],
            "steps": layerwise.STEPS,
            "batch": layerwise.BATCH,
            "rates": list(layerwise.RATES),
            "selection": "learning rate by accuracy on a tenth of the training tokens",
            "interval": "Wilson over as many independent tokens as the variance between test images allows",
        },
        "knn": {
            "k": neighbors(job),
            "temperature": TEMPERATURE,
            "features": f"mean patch token, {TREATMENTS[CENTRED]}",
            "similarity": "cosine",
        },
        "selection": "none, but for the learning rate of the position probe",
        "norm": "the final norm after every block of a plain ViT, after the last stage elsewhere",
        "notes": notes,
    }
    picture = job.out.with_suffix(".png")
    figure = draw_layers(values, title(job), notes, neighbors(job) if job.classes else None)
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(picture, lambda aside: figure.savefig(aside, format="png", dpi=200))
    write(job, protocol, values, judged)  # last: a report says that what belongs to it is there
    job.say("\n" + "\n".join(title(job)))
    job.say(f"\n{table_of(values)}\n\n" + "\n".join([*notes, "", f"figure: {picture}", f"report: {job.out}"]))
    return 0


def some(images: Images, most: int) -> Images:
    """Draw at most so many of `images`, the same ones every time."""
    return images if len(images) <= most else images.subset(sorted(order(0, 0, len(images))[:most]))


def measure(job: Evaluation) -> tuple[Values, int]:
    """Measure every layer of every row: ({row: {layer: entry}}, number of test images that were judged)."""
    say = functools.cache(job.say)  # each layer would be told of the same unreadable files
    rows = [("random", job.subject.untrained(), seed) for seed in job.seeds]
    if job.subject.state is not None:
        rows.insert(0, ("subject", job.subject, job.seeds[0]))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {"pixels": {}}
    for row, subject, seed in rows:
        backbone = subject.backbone(seed).to(job.device)
        if math.prod(backbone.grid) < 2:
            raise Refusal(f"{backbone.config.name} ends with a 1x1 grid: one patch has no position; use larger images")
        job.say(f"{LABELS[row]} (seed {seed})" if row == "random" else job.subject.name)
        layers = results.setdefault(row, {})
        for numbers in portions(job, backbone):
            see = functools.partial(features_of, job, backbone, numbers)
            for number, train, test in zip(numbers, *sample_both(job, see, say), strict=True):
                for images, layer in ((job.train, train), (job.test, test)):  # a mean has every token in it
                    means = {"mean": layer.mean, "index": layer.index}
                    what = f"{job.subject.name if row == 'subject' else LABELS[row]}, layer {number + 1}"
                    job.refuse_not_finite(means, images, what, (backbone, subject.plan), cached=False)
                # the subject has no seed: only the start and the order of its probes do
                seeds = job.seeds if row == "subject" else [seed]
                result = judge_layer(job, train, test, seeds)
                layers.setdefault(f"layer {number + 1}", []).append(result)
                job.say(f"  layer {number + 1}: position {100 * result['readings'][0].accuracy:.1f} %")
    grids = {tuple(by_seed[0]["grid"]) for layers in results.values() for by_seed in layers.values()}
    for grid in sorted(grids, reverse=True):
        job.say(f"raw pixels of {grid[0]}x{grid[1]} patches")
        (train,), (test,) = sample_both(job, lambda batch, grid=grid: [patches(batch, grid)], say)  # type: ignore[misc]
        results["pixels"][f"{grid[0]}x{grid[1]}"] = [judge_layer(job, train, test, job.seeds)]
    values = {row: {layer: entry_of(by_seed) for layer, by_seed in layers.items()} for row, layers in results.items()}
    if job.classes:
        whole = frozen.pixels(job)
        guesses = knn(whole.train["pixels"], whole.train_labels, whole.test["pixels"], neighbors(job))
        share = accuracy(guesses, whole.test_labels)
        values["pixels"]["image"] = {"knn": accuracies([share], len(guesses))}
    return values, len(test.index)


def portions(job: Evaluation, backbone: Backbone) -> list[range]:
    """Group the layers whose tokens fit into memory together."""
    depth = len(backbone.model.feature_info)
    blank = torch.zeros(1, backbone.channels, *backbone.size, dtype=torch.uint8)
    sizes = []
    for features in features_of(job, backbone, range(depth), blank):
        tokens = [
            len(images) * (1 + layerwise.drawn(len(images), features.tokens.shape[1], test=images is job.test))
            for images in (job.train, job.test)
        ]
        sizes.append(4 * features.tokens.shape[2] * sum(tokens))
    return list(groups(sizes, MEMORY))


@torch.no_grad()
def features_of(job: Evaluation, backbone: Backbone, numbers: range, batch: Tensor) -> list[Features]:
    """Features of a batch from layers `numbers`, in the position mode in which they were trained."""
    dtype = DTYPES[job.precision]
    with torch.autocast(job.device.type, dtype=dtype, enabled=dtype != torch.float32):
        layers = backbone.layers(batch.to(job.device), len(backbone.model.feature_info), job.subject.plan)
    return [layers[at] for at in numbers]


def sample_both(
    job: Evaluation, see: Callable[[Tensor], Sequence[Features]], say: Callable[[str], None]
) -> tuple[list[Layer], list[Layer]]:
    """Sample tokens of training and test images."""
    limit = dataclasses.replace(job.limit, images=len(job.train) + len(job.test))  # of those that are left of all
    eye = dataclasses.replace(job.eye, limit=limit)
    train, test = (sample(see, images, eye, test=images is job.test, warn=say) for images in (job.train, job.test))
    return train, test


def judge_layer(job: Evaluation, train: Layer, test: Layer, seeds: Sequence[int]) -> dict[str, Any]:
    """Judge one layer of one backbone: its position probe for every seed, and its neighbours."""
    readings = [read_position(train, test, seed) for seed in seeds]
    result = {"grid": train.grid, "readings": readings, "tokens": test.places.shape[1]}
    if job.classes:
        labels, truth = (
            torch.from_numpy(images.labels)[layer.index].to(layer.mean.device)
            for images, layer in ((job.train, train), (job.test, test))
        )
        result["knn"] = accuracy(knn(train.mean, labels, test.mean, neighbors(job), temperature=TEMPERATURE), truth)
    return result


def neighbors(job: Evaluation) -> int:
    """Number of neighbours k: DINO's 20, or nine tenths of the training images if they are fewer."""
    return min(K, len(job.train) * 9 // 10)


def entry_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Entry of the report for one layer, from its results in one backbone or, untrained, in one per seed."""
    readings, (h, w) = [reading for result in results for reading in result["readings"]], results[0]["grid"]
    right = torch.stack([reading.right for reading in readings]).mean(0)
    position = accuracies([reading.accuracy for reading in readings], independent(right, results[0]["tokens"])) | {
        "distance": statistics.fmean(reading.distance for reading in readings),
        "rate": [reading.rate for reading in readings],
        "tokens_per_image": results[0]["tokens"],
    }
    entry = {"grid": [h, w], "chance": 1 / (h * w), "position": position}
    if "knn" in results[0]:
        entry["knn"] = accuracies([result["knn"] for result in results], len(right))
    return entry


def title(job: Evaluation) -> tuple[str, str]:
    """Title and subtitle: what was judged, and on what."""
    description = job.subject.description
    size = "x".join(map(str, description["size"]))
    position = {"none": "without position embedding", "full": "with position embedding"}[description["position"]]
    seeds = f"seed{'s' if len(job.seeds) > 1 else ''} {', '.join(map(str, job.seeds))}"
    return (
        f"Position against meaning: {job.subject.name}",
        f"{description['name']}, {size} px, {position}; {job.spec}, {len(job.train):,} training and {len(job.test):,} "
        f"test images; {seeds}; bands are 95 % intervals",
    )


def remarks(job: Evaluation) -> list[str]:
    """Remarks that a reader has to know before believing the curves."""
    leak = leak_note(job.subject.description)
    notes = [leak[0].upper() + leak[1:] + "."] if leak else []
    if job.subject.description["position"] == "full":
        notes.append("Tokens carry a position encoding: that position can be read from them is no finding.")
    if not job.classes:
        notes.append("No labels in the data: only position is drawn.")
    split = job.note.startswith(f"as split in {job.spec}") and "; " not in job.note  # as it is usual
    return [*notes, *([] if split else [job.note])]


def table_of(values: Values) -> str:
    """Print the entries as a table."""
    pixels, rows = values["pixels"], [row for row in ("subject", "random") if row in values]
    halves = [half for half in ("position", "knn") if half in values[rows[0]]["layer 1"]]
    header, lines = ["", "grid", "chance"], []
    for half in halves:
        names = [LABELS[row] for row in rows]
        names[0] = f"{half}: {names[0]}"
        header += [word for name in names for word in (name, "95 %")]
    for layer, first in values[rows[0]].items():
        entries = [values[row][layer][half] for half in halves for row in rows]
        numbers = [word for entry in entries for word in (percent(entry), interval(entry))]
        lines.append([layer, "x".join(map(str, first["grid"])), f"{100 * first['chance']:.1f}", *numbers])
    text = table(header, lines)
    for name, raw in pixels.items():
        shares = [f"{half} {percent(raw[half])} ({interval(raw[half])})" for half in halves if half in raw]
        text += f"\nraw pixels, {'whole image' if name == 'image' else name + ' patches'}: {', '.join(shares)}"
    return text


if __name__ == "__main__":
    entry(main)()
