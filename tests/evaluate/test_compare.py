"""evaluate/compare.py: seeds grouped, differences paired, stale and missing reports, costs, the page, each mistake."""

import csv
import html.parser
import json
import re
import shutil
import statistics
import subprocess

import numpy as np
import pytest
from PIL import Image

from common import bootstrap
from common.checkpoint import sha256
from common.comparison import html as markup
from common.comparison.costs import forward, hours, per_image
from common.errors import Refusal
from common.plan import PlanSpec

K = 200  # test images
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}
PROTOCOLS = {"knn": {"id": "knn/dino", "headline": 20}, "linear": {"id": "linear/sweep"}}


def right(share, seed, seeds=1):
    """Outcomes (S, K): each of the K images has a difficulty of its own, common to all who are asked."""
    difficulty = np.random.default_rng(0).random(K)
    luck = np.random.default_rng(seed + 1).normal(0, 0.1, (seeds, K))
    return difficulty + luck < share


@pytest.fixture
def make(tmp_path):
    """make("a", seed=0, keep=1.0) -> a run folder with config, weights (not of any model) and description."""

    def run(name, seed=0, keep=1.0, logs=True, **training):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "backbone.safetensors").write_bytes(name.encode())
        training = {"seed": seed, "data": "nowhere", "data_root": None, "step": 100, "steps": 100, "batch": 32,
                    "images_seen": 3200, "recipe": "tiny", "audit": "clean"} | training  # fmt: skip
        about = {"format": 1, "name": "vit_tiny_patch16_224", "kwargs": VIT, "size": [16, 16], "mean": [0.5] * 3,
                 "std": [0.5] * 3, "crop": 1.0, "position": "none", "pooling": "mean", "training": training,
                 "weights_sha256": sha256(folder / "backbone.safetensors")}  # fmt: skip
        (folder / "backbone.json").write_text(json.dumps(about))
        options = {"weight": 1.0, "keep": keep, "position": "none", "context": 1.0, "view": "global"}
        config = {"run": str(folder), "seed": seed, "views": {"global": {"size": 16, "count": 1}},
                  "objectives": {"absolute": options}}  # fmt: skip
        (folder / "config.yaml").write_text(json.dumps(config))
        if logs:
            records = [{"step": at, "loss": 3 - at / 50, "images_per_second": 64.0} for at in range(10, 101, 10)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        return folder

    return run


def write(run, name, rows, *, test="t" * 16, index=None, protocol=None, **changes):
    """A minimal report as report.write makes it; rows: {row: {kind: outcomes (S, K)}}."""
    folder = run / "evaluate"
    folder.mkdir(exist_ok=True)
    arrays = {f"{row}/{kind}": each for row, kinds in rows.items() for kind, each in kinds.items()}
    np.savez_compressed(folder / f"{name}.outcomes.npz", index=np.arange(K) if index is None else index, **arrays)
    values = {
        row: {kind: {"accuracy": each.mean(), "interval": [0.0, 1.0], "std": None} for kind, each in kinds.items()}
        for row, kinds in rows.items()
    }
    content = {
        "format": 1, "evaluation": name, "protocol": protocol or PROTOCOLS[name], "subject": {"name": run.name},
        "weights_sha256": json.loads((run / "backbone.json").read_text())["weights_sha256"], "step": 100,
        "data": {"spec": "nowhere", "note": "", "train": {"images": 9, "fingerprint": "train"},
                 "test": {"images": K, "fingerprint": test, "judged": K}},
        "values": values, "seeds": [0], "command": f"{name}.py <&>", "hardware": {"cpu": "some"}, "versions": {},
        "outcomes": {"file": f"{name}.outcomes.npz", "sha256": sha256(folder / f"{name}.outcomes.npz")},
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(content | changes, default=float))


def standard(run, share, seed, **changes):
    """A k-NN report with baselines."""
    rows = {"subject": {"class": right(share - 0.2, seed), "mean": right(share, seed)},
            "random": {"mean": right(0.4, 90)}, "pixels": {"pixels": right(0.6, 91)}}  # fmt: skip
    write(run, "knn", rows, **changes)


@pytest.fixture
def compare(script, tmp_path):
    """compare(words...) -> {file name: text} of what was written; --no-run unless `run`."""
    main = script("compare").main

    def call(*words, run=False, status=0):
        out = tmp_path / "out"
        assert main([*map(str, words), "--out", str(out), *([] if run else ["--no-run"])]) == status
        return {path.name: path.read_text() for path in out.iterdir()}

    return call


def rows_of(text):
    return list(csv.DictReader(text.splitlines()))


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
    assert (
        b["features"] == "mean" and b["std_over_seeds"] == "" and b["protocol"] == "knn/dino" and b["setting"] == "k=20"
    )

    gaps = {row["row"]: row for row in rows_of(files["differences.csv"])}
    expected = bootstrap.difference(right(0.80, 2), both)
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
        value = bootstrap.estimate(counts)
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
    standard(c, 0.8, 2, protocol={"id": "knn/dino", "headline": 10})
    standard(d, 0.8, 3, index=np.arange(K) + 1)
    files = compare(a, b, c, d)
    gaps = {row["row"]: row for row in rows_of(files["differences.csv"])}
    assert all(row["difference"] == "" for row in gaps.values())
    assert "other test images" in gaps["b"]["why_not"]
    assert gaps["c"]["why_not"] == "by knn/dino, k=10, the reference by knn/dino, k=20: not paired"
    assert "not all images" in gaps["d"]["why_not"]
    for what in ("test images, so not comparable: nowhere (", "protocols, so not comparable: knn/dino, k=20: a, b, d;"):
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

    from common.data import labelled_splits

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
    files = compare(run, "random", "--run", "knn", "--threads", "1", "--device", "cpu", run=True)
    heads = {row["run"]: row for row in rows_of(files["compare.csv"]) if row["headline"] == "True"}
    content = json.loads((run / "evaluate" / "knn.json").read_text())
    assert float(heads["run"]["value"]) == content["values"]["subject"]["mean"]["accuracy"]
    assert float(heads["random init"]["value"]) == content["values"]["random"]["mean"]["accuracy"]
    assert heads["run"]["step"] == "12"


def test_only_what_is_missing_or_stale_is_made(make, compare, monkeypatch):
    """Commands only: none is run."""
    a = make("a")
    standard(a, 0.7, 0)
    started = []
    failing = lambda command, **_: started.append(command) or subprocess.CompletedProcess(command, 2)  # noqa: E731
    monkeypatch.setattr(subprocess, "run", failing)
    files = compare(a, "--run", "knn", "layers", run=True, status=1)  # knn is there: only layers is started
    assert [command[1].rpartition("/")[2] for command in started] == ["layers.py"]
    assert "evaluate/layers.py failed with status 2" in files["compare.md"]
    standard(a, 0.7, 0, weights_sha256="0" * 64)
    with pytest.raises(Refusal, match=r"no report to compare in .*k-NN is left out: data=nowhere: no such folder"):
        compare(a, "--run", "knn", run=True)  # there is no data called nowhere
    with pytest.raises(Refusal, match=r"no report to compare in .*evaluate/knn\.py failed with status 2"):
        compare(a, "--run", "knn", "--data", "builtin", "--threads", "1", run=True)
    assert started[-1][1].endswith("knn.py")
    assert started[-1][2:] == ["--ckpt", str(a), "--data", "builtin", "--threads", "1"]


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


# --------------------------------------------------------------------------------------------------------------- page


class Checker(html.parser.HTMLParser):
    """Notes unbalanced tags, what would be requested, and what says nothing to who cannot see."""

    VOID = ("meta", "link", "img", "path", "circle")

    def __init__(self, text):
        super().__init__()
        self.open, self.faults, self.tags = [], [], []
        self.feed(text)
        self.faults += self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag not in self.VOID or (tag == "path" and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)
        if tag == "script" or any(name.startswith("on") for name in given):
            self.faults.append(tag)
        for name in ("src", "href"):
            if not given.get(name, "data:").startswith("data:"):
                self.faults.append(given[name])
        if (tag == "img" and not given.get("alt")) or (tag == "th" and "scope" not in given):
            self.faults.append(given)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")


def illustrated(make):
    """Two runs with everything that a page shows."""
    runs = [make('a<b>&"x'), make("b", keep=0.5)]
    for at, run in enumerate(runs):
        standard(run, 0.7 + 0.05 * at, at)
        for place, name in (
            ("pictures", "board-00000100"),
            ("pictures", "board-00000050"),
            ("evaluate/explain", "maps"),
        ):
            (run / place).mkdir(exist_ok=True, parents=True)
            Image.fromarray(np.full((40, 2000 if name == "maps" else 60, 3), 90 * at, np.uint8)).save(
                run / place / f"{name}.png"
            )
    return runs


def test_page_is_whole_escaped_and_asks_for_nothing(make, compare):
    a, b = illustrated(make)
    (b / "evaluate" / "explain" / "maps.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    text = compare(a, b, "random", "pixels")["compare.html"]
    checked = Checker(text)
    assert checked.faults == []
    assert "a<b>" not in text and "a&lt;b&gt;&amp;&quot;x" in text and "knn.py &lt;&amp;&gt;" in text
    assert not re.search(r"https?:|url\(|@import", text)
    pictures = [given for tag, given in checked.tags if tag == "img"]
    assert len(pictures) == 3 and "Cannot be read: maps.png" in text  # the newest board of each, and a's maps
    assert sorted(int(given["width"]) for given in pictures) == [60, 60, markup.WIDEST]
    assert sum(tag == "svg" for tag, _ in checked.tags) >= 3 and ("html", {"lang": "en"}) in checked.tags
    assert text.count("<details>") == 1 + 2  # all numbers of k-NN, and a card for each report
    assert "fingerprint tttttttttttttttt" in text and "objectives.absolute.keep=0.5" in text


def test_charts_by_hand():
    drawn = markup.chart("loss", [markup.Curve("one", [0, 10, 20], [1.0, float("nan"), 3.0], 0)], "step")
    x = 46 + 304, 46  # left edge 46, and 304 wide; the value axis goes from 1 to 3
    assert f"M{x[1]}.0 176.0L{x[0]}.0 8.0" in drawn and "1 to 3" in drawn
    assert markup.chart("nothing", [markup.Curve("one", [0], [float("nan")], 0)], "step") == ""
    assert markup.ticks(0.62, 0.71, 5) == [0.62, 0.64, 0.66, 0.68, 0.7, 0.72]
    assert markup.ticks(5, 5, 5)[0] <= 5 < markup.ticks(5, 5, 5)[-1]
    assert markup.tag("p", "<", markup.tag("b", "x"), class_="y", title=None) == '<p class="y">&lt;<b>x</b></p>'


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
    refused("did you mean 'knn'", a, "--run", "kn", run=True)
    refused("--run and --no-run", a, "--run", "knn")
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


# ------------------------------------------------------------------------------------------------------------ browser

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
]  # fmt: skip
PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({width: innerWidth,
needs: document.documentElement.scrollWidth, pictures: [...document.images].map(image => image.naturalWidth),
requests: performance.getEntriesByType("resource").map(one => one.name.slice(0, 5)).filter(one => one != "data:")}),
"*"));</script></body>"""
FRAME = """<!doctype html><title>frame</title><link rel="icon" href="data:,"><pre id="found"></pre><script>
addEventListener("message", event => document.getElementById("found").textContent = event.data);</script>
<iframe width="{width}" height="1200" style="border: 0" srcdoc="{page}"></iframe>"""  # Chromium's windows start at 500


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1600])
def test_page_in_a_browser(make, compare, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    text = compare(*illustrated(make), "random", "pixels")["compare.html"]
    framed = tmp_path / "framed.html"
    framed.write_text(FRAME.format(width=width, page=html.escape(text.replace("</body>", PROBE))))

    def look(*flags):
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [browser, *FLAGS, profile, f"--window-size={width + 20},1300", *flags],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    dom = look("--dump-dom", framed.as_uri())
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom)[1]))
    assert len(found["pictures"]) == 4 and min(found["pictures"]) > 0
    assert found["requests"] == [] and found["needs"] <= found["width"] == width  # only tables scroll sideways
    look(f"--screenshot={tmp_path / 'shot.png'}", framed.as_uri())
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.width == width + 20 and np.asarray(shot.convert("L")).std() > 5  # something is drawn
    look(f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "out" / "compare.html").as_uri())
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"
