"""The live control and the pictures of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import Train
from PIL import Image

STILL = ["model.kwargs.drop_path_rate=0", "model.kwargs.proj_drop_rate=0", "optimizer.lr=0.05", "tensorboard=false"]


def records(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if name in line]


def test_control_without_position(inside: Callable[..., int], tiny: list[str], tmp_path: Path) -> None:
    """Noise is chance, and shuffled patches are sent where they came from: exactly as often as in the real images."""
    run = tmp_path / "run"
    assert inside(*tiny, *STILL, f"run={run}", "steps=40", "monitor.control_every=20", "monitor.every=40") == 0
    controls = records(run, "control/absolute/noise")
    assert [line["step"] for line in controls] == [20, 40]
    last = controls[-1]
    assert last["control/absolute/shuffled_origin"] == pytest.approx(last["control/absolute/real"], abs=1e-6)
    assert last["control/absolute/real"] > last["control/absolute/shuffled_place"]
    assert last["control/absolute/noise"] == pytest.approx(1 / 6, abs=0.12)  # 9 images of 6 patches
    assert last["control/relative/noise"] == pytest.approx(last["control/relative/chance"], abs=0.12)
    assert last["control/relative/chance"] == pytest.approx(4 / 30)  # one column apart, of 30 ordered pairs of 2x3


def test_control_with_position(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With embeddings the answer is where a patch lies now, in noise as well; the run says so."""
    run = tmp_path / "run"
    leaky = ["objectives.absolute.position=full", "objectives.relative.weight=0", "allow_leak=true"]
    assert inside(*tiny, *STILL, *leaky, f"run={run}", "steps=150", "monitor.every=150") == 0
    (last,) = records(run, "control/absolute/noise")
    assert last["control/absolute/noise"] > 2 / 6
    assert last["control/absolute/shuffled_place"] > 2 * last["control/absolute/shuffled_origin"]
    assert "absolute is right on" in capsys.readouterr().out
    about = json.loads((run / "backbone.json").read_text())["training"]
    assert about["audit"] == "leak" and "position embedding" in about["audit_reasons"]["absolute"]


def test_a_leaky_recipe_is_refused_before_anything_is_written(train: Train, tiny: list[str], tmp_path: Path) -> None:
    ended = train(*tiny, f"run={tmp_path / 'run'}", "objectives.absolute.position=full")
    assert ended.status == 1
    message = ended.stderr
    assert message.startswith("error: leak: objectives.absolute: ") and message.count("\n") == 1
    assert "position=none" in message and "allow_leak=true" in message and "pos_embed" in message
    assert not (tmp_path / "run").exists()


def test_pictures(inside: Callable[..., int], tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    plan = [
        f"objectives.{word}" for word in ("absolute.keep=0.7", "absolute.position=partial", "relative.head=regression")
    ]
    assert inside(*tiny, *plan, f"run={run}", "steps=2", "monitor.every=2") == 0
    names = sorted(path.name for path in (run / "pictures").iterdir())
    kinds = ["absolute_distances", "absolute_places", "board", "relative_distances", "relative_places"]
    assert names == [f"{kind}-00000002.png" for kind in kinds]
    for name in names:
        assert min(Image.open(run / "pictures" / name).size) > 100
