"""The main job: images in, a checkpoint out, a number from it. Most in this process; the launchers as a user
types them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.checkpoints.public import load_backbone, weights_file

ROOT = Path(__file__).resolve().parents[2]
Main = Callable[..., int]


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_readme_says(inside: Main, tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert inside(*tiny, f"run={run}", "steps=12", "monitor.every=6", "milestone_every=4", "keep=1") == 0
    assert {"config.yaml", "metrics.jsonl", "tb", "pictures", "state", "backbone.safetensors", "backbone.json"} <= {
        path.name for path in run.iterdir()
    }
    # milestones at 4 and 8, and the last; each with its own backbone
    assert sorted(path.name for path in (run / "state").iterdir()) == [f"step_{n:08d}" for n in (4, 8, 12)]
    for place in (run, run / "state" / "step_00000004", run / "backbone.safetensors"):
        backbone, plan, about = load_backbone(place)
        assert backbone.grid == (2, 3) and plan.position == "none" and plan.whole and about["training"]["steps"] == 12

    lines = records(run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {
        "loss",
        "absolute/accuracy",
        "absolute/chance",
        "relative/gain",
        "lr",
        "gradient_norm",
        "images_per_second",
    } <= lines[0].keys()
    monitored = {"val/absolute/accuracy", "val/relative/loss", "knn/student", "ridge/student", "rankme/student"}
    assert monitored <= lines[5].keys()
    assert "val/absolute/accuracy" not in lines[4]

    events = EventAccumulator(str(run / "tb")).Reload()
    scalars = {event.step: event.value for event in events.Scalars("train/loss")}
    assert scalars == pytest.approx({line["step"]: line["loss"] for line in lines})
    assert {
        "train/lr",
        "train/gradient_norm",
        "train/images_per_second",
        "val/absolute/accuracy",
        "knn/student",
    } <= set(events.Tags()["scalars"])
    pictures = {f"{name}_{what}" for name in ("absolute", "relative") for what in ("places", "distances")}
    assert set(events.Tags()["images"]) == {"board", *pictures}
    board = Image.open(run / "pictures" / "board-00000012.png")
    assert board.size[0] > board.size[1] > 100


def test_the_exported_backbone_is_the_trained_one(inside: Main, tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    inside(*tiny, f"run={run}", "steps=3")
    state = torch.load(run / "state" / "step_00000003" / "state.pt", weights_only=True)
    backbone, _, _ = load_backbone(run)
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, state["task"][f"backbone.model.{name}"]), name


def test_runs_number_themselves(inside: Main, tiny: list[str]) -> None:
    for _ in range(2):
        inside(*tiny, "steps=1", "tensorboard=false")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny-001", "tiny-002"]
    assert not Path("runs/tiny-001/tb").exists()


@pytest.mark.slow
def test_automatic_values_are_settled_and_stored(
    inside: Main, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    inside(
        *tiny, f"run={run}", "steps=2", "precision=auto", "model.attention=auto", "threads=null", "loader.workers=null"
    )
    stored = (run / "config.yaml").read_text()
    for unsettled in ("precision: auto", "attention: auto", "threads: null", "workers: null"):
        assert unsettled not in stored
    told = capsys.readouterr().out
    for name in ("precision", "model.attention", "threads", "loader.workers"):
        assert f"auto       {name} = " in told and f"# {name}: " in stored
    inside("--resume", run, "steps=3")
    assert "measured" not in capsys.readouterr().out


def test_a_dry_run_tells_the_cost_and_writes_nothing(
    inside: Main, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert inside(*tiny, "--dry-run", "run=here") == 0
    told = capsys.readouterr().out
    for words in ("objectives:", "parameters", "FLOPs", "memory", "images/s", "verdict  ", "whole run"):
        assert words in told
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["model.name=vit_small_patch14_reg4_dinov2"], marks=pytest.mark.slow),
        pytest.param(["model.name=deit_tiny_distilled_patch16_224"], marks=pytest.mark.slow),
        [
            "views.global.size=24",
            "objectives.absolute.position=full",
            "objectives.absolute.head=half",
            "allow_leak=true",
        ],
        ["accumulate=4", "model.checkpointing=true"],
        ["precision=bf16"],
        ["objectives.absolute.weight=0", "objectives.relative.pairs=all", "model.mean=[0.5]", "model.std=[0.5]"],
    ],
    ids=lambda words: " ".join(words),
)
def test_variants_train(inside: Main, tiny: list[str], tmp_path: Path, words: list[str]) -> None:
    run = tmp_path / "run"
    assert inside(*tiny, f"run={run}", "steps=6", *words) == 0
    losses = [line["loss"] for line in records(run)]
    assert len(losses) == 6 and all(loss == loss for loss in losses)
    load_backbone(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "nest"])
def test_hierarchical_backbones_train(inside: Main, images: Path, tmp_path: Path, name: str) -> None:
    run, recipe = tmp_path / "run", tmp_path / f"{name}.yaml"
    small = "{embed_dim: 16, depths: [2, 1], num_heads: [1, 2], window_size: 4}"
    recipe.write_text(
        f"steps: 3\nbatch: 8\nprecision: fp32\nthreads: 1\nlog_every: 1\n"
        f"model: {{name: {'swin_tiny_patch4_window7_224' if name == 'swin' else 'nest_tiny'}, attention: explicit, "
        f"kwargs: {small if name == 'swin' else '{}'}}}\n"
        f"views: {{global: {{size: {[32, 48] if name == 'swin' else 64}}}}}\n"
        "objectives: {absolute: {}, relative: {}}\n"
    )
    # windows of 4 that do not tile 4x6 patches, and a convolution that merges: the audit finds both
    assert inside(recipe, f"data={images}", f"run={run}", "allow_leak=true") == 0
    backbone, _, about = load_backbone(run)
    assert about["training"]["audit"] == "leak"
    assert about["grid"] == list(backbone.grid) == ([4, 6] if name == "swin" else [4, 4])


def test_training_learns_position(inside: Main, tiny: list[str], tmp_path: Path) -> None:
    """The lamps and skies of the test images tell a patch's place: a few hundred steps must find that out."""
    run = tmp_path / "run"
    still = ["model.kwargs.drop_path_rate=0", "model.kwargs.proj_drop_rate=0", "views.global.jitter=0"]
    inside(*tiny, *still, f"run={run}", "steps=200", "monitor.every=200", "optimizer.lr=0.02")
    last = records(run)[-1]
    assert last["val/absolute/accuracy"] > 2 * last["absolute/chance"]
    assert last["val/relative/gain"] > 0.1


@pytest.mark.slow
def test_as_the_user_types_it(tiny: list[str], tmp_path: Path) -> None:
    """`accelerate launch` of both stages from another directory."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]

    def typed(*words: str) -> str:
        done = subprocess.run(
            [*launch, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    told = typed(str(ROOT / "pretrain" / "run.py"), *tiny, "steps=5")
    assert "step 5/5  loss" in told and "(chance 16.7%)" in told and "data_wait" in told and "ETA" in told
    run = tmp_path / "runs" / "tiny-001"
    assert weights_file(run).exists()
    told = typed(str(ROOT / "evaluate" / "knn.py"), "--ckpt", "runs/tiny-001", "--k", "5")
    assert "random init" in told and "raw pixels" in told
    report = json.loads((run / "evaluate" / "knn.json").read_text())
    assert report["values"].keys() == {"subject", "random", "pixels"}


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_vit_small_on_photographs_in_two_processes(tmp_path: Path) -> None:
    """No toy: ViT-S/16 at 224, 100 steps, two processes, JPEGs of mixed shapes cut from two real photographs."""
    from sklearn.datasets import load_sample_images

    rng = torch.Generator().manual_seed(0)
    photographs = [Image.fromarray(picture) for picture in load_sample_images().images]
    for i in range(120):
        w, h = (int(side) for side in torch.randint(150, 420, (2,), generator=rng))
        left, top = (int(torch.randint(0, room, (1,), generator=rng)) for room in (640 - w, 428 - h))
        (tmp_path / "data").mkdir(exist_ok=True)
        photographs[i % 2].crop((left, top, left + w, top + h)).save(tmp_path / "data" / f"{i}.jpg", quality=85)
    run = tmp_path / "run"
    words = [f"data={tmp_path / 'data'}", f"run={run}", "steps=100", "batch=8", "log_every=5", "precision=fp32"]
    words += ["model.attention=fused", "monitor.every=100", "loader.workers=1", "threads=1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29731"]
    done = subprocess.run(
        [*launch, str(ROOT / "pretrain" / "run.py"), "vit_small", *words],
        cwd=tmp_path,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x CPU" in done.stdout
    lines = records(run)
    assert lines[-1]["step"] == 100
    assert lines[-1]["relative/loss"] < lines[0]["relative/loss"]
    assert load_backbone(run)[0].grid == (14, 14)
