"""Configuration: a dataclass, a YAML recipe and `key=value` words, merged strictly.

A field's docstring is the string below it in the source; `--help` prints it with the default, and with the choices or
the range beside its type: see `limits`. A text option (`str`, or a choice of words) is exactly what was typed, in words
and in recipes: 007, on and 1e3 are texts, and so is null where the option may not be null. A value may refer to another
option, ${model.name}; it never calls a resolver of OmegaConf, ${oc.env:NAME}.

A recipe may begin with `base: deit_small.yaml`, a file beside it (or a path from its folder): what that file says holds
wherever this one says nothing. Mappings are merged, lists replaced.
"""

import ast
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from .errors import Refusal, nearest
from .limits import Range, choices_of, expected, parts_of
from .paths import PLACE, expanded, if_there
from .printable import printable
from .processes.launch import ROOT

T = TypeVar("T")
BASE = "base"  # of a recipe: the one that it inherits from
OPTIONS_OF = "options_of"  # metadata of a dict[str, Any]: name of an entry -> the dataclass of its options, or None
REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")  # to another option


def load(
    schema: type[T],
    recipe: Path | None,
    words: Sequence[str],
    beneath: Callable[[dict[str, Any]], Mapping[str, Any] | None] | None = None,
) -> T:
    """An instance of the dataclass `schema`: its defaults, then the YAML `recipe`, then `key=value` words.

    `beneath` sees what recipe and words say together, without the defaults, and may return values to lie between the
    defaults and the recipe: presets. Raises Refusal for an unknown key (with the nearest known), a value of
    the wrong type, or a file that is no recipe.
    """
    given = [] if recipe is None else _with_bases(recipe, schema)

    def above(config: DictConfig) -> DictConfig:
        for path, content in given:
            config = merge(config, content, str(path), schema)
        return override(config, words, schema)

    defaults = OmegaConf.structured(schema)
    config = above(defaults)
    if beneath is not None:
        typed = (_typed(word, schema) for word in words)
        said = OmegaConf.to_container(OmegaConf.merge({}, *(content for _, content in given), *typed))
        config = above(merge(defaults, beneath(_as_read(said, _container(config))) or {}, "a preset", schema))
    return to_object(config, schema)


def _as_read(said: Any, read: Any) -> Any:
    """The values `read` (typed, references resolved), reduced to those keys that were `said`."""
    if isinstance(said, dict) and isinstance(read, dict):
        return {key: _as_read(value, read[key]) for key, value in said.items()}
    return read


def _container(config: DictConfig) -> Any:
    """The values of `config`, references resolved. Raises Refusal."""
    try:
        refuse_resolvers(OmegaConf.to_container(config), "the options")
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise Refusal(f"option {error.full_key!r}: {str(error).splitlines()[0]}") from None
    refuse_resolvers(values, "the options, once references are resolved")  # a: $, b: ${a}{oc.env:NAME}
    return values


def refuse_resolvers(values: Any, where: str, option: str = "") -> None:
    """Raises Refusal if a text among the nested `values` holds `${` and is no reference to another option.

    Resolvers read the environment and decode text: what they return would be written to every run folder.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            refuse_resolvers(key, where, option)
            refuse_resolvers(value, where, f"{option}.{key}" if option else str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            refuse_resolvers(value, where, option)
    elif isinstance(values, str) and "${" in values:
        rest, count = values, 1
        while count:  # from the innermost one outwards: ${views.${view}.size}
            rest, count = REFERENCE.subn("_", rest)
        if "${" in rest or "\\${" in values:
            raise Refusal(
                f"option {option!r} in {where}: {values!r} is no plain reference: expected one to another option, such "
                "as ${model.name}; resolvers (${oc.env:…} and the like) are never called, so write the value itself"
            )


def override(config: DictConfig, words: Sequence[str], schema: type) -> DictConfig:
    """`config` with the `key=value` words merged in. Raises Refusal."""
    for word in words:
        config = merge(config, _typed(word, schema), f"command line ({word})", schema)
    return config


def _typed(word: str, schema: type) -> DictConfig:
    """Read the word key=value: of a text option the text as it was typed, of another one YAML. Raises Refusal."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise Refusal(f"{word!r} is not understood: expected key=value, such as steps=100; --help lists the keys")
    names = re.findall(r"[^.\[\]]+", key)
    kind, options_of = _kind_at(schema, names)
    if not _is_text(kind):
        try:
            typed = f"{key}={_texts_quoted(text, kind, options_of)}"  # model={init: 007}, steps=010
            return _keys_as_written(OmegaConf.from_dotlist([typed]))
        except Exception as error:  # YAML's scanner has errors of its own
            raise Refusal(f"{word!r} cannot be read as key=value: {error}") from error
    value: Any = None if type(None) in typing.get_args(kind) and text in ("", "null") else text
    for name in reversed(names):
        value = {name: value}
    return OmegaConf.create(value)


def _kind_at(schema: Any, names: Sequence[str]) -> tuple[Any, Any]:
    """(type of the option at the path `names` below a dataclass, its `OPTIONS_OF`); None where that is not known."""
    kind, options_of = schema, None
    for name in names:
        if options_of is not None:
            kind, options_of = options_of(name), None
        elif dataclasses.is_dataclass(kind):
            item = next((each for each in dataclasses.fields(kind) if each.name == name), None)
            options_of = item.metadata.get(OPTIONS_OF) if item is not None else None
            kind = typing.get_type_hints(kind)[name] if item is not None else None
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    return kind, options_of


def _is_text(kind: Any) -> bool:
    return bool(choices_of(kind)) or kind is str or set(typing.get_args(kind)) == {str, type(None)}


def merge(config: DictConfig, given: Any, where: str, schema: type) -> DictConfig:
    """`config` with `given` merged in, strictly. Raises Refusal that names `where` and the nearest known key."""
    refuse_resolvers(OmegaConf.to_container(given) if OmegaConf.is_config(given) else given, where)
    try:
        merged = OmegaConf.merge(config, given)
    except ConfigKeyError as error:
        unknown = error.full_key or str(error.key)
        names = [name for name, *_ in fields(schema)]
        known = {*names, *(name.rpartition(".")[0] for name in names if "." in name)}  # groups too: modle.name
        raise Refusal(f"unknown option {unknown!r} in {where}{nearest(unknown, known)}; --help lists all") from None
    except OmegaConfBaseException as error:
        names = re.findall(r"[^.\[\]]+", error.full_key or "")
        value = functools.reduce(lambda inner, name: inner.get(name) if hasattr(inner, "get") else None, names, given)
        if names and choices_of(kind := _kind_at(schema, names)[0]) and (wanted := expected(kind, value)):
            raise Refusal(f"{error.full_key}={value!r} in {where}: {wanted}") from None
        of = f" for {error.full_key!r}" if error.full_key else ""  # a number where a group of options belongs has none
        raise Refusal(f"wrong value{of} in {where}: {str(error).splitlines()[0]}") from None
    assert isinstance(merged, DictConfig)
    return merged


def to_object(config: DictConfig, schema: type[T]) -> T:
    """The dataclass instance behind a merged config. Raises Refusal if a value is missing or refers to nothing."""
    try:
        _container(config)
        OmegaConf.resolve(config)
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise Refusal(f"option {error.full_key!r}: {str(error).splitlines()[0]}") from None
    assert isinstance(result, schema)
    _put_in_place(result)
    return result


def _put_in_place(options: Any) -> None:
    """Make the paths among `options` absolute, in place: see `paths`."""
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if dataclasses.is_dataclass(value):
            _put_in_place(value)
        elif PLACE in item.metadata and value is not None:
            setattr(options, item.name, item.metadata[PLACE](value))


def as_yaml(options: Any) -> str:
    """The options, a dataclass or its OmegaConf, in YAML. Raises Refusal for text that a UTF-8 file cannot hold: of a
    path whose bytes are of another encoding."""
    structured = options if isinstance(options, DictConfig) else OmegaConf.structured(options)
    for name, value in flat(OmegaConf.to_container(structured)).items():
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise Refusal(
                f"{name}={printable(value)}: a path that is no UTF-8 text under this locale cannot be stored in "
                "config.yaml: rename the folder, or give a link to it of another name"
            ) from None
    return OmegaConf.to_yaml(structured)


def read_yaml(path: Path, schema: Any = None) -> DictConfig:
    """A YAML mapping over that of its `base`, in which the text options of `schema` are as they were written. Raises
    Refusal if one of them is missing, unreadable or no mapping, or calls a resolver."""
    try:
        merged = OmegaConf.merge({}, *(content for _, content in _with_bases(path, schema)))
    except OmegaConfBaseException as error:
        raise Refusal(f"{path} does not fit its base: {' '.join(str(error).split())}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _with_bases(path: Path, schema: Any, above: tuple[Path, ...] = ()) -> list[tuple[Path, DictConfig]]:
    """The recipe and those it inherits from, the lowest first. `above`: those that inherit from it. Raises Refusal."""
    if path.resolve() in [each.resolve() for each in above]:
        way = " -> ".join(str(each) for each in (*above, path))
        raise Refusal(f"{BASE} goes in a circle, {way}: a recipe cannot inherit from itself")
    if above and not path.is_file():
        others = {each.name for each in path.parent.glob("*.yaml")} - {each.name for each in above}
        raise Refusal(
            f"no recipe at {path}, which {above[-1]} names as its {BASE}: expected a YAML file, its path relative to "
            f"that recipe's folder{nearest(path.name, sorted(others))}"
        )
    content = _read_one(path, schema)
    if BASE not in content:
        return [(path, content)]
    values: Any = OmegaConf.to_container(content)
    base = values.pop(BASE)
    if not isinstance(base, str) or not base:
        raise Refusal(f"{BASE}={base!r} in {path}: expected the file of a recipe beside it, such as deit_small.yaml")
    return [*_with_bases(path.parent / expanded(base), schema, (*above, path)), (path, OmegaConf.create(values))]


def _read_one(path: Path, schema: Any) -> DictConfig:
    """The YAML mapping of one file, as `read_yaml` has it."""
    try:
        content = OmegaConf.create(_texts_quoted(path.read_text(encoding="utf-8-sig"), schema))
    except FileNotFoundError:
        raise Refusal(f"no recipe at {path}: expected a YAML file{_recipes_nearby(path)}") from None
    except Exception as error:
        raise Refusal(f"{path} is not a YAML recipe: {' '.join(str(error).split())}") from None
    if not isinstance(content, DictConfig):
        raise Refusal(f"{path} is not a recipe: expected `key: value` lines")
    written = _keys_as_written(content)
    refuse_resolvers(OmegaConf.to_container(written), str(path))
    return written


def _texts_quoted(text: str, kind: Any, options_of: Any = None) -> str:
    """The YAML `text` of a `kind` with quotes around the values of its text options."""
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    if tree is not None:
        _quote_texts(tree, kind, options_of)
    return "" if tree is None else yaml.serialize(tree, Dumper=yaml.SafeDumper)


def _quote_texts(node: yaml.Node, kind: Any, options_of: Any = None) -> None:
    """Put quotes around the values of text options in the YAML tree of a `kind`, in place: YAML would read `run: 007`
    as a number. What stands for null, and in YAML ~ and nothing do too, stays so. Numbers are decimal: 010 is not 8,
    nor is 1:30 90."""
    if isinstance(node, yaml.ScalarNode):
        if _is_text(kind):
            if not node.tag.endswith((":str", ":null")):
                node.tag, node.style = "tag:yaml.org,2002:str", '"'
        elif node.tag.endswith((":int", ":float")) and ":" in node.value:
            node.tag, node.style = "tag:yaml.org,2002:str", '"'
        elif node.tag.endswith(":int") and re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            node.value = str(int(node.value.replace("_", "")))
    elif isinstance(node, yaml.SequenceNode):
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
        for each in node.value:
            _quote_texts(each, inner)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == "<<":  # of a merged anchor, or of a list of them
                for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    _quote_texts(each, kind, options_of)
            elif options_of is not None:
                _quote_texts(value, options_of(key.value))
            elif isinstance(key, yaml.ScalarNode):
                _quote_texts(value, *_kind_at(kind, [key.value]))


def _keys_as_written(content: DictConfig) -> DictConfig:
    """`content` with the keys "on" and "off", which YAML 1.1 reads as true and false: an option of iRPE is `on`."""

    def written(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                {True: "on", False: "off"}.get(k, k) if isinstance(k, bool) else k: written(v) for k, v in value.items()
            }
        return [written(each) for each in value] if isinstance(value, list) else value

    made = OmegaConf.create(written(OmegaConf.to_container(content)))
    assert isinstance(made, DictConfig)
    return made


def find_recipe(word: str, stage: str) -> Path:
    """The file a recipe argument means: a path, the name of one of configs/<stage>, or FOLDER/NAME of any other."""
    path = Path(expanded(word))
    named = ROOT / "configs" / (path.parent if len(path.parts) == 2 else stage) / f"{path.stem}.yaml"
    as_path = path.is_file() and word != path.stem  # a file here that is called quickstart is ./quickstart
    return named if not as_path and len(path.parts) <= 2 and named.exists() else path


def run_or_recipe(word: str) -> str:
    """The absolute path of a run or a recipe, if it is there; the name of a shipped recipe as it is."""
    return word if find_recipe(word, "pretrain").is_relative_to(ROOT / "configs") else if_there(word)


def _recipes_nearby(path: Path) -> str:
    shipped = sorted((ROOT / "configs").glob("*/*.yaml"))
    supervised = [item.stem for item in shipped if item.parent.name == "supervised"]
    others = [item.stem for item in shipped if item.parent.name != "supervised"]
    meant = nearest(path.stem, [*others, *supervised])
    if path.stem in supervised:  # of that folder, which has to be said
        meant = f"; did you mean 'supervised/{path.stem}'?"
    return f"{meant}; shipped recipes: {', '.join(others)}, configs/supervised"


def fields(schema: Any, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """(dotted name, type, default, docstring) of every option of a dataclass, nested ones included."""
    documentation = _docstrings(schema)
    hints = typing.get_type_hints(schema, include_extras=True)
    for item in dataclasses.fields(schema):
        name = prefix + item.name
        if item.default is not dataclasses.MISSING:
            default = item.default
        elif item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        else:
            default = "(required)"
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{name}.")
            continue
        yield name, _type_name(hint), default, documentation.get(item.name, "")
        if typing.get_origin(hint) is dict and dataclasses.is_dataclass(entry := typing.get_args(hint)[1]):
            yield from fields(entry, f"{name}.<name>.")  # dict[str, View]: options of every named entry


def _type_name(hint: Any) -> str:
    parts = parts_of(hint)
    if len(parts) > 1:
        limits = [f", {part}" for part in parts if isinstance(part, Range)]
        return " or ".join(_type_name(part) for part in parts if not isinstance(part, Range)) + "".join(limits)
    if hint is Any or hint is type(None):
        return "any" if hint is Any else "null"
    if choices := choices_of(hint):
        return "|".join(choices)
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _docstrings(schema: Any) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {name: text for base in schema.__bases__ if base is not object for name, text in _docstrings(base).items()}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            texts[statement.target.id] = " ".join(below.value.value.split())
    return texts


def describe(schema: Any, prefix: str = "") -> str:
    """The options of a dataclass as text for --help."""
    lines = []
    for name, kind, default, documentation in fields(schema, prefix):
        lines.append(f"  {name}={_shown(default)}  ({kind})")
        lines += textwrap.wrap(documentation, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if dataclasses.is_dataclass(value) or (
        isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values()))
    ):
        return "{...}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted key: value}."""
    if not isinstance(config, dict) or not config:
        return {prefix.rstrip("."): config}
    return {name: value for key, inner in config.items() for name, value in flat(inner, f"{prefix}{key}.").items()}


def command_line() -> str:
    """The command that is running, as one would type it."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
