"""Checkpoints: whole or not there at all, whatever happens while one is written, and no other model's."""

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoints import private, public, storage
from common.checkpoints.stored_state import read_checkpoint
from common.errors import Refusal
from common.models import ModelConfig, create

BOTH = (storage.WEIGHTS, storage.STUDENT)
TINY = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def backbone(step: int = 0, **kwargs):
    """A tiny ViT whose class token is `step`, so that one sees which one it is."""
    torch.manual_seed(0)
    model = create(ModelConfig("vit_tiny_patch16_224", TINY | kwargs, attention="explicit"), 16)
    model.model.cls_token.data.fill_(step)
    return model


@pytest.fixture(scope="module")
def model():
    return backbone()


def save(run: Path, step: int, model, keep: int = 2, milestone: bool = False, names=(storage.WEIGHTS,)) -> None:
    model.model.cls_token.data.fill_(step)
    description = public.describe(model, "none", "mean", {"step": step})
    state = {"step": step, "task": {"weight": torch.full((1000,), float(step))}, "random": [{"cuda": None}]}

    def export(to: Path) -> None:
        for name in names:
            public.export(to, model, description, name)

    private.save_state(run, step, state, export, keep, milestone)


def load(run: Path) -> tuple[int, list[str]]:
    """(step of the checkpoint that a resume would use, 0 for none; warnings)."""
    warnings: list[str] = []
    folder = private.newest_whole(run, warnings.append)
    if folder is None:
        return 0, warnings
    state = read_checkpoint(folder)
    assert torch.equal(state["task"]["weight"], torch.full((1000,), float(state["step"])))
    return state["step"], warnings


def exported(run: Path) -> int:
    """Step of the backbone that evaluation would use: what its description says and what its weights are."""
    model, plan, description = public.load_backbone(run)
    assert plan.position == "none" and not model.training
    assert model.model.cls_token.flatten()[0] == description["training"]["step"]
    return description["training"]["step"]


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "state").iterdir())


@pytest.fixture
def run(tmp_path, model):
    """A run folder with the checkpoints of steps 10 and 20."""
    for step in (10, 20):
        save(tmp_path, step, model)
    return tmp_path


# ---------------------------------------------------------------------------- what is kept


def test_what_a_checkpoint_holds(run):
    folder = run / "state" / "step_00000020"
    assert sorted(path.name for path in folder.iterdir()) == [
        "backbone.json",
        "backbone.safetensors",
        "manifest.json",
        "state.pt",
    ]
    assert load(run) == (20, [])
    assert exported(run) == exported(folder) == exported(folder / "backbone.safetensors") == 20
    assert exported(run / "state" / "step_00000010") == 10


def test_the_last_ones_and_the_milestones_stay(tmp_path, model):
    for step in range(1, 8):
        save(tmp_path, step, model, keep=2, milestone=step % 3 == 0)
    assert steps(tmp_path) == ["step_00000003", "step_00000006", "step_00000007"]
    save(tmp_path, 8, model, keep=1)
    assert steps(tmp_path) == ["step_00000003", "step_00000006", "step_00000008"]
    assert load(tmp_path) == (8, [])


def test_before_the_first_checkpoint_there_is_none(tmp_path):
    assert load(tmp_path) == (0, [])
    with pytest.raises(Refusal, match="has reached its first checkpoint"):
        public.load_backbone(tmp_path)


def test_nothing_is_unpickled(run):
    """weights_only: a state.pt that would run code does not."""
    folder = run / "state" / "step_00000020"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(run / "was-here"),)

    torch.save({"step": 20, "evil": Evil()}, folder / "state.pt")
    rewrite_manifest(folder)
    with pytest.raises(Exception, match="weights_only"):
        load(run)
    assert not (run / "was-here").exists()


def rewrite_manifest(folder: Path, **changes) -> None:
    files = {
        path.name: {"sha256": storage.sha256(path), "bytes": path.stat().st_size}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": files} | changes))


# ---------------------------------------------------------------------------- killed inside a save


def in_a_child(do: Callable[[], object]) -> int:
    """Run `do` in a fork of this process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            do()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(count: int, below: Path) -> None:
    """From now on, the `count`-th thing this process does to a file below a folder is not done: it is killed."""
    left = [count]

    def hook(event: str, arguments: tuple) -> None:
        # open, os.mkdir, os.rename (and replace), os.remove, os.rmdir, shutil.rmtree, shutil.copyfile, ...
        if event.startswith(("open", "os.", "shutil.")) and any(str(below) in str(word) for word in arguments):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)  # cannot be taken back: only in a child


@pytest.mark.parametrize(("names", "every"), [(BOTH[:1], 1), pytest.param(BOTH, 3, marks=pytest.mark.slow)])
def test_killed_anywhere_inside_a_save(run, model, names, every, tmp_path_factory):
    """Before each single file operation of a save in turn (of two backbones: each third): the run resumes, evaluation
    reads it, and it saves again."""
    found = set()
    for count in range(0, 200, every):
        copy = tmp_path_factory.mktemp("killed") / "run"
        shutil.copytree(run, copy)

        def interrupted(copy: Path = copy, count: int = count) -> None:
            die_at(count, copy)
            save(copy, 30, model, names=names)

        status = in_a_child(interrupted)
        step, warnings = load(copy)
        evaluated = exported(copy)
        assert step in (20, 30) and not warnings, count
        assert evaluated in (20, 30) and evaluated <= step, count
        found.add((step, evaluated))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        save(copy, 40, model, names=names)
        assert load(copy) == (40, []) and {exported(copy / name) for name in names} == {exported(copy)} == {40}
        assert steps(copy) == [f"step_{step:08d}", "step_00000040"]
        assert not list(copy.rglob(".*")), count
    assert status == 0 and count > 25
    assert found == {(20, 20), (30, 20), (30, 30)}  # also between the checkpoint and the run folder's copy


@pytest.mark.parametrize("name", ["state.pt", "backbone.safetensors", "backbone.json", "manifest.json", "copy"])
def test_killed_while_a_file_is_half_written(run, model, monkeypatch, name):
    def half(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def torch_save(state, path, save=torch.save):
        save(state, path)
        half(path, path.read_bytes())

    def save_file(weights, path, save=public.save_file):
        save(weights, path)
        half(path, path.read_bytes())

    def write_json(path, content, write=storage.write_json):
        if path.name == name:
            storage.write_atomically(path, lambda aside: half(aside, json.dumps(content).encode()))
        write(path, content)

    def copy(source, target):
        half(target, source.read_bytes())

    def interrupted() -> None:
        if name == "state.pt":
            torch.save = torch_save
        elif name == "backbone.safetensors":
            public.save_file = save_file
        elif name == "copy":
            shutil.copyfile = copy
        else:
            public.write_json = private.write_json = write_json
        save(run, 30, model)

    assert in_a_child(interrupted) == -signal.SIGKILL
    assert load(run) == ((30, []) if name == "copy" else (20, []))
    assert exported(run) == 20
    save(run, 40, model)
    assert load(run) == (40, []) and exported(run) == 40 and not list(run.rglob(".*"))


def test_flushed_before_it_is_named(run, model, monkeypatch):
    """A power cut: no name is on the disk before the bytes that it names."""
    synced: set[str] = set()
    renamed: list[tuple[str, set[str]]] = []

    def fsync(handle, fsync=os.fsync):
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def note(source, target, rename=os.rename):
        own = {Path(source).name, *(path.name for path in Path(source).glob("*"))}
        renamed.append((Path(target).name, synced & own))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", note)
    monkeypatch.setattr(os, "replace", note)
    save(run, 30, model)
    order = [name for name, _ in renamed]
    assert order == [
        "backbone.safetensors",
        "backbone.json",
        "manifest.json",
        "step_00000030",
        "backbone.safetensors",
        "backbone.json",
    ]
    for name, flushed in renamed:
        assert flushed, f"{name} was renamed before it was flushed"
    assert {"state.pt", ".writing-00000030"} <= renamed[3][1]
    assert {"state", run.name} <= synced  # and the names themselves


# ---------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["state.pt", "backbone.safetensors", "backbone.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(run, name, damage):
    newest = run / "state" / "step_00000020"
    path = newest / name
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    elif damage == "flipped":
        flip(path, random.Random(name), len(content) // 2 if name != "manifest.json" else content.index(b"{"))
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    step, warnings = load(run)
    assert step == 10
    (warning,) = warnings
    assert str(newest) in warning and name in warning and "the one before" in warning


def flip(path: Path, draw: random.Random, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def test_any_bit_of_a_manifest(run):
    """It has no checksum of its own: every flip is harmless, found, or taken for another format; never a crash."""
    path = run / "state" / "step_00000020" / "manifest.json"
    content = path.read_bytes()
    draw = random.Random(1)
    outcomes = set()
    for at in range(len(content)):
        flip(path, draw, at)
        try:
            outcomes.add(load(run)[0])
        except Refusal as refusal:
            assert "format" in str(refusal)
            outcomes.add("refused")
        path.write_bytes(content)
    assert outcomes <= {10, 20, "refused"} and 10 in outcomes


@pytest.mark.parametrize(
    "content", ["", "null", "[]", "3", "{}", '{"format": 1, "files": {}}', '{"format": 1, "files": 3}']
)
def test_a_manifest_that_is_none(run, content):
    (run / "state" / "step_00000020" / "manifest.json").write_text(content)
    step, (warning,) = load(run)
    assert step == 10 and "manifest.json" in warning


def test_when_all_are_damaged_the_run_is_refused(run):
    for folder in (run / "state").iterdir():
        (folder / "state.pt").write_bytes(b"")
    warnings: list[str] = []
    with pytest.raises(Refusal, match=r"every checkpoint under .* is damaged: start again with --overwrite") as refusal:
        private.newest_whole(run, warnings.append)
    assert len(warnings) == 2 and "\n" not in str(refusal.value)


def test_a_newer_format_is_refused_and_not_taken_for_damage(run):
    rewrite_manifest(run / "state" / "step_00000020", format=2)
    with pytest.raises(Refusal, match="format 2, this version reads format 1"):
        load(run)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newest_does_not_outlive_the_next(run, model, keep):
    """It is newer by its number: it must not count among the last ones, nor be tried first at every resume."""
    (run / "state" / "step_00000020" / "state.pt").write_bytes(b"")
    assert load(run)[0] == 10
    save(run, 13, model, keep=keep)
    assert load(run) == (13, [])
    assert steps(run) == ["step_00000010", "step_00000013"][-keep:]
    save(run, 20, model, keep=keep)
    assert load(run) == (20, [])


def test_the_same_step_again_replaces_what_was_damaged(run, model):
    (run / "state" / "step_00000020" / "state.pt").write_bytes(b"")
    save(run, 20, model)
    assert load(run) == (20, []) and exported(run) == 20


def test_folders_of_other_names_are_nobodys_checkpoint(run):
    (run / "state" / "step_best").mkdir()
    (run / "state" / "step_00000030.bak").mkdir()
    assert load(run) == (20, [])


# ---------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("room", ["none", "for state.pt only", "for the checkpoint only"])
def test_a_full_disk_leaves_every_earlier_checkpoint(run, model, room, monkeypatch):
    big = backbone(30, embed_dim=64)  # its weights take more than the state beside it
    size = {"none": 1000, "for state.pt only": 20_000, "for the checkpoint only": 10**9}[room]

    def no_room(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    def starved() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        if room == "for the checkpoint only":
            shutil.copyfile = no_room
        try:
            save(run, 30, big)
        except OSError as error:
            message = str(error)
        (run / "said").write_text(message)

    assert in_a_child(starved) == 0
    said = (run / "said").read_text()
    assert str(run) in said and "\n" not in said
    if room != "for the checkpoint only":
        assert "step 30" in said and "bytes are free" in said and f"--resume {run}" in said
        assert steps(run) == ["step_00000010", "step_00000020"]
    assert load(run) == ((30, []) if room == "for the checkpoint only" else (20, []))
    assert exported(run) == 20
    assert not list(run.rglob(".*"))
    save(run, 40, model)
    assert load(run) == (40, []) and exported(run) == 40


# ---------------------------------------------------------------------------- the public backbone


def test_a_backbone_rebuilds_from_its_two_files_alone(tmp_path, model):
    public.export(tmp_path, model, public.describe(model, "none", "mean", {"step": 0}))
    moved = shutil.copytree(tmp_path, tmp_path / "moved", ignore=shutil.ignore_patterns("moved"))
    again, plan, description = public.load_backbone(moved / "backbone.safetensors")
    images = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16).remainder(256).to(torch.uint8)
    expected, found = model.eval()(images, plan), again(images, plan)
    assert torch.equal(found.tokens, expected.tokens) and found.grid == expected.grid == (2, 2)
    assert description["grid"] == [2, 2] and description["width"] == 16 and description["num_prefix_tokens"] == 1
    assert again.config.kwargs == TINY and description["format"] == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "backbone.json").unlink(), "backbone.json is missing beside it"),
        (lambda run: (run / "backbone.json").write_text("{"), "it is no JSON"),
        (lambda run: (run / "backbone.json").write_bytes(b"\xff\xfe"), "it is no JSON"),
        (lambda run: (run / "backbone.json").write_text("[1]"), "it has no `format`"),
        (lambda run: change(run, format=2), "checkpoint format 2, this version reads format 1: update poslabel"),
        (lambda run: change(run, format=0), "export it again"),
        (lambda run: drop(run, "mean"), "lacks mean"),
        (lambda run: change(run, kwargs=TINY | {"embed_dim": 32}), "holds the weights of another model"),
        (lambda run: change(run, kwargs=TINY | {"depth": 2}), "missing"),
        (lambda run: change(run, name="vit_tinny_patch16_224"), "did you mean"),
        (lambda run: (run / "backbone.safetensors").write_bytes(b"\0" * 64), "SHA-256 differs"),
        (lambda run: not_safetensors(run), "cannot be read as safetensors"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, model, monkeypatch, damage, message):
    monkeypatch.setattr(public.time, "sleep", lambda seconds: None)
    public.export(tmp_path, model, public.describe(model, "none", "mean", {}))
    damage(tmp_path)
    with pytest.raises(Refusal) as refusal:
        public.load_backbone(tmp_path)
    assert (message in str(refusal.value) and str(tmp_path) in str(refusal.value)) or "did you mean" in message


def change(run: Path, **fields) -> None:
    path = run / "backbone.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop(run: Path, field: str) -> None:
    path = run / "backbone.json"
    description = json.loads(path.read_text())
    del description[field]
    path.write_text(json.dumps(description))


def not_safetensors(run: Path) -> None:
    (run / "backbone.safetensors").write_bytes(b"not weights")
    change(run, weights_sha256=storage.sha256(run / "backbone.safetensors"))


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(Refusal, match=r"expected backbone.safetensors and backbone.json, found photo.jpg"):
        public.load_backbone(tmp_path)
    with pytest.raises(Refusal, match="give a run folder"):
        public.load_backbone(tmp_path / "nowhere")


def test_a_pair_that_is_being_replaced_is_waited_for(run, model, monkeypatch):
    """Evaluation beside a running run may read new weights with the old description: the next look finds both."""
    save(run, 30, model)
    weights = run / "backbone.safetensors"
    new = (run / "backbone.json").read_text()
    shutil.copyfile(run / "state" / "step_00000020" / "backbone.json", run / "backbone.json")
    monkeypatch.setattr(public.time, "sleep", lambda seconds: (run / "backbone.json").write_text(new))
    assert public.load_backbone(weights)[2]["training"]["step"] == 30


def test_loading_names_what_does_not_fit(model):
    state = model.model.state_dict()
    state["extra"] = state.pop("norm.weight")
    state["norm.bias"] = torch.zeros(3)
    with pytest.raises(Refusal) as refusal:
        public.load_exactly(model.model, state, "FILE")
    assert str(refusal.value) == (
        "FILE holds the weights of another model: 1 missing (such as norm.weight), 1 unexpected (such as extra), "
        "1 of another shape (such as norm.bias: (3,), expected (16,))"
    )


def test_weights_are_all_there(tmp_path, model):
    public.export(tmp_path, model, public.describe(model, "none", "mean", {}))
    assert load_file(tmp_path / "backbone.safetensors").keys() == model.model.state_dict().keys()


def test_write_atomically_keeps_the_old_when_the_new_fails(tmp_path):
    path = tmp_path / "file"
    storage.write_atomically(path, lambda aside: aside.write_text("old"))

    def fail(aside: Path) -> None:
        aside.write_text("ne")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        storage.write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
