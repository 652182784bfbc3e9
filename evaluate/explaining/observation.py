"""Features, neighbours and attributions of test images, and how the score falls when patches are deleted."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.features.extraction import cache_key, network, shown
from common.features.metrics import accuracy
from common.features.neighbors import centre_of, unit_vectors
from common.features.ridge import scores
from common.models import Backbone
from evaluate.explaining import attribution
from evaluate.explaining.attribution import Score, attend, attributions, deletion, random_orders, to_patches
from evaluate.job import frozen
from evaluate.job.evaluation import Evaluation

NEIGHBORS = 8  # of an image, on the sheet and in the target
DRAWS = 5  # random orders of deletion
BATCH = 32  # images whose gradients are in memory at a time


@dataclass
class Observation:
    """Features and attributions of K test images, beside features of M training images."""

    images: Tensor  # (K, C, h, w) uint8
    index: Tensor  # (K,) which images of the split
    pooled: Tensor  # (K, D)
    tokens: Tensor  # (k, N, D) of those that are drawn
    heads: Tensor  # (k, H, N) attention of the last block, of those that are drawn
    maps: dict[str, Tensor]  # method -> (K, N)
    references: dict[str, Tensor]  # pooled and index, (M, D) and (M,)
    neighbors: Tensor  # (K, NEIGHBORS), rows of the references, the nearest first
    target: list[Score]  # for every batch of BATCH images
    target_in_words: str
    by_class: bool  # whether the class token stands for an image, or the mean of the patches
    grid: tuple[int, int]  # of the N patches


def observe(job: Evaluation, backbone: Backbone) -> Observation:
    """Extract features of the references and the images, find neighbours, compute attributions."""
    plan = job.subject.plan
    kind = pooling_of(job, backbone)
    references = references_of(job, backbone, kind)
    batches = list(shown(job.test, replace(job.eye, batch_size=BATCH)))
    images, index = (torch.cat([batch[at] for batch in batches]) for at in (0, 1))
    with torch.no_grad():
        plain = [backbone(batch.to(job.device), plan).pooled(kind) for batch in images.split(BATCH)]
    pooled = torch.cat(plain)
    job.refuse_not_finite(
        {"pooled": pooled, "index": index}, job.test, job.subject.name, (backbone, plan), cached=False
    )
    centre = centre_of(references["pooled"])
    near = (unit_vectors(pooled, centre) @ unit_vectors(references["pooled"], centre).T).topk(NEIGHBORS, 1).indices
    target, target_in_words = targets(job, references, pooled, near, index)
    job.say(f"attributions of {len(images)} test images")
    k, maps, heads, tokens = job.arguments.images, [], [], []
    for batch, score in zip(images.split(BATCH), target, strict=True):
        attended = attend(backbone, batch.to(job.device), plan, kind, score)
        maps.append(attributions(attended, kind))
        heads.append(to_patches(attended.probabilities[-1], attended.features.prefix.shape[1], kind))
        tokens.append(attended.features.tokens.detach())
    joined = {name: torch.cat([part[name] for part in maps]) for name in maps[0]}
    parts = torch.cat(tokens[: -(-k // BATCH)])[:k], torch.cat(heads)[:k]
    return Observation(
        images, index, pooled, *parts, joined, references, near, target, target_in_words, kind == "class", backbone.grid
    )


def references_of(job: Evaluation, backbone: Backbone, kind: str) -> dict[str, Tensor]:
    """Extract features of the training images, or take them from the cache: pooled (M, D) and index (M,)."""
    plan = job.subject.plan
    key = cache_key(backbone, plan, job.train, job.precision, job.device)
    by_network = network(backbone, plan, device=job.device, precision=job.precision)
    eye, what = frozen.eye_of(job, backbone), "training images, to find neighbours among"
    features = frozen.from_cache(job, key, job.train, eye, by_network, what)
    job.refuse_not_finite(features, job.train, job.subject.name, (backbone, plan), cached=True)
    return {"pooled": features[kind].to(job.device), "index": features["index"]}


def pooling_of(job: Evaluation, backbone: Backbone) -> str:
    """Token that stands for an image, as in the training: "class" or "mean"."""
    return "class" if job.subject.description["pooling"] == "class" and backbone.num_prefix_tokens else "mean"


def targets(
    job: Evaluation, references: Mapping[str, Tensor], pooled: Tensor, near: Tensor, index: Tensor
) -> tuple[list[Score], str]:
    """(score to explain for each batch of images, its description)."""
    of_batches: list[Score]
    if job.arguments.target == "neighbors":
        towards, centre = references["pooled"][near].mean(1), centre_of(references["pooled"])
        of_batches = [attribution.similarity(batch, centre) for batch in towards.split(BATCH)]
        return of_batches, f"cosine to the mean of its {NEIGHBORS} nearest training images"
    head = job.subject.head()
    if head is not None and job.subject.description["pooling"] in ("class", "mean"):  # what `pooled` is, too
        weight, bias = (head[name].to(pooled) for name in ("weight", "bias"))
        guesses = (pooled @ weight.T + bias).argmax(1)
        of_batches = [attribution.logit(weight, bias, batch) for batch in guesses.split(BATCH)]
        return of_batches, "logit of the class that its own classifier finds"
    assert job.train.labels is not None and job.test.labels is not None
    labels = torch.from_numpy(job.train.labels)[references["index"]].to(job.device)
    eye = torch.eye(pooled.shape[1], device=job.device)
    classes, at_unit_vectors = scores(references["pooled"], labels, eye)  # it is affine: the unit vectors tell all
    bias = scores(references["pooled"], labels, torch.zeros_like(eye[:1]))[1][0]
    weight = (at_unit_vectors - bias).T
    guesses = (pooled.double() @ weight.T + bias).argmax(1)
    right = accuracy(classes[guesses], torch.from_numpy(job.test.labels)[index].to(job.device))
    weight, bias = weight.to(pooled.dtype), bias.to(pooled.dtype)
    of_batches = [attribution.logit(weight, bias, batch) for batch in guesses.split(BATCH)]
    return of_batches, f"logit of the class that ridge regression finds ({100 * right:.0f} % right)"


def fidelity(
    job: Evaluation, backbone: Backbone, observation: Observation
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Delete the most relevant patches first: ({method: area, gap to random, curve}, {method: curves (K, shares)})."""
    kind, plan = pooling_of(job, backbone), job.subject.plan
    images = observation.images
    orders = {name: maps.sort(dim=1, descending=True, stable=True).indices for name, maps in observation.maps.items()}
    blind = random_orders(len(images), observation.tokens.shape[1], DRAWS, job.seeds[0]).to(job.device)
    job.say(f"deleting patches of {len(images)} images: {len(orders)} methods and {DRAWS} random orders")

    def curve(order: Tensor) -> Tensor:
        parts = zip(images.split(BATCH), order.split(BATCH), observation.target, strict=True)
        return torch.cat(
            [deletion(backbone, batch.to(job.device), ranks, score, plan, kind) for batch, ranks, score in parts]
        ).cpu()

    curves = {name: curve(order) for name, order in orders.items()}
    random = torch.stack([curve(order) for order in blind])
    return attribution.summary(curves, random), curves | {"random": random.mean(0)}
