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

from common.processes.launch import entry, set_threads  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import dataclasses
import json
import time

import torch

from common import config as configuration
from common.checkpoints.public import load_backbone, load_exactly, weights_file
from common.checkpoints.run_folder import CONFIG
from common.checkpoints.storage import write_atomically
from common.commands import Parser, command
from common.errors import Refusal
from common.models import create
from common.paths import expanded, expanded_path
from pretrain.automatic import patched, suited
from pretrain.config import load, option_names
from pretrain.leaks import input_cues
from pretrain.leaks.verdict import Leak, audit, positional
from pretrain.task import build


def main(argv: list[str]) -> int:
    """Audit a recipe. Returns the exit status."""
    if "--help" in argv or "-h" in argv:
        print((__doc__ or "").strip())
        return 0
    arguments = parse(argv)
    config = load(recipe_of(arguments), [word for word in arguments.words if "=" in word])
    set_threads(config.threads)
    torch.manual_seed(config.seed)
    options = positional(config)
    if not options:
        print(f"no objective of this recipe asks where patches are ({', '.join(config.objectives)})")
        return 0
    used = {objective.view for objective in options.values()}
    backbone = create(config.model, config.views["global"].size)
    config = dataclasses.replace(config, views=patched(config.views, backbone.grid)[0])
    views = {name: view for name, view in config.views.items() if name in used}
    task = build(backbone, suited(options, backbone.grid, backbone.has_class_token)[0], views)
    if arguments.ckpt is not None:
        trained, _, _ = load_backbone(arguments.ckpt)
        load_exactly(task.backbone.model, trained.model.state_dict(), str(arguments.ckpt))
    images = input_cues.open_images(config, arguments.data) if arguments.input else None
    began = time.perf_counter()
    verdict = audit(task.backbone, task.positional, arguments.ckpt is not None, lambda line: print(line, flush=True))
    print(f"{verdict}, in {time.perf_counter() - began:.0f} s", flush=True)
    report = dataclasses.asdict(verdict)
    if images is not None:
        report["input"] = input_cues.measure(config, task, images)
        print(input_cues.in_words(report["input"]))
    if arguments.json is not None:
        text = json.dumps(report, indent=1)
        write_atomically(arguments.json, lambda aside: aside.write_text(text, encoding="utf-8"))
    return Leak.status if verdict.verdict == "leak" else 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises Refusal for a --json that cannot be written."""
    parser = Parser(add_help=False, options=option_names())
    parser.add_argument("words", nargs="*")
    parser.add_argument("--ckpt", type=expanded_path)
    parser.add_argument("--input", action="store_true")
    parser.add_argument("--data", type=expanded)
    parser.add_argument("--json", type=expanded_path)
    arguments = parser.parse_intermixed_args(argv)
    file = arguments.json
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise Refusal(f"--json {file}: expected the name of a file in a folder that exists")
    return arguments


def recipe_of(arguments: argparse.Namespace) -> Path:
    """Path of the recipe to audit: the one named, or that of the run of --ckpt. Raises Refusal if there is none."""
    recipes = [word for word in arguments.words if "=" not in word]
    if len(recipes) > 1:
        raise Refusal(f"expected one recipe and key=value words, found {', '.join(recipes)}")
    if recipes or arguments.ckpt is None:
        return configuration.find_recipe(recipes[0] if recipes else "quickstart", "pretrain")
    recipe = weights_file(arguments.ckpt).parent / CONFIG
    if not recipe.is_file():
        raise Refusal(
            f"--ckpt {arguments.ckpt}: no {CONFIG} beside it says how it was trained; name its recipe: "
            f"{command('audit', 'RECIPE', '--ckpt', arguments.ckpt)}"
        )
    return recipe


if __name__ == "__main__":
    entry(main)()
