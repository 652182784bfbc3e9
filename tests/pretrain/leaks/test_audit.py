"""The audit finds every known way in which a backbone tells a patch its place, and calls nothing else a leak."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small import options_for
from torch import Tensor, nn

from common.batches.views import View
from common.errors import Refusal
from common.models import ModelConfig, create
from pretrain import audit as auditing
from pretrain.config import PretrainConfig
from pretrain.leaks import noise as noise_probe
from pretrain.leaks import verdict as verdicts
from pretrain.leaks.noise import Noise
from pretrain.leaks.symmetry import symmetry
from pretrain.leaks.verdict import Finding, Leak, Verdict, audit, cached_audit
from pretrain.task import Pretraining, build

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
FULL = {"absolute": {"position": "full"}}
NONE: dict[str, Any] = {"absolute": {}}
DROPPOS: dict[str, Any] = {"keep": 0.5, "position": "partial", "position_keep": 0.25}


def task(
    objectives: dict[str, Any], name: str = "vit_tiny_patch16_224", kwargs: Any = VIT, size: Any = 32, **options: Any
) -> Pretraining:
    torch.manual_seed(0)
    backbone = create(ModelConfig(name, dict(kwargs), **options), size)
    return build(backbone, options_for(objectives, backbone), {"global": View(size=list(backbone.size))})


def judged(made: Pretraining) -> Finding:
    (found,) = audit(made.backbone, made.positional).objectives.values()
    return found


# ------------------------------------------------------------------------------------------------------ what leaks

TWINS = {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
HYBRID = {"embed_dim": 32, "depth": 1, "num_heads": 2}
LEAKS = {
    "vit": (FULL, "vit_tiny_patch16_224", VIT, 32, "position embedding (pos_embed)"),
    "vit 2x5": (FULL, "vit_tiny_patch16_224", {**VIT, "dynamic_img_size": True}, [16, 40], "position embedding (pos_"),
    "deit distilled": (FULL, "deit_tiny_distilled_patch16_224", VIT, 32, "position embedding (pos_embed)"),
    "registers": (FULL, "vit_small_patch14_reg4_dinov2", VIT, 32, "position embedding (pos_embed)"),
    "two patches": (FULL, "vit_tiny_patch16_224", VIT, [8, 16], "position embedding (pos_embed)"),
    "the paper's head": (
        {"absolute": {"position": "full", "head": "half"}},
        "vit_tiny_patch16_224",
        VIT,
        32,
        "position embedding (pos_embed)",
    ),
    "pairs": ({"relative": {"position": "full"}}, "vit_tiny_patch16_224", VIT, 24, "position embedding (pos_embed)"),
    "pairs of many places": (  # hundreds of offsets are learned too slowly from so few channels; places are not
        {"relative": {"position": "full"}},
        "vit_tiny_patch16_224",
        {"patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3},
        56,
        "position embedding (pos_embed)",
    ),
    "pairs, regression": (
        {"relative": {"position": "full", "head": "regression"}},
        "vit_tiny_patch16_224",
        VIT,
        24,
        "position embedding (pos_embed)",
    ),
    "pairs, unsigned": (
        {"relative": {"position": "full", "head": "distance"}},
        "vit_tiny_patch16_224",
        VIT,
        24,
        "position embedding (pos_embed)",
    ),
    "those who know are asked": (
        {"absolute": {**DROPPOS, "loss_on": "all"}},
        "vit_tiny_patch16_224",
        VIT,
        32,
        "position embedding (pos_embed)",
    ),
    "rope": (FULL, "vit_small_patch16_rope_224", VIT, 32, "rotary position embedding (rope.pos_embed)"),
    "rope, learned": (FULL, "vit_small_patch16_rope_mixed_224", VIT, 32, "rotary position embedding (rope.freqs"),
    "eva": (
        FULL,
        "eva02_tiny_patch14_224",
        VIT,
        32,
        "rotary position embedding (rope.pos_embed) and position embedding",
    ),
    "beit": (FULL, "beit_base_patch16_224", VIT, 32, "relative position bias (blocks.0.attn.relative_position_bias_ta"),
    "twins' PEG": (FULL, "twins_pcpvt_small", TWINS, 128, "convolution 3x3 with zero padding (pos_block.0.proj.0"),
    "resnet stem": (NONE, "vit_tiny_r_s16_p8_224", HYBRID, 64, "convolution 7x7 with zero padding (patch_embed."),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_found_and_named(name: str) -> None:
    objectives, *model, breaks = LEAKS[name]
    found = judged(task(objectives, *model))
    assert found.verdict == "leak"
    assert breaks in " and ".join(found.breaks)
    assert found.noise[-1].accuracy > 2 * found.noise[-1].chance - 1e-9


class Peg(nn.Module):
    """A conditional position encoding: patches plus a zero-padded depthwise convolution of their map."""

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.conv = grid, nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.conv(tokens.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)


def test_a_conditional_position_encoding_leaks() -> None:
    made = task(NONE)
    made.backbone.model.patch_embed.norm = Peg(32, made.backbone.grid)
    found = judged(made)
    assert (found.verdict, found.breaks) == ("leak", ["convolution 3x3 with zero padding (patch_embed.norm.conv)"])


class Numbered(nn.Module):
    """A decoder that knows which token of the sequence is which; kept patches come in rising order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(1, 64, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.number[:, : tokens.shape[1]]


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_place_in_the_sequence_is_a_place(keep: float) -> None:
    made = task({"absolute": {"keep": keep, "decoder": {"blocks": 1, "width": 32, "heads": 2}}})
    made.objectives["absolute"].decoder = Numbered(32)  # type: ignore[union-attr]
    found = judged(made)
    assert found.verdict == "leak" and found.breaks == ["the objective's own layers"]


def test_features_that_are_not_finite_are_not_judged() -> None:
    made = task(NONE)
    with torch.no_grad():
        made.backbone.model.norm.bias[0] = math.nan
    with pytest.raises(Refusal, match="not finite"):
        audit(made.backbone, made.positional, trained=True)


class Silent(nn.Module):
    """An encoding that starts as if it were not there, as iRPE's tables do."""

    def __init__(self, num_patches: int, width: int) -> None:
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, num_patches, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.lookup_table_weight


def test_an_encoding_that_starts_at_zero_does_not_hide() -> None:
    made = task(NONE)
    made.backbone.model.patch_embed.norm = Silent(16, 32)
    found = judged(made)
    assert found.verdict == "leak"
    assert found.breaks == ["relative position encoding (patch_embed.norm.lookup_table_weight)"]


# ------------------------------------------------------------------------------------- what is crooked, and what not


@pytest.mark.slow
def test_swins_windows_and_biases_are_named_although_frozen_features_do_not_tell() -> None:
    name = "swin_tiny_patch4_window7_224"
    without, full = judged(task(NONE, name, SWIN)), judged(task(FULL, name, SWIN))
    windows = "windows of 4x4 before patch merging"
    assert without.verdict == full.verdict == "asymmetric"
    assert without.breaks == [f"{windows} (layers.0.blocks.0)", f"shifted {windows} (layers.0.blocks.1.attn)"]
    tables = "relative position bias (layers.0.blocks.0.attn.relative_position_bias_table and 3 more)"
    assert full.breaks == [tables, *without.breaks]


@pytest.mark.slow
def test_patch_merging_alone_breaks_nothing_and_overlapping_merging_does() -> None:
    one_window = task(NONE, "swin_tiny_patch4_window7_224", {**SWIN, "window_size": 8})
    assert judged(one_window).verdict == "clean"
    nest = task(NONE, "nest_tiny", {}, 64)
    broken = symmetry(nest.backbone, nest.positional["absolute"]).breaks
    assert "patch merging by convolution 3x3 with zero padding (levels.1.pool.conv and 1 more)" in broken


CLEAN = {
    "none": (NONE, "vit_tiny_patch16_224", VIT, 32),
    "mp3 on 2x5": ({"absolute": {"context": 0.25}}, "vit_tiny_patch16_224", VIT, [16, 40]),
    "jigsaw": ({"absolute": {"keep": 0.5, "head": "mlp"}}, "vit_tiny_patch16_224", VIT, 32),
    "pairs of the kept": ({"relative": {"keep": 0.5}}, "vit_tiny_patch16_224", VIT, 32),
    "droppos": (
        {"absolute": {**DROPPOS, "decoder": {"blocks": 1, "width": 32, "heads": 2}, "attentive": "image"}},
        "vit_tiny_patch16_224",
        VIT,
        [32, 48],
    ),
    "droppos of all, some keys": (
        {"absolute": {"position": "partial", "position_keep": 0.25, "context": 0.5}},
        "deit_tiny_distilled_patch16_224",
        VIT,
        32,
    ),
    "registers": ({"absolute": DROPPOS}, "vit_small_patch14_reg4_dinov2", VIT, 32),
    "dynamic size": (NONE, "vit_tiny_patch16_224", {**VIT, "dynamic_img_size": True}, [16, 40]),
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_recipe_is_called_clean(name: str) -> None:
    found = judged(task(*CLEAN[name]))
    assert (found.verdict, found.breaks, found.noise) == ("clean", [], [])
    assert found.deviation < 1e-12


@pytest.mark.parametrize("options", [{}, {"irpe": {"on": "qkv"}}])
def test_a_stem_of_filters_is_clean(options: dict[str, Any]) -> None:
    """Nothing that it does crosses a patch's border."""
    for kwargs, size in ((VIT, 32), ({**VIT, "dynamic_img_size": True}, [16, 40])):
        found = judged(task(NONE, kwargs=kwargs, size=size, stem={"filters": 20}, **options))
        assert (found.verdict, found.breaks) == ("clean", []) and found.deviation < 1e-12
    jigsaw = {"absolute": {"keep": 0.5, "head": "mlp"}}
    assert judged(task(jigsaw, stem={"filters": 20, "side": 8}, **options)).verdict == "clean"


@pytest.mark.slow
def test_a_position_embedding_after_a_stem_is_found() -> None:
    found = judged(task(FULL, stem={"filters": 20}))
    assert found.verdict == "leak" and "position embedding (pos_embed)" in found.breaks


def test_trained_weights_of_a_clean_recipe_tell_nothing_of_noise() -> None:
    made = task(NONE)
    (found,) = audit(made.backbone, made.positional, trained=True).objectives.values()
    assert found.verdict == "clean"
    assert [noise.contrast for noise in found.noise] == [contrast for contrast, _ in noise_probe.SHOWN]
    assert all(noise.low < noise.chance and noise.high < 2 * noise.chance for noise in found.noise)


# ------------------------------------------------------------------------------------------------------ by the hand


def test_the_interval_counts_images_not_tokens() -> None:
    """Two of four right in every image: certain. All or nothing: as uncertain as four throws of a coin."""
    asked = torch.full((4,), 4)
    assert noise_probe._interval(torch.tensor([2, 2, 2, 2]), asked) == (0.5, 0.5, 0.5)
    accuracy, low, high = noise_probe._interval(torch.tensor([4, 0, 4, 0]), asked)
    assert (accuracy, low, high) == (0.5, 0.0, 1.0)
    error = math.sqrt(4 * 1 * 4 / 3) / 16  # residues of one
    assert noise_probe._interval(torch.tensor([1, 3, 1, 3]), asked)[1] == pytest.approx(0.5 - 3.29 * error)


@pytest.mark.parametrize(
    ("high", "chance", "leaks"),
    [(0.39, 0.2, False), (0.41, 0.2, True), (0.74, 0.5, False), (0.76, 0.5, True), (math.nan, 0.5, True)],
)
def test_the_limit_is_twice_chance_or_half_way_to_certain(high: float, chance: float, leaks: bool) -> None:
    assert Noise("places", "redrawn", 1.0, 0.0, 0.0, high, chance, 8).leaks == leaks


def test_nothing_that_is_given_changes() -> None:
    made = task(FULL)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made.train()
    state = torch.get_rng_state()
    audit(made.backbone, made.positional)
    assert torch.equal(torch.get_rng_state(), state) and made.backbone.training
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert not any(module._forward_hooks for module in made.modules())


# -------------------------------------------------------------------------------------------------------- the cache


def config(objectives: dict[str, Any], **others: Any) -> PretrainConfig:
    model = ModelConfig("vit_tiny_patch16_224", dict(VIT))
    return PretrainConfig(model=model, views={"global": View(size=32)}, objectives=objectives, **others)


def test_the_cache_answers_for_the_same_recipe_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_audit(config(FULL), task(FULL), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "audit", lambda *_, **__: pytest.fail("this was known"))
        heavier = {"absolute": {"position": "full", "weight": 0.5}, "relative": {"weight": 0.0}}
        assert cached_audit(config(heavier, seed=3), task(heavier), folder=tmp_path) == first
        with pytest.raises(pytest.fail.Exception):
            cached_audit(config(NONE), task(NONE), folder=tmp_path)
    for damage in ("", "{}", "[]", '{"verdict": "fine", "objectives": {}}', path.read_text()[:-9]):
        path.write_text(damage)
        assert cached_audit(config(FULL), task(FULL), folder=tmp_path) == first
        assert json.loads(path.read_text()) == dataclasses.asdict(first)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert cached_audit(config(NONE), task(NONE), folder=tmp_path / "file" / "audit").verdict == "clean"


def test_a_leak_is_refused_in_one_line_that_says_what_to_change() -> None:
    noise = Noise("places", "redrawn", 1e-8, 1.0, 1.0, 1.0, 0.0625, 96)
    found = Finding("leak", "told by it", 0.1, ["it"], [noise], "set objectives.absolute.position=none")
    with pytest.raises(Leak) as leak:
        Verdict("leak", {"absolute": found}).refuse()
    assert leak.value.status == 1 and "\n" not in str(leak.value)
    for words in ("leak", "objectives.absolute", "told by it", "100.0%", "6.2%", "position=none", "allow_leak=true"):
        assert words in str(leak.value)
    Verdict("asymmetric", {"absolute": dataclasses.replace(found, verdict="asymmetric")}).refuse()


# -------------------------------------------------------------------------------------------------------- the script


@pytest.mark.parametrize(("words", "status"), [([], 0), (["objectives.absolute.position=full", "allow_leak=true"], 1)])
def test_the_script_says_what_it_found(
    words: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert auditing.main(["quickstart", *words, "--json", str(tmp_path / "audit.json")]) == status
    verdict = ("clean", "leak")[status]
    assert f"verdict: {verdict}" in capsys.readouterr().out
    assert verdicts.read(json.loads((tmp_path / "audit.json").read_text())).verdict == verdict


def test_an_objective_that_weighs_nothing_is_not_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert auditing.main(["quickstart", "objectives.relative={weight: 0.0, position: full}"]) == 0
    assert "relative" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--inptu"], ["one", "two"], ["no-such-recipe"], ["objectives.absolute.head=linaer"]]
)
def test_what_is_not_understood_is_refused(words: list[str]) -> None:
    with pytest.raises(Refusal):
        auditing.main(words)
