"""Steps that are not finite: what is recorded of them, that a run survives or stops, and that they can be repeated."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs.children import Run, Train
from torch import Tensor, nn

from common.checkpoints import public, storage
from common.errors import Refusal
from common.training.averages import Averages
from pretrain import command, flight
from pretrain.objectives.absolute import Absolute

DINO = [
    "views.global.count=2",
    "objectives.dino.prototypes=32",
    "objectives.dino.hidden=16",
    "objectives.dino.bottleneck=8",
]
SHORT = ["tensorboard=false", "checkpoint_every=1", "keep=9", "monitor.held_out=0"]
BROKEN = ["optimizer.lr=1e38", "optimizer.most_skipped=4"]  # the first step throws the weights out of all bounds


def spoil(monkeypatch: pytest.MonkeyPatch, when: Callable[[float], bool]) -> None:
    """One of the losses is NaN wherever the progress says so."""
    forward = Absolute.forward

    def spoilt(self: Absolute, *given: Any) -> dict[str, Tensor]:
        result = forward(self, *given)
        return result | {"loss": result["loss"] * (math.nan if when(self.progress) else 1.0)}

    monkeypatch.setattr(Absolute, "forward", spoilt)


def content(run: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / storage.STATE, weights_only=True)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every tensor and number of a state by its place."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: each for at, inner in items for key, each in flat(inner, f"{name}/{at}").items()}
    return {name: value}


def differences(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    a, b = flat(one), flat(other)
    equal = lambda x, y: torch.equal(x, y) if isinstance(x, Tensor) else x == y  # noqa: E731
    return {name for name in {**a, **b} if name not in a or name not in b or not equal(a[name], b[name])}


# ---------------------------------------------------------------------------- whole runs


def test_a_run_that_breaks_stops_with_its_last_good_checkpoint(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Refusal, match="not finite in 4 steps in a row up to step 5"):
        inside(*tiny, *SHORT, *BROKEN, f"run={run}")
    told = [line for line in capsys.readouterr().out.splitlines() if "was not taken" in line]
    assert len(told) == 4
    record = run / "flight" / "step_00000002"
    assert told[0].startswith("step 2 was not taken: the loss is not finite (absolute/loss nan, relative/loss nan")
    assert told[0].endswith(f"pretrain/run.py --replay {record}")
    assert "not recorded: there are 3 records" in told[3]
    assert sorted(path.name for path in (run / "flight").iterdir()) == [f"step_{n:08d}" for n in (2, 3, 4)]

    good = run / "state" / "step_00000001"
    public.load_backbone(good)
    assert all(bool(torch.isfinite(value).all()) for value in state(good)["task"].values())
    # what the step began with is the checkpoint before it, but for the learning rate of the step that is tried
    assert {name.rpartition("/")[2] for name in differences(state(good), state(record))} <= {"lr", "weight_decay"}
    later = differences(state(record), state(run / "flight" / "step_00000004"))
    assert {name.split("/")[1] for name in later} <= {"step", "optimizer", "random", "task"}
    assert not [name for name in later if name.startswith("/task") and name != "/task/skipped"]
    assert not [name for name in later if name.startswith("/optimizer") and not name.endswith(("lr", "weight_decay"))]


def test_a_passing_nan_is_recorded_survived_and_reproduced(
    inside: Callable[..., int],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    images: Path,
) -> None:
    """DINO beside the positional objectives, in two parts, with dropout; only one loss of one step is NaN."""
    run, record = tmp_path / "run", tmp_path / "run" / "flight" / "step_00000003"
    words = [*tiny, *SHORT, *DINO, "steps=6", "accumulate=2", "log_every=2", f"run={run}"]
    with monkeypatch.context() as accident:
        spoil(accident, lambda progress: progress == 2 / 6)
        assert inside(*words) == 0
        assert [record["skipped"] for record in Run(run).metrics] == [0, 1, 1]
        assert "step 3 was not taken: the loss is not finite (absolute/loss nan, loss nan)" in capsys.readouterr().out
        assert Run(run).checkpoints == [1, 2, 4, 5, 6], "a skipped step has nothing new to store"
        before, recorded = (state(folder)["task"] for folder in (run / "state" / "step_00000002", record))
        assert all(torch.equal(before[name], recorded[name]) for name in before), "no EMA, no centre"
        later = state(run / "state" / "step_00000006")["task"]
        assert any(not torch.equal(before[name], later[name]) for name in before if name.startswith("teacher."))

        there = content(run)
        assert inside("--replay", record) == 0
        told = capsys.readouterr().out
        assert "reproduced: all" in told.splitlines()[-1]
        assert "not finite: losses        2: loss nan, absolute/loss nan" in told
        assert "first output  objectives.absolute (Absolute)" in told
        assert "part 2: dino/loss" in told
        assert content(run) == there, "nothing is written"

        moved = tmp_path / "moved"
        shutil.copytree(images, moved)
        assert inside("--replay", record, f"data={moved}") == 0
        next(moved.rglob("*.png")).unlink()
        with pytest.raises(Refusal, match=r"the images at data=.*are not those of the record"):
            inside("--replay", record, f"data={moved}")

    capsys.readouterr()
    assert inside("--replay", record) == 1  # without the fault, as if another version ran
    told = capsys.readouterr().out
    assert "not reproduced: 5 of" in told, "two losses of two parts, and the gradient"
    assert told.count("differs") == 5
    norm = next(line.split() for line in told.splitlines() if line.startswith("gradient norm"))
    assert norm[2] == "nan" and 0 < float(norm[3]) < 100
    text = (record / "record.json").read_text()
    (record / "record.json").write_text(text.replace('"terms": [[', '"terms": [[{}, {}], ['))
    with pytest.raises(
        Refusal, match=r"taken by 2 processes, not 1: \S*torchrun --nproc-per-node 2 \S*pretrain/run\.py"
    ):
        inside("--replay", record)


def test_a_gradient_alone_may_be_the_trouble(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Refusal, match="2 steps in a row up to step 2"):
        inside(*tiny, *SHORT, "objectives.absolute.weight=1e38", "optimizer.most_skipped=2", f"run={run}")
    assert "every loss is finite and the gradient is not (norm inf)" in capsys.readouterr().out
    assert inside("--replay", run / "flight" / "step_00000002") == 0
    told = capsys.readouterr().out
    assert "not finite: losses        none" in told
    assert "too large for the type of their norm" in told


@pytest.mark.slow
def test_two_processes_record_together_and_repeat_together(train: Train, tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = train(*tiny, *SHORT, *DINO, *BROKEN, f"run={run}", processes=2)
    assert ended.status != 0
    assert [line for line in ended.stderr.splitlines() if line.startswith("error:")] == [
        "error: the loss or its gradient was not finite in 4 steps in a row up to step 5: lower the learning rate, "
        "clip gradients, or use precision=bf16 or fp32; none of them was taken, and the last checkpoint is intact"
    ]
    public.load_backbone(run / "state" / "step_00000001")
    folder = run / "flight" / "step_00000002"
    record = flight.read(folder)
    assert (record.processes, record.step) == (2, 2)
    first, second = ([index for _, index in parts[0]] for parts in record.keys)
    assert len(first) == len(second) == 8 and not set(first) & set(second)
    assert len(state(folder)["random"]) == 2
    assert re.search(rf"torchrun --nproc-per-node 2 \S*pretrain/run\.py --replay {folder}", ended.stdout)
    again = train("--replay", folder, processes=2)
    assert again.status == 0, again.stderr
    assert "reproduced: all" in again.stdout and "in process 1" in again.stdout


def test_a_full_disk_costs_the_record_and_not_the_run(
    inside: Callable[..., int],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(flight, "write_atomically", full)
    spoil(monkeypatch, lambda progress: progress == 1 / 3)
    assert inside(*tiny, *SHORT, "steps=3", f"run={tmp_path / 'run'}") == 0
    assert "warning: no record could be written" in capsys.readouterr().out
    assert not list((tmp_path / "run" / "flight").iterdir())


# ---------------------------------------------------------------------------- the recorder alone


def recorder(run: Path, task: nn.Module, scale: float | None = None) -> tuple[flight.FlightRecorder, list[str]]:
    """A recorder of a run of one process; `scale`: of fp16's loss."""
    said: list[str] = []
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale, state_dict=lambda: {"scale": scale})
    parts = SimpleNamespace(
        process=SimpleNamespace(num_processes=1, is_main_process=True),
        config=SimpleNamespace(),
        per_epoch=10,
        fingerprint="f",
    )
    accelerator = SimpleNamespace(scaler=scaler, device=torch.device("cpu"), unwrap_model=lambda module: module)
    checkpoints = SimpleNamespace(
        averages=Averages(),
        run=run,
        parts=parts,
        accelerator=accelerator,
        commit=None,
        state=lambda step, *_: {"step": step},
    )
    made = flight.FlightRecorder(checkpoints, task, torch.optim.SGD(task.parameters()), said.append)  # type: ignore[arg-type]
    return made, said


@pytest.mark.parametrize(
    "scale, loss, expected", [(1024.0, 1.0, 0), (1024.0, math.nan, 1), (0.5, 1.0, 1), (None, 1.0, 1)]
)
def test_an_overflow_of_fp16_is_no_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float | None, loss: float, expected: int
) -> None:
    monkeypatch.setattr(flight.configuration, "as_yaml", lambda config: "")
    made, said = recorder(tmp_path, nn.Linear(2, 2), scale)
    made.begin()
    made.keep(12, [{"loss": torch.tensor(loss)}], math.inf, [SimpleNamespace(index=torch.tensor([5, 3]))])
    assert len(said) == expected == len(list(tmp_path.glob("flight/step_*")))
    if expected:
        record = flight.read(tmp_path / "flight" / "step_00000012")
        assert record.keys == [[[[1, 5], [1, 3]]]], "epoch 1: ten steps are an epoch"
        assert record.gradient_norm == math.inf
        assert flight.state_of(tmp_path / "flight" / "step_00000012", record)["step"] == 11
        made.keep(12, [{"loss": torch.tensor(loss)}], math.inf, [])
        assert "it was recorded before" in said[-1]


def test_running_statistics_are_put_back(tmp_path: Path) -> None:
    """A forward pass changes them before anybody knows that it went wrong: a NaN would stay in every checkpoint."""
    task = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    made, _ = recorder(tmp_path, task, scale=1024.0)
    task(torch.randn(4, 2))
    made.begin()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task(torch.full((4, 2), math.nan))
    assert not torch.isfinite(task[1].running_mean).any()
    made.keep(1, [{"loss": torch.tensor(1.0)}], math.inf, [])
    assert not [name for name, value in task.state_dict().items() if not torch.equal(value, before[name])]


def test_json_has_no_word_for_nan() -> None:
    terms = [[{"loss": math.nan, "a/loss": -math.inf, "a/accuracy": 0.1}]]
    record = flight.Record(3, "cpu", "2.8", None, math.inf, terms, [[[[0, 7]]]], "abc")
    text = flight.as_text(record)
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["gradient_norm"] == "inf"
    assert found["terms"] == [[{"loss": "nan", "a/loss": "-inf", "a/accuracy": 0.1}]]


def test_the_reason_names_the_terms_and_the_sum_last() -> None:
    good, bad = {"loss": 1.0, "a/loss": 1.0}, {"loss": math.nan, "a/loss": math.nan, "a/gain": math.nan}
    assert flight.reason([[good, bad]], math.nan) == "the loss is not finite (a/loss nan, loss nan)"
    assert "a/loss nan in process 1" in flight.reason([[good], [bad]], math.nan)
    assert flight.reason([[good]], math.inf) == "every loss is finite and the gradient is not (norm inf)"


# ---------------------------------------------------------------------------- the command line


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        Refusal, match=r"is no record of a step \(record.json is not in it\); expected RUN/flight/step_"
    ):
        command.parse(["--replay", str(tmp_path)], "")
    record = tmp_path / "flight" / "step_00000004"
    record.mkdir(parents=True)
    for name in ("record.json", "state.pt", "config.yaml"):
        (record / name).write_text("{}")
    for folder in (tmp_path, tmp_path / "flight"):
        with pytest.raises(Refusal, match=f"there are: {record}"):
            command.parse(["--replay", str(folder)], "")
    for text in ("{}", "[]", "{", '{"format": 1}', '{"format": 1, "gradient_norm": "x"}'):
        (record / "record.json").write_text(text)
        with pytest.raises(Refusal, match="cannot be read as a record"):
            command.parse(["--replay", str(record)], "")
    (record / "record.json").write_text('{"format": 99}')
    with pytest.raises(Refusal, match="another format"):
        command.parse(["--replay", str(record)], "")
    whole = flight.Record(4, "cpu", "2.8", None, 1.0, [[{"loss": 1.0}]], [[[[0, 1]]]], "abc")
    (record / "record.json").write_text(flight.as_text(whole))
    assert command.parse(["--replay", str(record), "data=elsewhere"], "").replay == record
    for more, named in (
        (["--resume", str(tmp_path)], "--resume"),
        (["quickstart"], "quickstart"),
        (["steps=3"], "steps=3"),
        (["--dry-run"], "--dry-run"),
        (["--overwrite"], "--overwrite"),
    ):
        with pytest.raises(Refusal, match=f"leave out {named}"):
            command.parse(["--replay", str(record), *more], "")
    with pytest.raises(Refusal, match="damaged"):
        flight.state_of(record, whole)


def test_help_knows_it() -> None:
    assert "--replay RECORD" in command.help_text("")
