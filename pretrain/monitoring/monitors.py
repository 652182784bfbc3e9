"""What is measured while a run trains, on images held out of its training data. Never part of the loss."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.batches.sampler import HELD_OUT_EPOCH, StepPart
from common.batches.samples import Batch, Samples
from common.batches.unreadable import NO_LIMIT
from common.data import Images
from common.features.extraction import Eye, shown
from common.features.finite import not_finite
from common.features.metrics import accuracy, rankme
from common.features.neighbors import FIELD, knn
from common.features.ridge import ridge
from common.models.plan import TokenPlan
from common.processes import collectives
from common.training.loop import Report
from common.training.tracking import Tracker
from pretrain.assemble import Parts
from pretrain.config import MonitorConfig
from pretrain.leaks import controls
from pretrain.monitoring.classified import Numbers, classified
from pretrain.monitoring.pictures import board, histogram, maps
from pretrain.monitoring.tally import Tally, blind_offsets, blind_places
from pretrain.task import Pretraining, of_purpose

SHOWN = 8  # images on the board
CONTROLLED = 64  # images of a control: three passes over them, which on a CPU cost more than a step
NEIGHBORS = 20  # DINO's k
VOTERS = 2  # labelled training images for each held-out one, where monitor.images says how many those are
OF_TRAINING = ("chance", "uniform", "teacher_temperature", "centre_norm", "prototypes_used")  # not of the images shown


def reports(
    parts: Parts,
    task: Pretraining,
    tracker: Tracker,
    say: Callable[[str], None],
    keep_best: Callable[[int, float], bool],
) -> list[Report]:
    """The monitors of a run, each with how often it is asked; those of images held out only where there are some.

    Every process has `classified` and `frozen`, to which each of them brings its share; the others the first one has
    for itself. `keep_best(step, accuracy)` keeps a classifier that is better than those before.
    """
    config, process = parts.config, parts.process
    judging: list[Report] = []
    if parts.validation is not None:
        images = some(parts.validation, None if config.monitor.validation == "val" else config.monitor.images)
        looks = partial(classified, task, images, process.device, keep_best, say)
        judging = [(config.monitor.every or 1, looks)]
    return [*(_of_held_out(parts, task, tracker, say) if len(parts.held_out) else []), *judging]


def _of_held_out(parts: Parts, task: Pretraining, tracker: Tracker, say: Callable[[str], None]) -> list[Report]:
    """The monitors of images held out."""
    config, process = parts.config, parts.process
    every, looked_at = config.monitor.every or 1, some(parts.held_out, config.monitor.images)
    probing = (every, partial(frozen, task, parts.train, looked_at, config.monitor, process.device, say))
    if not process.is_main_process:
        return [probing]
    samples, batch = parts.held_out_samples(looked_at), min(256, max(1, config.batch // config.accumulate))
    by_first: list[Report] = []
    if len(samples) >= max(objective.least_images for objective in task.objectives.values()):
        by_first.append((every, partial(validation, task, samples, batch, process.device, tracker)))
    places = _seen(task, samples)
    if of_places := [name for name, objective in task.positional.items() if not objective.of_pairs]:
        by_first.append((every, partial(boards, task, of_places[0], places, process.device, tracker)))
    if task.positional:
        by_first.append((config.monitor.control_every or every, partial(control, task, places, process.device, say)))
    alone = collectives.single_process()  # while the others do not run: no objective waits for them
    return [probing, *((often, alone(monitor)) for often, monitor in by_first)]


def some(images: Images, most: int | None) -> Images:
    """At most so many of the images, always the same."""
    if most is None or most >= len(images):
        return images
    return images.subset(np.sort(np.random.default_rng(0).permutation(len(images))[:most]))


def _seen(task: Pretraining, samples: Samples) -> Samples:
    """The same images in the views that positional objectives look at, crops of the size of the grid; what DINO asks
    for beside them need not be cropped."""
    looked_at = {want.view for objective in task.positional.values() for want in objective.passes.values()}
    views = {name: view for name, view in samples.views.items() if name in looked_at}
    return Samples(samples.images, views, samples.seed, samples.channels, samples.draws, colours=samples.colours)


def collapse_warnings(
    task: Pretraining, say: Callable[[str], None]
) -> Callable[[int, Mapping[str, Any]], dict[str, str]]:
    """Read each logged step: returns `NAME/verdict` of the objectives that can tell how they are. Warns once, with
    advice, when a verdict turns bad."""
    before: dict[str, str] = {}

    def read(step: int, record: Mapping[str, Any]) -> dict[str, str]:
        verdicts = {}
        for name, objective in task.objectives.items():
            verdict = objective.verdict(of_purpose(record, name))
            if verdict is None:
                continue
            if verdict.advice and verdict.name != before.get(name):
                say(f"warning: at step {step}, {name}: {verdict.name}: {verdict.advice}")
            verdicts[f"{name}/verdict"] = before[name] = verdict.name
        return verdicts

    return read


def _batches(samples: Samples, size: int) -> list[list[tuple[int, int]]]:
    """Keys of all samples, as parts of one step, in batches of nearly equal size, about `size` at most: none of one
    image, in which KoLeo finds no neighbour, unless there is but one."""
    count = min(math.ceil(len(samples) / size), max(1, len(samples) // 2))
    whole = np.arange(len(samples))
    return [
        StepPart(((HELD_OUT_EPOCH, index) for index in part.tolist()), whole) for part in np.array_split(whole, count)
    ]


@torch.no_grad()
def validation(
    task: Pretraining, samples: Samples, batch: int, device: torch.device, tracker: Tracker, step: int
) -> Numbers:
    """`val/...`: every statistic of the task on held-out images, cropped as in training, always the same crops; and for
    each positional objective the pictures `NAME_places` (which places or offsets are hard) and `NAME_distances`.

    Beside the training numbers it shows memorisation, to which small data sets invite. `batch` images at a time, as in
    training: some losses compare the images of a batch.
    """
    task.eval()
    task.begin_step(task.progress, measured=True)
    totals: dict[str, float] = {}
    tallies = {name: Tally(objective.grid, objective.of_pairs) for name, objective in task.positional.items()}
    for keys in _batches(samples, batch):
        crops = samples.__getitems__(keys).to(device)
        features = task.features(crops)
        for name, value in task.judge(crops, features).items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(keys) / len(samples)
        for name, tally in tallies.items():
            answers = task.positional[name].answers(*task.inputs(name, crops, features))
            tally.add(answers.guesses, answers.labels, answers.distances, answers.asked)
    task.begin_step(task.progress, measured=False)  # what objectives counted here is forgotten
    for name, tally in tallies.items():
        asker = task.positional[name]
        pairs = asker.of_pairs
        blind = blind_offsets(asker.grid, asker.prior(asker.same)) if pairs else blind_places(asker.grid, asker.chance)
        tracker.picture(f"{name}_places", step, maps(tally, asker.chance))
        tracker.picture(f"{name}_distances", step, histogram(tally, blind))
    return {f"val/{name}": value for name, value in totals.items() if name.split("/")[-1] not in OF_TRAINING}


@torch.no_grad()
def boards(
    task: Pretraining, name: str, samples: Samples, device: torch.device, tracker: Tracker, step: int
) -> Numbers:
    """The picture `board`: held-out images, and their patches where the objective `name` believes they belong."""
    objective = task.positional[name]
    task.eval()
    batch: Batch = samples.__getitems__([(HELD_OUT_EPOCH, i) for i in range(min(SHOWN, len(samples)))]).to(device)
    inputs = task.inputs(name, batch, task.features(batch, [name]))
    answers, plan = objective.answers(*inputs), inputs[0]["tokens"].plan
    view = batch.views[objective.passes["tokens"].view][: len(batch.index)]  # the first crop of each
    tracker.picture("board", step, board(view, answers.guesses, objective.grid, plan.kept, answers.asked))
    return {}


@torch.no_grad()
def control(
    task: Pretraining, samples: Samples, device: torch.device, say: Callable[[str], None], step: int
) -> Numbers:
    """`control/...`: how often the positional objectives are right, under the current weights, where they cannot know.

    On noise: chance, or position is read from something other than the image. On held-out images whose patches were
    shuffled, counted twice: against where the patch came from (`shuffled_origin`; without position embeddings, content
    is all there is) and against where it lies now (`shuffled_place`; with embeddings, they are read, content is not).
    Pairs of a patch with itself are left out: equal content gives them away.
    """
    h, w = task.backbone.grid
    task.eval()
    rng = torch.Generator().manual_seed(0)  # the same noise and the same orders every time
    keys = [(HELD_OUT_EPOCH, i) for i in range(min(CONTROLLED, len(samples)))]
    real = samples.__getitems__(keys).to(device)
    order = controls.orders(len(keys), h * w, rng).to(device)
    seen = {name: view[: len(keys)] for name, view in real.views.items()}  # the first crop of each
    shuffled = {name: controls.rearrange(view, order, (h, w)) for name, view in seen.items()}
    noisy = {name: controls.noise(view, rng) for name, view in seen.items()}
    rates: Numbers = {}
    for kind, views, origins in (
        ("real", seen, {"": None}),
        ("noise", noisy, {"": None}),
        ("shuffled", shuffled, {"_origin": order, "_place": None}),
    ):
        batch = dataclasses.replace(real, views=views)
        features = task.features(batch, task.positional)
        for name, objective in task.positional.items():
            for word, origin in origins.items():
                answers = objective.answers(*task.inputs(name, batch, features), origin)
                rates[f"control/{name}/{kind}{word}"] = float(answers.without(objective.same_label).accuracy())
    for name, objective in task.positional.items():
        on_noise = float(rates[f"control/{name}/noise"])  # type: ignore[arg-type]
        apart = objective.prior(0.0).max() if objective.of_pairs else objective.chance
        chance = rates[f"control/{name}/chance"] = float(apart)
        if on_noise > controls.limit(chance):
            say(
                f"warning: at step {step}, {name} is right on {on_noise:.1%} of pure noise (chance {chance:.1%}): "
                "it reads positions from something other than the image"
            )
    return rates


@torch.no_grad()
def frozen(
    task: Pretraining,
    train: Images,
    held_out: Images,
    config: MonitorConfig,
    device: torch.device,
    say: Callable[[str], None],
    step: int,
) -> Numbers:
    """Worth of the features of held-out images, `WHAT/student` and, where there is one, `WHAT/teacher`: their
    effective rank (`rankme`) and, where there are labels, the accuracy of their 20 nearest training images (`knn`; as
    DINO's, not centred: a curve is held against other runs', and not against raw pixels) and of a ridge classifier
    learned from a few of each class (`ridge`).

    Every process has to call it: each extracts a share of the images, and the first returns what all say.
    """
    voters, shots = labelled(train, config)
    asked = np.arange(len(held_out))
    judged = np.zeros(len(held_out), bool) if held_out.labels is None else held_out.labels >= 0
    task.eval()
    known = _extracted(task, train, voters, device) if len(voters) and judged.any() else {}
    new = _extracted(task, held_out, asked, device)
    worth: Numbers = {}
    if collectives.rank():
        return worth
    for who, (features, index) in new.items():
        if len(index):
            worth[f"rankme/{who}"] = rankme(features)
        judged_by = {"held-out": features} | ({"training": known[who][0]} if who in known else {})
        bad = {name: int(not_finite({name: each}).sum()) for name, each in judged_by.items()}
        if any(bad.values()):  # NaN loses every comparison, so that an accuracy would come out
            counted = " and ".join(f"{bad[name]} of {len(each)} {name}" for name, each in judged_by.items())
            say(
                f"warning: at step {step}, the {who}'s features of {counted} images are not finite, so they are "
                "not judged; lower the learning rate, or use precision=fp32"
            )
            worth |= {f"{what}/{who}": math.nan for what in ("knn", "ridge") if who in known}
            continue
        where = torch.from_numpy(judged)[index]
        if who not in known or not where.any():
            continue
        labels, right = torch.from_numpy(train.labels), torch.from_numpy(held_out.labels)[index[where]]
        bank, of_bank = known[who]
        if len(of_bank) >= NEIGHBORS:
            guesses = knn(bank, labels[of_bank], features[where], k=NEIGHBORS, treatment=FIELD)
            worth[f"knn/{who}"] = accuracy(guesses, right)
        few = torch.isin(of_bank, shots)
        if few.any():
            worth[f"ridge/{who}"] = accuracy(ridge(bank[few], labels[of_bank[few]], features[where]), right)
    return worth


def labelled(train: Images, config: MonitorConfig) -> tuple[np.ndarray, Tensor]:
    """(training images that vote, those among them that ridge learns from: a few of each class); always the same."""
    if train.labels is None:
        return np.zeros(0, np.int64), torch.zeros(0, dtype=torch.int64)
    most = config.bank if config.images is None else min(config.bank, VOTERS * config.images)
    drawn = np.random.default_rng(0).permutation(np.flatnonzero(train.labels >= 0))[:most]
    labels = train.labels[drawn]
    few = [drawn[labels == label][: config.shots] for label in np.unique(labels)]
    return np.sort(drawn), torch.from_numpy(np.concatenate([*few, np.zeros(0, np.int64)]))


def _extracted(
    task: Pretraining, images: Images, chosen: np.ndarray, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """{"student" or "teacher": (features (K, D), float32, on the CPU; which of `images` they are (K,))} of the `chosen`
    ones that can be read, in their order. Each process runs its share, and all return what all found."""
    share = np.array_split(chosen, collectives.processes())[collectives.rank()]
    most = math.ceil(len(chosen) / collectives.processes())
    backbones = {"student": task.backbone} | ({} if task.teacher is None else {"teacher": task.teacher})
    rows = {who: torch.zeros(most, backbone.width, device=device) for who, backbone in backbones.items()}
    index = torch.full((most,), -1, device=device)  # -1: no image; shares differ, and some images cannot be read
    like, done = task.backbone, 0
    # Unreadable images are named by `watch`, which judges them by the whole of the data.
    crops = shown(images.subset(share), Eye.of(like, limit=NO_LIMIT), warn=lambda line: None)
    for batch, at in crops:
        place = slice(done, done := done + len(at))
        index[place] = torch.from_numpy(share)[at].to(device)
        for who, backbone in backbones.items():
            features = backbone(batch.to(device), TokenPlan(task.position))
            rows[who][place] = features.pooled(task.pooling).float()
    index = collectives.gathered(index).cpu()
    has_image = index >= 0
    return {who: (collectives.gathered(values).cpu()[has_image], index[has_image]) for who, values in rows.items()}
