"""Token plans over every backbone: what iRPE does with them, what position none leaves, and what is refused."""

from typing import Any

import pytest
import torch
from backbones import IRPE, LV_AND_SP, ROWS, WHOLE, build, everything, loss, pixels, redraw, without_gradient
from torch import Tensor, nn

from common.errors import Refusal
from common.models import Backbone, Features, attention
from common.models.irpe import bucket_ids
from common.models.plan import PlanSpec, TokenPlan
from pretrain.leaks.controls import rearrange

NONE, FULL = PlanSpec(position="none"), PlanSpec()
every = pytest.mark.parametrize("name", ROWS)


# --------------------------------------------------------------------------------------------- token plans of iRPE


def published(block: Any, ids: Tensor, keys: Tensor | None) -> Any:
    """Attention with iRPE by its definition, each pair with a vector of its own; `keys` (B, S): no others."""

    self = block.attn

    def entries(side: str) -> list[Tensor]:
        part = getattr(self, f"rpe_{side}")
        return list(dict(part.named_parameters()).values())  # cross: rows, then columns, as `ids`

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q) * self.scale, self.k_norm(k)
        scores = q @ k.mT
        tables = ids.unbind() if ids.ndim == 3 else [ids]
        for side, states in (("k", q), ("q", k * self.scale)):
            if not hasattr(self, f"rpe_{side}"):
                continue
            for table, weight in zip(tables, entries(side), strict=True):
                if weight.ndim == 2:
                    added = weight[:, table]  # a bias, not scaled: (1 or H, T, T)
                else:
                    added = torch.einsum("bhid,hdij->bhij", states, weight.expand(self.num_heads, -1, -1)[:, :, table])
                scores = scores + (added if side == "k" else added.mT)
        if keys is not None:
            unseen = torch.ones(B, T, dtype=torch.bool).scatter(1, keys, False)
            scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
        shares = scores.softmax(-1)
        out = shares @ v
        if hasattr(self, "rpe_v"):
            for table, weight in zip(tables, entries("v"), strict=True):
                out = out + torch.einsum("bhij,hijd->bhid", shares, weight.expand(self.num_heads, -1, -1)[:, table])
        return self.proj(out.transpose(1, 2).reshape(B, T, D))

    return forward


def exact(name: str, size: tuple[int, int] | None = None) -> Backbone:
    return redraw(build(name, size).double().eval(), 0.3)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def by_definition(name: str, backbone: Backbone, grid: tuple[int, int], keys: Tensor | None = None) -> Backbone:
    """The backbone whose attention is `published`."""
    options = ROWS[name].irpe or {"method": "product"}
    ids = bucket_ids(options["method"], grid, options.get("ratio", 1.9), ROWS[name].prefix)
    for part in backbone.model.blocks:
        part.attn.forward = published(part, ids, keys)
    return backbone


@pytest.mark.parametrize("name", IRPE)
@pytest.mark.parametrize("cached", [attention.CACHED, 1])
def test_relative_attention_by_its_definition(name: str, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CACHED", cached)  # 1: one head of one image at a time
    size, grid = (24, 40), (3, 5)
    backbone = exact(name, None if "dynamic" in name else size)
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = backbone(images)
    gradient = gradients_of(backbone, found)
    again = by_definition(name, backbone, grid)(images)
    same(everything(found), everything(again))
    for mine, other in zip(gradient, gradients_of(backbone, again), strict=True):
        same(mine, other)


def gradients_of(backbone: Backbone, features: Features) -> tuple[Tensor, ...]:
    tokens = everything(features)
    weights = torch.randn(tokens.shape, dtype=tokens.dtype, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((tokens * weights).sum(), [p for p in backbone.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", IRPE)
def test_plans_of_relative_attention(name: str) -> None:
    """Context: the others are no keys, by definition. Kept: as if they had been the context, for themselves."""
    backbone, P = exact(name, (24, 32)), ROWS[name].prefix
    context = torch.tensor([[1, 5, 7], [0, 10, 11]])
    found = backbone(pixels(backbone), TokenPlan("full", context=context))
    kept = backbone(pixels(backbone), TokenPlan("full", kept=context))
    first = torch.tensor([[0, 2], [1, 2]])
    both = backbone(pixels(backbone), TokenPlan("full", kept=context, context=first))
    within = backbone(pixels(backbone), TokenPlan("full", context=context.gather(1, first)))
    prefix = torch.arange(P).expand(2, P)
    keys = torch.cat([prefix, context + P], 1)
    by_hand = by_definition(name, backbone, backbone.grid, keys)(pixels(backbone))
    same(everything(found), everything(by_hand))
    take = context[..., None].expand(-1, -1, 32)
    same(kept.prefix, found.prefix)
    same(kept.tokens, found.tokens.gather(1, take))
    same(both.tokens, within.tokens.gather(1, take))


@pytest.mark.parametrize("name", IRPE)
@pytest.mark.parametrize("prepared", [{NONE}, {NONE, FULL}])
def test_without_position_nothing_relative_is_left(name: str, prepared: set[PlanSpec]) -> None:
    backbone = exact(name)
    backbone.use_plans(prepared)
    images = pixels(backbone, 1)
    order = torch.tensor([[4, 2, 0, 8, 6, 1, 3, 5, 7]])
    plan = TokenPlan("none")
    same(backbone(images, plan).tokens[:, order[0]], backbone(rearrange(images, order, (3, 3)), plan).tokens)
    part = TokenPlan("none", kept=torch.tensor([[1, 3, 4, 8]]), context=torch.tensor([[0, 2]]))
    other = TokenPlan("none", kept=order.argsort()[:, part.kept[0]], context=part.context)
    same(backbone(images, part).tokens, backbone(rearrange(images, order, (3, 3)), other).tokens)
    if FULL in prepared:
        plan = TokenPlan("full")
        backbone.model.pos_embed = None  # and with it the relative encoding does tell
        moved = backbone(rearrange(images, order, (3, 3)), plan).tokens
        assert (backbone(images, plan).tokens[:, order[0]] - moved).abs().max() > 1e-3


@every
def test_what_no_pass_uses_is_frozen(name: str) -> None:
    """DDP stops at a parameter that gets no gradient, and with position none encodings get none."""
    backbone = redraw(build(name))
    backbone.use_plans({NONE})
    backbone.zero_grad()
    loss(backbone(pixels(backbone), TokenPlan("none"))).backward()
    trained = {name: p.grad for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in trained.items() if gradient is None] and not without_gradient(trained)
    frozen = {name for name, p in backbone.model.named_parameters() if not p.requires_grad}
    told = ("pos_embed", "lookup_table_weight", "lookup_table_bias", "relative_position_bias_table")
    assert {key for key in frozen if key.endswith(told)} == {
        key for key, _ in backbone.model.named_parameters() if key.endswith(told)
    }


# ----------------------------------------------------------------------------- what needs the whole grid, and why


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("plan", [{"keep": 0.5}, {"context": 0.5}, {"position": "partial", "position_keep": 0.25}])
def test_parts_of_a_grid_are_refused(name: str, plan: dict[str, Any]) -> None:
    backbone = build(name)
    with pytest.raises(Refusal) as refusal:
        backbone.use_plans({PlanSpec(**{"position": "full", **plan})})
    words = str(refusal.value)
    assert "\n" not in words and f"cannot run with {next(iter(plan))}=" in words and "whole grid" in words


@pytest.mark.parametrize("name", IRPE)
def test_partial_positions_are_refused_beside_relative_ones(name: str) -> None:
    backbone = build(name)
    with pytest.raises(Refusal, match=r"cannot run with position=partial: iRPE tells") as refusal:
        backbone.use_plans({PlanSpec(position="partial", position_keep=0.25)})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", LV_AND_SP)
def test_without_position_only_the_stem_tells(name: str) -> None:
    """Its windows overlap, so patches are exchanged behind it; what follows must not see that."""
    backbone = exact(name)
    backbone.use_plans({NONE, FULL})
    order = torch.tensor([4, 2, 0, 8, 6, 1, 3, 5, 7])
    images = pixels(backbone)

    def exchange(_: nn.Module, __: Any, tokens: Tensor) -> Tensor:  # (B, N, D), or (B, h, w, D) where dynamic
        return tokens.reshape(2, 9, 32)[:, order].view(tokens.shape)

    for position, told in (("none", False), ("full", True)):
        plan = TokenPlan(position)
        before = backbone(images, plan)
        hook = backbone.model.patch_embed.register_forward_hook(exchange)
        after = backbone(images, plan)
        hook.remove()
        moved = (before.tokens[:, order] - after.tokens).abs().max()
        assert moved > 1e-3 if told else moved < 1e-10, position
        if not told:
            same(before.prefix, after.prefix)
