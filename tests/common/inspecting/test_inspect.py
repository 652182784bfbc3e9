"""`poslabel inspect`: every number it says of a folder that is made to have it, and what it refuses."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import Refusal
from common.inspecting import repeats
from common.inspecting.inspect_data import main

ROOT = Path(__file__).resolve().parents[3]


def picture(seed: int, height: int = 48, width: int = 64) -> Image.Image:
    """A smooth picture of its own."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """6 + 3 training images in two classes and 3 to judge on, with a fault of every kind."""
    folder = tmp_path / "data"
    for part, name in (("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "dog")):
        (folder / part / name).mkdir(parents=True)
    for i in range(6):
        picture(i).save(folder / "train" / "cat" / f"{i}.png")
    picture(6, 30, 30).convert("L").save(folder / "train/dog/grey.jpg", quality=95)
    shutil.copy(folder / "train/cat/0.png", folder / "train/dog/again.png")  # of another class
    (folder / "train/dog/broken.jpg").write_bytes(b"no picture")
    (folder / "train/dog/film.heic").write_bytes(b"not read")
    shutil.copy(folder / "train/cat/1.png", folder / "val/cat/copy.png")
    picture(2).save(folder / "val/cat/near.jpg", quality=80)  # one that is trained on, saved again
    picture(20).save(folder / "val/dog/own.png")
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main([*map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def test_every_fault_is_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    said = told(capsys, data, "--out", out)
    lines = {line.split()[0]: line for line in reversed(said) if not line.startswith(" ")}
    assert lines["train"].endswith("(train): 9 images") and lines["test"].endswith("(val): 3 images")
    assert lines["kinds"].split(maxsplit=1)[1] == "7 .png, 2 .jpg"
    assert "1 .heic" in lines["not"]
    assert lines["classes"].split(maxsplit=1)[1] == "2, of 3 (dog) to 6 (cat) images"
    assert said[said.index(lines["unreadable"]) + 1].startswith(f"  {data / 'train/dog/broken.jpg'}: ")
    assert lines["sizes"].split(maxsplit=1)[1] == (
        "2 different, in pixels; median 48 high, 64 wide; width:height 1.00 to 1.33"
    )
    assert lines["shorter"].split(maxsplit=1)[1] == "1 of 0-31, 10 of 32-63 pixels"
    assert lines["grey"].split(maxsplit=1)[1] == "1 of 11: without colour"
    assert lines["same"].split(maxsplit=1)[1] == "2 pictures are repeated pixel by pixel; 1 in both splits"
    assert f"  train: {data / 'train/cat/1.png'} = test: {data / 'val/cat/copy.png'}" in said
    assert lines["near"].split(maxsplit=1)[1] == "1 pairs are nearly the same picture; 1 in both splits"
    assert f"  train: {data / 'train/cat/2.png'} ~ test: {data / 'val/cat/near.jpg'}" in said
    assert lines["labels"].split(maxsplit=1)[1].startswith("1 of the repeated pictures have more than one class")
    assert "images/s in one thread" in lines["decoding"]
    report = json.loads((out / "inspect.json").read_text())
    assert report["splits"]["train"]["classes"] == {"cat": 6, "dog": 3} and report["exact"]["in_both_splits"] == 1
    assert (out / "bad_files.txt").read_text().startswith(str(data / "train/dog/broken.jpg"))
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size == (3 * 98 - 2, 3 * 98 - 2)  # the 8 readable ones


def test_mean_and_deviation_are_those_of_the_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, images = np.random.default_rng(0), []
    for i in range(3):
        images.append(rng.integers(0, 200 + 20 * i, (20, 10 + i, 3), dtype=np.uint8))
        Image.fromarray(images[-1]).save(tmp_path / f"{i}.png")
    each = [image.reshape(-1, 3) / 255 for image in images]
    mean = np.mean([pixels.mean(0) for pixels in each], 0)
    std = np.sqrt(np.mean([(pixels**2).mean(0) for pixels in each], 0) - mean**2)
    said = told(capsys, tmp_path, "--out", tmp_path / "out")
    numbers = [", ".join(f"{value:.3f}" for value in values) for values in (mean, std)]
    assert f"colours    model.mean=[{numbers[0]}] model.std=[{numbers[1]}]" in said
    assert any(line.startswith("classes    none: ") for line in said)


def test_an_archive_says_what_its_folder_says(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as archive:
            for file in sorted((data / part).rglob("*.*")):
                archive.add(file, file.relative_to(data / part))
    reports = []
    for place in (data, tmp_path / "train.tar"):
        told(capsys, place, "--out", tmp_path / "out", "--threads", "2")
        report = json.loads((tmp_path / "out/inspect.json").read_text())
        reports.append({name: report["splits"][name] for name in ("train", "test")})
    for name in ("train", "test"):
        one, other = (each[name] for each in reports)
        assert all(one[key] == other[key] for key in ("images", "looked", "classes", "sizes", "mean", "std"))
        assert len(one["unreadable"]) == len(other["unreadable"]) == (name == "train")


def test_some_of_many_are_looked_at_evenly(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, data, "--out", tmp_path / "out", "--most", "2")
    assert said[0].endswith("(train): 9 images, of which 2 were looked at")
    report = json.loads((tmp_path / "out/inspect.json").read_text())
    assert [report["splits"][name]["looked"] for name in ("train", "test")] == [2, 2]


def test_near_pictures_are_found_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    thumbnails = np.stack([np.kron(rng.integers(0, 256, (8, 8)), np.ones((4, 4))) for _ in range(200)])
    thumbnails[7] = np.clip(thumbnails[3] + rng.integers(-3, 4, (32, 32)), 0, 255)
    thumbnails[[50, 51, 52]] = 128  # flat: nothing to compare
    digests = [bytes([at % 256, at // 256]) for at in range(200)]
    assert repeats.near(thumbnails.astype(np.uint8), digests) == [(3, 7)]
    digests[7] = digests[3]  # the same pixels: no near pair, but an exact one
    assert repeats.near(thumbnails.astype(np.uint8), digests) == [] and repeats.exact(digests) == [[3, 7]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "data=nowhere: no such folder"),
        (["builtin", "--most", "0"], "--most 0: expected a whole number of at least 1"),
        (["builtin", "--threads", "0"], "--threads 0: expected a whole number of at least 1"),
        (["builtin", "--data-label", "x"], "data_label"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=message) as refusal:
        main([*words, "--out", str(tmp_path / "out")])
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_nothing_that_can_be_read_is_a_refusal_that_names_the_list(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(Refusal, match=r"none of 1 images looked at in .* can be read: see .*bad_files\.txt"):
        main([str(tmp_path), "--out", str(tmp_path / "out")])


@pytest.mark.slow
def test_it_is_a_command_of_the_package_and_one_line_where_it_fails(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "common.data"]
    done = subprocess.run(
        [*command, "inspect", str(data), "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "(train): 9 images" in done.stdout, done.stderr
    failed = subprocess.run([*command, "inspect", "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2 and len(failed.stderr.strip().splitlines()) == 1
    usage = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert usage.returncode == 2 and usage.stderr.strip() == "usage: python -m common.data inspect DATA"
