"""Interrupted anywhere, a run goes on as if nothing had happened: same samples, same losses, to the bit.

Real processes and real signals. One run meets every accident in turn, another has two processes; each ends with the
numbers of a run that was left in peace. Where an accident strikes is drawn from a seed.
"""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from runs.children import TINY, Ended, Run, Train, alive

from common.checkpoints import private, public
from common.checkpoints.stored_state import read_checkpoint

STEPS, EVERY = 30, 4  # as in tiny.yaml
SOON = 15.0  # seconds from SIGTERM to the end; a step takes hundredths of one


@dataclasses.dataclass
class Accident:
    """What happened to a run, and how its folder looked afterwards."""

    ended: Ended
    at: int  # the step
    seconds: float  # from the signal to the end
    checkpoints: list[int]
    steps: list[int]  # in metrics.jsonl
    files: list[str]  # in state/
    exported: int  # step of the backbone that evaluation would load


def strike(train: Train, run: Path, *words: str, at: int, by: signal.Signals, **options) -> Accident:
    """Train until step `at`, then send the signal `by` from outside to every training process."""
    child = train.start(*words, until=f"step:{at}", **options)
    ids = child.held()
    begun = time.monotonic()
    for process in ids:
        os.kill(process, by)
    ended = child.wait()
    return after(run, ended, at, time.monotonic() - begun)


def after(run: Path, ended: Ended, at: int, seconds: float = 0.0) -> Accident:
    left = Run(run)
    try:
        exported = public.load_backbone(run)[2]["training"]["step"]
    except Exception as error:
        exported = error  # type: ignore[assignment]
    files = sorted(path.name for path in (run / "state").iterdir())
    return Accident(ended, at, seconds, left.checkpoints, left.steps, files, exported)


@dataclasses.dataclass
class Eventful:
    """One run and what happened to it, in order."""

    run: Run
    killed: Accident
    killed_saving: Accident
    terminated: Accident
    interrupted: Accident
    full: Accident
    finished: Ended


def eventful(train: Train, images: Path, folder: Path) -> Eventful:
    run, moved = folder / "eventful", folder / "moved"
    shutil.copytree(images, moved)
    draw = random.Random(2022)
    resume = ("--resume", str(run))
    first = (str(TINY), f"data={images}", f"run={run}")

    # kill -9 between two checkpoints
    killed = strike(train, run, *first, at=draw.randint(5, 7), by=signal.SIGKILL)
    # inside the save of step 12, with no loader workers
    ended = train(*resume, "loader.workers=0", until="save:12")
    killed_saving = after(run, ended, 12)
    # SIGTERM, with three workers
    terminated = strike(train, run, *resume, "loader.workers=3", at=draw.randint(13, 15), by=signal.SIGTERM)
    # a bit of that checkpoint is lost, then Ctrl-C
    flip(run / "state" / f"step_{terminated.at:08d}" / "state.pt", draw)
    interrupted = strike(train, run, *resume, "loader.workers=2", at=draw.randint(17, 19), by=signal.SIGINT)
    # no room for the checkpoint of step 20
    room = (run / "state" / "step_00000016" / "state.pt").stat().st_size // 2
    ended = train(*resume, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    full = after(run, ended, 20)
    # the data were moved
    finished = train(*resume, f"data={moved}", "loader.workers=1")
    return Eventful(Run(run), killed, killed_saving, terminated, interrupted, full, finished)


def flip(path: Path, draw: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@dataclasses.dataclass
class Pair:
    """Runs of two processes: one left in peace, one killed."""

    peaceful: Run
    peaceful_ended: Ended
    run: Run
    killed: Accident
    finished: Ended


def pair(train: Train, images: Path, folder: Path) -> Pair:
    words, two = (str(TINY), f"data={images}", "steps=15"), {"processes": 2}
    peaceful, run = folder / "pair-peaceful", folder / "pair"
    peaceful_ended = train(*words, f"run={peaceful}", **two)
    killed = strike(train, run, *words, f"run={run}", at=random.Random(5).choice([6, 7, 9]), by=signal.SIGKILL, **two)
    finished = train("--resume", str(run), "loader.workers=2", **two)
    return Pair(Run(peaceful), peaceful_ended, Run(run), killed, finished)


@dataclasses.dataclass
class Stories:
    """All runs of this file that need processes of their own; two are told at a time."""

    peaceful: "Future[tuple[Run, Ended]]"
    eventful: "Future[Eventful]"
    pair: "Future[Pair]"


@pytest.fixture(scope="session")
def stories(train: Train, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Stories:
    folder = tmp_path_factory.mktemp("runs")

    def peaceful() -> tuple[Run, Ended]:
        run = folder / "peaceful"
        return Run(run), train(str(TINY), f"data={images}", f"run={run}")

    pool = ThreadPoolExecutor(2)
    told = Stories(
        eventful=pool.submit(eventful, train, images, folder),
        peaceful=pool.submit(peaceful),
        pair=pool.submit(pair, train, images, folder),
    )
    pool.shutdown(wait=False)
    return told


@pytest.fixture
def peaceful(stories: Stories) -> Run:
    run, ended = stories.peaceful.result()
    assert ended.status == 0, ended.stderr
    return run


@pytest.fixture
def story(stories: Stories) -> Eventful:
    return stories.eventful.result()


# ------------------------------------------------------------------------------------ one process, accident by accident


def test_a_run_left_in_peace(peaceful):
    assert peaceful.steps == list(range(1, STEPS + 1))
    assert peaceful.checkpoints == [28, 30]
    assert len(set(peaceful.losses)) == STEPS
    first, last = peaceful.metrics[:5], peaceful.metrics[-5:]
    mean = lambda records: sum(record["absolute/accuracy"] for record in records) / len(records)  # noqa: E731
    assert mean(last) > mean(first)  # it learns something, so that equal losses mean something


def test_kill_9_between_checkpoints(story):
    killed = story.killed
    assert killed.ended.status == -signal.SIGKILL
    assert killed.at > 4 and killed.checkpoints == [4] and killed.exported == 4
    assert killed.steps == list(range(1, killed.at + 1))  # measured, and to be forgotten
    assert "resumed after step 4)" in story.killed_saving.ended.stdout


def test_kill_9_inside_a_save(story):
    killed = story.killed_saving
    assert killed.ended.status == -signal.SIGKILL
    assert killed.checkpoints == [4, 8] and ".writing-00000012" in killed.files
    assert killed.exported == 8
    assert "resumed after step 8)" in story.terminated.ended.stdout
    assert not [name for name in story.terminated.files if name.startswith(".")]  # the next save swept up


def test_sigterm_saves_and_exits_0(story):
    terminated = story.terminated
    assert terminated.ended.status == 0 and terminated.ended.stderr == ""
    assert terminated.at % EVERY and terminated.checkpoints[-1] == terminated.at == terminated.exported
    assert terminated.seconds < SOON
    assert f"stopped after step {terminated.at} of {STEPS}" in terminated.ended.stdout
    assert f"--resume {story.run.path}" in terminated.ended.stdout


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(story):
    damaged = story.run.path / "state" / f"step_{story.terminated.at:08d}"
    warnings = [line for line in story.interrupted.ended.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and str(damaged) in warnings[0] and "state.pt" in warnings[0]
    assert "resumed after step 12)" in story.interrupted.ended.stdout


def test_ctrl_c_saves_and_exits_130(story):
    interrupted = story.interrupted
    assert interrupted.ended.status == 130
    assert interrupted.checkpoints[-1] == interrupted.at == interrupted.exported
    assert interrupted.seconds < SOON
    assert f"stopped after step {interrupted.at} of {STEPS}" in interrupted.ended.stdout


def test_a_full_disk_is_an_error_that_leaves_the_last_good_state(story):
    full = story.full
    assert full.ended.status == 2
    lines = full.ended.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "step 20" in lines[0], full.ended.stderr
    assert full.checkpoints == story.interrupted.checkpoints and full.exported == story.interrupted.at
    assert f"resumed after step {story.interrupted.at})" in story.finished.stdout


def test_after_all_that_every_loss_is_that_of_the_peaceful_run(story, peaceful, capsys):
    assert story.finished.status == 0, story.finished.stderr
    for mine, theirs in zip(story.run.metrics, peaceful.metrics, strict=True):
        with capsys.disabled():
            if mine["step"] in (1, story.killed.at, story.terminated.at, story.interrupted.at, STEPS):
                print(f"\n  step {mine['step']:2d}  loss {mine['loss']!r} as {theirs['loss']!r}", end="")
    assert story.run.losses == peaceful.losses  # bit for bit
    assert story.run.steps == list(range(1, STEPS + 1))  # every step once, in order
    assert story.run.numbers == peaceful.numbers  # accuracies, gradient norms, learning rates, monitors


def test_after_all_that_tensorboard_has_every_step_once(story, peaceful):
    mine, theirs = story.run.scalars(), peaceful.scalars()
    clock = {"train/images_per_second", "train/data_wait"}
    assert mine.keys() == theirs.keys() >= {"train/loss", "absolute/accuracy", "val/absolute/accuracy"}
    for name in mine.keys() - clock:
        assert mine[name] == theirs[name], name
    for name in clock:
        assert [step for step, _ in mine[name]] == list(range(1, STEPS + 1))


def test_after_all_that_the_backbone_is_the_same(story, peaceful):
    mine, theirs = (json.loads((run.path / "backbone.json").read_text()) for run in (story.run, peaceful))
    one, two = ((run.path / "backbone.safetensors").read_bytes() for run in (story.run, peaceful))
    assert one == two
    for description in (mine, theirs):
        assert description["training"].pop("data")  # moved
        description["training"].pop("commit")  # of a checkout that may change meanwhile
    assert mine == theirs


def test_after_all_that_nothing_is_left_lying_about(story):
    assert list(story.run.path.rglob(".*")) == []
    assert story.run.checkpoints == [28, 30]


def test_a_crash_ends_the_process(train, images, tmp_path):
    """A bug, or a GPU without memory: a traceback, a status, and no process that waits for its workers for ever."""
    run = Run(tmp_path / "run")
    ended = train(TINY, f"data={images}", f"run={run.path}", until="crash:6", patience=60.0)
    assert ended.status not in (0, 2)
    assert ended.stderr.splitlines()[-1] == "RuntimeError: out of memory, say"
    assert run.checkpoints == [4] and run.steps == list(range(1, 7))


# ---------------------------------------------------------------------------- two processes


def test_two_processes_are_two(stories):
    told = stories.pair.result()
    assert told.peaceful_ended.status == 0, told.peaceful_ended.stderr
    assert "2 x CPU" in told.peaceful_ended.stdout
    assert told.peaceful_ended.stdout.count("step 15/15  loss") == 1  # the second one is quiet
    folder = private.newest_whole(told.peaceful.path, print)
    assert folder is not None
    state = read_checkpoint(folder)
    assert len(state["random"]) == 2
    one, two = (generator["cpu"] for generator in state["random"])
    assert not one.equal(two)  # dropout differs between them


def test_two_processes_killed_go_on_bit_for_bit(stories):
    told = stories.pair.result()
    assert told.killed.ended.status != 0
    assert told.killed.checkpoints[-1] == told.killed.at // EVERY * EVERY < told.killed.at
    assert told.finished.status == 0, told.finished.stderr
    assert "2 x CPU" in told.finished.stdout
    assert f"resumed after step {told.killed.checkpoints[-1]})" in told.finished.stdout
    assert told.run.losses == told.peaceful.losses
    assert told.run.steps == list(range(1, 16))
    assert told.run.numbers == told.peaceful.numbers


def test_two_processes_see_what_one_sees(stories, peaceful):
    """Same weights, same images in the same crops; only dropout differs."""
    one, two = peaceful.metrics[0], stories.pair.result().peaceful.metrics[0]
    assert one["loss"] == pytest.approx(two["loss"], rel=0.02)


def test_another_number_of_processes_is_said(inside, stories, tmp_path, capsys):
    copy = shutil.copytree(stories.pair.result().run.path, tmp_path / "run")
    assert inside("--resume", copy, "steps=17") == 0
    said = capsys.readouterr().out
    assert "interrupted with 2 processes and goes on with 1" in said
    assert Run(copy).steps == list(range(1, 18))


# ---------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("processes", "seed"), [(1, 0), (1, 1), (2, 2)])
def test_killed_at_twelve_random_moments(train, images, tmp_path, processes, seed):
    """Whatever it is doing: starting, loading, stepping, measuring, saving."""
    draw = random.Random(seed)
    words = [TINY, f"data={images}", "steps=200", "checkpoint_every=3", "monitor.every=25"]
    peaceful, run = Run(tmp_path / "peaceful"), Run(tmp_path / "run")
    assert train(*words, f"run={peaceful.path}", processes=processes).status == 0

    kills, words = 0, [*words, f"run={run.path}"]
    for _ in range(12):
        workers = draw.choice([0, 1, 3])
        child = train.start(*words, f"loader.workers={workers}", processes=processes)
        if draw.random() < 0.8:
            child.said("step ")
            moment = time.monotonic() + draw.uniform(0.0, 0.5)
        else:
            moment = time.monotonic() + draw.uniform(0.0, 8.0)  # perhaps before its first step
        while time.monotonic() < moment and child.process.poll() is None:
            time.sleep(0.005)
        assert child.process.poll() in (None, 0), child.output()
        kills += child.process.poll() is None
        child.kill()
        if (run.path / "config.yaml").exists():
            words = ["--resume", run.path]
            if run.checkpoints:
                assert public.load_backbone(run.path)[2]["training"]["step"] in run.checkpoints
    ended = train(*words, processes=processes)
    assert ended.status == 0, ended.stderr
    assert kills >= 6
    assert run.losses == peaceful.losses and run.numbers == peaceful.numbers
    assert run.steps == list(range(1, 201))
    assert run.scalars()["train/loss"] == peaceful.scalars()["train/loss"]
    assert not list(run.path.rglob(".*"))


@pytest.mark.slow
def test_a_killed_launcher_takes_the_training_with_it(train, images, tmp_path, stories):
    run = tmp_path / "run"
    launcher = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"]
    child = train.start(TINY, f"data={images}", f"run={run}", until="step:6", launcher=launcher)
    (training,) = child.held()
    assert training != child.process.pid and alive(training)
    child.process.send_signal(signal.SIGKILL)
    child.process.wait()
    deadline = time.monotonic() + SOON
    while alive(training) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(training)
    assert Run(run).checkpoints == [4, 6]
    assert train("--resume", run, launcher=launcher).status == 0
    peaceful, _ = stories.peaceful.result()
    assert Run(run).losses == peaceful.losses
