"""Does a recipe leak the answer? Asked before any training, without opening data.

python pretrain/audit.py [RECIPE] [key=value ...]    # of configs/pretrain, or a path; default: quickstart
python pretrain/audit.py --ckpt RUN                  # the run's recipe, and its trained weights too
python pretrain/audit.py apl --input                 # also: what do raw pixels of real images tell? (needs the data)
  --data SPEC   images for --input, instead of the recipe's
  --json FILE   write the verdict there

Prints one verdict for each positional objective, with the reason and the numbers:
  clean       permuting the patches permutes what the loss reads, and nothing else: position must be seen
  asymmetric  it does not, but nobody could read the position off features of noise: it runs, and is recorded
  leak        a head finds the places of patches of noise: the answer is in the question
Exit status 1 on a leak, 2 where the recipe cannot be understood, else 0.
"""

import sys
from pathlib import Path

if not __package__:  # `python pretrain/audit.py` puts pretrain/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import ROOT, entry, set_threads  # first: it sets what torch reads when it is imported

# isort: split
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from common import config as configuration
from common.checkpoints.public import find, load_backbone, load_exactly
from common.checkpoints.run_folder import CONFIG
from common.checkpoints.storage import write_atomically
from common.commands import command
from common.errors import Refusal
from common.models import Backbone, Features, create
from common.paths import expanded, expanded_path
from pretrain import objectives
from pretrain.command import Parser
from pretrain.config import PretrainConfig, load
from pretrain.leaks import controls, input_cues
from pretrain.leaks.symmetry import copies, draw, draws, run, symmetry
from pretrain.objectives import Answers, Positional
from pretrain.objectives.absolute import Absolute, AbsoluteOptions
from pretrain.objectives.relative import Relative
from pretrain.task import Pretraining, build, resolve

VERDICTS = ("clean", "asymmetric", "leak")  # from best to worst
STEPS = 300  # of training the head
LEARNING_RATE = 3e-3
QUESTIONS = 1568  # per step: 8 images of 14x14 patches
FEW = 16  # images that show a plain leak: only where they do not, more are looked at
BATCH = 16  # images the backbone sees at a time
HITS = 96  # right answers that chance should give: then its own interval ends at about 1.4 times chance
DEVIATIONS = 3.29  # standard errors of a 99.9 % interval

# How noise is shown: contrast (1: the whole range of pixels) and precision. Frozen random features are a poor reader:
# with every parameter from N(0, 0.1), full-contrast noise drowns the position embedding of a ViT-S (1.6 times chance),
# and RoPE, or BEiT's bias, show at no contrast above 0.01. But a network that is trained may learn to ignore what its
# patches show; nearly constant images are as if it had, and then whatever tells places apart is all there is: RoPE, for
# one, through the attention to a class token. So: the weights as the architecture starts them, a working network rather
# than a chaotic one, in which only what starts constant (biases, norms: a bias makes the border visible to a padded
# convolution) or is neither layer nor norm (encodings, tokens, layer scales) is redrawn; and both contrasts. Tried on
# ViT, RoPE, BEiT, ResNet stems, Twins (PEG) and NesT: on faint noise each is found at 49 of 49 or 196 of 196 times
# chance, while at full contrast some stay at chance. Float64: float32 would drown such faint noise in its rounding.
# What is not found: relative bias or windows without any prefix token (Swin). All tokens of a constant image are then
# the same, and only a trained backbone can use them (within 750 steps on noise, a small one does): they are asymmetric,
# and the control on noise that is logged in training watches them.
SHOWN = ((1e-8, torch.float64), (1.0, torch.float32))
ENCODING = 1.0  # standard deviation of redrawn encodings
CONSTANT = 0.1  # of what is added to parameters that start constant
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)

# What decides a verdict: the cache forgets when one of these files changes.
SOURCES = ("common/models/*.py", "pretrain/heads.py", "common/positions.py", "pretrain/leaks/controls.py")
OWN = ("pretrain/objectives/*.py", "pretrain/leaks/symmetry.py", "pretrain/audit.py")


class Leak(Refusal):
    """The answer is in the question."""

    status = 1


@dataclass
class Noise:
    """How well the places of patches of noise were found, by a head trained on features of other noise."""

    asked: str  # "places" or "offsets"
    weights: str  # "redrawn" or "trained"
    contrast: float
    accuracy: float
    low: float  # 99.9 % interval
    high: float
    chance: float  # accuracy of the best answer that ignores the image
    images: int

    @property
    def leaks(self) -> bool:
        """Whether it cannot be shown that accuracy is at most the limit."""
        return not self.high <= controls.limit(self.chance)

    def __str__(self) -> str:
        return (
            f"{self.asked}, {self.weights} weights, contrast {self.contrast:g}: accuracy {self.accuracy:.2%} on "
            f"{self.images} images of noise (99.9 %: {self.low:.2%} to {self.high:.2%}), "
            f"{self.accuracy / self.chance:.1f} times chance"
        )


@dataclass
class Finding:
    """What was found for one objective."""

    verdict: str
    reason: str
    deviation: float  # of tokens from following their patches, relative, float64
    breaks: list[str]  # what stops them
    noise: list[Noise] = field(default_factory=list)
    advice: str = ""


@dataclass
class Verdict:
    """The worst of all positional objectives."""

    verdict: str
    objectives: dict[str, Finding]

    def __str__(self) -> str:
        lines = []
        for name, found in self.objectives.items():
            lines.append(f"{name}: {found.verdict}: {found.reason}")
            lines.append(f"  structure: tokens deviate by {found.deviation:.1e} of the largest")
            lines += [f"  noise: {measured}" for measured in found.noise]
        return "\n".join([*lines, f"verdict: {self.verdict}"])

    def refuse(self) -> None:
        """Raises Leak, in one line, if it is one."""
        for name, found in self.objectives.items():
            if found.verdict == "leak":
                worst = max(found.noise, key=lambda measured: measured.accuracy)
                raise Leak(
                    f"leak: objectives.{name}: {found.reason}: a head finds {worst.accuracy:.1%} of the places in "
                    f"images of pure noise (contrast {worst.contrast:g}), chance is {worst.chance:.1%}; "
                    f"{found.advice}, or allow_leak=true to train all the same"
                )


def audit(
    backbone: Backbone,
    objectives: Mapping[str, Positional],
    trained: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Judge every objective. Changes none of what it is given, nor torch's generator.

    trained: also try what the backbone's weights, as they are, tell about noise. say: called with a line for what takes
    long.
    """
    found = {}
    for name, objective in objectives.items():
        found[name] = _judge(name, backbone, objective, trained, say)
    worst = max((finding.verdict for finding in found.values()), key=VERDICTS.index, default=VERDICTS[0])
    return Verdict(worst, found)


def _judge(name: str, backbone: Backbone, objective: Positional, trained: bool, say: Callable[[str], None]) -> Finding:
    structure = symmetry(backbone, objective)
    measured: list[Noise] = []
    tried = [*([] if structure.holds else ["redrawn"]), *(["trained"] if trained else [])]
    for weights in tried:
        for (contrast, dtype), asker in itertools.product(SHOWN, _askers(backbone, objective)):
            if any(noise.leaks for noise in measured):
                break  # once is enough
            asked = "offsets" if asker.of_pairs else "places"
            say(f"audit of {name}: training a head for {asked} on noise ({weights} weights, contrast {contrast:g})")
            measured.append(on_noise(backbone, asker, weights, contrast, dtype))
    finding = Finding("clean", "", structure.deviation, structure.breaks, measured)
    if any(noise.leaks for noise in measured):
        told = " and ".join(structure.breaks) or "these weights"
        finding.verdict, finding.reason = "leak", f"a token is told where it is by {told}"
        finding.advice = _advice(name, objective, structure.breaks)
    elif structure.holds:
        finding.reason = "tokens follow their patches, and nothing else tells them where they are"
    else:
        finding.verdict = "asymmetric"
        broken = " and ".join(structure.breaks)
        finding.reason = f"the symmetry is broken by {broken}, but no head could read places off features of noise"
    return finding


def _askers(backbone: Backbone, objective: Positional) -> list[Positional]:
    """Whose heads are tried: the objective's own; of pairs, a linear one for places before it. It learns in fewer steps
    than hundreds of offsets take, and who knows the places knows the offsets, by subtraction."""
    if not objective.of_pairs:
        return [objective]
    want = objective.passes["tokens"]
    options = AbsoluteOptions(
        keep=want.plan.keep, position=want.plan.position, context=want.plan.context, view=want.view
    )
    return [Absolute(options, backbone), objective]


def _advice(name: str, objective: Positional, breaks: list[str]) -> str:
    plan = objective.passes["tokens"].plan
    if plan.position == "partial":
        return f"set objectives.{name}.loss_on=hidden"
    if plan.position == "full" and any("embedding" in each or "bias" in each for each in breaks):
        return f"set objectives.{name}.position=none (and a model that can run so)"
    return "choose a model without these"


# ------------------------------------------------------------------------------------------------ features of noise


def on_noise(backbone: Backbone, objective: Positional, weights: str, contrast: float, dtype: torch.dtype) -> Noise:
    """Train a fresh head on frozen features of noise, and judge it on other noise.

    weights: "redrawn" or "trained". Pairs of a patch with itself are left out: that they are the same is no leak.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone, objective = copies(backbone, objective, dtype)
        if weights == "redrawn":
            redraw(backbone)
            if (hidden := getattr(objective, "hidden_position", None)) is not None:
                nn.init.normal_(hidden, std=ENCODING)
        if isinstance(objective, Relative):
            objective = objective.apart()
        chance, rng = objective.chance, np.random.default_rng(0)
        asked = _Seen(backbone, objective, 1, contrast, rng).answers(objective).counted
        fresh = min(512, max(64, math.ceil(HITS / (chance * max(1, int(asked.sum()))))))
        for seen, judged in ((FEW, FEW), (max(64, fresh // 2), fresh)):
            train = _Seen(backbone, objective, seen, contrast, rng)
            test = _Seen(backbone, objective, judged, contrast, rng)
            if not all(torch.isfinite(part.features["tokens"].tokens).all() for part in (train, test)):
                raise Refusal(
                    f"the audit: {backbone.config.name} gives features that are not finite ({weights} weights, "
                    f"contrast {contrast:g})"
                )
            train.standardize(test)
            head = _trained(copy.deepcopy(objective).float(), train, asked.numel(), rng)
            found = Noise(
                "offsets" if objective.of_pairs else "places", weights, contrast, *_score(head, test), chance, judged
            )
            if found.low > controls.limit(chance):
                break
        return found


def _score(head: Positional, test: "_Seen") -> tuple[float, float, float]:
    """Accuracy on fresh noise, with its interval."""
    hits, asks = [], []
    for images in torch.arange(len(test.features["tokens"].tokens)).split(BATCH):
        answers = test.answers(head, images)
        hits.append(((answers.guesses == answers.labels) & answers.counted).sum(1))
        asks.append(answers.counted.sum(1))
    return _interval(torch.cat(hits), torch.cat(asks))


def _interval(hits: Tensor, asked: Tensor) -> tuple[float, float, float]:
    """Accuracy and its 99.9 % interval, with the image as the unit: tokens of one image are not independent."""
    accuracy = float(hits.sum() / asked.sum())
    residues = hits.double() - accuracy * asked.double()
    error = float((residues.square().sum() * len(hits) / (len(hits) - 1)).sqrt() / asked.sum())
    return accuracy, max(0.0, accuracy - DEVIATIONS * error), min(1.0, accuracy + DEVIATIONS * error)


@torch.no_grad()
def redraw(backbone: Backbone) -> None:
    """New values for what an architecture starts at a constant, and for its encodings; see SHOWN."""
    for module in backbone.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:  # removed on purpose, or fixed
                continue
            if not isinstance(module, LAYERS):
                nn.init.normal_(parameter, std=ENCODING)
            elif bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(CONSTANT * torch.randn_like(parameter))


class _Seen:
    """Features of images of noise under every pass of an objective, float32, and what is drawn beside them."""

    @torch.no_grad()
    def __init__(
        self, backbone: Backbone, objective: Positional, count: int, contrast: float, rng: np.random.Generator
    ) -> None:
        parts: list[dict[str, Features]] = []
        for first in range(0, count, BATCH):
            size = min(BATCH, count - first)
            plans = {
                name: draw(want.plan, math.prod(backbone.grid), rng, size) for name, want in objective.passes.items()
            }
            pixels = rng.uniform(-2, 2, (size, backbone.channels, *backbone.size))
            images = torch.from_numpy(0.5 + contrast * pixels)  # off zero, or padding would not show at the border
            parts.append(run(backbone, objective, images.to(next(backbone.parameters()).dtype), plans))
        self.features = {name: _joined([part[name] for part in parts]) for name in parts[0]}
        self.draws = draws(objective, rng, count)

    def standardize(self, other: "_Seen") -> None:
        """Give every channel mean 0 and deviation 1 over these images, and treat the other ones alike."""
        for name, features in self.features.items():
            mean = features.tokens.mean((0, 1))
            deviation = features.tokens.std((0, 1)).clamp(min=1e-300)
            for each in (features, other.features[name]):
                each.tokens = ((each.tokens - mean) / deviation).float()
                each.prefix = each.prefix.float()

    def of(self, images: Tensor) -> tuple[dict[str, Features], dict[str, Tensor]]:
        """What an objective is called with, for some of the images."""
        features = {}
        for name, whole in self.features.items():
            drawn: Any = {key: value[images] for key, value in vars(whole.plan).items() if isinstance(value, Tensor)}
            plan = dataclasses.replace(whole.plan, **drawn)
            features[name] = Features(whole.tokens[images], whole.prefix[images], whole.grid, plan)
        return features, {name: value[images] for name, value in self.draws.items()}

    @torch.no_grad()
    def answers(self, objective: Positional, images: Tensor | None = None) -> Answers:
        """What the objective answers."""
        return objective.answers(
            *self.of(torch.arange(len(self.features["tokens"].tokens)) if images is None else images)
        )


def _joined(parts: list[Features]) -> Features:
    plan = parts[0].plan
    drawn: Any = {
        key: torch.cat([vars(part.plan)[key] for part in parts])
        for key, value in vars(plan).items()
        if isinstance(value, Tensor)
    }
    tokens, prefix = torch.cat([part.tokens for part in parts]), torch.cat([part.prefix for part in parts])
    return Features(tokens, prefix, parts[0].grid, dataclasses.replace(plan, **drawn))


def _trained(objective: Positional, seen: _Seen, questions: int, rng: np.random.Generator) -> Positional:
    """The objective, its layers started afresh and trained on frozen features."""
    objective.train().progress = 1.0  # no smoothing: as at the end of the training
    for module in objective.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    count = len(seen.features["tokens"].tokens)
    for _ in range(STEPS):
        images = torch.from_numpy(rng.permutation(count)[: min(count, max(2, QUESTIONS // questions))])
        loss = objective(*seen.of(images))["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return objective.eval()


# ----------------------------------------------------------------------------------------------------------- cached


def cached_audit(
    config: PretrainConfig,
    task: Pretraining,
    say: Callable[[str], None] = lambda line: None,
    folder: Path | None = None,
) -> Verdict:
    """The audit of an untrained task, from the cache where model, plans, heads and code are the same.

    folder: where verdicts are kept, $XDG_CACHE_HOME/poslabel/audit unless given. That it cannot be written is no error.
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
    """The options of the objectives that ask where patches are, and count. Raises Refusal as `resolve` does."""
    chosen = resolve(config.objectives).items()
    return {name: each for name, each in chosen if issubclass(objectives.find(name), Positional) and each.weight > 0}


def _key(config: PretrainConfig, task: Pretraining) -> str:
    model = dataclasses.asdict(config.model)
    for name in ("attention", "checkpointing", "compile"):  # how it is computed, not what
        del model[name]
    options = {name: dataclasses.asdict(each) for name, each in positional(config).items()}
    for each in options.values():
        del each["weight"]
    decides = [model, list(task.backbone.size), options, torch.__version__, timm.__version__]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    for pattern in (*SOURCES, *OWN):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read(stored: dict[str, Any]) -> Verdict:
    """A verdict from its JSON. Raises KeyError, TypeError or ValueError for anything else."""
    found = {
        name: Finding(**{**finding, "noise": [Noise(**measured) for measured in finding["noise"]]})
        for name, finding in stored["objectives"].items()
    }
    if stored["verdict"] not in VERDICTS:
        raise ValueError(f"no verdict: {stored['verdict']!r}")
    return Verdict(stored["verdict"], found)


# ------------------------------------------------------------------------------------------------ the entry script


def main(argv: list[str]) -> int:
    """Audit a recipe. Returns the exit status."""
    if "--help" in argv or "-h" in argv:
        print((__doc__ or "").strip())
        return 0
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--ckpt", type=expanded_path)
    parser.add_argument("--input", action="store_true")
    parser.add_argument("--data", type=expanded)
    parser.add_argument("--json", type=expanded_path)
    given = parser.parse_intermixed_args(parser.as_words(argv))
    if given.json is not None and (given.json.is_dir() or not given.json.absolute().parent.is_dir()):
        raise Refusal(f"--json {given.json}: expected the name of a file in a folder that exists")
    recipes = [word for word in given.words if "=" not in word]
    if len(recipes) > 1:
        raise Refusal(f"expected one recipe and key=value words, found {', '.join(recipes)}")
    if recipes or given.ckpt is None:
        recipe = configuration.find_recipe(recipes[0] if recipes else "quickstart", "pretrain")
    else:
        recipe = find(given.ckpt).parent / CONFIG
        if not recipe.is_file():
            raise Refusal(
                f"--ckpt {given.ckpt}: no {CONFIG} beside it says how it was trained; name its recipe: "
                f"{command('audit', 'RECIPE', '--ckpt', given.ckpt)}"
            )
    config = load(recipe, [word for word in given.words if "=" in word])
    set_threads(config.threads)
    torch.manual_seed(config.seed)
    asked = positional(config)
    if not asked:
        print(f"no objective of this recipe asks where patches are ({', '.join(config.objectives)})")
        return 0
    looked_at = {each.view for each in asked.values()}
    views = {name: view for name, view in config.views.items() if name in looked_at}
    task = build(create(config.model, config.views["global"].size), asked, views)
    if given.ckpt is not None:
        trained, _, _ = load_backbone(given.ckpt)
        load_exactly(task.backbone.model, trained.model.state_dict(), str(given.ckpt))
    images = input_cues.open_images(config, given.data) if given.input else None
    began = time.perf_counter()
    verdict = audit(task.backbone, task.positional, given.ckpt is not None, lambda line: print(line, flush=True))
    print(f"{verdict}, in {time.perf_counter() - began:.0f} s", flush=True)
    result = dataclasses.asdict(verdict)
    if images is not None:
        result["input"] = input_cues.measure(config, task, images)
        print(input_cues.told(result["input"]))
    if given.json is not None:
        write_atomically(given.json, lambda aside: aside.write_text(json.dumps(result, indent=1), encoding="utf-8"))
    return Leak.status if verdict.verdict == "leak" else 0


if __name__ == "__main__":
    entry(main)()
