"""evaluate/export.py: every backbone as timm builds it, what cannot be had, what is kept, and the card."""

import importlib.util
import json

import pytest
import timm
import torch
from backbones import ROWS

from common import checkpoint
from common.errors import Refusal
from common.models import ModelConfig, create
from common.plan import PlanSpec, TokenPlan

NAMES = [name for name, row in ROWS.items() if row.irpe is None and name != "swin, altered"]
TO_TIMM = [*((name, "full") for name in NAMES), *((name, "none") for name in NAMES if name != "nest")]  # 3 s, as Swin
ELSEWHERE = ["irpe, qkv", "swin, altered"]
CALM = ["--threads", "1", "--images", "3"]
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


@pytest.fixture
def run_of(tmp_path, data):
    """run_of("swin", "none") -> a run folder with that row of the matrix, every parameter moved off its start."""

    def make(name, position):
        row = ROWS[name]
        torch.manual_seed(3)
        backbone = create(ModelConfig(row.name, dict(row.kwargs), irpe=row.irpe), list(row.size))
        for parameter in backbone.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        backbone.prepare({PlanSpec(position=position)})
        run = tmp_path / f"run {name} {position}"
        run.mkdir()
        about = checkpoint.describe(backbone, position, "mean", {"data": str(data), "step": 3, "recipe": "tiny"})
        checkpoint.export(run, backbone, about)
        return run

    return make


def call_in(card):
    """The line of the card that builds the model."""
    return next(line for line in card.splitlines() if line.startswith("model = timm.create_model("))


@pytest.mark.parametrize("name, position", TO_TIMM)
def test_timm_gives_the_same_features_by_the_call_on_the_card(name, position, run_of, script, monkeypatch):
    run, export = run_of(name, position), script("export")
    if name == "eva" and position == "none":
        with pytest.raises(Refusal, match="rotary embedding"):
            export.main(["--ckpt", str(run), *CALM])
        return
    assert export.main(["--ckpt", str(run), *CALM]) == 0
    monkeypatch.chdir(run / "export")
    names = {"timm": timm}
    exec(call_in((run / "export" / "README.md").read_text()), names)
    backbone, plan, _ = checkpoint.load_backbone(run)
    torch.manual_seed(5)
    images = torch.randn(2, 3, *backbone.size)  # others than those the export was tried on
    with torch.no_grad():
        found, expected = names["model"].forward_features(images), backbone(images, plan)
    if found.ndim == 4:  # maps, Swin's with channels last
        found = found.flatten(1, 2) if name == "swin" else found.flatten(2).mT
    torch.testing.assert_close(found, torch.cat([expected.prefix, expected.tokens], 1), rtol=0, atol=2e-5)
    if position == "none" and name.startswith(("vit", "deit", "lv", "sp")):
        other = backbone(images, TokenPlan("full")).tokens  # position is in the weights, and the export is without
        assert (expected.tokens - other).abs().max() > 1e-3
    assert timm.__version__ in (run / "export" / "README.md").read_text()


def test_safetensors_is_a_checkpoint_again(make_run, script):
    run, export = make_run(), script("export")
    assert export.main(["--ckpt", str(run), "--to", "safetensors", *CALM]) == 0
    out = run / "export"
    assert {file.name for file in out.iterdir()} == {"backbone.safetensors", "backbone.json", "README.md"}
    original, again = (json.loads((folder / "backbone.json").read_text()) for folder in (run, out))
    assert original == again
    assert checkpoint.load_backbone(out)[1].position == "none"


def test_card_says_what_is_known(make_run, script, data):
    run, export = make_run(), script("export")
    about = json.loads((run / "backbone.json").read_text())
    about["training"] |= {"audit": "leak", "audit_reasons": {"absolute": "told | at once"}}
    (run / "backbone.json").write_text(json.dumps(about))
    assert export.main(["--ckpt", str(run), "--to", "timm", *CALM]) == 0
    card = (run / "export" / "README.md").read_text()
    digest = checkpoint.sha256(run / "export" / "model.safetensors")
    for words in (
        "vit_tiny_patch16_224", "'embed_dim': 32", "| Recipe | tiny |", f"| Data | {data} |", "leaks the answer",
        digest, about["weights_sha256"], "| Position | off", "told \\| at once", "| Pooling | mean",
        "[0.485, 0.456, 0.406]",
        "| Objectives | not recorded |", "feature = tokens[:, 1:].mean(1)", "('batch', 5, 32)", "12 of 12 steps",
    ):  # fmt: skip
        assert words in card, words


def test_nothing_is_overwritten_unasked(make_run, script, tmp_path):
    run, export = make_run(), script("export")
    arguments = ["--ckpt", str(run), "--to", "timm", *CALM]
    assert export.main(arguments) == 0
    (run / "export" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(Refusal, match=r"has model\.safetensors, README\.md already: replace with --force"):
        export.main(arguments)
    assert (run / "export" / "model.safetensors").read_bytes() == b"mine"
    assert export.main([*arguments, "--force"]) == 0
    assert (run / "export" / "model.safetensors").stat().st_size > 1000
    (run / "state").mkdir()
    with pytest.raises(Refusal, match="is a run folder"):
        export.main(["--ckpt", str(run), "--out", str(run), "--force", *CALM])
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="is a file"):
        export.main(["--ckpt", str(run), "--out", str(tmp_path / "file"), *CALM])


def test_features_that_differ_are_not_left_behind(make_run, script, monkeypatch, capsys):
    run, export = make_run("full"), script("export")
    monkeypatch.setattr(
        export, "state_for_timm", lambda backbone, _, made=export.state_for_timm: made(backbone, "none")
    )
    backbone, _, _ = checkpoint.load_backbone(run)
    assert backbone.model.pos_embed.abs().max() > 0
    assert export.main(["--ckpt", str(run), *CALM]) == 1
    assert "model.safetensors: features differ by more than 0.0001" in capsys.readouterr().err
    assert list((run / "export").iterdir()) == []


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_timm_cannot_build_is_told(name, run_of, script):
    with pytest.raises(Refusal, match=r"which no timm\.create_model repeats.*use --to safetensors or onnx"):
        script("export").main(["--ckpt", str(run_of(name, "full")), *CALM])


def test_mistakes_in_a_line(make_run, script, run_script, monkeypatch):
    run, export = make_run(), script("export")
    for words, told in (
        (["--ckpt", "random"], "nothing was trained"),
        (["--ckpt", str(run), "--images", "0"], "expected at least 1"),
        (["--ckpt", str(run), "--to", "timn"], "invalid choice: 'timn'"),
        (["--ckpt", str(run / "none")], "no checkpoint at"),
    ):
        with pytest.raises(Refusal, match=told):
            export.main(words)
    monkeypatch.setattr(export, "ONNX", ("onnx_that_is_not_there", "onnxruntime_neither"))
    with pytest.raises(Refusal, match="needs onnx_that_is_not_there, onnxruntime_neither: pip install onnx_that_is"):
        export.main(["--ckpt", str(run), "--to", "onnx"])
    done = run_script("export", "--ckpt", run, "--forse")
    assert done.returncode == 2 and "did you mean '--force'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx, onnxscript, onnxruntime")
@pytest.mark.parametrize("position", ["full", "none"])
@pytest.mark.parametrize("name", ["vit", "deit, distilled", "irpe, qkv", "lv-vit", "sp-vit", "swin"])
def test_onnx_gives_the_same_features_for_any_batch(name, position, run_of, script):
    run, export = run_of(name, position), script("export")
    assert export.main(["--ckpt", str(run), "--to", "onnx", *CALM]) == 0  # compares three images; it was made of two
    assert (run / "export" / "model.onnx").stat().st_size > 10_000
