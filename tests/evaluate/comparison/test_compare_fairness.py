"""What evaluate/compare.py never mixes: settings, data, features, baselines of others, files that are out of date."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from by_hand.intervals import estimate
from by_hand.reports import comparer, maker, right, rows_of, standard, write
from PIL import Image

from common.data import Location
from common.errors import Refusal
from evaluate.comparison.reports import Report, location_of_report, open_runs, settings, unlike

ROOT = Path(__file__).resolve().parents[3]
SHOWN = {"name": "evaluation", "size": [16, 16], "crop": 1.0}
KNN = {"id": "knn/centred", "headline": 20, "k": [20], "transform": SHOWN}


@pytest.fixture
def make(tmp_path):
    return maker(tmp_path)


@pytest.fixture
def compare(script, tmp_path):
    return comparer(script("compare").main, tmp_path)


def heads(files):
    return {row["run"]: row for row in rows_of(files["compare.csv"]) if row["headline"] == "True"}


def gaps(files):
    return {row["row"]: row for row in rows_of(files["differences.csv"])}


# ----------------------------------------------------------------------------------------------------------- settings


def test_settings_are_what_numbers_depend_on():
    about = {"size": [16, 16], "pooling": "class"}
    one = {"evaluation": "knn", "protocol": KNN | {"k": [10, 20], "notes": ["x"], "picture": "/a"}}
    other = {"evaluation": "knn", "protocol": KNN | {"transform": SHOWN | {"size": [32, 32]}, "ema": None}}
    assert unlike(settings(one, about), settings(other, {"size": [32, 32]})) == []  # each at its own size
    assert unlike(settings(one, about), settings(other, about)) == ["transform.size"]
    tuned = {"evaluation": "finetune", "protocol": {"id": "x", "steps": 9, "pooling": "class"}}
    longer = {"evaluation": "finetune", "protocol": {"id": "x", "steps": 72, "pooling": "mean"}}
    assert unlike(settings(tuned, about), settings(longer, about)) == ["steps", "pooling"]
    assert unlike(settings(tuned, about), settings(longer, {"size": [8, 8]})) == ["steps"]


def test_other_settings_are_neither_averaged_nor_paired(make, compare):
    a, b, c = make("a-seed0"), make("a-seed1", seed=1), make("c", keep=0.5)
    for at, (run, crop) in enumerate(((a, 1.0), (b, 0.6), (c, 0.6))):
        standard(run, 0.7, at, protocol=KNN | {"transform": SHOWN | {"crop": crop}})
    files = compare(a, b)
    assert "its runs were judged with different settings (transform.crop)" in files["compare.md"] and not heads(files)
    files = compare(a, c)
    assert "other settings than the reference (transform.crop): not paired" in gaps(files)["c"]["why_not"]
    assert "k-NN: different transform.crop, so not comparable: 1.0: a-seed0; 0.6: c" in files["compare.md"]
    assert gaps(compare(b, c))["c"]["difference"] != ""


def test_other_training_images_are_not_paired(make, compare):
    a, b = make("a"), make("b", keep=0.5)
    standard(a, 0.7, 0)
    data = {side: {"images": 9, "fingerprint": word} for side, word in (("train", "other"), ("test", "t" * 16))}
    standard(b, 0.8, 1, data={"spec": "nowhere"} | data)
    files = compare(a, b)
    assert gaps(files)["b"]["why_not"] == "other training images than the reference: not paired"
    standard(b, 0.8, 1, data={"spec": "elsewhere"} | data | {"train": {"fingerprint": "train"}})
    files = compare(a, b)  # the same images, whatever their folder is called
    assert gaps(files)["b"]["difference"] != "" and "so not comparable" not in files["compare.md"]


# ----------------------------------------------------------------------------------------------- baselines and labels


def test_a_baseline_serves_the_runs_it_belongs_to(make, compare):
    a, b, c, d = make("a"), make("b", keep=0.5), make("c", keep=0.6, about={"mean": [0.4] * 3}), make("d", keep=0.7)
    for at, run in enumerate((a, b, c, d)):
        standard(run, 0.7, at, protocol=KNN | {"transform": SHOWN | {"crop": 0.6 if run is d else 1.0}})
    found = heads(compare(a, b, "random", "pixels"))
    assert {"random init", "raw pixels"} <= found.keys()
    found = heads(compare(a, b, c, d, "random", "pixels"))
    assert {"random init (as a, b)", "random init (as c)", "random init (as d)"} <= found.keys()
    assert {"raw pixels (as a, b, c)", "raw pixels (as d)"} <= found.keys()
    assert found["raw pixels (as d)"]["weights_sha256"] == found["raw pixels (as d)"]["step"] == ""


def test_labels_are_distinct(make, compare):
    runs = [make(f"quick-{at}", seed=at % 2, keep=1.0 if at < 2 else 0.5) for at in range(4)]
    for at, run in enumerate(runs):
        standard(run, 0.7 + 0.02 * at, at)
    assert list(heads(compare(*runs))) == ["quick-0, quick-1", "quick-2, quick-3"]
    named = make("random init", keep=0.7)
    standard(named, 0.7, 0)
    assert {"random init", "random init (baseline)"} <= heads(compare(named, "random")).keys()


def test_csv_tells_seeds_and_spread_of_a_report_and_nothing_of_weights_for_baselines(make, compare):
    a = make("a", seed=5)
    standard(a, 0.7, 0, seeds=[3, 4])
    path = a / "evaluate" / "knn.json"
    content = json.loads(path.read_text())
    content["values"]["random"]["mean"]["std"] = 0.25
    path.write_text(json.dumps(content))
    lines = [row for row in rows_of(compare(a, "random")["compare.csv"]) if row["features"] == "mean"]
    assert len(lines) == 4 and {row["seeds"] for row in lines} == {"3 4"}
    for row in lines:
        ours = row["row"] == "subject"
        assert (row["std"], row["pretraining_seeds"]) == (("", "5") if ours else ("0.25", ""))
        assert (row["step"], bool(row["weights_sha256"])) == (("100", True) if ours else ("", False))


# ----------------------------------------------------------------------------------------------------------- features


def test_features_that_are_not_there_leave_an_empty_cell(make, compare):
    a, b = make("a"), make("b", keep=0.5, about={"pooling": "class"})
    standard(a, 0.7, 0)
    write(b, "knn", {"subject": {"class": right(0.7, 1)}, "pixels": {"pixels": right(0.6, 91)}})
    files = compare(a, b, "pixels", "--features", "mean")
    assert list(heads(files)) == ["a", "raw pixels"] and gaps(files)["b"]["difference"] == ""
    assert "k-NN of b: no features mean in its report, which has class" in files["compare.md"]
    files = compare(a, b)
    assert "features: mean patch of a and class token of b: k-NN" in files["compare.md"]
    with pytest.raises(Refusal, match="--features clas: expected one of class, mean, both; did you mean 'class'"):
        compare(a, "--features", "clas")


# ------------------------------------------------------------------------------------------- out of date, and damaged


def test_pictures_of_what_is_out_of_date_are_not_shown(make, compare):
    a = make("a")
    standard(a, 0.7, 0)
    sheet = a / "evaluate" / "explain" / "maps.png"
    sheet.parent.mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(sheet)
    text = compare(a)["compare.html"]
    assert "<img" not in text and "Pictures of explain are left out: they have no whole report" in text
    write(a, "explain", {"subject": {}}, weights_sha256="0" * 64)
    text = compare(a)["compare.html"]
    assert "<img" not in text and "Pictures of explain are left out: its report is of other weights" in text
    write(a, "explain", {"subject": {}})
    assert compare(a)["compare.html"].count("<img") == 1
    assert "left out: its report is of nowhere, not builtin" in compare_other(a, compare)


def compare_other(run, compare):
    """Under --data: what is of other data is left out, a segmentation is of its own."""
    standard(run, 0.7, 0, data={"spec": "builtin"} | {side: {"fingerprint": "x"} for side in ("train", "test")})
    counts = np.random.default_rng(0).integers(5, 9, (1, 200, 3, 3))
    write(run, "segmentation", {"subject": {"linear": counts}}, protocol={"id": "seg", "metric": "mIoU"})
    write(run, "layers", {"subject": {"layer 1": right(0.5, 0)}})
    text = compare(run, "--data", "builtin")
    assert "segmentation: on data of its own, nowhere, not builtin" in text["compare.md"]
    assert "layers is left out: of nowhere, not builtin" in text["compare.md"]
    return text["compare.html"]


def test_reports_without_a_number_for_the_table_make_a_page(make, compare):
    a = make("a", init="timm:vit")
    write(a, "layers", {"subject": {}}, values={"subject": {"layer 1": {"knn": {"accuracy": 0.5}}}})
    files = compare(a)
    assert "no number for the table" in files["compare.md"] and "layers: 1 numbers" in files["compare.html"]
    assert "a: its costs are without what it began from, timm:vit" in files["compare.md"]


def test_two_seeds_on_different_images_as_the_only_column(make, compare):
    a, b = make("a"), make("b", seed=1)
    standard(a, 0.7, 0)
    standard(b, 0.7, 1, test="u" * 16)
    assert "judged on different test images" in compare(a, b)["compare.md"]


@pytest.mark.parametrize(
    "change",
    [
        {"outcomes": {"file": "knn.outcomes.npz"}}, {"outcomes": ["x"]}, {"outcomes": {"file": "../x", "sha256": "y"}},
        {"data": {"spec": "x", "test": {"fingerprint": "t"}}}, {"protocol": {"id": "x", "transform": "none"}},
        {"data": {side: {"fingerprint": "t", "images": "x"} for side in ("train", "test")}}, {"subject": ["x"]},
        {"values": {"subject": {"mean": {"accuracy": 0.5, "interval": [0.1]}}}}, {"values": {"subject": ["x"]}},
        {"values": {"subject": {"mean": {"accuracy": 0.5, "k": {"20": {}}}}}},
        {"values": {"subject": {"mean": {"accuracy": "much"}}}}, {"values": {"subject": {"mean": {"accuracy": True}}}},
    ],
)  # fmt: skip
def test_a_malformed_report_is_one_refusal(make, compare, change):
    a = make("a")
    standard(a, 0.7, 0, **change)
    with pytest.raises(Refusal, match="is no whole report") as caught:
        compare(a)
    assert "\n" not in str(caught.value)


def test_what_is_damaged_is_made_again(make, compare, script, monkeypatch, tmp_path):
    a = make("a", data="builtin")
    standard(a, 0.7, 0)
    (a / "evaluate" / "knn.json").write_text("{")
    (a / "evaluate" / "finetune.json").write_text("{")
    main = script("compare").main

    def mend(name, command):
        assert (name, command) == ("knn", ["--ckpt", str(a)])
        train, test = main.__globals__["splits_of"](Location("builtin"))
        data = {"train": {"fingerprint": train.fingerprint()}, "test": {"fingerprint": test.fingerprint()}}
        standard(a, 0.7, 0, data={"spec": "builtin"} | data)
        return 0

    monkeypatch.setitem(main.__globals__, "run_script", mend)
    files = comparer(main, tmp_path)(a, "--make", "knn", run=True)
    assert "a: finetuning is left out" in files["compare.md"] and list(heads(files)) == ["a"]
    with pytest.raises(Refusal, match=r"finetune\.json cannot be read as a report"):
        compare(a)


def test_data_are_looked_for_in_one_place(make):
    (run,) = open_runs([str(make("a", data="stl10", data_root="/own"))])

    def looked_for(spec, data, root, **location):
        report = Report(Path("knn.json"), {"data": {"spec": spec, **location}}, {})
        return location_of_report(run, report, {"data": data, "data_root": root})

    assert looked_for("stl10", None, None).root == "/own"
    assert looked_for("stl10", None, "/given").root == looked_for("stl10", "stl10", "/given").root == "/given"
    assert looked_for("stl10", "stl10", None).root is looked_for("cifar10", None, None).root is None
    judged = looked_for("hf:x/y", None, None, location={"data_validation": "dev"})
    assert (judged.spec, judged.validation, judged.root) == ("hf:x/y", "dev", None)


# ----------------------------------------------------------------------------------------------------- paths and words


def test_weights_that_share_a_folder_and_links(make, compare, tmp_path):
    a = make("a")
    standard(a, 0.7, 0)
    for name in ("other.safetensors", "other.json"):
        (a / name).write_bytes((a / f"backbone.{name.partition('.')[2]}").read_bytes())
    with pytest.raises(Refusal, match="lie in one folder"):
        compare(a, a / "other.safetensors")
    link = tmp_path / "link"
    link.mkdir()
    for name in ("backbone.safetensors", "backbone.json"):
        (link / name).symlink_to(a / name)
    with pytest.raises(Refusal, match=r"no report to compare in .*link/evaluate"):
        compare(link)
    standard(link, 0.8, 0)
    found = heads(compare(link))["link"]
    assert float(found["value"]) == pytest.approx(estimate(right(0.8, 0)))
    assert "3,200" in (tmp_path / "out" / "compare.md").read_text()  # costs from where it was trained


def test_names_that_are_no_text(make, compare, monkeypatch):
    try:
        a = make(os.fsdecode(b"x\xff"))
    except OSError:
        pytest.skip("this file system takes text only")
    standard(a, 0.7, 0)
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    files = compare(a)
    terminal.flush()
    assert rb"x\udcff" in terminal.buffer.getvalue() and rb"\u2013" in terminal.buffer.getvalue()
    assert all(r"x\udcff" in files[name] for name in ("compare.md", "compare.csv", "compare.html"))


def test_what_cannot_be_is_said_before_anything_starts(make, compare):
    a = make("a")
    for words, match in (
        (["--workers", "x"], "invalid int value"), (["--workers", "-1"], "--workers -1: expected a number from 0"),
        (["--threads", "0"], "--threads 0: expected a number from 1"), (["--device", "cudaa"], "--device cudaa"),
        (["--data", "builtim"], "data=builtim: no such folder.*did you mean 'builtin'"),
    ):  # fmt: skip
        with pytest.raises(Refusal, match=match):
            compare(a, *words, run=True)
    with pytest.raises(Refusal, match="timm:vit_x: only runs and weights files of poslabel can be compared"):
        compare("timm:vit_x")


PARENT = """import sys
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from common.processes import launch
launch.scripts = lambda: {"slow": sys.argv[1]}
launch.run_script("slow", [sys.argv[2]])
print("went on")"""
CHILD = "import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_evaluation_too(tmp_path, number):
    (tmp_path / "slow.py").write_text(CHILD)
    noted = tmp_path / "pid"
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, tmp_path / "slow.py", noted], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (noted.is_file() and noted.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    child = int(noted.read_text())
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert "went on" not in said and process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
