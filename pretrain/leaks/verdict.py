"""Verdict of the audit on a recipe: is the answer in the question?

It comes from the symmetry of the backbone (symmetry.py) and from images of noise (noise.py), and is remembered for the
same recipe and code.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from common.checkpoints.storage import write_atomically
from common.errors import Refusal
from common.models import Backbone
from common.processes.launch import ROOT
from pretrain import objectives
from pretrain.config import PretrainConfig
from pretrain.leaks.noise import SHOWN, Noise, accuracy_on_noise
from pretrain.leaks.symmetry import symmetry
from pretrain.objectives import Positional
from pretrain.objectives.absolute import Absolute, AbsoluteOptions
from pretrain.task import Pretraining, resolve

VERDICTS = ("clean", "asymmetric", "leak")  # from best to worst

# What decides a verdict: the cache forgets when one of these files changes.
SOURCES = (
    "common/models/*.py", "common/positions.py", "pretrain/heads.py", "pretrain/objectives/*.py",
    *(f"pretrain/leaks/{name}.py" for name in ("controls", "symmetry", "noise", "verdict")),
)  # fmt: skip


class Leak(Refusal):
    """Refusal of a recipe whose question holds the answer."""

    status = 1


@dataclass
class Finding:
    """Verdict on one objective, with the reason and the measurements."""

    verdict: str
    reason: str
    deviation: float  # of tokens from following their patches, relative, float64
    breaks: list[str]  # what stops them
    noise: list[Noise] = field(default_factory=list)
    advice: str = ""


@dataclass
class Verdict:
    """Findings of all positional objectives, and the worst of their verdicts."""

    verdict: str
    objectives: dict[str, Finding]

    def __str__(self) -> str:
        lines = []
        for name, finding in self.objectives.items():
            lines.append(f"{name}: {finding.verdict}: {finding.reason}")
            lines.append(f"  structure: tokens deviate by {finding.deviation:.1e} of the largest")
            lines += [f"  noise: {measured}" for measured in finding.noise]
        return "\n".join([*lines, f"verdict: {self.verdict}"])

    def refuse(self) -> None:
        """Raises Leak, in one line that says what to change, if the verdict is a leak."""
        for name, finding in self.objectives.items():
            if finding.verdict == "leak":
                worst = max(finding.noise, key=lambda measured: measured.accuracy)
                raise Leak(
                    f"leak: objectives.{name}: {finding.reason}: a head finds {worst.accuracy:.1%} of the places in "
                    f"images of pure noise (contrast {worst.contrast:g}), chance is {worst.chance:.1%}; "
                    f"{finding.advice}, or allow_leak=true to train all the same"
                )


def audit(
    backbone: Backbone,
    objectives: Mapping[str, Positional],
    trained: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Judge every objective. Changes neither the backbone nor the objectives nor torch's generator.

    trained: also probe the backbone's weights as they are. say: called with a line before each long step.
    """
    findings = {name: _judge(name, backbone, objective, trained, say) for name, objective in objectives.items()}
    worst = max((finding.verdict for finding in findings.values()), key=VERDICTS.index, default=VERDICTS[0])
    return Verdict(worst, findings)


def _judge(name: str, backbone: Backbone, objective: Positional, trained: bool, say: Callable[[str], None]) -> Finding:
    structure = symmetry(backbone, objective)
    measured: list[Noise] = []
    weights_tried = [*([] if structure.holds else ["redrawn"]), *(["trained"] if trained else [])]
    for weights in weights_tried:
        for (contrast, dtype), head in itertools.product(SHOWN, _heads_to_try(backbone, objective)):
            if any(noise.leaks for noise in measured):
                break  # once is enough
            asked = "offsets" if head.of_pairs else "places"
            say(f"audit of {name}: training a head for {asked} on noise ({weights} weights, contrast {contrast:g})")
            measured.append(accuracy_on_noise(backbone, head, weights, contrast, dtype))
    finding = Finding("clean", "", structure.deviation, structure.breaks, measured)
    if any(noise.leaks for noise in measured):
        culprits = " and ".join(structure.breaks) or "these weights"
        finding.verdict, finding.reason = "leak", f"a token is told where it is by {culprits}"
        finding.advice = _advice(name, objective, structure.breaks)
    elif structure.holds:
        finding.reason = "tokens follow their patches, and nothing else tells them where they are"
    else:
        finding.verdict = "asymmetric"
        culprits = " and ".join(structure.breaks)
        finding.reason = f"the symmetry is broken by {culprits}, but no head could read places off features of noise"
    return finding


def _heads_to_try(backbone: Backbone, objective: Positional) -> list[Positional]:
    """Objectives whose heads are tried: the given one and, if it asks about pairs, a linear one for places before it.

    Places are learned in fewer steps than hundreds of offsets, and their differences are the offsets."""
    if not objective.of_pairs:
        return [objective]
    asked = objective.passes["tokens"]
    plan = asked.plan
    options = AbsoluteOptions(
        keep=plan.keep, position=plan.position, context=plan.context, loss_on="all", view=asked.view
    )
    return [Absolute(options, backbone), objective]


def _advice(name: str, objective: Positional, breaks: list[str]) -> str:
    plan = objective.passes["tokens"].plan
    if plan.position == "partial":
        return f"set objectives.{name}.loss_on=hidden"
    if plan.position == "full" and any("embedding" in culprit or "bias" in culprit for culprit in breaks):
        return f"set objectives.{name}.position=none (and a model that can run so)"
    return "choose a model without these"


def cached_audit(
    config: PretrainConfig,
    task: Pretraining,
    say: Callable[[str], None] = lambda line: None,
    folder: Path | None = None,
) -> Verdict:
    """Audit an untrained task, or take the verdict from the cache where model, plans, heads and code are the same.

    folder: of the remembered verdicts; $XDG_CACHE_HOME/poslabel/audit by default. It need not be writable.
    """
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "poslabel" / "audit"
    path = folder / f"{_key(config, task)}.json"
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        verdict = audit(task.backbone, task.positional, say=say)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            path, lambda aside: aside.write_text(json.dumps(dataclasses.asdict(verdict), indent=1), encoding="utf-8")
        )
    except OSError:
        pass
    return verdict


def positional(config: PretrainConfig) -> dict[str, Any]:
    """Options of the positional objectives whose weight is above 0. Raises Refusal as `resolve` does."""
    return {
        name: options
        for name, options in resolve(config.objectives).items()
        if issubclass(objectives.find(name), Positional) and options.weight > 0
    }


def _key(config: PretrainConfig, task: Pretraining) -> str:
    model = dataclasses.asdict(config.model)
    for name in ("attention", "checkpointing", "compile"):  # how it is computed, not what
        del model[name]
    options = {name: dataclasses.asdict(option) for name, option in positional(config).items()}
    for option in options.values():
        del option["weight"]
    decides = [model, list(task.backbone.size), options, torch.__version__, timm.__version__]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read(stored: dict[str, Any]) -> Verdict:
    """Read a verdict from its JSON. Raises KeyError, TypeError or ValueError for anything else."""
    findings = {
        name: Finding(**{**finding, "noise": [Noise(**measured) for measured in finding["noise"]]})
        for name, finding in stored["objectives"].items()
    }
    if stored["verdict"] not in VERDICTS:
        raise ValueError(f"no verdict: {stored['verdict']!r}")
    return Verdict(stored["verdict"], findings)
