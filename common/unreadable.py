"""Files that cannot be read while something trains: named once, written down, and too many of them end the training."""

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from .errors import Refusal
from .features import MOST_UNREADABLE
from .loading import Loader
from .sampling import Batch

UNREADABLE = "unreadable.txt"


def watch(
    batches: Loader, folder: Path, total: int, together: int, say: Callable[[str], None]
) -> Generator[Batch, None, None]:
    """The same batches; each unreadable file among them is named once, on the screen and in folder/unreadable.txt.

    Processes tell each other every `together` batches, so that all stop at once. Raises Refusal if unreadable files
    are more than one in a hundred of the `total` images, or no readable image is found in place of one.
    """
    path, process = folder / UNREADABLE, PartialState()
    listed = set(path.read_text().splitlines()) if path.exists() else set()  # said before an interruption
    known: set[str] = set()
    fresh: list[str] = []
    hopeless = False
    with closing(iter(batches)) as stream:
        for number, batch in enumerate(stream, 1):
            fresh += [name for name in batch.unreadable if name not in known]
            hopeless |= batch.hopeless
            if process.num_processes == 1 or number % together == 0 or number == len(batches):
                told = [(fresh, hopeless)]
                if process.num_processes > 1:
                    told = gather_object(told)
                names = sorted({name for names, _ in told for name in names})
                known.update(names)
                if process.is_main_process:
                    _tell([name for name in names if name not in listed], path, f"{len(known)} of {total}", say)
                if any(despair for _, despair in told) or len(known) > MOST_UNREADABLE * total:
                    raise Refusal(
                        f"{len(known)} of {total} images cannot be read, more than {MOST_UNREADABLE:.0%}: mend or "
                        f"remove the files listed in {path}"
                    )
                fresh = []
            yield batch


def _tell(names: list[str], path: Path, count: str, say: Callable[[str], None]) -> None:
    """Add `names` to the list of unreadable files, and to the screen."""
    if names:
        with path.open("a") as file:
            file.writelines(f"{name}\n" for name in names)
    for name in names:
        say(f"warning: unreadable image, another takes its place ({count} so far): {name}")
