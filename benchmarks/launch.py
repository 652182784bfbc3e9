"""Start-up, waiting for data, and what a second process costs: whole runs as child processes.

    python benchmarks/launch.py

1. seconds from the command to the first finished step of the quickstart recipe;
2. the share of the training time spent waiting for data (`data_wait`), from the same run's metrics.jsonl;
3. images/s of two processes with one thread each against one process with one thread, and with two threads.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
RUN = str(ROOT / "pretrain" / "run.py")


def train(folder: Path, words: Sequence[str], processes: int = 1) -> tuple[float, list[dict[str, float]]]:
    """(seconds to the first line of metrics.jsonl, all its lines) of one run."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "29655"]
    metrics = folder / "metrics.jsonl"
    begun, first = time.perf_counter(), None
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        [*launcher, RUN, f"run={folder}", "log_every=1", *words], stdout=subprocess.DEVNULL, env=environment
    ) as child:
        while child.poll() is None:
            if first is None and metrics.exists() and metrics.stat().st_size:
                first = time.perf_counter() - begun
            time.sleep(0.02)
    if child.returncode or first is None:
        raise SystemExit(f"run failed with status {child.returncode}")
    return first, [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def speed(lines: Sequence[dict[str, float]]) -> float:
    """Median images/s after the first steps."""
    return statistics.median(line["images_per_second"] for line in lines[10:])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    common = [f"steps={arguments.steps}", "monitor.every=100000", "tensorboard=false"]
    cases = {
        "one process, two threads": (["threads=2"], 1),
        "one process, one thread": (["threads=1"], 1),
        "two processes, one thread each": (["threads=1"], 2),
    }
    firsts: list[float] = []
    waits: list[float] = []
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(arguments.rounds):
            for number, (name, (words, processes)) in enumerate(cases.items()):
                first, lines = train(Path(temporary) / f"{turn}-{number}", [*common, *words], processes)
                speeds[name].append(speed(lines))
                if processes == 1:
                    firsts.append(first)
                    waits.append(statistics.fmean(line["data_wait"] for line in lines[10:]))
    print(f"start-up to the first step   {statistics.median(firsts):.1f} s (median of {len(firsts)})")
    print(f"data_wait                    {statistics.median(waits):.1%} (median of {len(waits)} runs)")
    base = speeds["one process, two threads"]
    for name, values in speeds.items():
        ratio = statistics.median(value / other for value, other in zip(values, base, strict=True))
        print(f"{name:32} {statistics.median(values):8,.0f} img/s   {ratio:.2f}x")


if __name__ == "__main__":
    main()
