"""evaluate/layers.py: numbers against other ways to them, the report, the figure, and one line for each mistake."""

import json

import numpy as np
import pytest
from pictures import COLOURS, save, write_images

from common.errors import Refusal
from evaluate.explaining.curves import beside, draw_layers

CALM = ["--threads", "1", "--device", "cpu"]


def test_report_table_and_figure(make_run, script, report_of, monkeypatch, capsys):
    run = make_run(depth=2)
    monkeypatch.setattr("sys.argv", ["layers.py", "--ckpt", str(run)])
    assert script("layers").main(["--ckpt", str(run), *CALM]) == 0
    said = capsys.readouterr().out
    report = report_of(run, "layers")
    values = report["values"]
    assert values["subject"].keys() == values["random"].keys() == {"layer 1", "layer 2"}
    assert values["pixels"].keys() == {"2x2", "image"}
    assert values["pixels"]["image"]["knn"]["accuracy"] == 1.0  # three colours: pixels know
    for entry in (values["subject"]["layer 2"], values["random"]["layer 1"], values["pixels"]["2x2"]):
        assert entry["grid"] == [2, 2] and entry["chance"] == 0.25
        position, (low, high) = entry["position"], entry["position"]["interval"]
        assert low < position["accuracy"] < high and 0.1 < high - low < 0.3  # 21 images of 4 tokens each
        assert position["accuracy"] < 0.5  # noisy colours do not say where
        assert position["tokens_per_image"] == 4 and len(position["rate"]) == 1 and position["distance"] > 0.5
    assert report["data"]["train"]["images"] == 36 and report["data"]["test"]["judged"] == 21
    assert report["protocol"]["knn"]["k"] == 20 and report["protocol"]["notes"] == []
    assert report["step"] == 12 and report["weights_sha256"] and report["command"].startswith("layers.py --ckpt")
    assert (run / "evaluate" / "layers.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for words in ("position: trained", "knn: trained", "random init", "layer 2", "whole image", "layers.png"):
        assert words in said


@pytest.mark.slow
def test_last_layer_agrees_with_knn_and_portions_change_nothing(make_run, script, report_of, monkeypatch):
    run, layers = make_run(depth=3), script("layers")
    assert script("knn").main(["--ckpt", str(run), *CALM]) == 0
    assert layers.main(["--ckpt", str(run), *CALM, "--seeds", "0", "1"]) == 0
    values, neighbors = report_of(run, "layers")["values"], report_of(run, "knn")["values"]
    assert values["subject"]["layer 3"]["knn"]["by_seed"] == [neighbors["subject"]["mean"]["k"]["20"]["accuracy"]]
    assert values["random"]["layer 3"]["knn"]["by_seed"][0] == neighbors["random"]["mean"]["k"]["20"]["accuracy"]
    assert values["pixels"]["image"]["knn"]["accuracy"] == neighbors["pixels"]["pixels"]["k"]["20"]["accuracy"]
    assert len(values["subject"]["layer 1"]["position"]["by_seed"]) == 2  # the probe has a seed, neighbours have none
    monkeypatch.setattr(layers, "MEMORY", 1)
    assert layers.main(["--ckpt", str(run), *CALM, "--seeds", "0", "1"]) == 0
    assert report_of(run, "layers")["values"] == values


def test_position_embedding_is_read_and_said_to_be(make_run, script, report_of, tmp_path):
    for name, colour in COLOURS.items():
        for i in range(12):  # without noise: every patch of an image is the same
            save(tmp_path / "plain" / name / f"{i}.png", np.full((8, 8, 3), colour, np.uint8))
    run, layers = make_run("full", depth=2), script("layers")
    assert layers.main(["--ckpt", str(run), "--data", str(tmp_path / "plain"), *CALM]) == 0
    report = report_of(run, "layers")
    assert report["values"]["subject"]["layer 1"]["position"]["accuracy"] == 1.0
    assert report["values"]["pixels"]["2x2"]["position"]["accuracy"] == 0.25
    assert "no finding" in report["protocol"]["notes"][0]
    run = make_run("none", depth=2)
    assert layers.main(["--ckpt", str(run), "--data", str(tmp_path / "plain"), *CALM]) == 0
    report = report_of(run, "layers")
    assert report["values"]["subject"]["layer 2"]["position"]["accuracy"] == 0.25
    assert not any("no finding" in note for note in report["protocol"]["notes"])


def test_without_labels_there_is_position_only(make_run, script, report_of, tmp_path, capsys):
    write_images(tmp_path / "colours", 10)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (tmp_path / "colours").rglob("*.png"):
        file.rename(flat / f"{file.parent.name}-{file.name}")
    run, layers = make_run(), script("layers")
    assert layers.main(["--ckpt", str(run), "--data", str(flat), *CALM]) == 0
    report = report_of(run, "layers")
    assert report["values"]["subject"]["layer 1"].keys() == {"grid", "chance", "position"}
    assert report["values"]["pixels"].keys() == {"2x2"}
    assert (report["data"]["train"]["images"], report["data"]["test"]["images"]) == (24, 6)
    assert report["data"]["classes"] == [] and "No labels" in report["protocol"]["notes"][0]
    assert "fixed fifth" in report["protocol"]["notes"][1] and "knn" not in capsys.readouterr().out


def test_every_stage_has_its_own_grid_and_chance(script, tmp_path, data):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: builtin\nmodel: {name: swin_tiny_patch4_window7_224, kwargs: {embed_dim: 8, depths: [1, 1], "
        "num_heads: [1, 2], window_size: 2}, crop: 1.0}\nviews: {global: {size: [16, 24]}}\n"
        "objectives: {absolute: {position: none}}\n"
    )
    out = tmp_path / "stages.json"
    words = ["--ckpt", "random", "--like", str(recipe), "--data", str(data), "--out", str(out), "--images", "30"]
    assert script("layers").main([*words, *CALM]) == 0
    report = json.loads(out.read_text())
    assert report["values"].keys() == {"random", "pixels"} and report["data"]["train"]["images"] == 30
    assert report["data"]["test"]["images"] == 6
    found = {layer: (entry["grid"], entry["chance"]) for layer, entry in report["values"]["random"].items()}
    assert found == {"layer 1": ([4, 6], 1 / 24), "layer 2": ([2, 3], 1 / 6)}
    assert report["values"]["pixels"].keys() == {"4x6", "2x3", "image"}
    assert out.with_suffix(".png").exists()


def entry(position, meaning, grid=(2, 2)):
    def about(accuracy):
        return {"accuracy": accuracy, "interval": [accuracy - 0.02, accuracy + 0.03]}

    return {"grid": list(grid), "chance": 1 / (grid[0] * grid[1]), "position": about(position), "knn": about(meaning)}


def test_figure_shows_the_numbers():
    values = {
        "subject": {"layer 1": entry(0.5, 0.6), "layer 2": entry(0.7, 0.65)},
        "random": {"layer 1": entry(0.4, 0.5), "layer 2": entry(0.41, 0.5)},
        "pixels": {"2x2": entry(0.3, 0.45), "image": {"knn": {"accuracy": 0.8}}},
    }
    figure = draw_layers(values, ("what", "on what"), ["and a note"], 20)
    where, what, path = figure.axes
    curves = [list(map(round, line.get_ydata())) for line in where.lines]
    assert curves == [[30, 50, 70], [30, 40, 41], [30, 30, 30], [25, 25, 25], [30]]  # and pixels, chance, the diamond
    assert [list(map(round, line.get_ydata())) for line in what.lines[:3]] == [[45, 60, 65], [45, 50, 50], [80, 80]]
    assert list(path.lines[0].get_xdata()) == list(where.lines[0].get_ydata())
    assert list(path.lines[0].get_ydata()) == list(what.lines[0].get_ydata())
    band = where.collections[0].get_paths()[0].vertices
    assert [band[:, 1][band[:, 0] == 2].min(), band[:, 1][band[:, 0] == 2].max()] == pytest.approx([68, 73])
    assert [text.get_text() for text in where.texts] == ["chance", "pixels of one patch", "random init", "trained"]
    assert where.get_xticklabels()[0].get_text() == "pixels" and where.get_xlabel() == "block"
    assert "and a note" in figure.texts[1].get_text()
    assert len(draw_layers(values, ("", ""), [], None).axes) == 1
    values["random"]["layer 2"] = values["subject"]["layer 2"] = entry(0.9, 0.7, (1, 1))
    values["pixels"]["1x1"] = entry(0.9, 0.6, (1, 1))
    stages = draw_layers(values, ("", ""), [], 20).axes
    assert len(stages) == 2 and stages[0].get_xlabel() == "stage"  # accuracies on two grids are no path
    assert list(map(round, stages[0].lines[3].get_ydata())) == [25, 25, 100]


def test_labels_of_curves_that_meet_stay_apart():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    axes.set_ylim(0, 100)
    beside(axes, [(50, "b", "k"), (49, "a", "k"), (90, "c", "k")], gap=0.1)
    assert [(text.get_text(), text.xy[1]) for text in axes.texts] == [
        ("a", pytest.approx(0.49)), ("b", pytest.approx(0.59)), ("c", pytest.approx(0.9)),
    ]  # fmt: skip


def test_each_mistake_is_one_refusal_and_nothing_is_written(make_run, script, tmp_path, data):
    run, layers = make_run(), script("layers")

    def refused(match, *arguments):
        with pytest.raises(Refusal, match=match):
            layers.main(["--ckpt", str(run), *CALM, *map(str, arguments)])
        assert not (run / "evaluate").exists()

    refused("--images 9: expected at least 10", "--images", 9)
    refused("did you mean '--images'", "--imagse", 9)
    refused("no such folder", "--data", tmp_path / "nowhere")
    write_images(tmp_path / "few", 2)
    refused("has 3 training and 3 test images", "--data", tmp_path / "few")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: vit_tiny_patch16_224, crop: 1.0}\nviews: {global: {size: 16}}\n")
    with pytest.raises(Refusal, match=r"1x1 grid|of 1 patches"):
        layers.main(
            ["--ckpt", "random", "--like", str(recipe), "--out", str(tmp_path / "out"), "--data", str(data), *CALM]
        )
    assert not (tmp_path / "out").exists()
