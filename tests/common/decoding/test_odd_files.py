"""A corpus of odd files: each is read right, named with its reason, or not taken for a picture; nothing crashes."""

import re
import subprocess
import sys

import numpy as np
import pytest
from odd_files import CORPUS, EXIF, Odd, jpeg, write
from pictures import exif

from common.data import Unreadable, open_data
from common.decoding.decode import decode

ROOT = __file__.partition("/tests/")[0]


def middles(pixels: np.ndarray) -> np.ndarray:
    """The pixels in the middles of the four quarters of (3, H, W): (4, 3)."""
    _, height, width = pixels.shape
    rows, columns = (height // 4, height - 1 - height // 4), (width // 4, width - 1 - width // 4)
    return np.array([pixels[:, y, x] for y in rows for x in columns])


def is_as_expected(odd: Odd, pixels: np.ndarray) -> bool:
    greys = np.array(odd.quarters) if len(pixels) == 3 else np.array(odd.quarters) @ (0.299, 0.587, 0.114)
    far = np.abs(middles(pixels).astype(float) - greys.reshape(4, -1)).max()
    return pixels.shape[1:] == odd.size and far <= odd.near + (len(pixels) == 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("odd")
    write(place)
    return place


def test_the_corpus_is_large_and_of_all_three_outcomes():
    assert len({odd.name for odd in CORPUS}) == len(CORPUS) >= 60
    assert min(sum(odd.is_read for odd in CORPUS), sum(bool(odd.reason) for odd in CORPUS)) >= 25
    assert sum(not odd.listed for odd in CORPUS) >= 5


@pytest.mark.parametrize("odd", [odd for odd in CORPUS if odd.listed], ids=lambda odd: ascii(odd.name)[:40])
@pytest.mark.parametrize("channels", [3, 1])
def test_every_odd_file_has_its_outcome(odd, channels):
    data = np.frombuffer(odd.content(), np.uint8).copy()
    if odd.reason:
        with pytest.raises(Exception) as caught:
            decode(data, channels)
        assert re.search(odd.reason, str(caught.value))
    else:
        assert is_as_expected(odd, decode(data, channels).numpy())


def test_a_turn_that_is_not_made_is_seen():
    """The check above can fail: a JPEG turned by 6 is not what one turned by 8 has to become."""
    odd = next(odd for odd in CORPUS if odd.name == "turned-8.jpg")
    wrong = np.frombuffer(jpeg(exif=EXIF + exif(6)), np.uint8).copy()
    assert not is_as_expected(odd, decode(wrong).numpy())


def test_a_folder_of_them_names_each_that_cannot_be_read(folder):
    images = open_data(str(folder))
    assert sorted(images.source.relative(i) for i in range(len(images))) == sorted(
        odd.name for odd in CORPUS if odd.listed
    )
    bad = set()
    for i in range(len(images)):
        try:
            images.read(i)
        except Unreadable as error:
            assert error.name == images.name(i) and "\n" not in str(error)
            bad.add(images.source.relative(i))
    assert bad == {odd.name for odd in CORPUS if odd.reason}


def test_the_script_writes_them_and_says_what_has_to_come_of_each(tmp_path):
    script = [sys.executable, f"{ROOT}/tests/odd_files.py", str(tmp_path / "odd")]
    said = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    assert said.startswith(f"{len(CORPUS)} files in ")
    lines = (tmp_path / "odd" / "odd_files.txt").read_text().splitlines()
    assert len(lines) == len(CORPUS) and "'empty.jpg': unreadable: the file is empty" in lines


CHILD = """
import faulthandler, gc, resource, sys
from pathlib import Path
import numpy as np
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from odd_files import CORPUS
from common.data.images import Images, Unreadable
from common.decoding.decode import decode

def used():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

class Flipped:  # a source: image i is an odd file of which some bytes are others
    span = None
    def __len__(self): return COUNT
    def name(self, i): return f"variant {i} of {LISTED[i % len(LISTED)].name!r}"
    def read(self, i, channels):
        rng = np.random.default_rng(i)
        data = np.frombuffer(CONTENTS[i % len(LISTED)], np.uint8).copy()
        at = rng.integers(0, min(len(data), 4000 if i % 3 else 64), rng.integers(1, 9))
        data[at] ^= rng.integers(1, 256, len(at), dtype=np.uint8)
        return decode(data, channels)

COUNT = int(sys.argv[2])
LISTED = [odd for odd in CORPUS if odd.listed and odd.content()]
CONTENTS = [odd.content() for odd in LISTED]
images = Images(Flipped(), "flipped")
read = named = 0
for i in range(COUNT):
    faulthandler.dump_traceback_later(60, exit=True)  # one that hangs ends this process
    try:
        pixels = images.read(i, 1 if i % 5 == 0 else 3)
        assert pixels.dtype.itemsize == 1 and pixels.ndim == 3
        read += 1
    except Unreadable as error:
        assert error.reason and "variant" in error.name
        named += 1
    pixels = None
    if i == COUNT // 4:
        before = used()
faulthandler.cancel_dump_traceback_later()
print(read, named, (used() - before) >> 20)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_files_with_bytes_flipped_neither_crash_nor_hang_nor_leak():
    command = [sys.executable, "-W", "ignore", "-c", CHILD, ROOT, "10000"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-2000:]
    read, named, grown = map(int, run.stdout.split())
    assert read + named == 10_000 and read > 1000 and named > 1000
    assert grown < 64  # MiB, over the last 7,500
