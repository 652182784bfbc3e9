"""What a backbone looks at, what its feature rests on, and which images it takes for alike.

    python evaluate/explain.py --ckpt runs/quickstart-001
    python evaluate/explain.py --ckpt runs/quickstart-001 --images 12 --seed 1 --target class

Draws into RUN/evaluate/explain/: maps.png (attention of what stands for the image, rollout, gradient x attention, for
ViT, DeiT and LV-ViT transformer attribution, and patch features as colours), heads.png (attention by head),
neighbors.png and deletion.png; and TensorBoard images if the run has tb/. Attributions are of the cosine between an
image's feature and the mean of its neighbours' in the training images, both seen from the mean feature; with --target
class, of the class that ridge regression finds.

They are judged: where the patches that matter go first, the score should fall faster than where random ones do. The
curves, their areas and the gap to random, with an interval over images, are printed and written to explain.json.
One process; for plain ViTs (DeiT, registers, iRPE, LV-ViT, SP-ViT).
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/explain.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry  # first: it sets what torch reads when it is imported

# isort: split
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from common.batches.sampling import order
from common.batches.unreadable import NO_LIMIT
from common.checkpoints.storage import write_atomically
from common.data import Images, labelled_splits
from common.errors import Refusal
from common.features.extraction import Part, cache_key, extract_parts, shown
from common.features.metrics import accuracy
from common.features.neighbors import CENTRED, TREATMENTS, centre_of, unit_vectors
from common.features.ridge import scores
from common.models import Backbone
from evaluate.explaining import attribution
from evaluate.explaining.attribution import (
    SHARES,
    Score,
    attend,
    attributions,
    components,
    deletion,
    random_orders,
    to_patches,
)
from evaluate.job.arguments import parser
from evaluate.job.evaluation import Evaluation, any_splits, begin, only_first
from evaluate.job.feature_cache import cached
from evaluate.job.report import table, write

IMAGES, JUDGED, REFERENCES = 8, 200, 2000  # drawn; whose patches are deleted; among which neighbours are looked for
NEIGHBORS = 8  # of an image, on the sheet and in the target
DRAWS = 5  # random orders of deletion
BATCH = 32  # images whose gradients are in memory at a time
TARGETS = ("neighbors", "class")
CELL, GAP, DPI = 112, 6, 110  # pixels of an image on a sheet, between two, and in an inch
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # told apart by everyone
GREY, INK = "#6e6e6e", "#222222"
CURVES = {
    "attention": (BLUE, "o"),
    "rollout": (GREEN, "s"),
    "gradient x attention": (ORANGE, "^"),
    "transformer attribution": (PURPLE, "D"),
    "random": (GREY, ""),
}


def main(argv: list[str]) -> int:
    """Arguments -> features -> attributions -> sheets, curves and report. Returns the exit status."""
    options = parser(__doc__ or "")
    options.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"that are drawn (default: {IMAGES})")
    options.add_argument(
        "--judged", type=int, default=JUDGED, metavar="N", help=f"whose patches are deleted (default: {JUDGED})"
    )
    options.add_argument("--target", choices=TARGETS, default=TARGETS[0], help=f"(default: {TARGETS[0]})")
    arguments = options.parse_args(argv)
    if arguments.images < 1 or arguments.judged < 2:
        raise Refusal(f"--images {arguments.images} --judged {arguments.judged}: expected at least 1 and 2")
    if not only_first("explain"):
        return 0
    job = begin("explain", arguments, splits=labelled_splits if arguments.target == "class" else any_splits)
    seed = job.seeds[0]
    most = max(arguments.images, arguments.judged)
    job.train, job.test = some(job.train, REFERENCES, seed), some(job.test, most, seed)
    if len(job.train) < NEIGHBORS or len(job.test) < 2:
        raise Refusal(
            f"data={job.spec} has {len(job.train)} training and {len(job.test)} test images: expected at least "
            f"{NEIGHBORS}, to find neighbours among, and 2"
        )
    backbone = job.subject.backbone(seed).to(job.device)
    left_out = attribution.unsupported(backbone)
    looked = look(job, backbone)
    found, curves = fidelity(job, backbone, looked)
    folder = job.out.parent / job.out.stem
    sheets = draw(job, backbone.grid, looked, found, curves)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in sheets.items():
        save = partial(figure.savefig, format="png", dpi=DPI)
        write_atomically(folder / f"{name}.png", save)
    noted = tensorboard(job, sheets)
    protocol = {
        "id": "explain/deletion",
        "target": arguments.target,
        "neighbors": NEIGHBORS,
        "features": TREATMENTS[CENTRED],
        "deleted": list(SHARES),
        "replaced_by": "mean colour of the image",
        "random_draws": DRAWS,
        "selection": "none",
        "left_out": left_out,
    }
    row = "random" if job.subject.state is None else "subject"
    gap = "95 %, normal, of the gap to random deletion, paired over images"
    write(job, protocol, {row: {"deletion": found}}, len(looked.images), interval=gap)
    tell(job, found, looked.said, left_out, folder, noted)
    return 0


def some(images: Images, most: int, seed: int) -> Images:
    """At most so many of `images`, drawn by `seed`."""
    return images if len(images) <= most else images.subset(order(seed, 0, len(images))[:most])


# --------------------------------------------------------------------------------------------------------- the numbers


@dataclass
class Looked:
    """What was seen of K images, and of M training images."""

    images: Tensor  # (K, C, h, w) uint8
    index: Tensor  # (K,) which images of the split
    pooled: Tensor  # (K, D)
    tokens: Tensor  # (k, N, D) of those that are drawn
    heads: Tensor  # (k, H, N) attention of the last block, of those that are drawn
    maps: dict[str, Tensor]  # method -> (K, N)
    references: dict[str, Tensor]  # pooled and index, (M, D) and (M,)
    neighbors: Tensor  # (K, NEIGHBORS), rows of the references, the nearest first
    target: list[Score]  # for every batch of BATCH images
    said: str  # of the target
    by_class: bool  # whether the class token stands for an image, or the mean of the patches


def look(job: Evaluation, backbone: Backbone) -> Looked:
    """Features of the references, then the images, their neighbours and attributions."""
    about, plan = job.subject.description, job.subject.plan
    kind = pooling_of(job, backbone)
    references = references_of(job, backbone, kind)
    batches = list(
        shown(
            job.test,
            job.size,
            job.crop,
            len(about["mean"]),
            batch_size=BATCH,
            workers=job.arguments.workers,
            limit=job.limit,
        )
    )
    images, index = (torch.cat([batch[at] for batch in batches]) for at in (0, 1))
    with torch.no_grad():
        plain = [attribution.pool(backbone(batch.to(job.device), plan), kind) for batch in images.split(BATCH)]
    pooled = torch.cat(plain)
    job.refuse_not_finite({"pooled": pooled, "index": index}, job.test, job.subject.name, backbone, plan)
    centre = centre_of(references["pooled"])
    near = (unit_vectors(pooled, centre) @ unit_vectors(references["pooled"], centre).T).topk(NEIGHBORS, 1).indices
    target, said = targets(job, references, pooled, near, index)
    job.say(f"attributions of {len(images)} test images")
    k, maps, heads, tokens = job.arguments.images, [], [], []
    for batch, score in zip(images.split(BATCH), target, strict=True):
        attended = attend(backbone, batch.to(job.device), plan, kind, score)
        maps.append(attributions(attended, kind))
        heads.append(to_patches(attended.probabilities[-1], attended.features.prefix.shape[1], kind))
        tokens.append(attended.features.tokens.detach())
    joined = {name: torch.cat([part[name] for part in maps]) for name in maps[0]}
    parts = torch.cat(tokens[: -(-k // BATCH)])[:k], torch.cat(heads)[:k]
    return Looked(images, index, pooled, *parts, joined, references, near, target, said, kind == "class")


def references_of(job: Evaluation, backbone: Backbone, kind: str) -> dict[str, Tensor]:
    """Features of the training images, pooled and index, (M, D) and (M,): from the cache of all evaluations."""
    plan = job.subject.plan
    settings: dict[str, Any] = {"device": job.device, "precision": job.precision}

    def extract(parts: Sequence[range], seen: Callable[[int], None]) -> Iterator[Part]:
        job.say(f"features of {len(job.train):,} training images, to find neighbours among")
        workers = job.arguments.workers
        return extract_parts(backbone, plan, job.train, parts, workers=workers, limit=job.limit, seen=seen, **settings)

    key = cache_key(backbone, plan, job.train, **settings)
    found = cached(job.out.parent / "cache", key, job.train, extract, job.say, limit=job.limit)
    job.refuse_not_finite(found, job.train, job.subject.name, backbone, plan, cached=True)
    return {"pooled": found[kind].to(job.device), "index": found["index"]}


def pooling_of(job: Evaluation, backbone: Backbone) -> str:
    """What stands for an image: what the training made so."""
    return "class" if job.subject.description["pooling"] == "class" and backbone.num_prefix_tokens else "mean"


def targets(
    job: Evaluation, references: Mapping[str, Tensor], pooled: Tensor, near: Tensor, index: Tensor
) -> tuple[list[Score], str]:
    """(what is explained of each batch of images, in words)."""
    if job.arguments.target == "neighbors":
        towards, centre = references["pooled"][near].mean(1), centre_of(references["pooled"])
        made: list[Score] = [attribution.similarity(batch, centre) for batch in towards.split(BATCH)]
        return made, f"cosine to the mean of its {NEIGHBORS} nearest training images"
    assert job.train.labels is not None and job.test.labels is not None
    known = torch.from_numpy(job.train.labels)[references["index"]].to(job.device)
    eye = torch.eye(pooled.shape[1], device=job.device)
    classes, at = scores(references["pooled"], known, eye)  # it is affine: the unit vectors tell all
    bias = scores(references["pooled"], known, torch.zeros_like(eye[:1]))[1][0]
    weight = (at - bias).T
    guesses = (pooled.double() @ weight.T + bias).argmax(1)
    right = accuracy(classes[guesses], torch.from_numpy(job.test.labels)[index].to(job.device))
    weight, bias = weight.to(pooled.dtype), bias.to(pooled.dtype)
    made = [attribution.logit(weight, bias, batch) for batch in guesses.split(BATCH)]
    return made, f"logit of the class that ridge regression finds ({100 * right:.0f} % right)"


def fidelity(
    job: Evaluation, backbone: Backbone, looked: Looked
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """({method: area, gap to random, curve}, {method: curves (K, shares)}) of deleting the most relevant first."""
    kind, plan = pooling_of(job, backbone), job.subject.plan
    images = looked.images
    orders = {name: maps.sort(dim=1, descending=True, stable=True).indices for name, maps in looked.maps.items()}
    blind = random_orders(len(images), looked.tokens.shape[1], DRAWS, job.seeds[0]).to(job.device)
    job.say(f"deleting patches of {len(images)} images: {len(orders)} methods and {DRAWS} random orders")

    def curve(order: Tensor) -> Tensor:
        parts = zip(images.split(BATCH), order.split(BATCH), looked.target, strict=True)
        return torch.cat(
            [deletion(backbone, batch.to(job.device), ranks, score, plan, kind) for batch, ranks, score in parts]
        ).cpu()

    curves = {name: curve(order) for name, order in orders.items()}
    random = torch.stack([curve(order) for order in blind])
    return attribution.summary(curves, random), curves | {"random": random.mean(0)}


# ---------------------------------------------------------------------------------------------------------- the sheets


def draw(
    job: Evaluation, grid: tuple[int, int], looked: Looked, found: Mapping[str, Any], curves: Mapping[str, Tensor]
) -> dict[str, Figure]:
    """{name: sheet}."""
    name = job.subject.name if job.subject.state is not None else f"{job.subject.description['name']}, untrained"
    whole = "class token" if looked.by_class else "patches, on average"
    pictures = [cell(image) for image in looked.images[: len(looked.tokens)]]
    colours = [enlarged(patches.view(*grid, 3)) for patches in components(looked.tokens)]
    rows = [
        [picture, *(overlaid(picture, maps[at].view(grid)) for maps in looked.maps.values()), colours[at]]
        for at, picture in enumerate(pictures)
    ]
    titles = ["image", *looked.maps, "patch features"]
    about = f"Attention is that of the {whole}. Bright is most, in each image. Target: {looked.said}."
    basis = "Patch features: first three principal components as red, green, blue; one basis for the sheet."
    sheets = {"maps": mosaic(rows, titles, f"What matters to {name}", f"{about} {basis}")}
    heads = looked.heads.shape[1]
    rows = [
        [picture, *(overlaid(picture, head.view(grid)) for head in looked.heads[at])]
        for at, picture in enumerate(pictures)
    ]
    titles = ["image", *(f"head {number + 1}" for number in range(heads))]
    sheets["heads"] = mosaic(rows, titles, f"Attention by head: {name}", f"Of the {whole}, in the last block.")
    sheets["neighbors"] = neighbors(job, looked, name)
    sheets["deletion"] = falling(found, curves, f"{name}: {looked.said}", len(looked.images))
    return sheets


def neighbors(job: Evaluation, looked: Looked, name: str) -> Figure:
    """The sheet of nearest training images; a frame says whether the class is the same."""
    labels = (job.train.labels, job.test.labels) if job.classes else None
    rows, same = [], []
    for at in range(len(looked.tokens)):
        places = looked.references["index"][looked.neighbors[at].cpu()].tolist()
        near = job.train.subset(places)
        batches = shown(near, job.size, job.crop, looked.images.shape[1], limit=NO_LIMIT)
        cells = [cell(image) for batch, _ in batches for image in batch]
        if labels is not None:
            alike = [bool(labels[0][place] == labels[1][int(looked.index[at])]) for place in places]  # type: ignore[index]
            cells = [framed(picture, GREEN if one else ORANGE) for picture, one in zip(cells, alike, strict=True)]
            same += alike
        rows.append([cell(looked.images[at]), *cells])
    kind = "class tokens" if looked.by_class else "mean patches"
    about = f"By the cosine of {kind}, centred, among {len(job.train):,} images."
    if same:
        about += f" Green frame: of the same class ({100 * sum(same) / len(same):.0f} %), orange: of another."
    return mosaic(rows, ["image", *map(str, range(1, NEIGHBORS + 1))], f"Nearest training images: {name}", about)


def cell(image: Tensor) -> np.ndarray:
    """A uint8 image (C, H, W) as (CELL, CELL, 3) in [0, 1], longer sides fitted, on white."""
    picture = (image.expand(3, -1, -1) if len(image) == 1 else image[:3]).permute(1, 2, 0).float() / 255
    return enlarged(picture)


def enlarged(values: Tensor, smooth: bool = False) -> np.ndarray:
    """(h, w, 3) as (CELL, CELL, 3) by the nearest pixel, or smoothly; a narrow one is centred on white."""
    h, w = values.shape[:2]
    size = round(CELL * h / max(h, w)), round(CELL * w / max(h, w))
    mode: dict[str, Any] = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest-exact"}
    large = F.interpolate(values.permute(2, 0, 1)[None].float().cpu(), size=size, **mode)[0].permute(1, 2, 0)
    top, left = (CELL - size[0]) // 2, (CELL - size[1]) // 2
    canvas = np.ones((CELL, CELL, 3), np.float32)
    canvas[top : top + size[0], left : left + size[1]] = large.clamp(0, 1).numpy()
    return canvas


def overlaid(picture: np.ndarray, heat: Tensor) -> np.ndarray:
    """Heat (h, w), stretched to [0, 1], in colour over the grey picture (CELL, CELL, 3)."""
    low, high = heat.min(), heat.max()
    stretched = (heat - low) / (high - low).clamp(min=1e-12)
    smooth = enlarged(stretched[..., None].expand(-1, -1, 3), smooth=True)[..., 0]
    grey = picture.mean(-1, keepdims=True)
    return 0.35 * grey + 0.65 * colormaps["inferno"](smooth)[..., :3]


def framed(picture: np.ndarray, colour: str) -> np.ndarray:
    """The picture with an edge."""
    edged, thick = np.empty_like(picture), 4
    edged[:] = to_rgb(colour)
    edged[thick:-thick, thick:-thick] = picture[thick:-thick, thick:-thick]
    return edged


def mosaic(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], title: str, about: str) -> Figure:
    """Cells in rows and columns, one pixel of a cell to one of the sheet, under a title and column titles."""
    step = CELL + GAP
    width, height = len(titles) * step + GAP, len(rows) * step
    lines = textwrap.wrap(about, max(40, width // 6))
    words = [textwrap.wrap(word, 16) for word in titles]
    above = 12 + 12 * max(map(len, words))  # pixels of the column titles
    head = 34 + 14 * len(lines) + above
    canvas = np.ones((head + height, width, 3), np.float32)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            canvas[head + i * step : head + i * step + CELL, GAP + j * step : GAP + j * step + CELL] = picture
    figure = Figure((width / DPI, (head + height) / DPI), dpi=DPI)
    figure.figimage(canvas, origin="upper")
    total = head + height
    text = partial(figure.text, va="top", color=INK)
    text(GAP / width, 1 - 8 / total, title, size=11, weight="bold")
    text(GAP / width, 1 - 30 / total, "\n".join(lines), size=7.5, color=GREY, linespacing=1.25)
    for j, parts in enumerate(words):
        place = (GAP + j * step + CELL / 2) / width, 1 - (head - 8) / total
        figure.text(*place, "\n".join(parts), size=8, ha="center", va="baseline", color=INK, linespacing=1.1)
    return figure


def falling(found: Mapping[str, Any], curves: Mapping[str, Tensor], title: str, images: int) -> Figure:
    """The score over the share of patches that were deleted."""
    figure = Figure((6.4, 4.0), dpi=DPI, layout="constrained")
    axes: Axes = figure.subplots()
    percent = [100 * share for share in SHARES]
    for name in (name for name in CURVES if name in curves):
        (colour, marker), curve = CURVES[name], curves[name]
        mean, half = curve.mean(0), 1.96 * curve.std(0) / len(curve) ** 0.5
        label = f"{name}, area {found[name]['area']:.3f}"
        axes.plot(percent, mean, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)
        axes.fill_between(percent, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("patches deleted, most relevant first (%)", size=9, color=INK)
    axes.set_ylabel("score", size=9, color=INK)
    axes.set_title("\n".join(textwrap.wrap(f"{title}; {images} images, 95 % bands", 80)), size=9, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8)
    return figure


# ------------------------------------------------------------------------------------------------------------ in words


def tensorboard(job: Evaluation, sheets: Mapping[str, Figure]) -> bool:
    """Show the sheets beside the training's curves, if the run has them; whether it has."""
    folder = job.subject.folder.parent / "tb"
    if job.subject.state is None or job.arguments.out is not None or not folder.is_dir():
        return False
    from torch.utils.tensorboard import SummaryWriter  # seconds

    with SummaryWriter(str(folder), filename_suffix=".explain") as writer:
        for name, figure in sheets.items():
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            step = job.subject.description.get("training", {}).get("step", 0)
            writer.add_image(f"explain/{name}", pixels, step, dataformats="HWC")
    return True


def tell(
    job: Evaluation, found: Mapping[str, Any], target: str, left_out: str | None, folder: Path, noted: bool
) -> None:
    """The areas, whether each attribution is better than chance, and why one is missing."""
    lines = []
    for name, values in found.items():
        if name == "random":
            lines.append([name, "", f"{values['area']:.3f}", "", ""])
            continue
        low, high = values["gap_interval"]
        verdict = "hurts more" if low > 0 else "hurts less" if high < 0 else "no difference"
        lines.append([name, verdict, f"{values['area']:.3f}", f"{values['gap']:+.3f}", f"{low:+.3f} to {high:+.3f}"])
    header = ["deleted first", "than random", "area", "below random", "95 %"]
    job.say(f"\nscore: {target}; {job.note}\n\n{table(header, lines)}")
    if left_out is not None:
        job.say(f"\n{left_out}")
    job.say(f"\nsheets: {folder}{' and TensorBoard' if noted else ''}\nreport: {job.out}")


if __name__ == "__main__":
    entry(main)()
