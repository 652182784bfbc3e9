"""`base:` of a recipe: what it inherits, what it says itself, and mistakes, each in one line."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from common import config
from common.errors import Refusal
from evaluate.finetuning.options import FinetuneConfig
from pretrain.config import load as load_pretraining


@dataclass
class Engine:
    """An engine."""

    power: float = 1.0
    fuel: str | None = None


@dataclass
class Car:
    """A car."""

    wheels: int = 4
    colour: str = "red"
    engine: Engine = field(default_factory=Engine)
    sizes: list[float] = field(default_factory=lambda: [1.0, 2.0])
    spares: dict[str, Engine] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def written(folder: Path, **files: str) -> Path:
    """The files NAME.yaml in `folder`, and the path of the last."""
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


FAMILY = {
    "car": "wheels: 3\ncolour: 007\nsizes: [5, 6]\nengine: {power: 2, fuel: on}\nspares: {a: {}}\nextra: {a: 1}\n",
    "van": "base: car.yaml\nsizes: [7]\nengine: {power: '${wheels}'}\nspares: {b: {fuel: off}}\nextra: {b: {c: 2}}\n",
    "truck": "base: van.yaml\nwheels: 6\nengine: {fuel: null}\nextra: {a: {d: 3}}\n",
}


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("car", [], Car(3, "007", Engine(2, "on"), [5, 6], {"a": Engine(1)}, {"a": 1})),
        (
            "van", [],
            Car(3, "007", Engine(3, "on"), [7], {"a": Engine(1), "b": Engine(1, "off")}, {"a": 1, "b": {"c": 2}}),
        ),
        (
            "truck", ["colour=blue", "extra.b.c=4"],
            Car(6, "blue", Engine(6), [7], {"a": Engine(1), "b": Engine(1, "off")}, {"a": {"d": 3}, "b": {"c": 4}}),
        ),
    ],
)  # fmt: skip
def test_what_a_recipe_inherits(name: str, words: list[str], told: Car, tmp_path: Path) -> None:
    """Mappings are merged, lists replaced, texts as they were written, references those of the whole, words above."""
    written(tmp_path, **FAMILY)
    found = config.load(Car, tmp_path / f"{name}.yaml", words)
    assert found == told
    given: list[Any] = []
    config.load(Car, tmp_path / f"{name}.yaml", words, given.append)
    assert given[0]["wheels"] == told.wheels and "base" not in given[0]
    if not words:  # as those read it that do not fill a dataclass
        read: Any = OmegaConf.to_container(config.read_yaml(tmp_path / f"{name}.yaml", Car), resolve=True)
        assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Car), read)) == told
    stored = tmp_path / "stored.yaml"
    stored.write_text(config.as_yaml(found))
    for each in FAMILY:
        (tmp_path / f"{each}.yaml").unlink()
    assert "base" not in stored.read_text() and config.load(Car, stored, []) == found  # stored whole


def test_a_base_is_found_from_the_folder_of_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "own"))
    path = written(
        tmp_path, **{"own/car": "wheels: 2\n", "deep/er/van": "base: ../car.yaml\n", "deep/car": "base: ~/car.yaml\n"}
    )
    monkeypatch.chdir(tmp_path / "own")
    assert config.load(Car, tmp_path / "deep" / "er" / "van.yaml", []).wheels == 2
    path.write_text(f"base: {tmp_path}/own/car.yaml\n")
    assert config.load(Car, path, []).wheels == 2
    (tmp_path / "link.yaml").symlink_to(tmp_path / "deep" / "er" / "van.yaml")
    with pytest.raises(Refusal, match="no recipe at "):  # a link stands where it lies
        config.load(Car, tmp_path / "link.yaml", [])


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a": "base: a.yaml\n"}, r"base goes in a circle, .*/a\.yaml -> .*/a\.yaml: a recipe cannot inherit from its"),
        (
            {"c": "base: a.yaml\n", "b": "base: c.yaml\n", "a": "base: b.yaml\n"},
            r"base goes in a circle, .*/a\.yaml -> .*/b\.yaml -> .*/c\.yaml -> .*/a\.yaml: ",
        ),
        (
            {"deit_small": "wheels: 1\n", "a": "base: deit_smal.yaml\n"},
            r"no recipe at .*/deit_smal\.yaml, which .*/a\.yaml names as its base: expected a YAML file, .*folder; "
            r"did you mean 'deit_small\.yaml'\?$",
        ),
        (
            {"deit_small": "wheels: 1\n", "a": "base: deit_small\n"},
            r"no recipe at .*/deit_small, which .*/a\.yaml names as its base: .*; did you mean 'deit_small\.yaml'\?$",
        ),
        ({"a": "base: ''\n"}, r"base='' in .*/a\.yaml: expected the file of a recipe beside it, such as deit_sm"),
        ({"a": "base:\n"}, r"base=None in .*/a\.yaml: expected the file of a recipe"),
        ({"b": "wheels: 1\n", "a": "base: [b.yaml]\n"}, r"base=\['b\.yaml'\] in .*/a\.yaml: expected the file"),
        ({"b": "- 1\n", "a": "base: b.yaml\n"}, r".*/b\.yaml is not a recipe: expected `key: value` lines"),
        ({"b": "a: [\n", "a": "base: b.yaml\n"}, r".*/b\.yaml is not a YAML recipe: "),
        ({"b": "wheel: 1\n", "a": "base: b.yaml\n"}, r"unknown option 'wheel' in .*/b\.yaml; did you mean 'wheels'"),
        ({"b": "wheels: 1\n", "a": "base: b.yaml\nwheel: 1\n"}, r"unknown option 'wheel' in .*/a\.yaml; did you mean"),
        ({"b": "wheels: x\n", "a": "base: b.yaml\nwheels: 1\n"}, r"wrong value for 'wheels' in .*/b\.yaml: "),
        ({"b": "colour: '${oc.env:HOME}'\n", "a": "base: b.yaml\n"}, r"option 'colour' in .*/b\.yaml: .*resolvers"),
        ({"b": "wheels: 1\n", "a": "base: '${oc.env:HOME}'\n"}, r"option 'base' in .*/a\.yaml: .*resolvers"),
        ({"b": "wheels: 1\n", "a": "engine: {base: b.yaml}\n"}, r"unknown option 'engine\.base' in .*/a\.yaml"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_in_a_line_that_names_the_file(files: dict[str, str], told: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        config.load(Car, written(tmp_path, **files), [])
    assert re.match(told, str(refused.value)) and "\n" not in str(refused.value)


def test_a_supervised_recipe_is_named_with_its_folder() -> None:
    with pytest.raises(Refusal, match=r"no recipe at deit_base: .*did you mean 'supervised/deit_base'\?"):
        config.load(Car, config.find_recipe("deit_base", "pretrain"), [])


def test_a_base_is_no_option_of_the_command_line() -> None:
    with pytest.raises(Refusal, match=r"unknown option 'base' in command line \(base=b\.yaml\)"):
        config.load(Car, None, ["base=b.yaml"])


def test_recipes_of_both_stages_inherit(tmp_path: Path) -> None:
    configs = config.ROOT / "configs"
    path = written(
        tmp_path,
        tuned=f"base: {configs}/evaluate/finetune_small.yaml\nepochs: 7\n",
        own=f"base: {configs}/pretrain/dino.yaml\nviews: {{local: {{count: 2, size: 48}}}}\nbatch: 64\n",
    )
    made, plain = load_pretraining(path, []), load_pretraining(configs / "pretrain" / "dino.yaml", [])
    assert made.batch == 64 and made.objectives == plain.objectives and made.views["global"] == plain.views["global"]
    local, before = made.views["local"], plain.views["local"]
    assert (local.count, local.size, local.scale) == (2, 48, before.scale)
    assert local.blur_sigma == [sigma / 2 for sigma in before.blur_sigma]  # a preset fits what is said in the end
    tuned = config.load(FinetuneConfig, tmp_path / "tuned.yaml", [])
    small = config.load(FinetuneConfig, configs / "evaluate" / "finetune_small.yaml", [])
    assert tuned.epochs == 7 and tuned.mixup == small.mixup and tuned.lr == small.lr
