"""What stands beside every number: the protocol card, and what became of each test image."""

import json

import numpy as np
import pytest
from pictures import write_images

from common.checkpoints import storage
from common.data import labelled_splits
from common.errors import Refusal
from evaluate.job import report
from evaluate.job.report import read

WORDS = ["--threads", "1", "--device", "cpu", "--seeds", "0", "1"]
JOBS = {
    "knn": ["--k", "5"],
    "linear": ["--epochs", "2"],
    "fewshot": ["--shots", "2", "--shares", "0.5", "--draws", "3"],
    "finetune": ["steps=2", "batch=4", "tensorboard=false"],
}


@pytest.mark.parametrize("name", JOBS)
def test_every_number_has_its_card_and_its_images(name, make_run, script, data, monkeypatch):
    run = make_run()
    monkeypatch.setattr("sys.argv", [f"evaluate/{name}.py", "--ckpt", str(run)])
    assert script(name).main(["--ckpt", str(run), *WORDS, *JOBS[name]]) == 0
    content, outcomes = read(run / "evaluate" / f"{name}.json")

    train, test, _ = labelled_splits(str(data))
    protocol = content["protocol"]
    assert protocol["id"].startswith(name) and protocol["selection"]
    assert protocol["transform"] == {"name": "evaluation", "size": [8, 8], "crop": 1.0, "interpolation": "bicubic"}
    assert content["data"]["train"]["fingerprint"] == train.fingerprint()
    assert content["data"]["test"]["fingerprint"] == test.fingerprint()
    assert content["weights_sha256"] == storage.sha256(run / "backbone.safetensors")
    assert content["seeds"] == [0, 1] and content["hardware"]["threads"] == 1 and content["hardware"]["cpu"]
    assert content["command"].startswith(f"{name}.py --ckpt") and content["versions"]["torch"]

    assert outcomes["index"].tolist() == list(range(len(test)))
    for row, kinds in content["values"].items():
        for kind, entry in kinds.items():
            right = outcomes[f"{row}/{kind}"]
            assert right.dtype == bool and right.shape == (len(entry["by_seed"]), len(test))
            assert right.mean(1).tolist() == pytest.approx(entry["by_seed"], abs=1e-12)
    assert outcomes.keys() - {"index"} == {
        f"{row}/{kind}" for row, kinds in content["values"].items() for kind in kinds
    }


def test_images_that_cannot_be_read_are_in_neither(make_run, script, data, tmp_path, capsys):
    folder = tmp_path / "colours"
    write_images(folder / "train", 12, seed=0)
    write_images(folder / "test", 120, seed=1)
    (folder / "test" / "notes.txt").write_text("no image")
    test = labelled_splits(str(folder))[1]
    victims = [3, 200]
    for at in victims:
        with open(test.name(at), "wb") as file:
            file.write(b"no picture")
    run = make_run()
    for name in ("knn", "finetune"):
        words = ["--ckpt", str(run), "--data", str(folder), "--threads", "1", "--device", "cpu", *JOBS[name]]
        assert script(name).main(words) == 0
        content, outcomes = read(run / "evaluate" / f"{name}.json")
        listed = (run / "evaluate" / f"{name}.bad_files.txt").read_text().splitlines()
        assert [line.partition(":")[0] for line in listed] == [test.name(at) for at in victims]
        assert content["data"]["looked_at"] == {"images": 396, "unreadable": 2, "max_bad": "auto"}
        assert content["data"]["not_read"] == ["1 .txt"]
        with pytest.raises(Refusal, match=r"2 of 396 images in .*/colours cannot .* the 1 that --max-bad 1 allows"):
            script(name).main([*words, "--max-bad", "1"])  # of both splits together
        assert test.name(200) in capsys.readouterr().out
        assert content["data"]["test"] == {"images": 360, "fingerprint": content["data"]["test"]["fingerprint"],
                                           "judged": 358}  # fmt: skip
        assert set(range(360)) - set(outcomes["index"].tolist()) == set(victims)
        for row, kinds in content["values"].items():
            for kind, entry in kinds.items():
                assert outcomes[f"{row}/{kind}"].mean() == pytest.approx(entry["accuracy"], abs=1e-12)


def test_a_report_that_is_stopped_half_way_is_missing_and_not_damaged(make_run, script, monkeypatch):
    run = make_run()
    path = run / "evaluate" / "knn.json"
    main, words = script("knn").main, ["--ckpt", str(run), *WORDS, *JOBS["knn"]]
    assert main(words) == 0
    before = path.read_text()

    def stopped_at(suffix):
        def write(target, fill):
            if target.suffix == suffix:
                raise OSError("no space left")
            storage.write_atomically(target, fill)

        with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
            patched.setattr(report, "write_atomically", write)
            main(words)

    stopped_at(".npz")
    assert path.read_text() == before and read(path)[0]["evaluation"] == "knn"  # the earlier one, whole
    stopped_at(".json")
    assert not path.exists()


def test_what_is_no_whole_report_is_refused(make_run, script):
    run = make_run()
    path = run / "evaluate" / "knn.json"
    assert script("knn").main(["--ckpt", str(run), *WORDS, *JOBS["knn"]]) == 0
    good, images = path.read_text(), path.with_name("knn.outcomes.npz")
    assert {"subject/mean", "random/mean", "pixels/pixels", "index"} <= read(path)[1].keys()

    def refused():
        with pytest.raises(Refusal) as error:
            read(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    path.write_text(json.dumps(json.loads(good) | {"format": 99}))
    assert "has report format 99, this version reads format 1" in refused()
    path.write_text(good[: len(good) // 2])
    assert "cannot be read as a report" in refused()
    path.write_text('{"step": 3}')
    assert "is no report of an evaluation" in refused()
    path.write_text(good)
    whole = images.read_bytes()
    np.savez_compressed(images, index=np.arange(3))
    assert "knn.outcomes.npz, what became of each test image, does not match it (SHA-256 differs)" in refused()
    images.write_bytes(whole)
    assert read(path)[0]["format"] == 1
    images.write_bytes(b"no arrays")
    path.write_text(
        json.dumps(json.loads(good) | {"outcomes": {"file": images.name, "sha256": storage.sha256(images)}})
    )
    assert "cannot be read as arrays" in refused()
    for outcomes in ("x", {"file": images.name}, {"file": "../knn.outcomes.npz", "sha256": "x"}):
        path.write_text(json.dumps(json.loads(good) | {"outcomes": outcomes}))
        assert "is no whole report: its outcomes are" in refused()
    path.write_text(good)
    images.unlink()
    assert "is missing; evaluate again" in refused()
    older = {key: value for key, value in json.loads(good).items() if key not in ("format", "outcomes")}
    path.write_text(json.dumps(older))
    assert read(path) == (older, {})
