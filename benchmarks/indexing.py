"""A million images: how long it takes to find them, once and again: `python benchmarks/indexing.py`.

A tar archive of headers alone, and a folder of empty files, in 1,000 classes each (--entries). Each is opened in a
process of its own, which has imported all it needs: a first time, when all headers or names are read, and again, from
the index that is kept. Memory is how much the largest resident size of that process grows. Then a process with the
images forks four workers that look up 10,000 names each; theirs is what the kernel calls private dirty: memory that is
no longer shared, less what a worker has that looks up one name.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from common.data import Images, open_data

CLASSES, WORKERS, LOOKED_UP = 1000, 4, 10_000
FORK = multiprocessing.get_context("fork")


def name(number: int, entries: int) -> str:
    """Name of an image, as ImageNet has them."""
    group = number * CLASSES // entries
    return f"n{group:08d}/n{group:08d}_{number}.JPEG"


def write_archive(path: Path, entries: int) -> None:
    """Write a tar archive of empty members."""
    with path.open("wb") as file:
        for number in range(entries):
            file.write(tarfile.TarInfo(name(number, entries)).tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def write_folder(folder: Path, entries: int) -> None:
    """Write empty files."""
    for group in range(CLASSES):
        (folder / f"n{group:08d}").mkdir(parents=True)
    for number in range(entries):
        os.close(os.open(folder / name(number, entries), os.O_CREAT | os.O_WRONLY))


def opening(spec: str, results: Any) -> None:
    """Open the images and send (how many, seconds, processor seconds, MB)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    images = open_data(spec)
    took = time.perf_counter() - wall, time.process_time() - cpu
    results.put((len(images), *took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def private_dirty() -> float:
    """MB of this process that it shares with no other and has written."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def looking_up(images: Images, seed: int, count: int, results: Any) -> None:
    """Look up names at random places, and send the private memory."""
    for i in np.random.default_rng(seed).integers(0, len(images), count).tolist():
        assert images.name(i).endswith(".JPEG")
    results.put(private_dirty())


def child(target: Any, *given: Any) -> Any:
    """What a forked process sends."""
    results = FORK.SimpleQueue()
    process = FORK.Process(target=target, args=(*given, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{target.__name__} ended with status {process.exitcode}")
    return results.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    entries = parser.parse_args().entries
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        archive, folder = Path(place) / "train.tar", Path(place) / "train"
        write_archive(archive, entries)
        write_folder(folder, entries)
        time.sleep(3)  # a folder written less than two seconds ago is not trusted to stay as it is
        print(f"{entries:,} images   first time        again")
        for spec in (str(archive), str(folder)):
            first, again = child(opening, spec), child(opening, spec)
            assert first[0] == again[0] == entries
            images = open_data(spec)
            alone = child(looking_up, images, 0, 1)
            grown = max(child(looking_up, images, seed, LOOKED_UP) - alone for seed in range(WORKERS))
            print(
                f"{Path(spec).name:<12} {first[1]:6.2f} s (processor {first[2]:5.2f} s), {first[3]:4.0f} MB   "
                f"{again[1]:6.2f} s (processor {again[2]:5.2f} s), {again[3]:4.0f} MB; of a worker's own {grown:.1f} MB"
            )


if __name__ == "__main__":
    main()
