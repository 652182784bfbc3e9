"""Bad input to pretraining: one line that says what was wrong, where, what was expected and what to do; status 2;
nothing written."""

import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs.children import TINY, Run

from common.data import Images
from common.data.images import Arrays
from common.errors import Refusal

Main = Callable[..., int]


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.fixture
def refused(inside: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(*words)`: what the run is refused with; checks that nothing was written and nothing else was said."""

    def refuse(*words: object, run: object = "run") -> str:
        before = tree(tmp_path)
        named = [] if "--resume" in words else [f"run={run}"]
        with pytest.raises((Refusal, OSError)) as error:
            inside(*words, *named)
        assert tree(tmp_path) == before, "something was written"
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        message = " ".join(str(error.value).split())  # as `entry` prints it
        assert message and not message.endswith(("None", ":")) and len(message) < 1000
        return message

    return refuse


# ---------------------------------------------------------------------------- the words

NUMBERS = "expected a whole number of at least"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # what is no option, or has the wrong type
        ("stesp=10", ["unknown option 'stesp'", "command line (stesp=10)", "did you mean 'steps'"]),
        ("loader.wrokers=2", ["unknown option 'loader.wrokers'", "did you mean 'loader.workers'"]),
        ("steps=many", ["'steps'", "many", "Integer"]),
        ("loader.workers=two", ["'loader.workers'", "two"]),
        ("loader.decode=scald", ["loader.decode='scald'", "full, scaled", "did you mean 'scaled'"]),
        ("data=builtin loader.decode=scaled", ["loader.decode=scaled goes with files of pictures", "builtin"]),
        ("views.global.size=large", ["size=large", "a positive whole number of pixels, or [height, width]"]),
        ("views.global.flipp=0.5", ["views.global.flipp"]),
        ("objectives.absolut.weight=1", ["unknown objective 'absolut'", "did you mean 'absolute'", "relative"]),
        ("objectives.absolute.heads=half", ["'heads'", "objectives.absolute", "did you mean 'head'"]),
        ("objectives.absolute.weight=heavy", ["'weight'", "objectives.absolute", "heavy"]),
        ("objectives.absolute=3", ["objectives.absolute=3", "expected options such as {weight: 1.0}"]),
        # choices
        ("precision=fp61", ["precision='fp61'", "auto, fp32, bf16, fp16", "did you mean"]),
        ("model.attention=explicitt", ["model.attention='explicitt'", "did you mean 'explicit'"]),
        ("objectives.absolute.head=hlaf", ["head='hlaf' in objectives.absolute", "linear, mlp, half", "mean 'half'"]),
        ("objectives.absolute.position=nnone", ["position='nnone'", "did you mean 'none'"]),
        ("model.name=vit_tinny_patch16_224", ["model.name='vit_tinny_patch16_224'", "did you mean 'vit_tiny_patch"]),
        ("data=fashon-mnist", ["data=fashon-mnist", "no such folder", "did you mean 'fashion-mnist'"]),
        # numbers out of range
        ("steps=0", [f"steps=0: {NUMBERS} 1"]),
        ("steps=-1", [f"steps=-1: {NUMBERS} 1"]),
        ("steps=null", ["how long to train?", "steps=N or epochs=N"]),
        ("steps=null epochs=0", ["epochs=0"]),
        ("steps=null epochs=-1", ["epochs=-1"]),
        ("steps=null epochs=nan", ["epochs=nan"]),
        ("steps=null epochs=inf", ["epochs=inf"]),
        ("batch=0", [f"batch=0: {NUMBERS} 1"]),
        ("accumulate=0", [f"accumulate=0: {NUMBERS} 1"]),
        ("seed=-1", ["seed=-1: expected a whole number from 0 to 4294967295"]),
        ("seed=99999999999999999999", ["seed=99999999999999999999", "to 4294967295"]),
        ("threads=0", ["threads=0"]),
        ("log_every=0", ["log_every=0"]),
        ("checkpoint_every=0", ["checkpoint_every=0"]),
        ("checkpoint_minutes=nan", ["checkpoint_minutes=nan"]),
        ("keep=0", ["keep=0"]),
        ("milestone_every=0", ["milestone_every=0"]),
        ("loader.workers=-1", [f"loader.workers=-1: {NUMBERS} 0"]),
        ("monitor.every=0", ["monitor.every=0"]),
        ("monitor.held_out=1", ["monitor.held_out=1.0: expected a number from 0 to 0.9"]),
        ("monitor.held_out=nan", ["monitor.held_out=nan"]),
        ("optimizer.lr=nan", ["optimizer.lr=nan"]),
        ("optimizer.lr=inf", ["optimizer.lr=inf"]),
        ("optimizer.lr=-0.1", ["optimizer.lr=-0.1"]),
        ("optimizer.clip=-1", ["optimizer.clip=-1.0"]),
        ("optimizer.weight_decay=nan", ["optimizer.weight_decay='nan': expected a number or {schedule: cosine"]),
        ("optimizer.warmup=1.5", ["optimizer.warmup=1.5: expected a share of the training in [0, 1], or"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas=[0.9]", "two numbers of at least 0, below 1"]),
        ("optimizer.betas=[0.9,1.0]", ["optimizer.betas=[0.9, 1.0]"]),
        ("optimizer.betas=[0.9,nan]", ["optimizer.betas=[0.9, nan]"]),
        ("objectives.absolute.weight=-1", ["objectives.absolute.weight=-1.0", "expected a"]),
        ("objectives.absolute.weight=nan", ["objectives.absolute.weight=nan"]),
        ("objectives.absolute.weight=0 objectives.relative.weight=0", ["no objective to train", "absolute, class"]),
        ("objectives.relative.pairs=0", ["objectives.relative.pairs=0", "a number from 1 to 36"]),
        ("objectives.relative.pairs=37", ["objectives.relative.pairs=37", "6 patches"]),
        ("views.global.scale=[0.9,0.1]", ["scale=[0.9, 0.1]", "two numbers above 0, at most 1, the smaller one first"]),
        ("views.global.flip=1.5", ["flip=1.5", "a number from 0 to 1"]),
        ("views.global.size=[0,24]", ["size=[0, 24]"]),
        ("views.global.gap=-1", ["gap=-1", "a whole number from 0 to 256"]),
        ("views.global.gap=2 augment=device", ["augment=device", "gap=2 is done in the", "expected augment=host"]),
        ("views.global.patch=4", ["views.global.patch=4: the backbone's patches have 8x8 pixels", "or patch=null"]),
        ("views.global.interpolation=nearest", ["interpolation='nearest'", "one of bicubic, bilinear"]),
        ("model.mean=[0.5]", ["model.mean=[0.5] and model.std=[0.229, 0.224"]),
        ("model.std=[0.2,0,0.2]", ["every std above 0"]),
        ("model.mean=[.nan,0,0]", ["as many finite numbers"]),
        ("model.kwargs.in_chans=2 model.mean=[0.5,0.5] model.std=[1,1]", ["model.kwargs.in_chans=2: images have 3"]),
        # parts that do not fit each other, the data or this machine
        ("views.local.size=24", ["no objective looks at view 'local'"]),
        ("export=teacher", ["export=teacher: this run has no teacher", "use export=student, or add dino or ibot"]),
        ("export=techer", ["export='techer'", "did you mean 'teacher'"]),
        ("optimizer.schedule=cosin", ["optimizer.schedule='cosin'", "did you mean 'cosine'"]),
        ("optimizer.clip_by=tensor", ["optimizer.clip_by='tensor'", "per_tensor"]),
        (
            'optimizer.weight_decay={"schedule":"liner","start":0.1,"end":0.2}',
            ["optimizer.weight_decay.schedule='liner'", "did you mean 'linear'"],
        ),
        ("teacher.momentum=1.5", ["teacher.momentum=1.5"]),
        ("teacher.half_life=0", ["teacher.half_life=0.0: expected a number above 0"]),
        ("teacher.momentum=0.9 teacher.half_life=1000", ["teacher.momentum", "teacher.half_life"]),
        ("objectives.dino.weight=1", ["objectives.dino compares crops of an image", "views.global.count=1"]),
        (
            "objectives.dino.weight=1 views.global.count=2 views.local.size=8",
            ["objectives.dino looks at view local, 8x8", "set model.kwargs.dynamic_img_size=true"],
        ),
        ("objectives.koleo.weight=1 batch=1", ["objectives.koleo", "two images", "batch=1"]),
        ("objectives.dino.prototypes=many views.global.count=2", ["objectives.dino.prototypes"]),
        ("views.global.preset=dno", ["views.global.preset='dno'", "did you mean"]),
        ("model.init=runs/none", ["model.init=runs/none: no such run folder or file"]),
        ("optimizer.warmup=10epocs", ["optimizer.warmup='10epocs'", "did you mean"]),
        ("objectives.absolute.view=local", ["asks for view 'local'", "`views:` has global"]),
        ("views.global.size=[16,20]", ["16x20 is not divisible by its patch of 8x8", "views.global.size"]),
        ("model.kwargs.patch_size=7", ["patch of 7x7"]),
        ("views.global.size=8", ["1x1 grid", "one patch has no position to tell", "larger images or smaller patches"]),
        ("model.kwargs.patch_sise=8", ["model.kwargs.patch_sise is no argument", "did you mean 'patch_size'"]),
        ("model.kwargs.num_heads=5", ["timm cannot build", "model.kwargs"]),
        ("batch=88", ["batch=88 is larger than the training data, 87 images: set batch=87 or less"]),
        ("batch=15 accumulate=2", ["batch=15", "2 accumulation steps: choose a multiple of 2"]),
        ("precision=fp16", ["precision=fp16 needs a GPU", "use precision=bf16 or fp32, or auto"]),
        # plans and heads
        ("objectives.absolute.position=partail", ["position='partail'", "did you mean 'partial'"]),
        ("objectives.absolute.head=liner", ["head='liner'", "did you mean 'linear'"]),
        ("objectives.relative.head=seperable", ["head='seperable'", "did you mean 'separable'"]),
        ("objectives.absolute.contxt=0.5", ["contxt", "did you mean 'context'"]),
        ("objectives.absolute.keep=0.3", ["objectives.absolute: keep=0.3 of 6 patches leaves 1", "raise keep"]),
        ("objectives.absolute.keep=0", ["keep=0.0", "above 0, at most 1"]),
        ("objectives.absolute.position_keep=0.5", ["position_keep=0.5 goes with position=partial"]),
        ("objectives.relative.position=partial", ["position='partial'", "use none"]),
        ("objectives.absolute.decoder.heads=3 objectives.absolute.decoder.blocks=1", ["width 512", "3 heads"]),
        ("views.global.size=8", ["1x1 grid", "one patch has no position", "larger images or smaller patches"]),
        ("model.position_embedding=sincso", ["did you mean 'sincos'"]),
        ("monitor.control_every=0", ["monitor.control_every=0", NUMBERS]),
        ("allow_leak=perhaps", ["allow_leak"]),
        # words that are no options
        ("tiny", ["expected one recipe", "tiny"]),
        ("--resum", ["--resum", "did you mean '--resume'", "--help"]),
        ("--step=3", ["--step=3", "--steps", "--help"]),
        ("--resume", ["--resume", "expected one argument"]),
    ],
)  # fmt: skip
def test_words(refused, tiny, words, parts):
    message = refused(*tiny, *words.split())
    for part in parts:
        assert part in message, message


@pytest.mark.slow
def test_epochs_and_seeds_that_are_fine(inside, tiny):
    assert inside(*tiny, "run=run", "steps=null", "epochs=0.01", "seed=4294967295", "optimizer.clip=0") == 0
    assert Run(Path("run")).steps == [1]


# ---------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("stesp: 10", ["unknown option 'stesp'", "did you mean 'steps'"]),
        ("steps: [", ["is not a YAML recipe"]),
        ("- steps", ["is not a recipe"]),
        ("steps: 1", ["no objective to train", "absolute, classification, dino, ibot, koleo, relative, sigreg"]),
        (
            "steps: 1\nviews: {other: {size: 24}}\nobjectives: {absolute: {view: other}}",
            ["objectives.absolute.view=other is 24x24", "views.global, 224x224"],
        ),
    ],
)
def test_recipes(refused, images, tmp_path, content, parts):
    recipe = tmp_path / "recipe.yaml"
    model = "model: {name: vit_tiny_patch16_224, kwargs: {embed_dim: 24, depth: 1}}\n"
    recipe.write_text(content if content.startswith("-") else model + content)
    message = refused(recipe, f"data={images}", "batch=8", "precision=fp32", "model.attention=explicit")
    for part in parts:
        assert part in message
    assert str(recipe) in message or "unknown" not in message


def test_a_recipe_that_is_not_there(refused):
    message = refused("quikstart.yaml")
    assert "no recipe at quikstart.yaml" in message and "did you mean 'quickstart'" in message


def test_a_plan_on_a_backbone_that_cannot(refused, images, tmp_path):
    recipe = tmp_path / "swin.yaml"
    recipe.write_text(
        "steps: 1\nprecision: fp32\nmodel: {name: swin_tiny_patch4_window7_224, kwargs: {depths: [1, 1, 1, 1]}}\n"
        "objectives: {absolute: {keep: 0.5}}"
    )
    message = refused(recipe, f"data={images}", "batch=8")
    assert "(SwinTransformer) cannot run with keep=0.5" in message and "use a plain ViT or DeiT" in message


# ---------------------------------------------------------------------------- the data


def test_images_with_nan(refused, tiny, tmp_path):
    (tmp_path / "scans").mkdir()
    for number in range(20):
        values = np.full((24, 24), np.nan if number < 3 else 0.5, np.float32)
        Image.fromarray(values, mode=None).save(tmp_path / "scans" / f"{number:02d}.tif")
    from common.data import open_data
    from common.data.images import Unreadable

    with pytest.raises(Unreadable, match="NaN or infinite: replace them, or remove the image"):
        open_data(str(tmp_path / "scans")).read(0)


def test_a_missing_folder(refused, tiny, tmp_path):
    message = refused(*tiny, f"data={tmp_path / 'nowhere'}")
    assert str(tmp_path / "nowhere") in message and "no such folder" in message


def test_an_empty_folder(refused, tiny, tmp_path):
    (tmp_path / "photos").mkdir()
    message = refused(*tiny, f"data={tmp_path / 'photos'}")
    assert f"no images in {tmp_path / 'photos'}: the folder is empty; expected images" in message


def test_a_folder_without_images(refused, tiny, tmp_path):
    (tmp_path / "photos" / "notes").mkdir(parents=True)
    (tmp_path / "photos" / "notes" / "read.txt").write_text("words")
    message = refused(*tiny, f"data={tmp_path / 'photos'}")
    assert "only other files (1 .txt)" in message and "expected images" in message


def test_a_file_for_a_folder(refused, tiny, images):
    photo = next(images.rglob("*.png"))
    message = refused(*tiny, f"data={photo}")
    assert f"data={photo} is a file; expected a folder" in message and str(photo.parent) in message


# ---------------------------------------------------------------------------- the run folder


def test_a_run_that_exists(refused, tiny):
    Path("run").mkdir()
    message = refused(*tiny)
    assert f"run={Path('run').resolve()} exists" in message and "--resume" in message and "--overwrite" in message


def test_overwrite_of_a_folder_that_is_no_run(refused, tiny):
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("the only copy")
    assert "is no run" in refused(*tiny, "--overwrite")


@pytest.mark.parametrize("place", ["/proc/run", "file/run"])
def test_a_place_that_cannot_be_written(refused, tiny, place):
    Path("file").write_text("")
    message = refused(*tiny, run=place)
    assert f"run={Path(place).resolve()} cannot be written: " in message and "run=PATH" in message


def test_a_run_that_is_not_there(refused):
    message = refused("--resume", "nowhere")
    assert "--resume nowhere: no run there (expected a folder with config.yaml)" in message


def test_resume_goes_with_no_recipe(refused):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("")
    assert "leave out tiny.yaml" in refused("--resume", "run", "tiny.yaml")
    assert "leave out --overwrite" in refused("--resume", "run", "--overwrite")


def test_a_run_whose_folder_is_read_only(refused, tiny, inside, tmp_path):
    Path("run").mkdir()
    (Path("run") / "config.yaml").write_text(f"data: builtin\nsteps: 1\nbatch: 8\n{MODEL}")
    Path("run/lock").mkdir()  # as root no permission binds: this is what cannot be opened for writing even so
    message = refused("--resume", "run")
    assert f"the run folder {Path('run').resolve()} cannot be written: " in message and "make it writable" in message


MODEL = "precision: fp32\nmodel: {name: vit_tiny_patch16_224, attention: explicit}\nobjectives: {absolute: {}}\n"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("steps: 3\ninvented: 1\n", ["unknown option 'invented'", "config.yaml"]),
        ("steps: many\n", ["'steps'", "config.yaml"]),
        ("steps: [", ["config.yaml", "is not a YAML recipe"]),
    ],
)
def test_a_run_whose_config_was_edited(refused, content, parts):
    Path("run").mkdir()
    Path("run/config.yaml").write_text(content)
    message = refused("--resume", "run")
    for part in parts:
        assert part in message


def test_weights_of_another_model(inside, refused, tiny):
    assert inside(*tiny, "run=run", "steps=2") == 0
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace("embed_dim: 32", "embed_dim: 16"))
    with pytest.raises(Refusal, match=r"of another run, with model\.kwargs\.embed_dim=32, here 16"):
        inside("--resume", "run")


# ---------------------------------------------------------------------------- the machine


def test_without_tensorboard(refused, tiny, inside, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = refused(*tiny)
    assert "TensorBoard cannot be imported" in message and "set tensorboard=false" in message
    assert inside(*tiny, "run=run", "steps=1", "tensorboard=false") == 0
    assert not Path("run/tb").exists()


def test_a_port_that_is_taken(refused, tiny, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        job = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        for name, value in (job | {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}).items():
            monkeypatch.setenv(name, str(value))
        message = refused(*tiny)
    assert f"127.0.0.1:{port}" in message and "is the port taken?" in message and "--main_process_port" in message


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_no_workers_and_more_than_cores(inside, tiny):
    losses = []
    for workers in (0, 5):
        assert inside(*tiny, f"run=run{workers}", f"loader.workers={workers}", "steps=3") == 0
        losses.append(Run(Path(f"run{workers}")).losses)
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_64_workers(train, images, tmp_path):
    ended = train(TINY, f"data={images}", f"run={tmp_path / 'run'}", "loader.workers=64", "steps=6")
    assert ended.status == 0 and ended.stderr == "", ended.stderr
    assert Run(tmp_path / "run").steps == list(range(1, 7))


# ---------------------------------------------------------------------------- labels stay outside


@pytest.mark.slow
def test_losses_do_not_depend_on_labels(inside, monkeypatch):
    """The same images with right labels, random ones and none: the same losses; only monitors of labels notice."""
    rng = np.random.default_rng(0)
    right = np.arange(64) % 2
    pixels = (rng.integers(0, 60, (64, 24, 24, 3)) + 180 * right[:, None, None, None]).astype(np.uint8)
    losses, neighbours = [], []
    for number, labels in enumerate((right, rng.integers(0, 2, 64), None)):
        images = Images(Arrays(pixels, "noise"), "noise", labels, None if labels is None else ("dark", "bright"))
        monkeypatch.setattr("pretrain.assemble.open_data", lambda *request, images=images: images)
        words = (f"run=run{number}", "steps=8", "monitor.every=4", "monitor.held_out=0.3", "loader.workers=0")
        assert inside(TINY, *words) == 0
        run = Run(Path(f"run{number}"))
        losses.append(run.losses)
        assert [record["step"] for record in run.metrics if "rankme/student" in record] == [4, 8]
        assert all(("knn/student" in record) == ("ridge/student" in record) for record in run.metrics)
        neighbours.append([record["knn/student"] for record in run.metrics if "knn/student" in record])
    assert losses[0] == losses[1] == losses[2]
    assert neighbours[0] == [1.0, 1.0] and neighbours[1] != neighbours[0] and neighbours[2] == []


# ---------------------------------------------------------------------------- as a process of its own


def test_one_line_and_exit_status_2_and_the_rest_with_debug(train, images, tmp_path):
    words = (TINY, f"data={images}", f"run={tmp_path / 'run'}", "batch=1000")
    plain, debug = train.start(*words), train.start(*words, "--debug")
    ended = plain.wait()
    assert ended.status == 2 and ended.stdout == ""
    assert re.fullmatch(r"error: batch=1000 is larger than the training data, 87 images: .*\n", ended.stderr)
    ended = debug.wait()
    assert ended.status == 2
    assert "Traceback (most recent call last)" in ended.stderr and "common.errors.Refusal" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: batch=1000")
    assert not (tmp_path / "run").exists()
