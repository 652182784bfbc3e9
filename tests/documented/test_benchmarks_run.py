"""Every benchmark that README.md and docs/ show is made with few rounds of small models, and prints its table."""

import contextlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from documented.commands import ROOT, call, module_of, part, split
from runs.children import training_here

from common.errors import Refusal

FEW = {
    "positions": ["--model", "vit_tiny_patch16_224", "--size", "64", "--batch", "2", "--rounds", "1",
                  "--threads", "1", "--precision", "fp32", "--variant", "absolute (linear)"],
    "backbones": ["--pair", "sp-vit", "--size", "64", "--batch", "1", "--rounds", "1", "--precision", "fp32"],
    "dino_step": ["--model", "vit_tiny_patch16_224", "--size", "64", "--local-size", "32", "--local-crops", "2",
                  "--batch", "2", "--prototypes", "256", "--rounds", "1", "--threads", "1", "--precision", "fp32"],
    "loader": ["--images", "8", "--rounds", "1"],
    "indexing": ["--entries", "3000"],
    "labels": ["--images", "8", "--rounds", "1"],
    "launch": ["--steps", "12", "--rounds", "1"],
    "probe": ["--images", "64", "--batch", "32", "--rounds", "1"],
}  # fmt: skip  # words that shorten a benchmark
LOADERS = [
    r"one crop of 224 +images/s",
    r"  timm's create_loader +\d+ +\d+\.\d\d",
    r"DINO's crops, 2 of 224 and 8 of 96 +to (?:ImageFolder|datasets|timm)",
    r"  ours, cache=256, normalised +\d+\.\d\dx, target 5\.0x: (?:holds|MISSED)",
    r"28x28 arrays",
]
CACHES = [
    r"  cache=256 +\d+ +\d+\.\d\d",
    r"  cache=full: grey levels from no cache: global 0\.00 \(90 % below 0\.00\), local 0\.00",
    r"  bilinear: grey levels from no cache: global \d\.\d\d",
]
ROWS = {
    "python benchmarks/positions.py": [
        r"absolute \(linear\) +\d+\.\d +\d\.\d+ +\d\.\d+ +1\.05",
        r"absolute \(linear\) +[\d,]+ +\d\.\d+ +[\d,]+ +\d\.\d+",
        " +16 +256 +49 +[0-9]+ +1 +[0-9.]+$",
    ],
    "python benchmarks/positions.py pairs": [" +16 +256 +49 +[0-9]+ +1 +[0-9.]+$"],
    "python benchmarks/backbones.py": [
        r"\| SP-ViT-S \| \d+\.\d \| \d\.\d+ \|",
        r"\| SP-ViT-S \| [\d.]+ \| [\d.]+ \|.* 1\.15 \|",
        r"\| SP-ViT-S \| [\d,]+ \| \d\.\d+ \| [\d,]+ \| \d\.\d+ \| 1\.1 \|",
    ],
    "python benchmarks/backbones.py time --pair stem --size 32 --batch 64 --precision fp32 --rounds 15": [
        r"\| with a stem of 200 filters \| \d+\.\d \|"
    ],
    "python benchmarks/loader.py": LOADERS,
    "python benchmarks/loader.py --photographs '~/labelled/train'": LOADERS,
    "python benchmarks/loader.py --scaled --photographs '~/labelled/train'": [
        r"large: DINO's crops, 2 of 224 and 8 of 96 +images/s",
        r"  decoded to .*1/4: \d+%",
    ],
    "python benchmarks/loader.py --decoders": [
        "decoding, files as they are, 3 channels",
        "decoding, 32x32, 1 channel ",
    ],
    "python benchmarks/loader.py --sources '~/labelled/train' '~/archives/train.tar'": [
        r"reading +images/s",
        r"  ~/archives/train\.tar +\d+ +\d+\.\d\d",
    ],
    "python benchmarks/loader.py --device --photographs '~/labelled/train'": [
        r"  device: decode, decide upon crops +\d+ +\d+\.\d\d",
        r"  local crops, \d+: \d+\.\d{4}% of the values are equal",
    ],
    "python benchmarks/indexing.py": [r"train\.tar +\d+\.\d\d s ", r"train +\d+\.\d\d s .*of a worker's own"],
    "python benchmarks/loader.py --cache --images 256 --photographs '~/labelled/train'": CACHES,
    "python benchmarks/labels.py": ["  one packed file +[0-9]+ +[01].[0-9]+", "bound: 0.95 .* packed: [01].[0-9]+"],
    "python benchmarks/launch.py": [r"start-up to the first step +\d+\.\d s", r"two processes.* \d+ img/s +\d\.\d\dx"],
    "python benchmarks/probe.py --threads 1 --images 640 --rounds 3": [r'\{"heads": \d+\.\d+, "cache_52": '],
}  # lines that are printed
LIGHTLY = [command for command in part("benchmarks/") if "dino_step" in command]
SUPERVISED = part("benchmarks/supervised.py")
TOKENS = part("benchmarks/token_labels.py")
NATURAL = [command for command in part("benchmarks/results.py") if "--natural" in command]
RESULTS = [command for command in part("benchmarks/results.py") if "--table" not in command and command not in NATURAL]


def test_every_benchmark_is_run() -> None:
    table = ["python benchmarks/results.py --table"]
    assert sorted([*ROWS, *LIGHTLY, *NATURAL, *RESULTS, *SUPERVISED, *TOKENS, *table]) == part("benchmarks/")


@pytest.mark.slow
@pytest.mark.parametrize("command", ROWS)
def test_a_benchmark_prints_its_table(
    command: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, words = split(command)
    module = module_of(script)
    if "positions" in script:
        monkeypatch.setattr(module, "SIDES", (4,))  # its grids of 14, 20 and 28 take a minute
    few = FEW[Path(script).stem]
    few = few[2:] if few[0] in words else few  # --pair: that of the command
    with training_here():
        assert call(module, [*words, *few], monkeypatch) == 0
    out = capsys.readouterr().out
    assert [row for row in ROWS[command] if not re.search(f"^{row}", out, re.MULTILINE)] == []


@pytest.mark.parametrize("command", LIGHTLY)
def test_a_benchmark_asks_for_a_package(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing installs lightly; where somebody has, the benchmark is run."""
    script, words = split(command)
    with training_here():
        if importlib.util.find_spec("lightly") is None:
            with pytest.raises(Refusal, match=r"the package lightly is not installed: pip install .*lightly"):
                call(module_of(script), words, monkeypatch)
            return
        assert call(module_of(script), [*words, *FEW["dino_step"]], monkeypatch) == 0
    wanted = (
        ["whole step +"] if "parts" in words else [r"ours \(fp32, fused\) +\d+\.\d", r"ours \(fp32, fused\) +[\d,]+ "]
    )
    out = capsys.readouterr().out
    assert [row for row in wanted if not re.search(f"^{row}", out, re.MULTILINE)] == []


def test_the_table_of_results_is_that_of_readme(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(module_of("benchmarks/results.py"), ["--table"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert out.count("\n") > 3 and out in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", RESULTS)
def test_a_row_is_written(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two steps of each seed, judged on few images; its scripts run in this process."""
    script, words = split(command)
    module = module_of(script)
    monkeypatch.setattr(module, "ROOT", home)
    monkeypatch.setattr(module, "RESULTS", home / "RESULTS.md")

    def run(script: str, *words: str) -> None:
        more = ["steps=2", "epochs=null", "threads=1", "log_every=1", "monitor.most=8", "monitor.bank=8"]
        with training_here(), monkeypatch.context() as patch:
            more = more if script == "pretrain/run.py" else []
            assert call(module_of(script), [*words, *more], patch) == 0

    monkeypatch.setattr(module, "run", run)
    words = [word.replace("=PATH", f"={home}/fashion") for word in words]
    assert call(module, [*words, "--judge", str(home / "labelled"), "--linear", "--epochs", "1"], monkeypatch) == 0
    header, _, row = (home / "RESULTS.md").read_text().splitlines()[-3:]
    names, cells = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in (header, row))
    by_name = dict(zip(names, cells, strict=True))
    assert by_name["seeds"] == "0, 1, 2" and by_name["images seen"] == "64"
    assert all(re.fullmatch(r"\d+\.\d ± \d+\.\d", cell) for name, cell in by_name.items() if ": " in name)


@pytest.mark.slow
@pytest.mark.parametrize("command", SUPERVISED)
def test_variants_of_supervised_training_have_rows(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two steps of each seed; its scripts run in this process, one after the other."""
    script, words = split(command)
    module = module_of(script)
    monkeypatch.setattr(module, "ROOT", home)
    monkeypatch.setattr(module, "RESULTS", home / "RESULTS.md")
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda jobs: contextlib.nullcontext(SimpleNamespace(map=map)))
    (home / "RESULTS.md").write_text("# Results\n")

    def run(script: str, words: list[str], log: Path) -> None:
        with log.open("a") as file, contextlib.redirect_stdout(file), training_here(), monkeypatch.context() as patch:
            assert call(module_of(script), list(words), patch) == 0

    monkeypatch.setattr(module, "run", run)
    short, some = ["steps=2", "batch=4", "log_every=1"], ["absolute", "absolute, as in the paper"]
    few = [words[0], *short, *words[1:], "--seeds", "0", "1", "--variants", *some]
    assert call(module, few, monkeypatch) == 0
    rows = [line.strip("| ").split(" | ") for line in (home / "RESULTS.md").read_text().splitlines() if " | " in line]
    by_name = {cells[1]: dict(zip(module.COLUMNS, cells, strict=True)) for cells in rows[1:]}
    assert list(by_name) == ["plain", "absolute", "absolute, as in the paper (LEAK allowed)"]
    assert [row["operations"] for row in by_name.values()] == ["1.0", "2.0", "1.0"]
    assert all((row["labels"], row["steps"], row["seeds"]) == ("10 %", "2", "0, 1") for row in by_name.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rows_of_equal_time_are_written_and_pictures_drawn(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By eight steps of two rows; its scripts run in this process. The second command reads what the first left."""
    from benchmarks.natural import rows, running, table

    patched = (
        (table, "RESULTS", home / "RESULTS.md"),
        (table, "PICTURES", home / "pictures"),
        (rows, "RUNS", home / "n"),
    )
    short = ((running, "SHORT", 4), (running, "LINE", 2), (running, "ROUNDS", 1), (running, "steps_in", lambda *_: 8))
    fewer = ((running, "EIGHTHS", (4,)), (table, "EIGHTHS", (4,)))
    for module, name, value in (*patched, *short, *fewer):
        monkeypatch.setattr(module, name, value)
    monkeypatch.delitem(rows.BASELINES, "patches")
    scripts = []

    def run(script: str, words: list[str], log: Path) -> None:
        scripts.append(script)
        more = ["--epochs", "1"] if script == "evaluate/linear.py" else []
        with training_here(), monkeypatch.context() as patch:
            assert call(module_of(script), [*words, *more], patch) == 0

    monkeypatch.setattr(running, "run", run)
    (home / "RESULTS.md").write_text("# Results\n")
    few = ["batch=4", "threads=1", "log_every=2", "loader.workers=0", "monitor.most=4", "monitor.bank=8"]
    few += ["model.kwargs.patch_size=8", "model.kwargs.embed_dim=24", "model.kwargs.depth=2"]
    whole, again = (split(command)[1] for command in sorted(NATURAL, key=len))
    whole = [word.replace("~", str(home)) for word in whole]
    assert call(module_of("benchmarks/results.py"), [*whole, *few, "--seeds", "0", "--rows", "MP3"], monkeypatch) == 0
    text = (home / "RESULTS.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 60 ")]
    assert [row[1] for row in cells] == ["untrained", "pixels", "absolute", "MP3"]
    named = [dict(zip(table.COLUMNS, row, strict=True)) for row in cells]
    assert [row["audit"] for row in named[2:]] == ["clean", "clean"] and named[3]["images seen"] == "32"
    assert all(re.fullmatch(r"\d+\.\d", row[name]) for row in named for name in table.MEASURES.values())
    pictures = sorted((home / "pictures").iterdir())
    assert [path.name for path in pictures] == ["natural_curves.png", "natural_positions.png"]
    count = len(scripts)
    assert call(module_of("benchmarks/results.py"), [*again, *few, "--seeds", "0"], monkeypatch) == 0
    assert len(scripts) == count and (home / "RESULTS.md").read_text() == text


class Inline:
    """Does at once what it is given."""

    def submit(self, function: Callable[..., None], *given: object) -> SimpleNamespace:
        function(*given)
        return SimpleNamespace(result=lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize("command", TOKENS)
def test_a_chain_of_token_labels_is_written(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its scripts, in this process, on few images and for two steps."""
    script, words = split(command)
    module = module_of(script)
    for name, value in (("RUNS", home / "runs"), ("LABELS", home / "own.labels"), ("RESULTS", home / "RESULTS.md")):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda jobs: contextlib.nullcontext(Inline()))

    def run(script: str, words: list[str], log: Path) -> float:
        more = ["steps=2", "log_every=1", "batch=4", "monitor.most=4", "monitor.bank=8"]
        more = more if script == "pretrain/run.py" else []
        with training_here(), monkeypatch.context() as patch:
            assert call(module_of(script), [*words, *more], patch) == 0
        return 0.5

    monkeypatch.setattr(module, "run", run)
    (home / "RESULTS.md").write_text("# Results\n")
    words = [{"PATH": str(home / "labelled"), "DIR": str(home / "fashion")}.get(word, word) for word in words]
    assert call(module, words, monkeypatch) == 0
    rows = [line for line in (home / "RESULTS.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {training.name}" for training in module.CHAIN]
