"""Options that are paths: ~ is the home folder, and what is stored holds in every working directory."""

from pathlib import Path

import pytest

from common.config import find_recipe, load
from common.data.location import OPTIONS
from common.errors import Refusal
from evaluate.job import subjects
from evaluate.segmenting.options import SegmentationConfig
from pretrain import config
from pretrain.command import parse, read, written

RECIPE = "steps: 1\nobjectives: {absolute: {}}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, with a home beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("by", ["words", "recipe"])
def test_paths_are_absolute_and_names_stay(here, by):
    for folder in ("set", "old", "roots", "builtin", "timm:vit"):
        (here / folder).mkdir()
    (here.parent / "home" / "w.bin").touch()
    given = {"run": "007", "data": "set", "data_root": "roots", "model.init": "old", "model.weights": "~/w.bin"}
    given |= {"data_train": "~/t", "data_label": "~"}
    recipe = here / "recipe.yaml"
    lines = [f"{name}: {value}" for name, value in given.items() if "." not in name and value != "~"]
    lines += ["data_label: '~'", "model: {init: old, weights: ~/w.bin}"]
    recipe.write_text(RECIPE + "\n".join(lines) * (by == "recipe"))
    found = config.load(recipe, [f"{name}={value}" for name, value in given.items()] * (by == "words"))
    assert (found.run, found.data, found.data_root) == (str(here / "007"), str(here / "set"), str(here / "roots"))
    assert (found.model.init, found.model.weights) == (str(here / "old"), str(here.parent / "home" / "w.bin"))
    assert (found.data_train, found.data_label) == (str(here.parent / "home" / "t"), "~")
    named = config.load(None, ["steps=1", "data=builtin", "model.init=timm:vit", "run=null"])
    assert (named.data, named.model.init, named.run) == ("builtin", "timm:vit", None)
    assert load(SegmentationConfig, None, ["like=quickstart"]).like == "quickstart"
    assert load(SegmentationConfig, None, ["like=old"]).like == str(here / "old")


def test_a_run_is_resumed_from_anywhere(here, monkeypatch):
    recipe = here / "recipe.yaml"
    recipe.write_text(RECIPE)
    run = here.parent / "home" / "runs"
    run.mkdir()
    options = config.load(recipe, ["run=~/runs", "data_train=part", "data_label=007"])
    (run / "config.yaml").write_text(written(options, {}))
    for place in (here.parent, here):
        monkeypatch.chdir(place)
        again, folder = read(parse(["--resume", "~/runs", "data_validation=dev"], ""))
        assert folder == run and again.run == str(run)
        assert (again.data_train, again.data_validation, again.data_label) == ("part", "dev", "007")
    with pytest.raises(Refusal, match=r"model\.init \(None -> .*\).*may change: .*data_train"):
        read(parse(["--resume", "~/runs", "model.init=home"], ""))
    stored = (run / "config.yaml").read_text().replace(f"run: {run}", "run: runs")  # as it was stored once
    (run / "config.yaml").write_text("\n".join(line for line in stored.splitlines() if not line.startswith("data_")))
    again, _ = read(parse([f"--resume={run}"], ""))
    assert again.run == str(run) and again.data_label is None


def test_a_recipe_goes_before_a_folder_of_its_name(here):
    (here / "quickstart").mkdir()
    assert find_recipe("quickstart", "pretrain").name == "quickstart.yaml"
    about = subjects.subject_of("random", "quickstart").description["training"]
    assert about == dict.fromkeys(OPTIONS.values()) | {"data": "builtin"}
    (here / "mine.yaml").write_text(RECIPE + "data: 0123\nviews: {global: {size: 32}}\nmodel: {kwargs: {depth: 1}}\n")
    assert subjects.subject_of("random", "mine.yaml").description["training"]["data"] == "0123"
    assert find_recipe("~/x.yaml", "pretrain") == Path(here.parent / "home" / "x.yaml")
