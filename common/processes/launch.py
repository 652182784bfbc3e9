"""Starting and stopping: entry scripts, threads, signals, and the `poslabel` command.

Import this module before torch: libgomp reads OMP_WAIT_POLICY when it is loaded.
"""

import os

# Idle OpenMP threads that spin steal the core from the loader's workers: up to 25 times slower on a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import difflib
import functools
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.disk import is_full, no_room
from ..errors import Refusal
from ..printable import printable
from .stopping import HEEDED, INTERRUPTED, Stopped, asked_to_stop, die_with_parent, kill_children, lost_worker
from .streams import protect, reopen_closed

REFUSED = Refusal.status
ROOT = Path(__file__).resolve().parents[2]


reopen_closed()  # now: what is opened next would take the numbers of closed streams


def entry(main: Callable[[list[str]], int | None]) -> Callable[[], None]:
    """Make `main(argv)` an entry script's function: a Refusal becomes one line and exit status 2, --debug shows
    where from."""

    @functools.wraps(main)
    def run() -> None:
        protect()
        leave_with_launcher()
        threading.excepthook = _in_a_thread
        argv = sys.argv[1:]
        debug = "--debug" in argv
        try:
            status = main([word for word in argv if word != "--debug"]) or 0
        except Refusal as refusal:
            if debug:
                traceback.print_exc()
            _complain(str(refusal))
            status = refusal.status
        except OSError as error:  # a full disk, a read-only folder, a missing permission
            if debug:
                traceback.print_exc()
            name = error.filename2 or error.filename or "a file"
            _complain(no_room(f"{name}", error) if is_full(error) else f"{error}")
            status = REFUSED
        except KeyboardInterrupt:
            status = INTERRUPTED
        except Stopped as stopped:
            _complain(f"{stopped}, with nothing more to save", "note")
            status = stopped.status
        except Exception as error:  # a fault of ours, or of the machine: out of memory
            lost = lost_worker(error) if "DataLoader worker" in str(error) else None
            lost = no_room("a file", error) if is_full(error) else lost
            if asked_to_stop() and not isinstance(error, (TypeError, AssertionError)):  # the others end, too
                lost = lost or f"while it stopped: {error}".splitlines()[0]
            if lost is None or debug:
                traceback.print_exc()
            if lost is not None:
                _complain(lost)
            status = 1 if lost is None else REFUSED
        _leave(status)

    return run


def _in_a_thread(arguments: threading.ExceptHookArgs) -> None:
    """Leave a full disk that TensorBoard's thread meets to the main thread, which meets it next and says so."""
    if arguments.exc_value is None or not is_full(arguments.exc_value):
        threading.__excepthook__(arguments)


def _complain(message: str, kind: str = "error") -> None:
    if os.environ.get("RANK", "0") == "0":  # every process meets the same mistake; one of them says so
        print(f"{kind}: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)


def _leave(status: int) -> None:
    """Exit with `status`, without waiting for the other processes of a job that this one gives up on."""
    sys.stdout.flush()
    sys.stderr.flush()
    kill_children()  # an exit would wait for them, and one may be stuck in a read
    if status == 0:
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_available() or not distributed.is_initialized():
            sys.exit(0)
        distributed.destroy_process_group()  # what is left of gloo's threads may abort a normal exit all the same
    os._exit(status)


def _launcher() -> int | None:
    """Return the process id of the `accelerate launch` or torchrun that started this process, if one did (Linux)."""
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    named = any(Path(word.decode(errors="replace")).name in ("accelerate", "torchrun") for word in words[:3])
    return parent if named or any(w.startswith((b"accelerate.commands", b"torch.distributed")) for w in words) else None


LAUNCHER = _launcher()  # asked now: the imports that follow take seconds, in which it may die


def leave_with_launcher() -> None:
    """Let the launcher's death send this process a SIGTERM (and so save and stop), now if it has died already.

    Without it a killed launcher leaves a training process behind that goes on writing its run folder.
    """
    if LAUNCHER is not None:
        die_with_parent(signal.SIGTERM)
        if os.getppid() != LAUNCHER:
            signal.raise_signal(signal.SIGTERM)


def set_threads(threads: int | None = None) -> tuple[int, str]:
    """Set torch's CPU threads and return them with the reason. None: the usable cores shared among this machine's
    processes.

    `accelerate launch` sets OMP_NUM_THREADS=1 where the user set nothing, so a 1 in the environment is not a wish.
    """
    import torch

    reason = "given"
    if threads is None:
        wished = os.environ.get("OMP_NUM_THREADS", "1")
        if wished.isdigit() and int(wished) > 1:
            threads, reason = int(wished), "OMP_NUM_THREADS"
        else:
            processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            threads = max(1, usable_cores() // processes)
            reason = f"{usable_cores()} usable cores / {processes} processes"
    if threads < 1:
        raise Refusal(f"threads={threads}: expected a number of at least 1")
    torch.set_num_threads(threads)
    return threads, reason


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def active_pil() -> str:
    """Name the PIL that is imported: "pillow 13.0.0" or "pillow-simd 12.1.1.post0"."""
    import PIL

    version = PIL.__version__
    return f"pillow-simd {version}" if ".post" in version else f"pillow {version}"


# ------------------------------------------------------------------------------------------- the `poslabel` command


def scripts() -> dict[str, Path]:
    """Return the entry scripts by the names that `poslabel NAME` takes."""
    named = {path.stem: path for path in sorted((ROOT / "evaluate").glob("[!_]*.py"))}
    others = {name: ROOT / "pretrain" / f"{name}.py" for name in ("audit", "generate_labels")}
    inspect = ROOT / "common" / "inspecting" / "inspect_data.py"
    return {"pretrain": ROOT / "pretrain" / "run.py", **others, "inspect": inspect, **named}


# set by a launcher for this process, and not for those that it starts
LAUNCHED = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


COMMAND = "POSLABEL_COMMAND"  # by which a script learns that the `poslabel` command started it, and how it was typed


def run_script(name: str, words: Sequence[str]) -> int:
    """Run `evaluate/NAME.py` with these arguments in a process of its own, whose output is shown; its exit status.

    A signal to stop stops both: it is passed on, and acts here when that process has ended.
    """
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        if process is not None:
            process.terminate()  # Ctrl-C reaches it by itself, and a second one would not let it save

    heeded = [number for number in HEEDED if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heeded}
    try:
        process = subprocess.Popen([sys.executable, str(scripts()[name]), *words], env=environment)
        if received:  # while it was started
            process.terminate()
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
    return status


def main() -> None:
    """Run a script of this installation: `poslabel [accelerate options] NAME [arguments]`.

    One process runs under plain Python; with options, or several GPUs, under `accelerate launch`.
    """
    argv = sys.argv[1:]
    known = scripts()
    at = next((i for i, word in enumerate(argv) if word in known), None)
    if at is None:
        mistyped = argv[:1] not in ([], ["-h"], ["--help"])
        complaint = f"error: no command in {' '.join(argv)!r}{suggested(argv)}\n" if mistyped else ""
        print(f"{complaint}usage: poslabel [accelerate options] {{{','.join(known)}}} [arguments]", file=sys.stderr)
        sys.exit(0 if argv[:1] in (["-h"], ["--help"]) else REFUSED)
    os.environ[COMMAND] = sys.argv[0] if Path(sys.argv[0]).stem == "poslabel" else "poslabel"
    options, command = argv[:at], [str(known[argv[at]]), *argv[at + 1 :]]
    if options or _num_gpus() > 1:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options]
    else:
        launcher = [sys.executable]
    os.execv(sys.executable, launcher + command)


MEANT = {"pretrain": ("run", "train", "training", "pretraining", "start", "fit"), "finetune": ("tune", "fine-tuning")}


def suggested(argv: Sequence[str]) -> str:
    """Suggest what an unknown command may have meant: another name, a script's path, a misspelling."""
    names = {name: name for name in scripts()} | {other: name for name, others in MEANT.items() for other in others}
    for word in argv:
        stem = Path(word).stem.lower().replace("_", "-") if not word.startswith("-") and "=" not in word else ""
        near = [stem] if stem in names else difflib.get_close_matches(stem, names, n=3, cutoff=0.6)
        if near:
            return f"; did you mean {' or '.join(dict.fromkeys(repr(names[name]) for name in near))}?"
    return ""


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
