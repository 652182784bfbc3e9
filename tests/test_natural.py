"""benchmarks/results.py --natural: how many steps a row gets, what is compared with what, what goes on after a kill."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.natural import plots, rows, running, table
from common.config import find_recipe
from common.errors import Refusal
from pretrain import objectives
from pretrain.config import load


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    "row", [row if row == "DropPos" else pytest.param(row, marks=pytest.mark.slow) for row in rows.ROWS]
)
def test_a_row_is_words_that_the_recipe_takes(row):
    """And what a positional label looks at is not flipped."""
    config = load(find_recipe("cifar10_compare", "pretrain"), rows.ROWS[row])
    for name, options in config.objectives.items():
        assert options.keys() <= set(objectives.find(name).Options.__dataclass_fields__)
        view = config.views[options.get("view", "global")]
        assert view.size == 32 and (view.flip == 0) == (name in ("absolute", "relative"))


def test_steps_are_a_multiple_of_eight_that_goes_into_the_minutes():
    assert rows.steps_in(1, 0.1) == 600
    assert rows.steps_in(1, 0.07) == 856  # 857.1
    assert rows.steps_in(2, 0.07) == 1712
    with pytest.raises(Refusal, match=r"--minutes 1: a step of DINO takes 10\.00 s, and 8 are the least"):
        rows.steps_in(1, 10, "DINO")


def test_a_round_that_is_slow_for_all_changes_no_ratio():
    rounds = [{"absolute": 1.0, "MP3": 2.0}, {"absolute": 5.0, "MP3": 10.0}, {"absolute": 1.0, "MP3": 9.0}]
    assert rows.ratios(rounds) == {"absolute": 1.0, "MP3": 2.0}


def test_the_cost_of_a_step_is_that_of_the_middle_line_after_the_first(tmp_path):
    lines = [
        {"step": 1, "images_per_second": 1.0},
        *({"step": 2, "images_per_second": s} for s in (50.0, 100.0, 400.0)),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert running.seconds_of_a_step(tmp_path / "metrics.jsonl", 20) == 0.2


def test_costs_are_measured_once_and_a_row_that_comes_later_beside_the_reference(runs, monkeypatch):
    speed, measured = {"absolute": 0.1, "MP3": 0.05, "DINO": 0.4}, []

    def timed(names, recipe, data, more):
        measured.append(names)
        return [{name: speed[name] * slow for name in names} for slow in (1, 2, 1.5)]

    monkeypatch.setattr(running, "timed", timed)
    first = running.costs(["absolute", "MP3"], "cifar10_compare", "PATH", ["batch=8"])
    assert first == pytest.approx({"absolute": 0.15, "MP3": 0.075})
    speed |= {"absolute": 1.0, "DINO": 4.0}  # the machine is ten times slower: what DINO is worth is not
    again = running.costs(["absolute", "MP3", "DINO"], "cifar10_compare", "PATH", ["batch=8"])
    assert again == pytest.approx({"absolute": 0.15, "MP3": 0.075, "DINO": 0.6})
    assert measured == [["absolute", "MP3"], ["absolute", "DINO"]]
    with pytest.raises(Refusal, match=r"costs\.json was measured with another words"):
        running.costs(["absolute"], "cifar10_compare", "PATH", ["batch=16"])


def reports(folder, step):
    """What a training leaves, and its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    training = {"step": step, "steps": 16, "batch": 4}
    (folder / "backbone.json").write_text(json.dumps({"weights_sha256": f"of {step}", "training": training}))
    (folder / "config.yaml").touch()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "images_per_second": 1.0}) + "\n")
    for at in range(2, step + 1, 2):
        state = folder / "state" / f"step_{at:08d}"
        state.mkdir(parents=True, exist_ok=True)
        (state / "backbone.json").write_text(json.dumps({"weights_sha256": f"of {at}"}))


def test_a_killed_run_goes_on_and_what_is_finished_is_never_made_again(runs, monkeypatch):
    job, calls, deaths = rows.Job("MP3", 0, 1.0), [], ["pretrain/run.py", "evaluate/linear.py"]

    def run(script, words, log):
        calls.append((script.rpartition("/")[2], words[0] == "--resume"))
        if deaths and script == deaths[0]:
            deaths.pop(0)
            if script == "pretrain/run.py":
                reports(job.folder, 8)
            raise KeyboardInterrupt
        if script == "pretrain/run.py":
            return reports(job.folder, 16)
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        name = Path(script).stem + ("_quarters" if "quarters" in words else "")
        weights = json.loads((Path(words[1]) / "backbone.json").read_text())["weights_sha256"]
        (out / f"{name}.json").write_text(json.dumps({"weights_sha256": weights}))

    monkeypatch.setattr(running, "run", run)
    wanted = running.asked(job, "cifar10_compare", "PATH", [], 60 / 16)
    assert wanted["steps"] == 16 and "milestone_every=2" in wanted["words"]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            running.trained_and_judged(job, wanted, "PATH", [])
    running.trained_and_judged(job, wanted, "PATH", [])
    trainings = [resumed for script, resumed in calls if script == "run.py"]
    assert trainings == [False, True] and rows.Job("MP3", 0, 1.0).folder == job.folder
    judged = [script for script, _ in calls if script != "run.py"]
    assert judged.count("knn.py") == 8 and judged.count("linear.py") == 3  # 3 on the way and the end, in two readouts
    assert running.is_done(job) and not (job.folder / "state").exists()
    done = len(calls)
    running.trained_and_judged(job, wanted, "PATH", [])
    assert len(calls) == done
    with pytest.raises(Refusal, match=r"was made with other words, steps, seconds: move it away"):
        running.trained_and_judged(job, running.asked(job, "cifar10_compare", "PATH", [], 60 / 32), "PATH", [])


def run_of(share, position=0.5, training=True):
    rng = np.random.default_rng(round(1000 * share))
    right = {measure: rng.random(50) < share for measure in table.MEASURES}
    facts = {"steps": 16, "images_seen": 64, "commit": "c", "audit": "clean", "precision": "fp32", "batch": 4}
    curve = [(at, {"field": share * at / 8, "quarters": share}) for at in (1, 2, 4, 8)]
    hardware = {"gpu": None, "cpu": "some", "threads": 1}
    return table.Finished(right, np.arange(50), hardware, facts if training else {}, position, 1.0, 0.1, curve)


def test_rows_say_what_they_are_beside_the_reference_and_replace_their_like():
    runs = {"absolute": {0: run_of(0.5), 1: run_of(0.6)}, "DINO": {0: run_of(0.9, None), 2: run_of(0.8, None)}}
    runs["untrained"] = {0: run_of(0.2, None, training=False)}
    cells = [table.row(name, 60, runs, "python some") for name in ("untrained", "absolute", "DINO")]
    named = [dict(zip(table.COLUMNS, each, strict=True)) for each in cells]
    assert [row["seeds"] for row in named] == ["0", "0, 1", "0"]
    assert [row["audit"] for row in named] == ["–", "clean", "–"]
    assert named[1]["k-NN: minus"] == "–" and named[0]["steps"] == "–"
    gap = 100 * (runs["DINO"][0].right["knn", "field"].mean() - runs["absolute"][0].right["knn", "field"].mean())
    value, low, high = (float(word.strip("[],")) for word in named[2]["k-NN: minus"].split())
    assert value == pytest.approx(gap, abs=0.06) and low <= value <= high and low > 0
    text = table.written("# Results\n\n## Others\n\n| one |\n", [cells[2], cells[1]])
    text = table.written(text, [cells[0], [*cells[2][:-1], "anew"]])
    assert text.startswith("# Results\n\n## Others\n\n| one |\n\n## Natural images") and text.count("| DINO |") == 1
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 60")]
    assert [line[1] for line in lines] == ["untrained", "absolute", "DINO"] and lines[2][-1] == "anew"
    runs["DINO"][0].index = np.arange(1, 51)
    with pytest.raises(Refusal, match="not judged on the same test images"):
        table.row("DINO", 60, runs, "python some")


def test_curves_end_at_the_minutes_and_at_the_images_that_each_row_saw():
    runs = {"absolute": {0: run_of(0.5), 1: run_of(0.7)}, "DINO": {0: run_of(0.9, None)}}
    figure = plots.curves(runs, 60, 1000)
    (by_time, by_images, *_), names = figure.axes, ["absolute", "DINO"]
    assert [line.get_label() for line in by_time.lines] == names
    assert [list(line.get_xdata()) for line in by_time.lines] == [[7.5, 15, 30, 60]] * 2
    assert list(by_images.lines[0].get_xdata()) == [2, 4, 8, 16]
    assert by_time.lines[0].get_ydata()[-1] == pytest.approx(60)
    (points, *rest), _ = plots.positions(runs).axes[0].collections, None
    assert not rest and points.get_offsets()[:, 0].tolist() == [50, 50]


def test_peers_are_left_out_where_their_package_is_not_unless_they_are_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(running, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    assert running.possible(rows.EVERY, False) == list(rows.ROWS)
    assert "left out, as the package lightly is not installed" in capsys.readouterr().out
    with pytest.raises(Refusal, match=r"lightly's MAE: the package lightly is not installed: pip install"):
        running.possible(["MP3", "lightly's MAE"], True)
