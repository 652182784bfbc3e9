"""The field's linear protocols by name: what each fixes of the features, the heads and their training.

Read in the code of DINO (eval_linear.py), DINOv2 and DINOv3 (eval/linear.py, eval/log_regression.py), MAE
(main_linprobe.py), iBOT (eval_linear.py and its multi-rate variant) and big_vision (evaluators/fewshot_lsr.py).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.batches.views import Interpolation
from common.errors import Refusal, nearest
from common.features.extraction import RAW
from evaluate.probing.probe import MOMENTUM, HeadTraining
from evaluate.probing.quarters import NAME

BLOCKS = 4
BASE = 768  # width from which DINO and iBOT see the last class token and the mean patch, and not four class tokens
DEEP = 24  # blocks from which MAE trains 50 epochs in place of 90
RATES_IBOT = tuple(float(f"{base:g}e{power}") for power in range(-4, 1) for base in range(1, 10))  # iBOT's 45
RATES_V2 = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
STRENGTHS = tuple((10 ** torch.linspace(-6, 5, 45, dtype=torch.float64)).tolist())  # C of DINOv2's logistic regression
L2 = 2.0**10


@dataclass(frozen=True)
class Protocol:
    """One way to get a number from frozen features."""

    name: str
    training: HeadTraining | None  # None: solved, not trained
    features: str  # see `sets`
    strengths: tuple[float, ...] = ()  # of what is solved: C of logistic regression, l2 of ridge regression
    interpolation: Interpolation = "bicubic"  # of its training crops
    notes: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        """How many blocks' features it sees."""
        return BLOCKS if self.features in ("dino", "dinov2") else 1

    @property
    def apart(self) -> bool:
        """Whether each kind of features is judged on its own; else all of them compete for one number."""
        return self.features == "kinds"


NO_CLASS = "no class token: the mean patch token takes its place"
CLASS = ("as published: the class token; other kinds of features are beside it",)
PER_GPU = ("128 images per step, as on one of the authors' GPUs",)
DINO = HeadTraining(
    (0.001,), batch=1024, epochs=100, most_steps=None, by_epoch=True, every_epoch=True, normalise="none"
)  # fmt: skip
DINOV2 = HeadTraining(RATES_V2, batch=128, steps=12_500, normalise="none")
MAE = HeadTraining((0.1,), "lars", 16_384, 90, most_steps=None, warmup=10, every_epoch=True, normalise="batch")
PROTOCOLS = {
    each.name: each
    for each in (
        Protocol("sweep", HeadTraining(), "kinds"),
        Protocol("dino", DINO, "dino", interpolation="bilinear"),
        Protocol("dinov2", DINOV2, "dinov2", notes=PER_GPU),
        Protocol("dinov3", DINOV2, "last", notes=PER_GPU),
        Protocol("mae", MAE, "kinds", notes=CLASS),
        Protocol("ibot", replace(DINO, rates=RATES_IBOT), "dino", interpolation="bilinear"),
        Protocol("logreg", None, "kinds", STRENGTHS, notes=CLASS),
        Protocol("ridge", None, "kinds", (L2,)),
    )
}


def chosen(name: str) -> Protocol:
    """Return the protocol of that name. Raises Refusal, with the nearest ones, if there is none."""
    if name not in PROTOCOLS:
        raise Refusal(f"--protocol {name}: expected one of {', '.join(PROTOCOLS)}{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def of_quarters(protocol: Protocol) -> Protocol:
    """Return the protocol on the quarters of all blocks, of which held-out images choose. Raises Refusal where the
    protocol's features are part of it."""
    if not protocol.apart or protocol.training is None or protocol.name == "mae":
        raise Refusal(f"--readout quarters goes with --protocol sweep, which fixes no features; {protocol.name} does")
    return replace(protocol, features=NAME)


def altered(protocol: Protocol, changes: Mapping[str, Any], depth: int) -> tuple[Protocol, list[str]]:
    """(the protocol with what was asked for in place of its own numbers, what that changed, in words).

    `changes`: epochs, batch, rates, optimizer; None leaves a number as it is. `depth`: blocks of the backbone. Raises
    Refusal for a number that the protocol has not.
    """
    wanted = {name: value for name, value in changes.items() if value is not None}
    training = protocol.training
    if training is None:
        if wrong := sorted(wanted.keys() - {"rates"}):
            raise Refusal(f"--{wrong[0]} {wanted[wrong[0]]}: {protocol.name} is solved, not trained; leave it out")
        strengths = tuple(wanted.get("rates", protocol.strengths))
        what = "C" if protocol.name == "logreg" else "l2"
        words = [f"{what} {_listed(strengths)}"] if strengths != protocol.strengths else []
        return replace(protocol, strengths=strengths), words
    if protocol.name == "mae" and depth >= DEEP:
        training = replace(training, epochs=50)
    published: dict[str, Any] = {"rates": training.rates, "batch": training.batch, "optimizer": training.optimizer}
    published["epochs"] = training.epochs if training.steps is None else None
    changed = {name: value for name, value in wanted.items() if _plain(value) != _plain(published[name])}
    if "rates" in changed:
        changed["rates"] = tuple(changed["rates"])
    allowed = {"optimizer"} if protocol.name == "dinov3" else set()  # which leaves the choice
    words = [f"{name} {_listed(value)}" for name, value in changed.items() if name not in allowed]
    if "epochs" in changed and training.steps is not None:
        changed["steps"] = None
        changed["most_steps"] = None
    return replace(protocol, training=replace(training, **changed)), words


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _listed(value: Any) -> str:
    if not isinstance(value, (list, tuple)):
        return f"{value:g}" if isinstance(value, (int, float)) else str(value)
    return f"{len(value)} from {min(value):g} to {max(value):g}" if len(value) > 1 else f"{value[0]:g}"


def sets(protocol: Protocol, parts: Collection[str], width: int) -> tuple[dict[str, tuple[str, ...]], str]:
    """({set of features: the parts it puts side by side}, what had to be replaced, or nothing).

    `parts`: the names of the features: class, mean, class4, mean4, or one of RAW; `width`: of one token. Where
    there is no class token the mean patch token takes its place, and appending it once more adds nothing.
    """
    for kind in RAW:
        if kind in parts:
            return {kind: (kind,)}, ""
    if protocol.features == NAME:
        return {kind: (kind,) for kind in parts}, ""
    if protocol.apart:
        kinds = {"class": ("class",), "mean": ("mean",), "both": ("class", "mean")}
        by_name = {name: each for name, each in kinds.items() if set(each) <= set(parts)}
        return by_name, NO_CLASS if protocol.notes == CLASS and "class" not in parts else ""
    base = {"last + mean": ("class", "mean")}
    wanted: dict[str, tuple[str, ...]] = {
        "dino": base if width >= BASE else {"last 4": ("class4",)},
        "dinov2": {"last": ("class",), "last 4": ("class4",), **base, "last 4 + mean": ("class4", "mean")},
        "last": base,
    }[protocol.features]  # type: ignore[assignment]
    stand_in = {"class": "mean", "class4": "mean4"}
    missing = [name for name in stand_in if name not in parts and any(name in each for each in wanted.values())]
    by_name = {}
    for name, each in wanted.items():
        seen = tuple(dict.fromkeys(stand_in[part] if part in missing else part for part in each))
        seen = tuple(part for part in seen if part != "mean" or "mean4" not in seen)  # of which it is the last quarter
        if seen not in by_name.values():
            by_name[name] = seen
    if not missing:
        return by_name, ""
    return by_name, NO_CLASS if "class" in missing else NO_CLASS.replace("no class token", "not four class tokens")


def described(protocol: Protocol) -> dict[str, Any]:
    """What a report says of the numbers a protocol fixes."""
    training = protocol.training
    if training is None:
        if protocol.name == "ridge":
            return {
                "solver": "ridge regression to targets 1 and -1, intercept not penalised",
                "l2": list(protocol.strengths), "features": "final norm, standardised by the training images",
            }  # fmt: skip
        return {
            "solver": "multinomial logistic regression, L2, L-BFGS, float64, at most 1,000 iterations, tolerance 1e-12",
            "C": list(protocol.strengths), "features": "final norm, L2-normalised",
        }  # fmt: skip
    optimizers = {"sgd": f"SGD, momentum {MOMENTUM}", "lars": f"LARS, momentum {MOMENTUM}", "adamw": "AdamW"}
    falls = "epoch" if training.by_epoch else "step"
    warm = f"after {training.warmup:g} epochs of warm-up, " if training.warmup else ""
    seen = "quarters of the block chosen" if protocol.features == NAME else "final norm"
    scaling = {"standard": ", standardised by the training images' mean and variance", "none": ""}
    return {
        "optimizer": (
            f"{optimizers[training.optimizer]}, no decay, {warm}cosine to 0 per {falls}, learning rate * batch / 256"
        ),
        "rates": list(training.rates),
        "batch": training.batch,
        "features": seen + scaling.get(training.normalise, ", BatchNorm without affine, eps 1e-6"),
    }
