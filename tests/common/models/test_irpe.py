"""iRPE: the published fixtures, every other combination against a slow computation of its own, life inside timm."""

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common.errors import Refusal
from common.models import attention
from common.models.irpe import PUBLISHED, RelativeAttention, Where, add_irpe, bucket_ids, num_buckets, piecewise

FIXTURES = json.loads((Path(__file__).parents[2] / "fixtures" / "irpe.json").read_text())
TINY = {"img_size": 48, "embed_dim": 8, "depth": 1, "num_heads": 2}
PARAMETERS = {  # of the released code
    "deit_tiny_patch16_224_ctx_product_50_shared_k": 5_755_816,
    "deit_small_patch16_224_ctx_product_50_shared_k": 22_089_064,
    "deit_small_patch16_224_ctx_product_50_shared_qk": 22_127_464,
    "deit_small_patch16_224_ctx_product_50_shared_qkv": 22_165_864,
    "deit_base_patch16_224_ctx_product_50_shared_k": 86_606_056,
    "deit_base_patch16_224_ctx_product_50_shared_qkv": 86_682_856,
    "deit_small_patch16_224_ctx_euc_20_shared_k": 22_113_640,
    "deit_small_patch16_224_ctx_quant_51_shared_k": 22_153_576,
    "deit_small_patch16_224_ctx_cross_56_shared_k": 22_176_616,
}


def tensor(of: dict[str, Any]) -> Tensor:
    return torch.tensor(of["data"], dtype=torch.float64).view(of["shape"])


def vit(grid: tuple[int, int] = (2, 3), prefix: int = 1, **kwargs: Any) -> VisionTransformer:
    """A small ViT in float64 whose patches are 4x4 pixels; prefix tokens are a class token, then registers."""
    arguments = {"embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3, "patch_size": 4} | kwargs
    more = {"class_token": prefix > 0, "reg_tokens": max(prefix - 1, 0), "global_pool": "token" if prefix else "avg"}
    torch.manual_seed(0)
    return VisionTransformer(img_size=(4 * grid[0], 4 * grid[1]), **more, **arguments).double()


def fill(model: torch.nn.Module) -> Any:
    """The tables are zero at first; here they are not. Returns the model."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.7
    return model


# ------------------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize("case", FIXTURES["piecewise"], ids=lambda case: f"{case['alpha']}-{case['beta']}")
def test_piecewise(case: dict[str, Any]) -> None:
    x = torch.tensor(case["x"])  # whole numbers or not
    assert piecewise(x, case["alpha"], case["beta"], case["gamma"]).tolist() == case["y"]


@pytest.mark.parametrize("name", FIXTURES["bucket_tables"])
def test_bucket_tables(name: str) -> None:
    of = FIXTURES["bucket_tables"][name]
    ids = bucket_ids(of["method"], (of["height"], of["width"]), of["ratio"], of["skip"])
    assert ids.dtype == torch.int64 and ids.shape == (of["height"] * of["width"] + of["skip"],) * 2
    assert hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest() == of["sha256_int64_le"]
    assert num_buckets(of["method"], of["ratio"], of["skip"]) == of["num_buckets_including_skip"]
    assert len(ids.unique()) == of["n_distinct_ids_used"]
    if "ids" in of:
        assert ids.flatten().tolist() == of["ids"]


def test_num_buckets() -> None:
    for of in FIXTURES["num_buckets"]:
        assert num_buckets("product", of["alpha"], 0) == of["product"]
        for method in ("euclidean", "quantization", "cross", "cross_rows", "cross_cols"):
            assert num_buckets(method, of["alpha"], 0) == of["others_each"]
            assert num_buckets(method, of["alpha"], 3) == of["others_each"] + 1  # one for all prefix tokens


def index(x: float, ratio: float) -> int:
    """The piecewise index of one number, in Python's own arithmetic."""
    size = abs(x)
    if size <= ratio:
        return round(x)
    far = round(ratio + ratio * math.log(size / ratio) / math.log(8))
    return int(math.copysign(min(far, math.floor(2 * ratio)), x))


def slow_ids(method: str, grid: tuple[int, int], ratio: float, prefix: int) -> Tensor:
    """bucket_ids, pair by pair."""
    if method == "cross":
        return torch.stack([slow_ids(f"cross_{one}", grid, ratio, prefix) for one in ("rows", "cols")])
    N = prefix + grid[0] * grid[1]
    half = math.floor(2 * ratio)
    side = 2 * half + 1
    ids = torch.full((N, N), side**2 if method == "product" else side)
    for i in range(N - prefix):
        for j in range(N - prefix):
            r, c = i // grid[1] - j // grid[1], i % grid[1] - j % grid[1]
            ids[prefix + i, prefix + j] = {
                "product": (index(r, ratio) + half) * side + index(c, ratio) + half,
                "euclidean": index(round(math.sqrt(r * r + c * c)), ratio) + half,
                "quantization": index(r * r + c * c, ratio) + half,
                "cross_rows": index(r, ratio) + half,
                "cross_cols": index(c, ratio) + half,
            }[method]
    return ids


@pytest.mark.parametrize("method", ["product", "euclidean", "quantization", "cross", "cross_rows", "cross_cols"])
@pytest.mark.parametrize("grid, prefix", [((1, 7), 0), ((5, 2), 1), ((4, 6), 2)])
@pytest.mark.parametrize("ratio", [0.5, 1.9, 3])
def test_other_grids(method: str, grid: tuple[int, int], prefix: int, ratio: float) -> None:
    assert torch.equal(bucket_ids(method, grid, ratio, prefix), slow_ids(method, grid, ratio, prefix))


# ------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", FIXTURES["attention"], ids=lambda case: case["name"])
def test_published_attention(case: dict[str, Any], fused: bool) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY).double()
    if case["rpe_on"]:
        options = {name: case[name] for name in ("method", "mode", "shared_head", "ratio")}
        assert add_irpe(model, on=case["rpe_on"], **options) is model
    attention = model.blocks[0].attn
    attention.fused_attn = fused
    attention.load_state_dict({name: tensor(of) for name, of in case["params"].items()})
    x = tensor(case["x"]).requires_grad_()
    y = attention(x)
    y.backward(tensor(case["grad_out"]))
    assert torch.allclose(y, tensor(case["y"]), rtol=0, atol=1e-9)
    assert torch.allclose(x.grad, tensor(case["grad_x"]), rtol=0, atol=1e-9)
    for name, parameter in attention.named_parameters():
        assert torch.allclose(parameter.grad, tensor(case["grads"][name]), rtol=0, atol=1e-9), name


def tables(attention: Any, which: str, parameters: dict[str, Tensor]) -> list[Tensor]:
    """The tables on queries, keys or values: one, or of `cross` two."""
    return [parameter for name, parameter in parameters.items() if name.startswith(f"rpe_{which}.")]


def released(attention: Any, x: Tensor, ids: Tensor, allowed: Tensor | None = None) -> Tensor:
    """What the released code computes, in its order and without any economy: a vector for each pair of tokens.

    ids (N, N) or, of `cross`, (2, N, N); allowed (T, S): keys that count.
    """
    (B, N, _), H, d = x.shape, attention.num_heads, attention.head_dim
    q, k, v = attention.qkv(x).view(B, N, 3, H, d).permute(2, 0, 3, 1, 4)
    q, k, scale = attention.q_norm(q), attention.k_norm(k), d**-0.5
    scores = torch.einsum("bhid,bhjd->bhij", q * scale, k)
    parameters = dict(attention.named_parameters())
    each = list(ids) if ids.ndim == 3 else [ids]

    def per_head(table: Tensor) -> Tensor:
        return table.expand(H, *table.shape[1:])

    for table, buckets in zip(tables(attention, "k", parameters), each, strict=False):
        picked = per_head(table)[..., buckets]  # (H, d, N, N), or (H, N, N) of a bias
        scores = scores + (picked if table.ndim == 2 else torch.einsum("bhid,hdij->bhij", q * scale, picked))
    for table, buckets in zip(tables(attention, "q", parameters), each, strict=False):
        picked = per_head(table)[..., buckets]
        by_key = (
            picked.expand(B, *picked.shape) if table.ndim == 2 else torch.einsum("bhjd,hdji->bhji", k * scale, picked)
        )
        scores = scores + by_key.mT
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    probabilities = scores.softmax(-1)
    out = probabilities @ v
    for table, buckets in zip(tables(attention, "v", parameters), each, strict=False):
        out = out + torch.einsum("bhij,hijd->bhid", probabilities, per_head(table)[:, buckets])
    return attention.proj(out.transpose(1, 2).reshape(B, N, H * d))


@pytest.mark.parametrize("method", ["product", "euclidean", "quantization", "cross"])
@pytest.mark.parametrize("on, mode", [("q", "ctx"), ("k", "ctx"), ("v", "ctx"), ("qkv", "ctx"), ("qk", "bias")])
@pytest.mark.parametrize("shared_head", [True, False])
def test_every_combination(method: str, on: str, mode: str, shared_head: bool) -> None:
    """Non-square grids, none to two prefix tokens, normalised q and k; outputs and all gradients, both paths."""
    for grid, prefix, qk_norm in (((2, 3), 0, False), ((3, 2), 1, True), ((1, 5), 2, False)):
        model = vit(grid, prefix, depth=1, qk_norm=qk_norm)
        attention = fill(add_irpe(model, on, method, mode, shared_head, ratio=1.0)).blocks[0].attn
        ids = slow_ids(method, grid, 1.0, prefix)
        x = torch.randn(2, ids.shape[-1], 8, dtype=torch.float64, requires_grad=True)
        leaves = [x, *attention.parameters()]
        expected = released(attention, x, ids)
        gradients = torch.autograd.grad(expected.sin().sum(), leaves)
        for fused in (True, False):
            attention.fused_attn = fused
            out = attention(x)
            assert torch.allclose(out, expected, rtol=0, atol=1e-10)
            for one, other in zip(torch.autograd.grad(out.sin().sum(), leaves), gradients, strict=True):
                assert torch.allclose(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "method, on, mode", [("product", "qkv", "ctx"), ("cross", "qkv", "ctx"), ("euclidean", "qk", "bias")]
)
@pytest.mark.parametrize("prefix", [0, 2])
def test_some_of_the_tokens(method: str, on: str, mode: str, prefix: int) -> None:
    """Kept patches, and keys among them, another choice for each image: rows and columns of the whole grid's ids."""
    model = fill(add_irpe(vit((3, 4), prefix), on, method, mode, ratio=1.0))
    attention = model.blocks[0].attn
    kept, keys = torch.tensor([[7, 0, 3, 11, 5], [1, 2, 10, 4, 9]]), torch.tensor([[0, 4, 2], [1, 2, 3]])
    first = torch.arange(prefix).expand(2, prefix)
    tokens = torch.cat([first, kept + prefix], 1)
    keys = torch.cat([first, keys + prefix], 1)
    x = torch.randn(2, tokens.shape[1], 8, dtype=torch.float64)
    ids = slow_ids(method, (3, 4), 1.0, prefix)
    for image in range(2):
        mine = ids[..., tokens[image][:, None], tokens[image]]
        where = Where((3, 4), kept)
        assert torch.allclose(attention(x, where)[image], released(attention, x[image, None], mine)[0], atol=1e-12)
        allowed = torch.zeros(x.shape[1], dtype=torch.bool)
        allowed[keys[image]] = True
        expected = released(attention, x[image, None], mine, allowed)[0]
        for fused in (True, False):
            attention.fused_attn = fused
            assert torch.allclose(attention(x, Where((3, 4), kept, keys))[image], expected, atol=1e-12)
    whole = torch.randn(2, prefix + 12, 8, dtype=torch.float64)
    everything = torch.arange(12).expand(2, 12)
    assert torch.allclose(attention(whole, Where((3, 4), everything)), attention(whole), atol=1e-12)
    one = attention(whole, Where((3, 4), keys=keys))[1]  # keys without kept: among all tokens of the grid
    allowed = torch.zeros(prefix + 12, dtype=torch.bool)
    allowed[keys[1]] = True
    assert torch.allclose(one, released(attention, whole[1, None], ids, allowed)[0], atol=1e-12)


def test_layers_share_ids_and_their_choice() -> None:
    model = add_irpe(vit((2, 3), 1))
    assert model.blocks[0].attn.bucket_ids is model.blocks[1].attn.bucket_ids
    assert [name for name, _ in model.named_buffers()] == ["blocks.0.attn.bucket_ids.ids"]
    where = Where((2, 3), torch.tensor([[0, 5], [1, 2]]))
    found = [block.attn.bucket_ids(torch.zeros(2, 3, 8), where)[0].data_ptr() for block in model.blocks]
    assert found[0] == found[1]


def test_off_is_plain_attention() -> None:
    plain, model = vit(), fill(add_irpe(vit()))
    x, keys = torch.randn(2, 7, 8, dtype=torch.float64), torch.tensor([[0, 3], [0, 5]])
    for fused in (True, False):
        model.blocks[0].attn.fused_attn = fused
        out = model.blocks[0].attn(x, Where((2, 3), off=True))
        assert torch.allclose(out, plain.blocks[0].attn(x), atol=1e-12)
        allowed = torch.tensor([True, False, False, True, False, False, False])
        expected = released(plain.blocks[0].attn, x[:1], torch.zeros(0, 7, 7), allowed)
        assert torch.allclose(model.blocks[0].attn(x, Where((2, 3), None, keys, True))[:1], expected, atol=1e-12)


def test_zero_tables_change_nothing() -> None:
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    for method in ("product", "euclidean", "quantization", "cross"):
        assert torch.allclose(add_irpe(vit(), method=method)(images), vit()(images), atol=1e-12)


def test_dropout_and_hooks_as_in_timm() -> None:
    """The explicit form drops what timm would, and hooks see its probabilities; the fused one drops in training."""
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    plain, model = vit(attn_drop_rate=0.5).train(), add_irpe(vit(attn_drop_rate=0.5)).train()
    seen: list[Tensor] = []
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda *given: seen.append(given[1][0]))
    outputs = []
    for block, fused in ((plain.blocks[0], False), (model.blocks[0], False), (model.blocks[0], True)):
        block.attn.fused_attn = fused
        torch.manual_seed(3)
        outputs.append(block.attn(x))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-12) and torch.allclose(outputs[0], outputs[2], atol=1e-12)
    assert [tuple(probabilities.shape) for probabilities in seen] == [(2, 2, 7, 7)] * 2
    model.eval()
    assert torch.allclose(model.blocks[0].attn(x), plain.eval().blocks[0].attn(x), atol=1e-12) and len(seen) == 2


def test_bfloat16() -> None:
    model = fill(add_irpe(vit().float()))
    images = torch.randn(4, 3, 8, 12)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images)
    rough.float().square().sum().backward()
    assert rough.dtype == torch.bfloat16 and (rough.float() - exact).norm() / exact.norm() < 0.05
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_many_scores_are_not_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEPT", 8 * 2 * 37 * 37 - 1)
    model = add_irpe(vit((6, 6), embed_dim=4, num_heads=2, depth=1, mlp_ratio=1.0), ratio=0.5)
    saved: list[int] = []

    def keep(saved_tensor: Tensor) -> Tensor:
        saved.append(saved_tensor.numel())
        return saved_tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved_tensor: saved_tensor):
        model.blocks[0].attn(torch.randn(8, 37, 4, dtype=torch.float64, requires_grad=True))
    assert max(saved) == 8 * 2 * 37 * num_buckets("product", 0.5, 1)  # a lookup; the scores would be 37 to its 10


# --------------------------------------------------------------------------------------------------- inside timm


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    with torch.device("meta"):
        model, plain = timm.create_model(name), timm.create_model(f"deit_{PUBLISHED[name][0]}_patch16_224")
    if name in PARAMETERS:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    found = {key: list(weight.shape) for key, weight in model.state_dict().items() if key not in plain.state_dict()}
    on, cross = name.rsplit("_", 1)[1], ["rp_rows.", "rp_cols."] if "cross" in name else [""]
    keys = [f"blocks.{i}.attn.rpe_{one}.{part}lookup_table_weight" for i in range(12) for one in on for part in cross]
    assert sorted(found) == sorted(keys)
    if name in FIXTURES["param_counts"]:
        first = {key: shape for key, shape in found.items() if key.startswith("blocks.0.")}
        assert first == {f"blocks.0.attn.{key}": of for key, of in FIXTURES["param_counts"][name]["block0"].items()}
    assert model.pretrained_cfg["input_size"] == (3, 224, 224) and model.default_cfg["first_conv"] == "patch_embed.proj"


def test_published_names_take_timms_arguments() -> None:
    name = "deit_small_patch16_224_ctx_cross_56_shared_k"
    model = timm.create_model(name, img_size=(32, 48), embed_dim=8, depth=2, num_heads=2, num_classes=5, in_chans=1)
    assert model(torch.zeros(1, 1, 32, 48)).shape == (1, 5)
    assert next(key for key in model.state_dict() if "rpe" in key) == "blocks.0.attn.rpe_k.rp_rows.lookup_table_weight"
    maps = timm.create_model(name, features_only=True, embed_dim=8, depth=2, num_heads=2, img_size=32, out_indices=1)
    assert [tuple(one.shape) for one in maps(torch.zeros(1, 3, 32, 32))] == [(1, 8, 2, 2)]
    with pytest.raises(Refusal, match="timm hosts no weights"):
        timm.create_model(name, pretrained=True)


def test_published_file_loads_strictly(tmp_path: Path) -> None:
    """A file as the authors', {"model": state}, by timm's own way."""
    small = {"img_size": 32, "embed_dim": 8, "depth": 2, "num_heads": 2}
    name = "deit_tiny_patch16_224_ctx_product_50_shared_qkv"
    state = timm.create_model("deit_tiny_patch16_224", **small).state_dict()
    for layer in range(2):
        for which, shape in (("q", (1, 4, 50)), ("k", (1, 4, 50)), ("v", (1, 50, 4))):
            state[f"blocks.{layer}.attn.rpe_{which}.lookup_table_weight"] = torch.randn(shape)
    torch.save({"model": state}, tmp_path / "authors.pth")
    model = timm.create_model(name, checkpoint_path=str(tmp_path / "authors.pth"), **small)
    assert all(torch.equal(weight, state[key]) for key, weight in model.state_dict().items())
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    again = timm.create_model(name, **small)
    again.load_state_dict(load_file(tmp_path / "ours.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_checkpoint_of_another_kind() -> None:
    state = add_irpe(vit()).state_dict()
    key = "blocks.0.attn.rpe_q.lookup_table_weight"
    with pytest.raises(RuntimeError, match=rf"{key}: copying a param with shape .*1, 4, 50.* is .*1, 4, 26"):
        add_irpe(vit(), ratio=1.0).load_state_dict(state)
    with pytest.raises(RuntimeError, match=rf"{key}: copying a param with shape .*1, 4, 50.* is .*2, 4, 50"):
        add_irpe(vit(), shared_head=False).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*rp_rows"):
        add_irpe(vit(), method="cross").load_state_dict(state)


def test_without_class_token_and_distilled() -> None:
    model = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", **TINY)
    attention = add_irpe(model, ratio=1.0).blocks[0].attn
    assert attention.rpe_v.lookup_table_weight.shape == (1, 25, 4) and attention(torch.zeros(2, 9, 8)).shape == (
        2,
        9,
        8,
    )
    model = timm.create_model("deit_tiny_distilled_patch16_224", **TINY)
    attention = add_irpe(model, "k", "euclidean", ratio=1.0).blocks[0].attn
    assert isinstance(model, VisionTransformerDistilled) and attention.bucket_ids.ids.shape == (1, 1, 11, 11)
    assert attention.rpe_k.lookup_table_weight.shape == (1, 4, 6) and model(torch.zeros(1, 3, 48, 48)).shape == (
        1,
        1000,
    )


def test_dynamic_image_size() -> None:
    """Another grid, and one of as many patches in another shape; two in one step, also when blocks run twice."""
    model = fill(add_irpe(vit((2, 3), dynamic_img_size=True)))
    model.pos_embed.data.zero_()
    state = model.state_dict()
    for grid in ((3, 2), (4, 4), (2, 3), (1, 6)):
        own = add_irpe(vit(grid))
        own.load_state_dict(state | {"pos_embed": own.pos_embed.data.zero_()})
        images = torch.randn(2, 3, 4 * grid[0], 4 * grid[1], dtype=torch.float64)
        assert torch.allclose(model(images), own(images), atol=1e-12), grid
    views = [torch.randn(1, 3, 16, 16, dtype=torch.float64), torch.randn(1, 3, 8, 8, dtype=torch.float64)]
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.stack([model(view) for view in views]).sum().backward()
        gradients.append(model.blocks[0].attn.rpe_k.lookup_table_weight.grad.clone())
        model.zero_grad()
    assert gradients[0].abs().sum() > 0 and torch.allclose(*gradients, atol=1e-12)


def test_another_input_size_keeps_the_tables() -> None:
    model = fill(add_irpe(vit((2, 3))))
    before = model.blocks[0].attn.rpe_k.lookup_table_weight.clone()
    model.set_input_size((16, 20))
    assert model(torch.zeros(1, 3, 16, 20, dtype=torch.float64)).shape == (1, 3)
    assert torch.equal(model.blocks[0].attn.rpe_k.lookup_table_weight, before)


def test_copies_are_their_own() -> None:
    model = fill(add_irpe(vit((2, 3), dynamic_img_size=True)))
    images = torch.randn(1, 3, 16, 12, dtype=torch.float64)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), model(images))
    ids = [block.attn.bucket_ids for block in (*model.blocks, *twin.blocks)]
    assert ids[0] is ids[1] and ids[2] is ids[3] and ids[0] is not ids[2]
    twin(torch.randn(1, 3, 4, 8, dtype=torch.float64))
    assert ids[2].seen == {12: (4, 3), 2: (1, 2)} and ids[0].seen == {12: (4, 3)}  # its hook is its own, too
    assert ids[0].ids.data_ptr() != ids[2].ids.data_ptr()


def test_made_without_memory() -> None:
    with torch.device("meta"):
        model = add_irpe(VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2))
    model.to_empty(device="cpu")
    model.init_weights()
    attention = model.blocks[0].attn
    assert torch.equal(attention.bucket_ids.ids[0, 0], bucket_ids("product", (2, 2), 1.9, 1))
    assert not attention.rpe_q.lookup_table_weight.any()


def test_gradients_reach_every_table_and_it_trains() -> None:
    for method in ("product", "cross"):
        model = fill(add_irpe(vit((2, 2)), method=method, ratio=0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        images, losses = torch.randn(4, 3, 8, 8, dtype=torch.float64), []
        for _ in range(5):
            loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
            optimizer.zero_grad()
            loss.backward()
            assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if "rpe" in name)
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "produkt"}, "did you mean 'product'"),
        ({"method": "cross_rows"}, "did you mean 'cross'"),
        ({"mode": "contextual"}, "expected ctx or bias"),
        ({"on": "kx"}, "some of the letters q, k and v"),
        ({"on": ""}, "some of the letters q, k and v"),
        ({"on": "kk"}, "some of the letters q, k and v"),
        ({"on": "kv", "mode": "bias"}, "values have none; use on=qk or mode=ctx"),
        ({"ratio": 0}, "expected a positive number"),
        ({"ratio": "1.9"}, "expected a positive number"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], words: str) -> None:
    model = vit()
    with pytest.raises(Refusal, match=words) as caught:
        add_irpe(model, **options)
    assert "\n" not in str(caught.value) and not isinstance(model.blocks[0].attn, RelativeAttention)


def test_models_that_are_not_plain() -> None:
    with pytest.raises(Refusal, match="has irpe already"):
        add_irpe(add_irpe(vit()))
    with pytest.raises(Refusal, match="ParallelScalingBlock with NoneType"):
        add_irpe(vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock))
    with pytest.raises(Refusal, match="Block with DiffAttention"):
        add_irpe(vit(attn_layer="diff"))
    with pytest.raises(Refusal, match="patch_drop_rate"):
        add_irpe(vit(patch_drop_rate=0.5))
    with pytest.raises(Refusal, match="SwinTransformer is none"):
        add_irpe(timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1,), num_heads=(1,)))
    with pytest.raises(Refusal, match="did you mean 'euclidean'"):
        bucket_ids("euclidian", (2, 2), 1.9, 0)
    with pytest.raises(Refusal, match="expected one of product"):
        num_buckets("polar", 1.9, 0)


def test_tokens_that_do_not_fit() -> None:
    attention = add_irpe(vit((2, 3), 1)).blocks[0].attn
    x = torch.zeros(2, 6, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="given 6 tokens: expected 7, 1 prefix tokens and a grid of 2x3 patches"):
        attention(x)
    with pytest.raises(ValueError, match="given 6 tokens: expected 3, 1 prefix tokens and 2 kept patches"):
        attention(x, Where((2, 3), torch.tensor([[0, 1], [2, 3]])))
    with pytest.raises(ValueError, match="takes no attention mask"):
        attention(x, attn_mask=torch.zeros(6, 6))
