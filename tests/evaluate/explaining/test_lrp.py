"""Transformer attribution against the rules written out one number at a time, and against what the rules promise."""

import numpy as np
import pytest
import torch
from backbones import IRPE, LV_AND_SP, ROWS
from by_hand import relevance
from by_hand import vit as by_hand

from common.models import ModelConfig, create
from common.models.irpe import bucket_ids
from common.models.plan import TokenPlan
from evaluate.explaining import lrp
from evaluate.explaining.attribution import attend, attributions, generic, to_patches, unsupported

RULED = ["vit", "vit, no class token", "vit, registers", "vit, qk norm", "deit, distilled", "lv-vit"]
RULED += [*IRPE, "sp-vit", "sp-vit, dynamic", "sp-vit, legacy"]


def made(name, depth=None, width=12):
    """A row of the matrix in float64, whose parameters hide nothing, and three images for it."""
    row = ROWS[name]
    kwargs = {**row.kwargs, "depth": depth or (3 if "sp-vit" in name else 2), "embed_dim": width}
    kwargs |= {"num_heads": 2} | ({"skip_lam": 2.0} if name in LV_AND_SP else {})
    torch.manual_seed(0)
    backbone = create(ModelConfig(row.name, kwargs, irpe=row.irpe), list(row.size)).double().eval()
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return backbone, torch.randn(3, 3, *row.size, generator=torch.Generator().manual_seed(1)).double()


def target(width=12):
    """A linear score, as of a class."""
    weight = torch.randn(width, generator=torch.Generator().manual_seed(2)).double()
    return lambda pooled: pooled @ weight + 0.3


# ------------------------------------------------------------------------------------- written out, a number at a time


def shape_of(name, backbone):
    """What the walk by hand has to know beside the parameters."""
    ids = np.zeros((0, 0, 0))
    if (irpe := ROWS[name].irpe) is not None:
        ids = bucket_ids(irpe["method"], backbone.grid, irpe.get("ratio", 1.9), backbone.num_prefix_tokens).numpy()
        ids = ids.reshape(-1, *ids.shape[-2:])
    return relevance.Shape(2, 2.0 if name in LV_AND_SP else 1.0, backbone.grid, ids)


DEEP = {"vit": 2, "deit, distilled": 2, "lv-vit": 2, "sp-vit": 3, "sp-vit, legacy": 3}
DEEP |= {"irpe, qkv": 2, "irpe, cross": 1, "irpe, bias": 2, "irpe, per head": 1}


POOLED = [*((name, "class") for name in DEEP), ("vit", "mean"), ("sp-vit", "mean")]


@pytest.mark.parametrize("name, pooling", POOLED)
def test_relevance_and_map_are_those_of_the_rules_written_out(name, pooling):
    depth = DEEP[name]
    backbone, images = made(name, depth)
    model, shape, joins = backbone.model, shape_of(name, backbone), getattr(backbone.model, "local_blocks", 0)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5  # that of LV-ViT and of the norms written out
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    attended = attend(backbone, images, None, pooling, target())
    P, N = attended.features.prefix.shape[1], attended.features.tokens.shape[1]
    weight = np.array([(target()(torch.eye(12).double()[i]) - 0.3).item() for i in range(12)])
    prefix = [state[part][0] for part in ("cls_token", "dist_token") if part in state]
    for b in range(len(images)):
        patches = model.patch_embed(images[b : b + 1])[0].detach().numpy()
        x = np.concatenate([*prefix, patches][joins and 1 :]) + state["pos_embed"][0]
        above = []
        for i in range(depth):
            x = np.concatenate([*prefix, x]) if 0 < i == joins else x
            x, seen = relevance.forward(state, f"blocks.{i}", x, shape)
            x = convolved(state, f"blocks.{i}", x, shape.grid)
            above.append(seen)
        x = by_hand.layer_norm(state, "norm", x)
        R = np.zeros_like(x)  # of the head on the pooled token: one linear layer of all tokens that are pooled
        for t in [0] if pooling == "class" else range(P, len(x)):
            R[t] = np.maximum(x[t] * weight, 0)
        R, C = R / R.sum(), np.eye(len(x))
        found = []
        for i in reversed(range(depth)):
            R, of_A = relevance.back(state, f"blocks.{i}", R, above[i], shape)
            found.insert(0, of_A)
        for i in range(depth):
            late = P + N - len(found[i][0])  # tokens that are not there yet
            seen, of_A = (np.pad(each, ((0, 0), (late, 0), (late, 0))) for each in (above[i]["A"], found[i]))
            np.testing.assert_allclose(attended.probabilities[i][b], seen, rtol=0, atol=1e-10)
            np.testing.assert_allclose(attended.relevances[i][b], of_A, rtol=1e-8, atol=1e-8)
            slope = attended.gradients[i][b].numpy()  # checked by finite differences in test_attribution.py
            C = (np.eye(len(x)) + sum(np.maximum(slope[h] * of_A[h], 0) for h in range(2)) / 2) @ C
        row = C[0, P:] if pooling == "class" else C[P:, P:].mean(0)
        found_row = attributions(attended, pooling)["transformer attribution"][b].numpy()
        np.testing.assert_allclose(found_row, row, rtol=0, atol=1e-8)
        np.testing.assert_allclose(found_row - found_row.mean(), row - row.mean(), rtol=1e-5, atol=1e-11)
        assert np.ptp(row) > 1e-9


def convolved(state, name, x, grid):
    """What SP-ViT's convolution makes of the patches after a block; nothing happens elsewhere."""
    if f"{name}.pos_block.proj.0.weight" not in state:
        return x
    h, w = grid
    prefix, patches = x[: len(x) - h * w], x[len(x) - h * w :]
    padded, moved = np.pad(patches.reshape(h, w, -1), ((1, 1), (1, 1), (0, 0))), patches.copy()
    for n, i, j in np.ndindex(h * w, 3, 3):
        moved[n] += padded[n // w + i, n % w + j] * state[f"{name}.pos_block.proj.0.weight"][:, 0, i, j]
    return np.concatenate([prefix, moved + state[f"{name}.pos_block.proj.0.bias"]])


# ------------------------------------------------------------------------------------------------- what rules promise


def test_linear_keeps_relevance_and_asks_positive_contributions_only():
    torch.manual_seed(3)
    x, weight, relevance = torch.randn(2, 5, 6).double(), torch.randn(4, 6).double(), torch.randn(2, 5, 4).double()
    found = lrp.linear(relevance, x, weight)
    torch.testing.assert_close(found.sum((1, 2)), relevance.sum((1, 2)))
    opposed = lrp.linear(torch.ones(1, 1), torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[1.0, -0.5, -9.0]]))
    torch.testing.assert_close(opposed, torch.tensor([[0.5, 0.5, 0.0]]))
    assert not lrp.linear(torch.ones(1, 1), torch.tensor([[1.0]]), torch.tensor([[-1.0]])).any()  # none contributed


def test_product_halves_and_sum_keeps_relevance():
    torch.manual_seed(4)
    a, b = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 5, 6).double()
    relevance = torch.randn(2, 3, 4, 6).double()
    for part in lrp.product(relevance, a, b):
        torch.testing.assert_close(part.sum((2, 3)), relevance.sum((2, 3)) / 2, rtol=1e-6, atol=1e-6)
    a, b, relevance = (torch.randn(2, 5, 4).double() for _ in range(3))
    b[1, 2] = -a[1, 2] * (1 - 1e-7)  # nearly cancel: without rescaling one part would be 1e7 and the other -1e7
    first, second = lrp.added(relevance, a, b)
    torch.testing.assert_close((first + second).sum((1, 2)), relevance.sum((1, 2)))
    sums = torch.stack([part.sum((1, 2)) for part in (first, second)])
    assert (sums.sign() == relevance.sum((1, 2)).sign()).all()  # no part is credited by what the other is charged
    torch.testing.assert_close(lrp.cloned((relevance, a), b), relevance + a, rtol=1e-5, atol=1e-5)


def test_nothing_is_divided_by_nothing():
    x = torch.tensor([4.0, -4.0, 1.0, 0.0])
    found = lrp.divided(x, torch.tensor([2.0, -2.0, 0.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([2.0, 2.0, 0.0, 0.0]))
    assert lrp.divided(torch.ones(2), torch.tensor([1e-30, -1e-30])).tolist() == pytest.approx([1e9, -1e9])
    for rule in (lrp.added, lrp.product):
        zeros = torch.zeros(1, 3, 3)
        assert not torch.stack(rule(torch.ones(1, 3, 3), zeros, zeros)).any()


def test_the_score_starts_with_one_on_the_tokens_that_are_pooled():
    backbone, images = made("vit")
    tokens = torch.cat([(features := backbone(images)).prefix, features.tokens], 1).detach().requires_grad_(True)
    for pooling, rest in (("class", slice(1, None)), ("mean", slice(0, 1))):
        features.prefix, features.tokens = tokens[:, :1], tokens[:, 1:]
        (slope,) = torch.autograd.grad(target()(features.pooled(pooling)).sum(), tokens)
        found = lrp.start(tokens.detach(), slope)
        assert (found >= 0).all() and not found[:, rest].any()
        torch.testing.assert_close(found.sum((1, 2)), torch.ones(3).double())


# --------------------------------------------------------------------------------------------------- every architecture


@pytest.mark.parametrize("name", RULED)
def test_no_block_makes_or_loses_relevance(name):
    """Wide enough that no output of a layer lacks a positive contribution: such a one's relevance would end there."""
    backbone, images = made(name, width=64)
    for block in backbone.model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad(), lrp.recording(backbone.model) as records:
        features = backbone(images)
    tokens = torch.cat([features.prefix, features.tokens], 1)
    relevance = lrp.start(tokens, torch.randn(tokens.shape, generator=torch.Generator().manual_seed(5)).double())
    for of_tokens, of_attention in lrp.walk(backbone.model, records, relevance):
        entered = relevance[:, -of_tokens.shape[1] :].sum((1, 2))
        torch.testing.assert_close(of_tokens.sum((1, 2)), entered, rtol=1e-6, atol=0)
        assert entered.abs().min() > 0.05 and of_attention.abs().sum((1, 2, 3)).min() > 1e-3
        relevance = of_tokens


@pytest.mark.parametrize("name", RULED)
def test_batches_do_not_mix_and_nothing_is_left_behind(name):
    backbone, images = made(name)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in backbone.modules()]
    P = backbone.num_prefix_tokens
    together = attend(backbone, images, TokenPlan(), "class", target())
    for b in (2, 0):
        alone = attend(backbone, images[b : b + 1], TokenPlan(), "class", target())
        for one, all_ in zip(alone.relevances, together.relevances, strict=True):
            assert one.shape[1:] == (2, P + 9, P + 9) and one.dtype == torch.float64 and one.isfinite().all()
            torch.testing.assert_close(one[0], all_[b], rtol=1e-6, atol=1e-9)
    maps = generic(together.relevances, together.gradients)
    assert to_patches(maps, P, "class").std(1).min() > 0
    assert hooks == [len(module._forward_hooks) for module in backbone.modules()]
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert unsupported(backbone) is None


def test_float32_and_fused_attention_give_the_same_map():
    backbone, images = made("vit")
    exact = attributions(attend(backbone, images, None, "class", target()), "class")["transformer attribution"]
    backbone.float()
    found = attend(backbone, images.float(), None, "class", lambda pooled: target()(pooled.double()))
    torch.testing.assert_close(
        attributions(found, "class")["transformer attribution"].double(), exact, rtol=1e-3, atol=1e-3
    )


def test_other_blocks_are_left_out_with_the_reason():
    row = ROWS["eva"]
    backbone = create(ModelConfig(row.name, dict(row.kwargs)), list(row.size))
    reason = unsupported(backbone)
    assert reason is not None and "its rules are known for the blocks of ViT, DeiT, iRPE, LV-ViT and SP-ViT" in reason
    assert "here they are EvaBlock" in reason
    attended = attend(backbone, torch.zeros(1, 3, *row.size), None, "mean", lambda pooled: pooled.sum(-1))
    assert not attended.relevances and attributions(attended, "mean").keys() == {
        "attention",
        "rollout",
        "gradient x attention",
    }


def test_gates_and_models_without_blocks_are_told():
    gated = create(ModelConfig(ROWS["vit"].name, dict(ROWS["vit"].kwargs)), 24)
    gated.model.blocks[1].attn.gate = torch.nn.Linear(32, 32)
    assert "and a gate" in (lrp.unsupported(gated.model) or "")
    assert "NoneType" in (lrp.unsupported(torch.nn.Linear(2, 2)) or "")
