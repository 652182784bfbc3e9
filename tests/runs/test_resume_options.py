"""What may change when a run is resumed, and what is refused by name; resuming a run that is finished, moved or
not yet saved."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pictures import write_tar
from runs.children import TINY, Run, training_here

import common.training.checkpoints
from common.batches.samples import Samples
from common.checkpoints import changes, storage
from common.data import open_data
from common.errors import Refusal

STEPS, EVERY = 30, 4  # as in tiny.yaml


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny) -> Run:
    """A finished run of 8 steps, made in this process. Not to be written to."""
    run = tmp_path_factory.mktemp("small") / "run"
    with training_here() as main:
        assert main(*tiny, f"run={run}", "steps=8") == 0
    return Run(run)


@pytest.fixture
def copied(small, tmp_path) -> Run:
    return Run(shutil.copytree(small.path, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("seed=1 optimizer.lr=0.1", ["seed (0 -> 1)", "optimizer.lr (0.05 -> 0.1)"]),
        ("batch=8", ["batch (16 -> 8)"]),
        ("accumulate=2", ["accumulate (1 -> 2)"]),
        ("precision=bf16", ["precision (fp32 -> bf16)"]),
        ("augment=device", ["augment (host -> device)"]),
        ("threads=2", ["threads (1 -> 2)"]),
        ("model.kwargs.depth=3", ["model.kwargs.depth (2 -> 3)"]),
        ("model.kwargs.num_classes=5", ["model.kwargs.num_classes (None -> 5)"]),
        ("views.global.flip=0.5", ["views.global.flip (0.0 -> 0.5)"]),
        ("views.global.gap=2", ["views.global.gap (0 -> 2)"]),
        ("objectives.absolute.head=half", ["objectives.absolute.head"]),
        ("objectives.relative.weight=0.5", ["objectives.relative.weight (1.0 -> 0.5)"]),
        ("monitor.held_out=0.2", ["monitor.held_out (0.1 -> 0.2)"]),
        ("loader.decode=scaled", ["loader.decode (full -> scaled)"]),
        ("steps=7", ["steps (8 -> 7, may only grow)"]),
    ],
)
def test_a_changed_recipe_is_refused_by_name(inside, copied, words, named):
    before = contents(copied.path)
    with pytest.raises(Refusal) as refusal:
        inside("--resume", copied.path, *words.split())
    for name in named:
        assert name in str(refusal.value)
    assert "start a new run" in str(refusal.value)
    assert contents(copied.path) == before


def test_a_finished_run_says_so(inside, copied, capsys):
    before = contents(copied.path)
    assert inside("--resume", copied.path) == 0
    assert "done: 8 steps" in capsys.readouterr().out
    after = contents(copied.path)
    assert {name: after[name] for name in before} == before  # TensorBoard adds an empty file


@pytest.mark.slow
def test_means_of_an_interval_that_was_cut_are_those_of_one_that_was_not(inside, tiny, monkeypatch):
    """Lines every five steps, of means over them; a signal after step 4 and another after 9, in mid-interval."""
    words = [*tiny, "steps=12", "monitor.held_out=0", "tensorboard=false"]
    assert inside(*words, "run=each", "log_every=1") == 0
    assert inside(*words, "run=whole", "log_every=5") == 0
    for at, first in ((4, 1), (9, 5)):
        done = itertools.count(first)

        def stepped(progress, done=done, at=at):
            if next(done) == at:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patched:
            patched.setattr("common.training.tracking.Progress.step", stepped)
            assert inside(*(("--resume", "cut") if at > 4 else (*words, "run=cut", "log_every=5"))) == 0
    assert inside("--resume", "cut") == 0
    each, whole, cut = (Run(Path(name)) for name in ("each", "whole", "cut"))
    assert whole.steps == cut.steps == [5, 10, 12] and cut.checkpoints == [9, 12]
    assert whole.numbers == cut.numbers
    for name in ("loss", "absolute/accuracy", "relative/distance", "gradient_norm"):
        values = [line[name] for line in each.metrics]
        means = [sum(values[first:last]) / (last - first) for first, last in ((0, 5), (5, 10), (10, 12))]
        assert [line[name] for line in whole.metrics] == pytest.approx(means, rel=1e-6), name


def test_unlabelled_images_are_not_sent_to_where_labels_are_needed(inside, images, tmp_path, capsys):
    shutil.copytree(images / "left", tmp_path / "flat")
    words = ["steps=1", "loader.workers=0", "tensorboard=false", f"run={tmp_path / 'a run'}"]
    assert inside(TINY, f"data={tmp_path / 'flat'}", *words) == 0
    told = capsys.readouterr().out.partition("done: 1 steps")[2]
    assert f"knn.py --ckpt '{tmp_path / 'a run'}' --data LABELLED" in told and "linear" not in told
    assert f"explain.py --ckpt '{tmp_path / 'a run'}'\n" in told and "tensorboard" not in told


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer_for_good(inside, copied, small, at_step):
    at_step(10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert inside("--resume", copied.path, "steps=12") == 0
    assert copied.steps == list(range(1, 11))
    assert inside("--resume", copied.path) == 0  # without repeating how long
    assert copied.steps == list(range(1, 13))
    assert copied.losses[:8] == small.losses
    training = json.loads((copied.path / "backbone.json").read_text())["training"]
    assert (training["step"], training["steps"], training["recipe"]) == (12, 12, "tiny")


@pytest.mark.slow
def test_epochs_may_grow_too(inside, tiny, tmp_path):
    run = Run(tmp_path / "run")
    assert inside(*tiny, f"run={run.path}", "steps=null", "epochs=1") == 0
    assert run.steps == list(range(1, 6))
    assert inside("--resume", run.path, "epochs=2") == 0
    assert run.steps == list(range(1, 11))
    assert inside("--resume", run.path) == 0  # the length it was given last
    assert run.steps == list(range(1, 11))
    with pytest.raises(Refusal, match=r"epochs .*may only grow"):
        inside("--resume", run.path, "epochs=1")


def test_a_moved_run_and_other_intervals(inside, tiny, small, at_step, tmp_path):
    """A run is its folder: renamed, measured and saved more rarely, it is the same run."""
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run = tmp_path / "run"
    assert inside(*tiny, f"run={run}", "steps=8") == 0
    moved = Run(run.rename(tmp_path / "renamed"))
    assert moved.checkpoints == [4, 6]
    assert inside("--resume", moved.path, "log_every=2", "monitor.every=3", "checkpoint_every=5", "keep=9") == 0
    assert moved.steps == [*range(1, 7), 8]
    assert moved.losses[:6] == small.losses[:6]
    last = [line["loss"] for line in small.metrics[6:]]  # a line of two steps has their mean
    assert moved.metrics[-1]["loss"] == pytest.approx(sum(last) / 2, rel=1e-6)
    assert moved.metrics[-1]["val/loss"] == small.metrics[-1]["val/loss"]  # and the weights are the same
    assert moved.checkpoints == [4, 6, 8]


@pytest.mark.slow
def test_a_run_on_a_folder_goes_on_from_an_archive_of_it(inside, tiny, small, at_step, images, tmp_path):
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run = Run(tmp_path / "run")
    assert inside(*tiny, f"run={run.path}", "steps=8") == 0
    files = [(str(path.relative_to(images)), path.read_bytes()) for path in images.rglob("*.*")]
    archive = write_tar(tmp_path / "images.tar", files)
    assert inside("--resume", run.path, f"data={archive}") == 0
    assert run.losses == small.losses
    write_tar(archive, files[1:])
    with pytest.raises(Refusal, match="fingerprint"):
        inside("--resume", run.path, "steps=9")


def test_other_images_are_refused(inside, copied, images, tmp_path):
    other = shutil.copytree(images, tmp_path / "other")
    next(other.rglob("*.png")).unlink()
    before = contents(copied.path)
    with pytest.raises(Refusal, match="fingerprint") as refusal:
        inside("--resume", copied.path, f"data={other}")
    assert str(other) in str(refusal.value)
    assert contents(copied.path) == before


@pytest.fixture
def others(small, tmp_path) -> Run:
    """A run as `small`, of another seed as far as its config.yaml says, with the state of `small`."""
    run = Run(shutil.copytree(small.path, tmp_path / "other"))
    config = run.path / "config.yaml"
    text = config.read_text()
    assert text.startswith("# run ") and "\nseed: 0\n" in text
    config.write_text(text.replace(text[6:22], "0123456789abcdef").replace("\nseed: 0\n", "\nseed: 1\n"))
    return run


def test_the_state_of_another_run_is_refused_by_what_differs(inside, others, small):
    before = contents(others.path)
    with pytest.raises(Refusal, match=r"step_00000008 is of another run, with seed=0, here 1: put back"):
        inside("--resume", others.path)
    assert contents(others.path) == before
    config = others.path / "config.yaml"  # of equal options: by its name
    config.write_text(config.read_text().replace("\nseed: 1\n", "\nseed: 0\n"))
    with pytest.raises(
        Refusal, match=r"is of another run, [0-9a-f]{16} \(config\.yaml of this one says 0123456789abcdef"
    ):
        inside("--resume", others.path)


def change_states(run: Run, change: Callable[[dict], object]) -> None:
    """Let `change` edit every state of a run, and its manifest say so."""
    for folder in (run.path / "state").iterdir():
        state = torch.load(folder / "state.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "state.pt")
        manifest = json.loads((folder / "manifest.json").read_text())
        size, digest = (folder / "state.pt").stat().st_size, storage.sha256(folder / "state.pt")
        manifest["files"]["state.pt"] = {"sha256": digest, "bytes": size}
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_a_run_that_left_automatic_values_to_its_objectives_goes_on_alike(inside, copied, tmp_path):
    """As those from before what is asked was resolved with all other options: state and config.yaml say auto."""
    usual = Run(shutil.copytree(copied.path, tmp_path / "usual"))
    config = copied.path / "config.yaml"
    text = config.read_text()
    assert "    loss_on: all\n" in text and "    pairs: 24\n" in text
    config.write_text(text.replace("    loss_on: all\n", "    loss_on: auto\n").replace("pairs: 24", "pairs: auto"))

    def before(state: dict) -> None:
        options = json.loads(state["identity"]["options"])
        options |= {"objectives.absolute.loss_on": "auto", "objectives.relative.pairs": "auto"}
        state["identity"]["options"] = json.dumps(options)

    change_states(copied, before)
    for run in (usual, copied):
        assert inside("--resume", run.path, "steps=11") == 0
    assert len(copied.losses) == 11 and copied.losses == usual.losses
    assert "    loss_on: all\n" in config.read_text() and "    pairs: 24\n" in config.read_text()


def test_a_state_without_a_name_is_asked_for_its_seed(inside, others):
    """As those from before there were names: its backbone's description says seed, batch and objectives."""
    change_states(others, lambda state: state.pop("identity"))
    with pytest.raises(Refusal, match=r"is of another run, with seed=0, here 1"):
        inside("--resume", others.path)
    config = others.path / "config.yaml"
    config.write_text(config.read_text().replace("\nseed: 1\n", "\nseed: 0\n").partition("\n")[2])
    assert inside("--resume", others.path) == 0  # the folder of an older version, which has a name from now on
    assert re.match(r"# run [0-9a-f]{16}\n", config.read_text())


@pytest.mark.parametrize("ages", [None, "of before"])
def test_images_as_an_earlier_version_knew_them_or_of_other_ages(inside, copied, images, monkeypatch, capsys, ages):
    """Names and sizes were all that a fingerprint covered; and files may be written anew with what was in them. What is
    learned otherwise than then is said, and stays with the run."""
    load = common.training.checkpoints.read_checkpoint
    with monkeypatch.context() as patched, pytest.raises(Refusal, match=r"an earlier version.*data_train=\. reads all"):
        patched.setattr(
            common.training.checkpoints, "read_checkpoint", lambda folder: load(folder) | {"fingerprint": "9213ea0b"}
        )
        inside("--resume", copied.path)

    def earlier(folder):
        state = load(folder)
        assert state["fingerprint"].startswith("2-") and state.pop("ages")
        known = {} if ages is None else {"ages": ages}
        if ages is None:
            assert state.pop("version") == changes.VERSION
        return state | {"fingerprint": open_data(str(images))._digest(first=True)} | known

    monkeypatch.setattr(common.training.checkpoints, "read_checkpoint", earlier)
    assert inside("--resume", copied.path) == 0  # it is done: nothing more is learned
    said = capsys.readouterr().out
    assert "earlier version" not in said and ("were written or exchanged since" in said) == (ages is not None)
    if ages is None:
        assert inside("--resume", copied.path, "steps=9") == 0
        change = "up to step 8 it was trained by an earlier version; from there on colours of view global change as"
        assert f"warning: {change} torchvision" in capsys.readouterr().out
        assert json.loads((copied.path / "backbone.json").read_text())["training"]["changed"].startswith(change)
        kept = load(copied.path / "state" / "step_00000009")
        assert kept["changed"].startswith(change) and kept["version"] == changes.VERSION


def test_before_the_first_checkpoint_it_begins_again(inside, tiny, small, at_step, tmp_path):
    def crash() -> None:
        raise KeyboardInterrupt

    at_step(3, crash)
    run = Run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        inside(*tiny, f"run={run.path}", "steps=8")
    assert run.steps == [1, 2, 3] and not (run.path / "state").exists()
    at_step(0, crash)
    assert inside("--resume", run.path) == 0
    assert run.losses == small.losses
    assert run.steps == list(range(1, 9))
    assert run.scalars()["train/loss"] == small.scalars()["train/loss"]


@pytest.mark.slow
def test_accumulated_steps_resume_alike(inside, tiny, monkeypatch, tmp_path):
    """Also where a signal comes in the middle of a step: what its first parts did to the random state is undone."""
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    assert inside(*tiny, f"run={one.path}", "steps=8", "accumulate=4") == 0
    reads = itertools.count(1)

    def read(self, keys, read=Samples.__getitems__):
        if next(reads) == 3 * 4 + 3:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(60)  # as a disk that is gone
        return read(self, keys)

    with monkeypatch.context() as patch:
        patch.setattr(Samples, "__getitems__", read)
        assert inside(*tiny, f"run={two.path}", "steps=8", "accumulate=4") == 0
    assert two.checkpoints == [3] and two.steps == [1, 2, 3]
    assert inside("--resume", two.path) == 0
    assert two.losses == one.losses and two.numbers == one.numbers


def test_a_run_that_is_being_written_is_left_alone(inside, copied, monkeypatch):
    writer = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, copied.path / "lock"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "locked\n"
        before = contents(copied.path)
        monkeypatch.setattr("pretrain.run.WAIT", 0.3)
        with pytest.raises(Refusal, match=f"process {writer.pid} is still writing"):
            inside("--resume", copied.path)
        with pytest.raises(Refusal, match=f"process {writer.pid} is still writing"):
            inside(TINY, f"run={copied.path}", "--overwrite")
        assert contents(copied.path) == before
    finally:
        writer.kill()
        writer.wait()
    assert inside("--resume", copied.path) == 0  # gone with its owner


HOLD_LOCK = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(str(os.getpid()))
file.flush()
print("locked", flush=True)
time.sleep(60)
"""
