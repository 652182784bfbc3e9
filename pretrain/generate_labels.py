"""Label every image of a data set densely: what does an annotator see in each cell? For training with token labels.

accelerate launch pretrain/generate_labels.py --annotator timm:NAME --data PATH --out FILE
accelerate launch pretrain/generate_labels.py --annotator timm:NAME --weights FILE --data PATH --out FILE
accelerate launch pretrain/generate_labels.py --annotator RUN --data PATH --out FILE     # a finetuned run of ours
  --size N [N]     pixels that the annotator sees (default: as it was trained): more pixels, more cells
  --top K          classes kept of each cell (default: 5)
  --centre SHARE   label the central SHARE of the shorter side alone, as published (default: whole images, squashed to
                   the size, so that every crop of an oblong image has labels)
  --preview [N]    also draw N images beside their labels into FILE.png (default: 6); of a finished file, only that

All training images go into one file of about 4 K bytes a cell and image; the size is said first, then how long it will
take. Interrupted, the same command goes on where it stopped.
"""

import sys
from pathlib import Path

if not __package__:  # `python pretrain/generate_labels.py` puts pretrain/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry, set_threads  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator

from accelerate import PartialState
from filelock import FileLock, Timeout

from common.batches.unreadable import Limit
from common.commands import Parser
from common.data import Images, open_data
from common.data.location import OPTIONS, location_of
from common.errors import Refusal
from common.paths import expanded, expanded_path
from common.processes import group
from common.training.precision import DTYPES, refuse_impossible
from pretrain.token_labels import packed
from pretrain.token_labels.annotators import Annotator, open_annotator
from pretrain.token_labels.generate import How, Labelling, in_words, refuse_no_room
from pretrain.token_labels.preview import draw
from pretrain.token_labels.reader import names_of


def main(argv: list[str]) -> int:
    """Label, or draw. Returns the exit status."""
    arguments = parse(argv)
    out = arguments.out
    if out.exists() and arguments.preview is None:
        raise Refusal(f"--out {out} exists: choose another name, or remove it; --preview draws what is in it")
    process = group.join()
    set_threads(arguments.threads)
    refuse_impossible(arguments.precision, process.device)
    say = functools.partial(print, flush=True) if process.is_main_process else (lambda line: None)
    images = open_data(location_of(vars(arguments)))
    if not out.exists():
        size = tuple(2 * arguments.size)[:2] if arguments.size else None
        annotator = open_annotator(arguments.annotator, arguments.weights, size)  # type: ignore[arg-type]
        label(arguments, annotator.to(process.device), images, process, say)
    if arguments.preview is not None and process.is_main_process:
        say(f"pictures   {draw(out, images, arguments.preview)}")
    return 0


def label(
    arguments: argparse.Namespace,
    annotator: Annotator,
    images: Images,
    process: PartialState,
    say: Callable[[str], None],
) -> None:
    """Write the labels of all images to --out."""
    out, limit = arguments.out, Limit(arguments.max_bad, option="--max-bad ").check()
    how = How(arguments.top, arguments.centre, arguments.batch, arguments.precision)
    labelling = Labelling(annotator, images, how, out, limit, arguments.workers, process)
    if process.is_main_process:
        say(f"data       {images.where}: {len(images):,} images")
        say(in_words(labelling.header, out))
    with only_writer(out) if process.is_main_process else contextlib.nullcontext():
        if process.is_main_process:
            refuse_no_room(labelling.header, out)
            packed.begin(out, labelling.header, *names_of(images)[:2])
        process.wait_for_everyone()
        labelling.run(say)
        if process.is_main_process:
            packed.finish(out)
    say(f"done: the labels are in {out}")
    process.wait_for_everyone()


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Keep other processes from writing `out` inside. Raises Refusal if one does."""
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise Refusal(f"--out {out}: another process is writing it; wait for it, or choose another name") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises Refusal for what cannot be done."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--annotator", required=True, type=expanded, metavar="timm:NAME|RUN", help="what labels")
    add("--weights", type=expanded, metavar="FILE", help="of timm:NAME, with its classifier (default: as published)")
    add("--out", required=True, type=expanded_path, metavar="FILE", help="the file to write")
    add("--data", type=expanded, default="builtin", metavar="SPEC", help="images (default: the built-in ones)")
    add("--data-root", type=expanded, metavar="DIR", help="where a named data set is looked for, and fetched to")
    add("--data-train", type=expanded, metavar="NAME", help="sub-folder, archive or split to label (default: by name)")
    add("--data-image", metavar="COLUMN", help="of the images in hf:; in shards, how their names end")
    add("--data-range", metavar="LOW:HIGH", help="values of black and white in pictures of more than 8 bits")
    add(
        "--size",
        type=int,
        nargs="+",
        metavar="N",
        help="pixels that the annotator sees: one number, or height and width",
    )
    add("--top", type=int, metavar="K", help="classes kept of each cell (default: 5)")
    add("--centre", type=float, metavar="SHARE", help="of the tighter side that is labelled (default: whole images)")
    add("--batch", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    add("--precision", choices=list(DTYPES), default="fp32", help="of the annotator (default: fp32)")
    add("--max-bad", default="auto", metavar="N|SHARE", help="unreadable images that are borne (default: auto)")
    add("--preview", type=int, nargs="?", const=6, metavar="N", help="images to draw beside their labels")
    add("--workers", type=int, default=0, metavar="N", help="processes that decode images (default: 0)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the usable cores)")
    arguments = parser.parse_args(argv)
    vars(arguments).update({name: None for name in OPTIONS.values() if not hasattr(arguments, name)})
    for name, least in (("batch", 1), ("top", 1), ("preview", 1), ("workers", 0)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise Refusal(f"--{name} {value}: expected a whole number of at least {least}")
    if arguments.size and (len(arguments.size) > 2 or min(arguments.size) < 1):
        raise Refusal(
            f"--size {' '.join(map(str, arguments.size))}: expected one number of pixels, or height and width"
        )
    if arguments.centre is not None and not 0 < arguments.centre <= 1:
        raise Refusal(f"--centre {arguments.centre:g}: expected a share above 0, at most 1")
    if arguments.out.is_dir() or not arguments.out.absolute().parent.is_dir():
        raise Refusal(f"--out {arguments.out}: expected the name of a file in a folder that exists")
    return arguments


if __name__ == "__main__":
    entry(main)()
