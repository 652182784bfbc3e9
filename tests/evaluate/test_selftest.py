"""evaluate/selftest.py: what it would do, what it refuses, and that a wrong figure fails (whole: tests/documented)."""

import pytest
import timm
import torch

from common.errors import Refusal


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights under the authors' names, drawn at random: no figure of theirs."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "dino.pth"
    torch.save(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), file)
    return file


def test_without_weights_it_says_what_it_would_do(script, capsys):
    assert script("selftest").main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("nothing was checked: --weights is missing")
    for words in ("74.5 ± 0.3 %", "77.0 ± 0.5 %", "knn.py --ckpt timm:vit_small_patch16_224.dino", "--crop 0.875"):
        assert words in said
    assert script("selftest").main(["--only", "knn"]) == 0
    assert "77.0" not in capsys.readouterr().out


def test_mistakes(script, weights, data, tmp_path, capsys):
    selftest = script("selftest")
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), other)
    for words, message in (
        (["--weights", str(tmp_path / "none.pth")], "no such file"),
        (["--weights", str(other)], "150 of another shape"),
        (["--weights", str(weights)], "--data is missing: the published figures are of ImageNet-1k"),
        (["--weights", str(weights), "--data", str(data)], "has 3 classes, 36 training and 21 test images"),
        (["--only", "knnn"], "knn"),
    ):
        with pytest.raises(Refusal, match=message):
            selftest.main([*words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert "21,665,664 parameters" in capsys.readouterr().out


def test_verdicts(script):
    selftest = script("selftest")
    knn, linear = selftest.CHECKS["knn"], selftest.CHECKS["linear"]
    assert selftest.verdict(knn, "knn/dino", 0.7432) == (
        "knn     74.32 %, published 74.5 ± 0.3: as published (-0.18)", True,
    )  # fmt: skip
    line, passed = selftest.verdict(linear, "linear/dino+augment", 0.7641)
    assert not passed and "NOT as published (-0.59)" in line
    with pytest.raises(Refusal, match=r"protocol linear/dino, and 77\.0 of linear/dino"):
        selftest.verdict(linear, "linear/dino", 0.77)
