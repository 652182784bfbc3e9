"""Say what a data set is made of, before anything is trained on it.

poslabel inspect DATA                  # or: python -m common.data inspect DATA
  --most N       decode N images of each split, evenly spread (default: all)
  --out FOLDER   where the report is written (default: runs/inspect/NAME): inspect.json, sheet.png, bad_files.txt
  --data-root DIR, --data-train NAME, ...   as the options of a training, see its --help

Counts by kind, also of what is not read; classes; sizes; mean and deviation of the channels, ready to be pasted; what
cannot be read; pictures that repeat, or nearly, and those that are trained on and judged; how fast images are decoded;
a sheet of pictures. Anything that a training reads, read as a training reads it.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.processes.launch import entry, set_threads  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import functools
import re

from tqdm import tqdm

from common.batches.unreadable import BAD_FILES
from common.checkpoints.storage import write_atomically, write_json
from common.commands import Parser
from common.data import SPLITS, open_split
from common.data.images import evenly
from common.data.location import OPTIONS, location_of
from common.errors import Refusal
from common.inspecting import report
from common.inspecting.survey import pace, survey
from common.paths import expanded, expanded_path
from common.processes.launch import usable_cores


def main(argv: list[str]) -> int:
    """Look, tell, write. Returns the exit status."""
    arguments = parse(argv)
    set_threads(1)  # each image is one thread's
    say = functools.partial(print, flush=True)
    where = location_of(vars(arguments))
    opened = {name: open_split(where, name) for name in SPLITS}
    chosen = {
        name: (images, evenly(len(images), arguments.most or len(images)))
        for name, images in opened.items()
        if images is not None
    }
    threads = arguments.threads or usable_cores()
    speed = pace(next(iter(chosen.values()))[0])
    total = sum(len(indices) for _, indices in chosen.values())
    with tqdm(total=total, unit="img", desc="looking", disable=None, leave=False) as bar:
        splits = [
            report.Split(name, images, survey(images, indices, threads, bar.update))
            for name, (images, indices) in chosen.items()
        ]
    found = report.find_repeats(splits)
    say("\n".join(report.lines(splits, found, speed)))
    out = arguments.out or Path("runs", "inspect", re.sub(r"[^\w.-]+", "-", where.spec).strip("-.") or "data")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "inspect.json", report.numbers(splits, found, speed))
    bad = [message for split in splits for message in split.survey.bad]
    (out / BAD_FILES).unlink(missing_ok=True)
    if bad:
        text = "".join(f"{message}\n" for message in bad)
        write_atomically(
            out / BAD_FILES, lambda aside: aside.write_text(text, encoding="utf-8", errors="backslashreplace")
        )
    readable = next((split for split in splits if split.survey.index), None)
    if readable is None:
        raise Refusal(f"none of {total:,} images looked at in {where.spec} can be read: see {out / BAD_FILES}")
    report.sheet(readable.images, readable.survey, out / "sheet.png")
    say(f"report: {out / 'inspect.json'}; pictures: {out / 'sheet.png'}" + (f"; {out / BAD_FILES}" if bad else ""))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises Refusal for what cannot be done."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=expanded, metavar="DATA", help="what a training takes as data=")
    add("--data-root", type=expanded, metavar="DIR", help="where a named data set is looked for, and fetched to")
    add("--data-train", type=expanded, metavar="NAME", help="sub-folder, archive or split to train on")
    add("--data-validation", type=expanded, metavar="NAME", help="sub-folder, archive or split to judge on")
    add("--data-image", metavar="COLUMN", help="of the images in hf:; in shards, how their names end")
    add("--data-label", metavar="COLUMN", help="of the labels in hf:; in shards, a field of .json")
    add("--data-range", metavar="LOW:HIGH", help="values of black and white in pictures of more than 8 bits")
    add("--most", type=int, metavar="N", help="images of each split to decode, evenly spread (default: all)")
    add("--out", type=expanded_path, metavar="FOLDER", help="where the report is written (default: runs/inspect/NAME)")
    add("--threads", type=int, metavar="N", help="threads that decode (default: the usable cores)")
    arguments = parser.parse_args(argv)
    vars(arguments).update({name: None for name in OPTIONS.values() if not hasattr(arguments, name)})
    for name in ("most", "threads"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise Refusal(f"--{name} {value}: expected a whole number of at least 1")
    return arguments


if __name__ == "__main__":
    entry(main)()
