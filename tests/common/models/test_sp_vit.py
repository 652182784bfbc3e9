"""SP-ViT: the prior and the published model to the last digit, on any grid; what it keeps in memory; how it trains."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from by_hand import vit as by_hand
from timm.models.vision_transformer import Attention
from torch import Tensor
from torch.nn import functional as F

from common.errors import Refusal
from common.models.sp_vit import Offsets, SpAttention, SpVit, checkpoint_filter_fn, tabulate

PUBLISHED = json.loads((Path(__file__).parents[2] / "fixtures/sp_vit.json").read_text())["spsa"]
TINY: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 12,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 3.0,
    "num_classes": 5,
    "skip_lam": 2.0,
    "local_blocks": 2,
}


def make(**kwargs: Any) -> SpVit:
    torch.manual_seed(0)
    return timm.create_model("spvit_s", **{**TINY, **kwargs})


def images(*size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(model: SpVit, x: Tensor) -> Tensor:
    said, dense, _ = model(x)
    of_tokens = torch.arange(len(x) * dense.shape[1]) % 5
    return F.cross_entropy(said, torch.arange(len(x)) % 5) + F.cross_entropy(dense.flatten(0, 1), of_tokens)


# ---------------------------------------------------------------------------- SP-SA


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_the_published_one(fused: bool) -> None:
    attention = SpAttention(8, 2).double().eval()
    attention.load_state_dict({name: torch.tensor(numbers).double() for name, numbers in PUBLISHED["weights"].items()})
    attention.fused_attn = fused
    where = Offsets((3, 3)).double()
    expected = torch.tensor(PUBLISHED["prior_[query,key,head]"]).double()
    assert torch.allclose(attention.prior(where), expected.permute(2, 0, 1), atol=1e-6)
    seen = []
    attention.attn_drop.register_forward_hook(lambda module, given, out: seen.append(out))
    out = attention(torch.tensor(PUBLISHED["x"]).double(), where)
    assert torch.allclose(out[0], torch.tensor(PUBLISHED["output"]).double(), atol=1e-6)
    if not fused:  # explanations read the probabilities there
        assert torch.allclose(seen[0][0], torch.tensor(PUBLISHED["attn_[head,q,k]"]).double(), atol=1e-6)


def test_offsets_of_a_grid_drawn_by_hand() -> None:
    offsets, index = tabulate((2, 3))  # patches 0 1 2 / 3 4 5
    index = index.view(6, 6)
    assert offsets.shape == (15, 2)
    assert offsets[index[0, 5]].tolist() == [2, 1]  # two columns right, one row down
    assert offsets[index[5, 0]].tolist() == [-2, -1]
    assert offsets[index[4, 2]].tolist() == [1, -1]
    assert offsets[index[3, 3]].tolist() == [0, 0]
    rescaled, _ = tabulate((2, 3), reference=(14, 14))
    assert rescaled[index[0, 5]].tolist() == [13, 13]
    assert rescaled[index[0, 1]].tolist() == [6.5, 0]
    assert tabulate((1, 1), reference=(14, 14))[0].tolist() == [[0, 0]]


def test_fused_and_explicit_attention_have_the_same_gradients() -> None:
    grads = []
    for fused in (True, False):
        model = make(img_size=(48, 80), mix_token=False).double().train()
        by_hand.redraw(model)
        for block in model.blocks:
            block.attn.fused_attn = fused
        x = images(48, 80).requires_grad_()
        loss_of(model, x).backward()
        grads.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads, strict=True))


def test_it_begins_as_plain_attention() -> None:
    spatial = SpAttention(12, 2).double()
    plain = Attention(12, 2).double()
    plain.qkv.weight.data = torch.cat([spatial.qk.weight, spatial.v.weight])
    plain.proj.load_state_dict(spatial.proj.state_dict())
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    where = Offsets((2, 3)).double()
    assert torch.equal(spatial.prior(where), torch.ones(2, 6, 6, dtype=torch.float64))
    assert torch.allclose(spatial(x, where), plain(x), atol=1e-12)


def test_no_layer_keeps_a_table_of_pairs() -> None:
    model = make(depth=6, local_blocks=4)
    N = 16
    pairs = [name for name, buffer in model.named_buffers() if buffer.numel() >= N * N]
    assert len(pairs) == 1
    assert not [name for name in model.state_dict() if "where" in name]
    largest = []

    def look(tensor: Tensor) -> Tensor:
        largest.append(tensor.numel())
        return tensor

    attention = model.blocks[0].attn
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        attention.prior(model.where)
    assert max(largest) <= max(N * N, 49 * 12)  # never N*N*D


# ---------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((64, 64), {}),
        ((48, 80), {}),  # odd, and not square
        ((80, 80), {"local_blocks": 1}),  # 5x5: N is odd
        ((32, 48), {"local_blocks": 0}),
        ((64, 64), {"legacy": True}),
        ((16, 48), {"depth": 2, "local_blocks": None}),
    ],
)
def test_tokens_and_logits_are_those_of_the_formulas(size: tuple[int, int], options: dict[str, Any]) -> None:
    model = make(img_size=size, **options).double().eval()
    state = by_hand.redraw(model)
    x = images(*size)
    grid = (size[0] // 16, size[1] // 16)
    assert state["pos_embed"].shape[1] == grid[0] * grid[1] + (model.local_blocks == 0)
    spatial = [f"blocks.{i}.attn.qk.weight" in state for i in range(len(model.blocks))]
    assert sum(spatial) == (0 if options.get("legacy") else model.local_blocks)
    tokens = np.stack(
        [by_hand.encode(state, by_hand.stem(state, each), grid, 2, 2.0, model.local_blocks) for each in x.numpy()]
    )
    np.testing.assert_allclose(model.forward_features(x).detach(), tokens, rtol=0, atol=1e-10)
    np.testing.assert_allclose(model(x).detach(), [by_hand.logits(state, t) for t in tokens], rtol=0, atol=1e-10)


def test_parameters_have_the_published_names() -> None:
    names = set(make().state_dict())
    first = {name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")}
    later = {name.removeprefix("blocks.2.") for name in names if name.startswith("blocks.2.")}
    shared = {
        *(f"{layer}.{part}" for layer in ("norm1", "norm2", "attn.proj") for part in ("weight", "bias")),
        *(f"{layer}.{part}" for layer in ("mlp.fc1", "mlp.fc2", "pos_block.proj.0") for part in ("weight", "bias")),
    }
    of_prior = {"attn.w1.weight", "attn.w1.bias", "attn.w2", "attn.b2"}
    assert first == shared | of_prior | {"attn.qk.weight", "attn.v.weight"}
    assert later == shared | {"attn.qkv.weight"}
    rest = {name for name in names if not name.startswith("blocks.")}
    lv_vit = timm.create_model("lvvit_s", **{k: v for k, v in TINY.items() if k != "local_blocks"})
    assert rest == {name for name in lv_vit.state_dict() if not name.startswith("blocks.")}


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("spvit_s", {}, (26_234_468, 26_380_388)),
        ("spvit_m", {"local_blocks": 10}, (55_952_992, 56_147_552)),
        ("spvit_m", {}, (55_969_440, 56_164_000)),
        ("spvit_l", {"legacy": True}, (150_205_520, 150_497_360)),
        ("spvit_l", {}, (150_273_368, 150_565_208)),
    ],
)
def test_parameters_are_as_many_as_published(name: str, options: dict[str, Any], counts: tuple[int, int]) -> None:
    of_patch = {"spvit_s": 384, "spvit_m": 512, "spvit_l": 768}[name]
    sizes = {224: counts[0], 288: counts[0] + (18**2 - 14**2) * of_patch, 384: counts[1]}
    with torch.device("meta"):
        for size, count in sizes.items():
            model = timm.create_model(name, img_size=size, weight_init="skip", **options)
            assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_every_parameter_learns_in_float32() -> None:
    model = make(drop_path_rate=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x = images(64, 64, count=4).float()
    losses = []
    with torch.autograd.set_detect_anomaly(True):
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not still  # w1 has no gradient in the first step: w2 is zero
    assert losses[-1] < losses[0]


def test_nothing_tells_a_token_its_place_when_position_is_none() -> None:
    model = make().double().eval()
    by_hand.redraw(model)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    patches = model.patch_embed(images(64, 64)).detach()
    x = images(64, 64)

    def tokens(of_patches: Tensor, position: bool) -> Tensor:
        model.patch_embed.forward = lambda images: of_patches
        return next(iter(model.run(x, [len(model.blocks) - 1], position)))[0].detach()

    for position, same in ((False, True), (True, False)):
        straight, permuted = tokens(patches, position), tokens(patches[:, order], position)
        assert torch.allclose(straight[:, 0], permuted[:, 0]) == same
        assert torch.allclose(straight[:, 1:][:, order], permuted[:, 1:]) == same


def test_layers_and_intermediates_agree_and_know_when_the_class_token_joins() -> None:
    model, x = make(img_size=(48, 80)).double().eval(), images(48, 80)
    by_hand.redraw(model)
    runs = list(model.run(x, [0, 1, 2]))
    assert [(tuple(tokens.shape), P, grid) for tokens, P, grid in runs] == [
        ((2, 15, 12), 0, (3, 5)),
        ((2, 15, 12), 0, (3, 5)),
        ((2, 16, 12), 1, (3, 5)),
    ]
    (alone,) = model.run(x, [1], norm=False)
    assert torch.equal(model.norm(alone[0]), runs[1][0])
    final, pairs = model.forward_intermediates(x, return_prefix_tokens=True, norm=True)
    assert torch.equal(final, runs[-1][0])
    for (maps, prefix), (tokens, P, _) in zip(pairs, runs, strict=True):
        assert torch.equal(prefix, tokens[:, :P])
        assert torch.equal(maps.flatten(2).mT, tokens[:, P:])
    told = model.forward_intermediates(x, indices=[1], stop_early=True, output_fmt="NLC", output_dict=True, norm=True)
    assert torch.equal(told["image_intermediates"][0], runs[1][0])
    assert torch.equal(told["image_features"], runs[1][0])
    wrapped = timm.create_model("spvit_s", features_only=True, out_indices=(0, 2), **{**TINY, "num_classes": 0})
    assert [tuple(each.shape) for each in wrapped(torch.zeros(1, 3, 64, 64))] == [(1, 12, 4, 4)] * 2
    with pytest.raises(ValueError, match="mask"):
        model.forward_features(x, attn_mask=torch.zeros(15, 15))


def test_a_block_runs_alone() -> None:
    model = make().eval()
    assert model.blocks[0](torch.zeros(1, 16, 12)).shape == (1, 16, 12)
    assert model.blocks[2](torch.zeros(1, 17, 12)).shape == (1, 17, 12)
    with pytest.raises(ValueError, match="17 tokens: expected 4x4 patches"):
        model.blocks[0](torch.zeros(1, 17, 12))


def test_compiled_and_in_bfloat16_it_says_the_same() -> None:
    model, x = make().eval(), images(64, 64).float()
    by_hand.redraw(model)
    with torch.no_grad():
        said = model.forward_features(x)
        compiled = torch.compile(model.forward_features, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), said, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model.forward_features(x) - said).abs().mean() < 0.05 * said.abs().mean()


def test_checkpointing_changes_no_gradient() -> None:
    grads = []
    for enable in (False, True):
        model = make(mix_token=False).double().train()
        by_hand.redraw(model)
        model.set_grad_checkpointing(enable)
        loss_of(model, images(64, 64)).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("local_blocks", [0, 2])
def test_a_model_that_changes_its_size_is_one_that_was_loaded_at_that_size(local_blocks: int) -> None:
    small = make(local_blocks=local_blocks).eval()
    large = make(local_blocks=local_blocks, img_size=(80, 48)).eval()
    dynamic = make(local_blocks=local_blocks, dynamic_img_size=True).eval()
    by_hand.redraw(small)
    large.load_state_dict(checkpoint_filter_fn({"model": small.state_dict()}, large))
    dynamic.load_state_dict(small.state_dict())
    x = images(80, 48).float()
    assert torch.allclose(dynamic(x), large(x), atol=1e-5)
    assert torch.allclose(dynamic(images(64, 64).float()), small(images(64, 64).float()), atol=1e-5)
    small.set_input_size((80, 48))
    assert torch.allclose(small(x), large(x), atol=1e-5)


def test_a_file_with_a_class_entry_is_not_one_without() -> None:
    with pytest.raises(Refusal, match="17 entries"):
        checkpoint_filter_fn(make(local_blocks=0).state_dict(), make(img_size=96))
    with pytest.raises(Refusal, match="local_blocks=0"):
        checkpoint_filter_fn(make().state_dict(), make(local_blocks=0, img_size=96))


def test_rescaled_offsets_end_where_those_of_the_reference_do() -> None:
    small, large = make(), make(img_size=128, rescale_offsets=4)
    by_hand.redraw(small)
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    of_small = small.blocks[0].attn.prior(small.where)
    of_large = large.blocks[0].attn.prior(large.where)
    assert torch.allclose(of_large[:, 0, 63], of_small[:, 0, 15], atol=1e-6)  # from corner to corner
    assert torch.allclose(of_large[:, 0, 7], of_small[:, 0, 3], atol=1e-6)
    assert make(img_size=128).where.offsets.max() == 7  # the authors': it grows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"local_blocks": 3}, "local_blocks=3 of depth 3: expected 0 to 2"),
        ({"local_blocks": -1}, "local_blocks=-1"),
        ({"qk_norm": True}, "qk_norm"),
        ({"img_size": 72}, "img_size=72"),
        ({"mix_token": True, "return_dense": False}, "return_dense"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal) as refused:
        make(**options)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_decayed() -> None:
    model = make()
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}  # and biases, which are of one dimension
    assert model.blocks[0].attn.w2.ndim == model.blocks[0].attn.w1.weight.ndim == 2
    assert model.blocks[0].attn.b2.ndim == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"img_size": 8}, "img_size=8: expected multiples of the stem's stride, 16 pixels, such as 16"),
        ({"img_size": (32, 40)}, r"such as 32x32"),
        ({"local_blocks": 1.5}, "local_blocks=1.5 of depth 3: expected 0 to 2"),
        ({"local_blocks": "2"}, "local_blocks='2'"),
        ({"skip_lam": 0}, "skip_lam=0: expected"),
        ({"no_embed_class": True}, "no_embed_class=True: not for SP-ViT"),
        ({"rescale_offsets": (14,)}, r"rescale_offsets=\(14,\): expected a grid"),
    ],
    ids=str,
)
def test_one_line_says_what_is_wrong(options: dict[str, Any], words: str) -> None:
    small = {"img_size": 32, "embed_dim": 12, "depth": 3, "num_heads": 2}
    with pytest.raises(Refusal, match=words) as refused:
        timm.create_model("spvit_s", **{**small, **options})
    assert "\n" not in str(refused.value)


def test_a_model_made_on_the_meta_device_is_whole() -> None:
    small = {"img_size": (32, 48), "embed_dim": 12, "depth": 3, "num_heads": 2}
    with torch.device("meta"):
        made = timm.create_model("spvit_s", **small)
    made.to_empty(device="cpu").init_weights()
    made.load_state_dict((other := timm.create_model("spvit_s", **small)).state_dict())
    images = torch.randn(2, 3, 32, 48)
    assert torch.equal(made.eval()(images), other.eval()(images))
