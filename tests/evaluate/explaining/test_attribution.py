"""Attributions against other ways to them: by hand, by finite differences, and by a patch that is known to decide."""

import numpy as np
import pytest
import torch
from backbones import ROWS
from torch.nn import functional as F

from common.errors import Refusal
from common.models import ModelConfig, create
from common.models.plan import PlanSpec, TokenPlan
from evaluate.explaining import attribution
from evaluate.explaining.attribution import attend, attributions, components, generic, rollout, to_patches

PLAIN = [name for name in ROWS if name not in ("swin", "swin, altered", "nest", "beit", "eva")]


def made(name, position="full", size=None):
    """A row of the matrix whose parameters have moved off their start, and four images for it."""
    row = ROWS[name]
    size = size or row.size
    torch.manual_seed(0)
    backbone = create(ModelConfig(row.name, dict(row.kwargs), irpe=row.irpe, stem=row.stem), list(size)).eval()
    for parameter in backbone.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    backbone.use_plans({PlanSpec(position=position)})
    return backbone, torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------------ the definitions


def test_rollout_of_two_blocks_by_hand():
    first = np.array([[[0.5, 0.5], [0.2, 0.8]], [[0.9, 0.1], [0.4, 0.6]]])  # two heads
    second = np.array([[[0.3, 0.7], [1.0, 0.0]], [[0.1, 0.9], [0.6, 0.4]]])
    steps = [(heads.mean(0) + np.eye(2)) / 2 for heads in (first, second)]  # rows of attention sum to 1
    found = rollout([torch.from_numpy(heads)[None] for heads in (first, second)])
    np.testing.assert_allclose(found[0].numpy(), steps[1] @ steps[0], rtol=1e-12)
    np.testing.assert_allclose(found[0, 0].tolist(), [0.5 * 1.2 * 0.85 + 0.5 * 0.8 * 0.15, 0.43], atol=1e-12)


def test_generic_of_two_blocks_by_hand():
    attention = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]], [[[1.0, 0.0], [0.5, 0.5]]]]).double()  # [block, head, T, T]
    slope = torch.tensor([[[[2.0, -2.0], [4.0, 4.0]]], [[[1.0, 9.0], [2.0, -1.0]]]]).double()
    first = np.array([[1.0, 0.0], [1.0, 3.0]])  # positive parts of slope times attention
    second = np.array([[1.0, 0.0], [1.0, 0.0]])
    found = generic([heads[None] for heads in attention], [heads[None] for heads in slope])
    R = np.eye(2) + first
    np.testing.assert_allclose(found[0].numpy(), R + second @ R, rtol=1e-12)


def test_generic_of_one_block_against_a_block_written_out():
    torch.manual_seed(1)
    shape = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
    backbone = create(ModelConfig("vit_tiny_patch16_224", shape), 8).double().eval()
    model, target = backbone.model, torch.randn(12).double()
    images = torch.randn(2, 3, 8, 8).double()
    attended = attend(backbone, images, None, "class", lambda pooled: pooled @ target)
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(images)], 1) + model.pos_embed
    block = model.blocks[0]
    q, k, v = block.attn.qkv(block.norm1(x)).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    A = (q @ k.mT / 4**0.5).softmax(-1).detach()

    def score(A):
        y = x + block.attn.proj((A @ v).transpose(1, 2).reshape(2, 5, 12))
        return model.norm(y + block.mlp(block.norm2(y)))[:, 0] @ target

    torch.testing.assert_close(attended.probabilities[0], A)
    torch.testing.assert_close(attended.score, score(A).detach())
    slope = torch.zeros_like(A)
    for at in np.ndindex(*A.shape[1:]):  # finite differences, both images at once
        step = torch.zeros_like(A)
        step[(slice(None), *at)] = 1e-6
        slope[(slice(None), *at)] = ((score(A + step) - score(A - step)) / 2e-6).detach()
    R = torch.eye(5).double() + (slope * A).clamp(min=0).mean(1)
    torch.testing.assert_close(generic(attended.probabilities, attended.gradients), R, rtol=0, atol=1e-8)
    torch.testing.assert_close(attributions(attended, "class")["gradient x attention"], R[:, 0, 1:], rtol=0, atol=1e-8)


def test_what_stands_for_the_image_chooses_the_rows():
    relevance = torch.arange(16.0).view(1, 4, 4)  # one prefix token, three patches
    assert to_patches(relevance, 1, "class").tolist() == [[1, 2, 3]]
    assert to_patches(relevance, 1, "mean").tolist() == [[9, 10, 11]]
    assert to_patches(relevance, 0, "class").tolist() == [[6, 7, 8, 9]]  # there is no class token


# ------------------------------------------------------------------------------------------------ every plain backbone


@pytest.mark.parametrize("name", PLAIN)
def test_attention_is_seen_and_nothing_is_changed(name):
    backbone, images = made(name)
    with torch.no_grad():
        expected = backbone(images)
    flags = [module.fused_attn for module in backbone.modules() if hasattr(module, "fused_attn")]
    attended = attend(backbone, images, None, "class", lambda pooled: pooled.square().sum(-1))
    torch.testing.assert_close(attended.features.tokens, expected.tokens, rtol=1e-4, atol=1e-4)
    P, (h, w) = expected.prefix.shape[1], backbone.grid
    assert len(attended.probabilities) == len(attended.gradients) == len(backbone.model.blocks)
    for number, (heads, slopes) in enumerate(zip(attended.probabilities, attended.gradients, strict=True)):
        assert heads.shape == slopes.shape == (4, 2, P + h * w, P + h * w)
        sums, early = heads.sum(-1), isinstance(getattr(backbone.model, "local_blocks", None), int)
        if early and number < backbone.model.local_blocks:  # SP-ViT: the class token has not joined
            assert not heads[..., 0].any() and not sums[..., 0].any() and not slopes[..., 0, :].any()
            sums = sums[..., 1:]
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert slopes.abs().max() > 0
    for maps in attributions(attended, "class").values():
        assert maps.shape == (4, h * w) and maps.isfinite().all() and maps.std(1).min() > 0
    assert flags == [module.fused_attn for module in backbone.modules() if hasattr(module, "fused_attn")]
    assert not any(module._forward_hooks for module in backbone.modules() if isinstance(module, torch.nn.Dropout))
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert "gradient x attention" not in attributions(attend(backbone, images), "mean")


@pytest.mark.parametrize(
    "name, pooling",
    [
        *((name, "class") for name in ("vit", "deit, distilled", "vit, registers", "irpe, qkv", "lv-vit", "sp-vit")),
        *((name, "mean") for name in ("vit", "vit, no class token", "irpe, qkv", "lv-vit", "sp-vit")),
    ],
)
def test_the_only_patch_that_says_anything_is_found(name, pooling):
    stem = name in ("lv-vit", "sp-vit")  # its convolutions reach into the neighbours
    backbone, _ = made(name, "none", (96, 96) if stem else None)
    (h, w), (H, W) = backbone.grid, backbone.size
    plan, blank = TokenPlan("none"), torch.full((1, 3, H, W), 120, dtype=torch.uint8)
    places = range(h * w)
    planted = blank.repeat(h * w, 1, 1, 1)
    for at in places:
        part = (at, slice(None), slice(at // w * H // h, (at // w + 1) * H // h))
        planted[(*part, slice(at % w * W // w, (at % w + 1) * W // w))] = torch.tensor([250, 20, 60])[:, None, None]
    with torch.no_grad():
        without, with_it = (backbone(batch, plan).pooled(pooling) for batch in (blank, planted))
    direction = F.normalize((with_it - without).mean(0), dim=0)  # a linear target that this patch decides
    attended = attend(backbone, planted, plan, pooling, lambda pooled: pooled @ direction)
    maps = attributions(attended, pooling)
    methods = {"gradient x attention"}
    if name in ("vit", "deit, distilled", "vit, registers", "vit, no class token"):
        methods.add("transformer attribution")  # of random weights behind a stem of random weights it is not so sharp
    for method in methods:
        found, at = maps[method].argmax(1), torch.arange(h * w)
        assert torch.maximum((found // w - at // w).abs(), (found % w - at % w).abs()).max() <= int(stem), method


def test_windows_are_no_attention_of_all_to_all():
    backbone, images = made("swin")
    with pytest.raises(Refusal, match=r"\(SwinTransformer\) has no attention of every patch to every patch"):
        attend(backbone, images)


# ------------------------------------------------------------------------------------------------------------- targets


def test_similarity_has_a_slope_and_is_of_centred_features():
    torch.manual_seed(2)
    pooled, centre = torch.randn(3, 8) + 5, torch.full((8,), 5.0)
    near = pooled + 0.3 * torch.randn(3, 8)
    score = attribution.similarity(near, centre)
    expected = F.cosine_similarity(pooled - 5, near - 5)
    torch.testing.assert_close(score(pooled), expected)
    pooled.requires_grad_(True)
    (slope,) = torch.autograd.grad(score(pooled).sum(), pooled)
    assert slope.norm(dim=1).min() > 0.01
    weight, bias = torch.randn(4, 8), torch.randn(4)
    own = attribution.logit(weight, bias, torch.tensor([3, 0, 3]))(pooled)
    torch.testing.assert_close(own, (pooled @ weight.T + bias)[[0, 1, 2], [3, 0, 3]])


# ------------------------------------------------------------------------------------------------------------ deletion


def test_deletion_replaces_the_first_patches_by_the_mean_colour():
    backbone, images = made("vit")
    orders = torch.stack([torch.randperm(9) for _ in range(4)])
    target = torch.randn(32)

    def score(pooled):
        return pooled @ target

    found = attribution.deletion(backbone, images, orders, score, shares=(0.0, 0.3, 0.9))
    expected = images.clone()
    with torch.no_grad():
        torch.testing.assert_close(found[:, 0], score(backbone(images).tokens.mean(1)))
        for b in range(4):
            colour = images[b].float().mean((1, 2)).round().byte()
            for at in orders[b, :3].tolist():  # 0.3 of 9 patches of 8x8 pixels
                row, column = 8 * (at // 3), 8 * (at % 3)
                expected[b, :, row : row + 8, column : column + 8] = colour[:, None, None]
        torch.testing.assert_close(found[:, 1], score(backbone(expected).tokens.mean(1)))
    assert (found[:, 2] - found[:, 1]).abs().min() > 0


def test_areas_and_gaps():
    line = torch.linspace(1, 0.1, 10)
    torch.testing.assert_close(attribution.area(line), torch.tensor(0.55))
    good, blind = torch.stack([line - 0.2, line - 0.1]), torch.stack([torch.stack([line, line])] * 3)
    found = attribution.summary({"good": good}, blind)
    assert found["good"]["area"] == pytest.approx(0.4) and found["random"]["area"] == pytest.approx(0.55)
    assert found["good"]["gap"] == pytest.approx(0.15)  # 0.2 and 0.1: deviation 0.0707, of the mean 0.05
    assert found["good"]["gap_interval"] == pytest.approx([0.15 - 1.96 * 0.05, 0.15 + 1.96 * 0.05])


def test_random_orders_are_permutations_by_their_seed_only():
    torch.manual_seed(3)
    orders = attribution.random_orders(4, 9, 2, 7)
    torch.manual_seed(4)
    assert torch.equal(orders, attribution.random_orders(4, 9, 2, 7))
    assert not torch.equal(orders, attribution.random_orders(4, 9, 2, 8)) and orders.shape == (2, 4, 9)
    assert torch.equal(orders.sort(-1).values, torch.arange(9).expand(2, 4, 9))


# ---------------------------------------------------------------------------------------------------------- components


def test_components_are_numpys_in_a_basis_that_all_images_share():
    torch.manual_seed(5)
    tokens = torch.randn(5, 16, 6) * torch.tensor([5.0, 3.0, 2.0, 0.5, 0.5, 0.5]) + 7
    found = components(tokens)
    flat = tokens.double().flatten(0, 1).numpy()
    _, _, rows = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    for number, direction in enumerate(rows[:3]):
        direction = direction * np.sign(direction[np.abs(direction).argmax()])
        values = (flat - flat.mean(0)) @ direction
        low, high = np.quantile(values, [0.01, 0.99])
        expected = ((values - low) / (high - low)).clip(0, 1).reshape(5, 16)
        np.testing.assert_allclose(found[..., number].numpy(), expected, atol=1e-6)
    assert torch.equal(found, components(tokens))
    torch.testing.assert_close(components(tokens.flip(0)).flip(0), found)


def test_components_without_spread_are_grey():
    tokens = torch.zeros(2, 4, 5)
    tokens[..., 2] = torch.arange(8.0).view(2, 4)
    found = components(tokens)
    assert found[..., 0].flatten().argsort().tolist() == list(range(8))  # the entry of largest magnitude is positive
    assert (found[..., 1:] == 0.5).all()
    assert (components(torch.ones(1, 4, 5)) == 0.5).all()
