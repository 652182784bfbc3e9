"""What is measured while a run trains, on images held out of its training data. Never part of the loss."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch

from common import controls, positions
from common.data import Images
from common.features import extract
from common.loop import Report
from common.neighbors import knn
from common.pictures import board, histogram, maps
from common.plan import TokenPlan
from common.sampling import HELD_OUT_EPOCH, Batch, Samples
from common.tally import Tally, blind_offsets, blind_places
from common.tracking import Tracker
from pretrain.assemble import Parts
from pretrain.task import Pretraining

Monitor = Callable[[int], dict[str, float | str]]
SHOWN = 8  # images on the board
CONTROLLED = 64  # images of a control: three passes over them, which on a CPU cost more than a step
NEIGHBORS = 20  # DINO's k


def reports(parts: Parts, task: Pretraining, tracker: Tracker, say: Callable[[str], None]) -> list[Report]:
    """The monitors of a run, each with how often it is asked: none where nothing is held out, nor on other processes
    than the first."""
    if not len(parts.held_out) or not parts.process.is_main_process:
        return []
    every, device, samples = parts.config.monitor.every or 1, parts.process.device, parts.held_out_samples()
    wanted: list[Monitor | None] = [validation(task, samples, 256, device, tracker)]
    control_every = parts.config.monitor.control_every or every
    if "absolute" in task.objectives:
        wanted.append(boards(task, samples, device, tracker))
    wanted.append(neighbors(task, parts.train, parts.held_out, parts.config.monitor.bank, device))
    found = [(every, monitor) for monitor in wanted if monitor is not None]
    return [*found, (control_every, control(task, samples, device, say))] if task.positional else found


def _batches(samples: Samples, size: int) -> list[list[tuple[int, int]]]:
    return [
        [(HELD_OUT_EPOCH, index) for index in range(first, min(first + size, len(samples)))]
        for first in range(0, len(samples), size)
    ]


def validation(task: Pretraining, samples: Samples, batch: int, device: torch.device, tracker: Tracker) -> Monitor:
    """`val/...`: every statistic of the task on held-out images, cropped as in training, always the same crops; and for
    each positional objective the pictures `NAME_places` (which places or offsets are hard) and `NAME_distances`.

    Beside the training numbers it shows memorisation, to which small data sets invite.
    """

    @torch.no_grad()
    def measure(step: int) -> dict[str, float | str]:
        task.eval()
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
        for name, tally in tallies.items():
            asker = task.positional[name]
            blind = blind_offsets(asker.grid, asker.same) if asker.of_pairs else blind_places(asker.grid, asker.chance)
            tracker.picture(f"{name}_places", step, maps(tally, asker.chance))
            tracker.picture(f"{name}_distances", step, histogram(tally, blind))
        return {f"val/{name}": value for name, value in totals.items() if not name.endswith("/chance")}

    return measure


def boards(task: Pretraining, samples: Samples, device: torch.device, tracker: Tracker) -> Monitor:
    """The picture `board`: held-out images, and their patches where `absolute` believes they belong."""
    objective = task.positional["absolute"]

    @torch.no_grad()
    def draw(step: int) -> dict[str, float | str]:
        task.eval()
        batch: Batch = samples.__getitems__([(HELD_OUT_EPOCH, i) for i in range(min(SHOWN, len(samples)))]).to(device)
        inputs = task.inputs("absolute", batch, task.features(batch))
        answers, plan = objective.answers(*inputs), inputs[0]["tokens"].plan
        view = batch.views[objective.passes["tokens"].view]
        tracker.picture("board", step, board(view, answers.guesses, objective.grid, plan.kept, answers.asked))
        return {}

    return draw


def control(task: Pretraining, samples: Samples, device: torch.device, say: Callable[[str], None]) -> Monitor:
    """`control/...`: how often the positional objectives are right, under the current weights, where they cannot know.

    On noise: chance, or position is read from something other than the image. On held-out images whose patches were
    shuffled, counted twice: against where the patch came from (`shuffled_origin`; without position embeddings, content
    is all there is) and against where it lies now (`shuffled_place`; with embeddings, they are read, content is not).
    Pairs of a patch with itself are left out: equal content gives them away.
    """
    h, w = task.backbone.grid

    @torch.no_grad()
    def measure(step: int) -> dict[str, float | str]:
        task.eval()
        rng = torch.Generator().manual_seed(0)  # the same noise and the same orders every time
        keys = [(HELD_OUT_EPOCH, i) for i in range(min(CONTROLLED, len(samples)))]
        real = samples.__getitems__(keys).to(device)
        order = controls.orders(len(keys), h * w, rng).to(device)
        shuffled = {name: controls.rearrange(view, order, (h, w)) for name, view in real.views.items()}
        noisy = {name: controls.noise(view, rng) for name, view in real.views.items()}
        found: dict[str, float | str] = {}
        for kind, views, origins in (
            ("real", real.views, {"": None}),
            ("noise", noisy, {"": None}),
            ("shuffled", shuffled, {"_origin": order, "_place": None}),
        ):
            batch = dataclasses.replace(real, views=views)
            features = task.features(batch)
            for name, objective in task.positional.items():
                for word, origin in origins.items():
                    answers = objective.answers(*task.inputs(name, batch, features), origin)
                    found[f"control/{name}/{kind}{word}"] = float(answers.without(objective.same_label).accuracy())
        for name, objective in task.positional.items():
            told = float(found[f"control/{name}/noise"])  # type: ignore[arg-type]
            apart = positions.offset_prior(objective.grid, 0.0).max() if objective.of_pairs else objective.chance
            chance = found[f"control/{name}/chance"] = float(apart)
            if told > controls.limit(chance):
                say(
                    f"warning: at step {step}, {name} is right on {told:.1%} of pure noise (chance {chance:.1%}): "
                    "it reads positions from something other than the image"
                )
        return found

    return measure


def neighbors(task: Pretraining, train: Images, held_out: Images, bank: int, device: torch.device) -> Monitor | None:
    """`knn/accuracy`: held-out images classified by their 20 nearest training images (mean patch token, as in DINO).

    None where there are no labels.
    """
    if train.labels is None or held_out.labels is None or not len(held_out):
        return None
    labelled = np.flatnonzero(train.labels >= 0)
    chosen = np.sort(np.random.default_rng(0).permutation(labelled)[:bank])
    asked = np.flatnonzero(held_out.labels >= 0)
    if len(chosen) < NEIGHBORS or not len(asked):
        return None
    voters, judged = train.subset(chosen), held_out.subset(asked)
    voter_labels, judged_labels = torch.from_numpy(train.labels[chosen]), torch.from_numpy(held_out.labels[asked])
    # Unreadable images are named by `watch`, which judges them by the whole of the data.
    extracted = functools.partial(
        extract, task.backbone, TokenPlan(task.position), device=device, warn=lambda line: None, tolerated=1.0
    )

    @torch.no_grad()
    def measure(step: int) -> dict[str, float | str]:
        task.eval()
        known, new = extracted(images=voters), extracted(images=judged)
        if len(known.get("index", ())) < NEIGHBORS or "index" not in new:
            return {}
        guesses = knn(known["mean"], voter_labels[known["index"]], new["mean"], k=NEIGHBORS)
        return {"knn/accuracy": float((guesses == judged_labels[new["index"]]).float().mean())}

    return measure
