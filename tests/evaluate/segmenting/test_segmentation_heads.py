"""Decoders of segmentation: what they compute, on which tokens, and that a frozen backbone stays as it is."""

import sys
from typing import Any

import pytest
import torch
from backbones import ROWS, build, pixels, redraw
from torch import Tensor, nn

from common.errors import Refusal
from common.features.extraction import depth
from common.models import Backbone, ModelConfig, create
from common.models.plan import TokenPlan
from evaluate.segmenting import heads

DEEP = {"depth": 4}
# Rows of the matrix, of four blocks: name in ROWS and what differs.
FOUR = {
    "vit": DEEP,
    "vit, no class token": DEEP,
    "vit, registers": DEEP,
    "deit, distilled": DEEP,
    "irpe, qkv": DEEP,
    "beit": DEEP,
    "eva": DEEP,
    "lv-vit": DEEP,
    "sp-vit": DEEP | {"local_blocks": 2},
}
DYNAMIC = {"vit, dynamic": DEEP, "lv-vit, dynamic": DEEP, "sp-vit, dynamic": DEEP | {"local_blocks": 3}}


def four(name: str, size: tuple[int, int] | None = None, **kwargs: Any) -> Backbone:
    """The row's backbone with four blocks, of which nothing is zero or one."""
    row = ROWS[name]
    kwargs = row.kwargs | {"drop_path_rate": 0.0} | (FOUR | DYNAMIC)[name] | kwargs
    irpe = dict(row.irpe) if row.irpe is not None else None
    torch.manual_seed(0)
    return redraw(create(ModelConfig(row.name, kwargs, irpe=irpe), size or row.size))


def upernet(backbone: Backbone, classes: int = 5, frozen: bool = False, **options: Any) -> heads.Segmenter:
    torch.manual_seed(1)
    return heads.make("upernet", backbone, classes, frozen=frozen, channels=8, **options)


def linear(backbone: Backbone, classes: int = 5, frozen: bool = True, **options: Any) -> heads.Segmenter:
    torch.manual_seed(1)
    return heads.make("linear", backbone, classes, frozen=frozen, **options)


@pytest.fixture
def small_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 channels for a map of 3x3 would be all that these tests compute."""
    monkeypatch.setattr(heads, "TOP", 16)


def unsettle(segmenter: nn.Module) -> None:
    """Batch norms that have seen something."""
    torch.manual_seed(5)
    for module in segmenter.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)


# ------------------------------------------------------------------------------------------ tokens before the norm


@pytest.mark.parametrize("name", [*FOUR, *DYNAMIC])
def test_tokens_of_chosen_blocks(name: str) -> None:
    backbone = four(name).eval()
    images, seen = pixels(backbone), {}
    for i, block in enumerate(backbone.model.blocks):
        block.register_forward_hook(lambda _module, _inputs, output, i=i: seen.__setitem__(i, output))
    with torch.no_grad():
        backbone.layers(images, 4)
        whole = dict(seen)
        found = backbone.layers(images, [0, 2], norm=False)
        normed = backbone.layers(images, (0, 2))
        four_of = backbone.layers(images, 4)
    N = found[0].grid[0] * found[0].grid[1]
    if "irpe" not in name:  # whose blocks are taken apart, past the hooks
        for features, i in zip(found, (0, 2), strict=True):
            torch.testing.assert_close(features.tokens, whole[i][:, -N:])
    for features, after, i in zip(found, normed, (0, 2), strict=True):
        torch.testing.assert_close(backbone.model.norm(features.tokens), after.tokens)
        torch.testing.assert_close(after.tokens, four_of[i].tokens)
        assert features.prefix.shape == after.prefix.shape == four_of[i].prefix.shape
    assert not torch.allclose(found[0].tokens, normed[0].tokens, atol=1e-2)


@pytest.mark.parametrize("name", ["vit", "eva", "lv-vit", "sp-vit"])
def test_blocks_above_the_deepest_do_not_run(name: str) -> None:
    backbone = four(name).eval()

    def refuse(*_: Any) -> None:
        raise AssertionError("block 3 ran")

    backbone.model.blocks[3].register_forward_pre_hook(refuse)
    assert len(backbone.layers(pixels(backbone), [1, 2], norm=False)) == 2
    with pytest.raises(AssertionError, match="block 3 ran"):
        backbone.layers(pixels(backbone), [1, 3])


@pytest.mark.parametrize("blocks", [[0, 4], [-1, 2], [2, 1], [1, 1], []])
def test_layers_refuse_blocks_that_are_not_there(blocks: list[int]) -> None:
    for name in ("vit", "sp-vit"):
        backbone = four(name)
        with pytest.raises(ValueError, match="has 4 blocks"):
            backbone.layers(pixels(backbone), blocks)


# ------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", FOUR)
def test_shapes(name: str, small_top: None) -> None:
    for which in ("size", "oblong", "odd"):
        row = ROWS[name]
        size, (h, w) = (row.size, row.grid) if which == "size" else getattr(row, which)
        backbone = four(name, size)
        segmenter = upernet(backbone).train()
        found = segmenter(pixels(backbone))
        assert {key: value.shape for key, value in found.items()} == {
            "logits": (2, 5, 4 * h, 4 * w), "auxiliary": (2, 5, h, w)
        }  # fmt: skip
        assert list(segmenter.eval()(pixels(backbone, 1))) == ["logits"]
        assert linear(backbone)(pixels(backbone))["logits"].shape == (2, 5, h, w)


@pytest.mark.parametrize("name", DYNAMIC)
def test_another_size_than_the_backbone_was_built_for(name: str, small_top: None) -> None:
    backbone = four(name)
    (height, width), (h, w) = ROWS[name].oblong or ((0, 0), (0, 0))
    images = torch.randn(2, 3, height, width)
    assert upernet(backbone)(images)["logits"].shape == (2, 5, 4 * h, 4 * w)
    assert linear(backbone)(images)["logits"].shape == (2, 5, h, w)


@pytest.mark.parametrize("name", ["swin", "nest"])
def test_stages(name: str) -> None:
    backbone = build(name)
    h, w = backbone.grid
    assert linear(backbone)(pixels(backbone))["logits"].shape == (2, 5, h, w)
    with pytest.raises(Refusal, match="has a grid for each stage: use --head linear"):
        upernet(backbone)


def test_bytes_are_normalised_as_the_backbone_does(small_top: None) -> None:
    backbone = four("vit")
    shown = torch.randint(0, 256, (2, 3, *backbone.size), dtype=torch.uint8)
    floats = (shown / 255 - backbone.mean) / backbone.std
    for segmenter in (linear(backbone).eval(), upernet(backbone).eval()):
        torch.testing.assert_close(segmenter(shown)["logits"], segmenter(floats)["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "lv-vit", "sp-vit"])
def test_half_precision(name: str, small_top: None) -> None:
    backbone = four(name)
    for segmenter in (linear(backbone), upernet(backbone)):
        segmenter.train()
        with torch.autocast("cpu", torch.bfloat16):
            found = segmenter(pixels(backbone))
        assert all(logits.dtype == torch.float32 and logits.isfinite().all() for logits in found.values())
        sum(logits.square().mean() for logits in found.values()).backward()  # type: ignore[union-attr]
        segmenter.eval()
        exact = segmenter(pixels(backbone))["logits"]
        with torch.autocast("cpu", torch.bfloat16):
            near = segmenter(pixels(backbone))["logits"]
        assert (near - exact).norm() < 0.05 * exact.norm()


def test_one_image(small_top: None) -> None:
    backbone = four("vit")
    images = pixels(backbone)
    for segmenter in (linear(backbone).eval(), upernet(backbone).eval()):
        unsettle(segmenter)
        both, alone = segmenter(images)["logits"], segmenter(images[:1])["logits"]
        torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)
    assert linear(backbone).train()(images[:1])["logits"].shape == (1, 5, 3, 3)
    segmenter = upernet(backbone).train()
    with pytest.raises(Refusal, match="1 image per step"):  # torch: Expected more than 1 value per channel
        segmenter(images[:1])
    # one image is enough where batch norms see those of other processes; here there are none, and torch says so
    segmenter.decoder = nn.SyncBatchNorm.convert_sync_batchnorm(segmenter.decoder)
    with pytest.raises(ValueError, match=r"Expected more than 1 value|expected input"):
        segmenter(images[:1])


# ------------------------------------------------------------------------------------------------- what is computed


def bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resized with align_corners=False: the weights of every old row and column in every new one."""

    def weights(old: int, new: int) -> Tensor:
        at = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(0, old - 1)
        return (1 - (at[:, None] - torch.arange(old)).abs()).clamp(min=0)

    return torch.einsum("bchw,yh,xw->bcyx", maps, weights(maps.shape[2], size[0]), weights(maps.shape[3], size[1]))


def pool(maps: Tensor, cells: int) -> Tensor:
    """Means of `cells` by `cells` parts, whose borders are rounded outwards."""
    h, w = maps.shape[2:]
    rows = [
        torch.stack(
            [
                maps[:, :, y * h // cells : -(-(y + 1) * h // cells), x * w // cells : -(-(x + 1) * w // cells)]
                .mean((2, 3))
                for x in range(cells)
            ],
            -1,
        )
        for y in range(cells)
    ]  # fmt: skip
    return torch.stack(rows, -2)


def convolve(maps: Tensor, weight: Tensor) -> Tensor:
    """Zero-padded, by the definition."""
    B, _, h, w = maps.shape
    side = weight.shape[2]
    padded = maps.new_zeros(B, maps.shape[1], h + side - 1, w + side - 1)
    padded[:, :, side // 2 : side // 2 + h, side // 2 : side // 2 + w] = maps
    return sum(
        torch.einsum("bchw,oc->bohw", padded[:, :, y : y + h, x : x + w], weight[:, :, y, x])
        for y in range(side)
        for x in range(side)
    )  # type: ignore[return-value]


def enlarge(maps: Tensor, weight: Tensor) -> Tensor:
    """A transposed convolution whose stride is its size: every pixel becomes a square."""
    B, _, h, w = maps.shape
    side = weight.shape[2]
    return torch.einsum("bchw,coyx->bohywx", maps, weight).reshape(B, -1, h * side, w * side)


def normalise(maps: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Batch norm with the statistics that training left."""
    mean, var, gain, shift = (
        state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (maps - mean) / (var + 1e-5).sqrt() * gain + shift


def by_hand(state: dict[str, Tensor], maps: list[Tensor]) -> dict[str, Tensor]:
    """UperNet from its parameters, step by step."""

    def unit(x: Tensor, name: str, first: int = 0) -> Tensor:
        return normalise(convolve(x, state[f"{name}.{first}.weight"]), state, f"{name}.{first + 1}").clamp(min=0)

    def wider(x: Tensor, name: str) -> Tensor:
        x = normalise(enlarge(x, state[f"{name}.0.weight"]), state, f"{name}.1").clamp(min=0)
        return unit(x, name, 3)

    def classes(x: Tensor, name: str) -> Tensor:
        return convolve(x, state[f"{name}.weight"]) + state[f"{name}.bias"][:, None, None]

    levels = [wider(maps[0], "side.0"), wider(maps[1], "side.1"), unit(maps[2], "side.2"), unit(maps[3], "side.3")]
    grid, widest = levels[3].shape[2:], levels[0].shape[2:]
    pooled = [
        bilinear(unit(pool(levels[3], cells), f"fpn.psp.blocks.{i}.1"), grid) for i, cells in enumerate((1, 2, 3, 6))
    ]
    sums = [unit(torch.cat([levels[3], *pooled], 1), "fpn.psp.out_conv")]
    for i, level in enumerate(levels[2::-1]):  # of the sums, not of what the 3x3 convolutions make of them
        sums.append(bilinear(sums[-1], level.shape[2:]) + unit(level, f"fpn.fpn_lateral_blocks.{i}.conv_norm_relu"))
    outputs = [sums[0], *(unit(part, f"fpn.fpn_conv_blocks.{i}") for i, part in enumerate(sums[1:]))]
    fused = unit(torch.cat([bilinear(part, widest) for part in outputs[::-1]], 1), "fpn.fusion_block")
    auxiliary = classes(unit(levels[2], "auxiliary"), "auxiliary.4")
    return {"logits": classes(fused, "classifier"), "auxiliary": auxiliary}


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (7, 8)])
def test_upernet_by_hand(grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "TOP", 10)
    torch.manual_seed(0)
    decoder = heads.UperNet(6, 5, channels=4).double().eval()
    redraw(decoder, 0.4)
    unsettle(decoder)
    maps = [torch.randn(2, 6, *grid, dtype=torch.float64) for _ in range(4)]
    with torch.no_grad():
        expected = by_hand(dict(decoder.state_dict()), maps)
        torch.testing.assert_close(decoder(maps)["logits"], expected["logits"].float())
        # the auxiliary head is only asked in training, where batch norm takes the statistics of the batch
        auxiliary = decoder.auxiliary(decoder.side[2](maps[2]))
    torch.testing.assert_close(auxiliary, expected["auxiliary"])
    assert expected["logits"].std() > 0.01 and auxiliary.std() > 0.01


def test_linear_by_hand() -> None:
    backbone = four("vit").eval()
    segmenter = linear(backbone, dropout=0.0)
    decoder, images = segmenter.decoder, pixels(backbone, 3)
    assert isinstance(decoder, heads.Linear)
    with torch.no_grad():
        tokens = backbone(images).tokens  # final norm, (3, 9, 32)
        flat = tokens.reshape(-1, 32)
        mean, var = flat.mean(0), flat.var(0, unbiased=False)
        nn.init.normal_(decoder.norm.weight, 1.0, 0.5)
        nn.init.normal_(decoder.norm.bias, 0.0, 0.5)

        def expected(mean: Tensor, var: Tensor) -> Tensor:
            normed = (flat - mean) / (var + 1e-5).sqrt() * decoder.norm.weight + decoder.norm.bias
            logits = normed @ decoder.classifier.weight[:, :, 0, 0].T + decoder.classifier.bias
            return logits.reshape(3, 3, 3, 5).permute(0, 3, 1, 2)

        close = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(segmenter.train()(images)["logits"], expected(mean, var), **close)
        # then with running statistics: nine tenths of what they begin with, a tenth of the batch's
        kept = 0.1 * mean, 0.9 + 0.1 * flat.var(0)
        torch.testing.assert_close(segmenter.eval()(images)["logits"], expected(*kept), **close)


def test_dropout_takes_whole_channels() -> None:
    segmenter = linear(four("vit"), dropout=0.5).train()
    seen: list[Tensor] = []
    segmenter.decoder.norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    segmenter(torch.randn(2, 3, 24, 24))
    zero = (seen[0] == 0).flatten(2)
    assert torch.equal(zero.all(2), zero.any(2)) and 0.2 < zero.float().mean() < 0.8
    segmenter.eval()(torch.randn(2, 3, 24, 24))
    assert not (seen[1] == 0).any()


def test_upernet_sees_the_blocks_it_is_told(small_top: None) -> None:
    """The tokens of the third of them feed the auxiliary head; none has passed the final norm."""
    backbone = four("sp-vit", depth=6).eval()
    segmenter = upernet(backbone, blocks=[0, 1, 3, 4]).train()
    seen: list[tuple[Tensor, ...]] = []
    for side in segmenter.decoder.side:
        side.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    segmenter.eval()(pixels(backbone))
    for given, features in zip(seen, backbone.layers(pixels(backbone), [0, 1, 3, 4], norm=False), strict=True):
        torch.testing.assert_close(given.flatten(2).mT, features.tokens)  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------- parameters, blocks

PUBLISHED = {  # blocks, channels, image size, parameters, what smp's four LayerNorms would add: 2 (3 D + 2048)
    "lvvit_s": ([6, 9, 12, 15], 256, 512, 44_452_076, 6_400),
    "lvvit_m": ([10, 13, 16, 19], 256, 512, 77_274_988, 7_168),
    "lvvit_l": ([14, 17, 20, 23], 512, 448, 208_554_156, 8_704),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_published(name: str) -> None:
    """Counted is all that the published configurations build, for 150 classes: the backbone without class heads and
    final norm, with the position embedding of its size (L: 28x28, resized in every pass), side layers, decoder, and the
    auxiliary head."""
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    blocks, channels, size, published, norms = PUBLISHED[name]
    with torch.device("meta"):
        segmenter = heads.make("upernet", create(ModelConfig(name), size), 150, frozen=False, channels=channels)
        width = segmenter.backbone.width
        stock = UPerNetDecoder([0, 0, width, width, width, 2048], 5, channels)
    assert segmenter.blocks == blocks
    unseen = sum(p.numel() for p in segmenter.backbone.model.norm.parameters())
    assert unseen == 2 * width
    assert sum(p.numel() for p in segmenter.parameters()) - unseen == published
    assert sum(p.numel() for p in segmenter.parameters() if p.requires_grad) == published
    decoder: Any = segmenter.decoder
    ours, theirs = (sum(p.numel() for p in part.parameters()) for part in (decoder.fpn, stock))
    assert theirs - ours == norms == 2 * (3 * width + 2048)


def test_spvit_s_has_lvvit_s_blocks() -> None:
    """No configuration is published. What it has more: 14 priors (4 D + 6 heads) and 16 convolutions (10 D)."""
    segmenter = heads.make("upernet", create(ModelConfig("spvit_s"), 64), 150, frozen=False)
    assert segmenter.blocks == [6, 9, 12, 15]
    of_positions = (32 * 32 + 1 - 4 * 4) * 384  # the published count is of 512 pixels, and of a class token's position
    assert sum(p.numel() for p in segmenter.parameters() if p.requires_grad) == (
        44_452_076 - of_positions + 14 * (4 * 384 + 6) + 16 * 10 * 384
    )


@pytest.mark.parametrize(("count", "expected"), [(4, [0, 1, 2, 3]), (6, [0, 2, 3, 5]), (12, [2, 5, 8, 11])])
def test_usual_blocks(count: int, expected: list[int]) -> None:
    for name in ("vit", "lv-vit"):
        backbone = four(name, depth=count)
        assert depth(backbone) == count and heads.usual_blocks(backbone) == expected


@pytest.mark.parametrize("blocks", [[0, 1, 2], [0, 1, 2, 4], [-1, 1, 2, 3], [0, 2, 1, 3], [0, 1, 1, 3], []])
def test_blocks_that_cannot_be(blocks: list[int]) -> None:
    with pytest.raises(Refusal, match=r"expected four blocks of vit_tiny\w*, increasing, from 0 to 3, such as \[0, 1"):
        upernet(four("vit"), blocks=blocks)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refusal, match="four blocks, and vit_tiny_patch16_224 has 3"):
        upernet(four("vit", depth=3))
    for option in ({"blocks": [0, 1, 2, 3]}, {"channels": 4}):
        with pytest.raises(Refusal, match=f"--{next(iter(option))} .* goes with --head upernet"):
            heads.make("linear", four("vit"), 5, frozen=True, **option)  # type: ignore[arg-type]
    for module in [name for name in sys.modules if name.startswith("segmentation_models_pytorch")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(Refusal, match=r"pip install '\.\[segmentation\]'") as refusal:
        upernet(four("vit"))
    assert "\n" not in str(refusal.value)
    assert linear(four("vit")).blocks == 1  # which needs none of it


# --------------------------------------------------------------------------------------------- frozen, and trained


@pytest.mark.parametrize("name", ["vit", "lv-vit", "sp-vit"])
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_frozen_stays_as_it_is(name: str, head: str, small_top: None) -> None:
    backbone = four(name, drop_path_rate=0.5, proj_drop_rate=0.3)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    segmenter = heads.make(head, backbone, 5, frozen=True, dropout=0.0)
    segmenter.train()
    assert segmenter.decoder.training and not any(module.training for module in backbone.modules())
    images = pixels(backbone)
    maps: list[list[Tensor]] = []
    segmenter.decoder.register_forward_pre_hook(lambda _module, inputs: maps.append(inputs[0]))
    for _ in range(2):
        sum(logits.square().mean() for logits in segmenter(images).values()).backward()  # type: ignore[union-attr]
    assert all(torch.equal(first, second) for first, second in zip(*maps, strict=True))  # nothing random in it
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.parameters())
    assert all(parameter.grad is not None for parameter in segmenter.decoder.parameters())
    torch.optim.SGD([p for p in segmenter.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", FOUR)
def test_every_trained_parameter_has_a_gradient(name: str, small_top: None) -> None:
    """DistributedDataParallel stops at one without."""
    for blocks in (None, [0, 1, 2, 3], [0, 1, 2, 4]):
        backbone = four(name, depth=6)
        segmenter = upernet(backbone, blocks=blocks).train()
        sum(logits.square().mean() for logits in segmenter(pixels(backbone)).values()).backward()  # type: ignore[union-attr]
        trained = {name: p for name, p in segmenter.named_parameters() if p.requires_grad}
        assert not [name for name, p in trained.items() if p.grad is None]
        deepest = (blocks or [5])[-1]
        frozen = {key for key, p in segmenter.backbone.model.named_parameters() if not p.requires_grad}
        assert {int(key.split(".")[1]) for key in frozen if key.startswith("blocks.")} == {*range(deepest + 1, 6)}
        assert {"norm.weight", "norm.bias"} <= frozen
    backbone = four(name)
    segmenter = linear(backbone, frozen=False).train()
    segmenter(pixels(backbone))["logits"].square().mean().backward()
    assert all(p.grad is not None for p in segmenter.parameters() if p.requires_grad)
    assert backbone.model.norm.weight.requires_grad


def test_trained_backbone_trains() -> None:
    """Drop path is on, and the statistics of LV-ViT's stem move."""
    backbone = four("lv-vit", drop_path_rate=0.5)
    before = backbone.model.patch_embed.bn1.running_mean.clone()
    segmenter = linear(backbone, frozen=False, dropout=0.0).train()
    first, second = (segmenter(pixels(backbone, 8))["logits"] for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(backbone.model.patch_embed.bn1.running_mean, before)


def test_frozen_runs_under_the_subjects_plan() -> None:
    backbone = four("vit")
    images, plan = pixels(backbone), TokenPlan("none")
    segmenter = linear(backbone, plan=plan).eval()
    maps = backbone.eval()(images, plan).tokens.mT.unflatten(2, (3, 3))
    torch.testing.assert_close(segmenter(images)["logits"], segmenter.decoder([maps])["logits"])
    assert not torch.allclose(segmenter(images)["logits"], linear(backbone).eval()(images)["logits"], atol=1e-3)


def test_position_embedding_of_another_grid_is_resized_alike_before_and_in_every_pass(small_top: None) -> None:
    """LV-ViT-L's published segmenter keeps 28x28 and resizes it to the crop's 32x32 in every pass; resizing it once,
    before, begins with the same outputs. (Training then moves 32x32 entries, and not 28x28.)"""
    from common.checkpoints.pretrained import resized

    kept = four("lv-vit, dynamic").eval()
    state, size = kept.model.state_dict(), (80, 64)
    once = four("lv-vit, dynamic", size).eval()
    assert resized(state, once.model.state_dict(), (3, 3), (5, 4))
    once.model.load_state_dict(state)
    images = torch.randn(2, 3, *size)
    for make in (linear, upernet):
        torch.testing.assert_close(
            make(kept).eval()(images)["logits"], make(once).eval()(images)["logits"], atol=1e-4, rtol=1e-4
        )
