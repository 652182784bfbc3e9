"""A stem of filters: its tokens by hand, what a pixel reaches, how it is trained, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from backbones import PLAIN, VIT, build, redraw
from torch import Tensor

from common.checkpoints import public
from common.checkpoints.pretrained import begin_from
from common.errors import Refusal
from common.models import Backbone, ModelConfig, create
from common.models.plan import PlanSpec, TokenPlan
from common.training.optim import layer_ids, parameter_groups

NONE = TokenPlan("none")


def stemmed(stem: dict[str, Any] | None = None, size: Any = 24, name: str = PLAIN, **options: Any) -> Backbone:
    torch.manual_seed(0)
    return create(ModelConfig(name, dict(VIT) | options, stem={"filters": 5} if stem is None else stem), size)


def noise(*size: int, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_token_by_hand() -> None:
    """Of one patch of a 16x24 image in NumPy: nine windows, each less its mean, by its spread; filters; thresholds."""
    made = redraw(stemmed(size=[16, 24]))
    stem = made.model.patch_embed
    stem.thresholds.abs_()
    images = noise(16, 24)
    mean, std = np.array(made.config.mean), np.array(made.config.std)
    pixels = (images[1].double().numpy().transpose(1, 2, 0) / 255 - mean) / std
    patch = pixels[8:16, 16:24].transpose(2, 0, 1)  # (3, 8, 8)
    filters, offsets, thresholds = (
        part.double().numpy() for part in (stem.filters.flatten(1), stem.offsets, stem.thresholds)
    )
    total = np.zeros(10)
    for top in range(3):
        for left in range(3):
            window = patch[:, top : top + 6, left : left + 6].ravel()
            window = (window - window.mean()) / np.sqrt(window.var(ddof=1) + 10 / (255 * std.mean()) ** 2)
            answers = filters @ window - offsets
            total += np.maximum(np.concatenate([answers, -answers]) - thresholds, 0)
    assert (total > 0).any() and stem.contrast == pytest.approx(10 / (255 * 0.226) ** 2, rel=1e-3)
    h = torch.from_numpy(total / 9)
    h = torch.nn.functional.layer_norm(h, (10,), stem.norm.weight.double(), stem.norm.bias.double())
    expected = stem.proj.weight.double() @ h + stem.proj.bias.double()
    found = stem(made.normalised(images))
    assert found.shape == (2, 6, 32)
    torch.testing.assert_close(found[1, 5].double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_pixel_reaches_one_token() -> None:
    stem = stemmed().model.patch_embed
    before = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    for row, column in ((0, 0), (7, 8), (8, 15), (23, 16)):  # corners and borders among them
        after = before.clone()
        after[0, 1, row, column] += 1
        changed = (stem(after) != stem(before)).any(-1)[0].nonzero().flatten().tolist()
        assert changed == [row // 8 * 3 + column // 8]


@torch.no_grad()
def test_patches_alike_have_tokens_alike_and_kept_ones_those_of_all() -> None:
    made = stemmed().eval()
    tokens = made.model.patch_embed(made.normalised(noise(8, 8).repeat(1, 1, 3, 3)))
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens), rtol=1e-4, atol=1e-5)
    kept, images = torch.tensor([[0, 4, 8], [1, 2, 7]]), noise(24, 24)
    hidden = torch.ones(2, 9, dtype=torch.bool).scatter(1, kept, False).view(2, 1, 3, 3)
    others = torch.where(hidden.repeat_interleave(8, 2).repeat_interleave(8, 3), 255 - images, images)
    plan = TokenPlan("none", kept=kept)
    found = made(images, plan).tokens
    assert found.shape == (2, 3, 32)
    torch.testing.assert_close(made(others, plan).tokens, found)  # what is not kept does not count
    with pytest.raises(AssertionError):
        torch.testing.assert_close(made(others, NONE).tokens, made(images, NONE).tokens)
    keys = TokenPlan("none", context=torch.tensor([[0, 1], [2, 8]]))
    assert made(images, keys).tokens.shape == (2, 9, 32)


@torch.no_grad()
def test_images_of_one_colour_answer_nothing_and_are_finite() -> None:
    made = stemmed()
    grey = torch.full((1, 3, 24, 24), 0.3)
    answers = made.model.patch_embed.answers(grey.view(-1, 3, 8, 8))
    assert not answers.any() and torch.isfinite(made(grey).tokens).all()


def test_sizes_are_those_that_timms_patch_embedding_takes() -> None:
    assert stemmed().why_not((24, 32)) is not None
    dynamic = stemmed(dynamic_img_size=True)
    assert dynamic(torch.zeros(1, 3, 16, 32)).grid == (2, 4)
    assert dynamic.why_not((20, 24)) is not None


def test_filters_go_with_the_stem_and_do_not_decay() -> None:
    made = stemmed()
    names = [f"model.patch_embed.{name}" for name in ("filters", "offsets", "thresholds", "proj.weight", "norm.weight")]
    layers, groups = layer_ids(made), parameter_groups(made, 0.1, layer_decay=0.5)
    assert {layers[name] for name in names} == {0}
    decays = {id(parameter): (group["decays"], group["lr_scale"]) for group in groups for parameter in group["params"]}
    found = [decays[id(made.get_parameter(name))] for name in names]
    assert found == [(False, 0.125), (False, 0.125), (False, 0.125), (True, 0.125), (False, 0.125)]


def test_published_irpe_still_sees_the_grid() -> None:
    """It looks at the patch embedding's output, which is another module's now."""
    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    made = redraw(stemmed(name=name, dynamic_img_size=True)).eval()
    with torch.no_grad():
        wide = made(torch.randn(1, 3, 16, 40))
    assert wide.grid == (2, 5) and torch.isfinite(wide.tokens).all()


def test_weights_begin_a_run_at_another_size_and_not_another_stem(tmp_path: Any) -> None:
    trained = redraw(stemmed())
    trained.use_plans({PlanSpec(position="none")})
    public.export(tmp_path, trained, public.describe(trained, "none", "mean", {}))
    again, plan, about = public.load_backbone(tmp_path)
    assert about["stem"] == {"filters": 5}
    assert torch.equal(again(noise(24, 24), plan).tokens, trained.eval()(noise(24, 24), NONE).tokens)
    larger = stemmed(size=40)
    begin_from(larger, str(tmp_path))
    assert torch.equal(larger.model.patch_embed.filters, trained.model.patch_embed.filters)
    for other, told in (({"filters": 6}, r"model\.stem={'filters': 6}"), ({"filters": 5, "side": 5}, "'side': 5")):
        with pytest.raises(Refusal, match=told):
            begin_from(stemmed(other), str(tmp_path))
    with pytest.raises(Refusal, match=r"patch_embed.* at 24x24; it is .*model\.stem|it is .*model\.stem"):
        begin_from(build("vit"), str(tmp_path))


@pytest.mark.parametrize(
    ("name", "kwargs", "stem", "told"),
    [
        *((name, {}, {}, f"plain ViT or DeiT of timm.* {kind} with") for name, kind in (
            ("swin_tiny_patch4_window7_224", "SwinTransformer"), ("nest_tiny", "Nest"), ("lvvit_t", "LvVit"),
            ("spvit_s", "SpVit"), ("beit_base_patch16_224", "Beit"),
        )),
        (PLAIN, VIT, {"side": 9}, r"model\.stem\.side=9: .* patch, which has 8x8 pixels here; expected 2 to 8"),
        (PLAIN, VIT, {"side": 1}, r"model\.stem\.side=1: expected a whole number from 2"),
        (PLAIN, VIT, {"filters": 0}, r"model\.stem\.filters=0: expected a whole number from 1"),
        (PLAIN, VIT, {"filters": True}, r"model\.stem\.filters=True: expected a whole number"),
        (PLAIN, VIT, {"filtres": 9}, r"model\.stem\.filtres is no option .* filters, side; did you mean 'filters'"),
        (PLAIN, VIT | {"dynamic_img_pad": True}, {}, r"model\.stem with dynamic_img_pad"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(name: str, kwargs: Any, stem: Any, told: str) -> None:
    with pytest.raises(Refusal, match=told) as refusal, torch.device("meta"):
        create(ModelConfig(name, dict(kwargs), stem=stem), 224)
    assert "\n" not in str(refusal.value)
