"""The matrix: what every backbone that is offered must do alike, as a timm model and as ours."""

import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from backbones import ROWS, VIT, block, build, everything, gradients, loss, own, pixels, redraw, without_gradient
from timm.layers import resample_abs_pos_embed
from timm.models import deit, group_parameters, vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.checkpoints.public import describe, export, load_backbone
from common.errors import Refusal
from common.models import ModelConfig, attention, create
from common.models.plan import PlanSpec
from common.training.optim import layer_ids, parameter_groups

every = pytest.mark.parametrize("name", ROWS)

# --------------------------------------------------------------------------------------------------- what comes out


@every
def test_shapes(name: str) -> None:
    row, backbone = ROWS[name], build(name).eval()
    features = backbone(pixels(backbone))
    assert backbone.grid == features.grid == row.grid
    assert features.tokens.shape == (2, row.grid[0] * row.grid[1], row.width)
    assert features.prefix.shape == (2, row.prefix, row.width)
    assert (backbone.width, backbone.num_prefix_tokens) == (row.width, row.prefix)


@every
@pytest.mark.parametrize("which", ["oblong", "odd"])
def test_other_sizes(name: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS[name]
    if getattr(row, which) is None:
        with pytest.raises(Refusal, match="square"):
            build(name, (64, 96))
        return
    size, grid = getattr(row, which)
    backbone = build(name, size)
    features = backbone(pixels(backbone))
    assert features.grid == backbone.grid == grid and features.tokens.shape == (2, grid[0] * grid[1], row.width)
    loss(features).backward()
    if "dynamic" in name:  # the same model, another size than it was built for
        model = redraw(build(name).eval())
        again = model(pixels(backbone))
        assert again.grid == grid and again.tokens.shape == features.tokens.shape
        for module in (vision_transformer, deit):  # timm's own way, but for the antialiasing
            resize = partial(resample_abs_pos_embed, antialias=False)
            monkeypatch.setattr(module, "resample_abs_pos_embed", resize)
        own = model.model.forward_features(pixels(backbone))
        torch.testing.assert_close(everything(again), own, atol=1e-5, rtol=1e-5)


@every
def test_features_are_timms_own(name: str) -> None:
    backbone = redraw(build(name).eval())
    features, images = backbone(pixels(backbone)), pixels(backbone)
    with torch.no_grad():
        tokens = backbone.model.forward_features(images)
        if "swin" in name:
            tokens = tokens.flatten(1, 2)  # NHWC
        elif name == "nest":
            tokens = tokens.flatten(2).transpose(1, 2)  # NCHW
        torch.testing.assert_close(everything(features), tokens, atol=1e-5, rtol=1e-5)
        maps = backbone.model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[-1]
    torch.testing.assert_close(features.tokens, maps.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


@every
def test_layers_end_with_the_final_features(name: str) -> None:
    backbone = redraw(build(name).eval())
    first, last = backbone.layers(pixels(backbone), 2)
    torch.testing.assert_close(last.tokens, backbone(pixels(backbone)).tokens)
    assert first.tokens.shape[1] == first.grid[0] * first.grid[1]
    if isinstance(backbone.model, VisionTransformer):
        with torch.no_grad():
            maps = backbone.model.forward_intermediates(pixels(backbone), indices=2, norm=True, intermediates_only=True)
        torch.testing.assert_close(first.tokens, maps[0].flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match=r"blocks; 9 were asked for"):
            backbone.layers(pixels(backbone), 9)


@every
def test_one_image_is_as_good_as_two(name: str) -> None:
    backbone = redraw(build(name).eval())
    images = pixels(backbone)
    torch.testing.assert_close(everything(backbone(images[:1])), everything(backbone(images))[:1], atol=1e-5, rtol=1e-5)
    loss(backbone.train()(images[:1])).backward()


@every
def test_random_in_training_and_not_in_evaluation(name: str) -> None:
    backbone = build(name, drop_path=0.5)
    images = pixels(backbone, 4)
    assert not torch.equal(everything(backbone.train()(images)), everything(backbone(images)))
    assert torch.equal(everything(backbone.eval()(images)), everything(backbone(images)))


# ----------------------------------------------------------------------------------------------------- how it trains


@every
def test_gradients_reach_every_parameter(name: str) -> None:
    backbone = build(name)
    backbone.use_plans({PlanSpec()})
    found = gradients(backbone)
    assert not [name for name, gradient in found.items() if gradient is None]  # DDP stops at one without
    idle = {parameter for parameter in found if re.fullmatch(ROWS[name].idle, parameter)}
    assert without_gradient(found) == idle
    if idle:
        torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=1e-2).step()
        assert not without_gradient(gradients(backbone))


@every
def test_half_precision_is_close(name: str) -> None:
    backbone = redraw(build(name), 0.05)
    exact = gradients(backbone)
    whole = everything(backbone(pixels(backbone)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = gradients(backbone)
        features = everything(backbone(pixels(backbone))).float()
    assert (features - whole).norm() < 0.03 * whole.norm()
    for key, gradient in exact.items():
        assert half[key].dtype == gradient.dtype
    a, b = (torch.cat([gradient.flatten() for gradient in each.values()]) for each in (exact, half))
    assert (a - b).norm() < 0.05 * a.norm()


@every
def test_fused_and_explicit_attention_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And explicit probabilities pass through `attn_drop`, where explanations hook them."""
    monkeypatch.setattr(attention, "CACHED", 1)  # ours: one head of one image at a time
    fused, explicit = (redraw(build(name, attention=how).double(), 0.3) for how in ("fused", "explicit"))
    seen: list[Tensor] = []
    for part_name, part in explicit.model.named_modules():
        if part_name.endswith("attn_drop"):
            part.register_forward_hook(lambda _, __, probabilities: seen.append(probabilities.detach()))
    torch.testing.assert_close(everything(explicit(pixels(explicit))), everything(fused(pixels(fused))))
    assert len(seen) == sum(part_name.endswith(".attn") for part_name, _ in explicit.model.named_modules())
    for probabilities in seen:
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]).double())
    mine, theirs = gradients(explicit), gradients(fused)
    for key, gradient in mine.items():
        assert (theirs[key] - gradient).norm() < 1e-9 * gradient.norm() + 1e-15, key


@every
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    def run(checkpointing: bool) -> tuple[dict[str, Tensor | None], int]:
        backbone = redraw(build(name, checkpointing=checkpointing))
        calls: list[int] = []
        _, first = block(backbone.model)
        part = next(module for module in first.modules() if isinstance(module, nn.LayerNorm))
        part.register_forward_hook(lambda *_: calls.append(1))
        return gradients(backbone), len(calls)

    (plain, once), (recomputed, twice) = run(False), run(True)
    assert twice == 2 * once
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@every
def test_a_compiled_block_is_the_same(name: str) -> None:
    model = redraw(own(name)).eval()
    _, module = block(model)
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    rope = []
    if name == "eva":
        module.register_forward_pre_hook(lambda _, given, named: rope.append(named), with_kwargs=True)
    model(torch.randn(2, 3, *ROWS[name].size, generator=torch.Generator().manual_seed(1)))
    handle.remove()
    module._forward_pre_hooks.clear()
    call = partial(module, **(rope[0] if rope else {}))
    results = []
    torch._dynamo.reset()
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        tokens = seen[0].clone().requires_grad_()
        module.zero_grad()
        output = run(tokens)
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        results.append([output, tokens.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(results[0]) > 8
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


@every
def test_layer_decay(name: str) -> None:
    """BEiT's: each layer's rate is half of the one above it; what timm says is not decayed is not."""
    backbone = build(name)
    names = {id(parameter): key for key, parameter in backbone.model.named_parameters()}
    scales, decays = {}, {}
    for group in parameter_groups(backbone, 0.05, layer_decay=0.5):
        for parameter in group["params"]:
            assert id(parameter) not in scales
            scales[id(parameter)], decays[id(parameter)] = group["lr_scale"], group["weight_decay"]
    assert scales.keys() == {id(p) for p in backbone.parameters() if p.requires_grad}
    of = {names[key]: scale for key, scale in scales.items()}
    if isinstance(backbone.model, VisionTransformer):
        depth = len(backbone.model.blocks)
        for key, scale in of.items():
            inside = re.match(r"blocks\.(\d+)\.", key)
            layer = int(inside[1]) + 1 if inside else depth + 1 if key.startswith("norm.") else 0
            assert scale == 0.5 ** (depth + 1 - layer), key
    else:
        stem, first, top = (
            {scale for key, scale in of.items() if key.startswith(start)}
            for start in ("patch_embed.", block(backbone.model)[0] + ".", "norm.")
        )
        assert max(stem) <= min(first) and max(first) < min(top) == 1.0
    undecayed = backbone.model.no_weight_decay()
    for key, decay in ((names[key], decay) for key, decay in decays.items()):
        light = key in undecayed or key.split(".")[-1] in undecayed or backbone.model.get_parameter(key).ndim == 1
        assert decay == 0 if light else decay in (0, 0.05), key
    assert {decays[id(p)] for p in block(backbone.model)[1].parameters()} == {0, 0.05}


@every
def test_round_trip_through_safetensors(name: str, tmp_path: Path) -> None:
    backbone = redraw(build(name)).train()
    backbone(pixels(backbone))  # moves the averages of a batch norm
    export(tmp_path, backbone.eval(), describe(backbone, "full", "mean", {}))
    loaded, plan, _ = load_backbone(tmp_path)
    assert plan.position == "full"
    mine, theirs = backbone.model.state_dict(), loaded.model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert torch.equal(everything(backbone(pixels(backbone))), everything(loaded(pixels(backbone))))


# -------------------------------------------------------------------------------------------------- a timm model


@every
def test_timms_interface(name: str) -> None:
    row, model = ROWS[name], own(name).eval()
    images = torch.randn(2, 3, *row.size, generator=torch.Generator().manual_seed(1))
    features = model.forward_features(images)
    logits = model(images)
    assert logits.shape == (2, 5)
    torch.testing.assert_close(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True).shape == (2, row.width)
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, features, atol=1e-5, rtol=1e-5)
    assert len(model.feature_info) == len(maps)
    for info, map_ in zip(model.feature_info, maps, strict=True):
        channels, height = (map_.shape[1], map_.shape[2])
        assert info["num_chs"] == channels and row.size[0] // info["reduction"] == height
        assert model.get_submodule(info["module"]) is not None
    heads = model.get_classifier()
    assert all(isinstance(head, nn.Linear) for head in (heads if isinstance(heads, tuple) else [heads]))
    assert model.num_classes == 5 and getattr(model, "num_prefix_tokens", 0) == row.prefix
    for setting in (True, False):
        model.set_grad_checkpointing(setting)
        model(images).square().sum().backward()
    assert model.no_weight_decay() <= {
        *dict(model.named_parameters()),
        "cls_token",
        "dist_token",
        "reg_token",
        "pos_embed",
    } or name in ("beit", "swin")
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == row.name and len(cfg["input_size"]) == len(cfg["mean"]) == len(cfg["std"]) == 3
    for part in ("classifier", "first_conv"):
        for path in [cfg[part]] if isinstance(cfg[part], str) else cfg[part]:
            assert isinstance(model.get_submodule(path), (nn.Linear, nn.Conv2d))
    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        grouped = [parameter for names in groups.values() for parameter in names]
        assert sorted(grouped) == sorted(key for key, _ in model.named_parameters())
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images).shape == (2, row.width)


def test_what_timms_matcher_does_not_know_is_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As timm 1.0.20 to 1.0.27 had it, without registers, and without CLIP's norm before the blocks."""
    old = {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}
    monkeypatch.setattr(VisionTransformer, "group_matcher", lambda self, coarse=False: old)
    backbone = create(ModelConfig("vit_small_patch14_reg4_dinov2", VIT | {"pre_norm": True}), 24)
    layers = {name.removeprefix("model."): layer for name, layer in layer_ids(backbone).items()}
    assert {layers[name] for name in ("reg_token", "cls_token", "pos_embed", "norm_pre.weight")} == {0}
    assert [layers[f"blocks.{at}.norm1.weight"] for at in (0, 1)] == [1, 2] and layers["norm.weight"] == 3


def test_layers_of_architectures_with_an_unusual_matcher_or_none() -> None:
    cait = layer_ids(timm.create_model("cait_xxs24_224", depth=2, embed_dim=48, num_heads=4, num_classes=3))
    assert {cait[name] for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    assert [cait[f"blocks.{at}.norm1.weight"] for at in (0, 1)] == [1, 2] and cait["norm.bias"] == max(cait.values())
    with pytest.raises(Refusal, match="layer_decay: timm does not say which layers"):
        layer_ids(nn.Linear(2, 2))
