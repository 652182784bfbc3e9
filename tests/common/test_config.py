"""Options: a dataclass, a recipe and words, merged strictly; mistakes are named with what was probably meant."""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from omegaconf import OmegaConf

from common import config
from common.batches.views import View, presets
from common.errors import Refusal, nearest
from common.limits import Range, check


@dataclass
class Engine:
    """An engine."""

    power: float = 1.0
    """Horses."""
    fuel: str | None = None
    """What it burns,
    over two lines."""


@dataclass
class Pump:
    """Options of a named pump, which the car does not know."""

    name: str = "pump"
    size: float = 1.0


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
    colour: str = "red"
    """Outside."""
    pump: dict[str, Any] = field(default_factory=dict, metadata={config.OPTIONS_OF: {"foot": Pump}.get})
    """Named pumps."""
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
        ("engine.fuel='1'", "'1'"),
        ("engine.fuel=007", "007"),
        ("engine.fuel=on", "on"),
        ("engine.fuel=1e3", "1e3"),
        ("engine.fuel=x/set #1", "x/set #1"),
        ("engine.fuel=~", "~"),
        ("engine.fuel= a: [b, {c ", " a: [b, {c "),
        ("engine.fuel=2026-11-26", "2026-11-26"),
        ("spares.main.fuel=no", {"main": Engine(fuel="no")}),
        ("engine={fuel: 0x1F}", Engine(fuel="0x1F")),
        ("pump.foot.name=007", {"foot": {"name": "007"}}),
        ("pump={foot: {name: off, size: 1e3}}", {"foot": {"name": "off", "size": 1e3}}),
        ("colour=null", "null"),
        ("colour=", ""),
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


# ---------------------------------------------------------------------------- beneath


def steam(given: dict[str, Any]) -> dict[str, Any] | None:
    """What lies beneath a car that burns coal."""
    if given.get("engine", {}).get("fuel") != "coal":
        return None
    return {"wheels": 6, "sizes": [8, 9], "engine": {"power": 3}, "spares": {"second": {"fuel": "coal"}}}


def test_what_lies_beneath_goes_over_defaults_and_under_what_was_said(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("engine: {fuel: coal}\nwheels: 3\n")
    car = config.load(Car, recipe, [], steam)
    assert (car.wheels, car.engine, car.sizes) == (3, Engine(3.0, "coal"), [8.0, 9.0])
    assert car.spares == {"main": Engine(), "second": Engine(fuel="coal")}
    assert config.load(Car, recipe, ["engine.power=7", "sizes=[1, 1]"], steam).engine.power == 7.0
    assert config.load(Car, recipe, ["engine.fuel=oil"], steam) == load("engine.fuel=oil", "wheels=3")
    assert config.load(Car, None, ["engine.fuel=coal"], steam).wheels == 6


def test_beneath_sees_what_was_said_and_no_default(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("engine: {power: 2}\nextra: {a: 1}\nspares: {other: {power: '${wheels}'}}\n")
    seen: list[dict[str, Any]] = []
    config.load(Car, recipe, ["engine.fuel=", "extra.b=[1]", "extra.a=2"], seen.append)
    assert seen == [
        {"engine": {"power": 2.0, "fuel": None}, "extra": {"a": 2, "b": [1]}, "spares": {"other": {"power": 4.0}}}
    ]


@pytest.mark.parametrize("word", ["engine.fule=coal", "wheels=four", "engine=3", "engine.fuel=${oil}", "wheels"])
def test_mistakes_are_found_before_anything_is_laid_beneath(word):
    with pytest.raises(Refusal):
        config.load(Car, None, [word], lambda given: pytest.fail("called"))


def test_a_preset_is_read_as_strictly_as_a_recipe():
    with pytest.raises(Refusal, match="unknown option 'wheel' in a preset; did you mean 'wheels'"):
        config.load(Car, None, [], lambda given: {"wheel": 3})


@dataclass
class Looks:
    """Options with views."""

    views: dict[str, View] = field(default_factory=lambda: {"global": View()})


def test_views_by_preset(tmp_path):
    def look(*words: str) -> dict[str, View]:
        return config.load(Looks, recipe, words, lambda given: {"views": presets(given.get("views", {}))}).views

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("views: {global: {preset: dino}, local: {preset: dino, size: 12, count: 4, flip: 0.0}}\n")
    views = look("views.global.solarise=0.0", "views.local.scale=[0.1, 0.3]")
    assert list(views) == ["global", "local"]
    assert (views["global"].count, views["global"].size, views["global"].blur) == (2, 224, [1.0, 0.1])
    assert (views["global"].solarise, views["global"].flip, views["global"].scale) == (0.0, 0.5, [0.4, 1.0])
    local = views["local"]
    assert (local.count, local.size, local.flip, local.scale) == (4, 12, 0.0, [0.1, 0.3])
    assert local.blur == 0.5 and local.blur_sigma == [0.0125, 0.25]
    assert look("views.global.count=1")["global"].blur == [1.0]
    assert look("views.global.preset=null")["global"] == View()
    with pytest.raises(Refusal, match=r"views.local.preset='dinno' in .* one of dino, dinov2; did you mean 'dino'"):
        look("views.local.preset=dinno")
    with pytest.raises(Refusal, match=r"view: blur=\[0.5\]: expected a probability, or a list .* count=4"):
        look("views.local.blur=[0.5]")


# ---------------------------------------------------------------------------- texts and references


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("08", 8), ("1_000", 1000), ("0x10", 16), ("1:30", None)])
def test_numbers_are_decimal(tmp_path, text, value):
    """YAML reads 010 as 8, and 1:30 as 90."""
    (tmp_path / "recipe.yaml").write_text(f"wheels: {text}")
    for words, given in (([f"wheels={text}"], {}), ([], {"recipe": tmp_path / "recipe.yaml"})):
        if value is None:
            with pytest.raises(Refusal, match=r"wrong value for 'wheels' in .*1:30"):
                load(*words, **given)
        else:
            assert load(*words, **given).wheels == value


def test_texts_in_a_recipe_are_as_written(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "colour: 007\nengine: &e {fuel: on, power: 1e3}\nwheels: 0x10\n"
        "pump: {foot: {name: 1_000, size: 2e0}, hand: 1}\n"
        "spares: {main: {fuel: ~}, second: {<<: *e, power: 4}, third: {fuel: 2026-11-26}, fourth: {fuel: '1'}}\n"
    )
    car = load(recipe=recipe)
    assert (car.colour, car.engine, car.wheels) == ("007", Engine(1000.0, "on"), 16)
    assert car.pump == {"foot": {"name": "1_000", "size": 2.0}, "hand": 1}
    assert [spare.fuel for spare in car.spares.values()] == [None, "on", "2026-11-26", "1"]
    assert car.spares["second"].power == 4.0
    recipe.write_text("colour: ~\n")
    with pytest.raises(Refusal, match=r"wrong value for 'colour' in .*recipe.yaml"):
        load(recipe=recipe)


def test_references_to_other_options_stay():
    car = load("colour=${engine.fuel}-${sizes[1]}", "engine.fuel=coal", "extra.name=${colour}")
    assert car.colour == "coal-2.0" and car.extra == {"name": "coal-2.0"}


@pytest.mark.parametrize(
    "value",
    [
        *("${oc.env:SECRET}", "x/${oc.env:SECRET,no}", "${oc.decode:'1'}", "${${colour}:SECRET}", "${mine:1}"),
        *("${ oc.env : SECRET }", "${oc.create:${oc.env:SECRET}}", r"\${oc.env:SECRET}", "${engine.${oc.env:SECRET}}"),
    ],
)
@pytest.mark.parametrize("option", ["engine.fuel", "extra.deep", "wheels"])
def test_resolvers_are_refused_by_name_and_never_called(tmp_path, monkeypatch, option, value):
    monkeypatch.setenv("SECRET", "hush")
    monkeypatch.setattr(OmegaConf, "resolve", lambda *_: pytest.fail("something was resolved"))
    words = [f"{option}={value}"] if "'" not in value or option == "engine.fuel" else [f'{option}="{value}"']
    recipe = tmp_path / "recipe.yaml"
    head, _, last = option.rpartition(".")
    recipe.write_text(f"{head}: {{{last}: {json.dumps(value)}}}\n" if head else f"{last}: {json.dumps(value)}\n")
    for given in ({"recipe": recipe}, {"words": words}):
        with pytest.raises(Refusal) as refusal:
            config.load(Car, given.get("recipe"), given.get("words", []), lambda said: None)
        assert "resolvers" in str(refusal.value) and "hush" not in str(refusal.value)
        assert option in str(refusal.value) and value.split(":")[0] in str(refusal.value).replace("\\\\", "\\")


def test_a_resolver_put_together_from_references_is_refused(monkeypatch):
    monkeypatch.setenv("SECRET", "hush")
    with pytest.raises(Refusal, match=r"engine\.fuel.*once references are resolved.*resolvers") as refusal:
        load("colour=$", "engine.fuel=${colour}{oc.env:SECRET}")
    assert "hush" not in str(refusal.value)


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("wheel=3", ["unknown option 'wheel'", "command line (wheel=3)", "did you mean 'wheels'?", "--help"]),
        ("engine.pwoer=3", ["unknown option 'engine.pwoer'", "did you mean 'engine.power'"]),
        ("engin.power=3", ["unknown option 'engin'", "did you mean 'engine'"]),
        ("spares.main.fule=oil", ["unknown option 'spares.main.fule'"]),
        ("taste=red", ["unknown option 'taste'", "--help lists all"]),
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
    (tmp_path / "quickstart").write_text("steps: 1")  # the name goes before a file or folder that is called so
    (tmp_path / "run").mkdir()
    assert (
        config.find_recipe("quickstart", "pretrain") == shipped and config.run_or_recipe("quickstart") == "quickstart"
    )
    assert config.find_recipe("./quickstart", "pretrain").resolve() == tmp_path / "quickstart"
    assert config.run_or_recipe("run") == str(tmp_path / "run")
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


@dataclass
class Tyres:
    """Options with limits."""

    studs: Literal["yes", "no"] = "yes"
    """Whether they have any."""
    bar: Annotated[float | None, Range(above=0, at_most=5)] = None
    """Pressure."""
    tread: Annotated[list[float], Range(at_least=0, length=2, rising=True)] = field(default_factory=lambda: [1.0, 2.0])
    """In millimetres."""
    spare: Annotated[int, Range(at_least=0, at_most=2)] = 1


def test_choices_and_ranges_are_told_and_refused():
    assert config.load(Tyres, None, ["studs=no"]).studs == "no"  # the word, not YAML's false
    text = config.describe(Tyres)
    assert "studs=yes  (yes|no)" in text and "bar=null  (float or null, above 0, at most 5)" in text
    with pytest.raises(Refusal, match=r"studs='noo' in command line .*: expected one of yes, no; did you mean 'no'"):
        config.load(Tyres, None, ["studs=noo"])
    check(Tyres(bar=5.0, spare=0))
    for options, message in (
        (Tyres(bar=0.0), "car.bar=0.0: expected a number above 0, at most 5"),
        (Tyres(bar=math.nan), "car.bar=nan: expected a number above 0, at most 5"),
        (Tyres(tread=[2.0, 1.0]), "car.tread=[2.0, 1.0]: expected two numbers of at least 0, the smaller one first"),
        (Tyres(spare=3), "car.spare=3: expected a whole number from 0 to 2"),
        (Tyres(spare=True), "car.spare=True: expected a whole number from 0 to 2"),
        (Tyres(spare=None), "car.spare=None: expected a whole number from 0 to 2"),  # type: ignore[arg-type]
    ):
        with pytest.raises(Refusal, match=f"^{re.escape(message)}$"):
            check(options, "car.")
    with pytest.raises(Refusal, match=r"^--bar -1\.0: expected"):
        check(Tyres(bar=-1.0), flags=True)


def test_flat():
    assert config.flat({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}


def test_nearest():
    assert nearest("absolut", ["absolute", "relative"]) == "; did you mean 'absolute'?"
    assert nearest("xyz", ["absolute", "relative"]) == ""
    assert "or" in nearest("ab1", ["ab2", "ab3"])


def test_a_key_that_yaml_takes_for_a_truth_value(tmp_path):
    """YAML 1.1 reads the key `on` as true; iRPE has an option of that name."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("extra: {on: qk, off: [{on: yes}]}\nwheels: 3\n")
    assert config.load(Car, recipe, []).extra == {"on": "qk", "off": [{"on": True}]}
    assert config.load(Car, None, ["extra={on: k}"]).extra == {"on": "k"}
    assert config.load(Car, None, ["extra.on=k"]).extra == {"on": "k"}
