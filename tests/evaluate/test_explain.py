"""evaluate/explain.py: sheets and report as a user gets them, targets, and one line for each mistake."""

import json
import shutil

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pictures import write_images
from PIL import Image

from common.batches.crops import evaluation
from common.checkpoints import public
from common.data import open_data
from common.errors import Refusal
from common.models import ModelConfig, create
from evaluate.explaining import sheets

TINY = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
CALM = ["--threads", "1", "--device", "cpu"]
SHEETS = ("maps", "heads", "neighbors", "deletion")
METHODS = ("attention", "rollout", "gradient x attention", "transformer attribution")


def test_sheets_curves_and_report(make_run, script, report_of, capsys):
    run = make_run("full", depth=2)
    (run / "tb").mkdir()
    assert script("explain").main(["--ckpt", str(run), "--images", "3", "--seed", "1", *CALM]) == 0
    told = capsys.readouterr().out
    report = report_of(run, "explain")
    found = report["values"]["subject"]["deletion"]
    assert found.keys() == {*METHODS, "random"} and report["data"]["test"]["judged"] == 21
    start = {entry["curve"][0] for entry in found.values()}
    assert max(start) - min(start) < 1e-5 and max(start) > 0.5  # nothing is deleted yet, and neighbours are near
    for entry in found.values():
        assert len(entry["curve"]) == 10 and len(set(entry["curve"])) > 3
    for method in METHODS:
        low, high = found[method]["gap_interval"]
        assert low < found[method]["gap"] < high
        assert found[method]["gap"] == pytest.approx(found["random"]["area"] - found[method]["area"], abs=1e-6)
    assert report["protocol"]["target"] == "neighbors" and report["seeds"] == [1]
    sizes = {name: Image.open(run / "evaluate" / "explain" / f"{name}.png").size for name in SHEETS}
    assert sizes["maps"][0] == 6 + 6 * 118 and sizes["heads"][0] == 6 + 3 * 118 and sizes["neighbors"][0] == 6 + 9 * 118
    assert list((run / "tb").glob("events*.explain")) and "and TensorBoard" in told
    for words in ("cosine to the mean of its 8 nearest", "than random", "sheets:"):
        assert words in told
    for name, values in found.items():  # its row of the table
        assert f"{values['area']:.3f}" in next(line for line in told.splitlines() if line.startswith(f"{name}  "))
    assert report["protocol"]["left_out"] is None and "no transformer attribution" not in told


@pytest.mark.slow
def test_training_images_are_extracted_once(make_run, script, report_of, capsys):
    run, explain = make_run(depth=2), script("explain")
    values, extracted = [], []
    for words in ([], ["--target", "class"], ["--target", "class"]):
        assert explain.main(["--ckpt", str(run), "--images", "2", *words, *CALM]) == 0
        values.append(report_of(run, "explain")["values"])
        extracted.append("features of 36 training images" in capsys.readouterr().out)
    assert extracted == [True, False, False] and values[1] == values[2] != values[0]


@pytest.fixture
def three(make_run, tmp_path):
    """three("spvit_s", ...): runs of a DeiT, an iRPE and further backbones, side by side in a folder."""

    def make(*names):
        made = []
        for name in ("deit", "irpe", *names):
            run = make_run("full", depth=2)
            if name != "deit":
                kwargs = TINY | {"irpe": {"on": "qkv", "method": "product"}} if name == "irpe" else OTHERS[name]
                irpe, size = kwargs.pop("irpe", None), 8 if name == "irpe" else 32
                model = "vit_tiny_patch16_224" if name == "irpe" else name
                backbone = create(ModelConfig(model, dict(kwargs), irpe=irpe, crop=1.0), size)
                training = json.loads((run / "backbone.json").read_text())["training"]
                shutil.rmtree(run)
                run.mkdir()
                public.export(run, backbone, public.describe(backbone, "full", "mean", training))
            made.append(run.rename(tmp_path / name))
        return made

    return make


OTHERS = {
    "spvit_s": {"embed_dim": 32, "depth": 3, "num_heads": 2, "stem_width": 8},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4},
}


@pytest.mark.slow
def test_three_models_side_by_side(three, script, report_of, tmp_path, capsys):
    runs, out = three("spvit_s"), tmp_path / "sheets"
    words = ["--images", "3", "--judged", "4", "--out", str(out), *CALM]
    assert script("explain").main(["--ckpt", *map(str, runs), *words]) == 0
    told = capsys.readouterr().out
    assert f"side by side: {out / 'beside.png'}" in told and told.count("\nreport: ") == 3
    found = np.asarray(Image.open(out / "beside.png").convert("RGB")).astype(int)
    assert found.shape[1] == 6 + 4 * 118
    for number, run in enumerate(runs, 1):
        assert report_of(run, "explain")["values"]["subject"]["deletion"].keys() == {*METHODS, "random"}
        own = np.asarray(Image.open(run / "evaluate" / "explain" / "maps.png").convert("RGB")).astype(int)
        theirs, here = own[-3 * 118 :, 6 + 4 * 118 : 5 * 118], found[-3 * 118 :, 6 + number * 118 : (number + 1) * 118]
        assert abs(theirs - here).max() <= 1 and np.ptp(here) > 100, run.name


def test_several_are_refused_before_anything_is_written(three, script, data, tmp_path):
    (deit, irpe, swin), explain = three("swin_tiny_patch4_window7_224"), script("explain")
    about = json.loads((irpe / "backbone.json").read_text())
    about["training"]["data"] = str(data / "test")
    (irpe / "backbone.json").write_text(json.dumps(about))
    given = ["--data", str(data)]
    for words, told in (
        (["--ckpt", deit, irpe], "say on which images both are explained with --data"),
        (["--ckpt", deit, swin, *given], "no attention of every patch to every patch"),
        (["--ckpt", deit, deit / "backbone.safetensors", *given], "two reports would lie in"),
        (["--ckpt", deit, irpe, *given, "--weights", "w.pth"], "--weights w.pth: of which checkpoint"),
        (["--ckpt", deit, irpe, *given, "--like", "quickstart"], "--like quickstart: of which checkpoint"),
        ([], "nothing to explain: give --ckpt RUN"),
    ):
        with pytest.raises(Refusal, match=told):
            explain.main([*map(str, words), "--out", str(tmp_path / "out"), *CALM])
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("explain*"))


def test_what_cannot_be_attributed_is_left_out_with_the_reason(make_run, script, report_of, capsys):
    run = make_run(depth=2)
    bare = create(ModelConfig("eva02_tiny_patch14_224", dict(TINY), crop=1.0), 8)
    training = json.loads((run / "backbone.json").read_text())["training"]
    public.export(run, bare, public.describe(bare, "full", "mean", training))
    assert script("explain").main(["--ckpt", str(run), "--images", "2", *CALM]) == 0
    told, report = capsys.readouterr().out, report_of(run, "explain")
    assert report["values"]["subject"]["deletion"].keys() == {*METHODS[:3], "random"}
    assert "has no transformer attribution: its rules are known for the blocks of ViT" in told
    assert report["protocol"]["left_out"] in told
    assert Image.open(run / "evaluate" / "explain" / "maps.png").width == 6 + 5 * 118


def test_the_same_again_and_another_seed(make_run, script, report_of):
    run, explain = make_run(depth=2), script("explain")
    values = []
    for seed in ("0", "0", "1"):
        assert explain.main(["--ckpt", str(run), "--seed", seed, "--images", "2", *CALM]) == 0
        values.append(report_of(run, "explain")["values"])
    assert values[0] == values[1] != values[2]


def test_class_target_explains_the_logit_of_ridge(make_run, script, report_of, capsys):
    run, explain = make_run(depth=2), script("explain")
    assert explain.main(["--ckpt", str(run), "--target", "class", *CALM]) == 0
    assert "logit of the class that ridge regression finds (100 % right)" in capsys.readouterr().out  # three colours
    curve = report_of(run, "explain")["values"]["subject"]["deletion"]["random"]["curve"]
    assert 0.5 < curve[0] < 1.5  # its targets are 1 and -1


def test_class_target_explains_the_logit_of_its_own_classifier(make_run, script, report_of, data, capsys):
    run = make_run("full", depth=2)
    words = ["--steps", "3", "--batch", "12", "--warmup", "0", "--no-baselines", *CALM]
    assert script("finetune").main(["--ckpt", str(run), *words]) == 0
    folder = run / "evaluate" / "finetune" / "trained-seed0"
    assert script("explain").main(["--ckpt", str(folder), "--target", "class", "--images", "2", *CALM]) == 0
    assert "logit of the class that its own classifier finds" in capsys.readouterr().out
    backbone, plan, about = public.load_backbone(folder)
    head, images = public.load_head(folder, about), open_data(str(data), "test")
    batch = torch.stack([evaluation(images.read(i), [8, 8], 1.0) for i in range(21)])
    with torch.no_grad():
        logits = backbone(batch, plan).pooled("mean") @ head["weight"].T + head["bias"]
    curve = report_of(folder, "explain")["values"]["subject"]["deletion"]["random"]["curve"]
    assert curve[0] == pytest.approx(logits.amax(1).mean().item(), abs=1e-5)  # nothing is deleted yet


def test_untrained_and_unlabelled(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "colours", 8)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (tmp_path / "colours").rglob("*.png"):
        file.rename(flat / f"{file.parent.name}-{file.name}")
    explain = script("explain")
    assert explain.main(["--ckpt", "random", "--data", str(flat), "--out", str(tmp_path / "out"), *CALM]) == 0
    assert {file.name for file in (tmp_path / "out" / "explain").iterdir()} == {f"{name}.png" for name in SHEETS}
    assert "a fixed fifth" in capsys.readouterr().out
    with pytest.raises(Refusal, match="label"):
        explain.main(["--ckpt", "random", "--data", str(flat), "--target", "class", *CALM])


def test_mistakes_in_a_line(make_run, script):
    run, explain = make_run(), script("explain")
    for words, told in (
        (["--images", "0"], "expected at least 1"),
        (["--judged", "1"], "expected at least 1 and 2"),
        (["--target", "clas"], "invalid choice: 'clas'"),
    ):
        with pytest.raises(Refusal, match=told):
            explain.main(["--ckpt", str(run), *words, *CALM])


def test_cells_lie_where_they_should():
    image = torch.zeros(1, 4, 8, dtype=torch.uint8)
    image[:, :, :4] = 255
    picture = sheets.cell(image)
    assert picture.shape == (112, 112, 3) and (picture[:28] == 1).all() and (picture[84:] == 1).all()  # white around
    assert (picture[28:84, :56] == 1).all() and (picture[28:84, 56:] == 0).all()
    heat = sheets.overlaid(np.zeros((112, 112, 3)), torch.tensor([[0.0, 0.0], [0.0, 3.0]]))
    assert heat[84:, 84:].mean() > 5 * heat[:28, :28].mean()
    assert np.isfinite(sheets.overlaid(np.zeros((112, 112, 3)), torch.ones(2, 2))).all()
    colours = [[np.full((112, 112, 3), value) for value in (0.0, 0.25)], [np.full((112, 112, 3), 0.5)] * 2]
    figure = sheets.mosaic(colours, ["a", "b"], "title", "about")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., 0]
    first, second = len(drawn) - 2 * 118 + 56, len(drawn) - 118 + 56
    values = [int(drawn[row, column]) for row in (first, second) for column in (62, 180)]
    assert values == pytest.approx([0, 64, 127, 127], abs=1)
