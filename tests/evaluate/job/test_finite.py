"""Features that are not finite are refused by every evaluation, with the model, the count and the cause."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoints import storage
from common.data import open_data
from common.errors import Refusal
from common.features import extraction
from common.features.finite import is_constant, not_finite, spoiled
from evaluate.probing.probe import probe

CALM = ("--threads", "1", "--device", "cpu")


def altered(run, change):
    """The run with other weights, `change(state)`, whose description says so."""
    file = run / "backbone.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    about = json.loads((run / "backbone.json").read_text())
    (run / "backbone.json").write_text(json.dumps(about | {"weights_sha256": storage.sha256(file)}))
    return run


def nan_in_final_norm(state):
    state["norm.weight"][3:5] = torch.nan


@pytest.mark.parametrize("name", ["knn", "linear", "fewshot", "layers", "explain"])
def test_nan_in_the_weights_is_named_and_nothing_is_written(name, make_run, script):
    run = altered(make_run(), nan_in_final_norm)
    with pytest.raises(Refusal) as caught:
        script(name).main(["--ckpt", str(run), *CALM])
    words = str(caught.value)
    assert words.startswith("run") and "features of 36 of 36 images in" in words
    assert "the weights are not finite in 1 of its" in words and "norm.weight (NaN, 2 of 32 numbers)" in words
    assert "earlier checkpoint" in words and not list((run / "evaluate").glob("*.json"))


def test_what_begins_from_weights_or_hands_them_on_refuses_them_too(make_run, script):
    run = altered(make_run(), lambda state: state["blocks.0.mlp.fc1.bias"].fill_(-torch.inf))
    for name in ("finetune", "export"):
        with pytest.raises(Refusal, match=r"run: the weights .* blocks\.0\.mlp\.fc1\.bias \(infinity, 128 of 128"):
            script(name).main(["--ckpt", str(run), *CALM[: 4 if name == "finetune" else 2]])
        assert not (run / "evaluate").exists() and not (run / "export").exists()


def test_images_whose_numbers_overflow_are_counted_and_fp32_is_advised(make_run, script, data, monkeypatch):
    """A number that a narrow type cannot hold, without a GPU: in three images, and in bf16 alone."""
    run, knn = make_run(), script("knn")
    images, plain = open_data(str(data), "train"), extraction.pooled_blocks
    bright = [int(images.read(i, 3).sum()) for i in (1, 5, 30)]

    def narrow(backbone, plan, batch, blocks):
        features = plain(backbone, plan, batch, blocks)
        if torch.is_autocast_enabled("cpu"):
            features["mean"][torch.isin(batch.flatten(1).sum(1), torch.tensor(bright)), 7] = torch.inf
        return features

    monkeypatch.setattr(extraction, "pooled_blocks", narrow)
    words = ["--ckpt", str(run), *CALM, "--precision", "bf16"]
    for _ in range(2):  # the second time they come from the cache
        with pytest.raises(Refusal, match="run: the features of 3 of 36 images in ") as caught:
            knn.main(words)
        assert images.name(1) in str(caught.value)
        assert "numbers overflow in bf16, in fp32 they are finite: use --precision fp32" in str(caught.value)
    monkeypatch.setattr(extraction, "pooled_blocks", plain)
    with pytest.raises(Refusal, match=r"what was kept of them is damaged: delete .*cache and evaluate again"):
        knn.main(words)
    shutil.rmtree(run / "evaluate" / "cache")
    assert knn.main(words) == 0


def test_the_same_features_for_every_image_are_told(make_run, script, report_of, capsys):
    run = altered(make_run(), lambda state: (state["norm.weight"].zero_(), state["norm.bias"].fill_(0.3)))
    assert script("knn").main(["--ckpt", str(run), "--k", "5", *CALM]) == 0
    (warning,) = report_of(run, "knn")["warnings"]
    assert warning.startswith("run: features (") and "are the same for every image" in warning
    assert capsys.readouterr().out.count(warning) == 2  # when it is found, and below the table
    assert report_of(run, "knn")["values"]["random"].keys() == {"class", "mean", "both"}


def test_which_images_and_tensors():
    kinds = {"class": torch.zeros(4, 3), "mean": torch.ones(4, 3), "index": torch.arange(4)}
    assert not not_finite(kinds).any()
    kinds["class"][1, 2], kinds["mean"][3, 0] = -torch.inf, torch.nan
    assert not_finite(kinds).tolist() == [False, True, False, True]
    far = torch.tensor([[1e25, 0.0], [1e15, 1.0], [0.0, 0.0]])  # finite, but its similarity to anything would be 0
    assert not_finite({"mean": far}).tolist() == [True, False, False]
    assert not_finite({"mean": torch.full((2, 700), 60_000.0).half()}).tolist() == [False, False]
    assert not_finite({"index": torch.arange(4)}).tolist() == [] == not_finite({"mean": torch.zeros(0, 3)}).tolist()
    state = {"a": torch.ones(2), "ids": torch.arange(3), "b": torch.tensor([1.0, torch.nan]).half()}
    assert spoiled(state) == "1 of its 3 tensors, first b (NaN, 1 of 2 numbers)" and spoiled({}) == ""
    one = torch.linspace(-3, 3, 7)
    assert (
        is_constant(one.repeat(5, 1))
        and is_constant(1e-20 * torch.arange(5.0)[:, None])
        and is_constant(torch.zeros(5, 7))
    )
    assert is_constant(one.repeat(5, 1) * (1 + 1e-8 * torch.arange(5)[:, None]))
    assert not is_constant(one.repeat(5, 1) * (1 + 1e-3 * torch.arange(5)[:, None])) and not is_constant(one[None])


def test_heads_that_diverge_are_not_chosen_and_are_told():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    x = torch.nn.functional.one_hot(labels, 3).float() + torch.randn(600, 3, generator=generator)  # not separable
    found = probe(x, labels, x, labels, 3, rates=[0.1, 3e38], epochs=20)
    assert found.diverged == (3e38,)
    assert found.rate == found.best_rate == 0.1 and found.accuracy > 0.6
    lost = probe(x, labels, x, labels, 3, rates=[3e38], epochs=20)
    assert lost.rate in lost.diverged
