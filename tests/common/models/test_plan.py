"""Token plans: what is drawn, and that a backbone does with it what the plan says."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.errors import Refusal
from common.models import Backbone, ModelConfig, create
from common.models.plan import PlanSpec, TokenPlan

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
PLAIN = {
    "vit": ("vit_tiny_patch16_224", {}, [16, 24]),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False}, [16, 24]),
    "dynamic": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, [16, 24]),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, [16, 24]),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, [16, 24]),
    "distilled dynamic": ("deit_tiny_distilled_patch16_224", {"dynamic_img_size": True}, [16, 24]),
    "qk norm, layer scale": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.1}, [16, 24]),
    "no qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False}, [16, 24]),
}


def backbone(name: str = "vit", attention: str = "explicit", checkpointing: bool = False) -> Backbone:
    """2x3 patches of 8x8 pixels; weights drawn so large that nothing hides."""
    architecture, kwargs, size = PLAIN[name]
    config = ModelConfig(architecture, TINY | kwargs, attention=attention, checkpointing=checkpointing)
    made = create(config, size).double().eval()
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------------------------------------------- drawing


def test_what_is_drawn() -> None:
    spec = PlanSpec(keep=0.25, position="partial", position_keep=0.25, context=0.5)
    drawn = spec.draw(np.random.default_rng(0), 196)
    assert drawn["kept"].shape == (49,) and len(set(drawn["kept"])) == 49  # DropPos: 49 of 196,
    assert drawn["visible"].shape == (49,) and drawn["visible"].sum() == 12  # 12 of them told their place
    assert drawn["context"].shape == (24,) and len(set(drawn["context"])) == 24 and drawn["context"].max() < 49
    assert drawn["kept"].min() >= 0 and drawn["kept"].max() < 196 and (np.diff(drawn["kept"]) > 0).all()


def test_nothing_is_drawn_for_whole_grids() -> None:
    for position in ("none", "full"):
        assert PlanSpec(position=position).whole
        assert PlanSpec(position=position).draw(np.random.default_rng(0), 9) == {}


def test_every_patch_is_kept_equally_often() -> None:
    rng = np.random.default_rng(0)
    counts = sum(np.bincount(PlanSpec(keep=0.5).draw(rng, 6)["kept"], minlength=6) for _ in range(2000))
    assert np.abs(counts / 2000 - 0.5).max() < 4 * 0.5 / 2000**0.5


@pytest.mark.parametrize(("keep", "patches", "kept"), [(0.29, 100, 29), (0.5, 9, 4), (0.25, 196, 49), (1.0, 7, 7)])
def test_the_number_kept_is_rounded_down(keep: float, patches: int, kept: int) -> None:
    assert PlanSpec(keep=keep).counts(patches)[0] == kept


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"position": "partail"}, "did you mean 'partial'"),
        ({"keep": 0.0}, "keep=0.0: expected a share of the patches, above 0, at most 1"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": float("nan")}, "keep=nan"),
        ({"context": -0.5}, "context=-0.5"),
        ({"position_keep": 0.25}, "position_keep=0.25 goes with position=partial"),
        ({"position": "partial", "position_keep": 1.0}, "position_keep=1.0: expected a share of the kept patches of"),
    ],
)
def test_what_means_nothing_is_refused(given: dict, words: str) -> None:
    with pytest.raises(Refusal) as refusal:
        PlanSpec(**given)
    assert words in str(refusal.value)


def test_too_few_patches_are_refused() -> None:
    with pytest.raises(Refusal, match=r"keep=0\.25 of 6 patches leaves 1: at least 2 are needed"):
        PlanSpec(keep=0.25).counts(6)
    with pytest.raises(Refusal, match=r"context=0\.1 of 6 patches leaves no key"):
        PlanSpec(context=0.1).counts(6)


# ----------------------------------------------------------------------------------------------- what a backbone does


@pytest.mark.parametrize("name", PLAIN)
def test_kept_patches_alone_are_what_the_encoder_sees(name: str) -> None:
    """Changing a patch that was not kept changes nothing, and the others are told their own places."""
    made = backbone(name)
    kept = torch.tensor([[0, 2, 5], [1, 2, 3]])
    plan = TokenPlan("full", kept=kept)
    seen = made(images(), plan)
    assert seen.tokens.shape == (2, 3, 32) and seen.plan is plan
    other = images()
    other[0, :, :8, 8:16] = 7.0  # patch 1 of the first image
    close(made(other, plan).tokens, seen.tokens)
    # all patches, in another order: the tokens of the whole grid, in that order
    everything = torch.tensor([[5, 3, 1, 0, 2, 4], [0, 1, 2, 3, 4, 5]])
    whole = made(images())
    again = made(images(), TokenPlan("full", kept=everything))
    close(again.tokens, whole.tokens.gather(1, everything[..., None].expand(-1, -1, 32)))
    close(again.prefix, whole.prefix)


def test_the_work_shrinks_with_the_patches() -> None:
    made, lengths = backbone(), []
    made.model.blocks[0].register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[1]))
    made(images(), TokenPlan("none", kept=torch.tensor([[0, 1], [2, 3]])))
    assert lengths == [3]  # class token and two patches, in the blocks themselves


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("attention", ["explicit", "fused"])
def test_context_is_attention_with_the_other_keys_masked(name: str, attention: str) -> None:
    made = backbone(name, attention)
    context = torch.tensor([[0, 3], [4, 5]])
    found = made(images(), TokenPlan("none", context=context))
    P = made.num_prefix_tokens
    mask = torch.full((2, 1, 1, P + 6), -torch.inf, dtype=torch.float64)
    for b in range(2):
        mask[b, ..., :P] = 0
        mask[b, ..., P + context[b]] = 0
    calls = []
    for block in made.model.blocks:  # timm's own attention, with an additive mask on the scores
        block.attn.forward = masked(block.attn, mask, calls)
    whole = made(images(), TokenPlan("none"))
    assert len(calls) == 2
    close(found.tokens, whole.tokens)
    close(found.prefix, whole.prefix)


def masked(attention, mask, calls):  # type: ignore[no-untyped-def]
    def forward(x, **_):  # type: ignore[no-untyped-def]
        calls.append(1)
        B, T, D = x.shape
        q, k, v = attention.qkv(x).reshape(B, T, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = attention.q_norm(q) @ attention.k_norm(k).transpose(-2, -1) * attention.scale + mask
        return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))

    return forward


def test_a_patch_outside_the_context_is_no_key() -> None:
    """Its pixels move its own token and no other: as a key it gets no gradient at all."""
    made = backbone()
    pixels = images(1).requires_grad_()
    tokens = made(pixels, TokenPlan("none", context=torch.tensor([[0, 1]]))).tokens
    (gradient,) = torch.autograd.grad(tokens[:, :2].sum(), pixels, retain_graph=True)
    assert gradient[..., 8:, :].abs().max() == 0 and gradient[..., :8, :16].abs().min() > 0  # patches 3-5 and 0, 1
    (own,) = torch.autograd.grad(tokens[:, 5].sum(), pixels)
    assert own[..., 8:, 16:].abs().min() > 0 and own[..., 8:, :16].abs().max() == 0


@pytest.mark.parametrize("name", PLAIN)
def test_partial_shows_some_embeddings_and_hides_the_others(name: str) -> None:
    """By hand: the hidden ones' rows of the embedding are replaced; the prefix tokens keep theirs."""
    made = backbone(name)
    visible = torch.tensor([[True, False, True, False, False, False]])
    hidden = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = made(images(1), TokenPlan("partial", visible=visible), hidden)
    with torch.no_grad():
        embedding = made.model.pos_embed
        first = embedding.shape[1] - 6
        for patch in (1, 3, 4, 5):
            embedding[0, first + patch] = hidden
    close(found.tokens, made(images(1)).tokens)
    close(found.prefix, made(images(1)).prefix)


def test_all_at_once_follows_the_patches() -> None:
    """keep, partial and context together: the order in which kept patches are listed changes nothing."""
    made = backbone()
    hidden = torch.ones(32, dtype=torch.float64)
    plan = TokenPlan(
        "partial", torch.tensor([[0, 2, 3, 5]]), torch.tensor([[True, False, False, True]]), torch.tensor([[1, 3]])
    )
    other = TokenPlan(
        "partial", torch.tensor([[5, 2, 0, 3]]), torch.tensor([[True, False, True, False]]), torch.tensor([[0, 1]])
    )
    close(made(images(1), plan, hidden).tokens[:, [3, 1, 0, 2]], made(images(1), other, hidden).tokens)


@pytest.mark.parametrize("context", [None, torch.tensor([[0, 3], [4, 5]])])
def test_checkpointed_blocks_give_the_same_gradient(context: torch.Tensor | None) -> None:
    def gradient(checkpointing: bool) -> torch.Tensor:
        made = backbone(checkpointing=checkpointing).train()
        plan = TokenPlan("none", torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]), context=context)
        made(images(), plan).tokens.square().mean().backward()
        return made.model.patch_embed.proj.weight.grad

    close(gradient(True), gradient(False))


def test_sines_and_cosines_are_fixed() -> None:
    config = ModelConfig("deit_tiny_distilled_patch16_224", TINY, position_embedding="sincos")
    made = create(config, [16, 24])
    embedding = made.model.pos_embed
    assert not embedding.requires_grad and not embedding[0, :2].any()  # class and distillation token
    column, row = embedding[0, 2 + 5, :16], embedding[0, 2 + 5, 16:]  # patch 5 of 2x3: row 1, column 2
    rates = torch.tensor([10_000 ** (-i / 8) for i in range(8)])
    torch.testing.assert_close(column, torch.cat([(2 * rates).sin(), (2 * rates).cos()]))
    torch.testing.assert_close(row, torch.cat([rates.sin(), rates.cos()]))
    assert F.cosine_similarity(embedding[0, 2], embedding[0, 3], dim=0) > F.cosine_similarity(
        embedding[0, 2], embedding[0, 4], dim=0
    )


# ------------------------------------------------------------------------------------------------- what cannot be had


SWIN = ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}, 32)
EVA = ("eva02_tiny_patch14_224", {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}, 16)
CAIT = ("cait_xxs24_224", {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}, 16)
BEIT = ("beit_base_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}, 16)
NO_EMBEDDING = ("vit_tiny_patch16_224", TINY | {"pos_embed": "none"}, [16, 24])


@pytest.mark.parametrize(
    ("built", "spec", "words"),
    [
        (SWIN, PlanSpec(keep=0.5, position="none"), "(SwinTransformer) cannot run with keep=0.5: its windows"),
        (SWIN, PlanSpec(context=0.5), "cannot run with context=0.5"),
        (EVA, PlanSpec(position="partial"), "(Eva) cannot run with position=partial"),
        (CAIT, PlanSpec(position="none"), "cannot run with position=none"),
        (BEIT, PlanSpec(keep=0.5), "(Beit) cannot run with keep=0.5"),
        (NO_EMBEDDING, PlanSpec(position="partial"), "no position embedding of which position=partial"),
        (("vit_tiny_patch16_224", TINY, [16, 24]), PlanSpec(keep=0.2), "leaves 1: at least 2 are needed"),
    ],
)
def test_a_plan_that_a_backbone_cannot_run_is_refused(built: tuple, spec: PlanSpec, words: str) -> None:
    architecture, kwargs, size = built
    made = create(ModelConfig(architecture, kwargs), size)
    with pytest.raises(Refusal) as refusal:
        made.use_plans({spec})
    assert words in str(refusal.value)


def test_context_needs_plain_blocks() -> None:
    made = create(ModelConfig("vit_small_patch16_18x2_224", TINY), [16, 24])
    with pytest.raises(Refusal, match=r"its blocks are ParallelThingsBlock .* context=1"):
        made.use_plans({PlanSpec(position="none", context=0.5)})


def test_timms_own_patch_dropout_is_refused() -> None:
    with pytest.raises(Refusal, match="set `keep` instead"):
        create(ModelConfig("vit_tiny_patch16_224", TINY | {"patch_drop_rate": 0.5}), [16, 24])


def test_an_embedding_that_is_shown_in_part_stays_trained() -> None:
    made = create(ModelConfig("vit_tiny_patch16_224", TINY), [16, 24])
    made.use_plans({PlanSpec(position="partial"), PlanSpec(position="none")})
    assert made.model.pos_embed.requires_grad
