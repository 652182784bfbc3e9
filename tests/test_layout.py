"""The rules of design and style that a machine can check: who imports whom, what files are called, what is told."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("common", "pretrain", "evaluate")
TORCH_ONLY = (
    "common/positions",
    "common/models/plan",
    "common/features/metrics",
    "common/features/neighbors",
    "pretrain/heads",
)  # what people copy into projects of their own
NAMELESS = {"utils", "helpers", "misc", "base"}  # where unnamed ideas hide
LINES, FILES, PARAMETERS, BODY = 500, 12, 10, 60  # of a file, a folder, a function, a function's lines
# run by path, imported by nobody, and what only they import
BY_PATH = {"common.data.make_extract", "common.data.__main__", "common.inspecting"}
# Strings of a file, or parts of them where there is a space, that name a paper, a preset, a protocol or published
# weights, and no objective of that name.
PAPERS = {
    "common/batches/views.py": {"dino"},
    "evaluate/comparison/reports.py": {"knn/dino"},
    "evaluate/knn.py": {"knn/dino"},
    "evaluate/linear.py": {"sweep, dino"},
    "evaluate/probing/protocols.py": {"dino", "ibot"},
    "evaluate/selftest.py": {"dino", "knn/dino", "linear/dino+augment", "timm:vit_small_patch16_224.dino"},
    "pretrain/distillation/collapse.py": {"add koleo"},  # advice
}
# By Source, NamedFiles, Objective, Positional, nn.Module, ArgumentParser.
DESCRIBED = {
    "read", "name", "identity", "forward", "error", "begin_step", "before_update", "after_step", "teachers", "verdict",
    "connect", "changed", "views_of", "answers", "size", "sample", "stamps",
}  # fmt: skip
READABLE = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".ini", ".json"}
PUBLIC = ("http://arxiv.org", "https://arxiv.org", "https://github.com", "https://huggingface.co", "file://$$wheel",
          "http://ns.adobe.com/xap", "https://git-lfs",  # an XMP segment, a pointer
          "http://HOST/")  # fmt: skip


def files() -> list[Path]:
    """What is in the repository, or would be after `git add .`; without git, all but environments and output."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode == 0 and listing.stdout:
        found = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        ignored = {"runs", "build", "dist", "__pycache__"}
        found = [
            path
            for path in ROOT.rglob("*")
            if not any(part in ignored or part.startswith((".venv", ".git")) for part in path.relative_to(ROOT).parts)
            and not any(part.startswith(".") and part != ".ci" for part in path.relative_to(ROOT).parts[:-1])
            and not any(part.endswith(".egg-info") for part in path.parts)
        ]
    return sorted(path for path in set(found) if path.is_file())


def sources(*folders: str) -> list[Path]:
    return [path for path in files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


def scripts(folder: str) -> list[Path]:
    return [path for path in sources(folder) if path.parent == ROOT / folder and not path.name.startswith("_")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import of a file, wherever it stands; level 0 is absolute."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from ((node.level, f"{module}.{alias.name}".strip(".")) for alias in node.names)


def reached(path: Path) -> set[str]:
    """First parts of what a file imports absolutely."""
    return {name.split(".")[0] for level, name in imports(path) if level == 0}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sources(*STAGES)}


def modules_met(module: str) -> set[str]:
    """Modules of ours that a module imports, wherever the import stands."""
    path, met = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for level, name in imports(path):
        if level:
            above = package.split(".")[: len(package.split(".")) - level + 1]
            name = ".".join([*above, name])
        met.add(name if name in MODULES else name.rpartition(".")[0])
    return (met & set(MODULES)) - {module}


GRAPH = {module: modules_met(module) for module in MODULES}


def test_modules_import_each_other_in_no_circle() -> None:
    """Imports inside functions count, and so do those for types alone."""
    graphlib.TopologicalSorter(GRAPH).prepare()


@pytest.mark.parametrize("stage", ["pretrain", "evaluate"])
def test_every_module_of_common_is_reached_from_both_stages(stage: str) -> None:
    """What one stage alone needs stands in its own folder."""
    seen: set[str] = set()
    waiting = [module for module in MODULES if module.split(".")[0] == stage]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += GRAPH[module] | ({module.rpartition(".")[0]} & set(MODULES))  # its package is imported first
    alone = {module for module in MODULES if module in BY_PATH or module.rpartition(".")[0] in BY_PATH}
    assert not {module for module in MODULES if module.split(".")[0] == "common"} - seen - alone


@pytest.mark.parametrize("path", sources(*STAGES), ids=name_of)
def test_stages_meet_only_in_common(path: Path) -> None:
    stage = path.relative_to(ROOT).parts[0]
    if stage == "common" and "if not __package__:" in path.read_text():
        return  # run by path, imported by nobody
    strangers = {"common": {"common", "pretrain", "evaluate"}, "pretrain": {"evaluate"}, "evaluate": {"pretrain"}}
    met = reached(path) & ({*strangers[stage], "poslabel", "tests", "benchmarks"})
    assert not met, f"{name_of(path)} imports {met}; inside common/ imports are relative, so that poslabel.common works"
    depth = len(path.relative_to(ROOT).parts) - 1  # `..x` in common/models/y.py is common.x; `...x` leaves common
    assert all(level <= depth for level, _ in imports(path)), f"{name_of(path)} imports from outside its stage"


@pytest.mark.parametrize("module", TORCH_ONLY)
def test_imports_only_torch(module: str) -> None:
    path = ROOT / f"{module}.py"
    allowed = {*TORCH_ONLY, "common/errors", "common/limits", "common/numerics"}
    foreign = {name.split(".")[0] for name in reached(path)} - set(STAGES)
    assert foreign <= {"torch", *sys.stdlib_module_names}
    assert {ours.replace(".", "/") for ours in GRAPH[dotted(path)]} <= allowed


def test_only_pretrain_automatic_gives_options_a_value() -> None:
    """Options are resolved once, by a pure function; what is measured is a copy with more values."""
    for path in sources(*STAGES):
        assigned = re.findall(r"^\s*\w*\.?(?:config|options)(?:\.\w+)+ [-+*/|]?= .*$", path.read_text(), re.MULTILINE)
        assert not assigned, name_of(path)


@pytest.mark.slow
def test_what_we_depend_on_does_not_import_a_package_named_evaluate() -> None:
    """Where the checkout stands first on the path, `import evaluate` is ours and not Hugging Face's."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import {}; assert 'evaluate' not in sys.modules"
    names = "torch, torchvision, timm, accelerate, omegaconf, datasets, tensorboard, PIL, matplotlib, tqdm"
    subprocess.run([sys.executable, "-c", code.format(names), str(ROOT)], check=True, timeout=200)


def test_entry_scripts_mend_the_path_first() -> None:
    """`python evaluate/knn.py` puts evaluate/ first on sys.path: mended before the first import of ours."""
    for path in [
        *scripts("evaluate"),
        *(ROOT / "pretrain" / name for name in ("run.py", "audit.py", "generate_labels.py")),
    ]:
        text = path.read_text()
        mending = text.find("if not __package__:")
        ours = re.search(r"^from (common|pretrain|evaluate)\b", text, re.MULTILINE)
        assert 0 <= mending < (ours.start() if ours else len(text)), name_of(path)


def test_names_say_something() -> None:
    assert not [name_of(path) for path in files() if path.stem in NAMELESS or path.parent.name in NAMELESS]
    assert not [name_of(path) for path in files() if not re.fullmatch(r"[\w./-]+", name_of(path))]


def test_text_files_name_their_encoding() -> None:
    """Else a locale decides, and what one run wrote another cannot read."""
    lacking = []
    for path in sources("common", "pretrain", "evaluate", "benchmarks"):
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
                continue
            attribute = isinstance(node.func, ast.Attribute)
            name = getattr(node.func, "attr" if attribute else "id", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            modes = [word.value for word in node.keywords if word.arg == "mode"] + node.args[0 if attribute else 1 :]
            mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else "r"
            text = (
                name == "open"
                and owner not in ("os", "io", "Image", "gzip", "webbrowser", "Run")
                and "b" not in str(mode)
            )
            if name in ("read_text", "write_text") or text:
                lacking.append(f"{name_of(path)}:{node.lineno}: {name}(…) needs encoding=")
    assert not lacking


def test_files_are_short() -> None:
    long = {name_of(path): len(path.read_text().splitlines()) for path in files() if path.suffix == ".py"}
    assert not {name: lines for name, lines in long.items() if lines > LINES}


def test_folders_are_small() -> None:
    folders = Counter(path.parent for path in sources(*STAGES, "tests", "benchmarks") if not path.name.startswith("__"))
    assert not {name_of(folder) for folder, count in folders.items() if count > FILES}


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef))


def parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [each.arg for each in every if each.arg not in ("self", "cls", "ctx")]


def test_functions_are_short_and_take_few_parameters() -> None:
    every = [(f"{name_of(path)} {node.name}", node) for path in sources(*STAGES) for node in functions(path)]
    assert not {name for name, node in every if len(parameters(node)) > PARAMETERS}
    assert not {name for name, node in every if (node.end_lineno or 0) - node.lineno + 1 > BODY}


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Texts that stand for themselves: docstrings, also of fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    begins = re.compile(r"(Of|As|Those|Who|Whose)\b")
    bad = {
        name_of(path)
        for path in sources(*STAGES)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and begins.match(ast.get_docstring(node) or "")
    }
    assert not bad


def test_objectives_are_named_in_their_folder_alone() -> None:
    """What other code must know of an objective are attributes of its class."""
    names = [path.stem for path in sources("pretrain") if path.parent.name == "objectives" and path.stem != "__init__"]
    every = "|".join(names)
    words = re.compile(
        rf"(?:{every})(?:/.*)?$|.*objectives\.(?:{every})\b|.*\b(?:dino|ibot|koleo|token_labels)\b", re.S
    )
    named: set[tuple[str, str]] = set()
    for path in sources(*STAGES):
        if path.parent == ROOT / "pretrain" / "objectives":
            continue
        tree = parsed(path)
        described = {id(text) for text in docstrings(tree)}
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in described]
        named |= {(name_of(path), text) for text in texts if isinstance(text, str) and words.match(text)}
    used = set()
    for file, text in named:
        known = {one for one in PAPERS.get(file, ()) if text == one or (" " in one and one in text)}
        assert known, f"{file}: {text}"
        used |= {(file, one) for one in known}
    assert used == {(file, one) for file, texts in PAPERS.items() for one in texts}  # no exception that is not needed


def undocumented(path: Path, met: set[str]) -> Iterator[str]:
    """What lacks a docstring: the module, public classes, and functions and methods of classes named in `met`.

    A method that a base class or protocol of ours describes need not say it again.
    """
    tree = parsed(path)
    wanted: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]] = [("", tree)] if tree.body else []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            wanted.append((node.name, node))
            methods = [method for method in node.body if isinstance(method, ast.FunctionDef) and node.name in met]
            wanted += [(f"{node.name}.{method.name}", method) for method in methods if method.name not in DESCRIBED]
        elif isinstance(node, ast.FunctionDef) and node.name in met:
            wanted.append((node.name, node))
    for name, node in wanted:
        if not name.rpartition(".")[2].startswith("_") and not ast.get_docstring(node):
            yield f"{name_of(path)} {name}"


def test_what_others_use_is_documented() -> None:
    met = {name.split(".")[-1] for path in sources(*STAGES) for _, name in imports(path)}
    assert not [name for path in sources("common", "pretrain") for name in undocumented(path, met)]


def text_of(path: Path) -> str:
    return path.read_text() if path.suffix in READABLE or path.name in ("Makefile", "run") else ""


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    """Homes, scratch folders and package mirrors belong to a machine, not to a repository."""
    places = re.compile(r"/(?:work|home|root|opt|Users|mnt)/[\w.]+|[a-z]+://[^\s)>\"'`]+")
    found = [
        f"{name_of(path)}: {place}"
        for path in files()
        if path != Path(__file__).resolve()
        for place in places.findall(text_of(path))
        if not place.startswith(PUBLIC)
    ]
    assert not found


def test_constraints_are_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[0-9][0-9a-z.]*", line)]


def test_every_folder_and_every_dependency_is_in_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    folders = {path.parent.relative_to(ROOT).as_posix() for path in sources(*STAGES)}
    listed = {name.replace(".", "/") for name in re.findall(r'"poslabel\.([\w.]+)",', text)}
    assert listed - {"configs"} == folders
    dependencies = text[text.index("dependencies = [") : text.index("[project.optional-dependencies]")]
    declared = {name.lower() for name in re.findall(r'"([\w-]+)>=', dependencies)} | {"pil", "yaml"}
    extra = {
        name.replace("-", "_")
        for name in re.findall(r'^(?:segmentation|torchcodec|simplejpeg) = \["([\w-]+)>=', text, re.MULTILINE)
    }
    used = set().union(*(reached(path) for path in sources(*STAGES))) - set(sys.stdlib_module_names) - set(STAGES)
    assert {name.lower() for name in used} - extra <= declared and extra <= used
    assert declared - {"pillow", "pyyaml", "tensorboard"} <= {name.lower() for name in used}  # torch imports it for us
