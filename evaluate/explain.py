"""What a backbone looks at, what its feature rests on, and which images it takes for alike.

    python evaluate/explain.py --ckpt runs/quickstart-001
    python evaluate/explain.py --ckpt runs/quickstart-001 --images 12 --seed 1 --target class
    python evaluate/explain.py --ckpt RUN OTHER THIRD --data PATH

Draws into RUN/evaluate/explain/: maps.png (attention of what stands for the image, rollout, gradient x attention,
transformer attribution, and patch features as colours), heads.png (attention by head), neighbors.png and deletion.png;
and TensorBoard images if the run has tb/. Attributions are of the cosine between an image's feature and the mean of its
neighbours' in the training images, both seen from the mean feature; with --target class, of the class that its
classifier finds or, where labels trained none, ridge regression.

They are judged: where the patches that matter go first, the score should fall faster than where random ones do. The
curves, their areas and the gap to random, with an interval over images, are printed and written to explain.json.
Several checkpoints are explained one after the other, on the same images, and then side by side: explain/beside.png.
One process; for plain ViTs (DeiT, registers, iRPE, LV-ViT, SP-ViT).
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/explain.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry  # first: it sets what torch reads when it is imported

# isort: split
import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.batches.sampler import order
from common.checkpoints.pretrained import TIMM
from common.checkpoints.storage import write_atomically
from common.data import Images, labelled_splits
from common.errors import Refusal
from common.features.neighbors import CENTRED, TREATMENTS
from common.models import Backbone
from evaluate.explaining import attribution
from evaluate.explaining.attribution import SHARES
from evaluate.explaining.observation import DRAWS, NEIGHBORS, Observation, fidelity, observe
from evaluate.explaining.sheets import DPI, beside, draw_sheets, named
from evaluate.job.arguments import parser
from evaluate.job.evaluation import Evaluation, any_splits, begin, only_first, refuse_unwritable
from evaluate.job.report import show_in_tensorboard, table, write
from evaluate.job.subjects import RANDOM

IMAGES, JUDGED, REFERENCES = 8, 200, 2000  # drawn; whose patches are deleted; among which neighbours are looked for
TARGETS = ("neighbors", "class")


def main(argv: list[str]) -> int:
    """Explain backbones by attributions, and judge them by deletion. Returns the exit status."""
    options = parser(__doc__ or "", several=True)
    add = options.add_argument
    add("--images", type=int, default=IMAGES, metavar="N", help=f"that are drawn (default: {IMAGES})")
    add("--judged", type=int, default=JUDGED, metavar="N", help=f"whose patches are deleted (default: {JUDGED})")
    add("--target", choices=TARGETS, default=TARGETS[0], help=f"(default: {TARGETS[0]})")
    arguments = options.parse_args(argv)
    if arguments.images < 1 or arguments.judged < 2:
        raise Refusal(f"--images {arguments.images} --judged {arguments.judged}: expected at least 1 and 2")
    if not only_first("explain"):
        return 0
    jobs, sheet = begun(arguments)
    observations = [explain(job, backbone) for job, backbone in jobs]
    if sheet is not None:
        names = [named(job) for job, _ in jobs]
        names = [job.arguments.ckpt if names.count(named(job)) > 1 else named(job) for job, _ in jobs]
        save(beside(dict(zip(names, observations, strict=True))), sheet)
        jobs[0][0].say(f"\nside by side: {sheet}")
    return 0


def begun(arguments: argparse.Namespace) -> tuple[list[tuple[Evaluation, Backbone]], Path | None]:
    """(a job and its backbone for each checkpoint, all on the same images; where they are drawn side by side, None for
    one). Raises Refusal."""
    ckpts = list(dict.fromkeys(arguments.ckpt))
    if not ckpts:
        raise Refusal("nothing to explain: give --ckpt RUN, or several")
    one, sheet = len(ckpts) == 1, None
    if not one:
        sheet = Path(arguments.out or "explain")
        sheet = sheet if sheet.suffix == ".png" else sheet / "beside.png"
        refuse_unwritable(sheet.parent, f"the sheet {sheet}", "choose another with --out")
        for option, start in (("weights", TIMM), ("like", RANDOM)):
            value = getattr(arguments, option)
            if value is not None and sum(ckpt.startswith(start) for ckpt in ckpts) != 1:
                raise Refusal(f"--{option} {value}: of which checkpoint? Expected one {start} among {', '.join(ckpts)}")
    splits = labelled_splits if arguments.target == "class" else any_splits
    jobs: list[tuple[Evaluation, Backbone]] = []
    for ckpt in ckpts:
        own = vars(arguments) | {"ckpt": ckpt, "out": arguments.out if one else None}
        own["weights"] = arguments.weights if one or ckpt.startswith(TIMM) else None
        own["like"] = arguments.like if one or ckpt == RANDOM else None
        job = begin("explain", argparse.Namespace(**own), splits=splits)
        if any(job.out == each.out for each, _ in jobs):
            raise Refusal(f"--ckpt {ckpt}: two reports would lie in {job.out}; explain these one after the other")
        if jobs and job.location != jobs[0][0].location:
            raise Refusal(
                f"{jobs[0][0].subject.name} was trained on {jobs[0][0].spec}, {job.subject.name} on {job.spec}: say on "
                "which images both are explained with --data"
            )
        seed, most = job.seeds[0], max(arguments.images, arguments.judged)
        job.train, job.test = some(job.train, REFERENCES, seed), some(job.test, most, seed)
        if len(job.train) < NEIGHBORS or len(job.test) < 2:
            raise Refusal(
                f"data={job.spec} has {len(job.train)} training and {len(job.test)} test images: expected at least "
                f"{NEIGHBORS}, to find neighbours among, and 2"
            )
        backbone = job.subject.backbone(seed)
        attribution.attentions(backbone)
        jobs.append((job, backbone))
    return jobs, sheet


def explain(job: Evaluation, backbone: Backbone) -> Observation:
    """Explain one backbone: its sheets, its report, its table. Returns what was seen of the images."""
    target = job.arguments.target
    backbone = backbone.to(job.device)
    left_out = attribution.unsupported(backbone)
    observation = observe(job, backbone)
    areas, curves = fidelity(job, backbone, observation)
    folder = job.out.parent / job.out.stem
    sheets = draw_sheets(job, observation, areas, curves)
    for name, figure in sheets.items():
        save(figure, folder / f"{name}.png")
    in_tensorboard = show_in_tensorboard(job, ((f"explain/{name}", pixels_of(each)) for name, each in sheets.items()))
    protocol = {"id": "explain/deletion", "target": target, "neighbors": NEIGHBORS, "deleted": list(SHARES)}
    protocol |= {"features": TREATMENTS[CENTRED], "replaced_by": "mean colour of the image", "random_draws": DRAWS}
    protocol |= {"selection": "none", "left_out": left_out}
    row = "random" if job.subject.state is None else "subject"
    gap = "95 %, normal, of the gap to random deletion, paired over images"
    write(job, protocol, {row: {"deletion": areas}}, len(observation.images), interval=gap)
    tell(job, areas, observation.target_in_words, left_out, folder, in_tensorboard)
    return observation


def some(images: Images, most: int, seed: int) -> Images:
    """Draw at most so many of `images` by `seed`."""
    return images if len(images) <= most else images.subset(order(seed, 0, len(images))[:most])


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(figure.savefig, format="png", dpi=DPI))


def pixels_of(figure: Figure) -> np.ndarray:
    """Draw a figure: uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def tell(
    job: Evaluation, areas: Mapping[str, Any], target: str, left_out: str | None, folder: Path, in_tensorboard: bool
) -> None:
    """Print the areas, whether each attribution is better than chance, and why one is missing."""
    lines = []
    for name, values in areas.items():
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
    job.say(f"\nsheets: {folder}{' and TensorBoard' if in_tensorboard else ''}\nreport: {job.out}")


if __name__ == "__main__":
    entry(main)()
