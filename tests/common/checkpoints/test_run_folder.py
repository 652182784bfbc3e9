"""A run's folder: named once, born in one piece, written by one process."""

import os
import subprocess
import sys

import pytest

from common.checkpoints.run_folder import CONFIG, RunLock, create, open_for_good, refuse_existing
from common.errors import Refusal


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(tmp_path):
    return create(tmp_path / "run", "tiny", "seed: 0\n", overwrite=False)


def writer(run):
    """Another process that writes `run`; it says so, and waits to be killed."""
    code = f"import fcntl, os, sys, time; f = open({str(run / 'lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
    code += "f.write(str(os.getpid())); f.flush(); print('locked', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


# ---------------------------------------------------------------------------- birth


def test_a_run_has_its_config_from_its_first_moment(run):
    assert [path.name for path in run.iterdir()] == [CONFIG]
    assert (run / CONFIG).read_text() == "seed: 0\n"
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_folders_above_are_made(here):
    assert create(here / "a" / "b" / "run", "tiny", "", overwrite=False).is_dir()


def test_unnamed_runs_number_themselves(here):
    names = [create(None, "tiny", "", overwrite=False).relative_to(here) for _ in range(3)]
    assert [str(name) for name in names] == ["runs/tiny-001", "runs/tiny-002", "runs/tiny-003"]
    (here / "runs" / "tiny-041").mkdir()
    (here / "runs" / "tiny-best").mkdir()
    assert create(None, "tiny", "", overwrite=False).name == "tiny-042"
    assert create(None, "other", "", overwrite=False).name == "other-001"


def test_two_that_start_at_once_get_two_numbers(here, monkeypatch):
    rename = os.rename

    def another_was_faster(source, target):
        monkeypatch.setattr(os, "rename", rename)
        create(None, "tiny", "theirs", overwrite=False)
        rename(source, target)

    monkeypatch.setattr(os, "rename", another_was_faster)
    mine = create(None, "tiny", "mine", overwrite=False)
    assert mine.name == "tiny-002" and (mine / CONFIG).read_text() == "mine"
    assert (here / "runs" / "tiny-001" / CONFIG).read_text() == "theirs"
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["tiny-001", "tiny-002"]


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(here):
    (here / f".run.{os.getpid()}").mkdir()
    (here / f".run.{os.getpid()}" / CONFIG).write_text("half")
    assert (create(here / "run", "tiny", "whole", overwrite=False) / CONFIG).read_text() == "whole"


# ---------------------------------------------------------------------------- refusals


def test_an_existing_run_is_kept(run):
    with pytest.raises(Refusal) as refusal:
        refuse_existing(run, overwrite=False)
    for word in (f"run={run} exists", f"--resume {run}", "--overwrite"):
        assert word in str(refusal.value)
    with pytest.raises(Refusal):
        create(run, "tiny", "", overwrite=False)
    assert (run / CONFIG).read_text() == "seed: 0\n"


def test_overwrite_replaces_a_run(run):
    (run / "metrics.jsonl").write_text("old")
    refuse_existing(run, overwrite=True)
    assert (run / "metrics.jsonl").exists()  # asking deletes nothing
    create(run, "tiny", "seed: 1\n", overwrite=True)
    assert [path.name for path in run.iterdir()] == [CONFIG] and (run / CONFIG).read_text() == "seed: 1\n"


def test_overwrite_deletes_no_folder_that_is_no_run(here):
    photos = here / "photos"
    photos.mkdir()
    (photos / "only-copy.jpg").write_text("precious")
    with pytest.raises(Refusal, match=f"no {CONFIG} in it"):
        create(photos, "tiny", "", overwrite=True)
    assert (photos / "only-copy.jpg").exists()


def test_overwrite_deletes_no_file(here):
    (here / "run").write_text("a file")
    with pytest.raises(Refusal):
        create(here / "run", "tiny", "", overwrite=True)
    assert (here / "run").read_text() == "a file"


@pytest.mark.parametrize("place", ["/proc/run", "/proc/a/b/run", "file/run"])
def test_where_nothing_can_be_written(here, place):
    (here / "file").write_text("")
    with pytest.raises(Refusal, match=r"cannot be written: .*; choose another with run=PATH"):
        refuse_existing(here / place, overwrite=False)
    assert [path.name for path in here.iterdir()] == ["file"]


def test_asking_leaves_nothing_behind(here):
    refuse_existing(here / "a" / "run", overwrite=False)
    assert not list(here.iterdir())


# ---------------------------------------------------------------------------- the lock


def test_a_second_writer_is_refused_and_told_whom_to_stop(run):
    other = writer(run)
    try:
        with pytest.raises(Refusal, match=rf"process {other.pid} is still writing .*kill {other.pid}"):
            RunLock(run)
        with pytest.raises(Refusal, match="still writing"):
            refuse_existing(run, overwrite=True)
        with pytest.raises(Refusal, match="still writing"):
            create(run, "tiny", "", overwrite=True)
        assert (run / CONFIG).exists()
    finally:
        other.kill()
        other.wait()


def test_the_lock_is_gone_with_its_owner_however_it_ends(run):
    other = writer(run)
    other.kill()
    other.wait()
    lock = RunLock(run)
    assert (run / "lock").read_text() == str(os.getpid())
    lock.release()


def test_a_resume_waits_for_a_process_that_is_about_to_end(run, capsys):
    other = writer(run)
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({other.pid}, 9)"])
    try:
        RunLock(run, wait=30.0).release()
        assert capsys.readouterr().out == f"waiting for process {other.pid}, which is still writing {run}\n"
    finally:
        for process in (killer, other):
            process.kill()
            process.wait()


def test_a_lock_that_cannot_be_written(run):
    (run / "lock").mkdir()
    with pytest.raises(Refusal, match=r"cannot be written: .*; make it writable, or copy it"):
        RunLock(run)


# ---------------------------------------------------------------------------- links


def test_nothing_is_written_through_a_link(run, here):
    precious = here / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for name, target in (("lock", precious / "thesis.txt"), ("metrics.jsonl", precious / "new"), ("state", precious),
                         ("tb", precious), ("backbone.json", precious / "thesis.txt")):  # fmt: skip
        (run / name).symlink_to(target)
        with pytest.raises(Refusal, match=rf"run/{name} is a link to {target}: nothing is written through links"):
            RunLock(run)
        (run / name).unlink()
    (run / "pictures").mkdir()
    (run / "pictures" / "board-00000010.png").symlink_to(precious / "thesis.txt")
    with pytest.raises(Refusal, match=r"board-00000010\.png is a link"):
        RunLock(run)
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_a_run_folder_may_be_a_link_itself_and_may_hold_links_of_its_owner(run, here):
    (run / "data").symlink_to(here)  # which no run writes
    (here / "short").symlink_to(run)
    RunLock(here / "short").release()
    assert (run / "lock").read_text() == str(os.getpid())


def test_another_file_under_the_name_of_the_lock_is_kept(run, here):
    (here / "thesis.txt").write_text("years of work")
    os.link(here / "thesis.txt", run / "lock")
    with pytest.raises(Refusal, match="is no lock of poslabel"):
        RunLock(run)
    assert (here / "thesis.txt").read_text() == "years of work"
    (run / "lock").unlink()
    os.mkfifo(run / "lock")
    with pytest.raises(Refusal, match="cannot be written"):
        RunLock(run)


def test_what_was_opened_last_wins_no_race(run, here):
    """A link that is put there after the look is not followed either."""
    (run / "metrics.jsonl").symlink_to(here / "new")
    with pytest.raises(OSError, match="metrics"):
        open_for_good(run / "metrics.jsonl", "a")
    assert not (here / "new").exists()
