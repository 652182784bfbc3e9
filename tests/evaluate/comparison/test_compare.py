"""evaluate/compare.py: seeds grouped, differences paired, stale and missing reports, costs, each mistake."""

import json
import shutil
import statistics
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from by_hand.intervals import difference, estimate
from by_hand.reports import K, comparer, maker, right, rows_of, standard, write

from common.data import labelled_splits
from common.errors import Refusal
from common.models.plan import PlanSpec
from evaluate.comparison.costs import forward, hours, per_image
from evaluate.job import bootstrap


@pytest.fixture
def make(tmp_path):
    return maker(tmp_path)


@pytest.fixture
def compare(script, tmp_path):
    return comparer(script("compare").main, tmp_path)


# ------------------------------------------------------------------------------------------------------------ numbers


def test_seeds_are_one_line_and_differences_are_paired(make, compare, capsys):
    shares = {"runs/a-seed0": (0.70, 0, 1.0), "runs/a-seed1": (0.72, 1, 1.0), "runs/b": (0.80, 0, 0.5)}
    runs = {name: make(name, seed=seed, keep=keep) for name, (_, seed, keep) in shares.items()}
    for at, (name, run) in enumerate(runs.items()):
        standard(run, shares[name][0], at)
    files = compare(*runs.values(), "random", "pixels")
    assert capsys.readouterr().out.count("| a (seeds 0, 1)") == 1 and files["compare.md"].count("\n| b ") == 2
    heads = {row["run"]: row for row in rows_of(files["compare.csv"]) if row["headline"] == "True"}
    assert list(heads) == ["a (seeds 0, 1)", "b", "random init", "raw pixels"]
    each = [right(share, at) for at, share in enumerate((0.70, 0.72))]
    a, b = heads["a (seeds 0, 1)"], heads["b"]
    assert float(a["value"]) == pytest.approx(statistics.fmean(one.mean() for one in each))
    assert float(a["std_over_seeds"]) == pytest.approx(statistics.stdev(one.mean() for one in each))
    assert a["pretraining_seeds"] == "0 1" and heads["raw pixels"]["pretraining_seeds"] == ""
    both = np.concatenate(each)  # runs of one seed each count alike: the mean over them, image by image
    assert (float(a["low"]), float(a["high"])) == pytest.approx(bootstrap.interval(both))
    assert b["features"] == "mean" and b["std_over_seeds"] == ""
    assert b["protocol"] == "knn/centred" and b["setting"] == "k=20"

    gaps = {row["row"]: row for row in rows_of(files["differences.csv"])}
    expected = difference(right(0.80, 2), both)
    found = tuple(float(gaps["b"][name]) for name in ("difference", "low", "high"))
    assert found == pytest.approx(expected) and gaps["b"]["excludes_0"] == str(expected[1] > 0 or expected[2] < 0)
    wide = bootstrap.interval(right(0.80, 2))
    assert expected[2] - expected[1] < wide[1] - wide[0]  # what is hard for both cancels
    assert gaps["random init"]["excludes_0"] == "True" and "* |" in files["compare.md"]
    assert float(gaps["random init"]["difference"]) == pytest.approx(right(0.4, 90).mean() - both.mean())
    assert f"{100 * float(gaps['random init']['difference']):+.1f}".replace("-", "−") in files["compare.md"]
    plain = [row for row in rows_of(files["compare.csv"]) if row["headline"] == "False"]
    assert len(plain) == 3 * 4  # each run's two kinds of features and two baselines
    assert {row["features"] for row in plain} == {"class", "mean", "pixels"}


def test_features_and_reference_can_be_chosen(make, compare):
    a, b = make("a"), make("b", keep=0.5)
    standard(a, 0.7, 0)
    standard(b, 0.8, 1)
    files = compare(a, b, "--features", "class", "--against", "b")
    heads = {row["run"]: row for row in rows_of(files["compare.csv"]) if row["headline"] == "True"}
    assert float(heads["b"]["value"]) == pytest.approx(right(0.6, 1).mean())
    (gap,) = rows_of(files["differences.csv"])
    assert gap["row"] == "a" and gap["against"] == "b" and float(gap["difference"]) < 0
    (gap, _) = rows_of(compare(a, b, "--against", "random")["differences.csv"])
    assert gap["against"] == "random init"
    with pytest.raises(Refusal, match="--against c: expected one of"):
        compare(a, b, "--against", "c")


def test_segmentation_counts_become_intervals_of_miou(make, compare):
    rng = np.random.default_rng(0)
    runs = []
    for name, share in (("b", 0.9), ("a", 0.5)):
        label = rng.integers(50, 100, (1, K, 3))
        inside = (label * share).astype(int)
        counts = np.stack([inside, inside, label], -1)  # nothing is predicted in vain: the IoU is the share
        run = make(name, keep=share)
        write(run, "segmentation", {"subject": {"linear": counts}}, protocol={"id": "seg", "metric": "mIoU"})
        path = run / "evaluate" / "segmentation.json"
        content = json.loads(path.read_text())
        value = estimate(counts)
        content["values"]["subject"]["linear"] |= {"accuracy": value, "pixel_accuracy": share}
        path.write_text(json.dumps(content))
        runs.append(run)
    files = compare(*runs)
    heads = [row for row in rows_of(files["compare.csv"]) if row["headline"] == "True"]
    assert [row["metric"] for row in heads] == ["mIoU", "mIoU"]
    assert all(float(row["low"]) < float(row["value"]) < float(row["high"]) for row in heads)
    (gap,) = rows_of(files["differences.csv"])
    assert gap["excludes_0"] == "True" and float(gap["difference"]) == pytest.approx(-0.4, abs=0.02)
    assert "pixel accuracy" in files["compare.csv"]


def test_what_is_not_comparable_is_said_and_never_mixed(make, compare):
    a, b, c, d = make("a"), make("b", keep=0.5), make("c", keep=0.6), make("d", keep=0.7)
    standard(a, 0.7, 0)
    standard(b, 0.8, 1, test="u" * 16)
    standard(c, 0.8, 2, protocol={"id": "knn/centred", "headline": 10})
    standard(d, 0.8, 3, index=np.arange(K) + 1)
    files = compare(a, b, c, d)
    gaps = {row["row"]: row for row in rows_of(files["differences.csv"])}
    assert all(row["difference"] == "" for row in gaps.values())
    assert "other test images" in gaps["b"]["why_not"]
    assert gaps["c"]["why_not"] == "by knn/centred, k=10, the reference by knn/centred, k=20: not paired"
    assert "not all images" in gaps["d"]["why_not"]
    for what in ("test images, so not comparable: nowhere (", "protocols, so not comparable: knn/centred, k=20: a, b"):
        assert f"k-NN: different {what}" in files["compare.md"]

    e = make("e", seed=1)  # a seed of a, judged on other images
    standard(e, 0.7, 4, test="u" * 16)
    text = compare(a, e, b)["compare.md"]
    line = next(line for line in text.splitlines() if line.startswith("| a (seeds 0, 1) |"))
    assert line.split("|")[2].strip() == "–"
    assert "k-NN of a (seeds 0, 1): its runs were judged on different test images" in text


def test_stale_and_missing_are_left_out_and_said(make, compare, data, tmp_path):
    a, b = make("a"), make("b", keep=0.5)
    standard(a, 0.7, 0)
    standard(b, 0.8, 1, weights_sha256="0" * 64)
    text = compare(a, b)["compare.md"]
    assert "b: k-NN is left out: of other weights (SHA-256 000000000000, now " in text
    assert {row["run"] for row in rows_of((tmp_path / "out" / "compare.csv").read_text())} == {"a"}
    write(a, "linear", {"subject": {"mean": right(0.7, 5)}})
    text = compare(a, b)["compare.md"]
    assert "linear probe of b: not evaluated" in text
    assert "could not be checked" in text  # there is no data called nowhere

    train, test, _ = labelled_splits(str(data))
    about = {
        side: {"images": 1, "fingerprint": each.fingerprint()} for side, each in (("train", train), ("test", test))
    }
    for run, share in ((a, 0.7), (b, 0.8)):
        standard(run, share, 0, data={"spec": str(data), "note": ""} | about)
    (gap,) = [row for row in rows_of(compare(a, b)["differences.csv"]) if row["column"] == "knn"]
    assert gap["difference"] != ""
    about["test"]["fingerprint"] = "0" * 16
    standard(b, 0.8, 0, data={"spec": str(data), "note": ""} | about)
    assert "of other images than" in compare(a, b)["compare.md"]
    assert f"of nowhere, not {data}" in compare(a, b, "--data", data)["compare.md"].replace("\\", "")


@pytest.mark.slow
def test_missing_evaluations_are_made_by_their_scripts(make_run, compare, script, monkeypatch, tmp_path):
    run = make_run()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RANK", "0")  # as under a launcher
    files = compare(run, "random", "--make", "knn", "--threads", "1", "--device", "cpu", run=True)
    heads = {row["run"]: row for row in rows_of(files["compare.csv"]) if row["headline"] == "True"}
    content = json.loads((run / "evaluate" / "knn.json").read_text())
    assert float(heads["run"]["value"]) == content["values"]["subject"]["mean"]["accuracy"]
    assert float(heads["random init"]["value"]) == content["values"]["random"]["mean"]["accuracy"]
    assert heads["run"]["step"] == "12"


@pytest.fixture
def started(monkeypatch):
    """Commands that would have been run: none is, and each fails."""
    commands = []
    failing = SimpleNamespace(wait=lambda: 2, terminate=lambda: None)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command) or failing)
    return commands


def test_only_what_is_missing_or_stale_is_made(make, compare, started):
    a = make("a")
    standard(a, 0.7, 0)
    files = compare(a, "--make", "knn", "layers", run=True, status=1)  # knn is there: only layers is started
    assert [command[1].rpartition("/")[2] for command in started] == ["layers.py"]
    assert "evaluate/layers.py failed with status 2" in files["compare.md"]
    standard(a, 0.7, 0, weights_sha256="0" * 64)
    with pytest.raises(Refusal, match=r"no report to compare in .*k-NN is left out: data=nowhere: no such folder"):
        compare(a, "--make", "knn", run=True)  # there is no data called nowhere
    with pytest.raises(Refusal, match=r"no report to compare in .*evaluate/knn\.py failed with status 2"):
        compare(a, "--make", "knn", "--data", "builtin", "--threads", "1", run=True)
    assert started[-1][1].endswith("knn.py")
    assert started[-1][2:] == ["--ckpt", str(a), "--data", "builtin", "--threads", "1"]


def test_uncentred_reports_of_earlier_versions_are_made_again_or_stand_apart(make, compare, started, data):
    a, b = make("a", data=str(data)), make("b", keep=0.5, data=str(data))
    train, test, _ = labelled_splits(str(data))
    sides = {
        side: {"images": 1, "fingerprint": each.fingerprint()} for side, each in (("train", train), ("test", test))
    }
    about = {"spec": str(data), "note": ""} | sides
    standard(a, 0.7, 0, data=about, protocol={"id": "knn/dino", "headline": 20})
    standard(b, 0.8, 1, data=about)
    files = compare(a, b)  # nothing may be made
    assert "protocols, so not comparable: knn/dino, k=20: a; knn/centred, k=20: b" in files["compare.md"]
    (gap,) = rows_of(files["differences.csv"])
    assert gap["difference"] == "" and "reference by knn/dino" in gap["why_not"]
    compare(a, b, "--make", "knn", run=True, status=1)
    assert [command[2:] for command in started] == [["--ckpt", str(a)]]  # of b there is one already
    compare(a, b, "patches", "--make", "knn", run=True, status=1)  # a row that no report has
    rows = ["--baselines", "random", "pixels", "patches"]
    assert [command[2:] for command in started[1:]] == [["--ckpt", str(run), *rows] for run in (a, b)]

    # of layers the k-NN curve alone is not centred; position stays
    entry = {"position": {"accuracy": 0.25, "interval": [0.2, 0.3]}, "knn": {"accuracy": 0.625, "interval": [0.6, 0.7]}}
    values = {"subject": {"layer 1": entry, "layer 2": entry}}
    titles = "position of single tokens, by layer", "k-NN of the mean token, by layer"
    for protocol, seen in (("layers/position+knn", titles[:1]), ("layers/position+knn/centred", titles)):
        write(a, "layers", {}, data=about, protocol={"id": protocol}, values=values)
        page = compare(a, b)["compare.html"]
        assert [title for title in titles if title in page] == list(seen)


# -------------------------------------------------------------------------------------------------------------- costs


def test_costs_by_hand(make, compare):
    """Two blocks of width 32 over four tokens: stem, four projections and two of the MLP, and attention."""
    about = json.loads((make("a") / "backbone.json").read_text())
    D, N, pixels = 32, 4, 8 * 8 * 3
    block = 2 * N * (4 * D * D + 8 * D * D) + 2 * 2 * N * N * D
    assert forward(about, 16) == 2 * N * pixels * D + 2 * block
    half = 2 * 2 * (12 * D * D) + 2 * 2 * 2 * 2 * D
    assert forward(about, 16, PlanSpec(0.5)) == 2 * N * pixels * D + 2 * half  # the stem sees all patches

    one = forward(about, 16)
    options = {"view": "global", "position": "full"}
    views = {"global": {"size": 16, "count": 2}}
    alone = {"views": views, "objectives": {"absolute": options | {"position": "none"}}}
    assert per_image(about, alone) == 3 * one  # one crop, forward and twice that backward
    taught = {"views": views, "objectives": {"dino": {}, "koleo": {"weight": 0.1}, "ibot": {"weight": 0.0}}}
    assert per_image(about, taught) == 2 * (3 + 1) * one  # two crops, a teacher; koleo shares dino's pass
    few = {"size": 16, "count": 3}
    crops = {"views": views | {"local": few}, "objectives": {"sigreg": {}}}  # no teacher, and the local crops too
    assert per_image(about, crops) == 3 * (2 + 3) * one
    files = compare_costs(make, compare)
    assert f"{3 * one * 3200:.2e}".replace("e+", "e") in files["compare.md"]
    assert "3,200" in files["compare.md"] and "0.014" in files["compare.md"]  # 3200 images at 64 a second


def compare_costs(make, compare):
    run = make("costs")
    standard(run, 0.7, 0)
    return compare(run)


def test_hours_of_a_run_that_was_interrupted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert hours(path, 30, 36) is None
    lines = [{"step": 10, "images_per_second": 1.0}, {"step": 15, "val/loss": 1.0},
             {"step": 20, "images_per_second": 2.0}, {"step": 40, "images_per_second": 9.0}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 50, "ima')
    assert hours(path, 20, 36) == pytest.approx((360 / 1 + 360 / 2) / 3600)
    assert hours(path, 30, 36) == pytest.approx(1.5 * (360 / 1 + 360 / 2) / 3600)  # as fast as before


def test_what_is_not_known_is_a_dash(make, compare):
    run = make("a", logs=False)
    (run / "config.yaml").unlink()
    standard(run, 0.7, 0)
    line = next(line for line in compare(run)["compare.md"].splitlines() if line.startswith("| a"))
    assert [word.strip() for word in line.split("|")[3:6]] == ["3,200", "–", "–"]


# ---------------------------------------------------------------------------------------------------------- bad input


def test_each_mistake_is_one_refusal_and_nothing_is_written(make, compare, script, tmp_path):
    a = make("a")
    standard(a, 0.7, 0)

    def refused(match, *words, **options):
        with pytest.raises(Refusal, match=match) as caught:
            compare(*words, **options)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    refused("no checkpoint at", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no checkpoint in .*found nothing", tmp_path / "empty")
    refused("is the same run as", a, f"{a}/")
    refused("is the same run as", a, a / "backbone.safetensors")
    refused("give a run too", "random", "pixels")
    refused("did you mean 'knn'", a, "--make", "kn", run=True)
    refused("--make and --no-run", a, "--make", "knn")
    refused("did you mean '--against'", a, "--againts", "a")
    bare = make("bare", keep=0.5)
    refused("no report to compare", bare)

    report, outcomes = a / "evaluate" / "knn.json", a / "evaluate" / "knn.outcomes.npz"
    whole = report.read_text()
    report.write_text(json.dumps(json.loads(whole) | {"format": 99}))
    refused("report format 99", a)
    report.write_text(whole[: len(whole) // 2])
    refused("cannot be read as a report", a)
    report.write_text(json.dumps({name: value for name, value in json.loads(whole).items() if name != "values"}))
    refused("is no report", a)
    report.write_text(json.dumps(json.loads(whole) | {"values": {"subject": {"mean": {}}}}))
    refused("is no whole report", a)
    report.write_text(whole)
    kept = outcomes.read_bytes()
    outcomes.write_bytes(kept[:-9])
    refused("does not match", a)
    outcomes.unlink()
    refused("is missing", a)
    standard(a, 0.7, 0, index=np.arange(K - 1))
    refused("outcomes do not fit each other", a)
    standard(a, 0.7, 0)
    (a / "config.yaml").write_text("[")
    refused("is not a YAML recipe", a)
    shutil.copy(a / "backbone.json", bare / "backbone.json")
    refused("does not match its backbone.json", bare)
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="cannot be written"):
        script("compare").main([str(a), "--no-run", "--out", str(tmp_path / "file" / "x")])
