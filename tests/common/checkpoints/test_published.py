"""Files of weights as others publish them: what is unwrapped, left out and resized is said; the rest is refused."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from common.checkpoints import pretrained, published
from common.checkpoints.pretrained import begin_from
from common.errors import Refusal
from common.models import ModelConfig, create, sp_vit
from evaluate.job.subjects import subject_of

SMALL = "test_vit"  # timm's own: 64 wide, 6 deep, 160 pixels, 10x10 patches and a class token
SWIN = "swin_tiny_patch4_window7_224"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Of the model without a classifier."""
    torch.manual_seed(0)
    return timm.create_model(SMALL, num_classes=0).state_dict()


def loaded(weights: Path | str, **kwargs: Any) -> tuple[Any, list[str]]:
    model = timm.create_model(SMALL, num_classes=0, **kwargs)
    return model, published.load(model, str(weights), "FILE")


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def other(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


Content = Callable[[State], Any]
HEAD = {"head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}
DINO = {"head.last_layer.weight_v": torch.zeros(7, 3)}
WRAPPED: dict[str, tuple[Content, list[str]]] = {
    "as they are": (dict, []),
    "with a classifier": (lambda s: s | HEAD, ["its classifier is left out"]),
    "DDP": (lambda s: under("module.", s), ["read from its module"]),
    "compiled": (lambda s: under("_orig_mod.", s), ["read from its _orig_mod"]),
    "MAE": (
        lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=1)},
        ["read from its model", "left out: args, epoch"],
    ),
    "EMA": (
        lambda s: {"state_dict": other(s), "state_dict_ema": s},
        ["read from its state_dict_ema, not from state_dict", "left out: state_dict"],
    ),
    "DINO": (
        lambda s: {
            "student": under("module.backbone.", other(s)) | under("module.", DINO),
            "teacher": under("backbone.", s) | DINO,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
            "args": argparse.Namespace(arch="vit_small"),
            "dino_loss": {"center": torch.zeros(1, 3)},
        },
        [
            "read from its teacher.backbone, not from student.module.backbone",
            "left out: args, dino_loss, optimizer, student and 1 more",
        ],
    ),
    "half": (lambda s: {k: v.half() for k, v in s.items()}, ["stored as float16, computed in float32"]),
    "a mask token": (lambda s: s | {"mask_token": torch.zeros(1, 64)}, ["left out: mask_token"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_the_backbone_in_a_file_is_found_and_what_was_done_is_said(name: str, state: State, tmp_path: Path) -> None:
    content, notes = WRAPPED[name]
    torch.save(content(state), tmp_path / "file.pth")
    model, said = loaded(tmp_path / "file.pth")
    assert said == notes
    atol = 1e-3 if name == "half" else 0
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=atol)


def test_another_branch_is_asked_for_by_name(state: State, tmp_path: Path) -> None:
    file = tmp_path / "file.pth"
    torch.save(WRAPPED["DINO"][0](state), file)
    model, said = loaded(f"{file}::student")
    assert torch.equal(model.cls_token, state["cls_token"] + 1)
    assert said[0] == "read from its student.module.backbone, not from teacher.backbone"
    with pytest.raises(Refusal, match=r"0 models under 'ema'; it has: student\.module\.backbone, teacher\.backbone$"):
        loaded(f"{file}::ema")
    torch.save({"one": state, "two": state}, file)
    with pytest.raises(Refusal, match=r"holds 2 models: one, two; choose with FILE::NAME"):
        loaded(file)
    assert loaded(f"{file}::two")[1][0] == "read from its two, not from one"


def without(state: State, part: str) -> State:
    return {name: tensor for name, tensor in state.items() if part not in name}


def nan(state: State) -> State:
    return state | {"norm.bias": torch.full((64,), torch.nan)}


def deeper(state: State) -> State:
    return state | {
        f"blocks.{at}{name[8:]}": state[name].clone() for at in (6, 7) for name in state if name[:8] == "blocks.0"
    }


REFUSED: dict[str, tuple[Content, str]] = {
    "more blocks": (deeper, r"24 unexpected \(such as blocks\.6\..*\); give the timm:NAME that it is of$"),
    "fewer blocks": (lambda s: without(s, "blocks.5"), r"another model: 12 missing \(such as blocks\.5\."),
    "a second head": (lambda s: s | {"head_dist.bias": torch.zeros(5)}, r"1 unexpected \(such as head_dist\.bias\)"),
    "attention pooling": (lambda s: s | under("attn_pool.", {"q.bias": s["norm.bias"]}), r"such as attn_pool\.q\.bias"),
    "another width": (lambda s: {k: v[..., :32] for k, v in s.items()}, r"of another shape \(such as blocks\.0\."),
    "no finite numbers": (nan, r"has 1 tensors with numbers that are not finite \(such as norm\.bias\)"),
    "quantised": (lambda s: s | {"norm.bias": torch.zeros(64, dtype=torch.int8)}, r"norm\.bias is of type int8"),
    "sparse": (
        lambda s: s | {"norm.bias": torch.ones(64).to_sparse()},
        r"norm\.bias is of type float32 in the layout sparse_coo",
    ),
    "an optimizer": (
        lambda s: {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        r"another model: 78 missing \(such as",
    ),
    "a number": (lambda s: {"epoch": 3}, r"holds no tensors, but epoch$"),
    "a list": (lambda s: [s], r"holds a list: expected a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused_with_counts_and_an_example(name: str, state: State, tmp_path: Path) -> None:
    content, said = REFUSED[name]
    torch.save(content(state), tmp_path / "file.pth")
    with pytest.raises(Refusal, match=f"^FILE.*{said}") as refusal:
        loaded(tmp_path / "file.pth")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


FILES = {
    "empty": (b"", "is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "Git LFS pointer"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
    "text": (b"not weights", "is no weights file"),
    "cut off": (b"PK\x03\x04" + bytes(99), "no weights file"),
    "pickle": (b"\x80\x04\x95", "cannot be read"),
    "safetensors": ((16).to_bytes(8, "little") + b'{"a": not json}' + bytes(9), "cannot be read"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_weights_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(FILES[name][0])
    with pytest.raises(Refusal, match=f"^FILE.*{FILES[name][1]}") as refusal:
        loaded(tmp_path / "file.pth")
    assert "\n" not in str(refusal.value)


class Innocent:
    """Something that unpickling would make, and thereby run."""


def test_objects_and_folders_are_refused_by_name(state: State, tmp_path: Path) -> None:
    for zipped in (True, False):
        file = tmp_path / "file.pth"
        torch.save({"model": state, "config": Innocent()}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(Refusal, match=r"holds Python objects \(.*Innocent\), which could run code"):
            loaded(file)
    with pytest.raises(Refusal, match=r"is a folder: give the file in it \(file\.pth\)"):
        loaded(tmp_path)


def test_what_is_resized_is_said_and_stored(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    large = dict(timm.create_model(SMALL, num_classes=0, img_size=224).state_dict())
    save_file(large, "large.safetensors")
    found = subject_of(f"timm:{SMALL}", weights="large.safetensors")
    assert found.description["loaded"] == ["position embedding resized from 14x14 to 10x10"]
    expected = resample_abs_pos_embed(large["pos_embed"], [10, 10], [14, 14], 1, antialias=False)
    assert found.state is not None and torch.equal(found.state["pos_embed"], expected)
    kernels = dict(timm.create_model(SMALL, num_classes=0, img_size=80, patch_size=8).state_dict())
    save_file(kernels, "kernels.safetensors")
    _, said = loaded("kernels.safetensors")
    assert said == ["patch_embed.proj.weight resized from 64x3x8x8 to 64x3x16x16"]
    made = create(ModelConfig(SMALL, mean=[0.5] * 3, std=[0.5] * 3), 160)
    assert "; position embedding resized from 14x14 to 10x10; " in begin_from(
        made, f"timm:{SMALL}", "large.safetensors"
    )


def test_windows_of_a_swin_are_resized_and_its_layouts_told_apart(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 0}
    wide = timm.create_model(SWIN, img_size=64, window_size=8, **kwargs).state_dict()
    tables = [name for name in wide if name.endswith("table")]
    old = {name.replace("layers.1.downsample", "layers.0.downsample"): tensor for name, tensor in wide.items()}
    for state in (dict(wide), old | {"head.weight": torch.zeros(5, 32)}):  # timm's layout, and the authors'
        save_file(state, tmp_path / "swin.safetensors")
        model = timm.create_model(SWIN, img_size=64, window_size=4, **kwargs)
        said = published.load(model, str(tmp_path / "swin.safetensors"), "FILE")
        assert said[-1] == f"relative_position_bias_table of {len(tables)} blocks resized from 225x1 to 49x1"
        assert ("its classifier is left out" in said) == ("head.weight" in state)
        assert torch.equal(model.layers[1].downsample.norm.weight, wide["layers.1.downsample.norm.weight"])


def test_arrays_of_jax(tmp_path: Path, state: State) -> None:
    model = timm.create_model(SMALL, num_classes=0)
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    arrays = jax_arrays(state)
    np.savez(tmp_path / "jax.npz", **arrays)
    assert published.load(model, str(tmp_path / "jax.npz"), "FILE") == []
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    np.savez(tmp_path / "deep.npz", **arrays | {"Transformer/encoderblock_6/LayerNorm_0/scale": np.zeros(64)})
    with pytest.raises(Refusal, match=f"^FILE holds the weights of another model: 7 blocks, and {SMALL} has 6"):
        published.load(model, str(tmp_path / "deep.npz"), "FILE")


def jax_arrays(state: State) -> dict[str, np.ndarray]:
    """A ViT's tensors as JAX stores them: kernels transposed, heads apart."""
    heads, out = 2, {}
    for name, tensor in state.items():
        array, block = tensor.numpy(), name.split(".")
        prefix = f"Transformer/encoderblock_{block[1]}" if block[0] == "blocks" else ""
        part, kind = ".".join(block[2:-1]), {"weight": "kernel", "bias": "bias"}.get(block[-1], "")
        if name == "cls_token":
            out["cls"] = array
        elif name == "pos_embed":
            out["Transformer/posembed_input/pos_embedding"] = array
        elif block[0] == "patch_embed":
            out[f"embedding/{kind}"] = array.transpose(2, 3, 1, 0) if kind == "kernel" else array
        elif block[0] == "norm":
            out[f"Transformer/encoder_norm/{'scale' if kind == 'kernel' else 'bias'}"] = array
        elif part in ("norm1", "norm2"):
            place = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_2"}[part]
            out[f"{prefix}/{place}/{'scale' if kind == 'kernel' else 'bias'}"] = array
        elif part == "attn.qkv":
            for which, piece in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                shaped = piece.T.reshape(64, heads, 32) if kind == "kernel" else piece.reshape(heads, 32)
                out[f"{prefix}/MultiHeadDotProductAttention_1/{which}/{kind}"] = shaped
        elif part == "attn.proj":
            shaped = array.T.reshape(heads, 32, 64) if kind == "kernel" else array
            out[f"{prefix}/MultiHeadDotProductAttention_1/out/{kind}"] = shaped
        else:
            place = f"MlpBlock_3/Dense_{'01'[part.endswith('fc2')]}"
            out[f"{prefix}/{place}/{kind}"] = array.T if kind == "kernel" else array
    return out


def test_timms_own_download_goes_the_same_way(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the hub's cache that is cut short is refused as a local one is, and a whole one is loaded."""
    asked: list[str] = []

    def fetched(repository: str, name: str, revision: str | None = None) -> str:
        asked.append(f"{repository}/{name}")
        return str(tmp_path / "hub.safetensors")

    monkeypatch.setattr(pretrained, "hf_hub_download", fetched)
    save_file(dict(state), tmp_path / "hub.safetensors")
    whole = subject_of(f"timm:{SMALL}.r160_in1k")
    assert asked == [f"timm/{SMALL}.r160_in1k/model.safetensors"]
    assert whole.state is not None and torch.equal(whole.state["norm.bias"], state["norm.bias"])
    assert whole.weights_sha256 is not None
    save_file(deeper(dict(state)), tmp_path / "hub.safetensors")
    with pytest.raises(Refusal, match=r"^--ckpt timm:test_vit\.r160_in1k: .*24 unexpected"):
        subject_of(f"timm:{SMALL}.r160_in1k")
    with pytest.raises(Refusal, match=r"timm publishes no weights of lvvit_s.*give a local file with --weights FILE"):
        subject_of("timm:lvvit_s")


# ------------------------------------------------------------------------------------------ with the classifier


LV: dict[str, Any] = {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 2}
IRPE: dict[str, Any] = {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 2}
AUTHORS: dict[str, tuple[str, dict[str, Any], Content, str]] = {  # as they save, and what is said of it
    "LV-ViT": ("lvvit_s", LV, dict, ""),
    "SP-ViT": (
        "spvit_s",
        LV | {"img_size": 64, "depth": 3},
        lambda s: {"state_dict": other(s), "state_dict_ema": s, "epoch": 3, "arch": "lvvit_s"},
        "read from its state_dict_ema, not from state_dict",
    ),
    "iRPE": (
        "deit_tiny_patch16_224_ctx_product_50_shared_k",
        IRPE,
        lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=1)},
        "read from its model",
    ),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", IRPE, lambda s: {"model": s}, "read from its model"),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_a_model_with_a_classifier_gets_that_of_the_file(name: str, tmp_path: Path) -> None:
    """With its number of classes, whatever the architecture's own; LV-ViT's patches have their say as well."""
    architecture, kwargs, content, said = AUTHORS[name]
    torch.manual_seed(1)
    theirs = timm.create_model(architecture, num_classes=7, **kwargs).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    torch.save(content(theirs.state_dict()), tmp_path / "authors.pth")
    model = timm.create_model(architecture, num_classes=1, **kwargs).eval()
    notes = published.load(model, str(tmp_path / "authors.pth"), "FILE")
    assert (notes[0] if notes else "") == said and not any("classifier" in note for note in notes)
    images = torch.randn(2, 3, kwargs["img_size"], kwargs["img_size"])
    with torch.no_grad():
        assert torch.equal(model(images), theirs(images)) and model.num_classes == 7
        if hasattr(model, "aux_head"):
            tokens = model.forward_features(images)
            of_class, of_patches = model.head(tokens[:, 0]), model.aux_head(tokens[:, 1:])
            torch.testing.assert_close(model(images), of_class + 0.5 * of_patches.amax(1))
            assert of_patches.abs().amax() > 1e-3


@pytest.mark.parametrize("theirs", [{"local_blocks": 1}, {"local_blocks": 3}, {"legacy": True}], ids=str)
def test_which_blocks_of_an_sp_vit_have_the_prior_is_read_from_the_file(theirs: dict[str, Any], tmp_path: Path) -> None:
    """M was trained with 10, where 18 are usual, and L without any: their names alone do not say it."""
    kwargs = LV | {"img_size": 64, "depth": 4}
    torch.manual_seed(1)
    published_model = timm.create_model("spvit_m", num_classes=7, **kwargs, **theirs).eval()
    for parameter in published_model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    torch.save({"state_dict": published_model.state_dict()}, tmp_path / "m.pth")
    model = timm.create_model("spvit_m", num_classes=1, **kwargs).eval()
    published.load(model, str(tmp_path / "m.pth"), "FILE")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), published_model(images))
    form = sp_vit.form(model)
    assert form == ({"local_blocks": 2, "legacy": True} if "legacy" in theirs else theirs)
    options = {name: value for name, value in kwargs.items() if name != "img_size"} | form
    backbone = create(ModelConfig("spvit_m", options), 64).eval()
    backbone.model.load_state_dict({name: each for name, each in model.state_dict().items() if "head." not in name})
    with torch.no_grad():
        features, tokens = backbone(images), model.forward_features(images)
    torch.testing.assert_close(torch.cat([features.prefix, features.tokens], 1), tokens)


def test_a_file_without_a_classifier_is_refused_for_a_model_with_one(state: State, tmp_path: Path) -> None:
    model = timm.create_model(SMALL, num_classes=1)
    torch.save(dict(state), tmp_path / "file.pth")
    with pytest.raises(Refusal, match=r"^FILE holds no classifier \(head\): it is a backbone; give a file with one"):
        published.load(model, str(tmp_path / "file.pth"), "FILE")
    torch.save(state | HEAD | {"head.weight": torch.zeros(4, 64)}, tmp_path / "file.pth")
    with pytest.raises(Refusal, match=r"1 of another shape \(such as head\.bias: \(5,\), expected \(4,\)\)"):
        published.load(model, str(tmp_path / "file.pth"), "FILE")
    np.savez(tmp_path / "jax.npz", **jax_arrays(state))
    with pytest.raises(Refusal, match=r"^FILE holds no classifier"):
        published.load(model, str(tmp_path / "jax.npz"), "FILE")
    arrays = jax_arrays(state) | {"head/kernel": np.ones((64, 5), np.float32), "head/bias": np.arange(5.0)}
    np.savez(tmp_path / "jax.npz", **arrays)
    assert published.load(model, str(tmp_path / "jax.npz"), "FILE") == []
    assert torch.equal(model.head.bias, torch.arange(5.0)) and torch.equal(model.head.weight, torch.ones(5, 64))
