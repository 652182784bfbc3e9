"""evaluate/export.py: every backbone as timm builds it, what cannot be had, what is kept, and the card."""

import importlib.util
import json
import re

import numpy as np
import pytest
import timm
import torch
from backbones import ROWS, Row
from PIL import Image
from safetensors.torch import load_file, save_file

from common.batches.crops import evaluation
from common.checkpoints import public, storage
from common.checkpoints.storage import HEAD
from common.errors import Refusal
from common.models import ModelConfig, create
from common.models.plan import PlanSpec, TokenPlan
from evaluate.exporting import onnx, timm_files
from evaluate.job.classifier import Classifier

NAMES = [name for name, row in ROWS.items() if row.irpe is None and name not in ("swin, altered", "stem")]
TO_TIMM = [*((name, "full") for name in NAMES), *((name, "none") for name in NAMES if name != "nest")]  # 3 s, as Swin
ELSEWHERE = ["irpe, qkv", "swin, altered", "stem"]
CALM = ["--threads", "1", "--images", "3"]
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


@pytest.fixture
def run_of(tmp_path, data):
    """run_of("swin", "none") -> a run folder with that row of the matrix, every parameter moved off its start; with
    classes=3, that of a finetuned classifier."""

    def make(name, position="full", pooling="mean", classes=0, size=None, **options):
        row = ROWS[name]
        torch.manual_seed(3)
        config = ModelConfig(row.name, dict(row.kwargs), irpe=row.irpe, stem=row.stem, **options)
        backbone = create(config, list(size or row.size))
        for parameter in backbone.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        backbone.use_plans({PlanSpec(position=position)})
        run = tmp_path / f"run {name} {position} {pooling} {classes}"
        run.mkdir()
        training = {"data": str(data), "step": 3, "recipe": "tiny"}
        if classes:
            head = Classifier(backbone, pooling, classes).head.state_dict()
            save_file({key: torch.randn_like(tensor) for key, tensor in head.items()}, run / HEAD)
            names = [f"kind {k}" for k in range(classes)]
            training |= {"finetuned": {"classes": classes}, "label_names": names}
            training |= {"head_sha256": storage.sha256(run / HEAD)}
        public.export(run, backbone, public.describe(backbone, position, pooling, training))
        return run

    return make


def typed(text, folder, monkeypatch):
    """What the lines of Python in `text` leave, run in `folder` as one types them, on a photograph there."""
    rng = np.random.default_rng(4)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    small.resize((90, 70), Image.Resampling.BICUBIC).save(folder / "image.jpg", quality=95)
    monkeypatch.chdir(folder)
    names = {}
    exec(text, names)
    return names


def block(card):
    """The lines of Python on the card."""
    return re.search(r"```python\n(.*?)```", card, re.S)[1]


def ours(run, grey=False):
    """The photograph of `typed` under the evaluation transform, uint8 (1, C, H, W)."""
    about = json.loads((run / "backbone.json").read_text())
    pixels = np.array(Image.open("image.jpg").convert("L" if grey else "RGB"))
    image = torch.from_numpy(pixels[..., None] if grey else pixels).permute(2, 0, 1)
    return evaluation(image, about["size"], about["crop"])[None]


@pytest.mark.parametrize("name, position", TO_TIMM)
def test_timm_gives_the_same_features_by_the_lines_on_the_card(name, position, run_of, script, monkeypatch):
    run, export = run_of(name, position), script("export")
    if name == "eva" and position == "none":
        with pytest.raises(Refusal, match="rotary embedding"):
            export.main(["--ckpt", str(run), *CALM])
        return
    assert export.main(["--ckpt", str(run), *CALM]) == 0
    names = typed(block((run / "export" / "README.md").read_text()), run / "export", monkeypatch)
    backbone, plan, _ = public.load_backbone(run)
    torch.manual_seed(5)
    images = torch.randn(2, 3, *backbone.size)  # others than those the export was tried on
    with torch.no_grad():
        found, expected = names["model"].forward_features(images), backbone(images, plan)
        of_photo = backbone(ours(run), plan)
    tokens = names["tokens"]
    if found.ndim == 4:  # maps, Swin's with channels last
        found, tokens = (x.flatten(1, 2) if name == "swin" else x.flatten(2).mT for x in (found, tokens))
    torch.testing.assert_close(found, torch.cat([expected.prefix, expected.tokens], 1), rtol=0, atol=2e-5)
    # by the file alone: Pillow and torch round a pixel by up to a 255th differently
    torch.testing.assert_close(tokens, torch.cat([of_photo.prefix, of_photo.tokens], 1), rtol=0, atol=0.03)
    if "feature" in names:
        torch.testing.assert_close(names["feature"], of_photo.tokens.mean(1), rtol=0, atol=0.03)
    assert ("feature" in names) == (not name.startswith(("deit", "lv", "sp")))  # those pool class tokens alone
    if position == "none" and name.startswith(("vit", "deit", "lv", "sp")):
        other = backbone(images, TokenPlan("full")).tokens  # position is in the weights, and the export is without
        assert (expected.tokens - other).abs().max() > 1e-3
    assert timm.__version__ in (run / "export" / "README.md").read_text()


STATED = {"mean": [0.1, 0.6, 0.3], "std": [0.2, 0.3, 0.1], "crop": 1.0}


@pytest.mark.parametrize(
    "options, size",
    [(STATED, (32, 32)), (STATED | {"mean": [0.4], "std": [0.2]}, (24, 24)), (STATED | {"crop": 0.8}, (16, 32))],
    ids=["colour", "grey", "oblong"],
)
def test_timm_is_told_how_images_are_put_in(options, size, run_of, script, monkeypatch, capsys):
    run, export = run_of("vit", size=size, **options), script("export")
    assert export.main(["--ckpt", str(run), "--to", "timm", *CALM]) == 0
    out = capsys.readouterr().out
    names = typed(out[out.index("import timm") : out.index("files: ")], run, monkeypatch)
    config = timm.data.resolve_model_data_config(names["model"])
    for name in ("mean", "std"):
        assert list(config[name]) == options[name]
    assert tuple(config["input_size"]) == (len(options["mean"]), *size) and config["crop_pct"] == options["crop"]
    assert config["interpolation"] == "bicubic" and config["crop_mode"] == "center"
    backbone, plan, _ = public.load_backbone(run)
    with torch.no_grad():
        expected = backbone(ours(run, grey=len(options["mean"]) == 1), plan)
    torch.testing.assert_close(names["tokens"][:, 1:], expected.tokens, rtol=0, atol=0.03)
    written = json.loads((run / "export" / "config.json").read_text())
    assert (
        not {"tag", "license", "origin_url", "url", "paper_ids"} & written["pretrained_cfg"].keys()
    )  # of others' weights


@pytest.mark.parametrize(
    "wrong, told",
    [({"mean": [0.5, 0.5, 0.5]}, "features differ by more than 0.0001"), ({"crop_pct": 0.5}, "shows other images, by")],
)
def test_another_normalisation_or_crop_is_noticed(wrong, told, make_run, script, monkeypatch, capsys):
    run, export = make_run("full"), script("export")
    right = timm_files.data_config
    monkeypatch.setattr(timm_files, "data_config", lambda about: right(about) | wrong)
    assert export.main(["--ckpt", str(run), *CALM]) == 1
    assert told in capsys.readouterr().err and list((run / "export").iterdir()) == []


# name, pooling, and whether a head of timm's pools so
HEADS = [
    ("vit", "class", True), ("vit", "mean", True), ("vit", "both", False), ("deit, distilled", "class", True),
    ("deit, distilled", "mean", False), ("beit", "class", True), ("beit", "mean", True), ("eva", "mean", True),
    ("swin", "mean", True), ("irpe, k", "class", True), ("lv-vit", "class", True), ("lv-vit", "mean", False),
]  # fmt: skip


@pytest.mark.parametrize("name, pooling, pools", HEADS)
def test_a_classifier_keeps_its_head(name, pooling, pools, run_of, script, monkeypatch):
    run, export = run_of(name, pooling=pooling, classes=3), script("export")
    if not pools:
        with pytest.raises(Refusal, match=f"trained on pooling={pooling}, by which no head of timm's .* --no-head"):
            export.main(["--ckpt", str(run), *CALM])
    kinds = ["timm", "safetensors"] if pools else ["safetensors"]
    assert export.main(["--ckpt", str(run), "--to", *kinds, *CALM]) == 0
    again = public.load_head(run / "export", json.loads((run / "export" / "backbone.json").read_text()))
    assert all(torch.equal(again[key], tensor) for key, tensor in load_file(run / HEAD).items())
    if not pools:
        return
    names = typed(block((run / "export" / "README.md").read_text()), run / "export", monkeypatch)
    backbone, _, _ = public.load_backbone(run)
    classifier = Classifier(backbone, pooling, 3).eval()
    classifier.head.load_state_dict(load_file(run / HEAD))
    torch.manual_seed(5)
    images = torch.randn(2, 3, *backbone.size)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](images), classifier(images), rtol=1e-5, atol=1e-4)
        guess = classifier(ours(run)).argmax()
    assert names["logits"].shape == (1, 3) and names["label"] == f"kind {guess}"
    assert "3: kind 0, kind 1, kind 2" in (run / "export" / "README.md").read_text()


def test_a_classifier_of_a_pretraining_is_kept_or_left_out(run_of, script):
    """It says no "finetuned": only that there is a head, and which classes it tells apart."""
    run, export = run_of("vit", pooling="class", classes=3), script("export")
    description = json.loads((run / "backbone.json").read_text())
    del description["training"]["finetuned"]
    (run / "backbone.json").write_text(json.dumps(description))
    assert export.main(["--ckpt", str(run), *CALM]) == 0
    model, _ = timm_files.read(run / "export")
    assert torch.equal(model.head.weight, load_file(run / HEAD)["weight"])
    assert export.main(["--ckpt", str(run), "--no-head", "--to", "safetensors", "--out", str(run / "bare"), *CALM]) == 0
    bare = run / "bare"
    assert public.load_head(bare, json.loads((bare / "backbone.json").read_text())) is None
    assert public.load_head(run, description) is not None


@pytest.mark.parametrize("name, status", [("cait_xxs24_224", 0), ("xcit_nano_12_p16_224", 1)])
def test_class_tokens_that_come_in_above_the_patches(name, status, run_of, script, monkeypatch, capsys):
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    monkeypatch.setitem(ROWS, name, Row(name, small, size=(32, 32), grid=(2, 2), prefix=0))
    run, export = run_of(name), script("export")
    assert export.main(["--ckpt", str(run), *CALM]) == status
    if status:  # XCiT's last layers change the patches after those that the backbone gives
        assert "model.safetensors: features differ by more than 0.0001" in capsys.readouterr().err
        return
    tokens = typed(block((run / "export" / "README.md").read_text()), run / "export", monkeypatch)["tokens"]
    backbone, plan, _ = public.load_backbone(run)
    with torch.no_grad():
        torch.testing.assert_close(tokens[:, 1:], backbone(ours(run), plan).tokens, rtol=0, atol=0.03)


def test_a_head_that_does_not_fit_is_refused(run_of, script):
    run, export = run_of("vit", pooling="class", classes=3), script("export")
    whole = load_file(run / HEAD)

    def refused(match, about=None):
        if about is not None:
            description = json.loads((run / "backbone.json").read_text())
            description["training"] |= about
            (run / "backbone.json").write_text(json.dumps(description))
        with pytest.raises(Refusal, match=match):
            export.main(["--ckpt", str(run), *CALM])

    save_file({"weight": whole["weight"] + 1, "bias": whole["bias"]}, run / HEAD)
    refused("head.safetensors is of another backbone")
    (run / HEAD).unlink()
    refused("head.safetensors is missing: it holds the classifier")
    (run / HEAD).write_bytes(b"no tensors")
    refused("cannot be read as safetensors", {"head_sha256": None})
    save_file({"weight": whole["weight"][:, :20].contiguous(), "bias": whole["bias"]}, run / HEAD)
    refused(r"expected weight \(3, 32\) and bias \(3,\) for 3 classes and pooling class, found .*\(3, 20\)")
    save_file({"weight": whole["weight"] * torch.nan, "bias": whole["bias"]}, run / HEAD)
    refused("head.safetensors of run vit")
    save_file(whole, run / HEAD)
    refused("does not name the 3 classes", {"label_names": ["one"]})
    assert export.main(["--ckpt", str(run), "--no-head", *CALM]) == 0
    assert not (run / "export" / HEAD).exists() and '"num_classes": 0' in (run / "export" / "config.json").read_text()

    assert export.main(["--ckpt", str(run / "export"), "--to", "safetensors", "--out", str(run / "bare"), *CALM]) == 0


def test_safetensors_is_a_checkpoint_again(make_run, script):
    run, export = make_run(), script("export")
    assert export.main(["--ckpt", str(run), "--to", "safetensors", *CALM]) == 0
    out = run / "export"
    assert {file.name for file in out.iterdir()} == {"backbone.safetensors", "backbone.json", "README.md"}
    original, again = (json.loads((folder / "backbone.json").read_text()) for folder in (run, out))
    assert original == again
    assert public.load_backbone(out)[1].position == "none"


def test_card_says_what_is_known(make_run, script, data):
    run, export = make_run(), script("export")
    about = json.loads((run / "backbone.json").read_text())
    about["training"] |= {"audit": "leak", "audit_reasons": {"absolute": "told | at once"}}
    (run / "backbone.json").write_text(json.dumps(about))
    assert export.main(["--ckpt", str(run), "--to", "timm", *CALM]) == 0
    card = (run / "export" / "README.md").read_text()
    digest = storage.sha256(run / "export" / "model.safetensors")
    for words in (
        "vit_tiny_patch16_224", "'embed_dim': 32", "| Recipe | tiny |", f"| Data | {data} |", "leaks the answer",
        digest, about["weights_sha256"], "| Position | off", "told \\| at once", "| Pooling | mean",
        "[0.485, 0.456, 0.406]",
        "| Objectives | not recorded |", "feature = model(images)", "('batch', 5, 32)", "12 of 12 steps",
    ):  # fmt: skip
        assert words in card, words


def test_nothing_is_overwritten_unasked(make_run, script, tmp_path):
    run, export = make_run(), script("export")
    arguments = ["--ckpt", str(run), "--to", "timm", *CALM]
    assert export.main(arguments) == 0
    (run / "export" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(Refusal, match=r"has model\.safetensors, config\.json, README\.md already: replace with"):
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
        timm_files, "state_for_timm", lambda backbone, _, made=timm_files.state_for_timm: made(backbone, "none")
    )
    backbone, _, _ = public.load_backbone(run)
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
    monkeypatch.setattr(onnx, "ONNX", ("onnx_that_is_not_there", "onnxruntime_neither"))
    with pytest.raises(Refusal, match="needs onnx_that_is_not_there, onnxruntime_neither: pip install onnx_that_is"):
        export.main(["--ckpt", str(run), "--to", "onnx"])
    done = run_script("export", "--ckpt", run, "--forse")
    assert done.returncode == 2 and "did you mean '--force'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx, onnxscript, onnxruntime")
@pytest.mark.parametrize("position", ["full", "none"])
@pytest.mark.parametrize("name", ["vit", "deit, distilled", "irpe, qkv", "stem", "lv-vit", "sp-vit", "swin"])
def test_onnx_gives_the_same_features_for_any_batch(name, position, run_of, script):
    run, export = run_of(name, position), script("export")
    assert export.main(["--ckpt", str(run), "--to", "onnx", *CALM]) == 0  # compares three images; it was made of two
    assert (run / "export" / "model.onnx").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx, onnxscript, onnxruntime")
@pytest.mark.parametrize("name, pooling", [("vit", "both"), ("swin", "mean")])
def test_onnx_gives_a_classifiers_logits(name, pooling, run_of, script):
    run, export = run_of(name, pooling=pooling, classes=3), script("export")
    assert export.main(["--ckpt", str(run), "--to", "onnx", *CALM]) == 0  # compares them
    import onnxruntime

    session = onnxruntime.InferenceSession(str(run / "export" / "model.onnx"))
    assert [output.name for output in session.get_outputs()][-1] == "logits"
    backbone, _, _ = public.load_backbone(run)
    images = torch.randint(0, 256, (2, 3, *backbone.size), dtype=torch.uint8)
    classifier = Classifier(backbone, pooling, 3).eval()
    classifier.head.load_state_dict(load_file(run / HEAD))
    with torch.no_grad():
        expected = classifier(images)
    (found,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
