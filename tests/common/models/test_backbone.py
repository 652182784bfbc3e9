"""One matrix over backbones: what every one of them must do alike."""

import copy

import pytest
import torch
from torch import nn

from common.errors import Refusal
from common.models import Backbone, ModelConfig, create
from common.models.plan import PlanSpec, TokenPlan
from pretrain.leaks.controls import rearrange

NONE = PlanSpec(position="none")

# name, arguments, size, grid, prefix tokens, width
SMALL_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MATRIX = {
    "vit": ("vit_tiny_patch16_224", SMALL_VIT, 24, (3, 3), 1, 32),
    "vit 2x3": ("vit_tiny_patch16_224", SMALL_VIT, [16, 24], (2, 3), 1, 32),
    "vit dynamic": ("vit_tiny_patch16_224", {**SMALL_VIT, "dynamic_img_size": True}, 24, (3, 3), 1, 32),
    "vit average pooled": ("vit_small_patch16_18x2_224", {**SMALL_VIT, "global_pool": "avg"}, 24, (3, 3), 1, 32),
    "vit registers": ("vit_small_patch14_reg4_dinov2", {**SMALL_VIT, "patch_size": 8}, 24, (3, 3), 5, 32),
    "vit no class token": (
        "vit_tiny_patch16_224",
        {**SMALL_VIT, "class_token": False, "global_pool": "avg"},
        24,
        (3, 3),
        0,
        32,
    ),
    "deit distilled": ("deit_tiny_distilled_patch16_224", SMALL_VIT, 24, (3, 3), 2, 32),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4},
        [32, 48],
        (4, 6),
        0,
        32,
    ),
    "nest": ("nest_tiny", {}, 64, (4, 4), 0, 384),  # timm lets nobody make it smaller
    "beit": ("beit_base_patch16_224", SMALL_VIT, 24, (3, 3), 1, 32),
    "eva": ("eva02_tiny_patch14_224", SMALL_VIT, 24, (3, 3), 1, 32),
    "rope": ("vit_small_patch16_rope_mixed_224", SMALL_VIT, 24, (3, 3), 1, 32),
}


def build(name: str) -> Backbone:
    architecture, kwargs, size, *_ = MATRIX[name]
    torch.manual_seed(0)
    return create(ModelConfig(architecture, dict(kwargs)), size)


def images(backbone: Backbone, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, *backbone.size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", MATRIX)
def test_shapes(name: str) -> None:
    backbone = build(name).eval()
    *_, grid, prefix, width = MATRIX[name]
    features = backbone(images(backbone, 1))
    assert backbone.grid == features.grid == grid
    assert features.tokens.shape == (1, grid[0] * grid[1], width)
    assert features.prefix.shape == (1, prefix, width)
    assert backbone.width == width and backbone.num_prefix_tokens == prefix


@pytest.mark.parametrize("name", MATRIX)
def test_tokens_are_timms_own_final_features(name: str) -> None:
    backbone = build(name).eval()
    features = backbone(images(backbone))
    normalised = (images(backbone).float() / 255 - backbone.mean) / backbone.std
    with torch.no_grad():
        own = backbone.model.forward_features(normalised)
    B, (h, w) = 2, features.grid
    if name == "swin":
        own = own.reshape(B, h * w, -1)  # NHWC
    elif name == "nest":
        own = own.flatten(2).transpose(1, 2)  # NCHW
    torch.testing.assert_close(torch.cat([features.prefix, features.tokens], 1), own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("position", ["none", "full"])
def test_every_trained_parameter_gets_a_gradient(name: str, position: str) -> None:
    """DDP stops at a parameter without one."""
    backbone = build(name)
    backbone.use_plans({PlanSpec(position=position)})
    backbone(images(backbone), TokenPlan(position)).tokens.square().mean().backward()
    idle = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


@pytest.mark.parametrize("name", ["vit", "vit registers", "deit distilled", "vit no class token"])
def test_without_position_patches_permute_with_their_tokens(name: str) -> None:
    backbone = build(name).double().eval()
    for parameter in backbone.parameters():  # initial values near zero would hide a leak
        torch.nn.init.normal_(parameter, std=0.1)
    pixels = torch.randn(1, 3, *backbone.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).reshape(1, 3, 9, 8, 8)
    order = torch.tensor([4, 2, 0, 8, 6, 1, 3, 5, 7])

    def assemble(cells: torch.Tensor) -> torch.Tensor:
        return cells.reshape(1, 3, 3, 3, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 24, 24)

    for position, equal in (("none", True), ("full", False)):
        plan = TokenPlan(position)
        tokens = backbone(assemble(patches), plan).tokens[:, order]
        shuffled = backbone(assemble(patches[:, :, order]), plan).tokens
        assert torch.allclose(tokens, shuffled, atol=1e-9) == equal, position


@pytest.mark.parametrize("name", ["swin", "nest"])
def test_position_none_removes_what_carries_position_inside(name: str) -> None:
    backbone = build(name)
    backbone.use_plans({NONE})
    encodings = [p for n, p in backbone.named_parameters() if n.endswith(("relative_position_bias_table", "pos_embed"))]
    assert encodings and all(not p.requires_grad and not p.any() for p in encodings)


def test_mixed_positions() -> None:
    build("vit").use_plans({NONE, PlanSpec()})  # chosen per pass
    with pytest.raises(Refusal, match="same position"):
        build("swin").use_plans({NONE, PlanSpec()})


@pytest.mark.parametrize("name", ["beit", "eva", "rope"])
def test_without_what_they_carry_inside_patches_permute_with_their_tokens(name: str) -> None:
    order = torch.tensor([4, 2, 0, 8, 6, 1, 3, 5, 7])
    for without in (True, False):
        backbone = build(name).double().eval()
        if without:
            backbone.use_plans({NONE})
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        pixels = torch.randn(1, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        shuffled = rearrange(pixels, order[None], (3, 3))
        follow = torch.allclose(backbone(pixels).tokens[:, order], backbone(shuffled).tokens, atol=1e-9)
        assert follow == without


def test_a_family_that_cannot_run_without_position_is_refused() -> None:
    backbone = create(ModelConfig("cait_xxs24_224", {"embed_dim": 32, "depth": 1, "num_heads": 2}), 32)
    with pytest.raises(Refusal, match="position=none"):
        backbone.use_plans({NONE})


@pytest.mark.parametrize("name", MATRIX)
def test_layers_end_with_the_final_features(name: str) -> None:
    backbone = build(name).eval()
    layers = backbone.layers(images(backbone), 2)
    assert len(layers) == 2
    torch.testing.assert_close(layers[-1].tokens, backbone(images(backbone)).tokens)


def test_checkpointed_blocks_give_the_same_gradient() -> None:
    def gradient(checkpointing: bool) -> torch.Tensor:
        torch.manual_seed(0)
        backbone = create(ModelConfig("vit_tiny_patch16_224", SMALL_VIT, checkpointing=checkpointing), 24)
        backbone(images(backbone), TokenPlan("none")).tokens.square().mean().backward()
        return backbone.model.patch_embed.proj.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (ModelConfig("vit_tny_patch16_224"), 224, "did you mean 'vit_tiny_patch16_224'"),
        (ModelConfig("vit_tiny_patch16_224"), 30, "30x30 is not divisible by its patch of 16x16"),
        (ModelConfig("vit_tiny_patch16_224", {"depht": 2}), 32, "depht"),
        (ModelConfig("vit_tiny_patch16_224", attention="fusd"), 32, "did you mean 'fused'"),
        (ModelConfig("vit_tiny_patch16_224", std=[0.5, 0.5]), 32, "as many finite numbers each, and every std above 0"),
        (ModelConfig("vit_tiny_patch16_224", {"in_chans": 1}), 32, "one mean and one std per input channel"),
        (
            ModelConfig("vit_tiny_patch16_224", {"in_chans": 4}, mean=[0.5] * 4, std=[0.5] * 4),
            32,
            "in_chans=4: images have 3",
        ),
        (
            ModelConfig("vit_tiny_patch16_224", mean=[0.5] * 2, std=[0.5] * 2),
            32,
            "model.mean=[0.5, 0.5]: images have 3",
        ),
        (ModelConfig("swin_tiny_patch4_window7_224", {"in_chans": 5}), 224, "transparency is laid over white"),
        (ModelConfig("nest_tiny"), 72, "nest_tiny"),
    ],
)
def test_what_cannot_be_built_is_refused(config: ModelConfig, size: int, words: str) -> None:
    with pytest.raises(Refusal) as refusal:
        create(config, size)
    assert words in str(refusal.value)


def test_one_channel() -> None:
    backbone = create(ModelConfig("vit_tiny_patch16_224", SMALL_VIT, mean=[0.5], std=[0.5]), 24)
    assert backbone.channels == 1
    assert backbone(torch.zeros(2, 1, 24, 24, dtype=torch.uint8)).tokens.shape == (2, 9, 32)


RESIZING = {
    "vit": ("vit_tiny_patch16_224", SMALL_VIT, 8),
    "registers without an entry": ("vit_small_patch14_reg4_dinov2", SMALL_VIT | {"no_embed_class": True}, 8),
    "deit distilled": ("deit_tiny_distilled_patch16_224", SMALL_VIT, 8),
    "eva": ("eva02_tiny_patch14_224", SMALL_VIT, 8),
    "lv-vit": ("lvvit_t", {"embed_dim": 32, "depth": 2, "num_heads": 2}, 16),
}


@pytest.mark.parametrize("name", RESIZING)
@pytest.mark.parametrize("crop", [(3, 3), (2, 5)])
def test_smaller_crops_get_the_embedding_that_bicubic_gives_without_antialiasing(name: str, crop: tuple) -> None:
    """As DINO, DINOv2 and iBOT (7x7 patches seen as 3x3): the same model built for the small grid says the same."""
    architecture, kwargs, patch = RESIZING[name]
    config = ModelConfig(architecture, kwargs | {"dynamic_img_size": True})
    torch.manual_seed(0)
    large = create(config, 7 * patch).eval()
    state = large.model.state_dict()
    nn.init.normal_(state["pos_embed"])
    small = create(config, [side * patch for side in crop]).eval()
    first = state["pos_embed"].shape[1] - 49
    grid = state["pos_embed"][:, first:].permute(0, 2, 1).reshape(1, -1, 7, 7)
    grid = nn.functional.interpolate(grid, crop, mode="bicubic", antialias=False).flatten(2).permute(0, 2, 1)
    state = state | {"pos_embed": torch.cat([state["pos_embed"][:, :first], grid], 1)}
    small.model.load_state_dict(state)
    shown = torch.rand(2, 3, *small.size)
    for one in (large, copy.deepcopy(large)):  # a teacher is a copy
        wanted, got = small(shown), one(shown)
        torch.testing.assert_close(got.tokens, wanted.tokens, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(got.prefix, wanted.prefix, atol=1e-5, rtol=1e-6)


def test_a_convolutional_network_gives_cells_at_any_size_and_keeps_its_position() -> None:
    """It may annotate. Zeros around its maps tell of the border, so it is asked for no place."""
    small = {"channels": [8, 8, 8, 16], "output_stride": 8}
    backbone = create(ModelConfig("resnet10t", small), [32, 48]).eval()
    images = torch.rand(2, 3, 32, 48)
    features = backbone(images)
    assert features.grid == backbone.grid == (4, 6) and features.tokens.shape == (2, 24, 16) == (2, 24, backbone.width)
    assert not features.prefix.shape[1] and not backbone.takes_mixture
    maps = backbone.model.forward_features(images)
    torch.testing.assert_close(features.tokens, maps.flatten(2).transpose(1, 2))
    with pytest.raises(Refusal, match="cannot run with position=none"):
        backbone.use_plans({PlanSpec(position="none")})
    with pytest.raises(Refusal, match=r"model\.kwargs\.img_size is no argument of resnet10t"):
        create(ModelConfig("resnet10t", {"img_size": 32}), 32)
