"""Images that cannot be read, in pretraining: told before it begins and as they are met, and replaced alike."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs.children import TINY, Run

from common.batches.sampler import held_out
from common.checkpoints.public import read_description
from common.checkpoints.storage import WEIGHTS
from common.errors import Refusal


@pytest.fixture(scope="module")
def many(tmp_path_factory, images) -> Path:
    """200 images without labels, of which two may be broken."""
    folder = tmp_path_factory.mktemp("many") / "photos"
    some = sorted(images.rglob("*.png"))[:20]
    for i in range(200):
        folder.mkdir(exist_ok=True)
        shutil.copyfile(some[i % 20], folder / f"{i:03d}.png")
    return folder


def broken(many: Path, to: Path, *which: int) -> list[str]:
    """A copy of the images with some cut short; their paths. Numbers are places in the order of names."""
    shutil.copytree(many, to)
    files = sorted(to.rglob("*.png"))
    for i in which:
        files[i].write_bytes(files[i].read_bytes()[:30])
    return [str(files[i]) for i in which]


@pytest.fixture
def trained_on(tmp_path_factory) -> list[int]:
    return held_out(200, 0.1, 1000)[0].tolist()


def test_a_few_unreadable_images_are_named_once_and_replaced_alike(
    inside, many, trained_on, tmp_path, capsys, monkeypatch
):
    names = broken(many, tmp_path / "photos", trained_on[7], trained_on[90])
    losses = []
    for workers in (0, 2):
        run = Run(tmp_path / f"run{workers}")
        words = (TINY, f"data={tmp_path / 'photos'}", f"run={run.path}", "steps=24", f"loader.workers={workers}")
        monkeypatch.setattr(
            "common.batches.unreadable.LOOKED", [2000, 0][workers > 0]
        )  # seen before they are met, or not
        assert inside(*words) == 0  # two epochs
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
        if workers:
            assert len(said) == 2 and "(2 of 200 so far)" in said[1]
        else:
            assert len(said) == 1 and said[0].startswith("warning: 2 of 200 images cannot be read; others take")
        listed = (run.path / "bad_files.txt").read_text().splitlines()
        assert sorted(line.partition(": ")[0] for line in listed) == sorted(names)
        losses.append(run.losses)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 24


@pytest.mark.slow
def test_unreadable_images_are_replaced_alike_after_a_resume(inside, at_step, many, trained_on, tmp_path, capsys):
    broken(many, tmp_path / "photos", trained_on[7], trained_on[90])
    words = [TINY, f"data={tmp_path / 'photos'}", "steps=16", "loader.workers=0", "monitor.held_out=0.1"]
    assert inside(*words, "run=whole") == 0
    at_step(6, lambda: os.kill(os.getpid(), 15))
    assert inside(*words, "run=parts") == 0
    assert inside("--resume", "parts") == 0
    assert Run(Path("parts")).losses == Run(Path("whole")).losses
    listed = [(Path(run) / "bad_files.txt").read_text().splitlines() for run in ("parts", "whole")]
    assert sorted(listed[0]) == sorted(listed[1])  # each once


@pytest.mark.parametrize("where", ["trained on", "held out"])
def test_unreadable_images_leave_the_labels_of_the_others_in_place(inside, trained_on, tmp_path, where):
    """Dark and bright noise by turns: the k-NN monitor is always right, unless labels have slipped by one image."""
    files = []
    for i in range(200):
        noise = np.random.default_rng(i).integers(0, 40, (24, 24, 3))
        path = tmp_path / "photos" / ("bright", "dark")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((noise + 200 * (i % 2 == 0)).astype(np.uint8)).save(path)
        files.append(path)
    files.sort()
    which = trained_on if where == "trained on" else sorted(set(range(200)) - set(trained_on))
    for i in (which[0], which[len(which) // 3]):  # 1 % of the data, and 10 % of those held out
        files[i].write_bytes(b"cut")
    words = ("steps=2", "monitor.every=2", "loader.workers=0", "optimizer.lr=0")
    assert inside(TINY, f"data={tmp_path / 'photos'}", "run=run", *words) == 0
    assert Run(Path("run")).metrics[-1]["knn/student"] == 1.0


def test_unreadable_images_are_told_all_at_once_before_anything_is_written(inside, many, tmp_path, capsys):
    names = broken(many, tmp_path / "photos", 3, 30, 50, 199)
    words = (TINY, f"data={tmp_path / 'photos'}", "steps=1", "loader.workers=0")
    for limit in (3, 0.019, "1.9%"):  # one more than allowed; 0.019 of 200 is 3.8
        with pytest.raises(Refusal) as refusal:
            inside(*words, "run=run", f"max_bad={limit}")
        message = str(refusal.value)
        assert (
            f"4 of 200 images in {tmp_path / 'photos'} cannot be read, more than the 3 that max_bad={limit}" in message
        )
        assert "\n" not in message and not Path("run").exists()
    with pytest.raises(Refusal):
        inside(*words, "run=run", "max_bad=3", "--dry-run")
    said = capsys.readouterr().out
    assert all(name in said for name in names) and not Path("run").exists()
    assert inside(*words, "run=run", "max_bad=0.02", "monitor.held_out=0") == 0  # just allowed
    listed = Path("run/bad_files.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in listed] == names
    assert inside("--resume", "run", "steps=2", "max_bad=4") == 0
    assert read_description(Path("run") / WEIGHTS)["training"]["max_bad"] == "4"  # and it can be judged


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_is_allowed_is_an_error(inside, many, trained_on, tmp_path, workers, monkeypatch):
    """Of a large data set a sample is looked at: the others are met in training."""
    monkeypatch.setattr("common.batches.unreadable.LOOKED", 0)
    names = broken(many, tmp_path / "photos", *trained_on[:3])
    with pytest.raises(Refusal) as refusal:
        words = ("steps=24", f"loader.workers={workers}", "max_bad=0.01")
        inside(TINY, f"data={tmp_path / 'photos'}", "run=run", *words)
    message = str(refusal.value)
    assert "3 of 200 images in" in message and "more than the 2 that max_bad=0.01 allows" in message
    assert "\n" not in message
    listed = Path("run/bad_files.txt").resolve()
    assert str(listed) in message and "mend or remove" in message
    assert sorted(line.partition(": ")[0] for line in listed.read_text().splitlines()) == sorted(names)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_nothing_but_unreadable_images(inside, tmp_path, workers):
    (tmp_path / "photos").mkdir()
    for i in range(40):
        (tmp_path / "photos" / f"{i:02d}.jpg").write_text("an error page, saved as a photograph")
    with pytest.raises(Refusal) as refusal:
        inside(TINY, f"data={tmp_path / 'photos'}", "run=run", f"loader.workers={workers}", "monitor.held_out=0")
    assert "40 of 40 images in" in str(refusal.value) and "Traceback" not in str(refusal.value)


def test_names_that_are_no_text_in_a_run_and_its_resume(inside, many, tmp_path, capsys):
    """Broken files in a class of another encoding, and with a line end and a terminal's commands in their names."""
    folder, quick = os.fsencode(tmp_path / "photos"), ("loader.workers=0", "monitor.held_out=0")
    shutil.copytree(many, tmp_path / "photos" / "good")
    os.rename(folder, folder + b"\xe4")
    os.mkdir(folder + b"\xe4/br\xf6ken")
    for name in (b"br\xf6ken.png", b"a\x1b[2Jb\n.png"):
        with open(folder + b"\xe4/br\xf6ken/" + name, "wb") as file:
            file.write(b"cut")
    with pytest.raises(Refusal, match=r"data=.*photos\\xe4: a path that is no UTF-8 text .* a link to it"):
        inside(TINY, f"data={os.fsdecode(folder)}\udce4", "run=run", "steps=1")
    (tmp_path / "link").symlink_to(os.fsdecode(folder + b"\xe4"))
    assert inside(TINY, f"data={tmp_path / 'link'}", "run=run", "steps=1", *quick) == 0
    said = capsys.readouterr().out
    assert said.isprintable() or {c for c in said if not c.isprintable()} == {"\n"}
    names = [f"{tmp_path}/link/br\\xf6ken/{name}.png" for name in ("a\\x1b[2Jb\\n", "br\\xf6ken")]
    assert inside("--resume", "run", "steps=2") == 0
    lines = Path("run/bad_files.txt").read_bytes().decode().splitlines()
    assert [line.partition(": ")[0] for line in lines] == names and all(name in said for name in names)
