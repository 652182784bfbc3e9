"""Transformer attribution against the rules written out one number at a time, and against what the rules promise."""

import numpy as np
import pytest
import torch
from backbones import ROWS
from by_hand import vit as by_hand

from common.models import ModelConfig, create
from common.models.plan import TokenPlan
from evaluate.explaining import lrp
from evaluate.explaining.attribution import attend, attributions, generic, to_patches, unsupported

RULED = ["vit", "vit, no class token", "vit, registers", "vit, qk norm", "deit, distilled", "lv-vit"]


def made(name, depth=2):
    """A row of the matrix in float64, whose parameters hide nothing, and three images for it."""
    row = ROWS[name]
    kwargs = {**row.kwargs, "depth": depth, "embed_dim": 12} | ({"skip_lam": 2.0} if name == "lv-vit" else {})
    torch.manual_seed(0)
    backbone = create(ModelConfig(row.name, kwargs), list(row.size)).double().eval()
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return backbone, torch.randn(3, 3, *row.size, generator=torch.Generator().manual_seed(1)).double()


def target(width=12):
    """A linear score, as of a class."""
    weight = torch.randn(width, generator=torch.Generator().manual_seed(2)).double()
    return lambda pooled: pooled @ weight + 0.3


# ------------------------------------------------------------------------------------- written out, a number at a time


def over(numerator, denominator):
    return 0.0 if denominator == 0 else numerator / (denominator + 1e-9 * np.sign(denominator))


def through_linear(R, x, weight):
    found = np.zeros_like(x)
    for t in range(len(x)):
        for o in range(len(weight)):
            terms = [x[t, i] * weight[o, i] for i in range(len(x[t]))]
            whole = sum(term for term in terms if term > 0)
            for i, term in enumerate(terms):
                found[t, i] += over(R[t, o], whole) * max(term, 0)
    return found


def through_product(R, a, b):
    of_a, of_b = np.zeros_like(a), np.zeros_like(b)
    for i, k in np.ndindex(*R.shape):
        share = over(R[i, k], sum(a[i, j] * b[j, k] for j in range(len(b))))
        for j in range(len(b)):
            of_a[i, j] += a[i, j] * b[j, k] * share / 2
            of_b[j, k] += a[i, j] * b[j, k] * share / 2
    return of_a, of_b


def through_sum(R, a, b):
    parts = [np.zeros_like(a), np.zeros_like(a)]
    for t, i in np.ndindex(*R.shape):
        for part, x in zip(parts, (a, b), strict=True):
            part[t, i] = x[t, i] * over(R[t, i], a[t, i] + b[t, i])
    sums = [part.sum() for part in parts]
    wanted = [over(abs(own) * R.sum(), abs(sums[0]) + abs(sums[1])) for own in sums]
    return [part * over(to, own) for part, to, own in zip(parts, wanted, sums, strict=True)]


def through_copies(R, S, x):
    found = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        found[at] = x[at] * (over(R[at], x[at]) + over(S[at], x[at]))
    return found


def by_hand_forward(state, name, x, heads, skip_lam):
    """What goes through a block of T tokens of D numbers, on the way up."""
    D = x.shape[1]
    d, seen = D // heads, {"x": x}
    seen["normed"] = by_hand.layer_norm(state, f"{name}.norm1", x)
    rows = by_hand.linear(state, f"{name}.attn.qkv", seen["normed"])
    seen["qkv"] = np.array([[rows[:, p * D + h * d : p * D + (h + 1) * d] for h in range(heads)] for p in range(3)])
    scores = np.array([q @ k.T / np.sqrt(d) for q, k in zip(*seen["qkv"][:2], strict=True)])
    seen["A"] = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    seen["mixed"] = np.concatenate([A @ v for A, v in zip(seen["A"], seen["qkv"][2], strict=True)], 1)
    seen["branch"] = by_hand.linear(state, f"{name}.attn.proj", seen["mixed"]) / skip_lam
    seen["y"] = x + seen["branch"]
    seen["normed2"] = by_hand.layer_norm(state, f"{name}.norm2", seen["y"])
    hidden = by_hand.linear(state, f"{name}.mlp.fc1", seen["normed2"])
    seen["hidden"] = hidden * 0.5 * (1 + by_hand.erf(hidden / np.sqrt(2)))
    seen["branch2"] = by_hand.linear(state, f"{name}.mlp.fc2", seen["hidden"]) / skip_lam
    return seen["y"] + seen["branch2"], seen


def by_hand_back(state, name, R, seen, heads):
    """(relevance of what entered the block (T, D), of its attention (heads, T, T))."""
    T, D = R.shape
    d = D // heads
    direct, branch = through_sum(R, seen["y"], seen["branch2"])
    hidden = through_linear(branch, seen["hidden"], state[f"{name}.mlp.fc2.weight"])
    R = through_linear(hidden, seen["normed2"], state[f"{name}.mlp.fc1.weight"])
    R = through_copies(direct, R, seen["y"])
    direct, branch = through_sum(R, seen["x"], seen["branch"])
    mixed = through_linear(branch, seen["mixed"], state[f"{name}.attn.proj.weight"])
    of_A, of_rows = np.zeros((heads, T, T)), np.zeros((T, 3 * D))
    for h in range(heads):
        q, k, v = seen["qkv"][:, h]
        of_A[h], of_v = through_product(mixed[:, h * d : (h + 1) * d], seen["A"][h], v)
        of_q, of_k = through_product(of_A[h], q / np.sqrt(d), k.T)
        for part, own in enumerate((of_q, of_k.T, of_v)):
            of_rows[:, part * D + h * d : part * D + (h + 1) * d] = own
    R = through_linear(of_rows, seen["normed"], state[f"{name}.attn.qkv.weight"])
    return through_copies(direct, R, seen["x"]), of_A


@pytest.mark.parametrize("pooling", ["class", "mean"])
@pytest.mark.parametrize("name, depth", [("vit", 1), ("vit", 2), ("deit, distilled", 2), ("lv-vit", 2)])
def test_relevance_and_map_are_those_of_the_rules_written_out(name, depth, pooling):
    backbone, images = made(name, depth)
    model, heads, skip_lam = backbone.model, 2, 2.0 if name == "lv-vit" else 1.0
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5  # that of LV-ViT and of the norms written out
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    attended = attend(backbone, images, None, pooling, target())
    P = attended.features.prefix.shape[1]
    weight = np.array([(target()(torch.eye(12).double()[i]) - 0.3).item() for i in range(12)])
    prefix = [state[part][0] for part in ("cls_token", "dist_token") if part in state]
    for b in range(len(images)):
        patches = model.patch_embed(images[b : b + 1])[0].detach().numpy()
        x = np.concatenate([*prefix, patches]) + state["pos_embed"][0]
        above = []
        for i in range(depth):
            x, seen = by_hand_forward(state, f"blocks.{i}", x, heads, skip_lam)
            above.append(seen)
        x = by_hand.layer_norm(state, "norm", x)
        R = np.zeros_like(x)  # of the head on the pooled token: one linear layer of all tokens that are pooled
        for t in [0] if pooling == "class" else range(P, len(x)):
            R[t] = np.maximum(x[t] * weight, 0)
        R, C = R / R.sum(), np.eye(len(x))
        found = []
        for i in reversed(range(depth)):
            R, of_A = by_hand_back(state, f"blocks.{i}", R, above[i], heads)
            found.insert(0, of_A)
        for i in range(depth):
            np.testing.assert_allclose(attended.probabilities[i][b], above[i]["A"], rtol=0, atol=1e-10)
            np.testing.assert_allclose(attended.relevances[i][b], found[i], rtol=1e-8, atol=1e-8)
            slope = attended.gradients[i][b].numpy()  # checked by finite differences in test_attribution.py
            C = (np.eye(len(x)) + sum(np.maximum(slope[h] * found[i][h], 0) for h in range(heads)) / heads) @ C
        row = C[0, P:] if pooling == "class" else C[P:, P:].mean(0)
        found_row = attributions(attended, pooling)["transformer attribution"][b].numpy()
        np.testing.assert_allclose(found_row, row, rtol=0, atol=1e-8)
        np.testing.assert_allclose(found_row - found_row.mean(), row - row.mean(), rtol=1e-5, atol=1e-11)
        assert np.ptp(row) > 1e-9


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


@pytest.mark.parametrize("name", ["irpe, qkv", "sp-vit", "sp-vit, legacy"])
def test_other_blocks_are_left_out_with_the_reason(name):
    row = ROWS[name]
    backbone = create(ModelConfig(row.name, dict(row.kwargs), irpe=row.irpe), list(row.size))
    reason = unsupported(backbone)
    assert reason is not None and "its rules are known for the blocks of ViT, DeiT and LV-ViT; here they are" in reason
    assert ("RelativeAttention" if "irpe" in name else "SpBlock") in reason
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
