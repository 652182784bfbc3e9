"""Options: a dataclass, a recipe and words, merged strictly; mistakes are named with what was probably meant."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from common import config
from common.errors import Refusal, nearest


@dataclass
class Engine:
    """An engine."""

    power: float = 1.0
    """Horses."""
    fuel: str | None = None
    """What it burns,
    over two lines."""


@dataclass
class Car:
    """A car."""

    wheels: int = 4
    """How many."""
    fast: bool = False
    """Whether it is."""
    engine: Engine = field(default_factory=Engine)
    spares: dict[str, Engine] = field(default_factory=lambda: {"main": Engine()})
    """Named engines."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything."""
    sizes: list[float] = field(default_factory=lambda: [1.0, 2.0])
    """Two numbers."""
    _undocumented: int = 0


def load(*words: str, recipe=None) -> Car:
    return config.load(Car, recipe, words)


# ---------------------------------------------------------------------------- merging


def test_defaults_then_recipe_then_words(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("wheels: 3\nengine: {power: 2}\nextra: {a: 1}\n")
    car = load("wheels=5", "extra.b=[1, 2]", recipe=recipe)
    assert isinstance(car, Car) and isinstance(car.engine, Engine)
    assert (car.wheels, car.engine.power, car.fast) == (5, 2.0, False)
    assert car.extra == {"a": 1, "b": [1, 2]} and isinstance(car.extra["b"], list)


def test_later_words_win():
    assert load("wheels=5", "wheels=6").wheels == 6


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("engine.fuel=null", None),
        ("engine.fuel=", None),
        ("engine.fuel=coal", "coal"),
        ("engine.fuel=a=b", "a=b"),
        ("engine.fuel='1'", "1"),
        ("engine.power=1e-3", 0.001),
        ("engine.power=3", 3.0),
        ("fast=true", True),
        ("sizes=[3,4]", [3.0, 4.0]),
        ("extra.deep.down=1", {"deep": {"down": 1}}),
        ("spares.other.power=7", {"main": Engine(), "other": Engine(7.0)}),
    ],
)
def test_values(word, value):
    found: Any = load(word)
    for name in word.partition("=")[0].split("."):
        found = getattr(found, name)
        if isinstance(found, dict):
            break
    assert found == value and type(found) is type(value)


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("wheel=3", ["unknown option 'wheel'", "command line (wheel=3)", "did you mean 'wheels'?", "--help"]),
        ("engine.pwoer=3", ["unknown option 'engine.pwoer'", "did you mean 'engine.power'"]),
        ("engin.power=3", ["unknown option 'engin'", "did you mean 'engine'"]),
        ("spares.main.fule=oil", ["unknown option 'spares.main.fule'"]),
        ("colour=red", ["unknown option 'colour'", "--help lists all"]),
        ("wheels=four", ["'wheels'", "command line (wheels=four)", "four", "Integer"]),
        ("wheels=4.5", ["'wheels'", "4.5", "Integer"]),
        ("wheels=", ["'wheels'", "None", "int"]),
        ("fast=perhaps", ["'fast'", "perhaps", "bool"]),
        ("engine.power=[1]", ["'engine.power'", "command line"]),
        ("engine=3", ["wrong value in command line (engine=3)", "Engine"]),
        ("sizes=3", ["'sizes'"]),
        ("wheels", ["'wheels' is not understood", "expected key=value", "steps=100"]),
        ("=3", ["'=3' is not understood"]),
        ("extra={a", ["cannot be read as key=value"]),
        ("engine.fuel=${oil}", ["engine.fuel", "oil"]),
    ],
)
def test_a_wrong_word_is_refused(word, parts):
    with pytest.raises(Refusal) as refusal:
        load(word)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("wheel: 3", ["unknown option 'wheel'", "did you mean 'wheels'"]),
        ("engine: {pwoer: 1}", ["engine.pwoer", "engine.power"]),
        ("wheels: many", ["'wheels'", "many"]),
        ("- 1\n- 2", ["is not a recipe: expected `key: value` lines"]),
        ("a: [1", ["is not a YAML recipe"]),
        ("just words", ["unknown option 'just words'"]),
        ("", []),
    ],
)
def test_a_wrong_recipe_is_refused_by_its_name(tmp_path, content, parts):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    if not parts:
        assert load(recipe=recipe) == Car()
        return
    with pytest.raises(Refusal) as refusal:
        load(recipe=recipe)
    for part in [*parts, str(recipe)]:
        assert part in str(refusal.value)


def test_bytes_are_no_recipe(tmp_path):
    recipe = tmp_path / "photo.jpg"
    recipe.write_bytes(b"\xff\xd8\xff\xe0" * 9)
    with pytest.raises(Refusal, match="is not a YAML recipe"):
        load(recipe=recipe)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(Refusal, match="is not a YAML recipe"):
        load(recipe=tmp_path)


def test_a_missing_recipe_names_those_that_ship(tmp_path):
    with pytest.raises(Refusal, match=r"no recipe at .*quikstart.yaml.*did you mean 'quickstart'.*shipped recipes: "):
        load(recipe=tmp_path / "quikstart.yaml")


def test_recipes_are_found_by_name_unless_a_file_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = config.ROOT / "configs" / "pretrain" / "quickstart.yaml"
    assert config.find_recipe("quickstart", "pretrain") == config.find_recipe("quickstart.yaml", "pretrain") == shipped
    (tmp_path / "quickstart.yaml").write_text("")
    assert config.find_recipe("quickstart.yaml", "pretrain").resolve() == tmp_path / "quickstart.yaml"
    assert not config.find_recipe("configs/quickstart.yaml", "pretrain").exists()


# ---------------------------------------------------------------------------- help


def test_every_option_has_its_docstring_type_and_default():
    text = config.describe(Car)
    for line in (
        "  wheels=4  (int)\n      How many.",
        "  fast=false  (bool)",
        "  engine.power=1.0  (float)\n      Horses.",
        "  engine.fuel=null  (str or null)\n      What it burns, over two lines.",
        "  spares={...}",
        "  spares.<name>.power=1.0  (float)",
        "  extra={}  (dict[str, any])",
    ):
        assert line in text.replace("Any", "any"), line
    assert config.describe(Engine, "x.").startswith("  x.power=1.0")


def test_flat():
    assert config.flat({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}


def test_nearest():
    assert nearest("absolut", ["absolute", "relative"]) == "; did you mean 'absolute'?"
    assert nearest("xyz", ["absolute", "relative"]) == ""
    assert "or" in nearest("ab1", ["ab2", "ab3"])
