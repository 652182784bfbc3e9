"""The wheel: one name, everything that is needed at run time, and no harm to a neighbour called `evaluate`."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from common.processes import launch

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"
NEIGHBOUR = "def load(name):\n    return f'metric {name}'\n"


def run(*words: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command; fails with what it said."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def install(folder: Path, *what: object) -> None:
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, *what, cwd=folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing left in build/ by an earlier version gets in."""
    pytest.importorskip("setuptools", "77", reason="no setuptools that reads this pyproject.toml")
    copy = tmp_path_factory.mktemp("source")
    for name in ("common", "pretrain", "evaluate", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", out, copy),
        cwd=out,
    )
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a folder of its own, with a stand-in for Hugging Face's `evaluate` beside it."""
    folder = tmp_path_factory.mktemp("site-packages")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        folder,
        wheel,
        cwd=folder,
    )
    (folder / "evaluate").mkdir()
    (folder / "evaluate" / "__init__.py").write_text(NEIGHBOUR)
    return folder


def test_the_wheel_adds_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"poslabel", "poslabel-0.1.0.dist-info"}
    assert {name.split("/")[1] for name in names if name.startswith("poslabel/")} == {
        "common", "configs", "evaluate", "pretrain",
    }  # fmt: skip


def test_the_wheel_is_complete(wheel: Path) -> None:
    packed = {
        name.removeprefix("poslabel/") for name in zipfile.ZipFile(wheel).namelist() if name.startswith("poslabel/")
    }
    here = {
        path.relative_to(ROOT).as_posix()
        for folder in ("common", "pretrain", "evaluate", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == here
    assert {f"{stage}/py.typed" for stage in ("common", "pretrain", "evaluate")} <= packed
    assert "common/data/fashion_mnist_extract.xz" in here and "configs/pretrain/quickstart.yaml" in here


@pytest.mark.slow
def test_installed_modules_are_imported_under_one_name(installed: Path, tmp_path: Path) -> None:
    said = run(
        sys.executable, "-c",
        "import json, sys, poslabel.common.models, poslabel.common.positions, evaluate\n"
        "bare = sorted({'common', 'pretrain', 'configs'} & set(sys.modules))\n"
        "print(json.dumps([poslabel.common.models.__file__, evaluate.__file__, evaluate.load('x'), bare]))",
        cwd=tmp_path, PYTHONPATH=str(installed),
    )  # fmt: skip
    models, neighbour, value, bare = json.loads(said)
    assert Path(models).is_relative_to(installed / "poslabel")
    assert Path(neighbour) == installed / "evaluate" / "__init__.py" and value == "metric x"
    assert bare == []


def poslabel(installed: Path, cwd: Path, *words: object) -> str:
    """The console command, as pip's wrapper calls it."""
    call = "import sys; from poslabel.common.processes.launch import main; main()"
    return run(sys.executable, "-c", call, *words, cwd=cwd, PYTHONPATH=str(installed), CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_the_command_trains_from_anywhere(installed: Path, tmp_path: Path) -> None:
    """With the built-in images that the wheel carries, into the folder where it is called."""
    told = poslabel(installed, tmp_path, "pretrain", TINY, "data=builtin", "steps=2", "run=runs/here")
    assert "done: 2 steps" in told
    lines = [json.loads(line) for line in (tmp_path / "runs" / "here" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert (tmp_path / "runs" / "here" / "backbone.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["run", "data=x"], "'pretrain'"), (["train"], "'pretrain'"), (["evaluate/knn.py", "--ckpt", "x"], "'knn'"),
        (["--num_processes", "2", "fine_tune"], "'finetune'"), (["segmentaton"], "'segmentation'"),
        (["few-shot"], "'fewshot'"), (["zzz"], ""), (["run=x"], ""),
    ],
)  # fmt: skip
def test_a_command_that_is_not_there_is_answered_with_the_nearest(words, meant, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["poslabel", *words])
    with pytest.raises(SystemExit) as left:
        launch.main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith(f"error: no command in {' '.join(words)!r}")
    assert (f"did you mean {meant}?" in said) if meant else ("did you mean" not in said)


@pytest.mark.slow
def test_every_script_is_a_command(installed: Path, tmp_path: Path) -> None:
    usage = subprocess.run(
        [sys.executable, "-c", "from poslabel.common.processes.launch import main; main()", "--help"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    for name in ["pretrain", *(path.stem for path in (ROOT / "evaluate").glob("[!_]*.py"))]:
        assert name in usage
    assert "--resume RUN" in poslabel(installed, tmp_path, "pretrain", "--help")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_beside_hugging_face_evaluate(wheel: Path, tmp_path: Path) -> None:
    """The real package, installed before ours and after: whole, imported from its own folder, also after training."""
    theirs = "import evaluate; print(evaluate.__file__, evaluate.load.__module__, evaluate.combine.__module__)"
    for order in (("evaluate", wheel), (wheel, "evaluate")):
        folder = tmp_path / "-".join("ours" if part is wheel else "theirs" for part in order)
        folder.mkdir()
        for part in order:
            install(folder, "--no-deps", part)
        install(folder, "requests")  # which theirs imports and nothing of ours needs
        told = poslabel(folder, tmp_path, "pretrain", "steps=2", f"run={folder.name}-run")
        assert "done: 2 steps" in told
        poslabel(folder, tmp_path, "knn", "--help")
        said = run(sys.executable, "-c", theirs, cwd=tmp_path, PYTHONPATH=str(folder)).split()
        assert said == [str(folder / "evaluate" / "__init__.py"), "evaluate.loading", "evaluate.module"]


def test_make_install_is_editable(tmp_path: Path) -> None:
    """`poslabel` runs the scripts of the checkout, whose root, with our `evaluate`, is not put on the path."""
    where = "import poslabel.common.processes.launch as l, sys, json; print(json.dumps([str(l.ROOT), sys.path]))"
    done = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=False)
    root, path = json.loads(done.stdout) if done.returncode == 0 else ("", [])
    if Path(root) != ROOT:
        pytest.skip("this environment was not made by `make install` in this checkout")
    assert str(ROOT) not in path
