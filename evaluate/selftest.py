"""Whether this evaluation is the field's: DINO's published ViT-S/16, judged here, against the authors' own figures.

    python evaluate/selftest.py                                       # says what would be done
    python evaluate/selftest.py --weights FILE --data IMAGENET        # k-NN and the linear probe
    python evaluate/selftest.py --weights FILE --data IMAGENET --only knn

FILE: the weights as their authors publish them (dino_deitsmall16_pretrain.pth) or as timm does. IMAGENET: train/ and
val/ of ImageNet-1k, a folder for each class. Each figure comes from the evaluation's own script, run as a user would,
and has to lie within a tolerance of the published one; the exit status is 1 if one does not. Reports go to --out.
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/selftest.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry, run_script  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import shlex
from dataclasses import dataclass

from common.commands import Parser, command
from common.data import Images, Location, labelled_splits
from common.errors import Refusal
from common.features.neighbors import FIELD
from common.paths import expanded
from evaluate.job import report, subjects
from evaluate.job.evaluation import only_first

MODEL = "timm:vit_small_patch16_224.dino"
PARAMETERS = 21_665_664
CLASSES, TRAIN, TEST = 1000, 1_281_167, 50_000  # of ImageNet-1k


@dataclass(frozen=True)
class Check:
    """Published figure and the command that measures it here."""

    script: str
    words: tuple[str, ...]
    kind: str  # of features
    protocol: str
    published: float  # percent
    tolerance: float  # points
    cost: str
    beside: str = ""  # which number of the report is theirs, where its headline is ours

    def command(self, arguments: argparse.Namespace) -> list[str]:
        """Arguments of the script, data and weights among them."""
        shared = ["--ckpt", MODEL, "--weights", arguments.weights or "FILE", "--data", arguments.data or "IMAGENET"]
        shared += ["--out", str(Path(arguments.out) / f"{self.script}.json"), "--workers", str(arguments.workers)]
        shared += ["--device", arguments.device] if arguments.device else []
        return [*shared, *self.words]


# 224 of 256 pixels: timm's description of these weights says 0.9, the authors' evaluation has 0.875
CROP = ("--crop", "0.875")
CHECKS = {
    "knn": Check(
        "knn", (*CROP, "--k", "20"), "class", "knn/dino", 74.5, 0.3, "one pass over 1.3 million images",
        beside=FIELD,  # theirs is not centred
    ),
    "linear": Check(
        "linear", (*CROP, "--protocol", "dino", "--augment"), "chosen", "linear/dino+augment", 77.0, 0.5,
        "100 passes over 1.3 million crops: hours on a GPU; nine tenths of the images train the head",
        beside="best_on_test",  # theirs is of the epoch that is best on the test images
    ),
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the evaluations of the published figures and compare. Returns the exit status."""
    options = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add("--weights", type=expanded, metavar="FILE", help="of DINO's ViT-S/16")
    add("--data", type=expanded, metavar="SPEC", help="ImageNet-1k: a folder with train/ and val/, or hf:NAME")
    add("--only", choices=list(CHECKS), help="one of the checks")
    usual = "where the reports go (default: runs/selftest)"
    add("--out", type=expanded, metavar="DIR", default="runs/selftest", help=usual)
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--workers", type=int, default=0, metavar="N", help="processes that decode images (default: 0)")
    arguments = options.parse_args(argv)
    if not only_first("the self-test"):
        return 0
    checks = [check for name, check in CHECKS.items() if arguments.only in (None, name)]
    if arguments.weights is None:
        print(plan(checks, arguments))
        return 0
    subject = subjects.subject_of(MODEL, weights=arguments.weights)
    model = subject.backbone().model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != PARAMETERS:
        raise Refusal(
            f"--weights {arguments.weights}: {parameters:,} parameters, and DINO's ViT-S/16 has {PARAMETERS:,}"
        )
    print(f"weights     {arguments.weights}: every tensor of ViT-S/16 is there, {parameters:,} parameters", flush=True)
    for note in subject.notes:
        print(f"            {note}", flush=True)
    if arguments.data is None:
        raise Refusal(
            "--data is missing: the published figures are of ImageNet-1k; expected a folder with its train/ and val/"
        )
    refuse_others(*labelled_splits(Location(arguments.data))[:2], arguments.data)
    verdicts = [judged(check, arguments) for check in checks]
    print("\n" + "\n".join(line for line, _ in verdicts))
    return 0 if all(passed for _, passed in verdicts) else 1


def plan(checks: list[Check], arguments: argparse.Namespace) -> str:
    """Describe what would be done."""
    lines = ["nothing was checked: --weights is missing. What would be:", ""]
    lines += [f"weights     DINO's ViT-S/16 (arXiv 2104.14294), {PARAMETERS:,} parameters: --weights FILE"]
    lines += [f"data        ImageNet-1k, {TRAIN:,} training and {TEST:,} validation images: --data IMAGENET"]
    for check in checks:
        lines += [
            f"{check.script:<11} {check.published} ± {check.tolerance} % expected ({check.cost}):",
            f"            {command(check.script, *check.command(arguments))}",
        ]
    return "\n".join(lines)


def refuse_others(train: Images, test: Images, spec: str) -> None:
    """Raises Refusal unless these are ImageNet-1k's splits: its figures mean nothing on other images."""
    sizes = len(train.classes or ()), len(train), len(test)
    if sizes != (CLASSES, TRAIN, TEST):
        raise Refusal(
            f"--data {spec} has {sizes[0]:,} classes, {sizes[1]:,} training and {sizes[2]:,} test images: the "
            f"published figures are of ImageNet-1k, which has {CLASSES:,}, {TRAIN:,} and {TEST:,}"
        )


def judged(check: Check, arguments: argparse.Namespace) -> tuple[str, bool]:
    """Run a check: (a line, whether the figure is the published one). Raises Refusal if its script fails."""
    command = check.command(arguments)
    print(f"\n{shlex.join([f'{check.script}.py', *command])}", flush=True)
    if status := run_script(check.script, command):
        raise Refusal(f"{check.script}.py ended with status {status}, see above: nothing is known of its figure")
    content, _ = report.read(Path(arguments.out) / f"{check.script}.json")
    entry, protocol = content["values"]["subject"][check.kind], content["protocol"]
    protocol = protocol["beside"] if check.beside == FIELD else protocol  # of the number that is theirs
    return verdict(check, protocol["id"], (entry[check.beside] if check.beside else entry)["accuracy"])


def verdict(check: Check, protocol: str, accuracy: float) -> tuple[str, bool]:
    """Verdict: (a line, whether the figure is the published one). Raises Refusal for another protocol's figure."""
    if protocol != check.protocol:
        raise Refusal(f"the report is of protocol {protocol}, and {check.published} of {check.protocol}")
    away = 100 * accuracy - check.published
    passed = abs(away) <= check.tolerance
    result = "as published" if passed else "NOT as published"
    return (
        f"{check.script:<7} {100 * accuracy:.2f} %, published {check.published} ± {check.tolerance}: {result} "
        f"({away:+.2f})",
        passed,
    )


if __name__ == "__main__":
    entry(main)()
