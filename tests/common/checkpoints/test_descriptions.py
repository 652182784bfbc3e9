"""What somebody else's backbone.json, or a recipe, may ask for: architectures of timm and their plain arguments."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoints import public
from common.errors import Refusal
from common.models import ModelConfig, create

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made, path = create(ModelConfig(NAME, dict(TINY)), 24), tmp_path_factory.mktemp("foreign")
    public.export(path, made, public.describe(made, "full", "mean", {}))
    return path


def kwargs(**words: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda about: {"kwargs": about["kwargs"] | words}


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a file": (kwargs(checkpoint_path="evil.pth"), r"model\.kwargs\.checkpoint_path is no argument of an architecture"),
    "the network": (kwargs(pretrained=True), r"model\.kwargs\.pretrained is no argument"),
    "a description": (kwargs(pretrained_cfg_overlay={"file": "evil.pth"}), r"pretrained_cfg_overlay is no argument"),
    "a cache": (kwargs(cache_dir="/tmp"), r"cache_dir is no argument"),
    "a mapping": (kwargs(embed_layer={"a": 1}), r"embed_layer=\{'a': 1\}: expected a number, a word"),
    "unknown": (kwargs(embed_din=3), r"embed_din is no argument of vit_tiny_patch16_224; did you mean 'embed_dim'"),
    "the hub": (lambda _: {"name": "hf-hub:a/b"}, r"name 'hf-hub:a/b': expected a plain name.*neither hf-hub: nor"),
    "a folder": (lambda _: {"name": "local-dir:x"}, r"expected a plain name"),
    "a path in a tag": (lambda _: {"name": f"{NAME}.x/../vit_base_patch16_224"}, r"expected a plain name"),
    "no text": (lambda _: {"name": ["x"]}, r"expected a plain name"),
    "terabytes of images": (lambda _: {"size": [1_000_000, 1_000_000]}, r"size, expected two whole numbers up to 8192"),
    "terabytes of weights": (kwargs(embed_dim=10**9), r"of another model: its embed_dim is not 1e\+09"),
    "other weights": (kwargs(embed_dim=64), r"of another model: 30 of another shape"),
    "no end of blocks": (kwargs(depth=10**9), r"its depth is not 1e\+09"),
    "words for numbers": (lambda _: {"mean": "abc"}, r"its mean, expected numbers"),
    "no deviation": (lambda _: {"std": [0.0, 1.0, 1.0]}, r"its std, expected as many positive numbers"),
    "no position": (lambda _: {"position": "partly"}, r"its position, expected full or none"),
    "no end of a deviation": (lambda _: {"std": [float("inf")] * 3}, r"its std, expected as many positive numbers"),
    "another pooling": (lambda _: {"pooling": ["mean"]}, r"its pooling, expected mean, class or both"),
    "data by number": (lambda _: {"training": {"data": 5}}, r"its training\.data, expected a text"),
    "a step in words": (lambda _: {"training": {"step": "x"}}, r"its training\.step, expected a whole number"),
    "no options": (
        lambda _: {"training": {"objectives": {"absolute": 5}}},
        r"objectives, expected a mapping of mappings",
    ),
    "no sentences": (lambda _: {"loaded": 5}, r"its loaded, expected a list of sentences"),
    "no mapping": (lambda _: {"kwargs": [1]}, r"its kwargs, expected a mapping"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_foreign_description_is_refused_before_anything_is_built(
    what: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, said = CHANGES[what]
    about = json.loads((folder / "backbone.json").read_text())
    (tmp_path / "backbone.safetensors").write_bytes((folder / "backbone.safetensors").read_bytes())
    (tmp_path / "backbone.json").write_text(json.dumps(about | change(about)))
    monkeypatch.setattr(public, "create", lambda *_: pytest.fail("was built"))
    with pytest.raises(Refusal, match=said) as refusal:
        public.load_backbone(tmp_path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_a_recipe_is_held_to_the_same() -> None:
    with pytest.raises(Refusal, match=r"model\.kwargs\.checkpoint_path .*weights come from model\.init"):
        create(ModelConfig(NAME, TINY | {"checkpoint_path": "x.pth"}), 24)
    with pytest.raises(Refusal, match=r"model\.name='local-dir:x': expected a plain name"):
        create(ModelConfig("local-dir:x"), 24)


def test_what_cannot_be_built_names_the_file_that_says_so(folder: Path, tmp_path: Path) -> None:
    about = json.loads((folder / "backbone.json").read_text())
    (tmp_path / "backbone.safetensors").write_bytes((folder / "backbone.safetensors").read_bytes())
    (tmp_path / "backbone.json").write_text(
        json.dumps(about | {"kwargs": about["kwargs"] | {"act_layer": "none such"}})
    )
    with pytest.raises(Refusal, match=r"backbone\.json is not a checkpoint .*for 24x24 pixels: 'none such'$"):
        public.load_backbone(tmp_path)
