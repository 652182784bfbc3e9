"""model.init: a backbone begins from weights that are there already, all of them or none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from common.checkpoints import public, storage
from common.checkpoints.pretrained import begin_from
from common.errors import Refusal
from common.features import whitened
from common.models import Backbone, ModelConfig, create
from evaluate.job.arguments import parser
from evaluate.job.evaluation import begin
from evaluate.job.subjects import at_size, subject_of

SMALL = "test_vit"  # timm's own: 64 wide, 6 deep, 160 pixels, 10x10 patches and a class token
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}  # how timm's test_vit has its images
SAID = f"weights of timm:{SMALL}; its classifier is left out; the objectives' heads are fresh"


def backbone(size: Any = 24, name: str = "vit_tiny_patch16_224", seed: int = 1, **options: Any) -> Backbone:
    torch.manual_seed(seed)
    return create(ModelConfig(name, **({"kwargs": dict(TINY)} | options)), size)


def small(size: int = 160, **options: Any) -> Backbone:
    return backbone(size, SMALL, **({"kwargs": {}} | HALF | options))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as they are published: with a classifier."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(timm.create_model(SMALL).state_dict(), path)
    return path


def run_of(folder: Path, made: Backbone, position: str = "full", name: str = storage.WEIGHTS) -> Path:
    public.export(folder, made, public.describe(made, position, "mean", {}), name)
    return folder


def test_published_weights_from_a_local_file(file: Path) -> None:
    published, made = timm.create_model(SMALL, num_classes=0), small()
    state = timm.models.load_state_dict(str(file))
    published.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("head.")})
    before = torch.random.get_rng_state()
    assert begin_from(made, f"timm:{SMALL}", str(file)) == SAID
    assert torch.equal(torch.random.get_rng_state(), before)  # and are those of a run from scratch
    images = torch.randn(2, 3, 160, 160)
    assert torch.allclose(made.eval()(images).prefix[:, 0], published.eval()(images), atol=1e-5)


@pytest.mark.parametrize(("size", "grid"), [(112, (7, 7)), ([64, 96], (4, 6)), ([80, 320], (5, 20))])
def test_a_position_embedding_is_resized_and_its_prefix_kept(file: Path, size: Any, grid: tuple[int, int]) -> None:
    made, state = small(size), timm.models.load_state_dict(str(file))
    said = begin_from(made, f"timm:{SMALL}", str(file))
    assert f"; position embedding resized from 10x10 to {grid[0]}x{grid[1]}; " in said
    found = made.model.pos_embed
    assert torch.equal(found[:, :1], state["pos_embed"][:, :1])
    assert torch.equal(found, resample_abs_pos_embed(state["pos_embed"], list(grid), [10, 10], 1, antialias=False))
    assert torch.equal(made.model.blocks[5].mlp.fc2.weight, state["blocks.5.mlp.fc2.weight"])


def test_one_channel_and_another_normalisation_are_said(file: Path) -> None:
    made = small(mean=[0.3], std=[0.5])
    assert "normalised otherwise (model.mean=[0.5] model.std=[0.5])" in begin_from(made, f"timm:{SMALL}", str(file))
    kernel = timm.models.load_state_dict(str(file))["patch_embed.proj.weight"]
    assert torch.allclose(made.model.patch_embed.proj.weight, kernel.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("what", ["run", "file", "student"])
def test_a_run_or_a_file_of_it(tmp_path: Path, what: str) -> None:
    trained, made = backbone(seed=0), backbone(16)
    name = storage.STUDENT if what == "student" else storage.WEIGHTS
    run_of(tmp_path, trained, name=name)
    init = str(tmp_path if what == "run" else tmp_path / name)
    assert "resized from 3x3 to 2x2" in begin_from(made, init)
    assert torch.equal(made.model.blocks[1].attn.qkv.weight, trained.model.blocks[1].attn.qkv.weight)


def test_what_was_trained_without_position_embedding_gets_a_fresh_one(tmp_path: Path) -> None:
    trained, made = backbone(seed=0), backbone(32)
    run_of(tmp_path, trained, "none")
    fresh = made.model.pos_embed.clone()
    assert "trained without position embedding, which is fresh" in begin_from(made, str(tmp_path))
    assert torch.equal(made.model.pos_embed, fresh)
    assert torch.equal(made.model.cls_token, trained.model.cls_token)


def test_a_fixed_position_embedding_stays(tmp_path: Path) -> None:
    run_of(tmp_path, backbone(seed=0))
    made = backbone(position_embedding="sincos")
    fixed = made.model.pos_embed.clone()
    assert "position embedding stays sine-cosine" in begin_from(made, str(tmp_path))
    assert torch.equal(made.model.pos_embed, fixed) and not made.model.pos_embed.requires_grad


def test_windows_of_swin(tmp_path: Path) -> None:
    kwargs = {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
    swin = "swin_tiny_patch4_window7_224"
    trained, made = (backbone(32, swin, seed, kwargs=dict(kwargs)) for seed in (0, 1))
    run_of(tmp_path, trained)
    begin_from(made, str(tmp_path))
    assert all(
        torch.equal(tensor, trained.model.state_dict()[name]) for name, tensor in made.model.state_dict().items()
    )


def test_from_scratch() -> None:
    assert begin_from(backbone(), None) == ""


def test_each_mistake_is_one_line_that_names_model_init(file: Path, tmp_path: Path) -> None:
    def refused(init: str | None, weights: Any = None, made: Backbone | None = None) -> str:
        with pytest.raises(Refusal) as refusal:
            begin_from(made or backbone(), init, None if weights is None else str(weights))
        message = str(refusal.value)
        assert "\n" not in message and "--ckpt" not in message and "--weights" not in message
        assert "model.init" in message or "model.weights" in message
        return message

    run = run_of(tmp_path, backbone(seed=0))
    assert "no such run folder or file; expected timm:NAME" in refused(str(tmp_path / "nowhere"))
    assert "no such run folder or file" in refused("random")
    assert "model.weights=" in refused(f"timm:{SMALL}", tmp_path / "nowhere.safetensors")
    assert "goes with model.init=timm:NAME" in refused(str(run), file)
    assert "goes with model.init=timm:NAME" in refused(None, file)
    assert "did you mean 'test_vit'" in refused("timm:test_vitt", file)
    (tmp_path / "empty").mkdir()
    assert "no checkpoint in" in refused(str(tmp_path / "empty"))
    other = refused(f"timm:{SMALL}", file)
    assert "holds the weights of another model" in other and "model.name=vit_tiny_patch16_224" in other
    assert f"it is {SMALL}" in other and "at 24x24" in other
    deeper = refused(str(run), made=backbone(kwargs=TINY | {"depth": 3}))
    assert "missing (such as blocks.2" in deeper and "model.kwargs=" in deeper
    heads = refused(str(run), made=backbone(kwargs=TINY | {"num_heads": 4}))
    assert "has 2 attention heads a block" in heads and "has 4: set model.kwargs.num_heads" in heads
    part = {name: tensor for name, tensor in timm.models.load_state_dict(str(file)).items() if "blocks.5" not in name}
    save_file(part, tmp_path / "part.safetensors")  # without a classifier timm would load it, and say nothing
    assert "missing (such as blocks.5" in refused(f"timm:{SMALL}", tmp_path / "part.safetensors", small())
    (tmp_path / "text.safetensors").write_text("nothing")
    assert "is no weights file" in refused(f"timm:{SMALL}", tmp_path / "text.safetensors", small())


def test_a_file_of_part_of_a_model_is_no_subject(file: Path, tmp_path: Path) -> None:
    part = {name: tensor for name, tensor in timm.models.load_state_dict(str(file)).items() if "norm" not in name}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(Refusal, match=r"--ckpt timm:test_vit: .* missing \(such as "):
        subject_of(f"timm:{SMALL}", weights=str(tmp_path / "part.safetensors"))


@pytest.mark.parametrize("copied", [[], [storage.WEIGHTS], [storage.DESCRIPTION]])
def test_a_run_that_was_killed_before_its_first_backbone_was_copied(tmp_path: Path, copied: list[str]) -> None:
    whole = tmp_path / "state" / "step_00000003"
    whole.mkdir(parents=True)
    run_of(whole, backbone())
    for name in copied:
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    found = subject_of(str(tmp_path))
    assert found.state is not None and torch.equal(found.state["cls_token"], backbone().model.cls_token)
    assert (found.name, found.folder) == (tmp_path.name, tmp_path / "evaluate")


def test_the_student_beside_the_teacher_has_reports_of_its_own(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    for made, name in ((backbone(seed=0), storage.WEIGHTS), (backbone(seed=1), storage.STUDENT)):
        run_of(run, made, name=name)
    teacher, student = subject_of(str(run)), subject_of(str(run / storage.STUDENT))
    assert (teacher.name, teacher.folder) == ("mine", run / "evaluate")
    assert (student.name, student.folder) == ("mine student", run / "evaluate" / "student")
    assert teacher.weights_sha256 != student.weights_sha256
    assert torch.equal(student.backbone().model.norm.weight, made.model.norm.weight)


@pytest.mark.parametrize(
    ("objectives", "position", "pooling"),
    [
        ("{absolute: {}, relative: {}}", "none", "mean"),
        ("{absolute: {position: full}}", "full", "mean"),
        ("{dino: {}}", "full", "class"),
        ("{absolute: {}, dino: {weight: 0.5}}", "full", "class"),
        ("{absolute: {}, dino: {weight: 0}}", "none", "mean"),
        ("{ibot: {}}", "full", "mean"),
    ],
)
def test_random_of_a_recipe_is_evaluated_as_it_would_be_trained(
    tmp_path: Path, objectives: str, position: str, pooling: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2, "
        "dynamic_img_size: true}, init: RUN}\n"
        "views: {global: {preset: dino, size: 24}, local: {preset: dino, size: 16, count: 4}}\n"
        f"objectives: {objectives}\n"
    )
    about = subject_of("random", like=str(recipe)).description
    assert (about["position"], about["pooling"], about["size"]) == (position, pooling, [24, 24])


PAPERS = {
    "irpe": ModelConfig("vit_tiny_patch16_224", {**TINY, "patch_size": 16}, irpe={"on": "qkv"}),
    "published irpe": ModelConfig("deit_tiny_patch16_224_ctx_product_50_shared_k", {**TINY, "patch_size": 16}),
    "lv_vit": ModelConfig("lvvit_t", {"embed_dim": 24, "depth": 2, "num_heads": 2}),
    "sp_vit": ModelConfig("spvit_s", {"embed_dim": 24, "depth": 3, "num_heads": 2, "local_blocks": 2}),
}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("size", [32, [48, 80]])
def test_the_papers_backbones_go_on_at_another_size(
    capsys: pytest.CaptureFixture, tmp_path: Path, name: str, size: Any
) -> None:
    """The position embedding is resized and everything else is as it was, tables and priors of offsets too."""
    torch.manual_seed(0)
    trained = create(PAPERS[name], 48)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    public.export(tmp_path, trained, public.describe(trained, "full", "mean", {}))
    config = replace(PAPERS[name], init=str(tmp_path))
    made = create(config, size)
    said = begin_from(made, config.init)
    assert f"; position embedding resized from 3x3 to {made.grid[0]}x{made.grid[1]}; " in said
    before, after = trained.model.state_dict(), made.model.state_dict()
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["pos_embed"]
    again = create(PAPERS[name], 48)  # and at the same size it is the same model
    assert begin_from(again, config.init) == f"weights of {tmp_path}; the objectives' heads are fresh"
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    assert torch.equal(again.eval()(images).tokens, trained.eval()(images).tokens)


def test_another_relative_encoding_is_refused_by_name(tmp_path: Path) -> None:
    trained = create(PAPERS["irpe"], 48)
    public.export(tmp_path, trained, public.describe(trained, "full", "mean", {}))
    other = create(replace(PAPERS["irpe"], irpe={"on": "qkv", "ratio": 2.5}), 48)
    with pytest.raises(
        Refusal, match=r"lookup_table_weight: \(1, 16, 50\), expected \(1, 16, 122\)\).*model\.irpe={'on'"
    ):
        begin_from(other, str(tmp_path))


def test_an_untrained_stem_begins_as_patches_of_the_evaluations_training_images(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is trained begins, or a trained one would be compared with less; what was trained stays."""
    monkeypatch.setattr(whitened, "DRAWN", 1000)
    whitened._filters.cache_clear()
    made = backbone(stem={"filters": 10})
    run_of(tmp_path, made, "none")
    (tmp_path / "train").symlink_to(images)
    (tmp_path / "test").symlink_to(images)
    options = parser("").parse_args(["--ckpt", str(tmp_path), "--data", str(tmp_path)])
    job = begin("knn", options, quiet=True)
    untrained = job.subject.untrained()
    for seed in (0, 1):
        filters, offsets = whitened.filters_for(made, job.train, seed)
        for other in (untrained.backbone(seed), untrained.for_finetuning(seed)[0]):
            assert torch.equal(other.model.patch_embed.filters, filters)
            assert torch.equal(other.model.patch_embed.offsets, offsets)
    assert not torch.equal(untrained.backbone(0).model.patch_embed.filters, filters)
    assert torch.equal(job.subject.backbone(0).model.patch_embed.filters, made.model.patch_embed.filters)
    larger, _ = at_size(untrained, 32, None)
    assert larger.backbone(0).grid == (4, 4) and larger.images is job.train
