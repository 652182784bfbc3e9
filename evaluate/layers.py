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
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from common.batches.sampling import order
from common.checkpoints.storage import write_atomically
from common.data import Images
from common.errors import Refusal
from common.features.metrics import accuracy
from common.features.neighbors import CENTRED, TREATMENTS, knn
from common.models import Backbone, Features
from common.training.precision import DTYPES
from evaluate.explaining import layerwise
from evaluate.explaining.layerwise import Layer, groups, independent, patches, read_position, sample
from evaluate.job import frozen
from evaluate.job.arguments import LABELS, parser
from evaluate.job.evaluation import Evaluation, any_splits, begin, only_first
from evaluate.job.report import accuracies, interval, leak_note, percent, table, write

IMAGES, LEAST = 10_000, 10  # training images; a fifth as many are judged
K, TEMPERATURE = 20, 0.07
MEMORY = 2 << 30  # bytes of tokens at a time; deep and wide backbones are run once more for every such portion
Values = dict[str, dict[str, Any]]  # row -> layer -> what was found


def main(argv: list[str]) -> int:
    """Arguments -> tokens of every layer -> probes -> report and figure. Returns the exit status."""
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
    values, judged = measured(job)
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
    figure = drawn(values, title(job), notes, neighbors(job) if job.classes else None)
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(picture, lambda aside: figure.savefig(aside, format="png", dpi=200))
    write(job, protocol, values, judged)  # last: a report says that what belongs to it is there
    job.say("\n" + "\n".join(title(job)))
    job.say(f"\n{shown(values)}\n\n" + "\n".join([*notes, "", f"figure: {picture}", f"report: {job.out}"]))
    return 0


# ------------------------------------------------------------------------------------------------------------ the data


def some(images: Images, most: int) -> Images:
    """At most so many of `images`, the same ones every time."""
    return images if len(images) <= most else images.subset(sorted(order(0, 0, len(images))[:most]))


# --------------------------------------------------------------------------------------------------------- the numbers


def measured(job: Evaluation) -> tuple[Values, int]:
    """({row: {layer: entry}}, number of test images that were judged)."""
    say = functools.cache(job.say)  # each layer would be told of the same unreadable files
    rows = [("random", job.subject.untrained(), seed) for seed in job.seeds]
    if job.subject.state is not None:
        rows.insert(0, ("subject", job.subject, job.seeds[0]))
    found: dict[str, dict[str, list[dict[str, Any]]]] = {"pixels": {}}
    for row, subject, seed in rows:
        backbone = subject.backbone(seed).to(job.device)
        if math.prod(backbone.grid) < 2:
            raise Refusal(f"{backbone.config.name} ends with a 1x1 grid: one patch has no position; use larger images")
        job.say(f"{LABELS[row]} (seed {seed})" if row == "random" else job.subject.name)
        layers = found.setdefault(row, {})
        for wanted in portions(job, backbone):
            see = functools.partial(looked, job, backbone, wanted)
            for number, train, test in zip(wanted, *both(job, see, say), strict=True):
                for images, layer in ((job.train, train), (job.test, test)):  # a mean has every token in it
                    means = {"mean": layer.mean, "index": layer.index}
                    what = f"{job.subject.name if row == 'subject' else LABELS[row]}, layer {number + 1}"
                    job.refuse_not_finite(means, images, what, backbone, subject.plan)
                # the subject has no seed: only the start and the order of its probes do
                seeds = job.seeds if row == "subject" else [seed]
                result = one(job, train, test, seeds)
                layers.setdefault(f"layer {number + 1}", []).append(result)
                job.say(f"  layer {number + 1}: position {100 * result['readings'][0].accuracy:.1f} %")
    grids = {tuple(results[0]["grid"]) for layers in found.values() for results in layers.values()}
    for grid in sorted(grids, reverse=True):
        job.say(f"raw pixels of {grid[0]}x{grid[1]} patches")
        (train,), (test,) = both(job, functools.partial(cut, grid), say)
        found["pixels"][f"{grid[0]}x{grid[1]}"] = [one(job, train, test, job.seeds)]
    values = {row: {layer: entry_of(results) for layer, results in layers.items()} for row, layers in found.items()}
    if job.classes:
        whole = frozen.pixels(job)
        guesses = knn(whole.train["pixels"], whole.train_labels, whole.test["pixels"], neighbors(job))
        share = accuracy(guesses, whole.test_labels)
        values["pixels"]["image"] = {"knn": accuracies([share], len(guesses))}
    return values, len(test.index)


def portions(job: Evaluation, backbone: Backbone) -> list[range]:
    """Which layers to keep at a time, by the memory that their tokens take."""
    depth = len(backbone.model.feature_info)
    blank = torch.zeros(1, backbone.channels, *backbone.size, dtype=torch.uint8)
    sizes = []
    for features in looked(job, backbone, range(depth), blank):
        tokens = [
            len(images) * (1 + layerwise.drawn(len(images), features.tokens.shape[1], test=images is job.test))
            for images in (job.train, job.test)
        ]
        sizes.append(4 * features.tokens.shape[2] * sum(tokens))
    return list(groups(sizes, MEMORY))


def cut(grid: tuple[int, int], batch: Tensor) -> list[Features]:
    """Raw pixels as a layer."""
    return [patches(batch, grid)]


@torch.no_grad()
def looked(job: Evaluation, backbone: Backbone, wanted: range, batch: Tensor) -> list[Features]:
    """The `wanted` layers' features of a batch, in the position mode in which they were trained."""
    dtype = DTYPES[job.precision]
    with torch.autocast(job.device.type, dtype=dtype, enabled=dtype != torch.float32):
        layers = backbone.layers(batch.to(job.device), len(backbone.model.feature_info), job.subject.plan)
    return [layers[at] for at in wanted]


def both(
    job: Evaluation, see: Callable[[Tensor], Sequence[Features]], say: Callable[[str], None]
) -> tuple[list[Layer], list[Layer]]:
    """Tokens of training and test images."""
    size, channels, workers = job.size, len(job.subject.description["mean"]), job.arguments.workers
    limit = dataclasses.replace(job.limit, images=len(job.train) + len(job.test))  # of those that are left of all
    train, test = (
        sample(see, images, size, job.crop, channels, test=images is job.test, workers=workers, warn=say, limit=limit)
        for images in (job.train, job.test)
    )
    return train, test


def one(job: Evaluation, train: Layer, test: Layer, seeds: Sequence[int]) -> dict[str, Any]:
    """One layer of one backbone: its position probe for every seed, and its neighbours."""
    readings = [read_position(train, test, seed) for seed in seeds]
    found = {"grid": train.grid, "readings": readings, "tokens": test.places.shape[1]}
    if job.classes:
        labels, truth = (
            torch.from_numpy(images.labels)[layer.index].to(layer.mean.device)
            for images, layer in ((job.train, train), (job.test, test))
        )
        found["knn"] = accuracy(knn(train.mean, labels, test.mean, neighbors(job), temperature=TEMPERATURE), truth)
    return found


def neighbors(job: Evaluation) -> int:
    """k: DINO's 20, or as many as there surely are."""
    return min(K, len(job.train) * 9 // 10)


def entry_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report says of one layer, found in one backbone or, untrained, in one per seed."""
    readings, (h, w) = [reading for each in found for reading in each["readings"]], found[0]["grid"]
    right = torch.stack([reading.right for reading in readings]).mean(0)
    position = accuracies([reading.accuracy for reading in readings], independent(right, found[0]["tokens"])) | {
        "distance": statistics.fmean(reading.distance for reading in readings),
        "rate": [reading.rate for reading in readings],
        "tokens_per_image": found[0]["tokens"],
    }
    entry = {"grid": [h, w], "chance": 1 / (h * w), "position": position}
    return entry | ({"knn": accuracies([each["knn"] for each in found], len(right))} if "knn" in found[0] else {})


# ------------------------------------------------------------------------------------------------------------ in words


def title(job: Evaluation) -> tuple[str, str]:
    """What was judged, and on what."""
    about = job.subject.description
    size = "x".join(map(str, about["size"]))
    position = {"none": "without position embedding", "full": "with position embedding"}[about["position"]]
    seeds = f"seed{'s' if len(job.seeds) > 1 else ''} {', '.join(map(str, job.seeds))}"
    return (
        f"Position against meaning: {job.subject.name}",
        f"{about['name']}, {size} px, {position}; {job.spec}, {len(job.train):,} training and {len(job.test):,} test "
        f"images; {seeds}; bands are 95 % intervals",
    )


def remarks(job: Evaluation) -> list[str]:
    """What a reader has to know before believing the curves."""
    leak = leak_note(job.subject.description)
    notes = [leak[0].upper() + leak[1:] + "."] if leak else []
    if job.subject.description["position"] == "full":
        notes.append("Tokens carry a position encoding: that position can be read from them is no finding.")
    if not job.classes:
        notes.append("No labels in the data: only position is drawn.")
    split = job.note.startswith(f"as split in {job.spec}") and "; " not in job.note  # as it is usual
    return [*notes, *([] if split else [job.note])]


def shown(values: Values) -> str:
    """The table."""
    pixels, rows = values["pixels"], [row for row in ("subject", "random") if row in values]
    halves = [half for half in ("position", "knn") if half in values[rows[0]]["layer 1"]]
    header, lines = ["", "grid", "chance"], []
    for half in halves:
        names = [LABELS[row] for row in rows]
        names[0] = f"{half}: {names[0]}"
        header += [word for name in names for word in (name, "95 %")]
    for layer, first in values[rows[0]].items():
        found = [values[row][layer][half] for half in halves for row in rows]
        numbers = [word for entry in found for word in (percent(entry), interval(entry))]
        lines.append([layer, "x".join(map(str, first["grid"])), f"{100 * first['chance']:.1f}", *numbers])
    text = table(header, lines)
    for name, raw in pixels.items():
        told = [f"{half} {percent(raw[half])} ({interval(raw[half])})" for half in halves if half in raw]
        text += f"\nraw pixels, {'whole image' if name == 'image' else name + ' patches'}: {', '.join(told)}"
    return text


# ---------------------------------------------------------------------------------------------------------- the figure

BLUE, ORANGE, GREY, INK = "#0072b2", "#d55e00", "#6e6e6e", "#222222"  # Okabe and Ito's, told apart by everyone
CURVES = {"subject": (BLUE, "o", "-"), "random": (ORANGE, "s", "--")}  # told apart without colour too


def drawn(values: Values, words: tuple[str, str], notes: Sequence[str], k: int | None) -> Figure:
    """The figure: position by layer; with labels (`k` neighbours), meaning by layer; on one grid, the two against each
    other."""
    rows = [row for row in CURVES if row in values]
    one_grid = len({tuple(entry["grid"]) for entry in values[rows[0]].values()}) == 1
    panels = 1 if k is None else 3 if one_grid else 2
    width, height = (6.4 if panels == 1 else 1.2 + 3.6 * panels), 3.45
    about = [line for text in (words[1], *notes) for line in textwrap.wrap(text, int(15.5 * width))]
    head = 0.36 + 0.16 * len(about)  # inches
    figure = Figure(figsize=(width, height + head), layout="constrained", facecolor="white")
    top = 1 - 0.06 / (height + head)
    figure.text(0.1 / width, top, words[0], ha="left", va="top", size=12, weight="bold", color=INK)
    top -= 0.25 / (height + head)
    figure.text(0.1 / width, top, "\n".join(about), ha="left", va="top", size=8, color=GREY)
    figure.get_layout_engine().set(rect=(0, 0, 1, height / (height + head)), wspace=0.06)  # type: ignore
    axes = figure.subplots(1, panels, squeeze=False)[0]
    depth_name = "block" if one_grid else "stage"
    names = ["Where: place of a single token, linear probe"]
    by_layer(axes[0], values, rows, "position", depth_name)
    if panels > 1:
        names.append(f"What: class of the image, {k}-NN of the mean token")
        by_layer(axes[1], values, rows, "knn", depth_name)
    if panels > 2:
        names.append(f"What against where, {depth_name} by {depth_name}")
        path(axes[2], values, rows)
    for panel, name in zip(axes, names, strict=True):
        panel.set_title(name, loc="left", size=9.5, color=INK)
    return figure


def by_layer(axes: Axes, values: Values, rows: Sequence[str], half: str, depth_name: str) -> None:
    """One half of the question: accuracy (%) over depth, with intervals as bands, from the pixels on."""
    layers = list(values[rows[0]].values())
    pixels = [values["pixels"]["x".join(map(str, entry["grid"]))] for entry in layers]
    at, labels = range(len(layers) + 1), []
    start = pixels[0][half]
    for row in rows:
        colour = CURVES[row][0]
        found = [start, *(entry[half] for entry in values[row].values())]
        low, high = ([100 * entry["interval"][side] for entry in found] for side in (0, 1))
        axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        heights = [100 * entry["accuracy"] for entry in found]
        curve(axes, at, heights, row)
        labels.append((heights[-1], LABELS[row], colour))
    if half == "position":
        for line, word, heights in (
            ("-.", "pixels of one patch", [100 * entry[half]["accuracy"] for entry in pixels]),
            (":", "chance", [100 * entry["chance"] for entry in layers]),
        ):
            axes.plot(at, [heights[0], *heights], line, color=GREY, linewidth=1.2, drawstyle="steps-mid")
            labels.append((heights[-1], word, GREY))
        axes.set_ylim(0, min(101, 1.08 * axes.get_ylim()[1]))
    else:
        whole = 100 * values["pixels"]["image"][half]["accuracy"]
        axes.axhline(whole, color=GREY, linewidth=1.2, linestyle="-.")
        labels.append((whole, "pixels of the image", GREY))
    axes.plot([0], [100 * start["accuracy"]], "D", color=GREY, markersize=5, zorder=3)
    step = math.ceil(len(layers) / 8)  # further apart than `pixels` is wide
    ticks = [0, *range(step, len(layers) + 1, step)]
    axes.set_xticks(ticks, ["pixels", *map(str, ticks[1:])])
    axes.set_xlabel(depth_name)
    axes.set_ylabel("accuracy (%)")
    dress(axes)
    beside(axes, labels)


def path(axes: Axes, values: Values, rows: Sequence[str]) -> None:
    """Both halves against each other: every layer is a point, and depth is the way from one to the next."""
    start = next(iter(values["pixels"].values()))
    for row in rows:
        colour = CURVES[row][0]
        wheres, whats = (
            [100 * entry[half]["accuracy"] for entry in (start, *values[row].values())] for half in ("position", "knn")
        )
        curve(axes, wheres, whats, row)
        last = len(wheres) - 1
        for number, word, offset in ((1, "1", (-7, 5)), (last, f"{last}  {LABELS[row]}", (7, -3))):
            at = (wheres[number], whats[number])
            text = axes.annotate(word, at, offset, textcoords="offset points", size=8, color=colour)
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # readable where it meets a line
    where, what = 100 * start["position"]["accuracy"], 100 * start["knn"]["accuracy"]
    axes.plot([where], [what], "D", color=GREY, markersize=5, zorder=3)
    axes.annotate(
        "pixels of patches", (where, what), (8, 0), textcoords="offset points", va="center", size=8, color=GREY
    )
    axes.set_xlabel("position accuracy (%)")
    axes.set_ylabel("class accuracy (%)")
    axes.margins(0.08)
    dress(axes)


def curve(axes: Axes, xs: Sequence[float], ys: Sequence[float], row: str) -> None:
    """A row of the table as a line, marked at every layer; the pixels it begins with are marked apart."""
    colour, marker, line = CURVES[row]
    axes.plot(xs, ys, line, color=colour, marker=marker, markersize=4.5, linewidth=1.6, markevery=slice(1, None))


def dress(axes: Axes) -> None:
    """Only the lines that help to read a value."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelcolor=INK, labelsize=8, color=GREY)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(size=9, color=INK)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


def beside(axes: Axes, labels: Sequence[tuple[float, str, str]], gap: float = 0.062) -> None:
    """Write (height, word, colour) right of the curves they belong to, `gap` of the axis apart at least."""
    low, high = axes.get_ylim()
    places: list[float] = []
    for height, *_ in sorted(labels):
        wished = (height - low) / (high - low)
        places.append(max(wished, places[-1] + gap) if places else wished)
    down = max(0.0, places[-1] - 1)  # a stack that ends above the axis would run into the title
    for place, (_, word, colour) in zip(places, sorted(labels), strict=True):
        axes.annotate(
            word, (1.02, place - down), xycoords="axes fraction", va="center", size=8, color=colour,
            annotation_clip=False,
        )  # fmt: skip


if __name__ == "__main__":
    entry(main)()
