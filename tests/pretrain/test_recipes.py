"""The shipped recipes with a teacher: each trains, at a size for tests, with everything it names."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from children import Run

from common.subjects import find

SMALL = [
    "steps=4", "epochs=null", "batch=8", "precision=fp32", "model.attention=explicit", "threads=1", "log_every=1",
    "loader.workers=0", "tensorboard=false", "monitor.most=8", "model.kwargs.embed_dim=32", "model.kwargs.depth=2",
    "model.kwargs.num_heads=2", "model.kwargs.patch_size=8", "views.global.size=24",
]  # fmt: skip
HEAD = ["hidden=16", "bottleneck=8"]
ASKED = {
    "dino": {"dino"},
    "dino_absolute": {"dino", "absolute"},
    "dino_relative": {"dino", "relative"},
    "dinov2": {"dino", "ibot", "koleo"},
    "dinov2_absolute": {"dino", "ibot", "koleo", "absolute"},
}


@pytest.mark.parametrize("recipe", ASKED)
def test_recipes_with_a_teacher(recipe: str, inside: Callable[..., int], images: Path, tmp_path: Path) -> None:
    words = [*SMALL, "views.local.size=16", f"data={images}", f"run={tmp_path / 'run'}"]
    words += ["views.place.size=24"] if ASKED[recipe] & {"absolute", "relative"} else []
    words += [f"objectives.{name}.{word}" for name in ASKED[recipe] & {"dino", "ibot"} for word in HEAD]
    assert inside(recipe, *words) == 0
    last = Run(tmp_path / "run").metrics[-1]
    trained = {name.removesuffix("/loss") for name in last if name.endswith("/loss") and not name.startswith("val/")}
    assert trained == ASKED[recipe] and all(last[f"{name}/loss"] is not None for name in trained)
    assert {"rankme/student", "rankme/teacher", "knn/student", "ridge/teacher", "weight_decay"} <= last.keys()
    about = json.loads((tmp_path / "run" / "backbone.json").read_text())
    assert about["pooling"] == "class" and about["position"] == "full" and about["training"]["exported"] == "teacher"
    assert find(str(tmp_path / "run")).backbone().num_prefix_tokens == 1
