"""RESULTS.md: benchmarks/results.py and benchmarks/supervised.py, whose rows say of each number which it is."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from common.config import find_recipe
from common.errors import Refusal
from pretrain.config import load

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "results.py"


def module_of(name, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where its dataclasses look for it
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "RESULTS.md")
    return module


@pytest.fixture
def results(tmp_path, monkeypatch):
    return module_of("results", tmp_path, monkeypatch)


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    return module_of("supervised", tmp_path, monkeypatch)


def test_a_row_tells_centred_from_uncentred_and_may_be_judged_again(results, tmp_path, monkeypatch, capsys):
    """Reports of two seeds with numbers of their own for every row and treatment, written where the scripts would."""
    calls = []

    def entry(share):
        return {"accuracy": share, "field": {"accuracy": share - 0.1}}

    def run(script, *words):
        calls.append(script)
        folder = Path(words[words.index("--ckpt") + 1] if "--ckpt" in words else words[-2].removeprefix("run="))
        seed = int(folder.name[-1]) / 100
        (folder / "evaluate").mkdir(parents=True, exist_ok=True)
        if script == "pretrain/run.py":
            training = {
                "batch": 32,
                "audit": "clean",
                "data": "builtin",
                "images_seen": 64,
                "commit": "c",
                "precision": "fp32",
            }
            (folder / "backbone.json").write_text(json.dumps({"pooling": "mean", "training": training}))
            record = {"step": 2, "images_per_second": 320.0, "val/loss": 1.0, "val/absolute/accuracy": 0.5}
            (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
            return
        by_row = {"subject": ("mean", 0.8), "random": ("mean", 0.5), "pixels": ("pixels", 0.7)}
        share = 0.1 if script == "evaluate/linear.py" else 0.0
        values = {row: {kind: entry(value + share + seed)} for row, (kind, value) in by_row.items()}
        content = {"values": values, "hardware": {"gpu": None, "cpu": "some", "threads": 1}}
        (folder / "evaluate" / f"{Path(script).stem}.json").write_text(json.dumps(content))

    monkeypatch.setattr(results, "run", run)
    monkeypatch.setattr("sys.argv", ["results.py", "quickstart", "--seeds", "0", "2"])
    results.main()
    rows = tmp_path / "RESULTS.md"
    rows.write_text(rows.read_text() + "\n## Other figures\n\n| of another table |\n")
    monkeypatch.setattr("sys.argv", ["results.py", "quickstart", "--seeds", "0", "2", "--no-training"])
    results.main()
    own, _, other = rows.read_text().partition("\n## ")
    assert other == "Other figures\n\n| of another table |\n" and results.summary().count("\n") == 4
    assert calls.count("pretrain/run.py") == 2 and calls.count("evaluate/knn.py") == 4
    header, rule, first, again = own.splitlines()[-4:]
    names, cells = ([cell.strip() for cell in each.strip("|").split(" | ")] for each in (header, first))
    row = dict(zip(names, cells, strict=True))
    assert rule == "|" + "---|" * len(names) and first == again
    expected = {
        "k-NN, centred: random": "51.0 ± 1.4", "k-NN, centred: pixels": "71.0 ± 1.4",
        "k-NN, centred: **pretrained**": "81.0 ± 1.4", "k-NN, DINO's: pixels": "61.0 ± 1.4",
        "k-NN, DINO's: **pretrained**": "71.0 ± 1.4", "linear: random": "61.0 ± 1.4",
        "linear: **pretrained**": "91.0 ± 1.4", "linear: patches": "–", "cost": "100 ms",
        "position, held out": "50.0 ± 0.0", "seeds": "0, 2",
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected


def test_every_row_of_results_has_the_columns_of_the_header(results):
    lines, _, _ = (SCRIPT.parents[1] / "RESULTS.md").read_text().partition(results.SECTION)
    assert lines.startswith(results.heading())
    assert all(len(line.split(" | ")) == len(results.COLUMNS) for line in lines.splitlines() if line.startswith("| "))


# ------------------------------------------------------------------------------------------------------ token labels


def test_the_chain_of_token_labels_is_in_order_and_each_of_its_recipes_takes_its_words():
    from benchmarks import token_labels

    names = [training.name for training in token_labels.CHAIN]
    for training in token_labels.CHAIN:
        earlier = names[: names.index(training.name)]
        assert not training.minus or training.minus in earlier
        assert not training.init or (training.init in earlier and training.after == training.init)
        words = token_labels.words_of(training, Path("/pictures"), Path("/fashion"))
        config = load(find_recipe(words[0], "pretrain"), [word for word in words[1:] if word != "--overwrite"])
        options = config.objectives.get("token_labeling", {})
        assert config.data == ("fashion-mnist" if training.fashion else "/pictures") and config.threads == 1
        labelled = training.name.startswith(("ViT", "LV-ViT")) and "without" not in training.name
        assert (options.get("labels") is not None) == labelled
        assert config.model.init == (str(token_labels.BY_NAME[training.init].folder) if training.init else None)


def test_the_section_of_token_labels_is_written_again_and_others_stay():
    from benchmarks import token_labels

    cells = [str(number) for number in range(len(token_labels.COLUMNS))]
    before = "# Results\n\n| a row |\n\n## Other figures\n\n| of another table |\n"
    once = token_labels.written(before, [cells])
    assert once.startswith(before.rstrip("\n")) and once.count(token_labels.TITLE) == 1
    again = token_labels.written(once + "\n## Later\n\n| later |\n", [cells, cells])
    assert again.count(token_labels.line(cells)) == 2 and again.endswith("\n## Later\n\n| later |\n")
    assert again.startswith(before.rstrip("\n"))


# ------------------------------------------------------------------------------------- benchmarks/supervised.py


def test_a_share_of_the_labels_has_as_many_of_each_class_and_holds_a_smaller_one(supervised, tmp_path):
    for part, name, count in (("train", "a", 10), ("train", "b", 20), ("test", "a", 2), ("test", "b", 3)):
        (tmp_path / "data" / part / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "data" / part / name / f"{i}.png").touch()

    def drawn(share, seed):
        folder = supervised.subset(tmp_path / "data", share, seed)
        assert len(list(folder.glob("test/*/*.png"))) == 5
        return {path.relative_to(folder) for path in folder.glob("train/*/*.png")}

    some, other, few = drawn(0.5, 0), drawn(0.5, 1), drawn(0.01, 0)
    assert [sum(path.parent.name == name for path in some) for name in "ab"] == [5, 10]
    assert some != other and some == drawn(0.5, 0) and few < some and len(few) == 2
    assert supervised.subset(tmp_path / "data", 1.0, 0) == tmp_path / "data"
    with pytest.raises(Refusal, match=r"expected train/CLASS/ with images"):
        supervised.subset(tmp_path / "data" / "train", 0.5, 0)


def finished(supervised, right, index=(0, 1, 2, 3)):
    return supervised.Finished(np.array(right, bool), np.array(index), {}, {}, 1.0, None)


def test_differences_are_paired_by_seed_and_by_image(supervised):
    """Ahead by one image of four with one seed and by two with the other; the same images are right for both."""
    plain = [finished(supervised, right) for right in ([1, 0, 0, 0], [0, 0, 1, 0])]
    ahead = [finished(supervised, right) for right in ([1, 1, 0, 0], [1, 1, 1, 0])]
    value, over_images, over_seeds = supervised.difference(ahead, plain)
    assert value == pytest.approx(0.375)
    half = 12.706 * statistics.stdev([0.25, 0.5]) / 2**0.5
    assert over_seeds == pytest.approx((0.375 - half, 0.375 + half))
    assert 0 <= over_images[0] < 0.375 < over_images[1] <= 1
    assert supervised.difference(plain, plain) == (0, (0, 0), (0, 0))
    assert supervised.difference(ahead[:1], plain[:1])[2] is None  # one seed says nothing of others
    with pytest.raises(Refusal, match=r"same test images"):
        supervised.difference(ahead, [plain[0], finished(supervised, [0, 0, 0, 0], (0, 1, 2, 4))])


def test_rows_stand_in_their_section_in_place_of_their_like(supervised):
    def cells(share, variant, top):
        return [share, variant, "`words`", "500", *["x"] * (len(supervised.COLUMNS) - 5), top]

    text = supervised.written(
        "# Results\n\n| first |\n", [cells("10 %", "absolute", "old"), cells("10 %", "plain", "0")]
    )
    text = supervised.written(text + "\n## Others\n", [cells("1 %", "plain", "1"), cells("10 %", "absolute", "new")])
    assert text.startswith("# Results\n\n| first |\n\n## Supervised") and text.endswith("|\n\n## Others\n")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("1 %", "plain", "1"), ("10 %", "plain", "0"), ("10 %", "absolute", "new")
    ]  # fmt: skip


def test_every_variant_is_a_recipe_and_words_that_it_takes(supervised):
    for variant in supervised.VARIANTS:
        recipe, *words = supervised.words_of(variant, ["steps=200"])
        config = load(find_recipe(recipe, "pretrain"), [*words, *supervised.ALIKE])
        assert config.allow_leak == ("paper" in variant) and config.monitor.held_out == 0
        labels = [name for name in config.objectives if name != "classification"]
        assert labels == [name for name in ("absolute", "relative") if name in variant]
        for name in labels:
            full = config.objectives[name]["position"] == "full"
            assert config.objectives[name]["weight"] == 0.5 and full == config.allow_leak


def test_twice_as_long_is_twice_the_steps_of_the_others(supervised):
    assert supervised.words_of("plain", ["steps=200", "batch=8"]) == ["supervised/cifar10", "steps=200", "batch=8"]
    assert supervised.words_of(supervised.TWICE, ["steps=200", "batch=8"])[1:] == ["batch=8", "steps=400"]
    assert supervised.words_of(supervised.TWICE, [])[1:] == ["steps=2000"]
