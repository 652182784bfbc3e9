"""Generating labels: the numbers, a file that resumes to the byte, and every refusal in one line."""

import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from common.batches.crops import evaluation, resize
from common.checkpoints.public import describe, export
from common.checkpoints.storage import sha256
from common.data import open_data
from common.errors import Refusal
from common.models import ModelConfig, create
from pretrain import generate_labels
from pretrain.token_labels.annotators import dense_logits, open_annotator
from pretrain.token_labels.generate import Labelling
from pretrain.token_labels.packed import Packed, Writer, begin, finish, index_crc, part_of
from pretrain.token_labels.preview import draw
from pretrain.token_labels.reader import digest, names_of

from .conftest import CLASSES, GRID, IMAGES, NAME, SIZE, words

ROOT = Path(__file__).resolve().parents[3]


# ---------------------------------------------------------------------------- the annotator


def saved(model: torch.nn.Module, folder: Path) -> str:
    torch.save(model.state_dict(), folder / "weights.pth")
    return str(folder / "weights.pth")


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_a_cell_is_classified_by_the_networks_own_head(name: str) -> None:
    """As a 1x1 convolution by hand, in a network that is linear after pooling; each cell alone, in any other."""
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2)} if "swin" in name else {}
    small |= {"embed_dim": 32, "depth": 1, "num_heads": 2} if "vit" in name else {}
    model: Any = timm.create_model(name, num_classes=5, **small).eval()
    images = torch.randn(2, 3, *([224, 224] if small else [64, 96]))
    with torch.no_grad():
        made, features = dense_logits(model, images), model.forward_features(images)
    if name == "resnet10t":
        expected = F.conv2d(features, model.fc.weight[:, :, None, None], model.fc.bias)
        assert made.shape[2:] == (2, 3)
        torch.testing.assert_close(made.mean((2, 3)), model(images))
    elif name == "test_convnext":
        head = model.head
        expected = head.fc(head.norm(features).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    elif "swin" in name:
        expected = model.head.fc(features).permute(0, 3, 1, 2)
    else:
        expected = model.head(features[:, 1:]).transpose(1, 2).unflatten(2, (14, 14))
    torch.testing.assert_close(made, expected)


def test_a_vision_transformer_is_read_through_its_auxiliary_head_if_it_has_one() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(
        "lvvit_t", img_size=(32, 48), embed_dim=24, depth=1, num_heads=2, num_classes=4
    ).eval()
    torch.nn.init.normal_(model.aux_head.weight)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = model.aux_head(model.forward_features(images)[:, 1:])
        torch.testing.assert_close(dense_logits(model, images), expected.transpose(1, 2).unflatten(2, (2, 3)))


@pytest.mark.parametrize("pooling", ["mean", "both"])
def test_a_finetuned_run_annotates_with_its_classifier(pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone = create(ModelConfig("vit_tiny_patch16_224", kwargs), [16, 24]).eval()
    width = 32 * (2 if pooling == "both" else 1)
    head = {"weight": torch.randn(3, width), "bias": torch.randn(3)}
    save_file(head, tmp_path / "head.safetensors")
    training = {
        "finetuned": {"classes": 3},
        "label_names": ["a", "b", "c"],
        "head_sha256": sha256(tmp_path / "head.safetensors"),
    }
    export(tmp_path, backbone, describe(backbone, "full", pooling, training))
    annotator = open_annotator(str(tmp_path), None, None)
    assert (annotator.grid, annotator.classes, annotator.class_names) == ((2, 3), 3, ["a", "b", "c"])
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    with torch.no_grad():
        tokens = backbone(images).tokens
        tokens = torch.cat([tokens, tokens], 2) if pooling == "both" else tokens
        expected = F.linear(tokens, head["weight"], head["bias"]).transpose(1, 2).unflatten(2, (2, 3))
        torch.testing.assert_close(annotator.dense(images), expected)


# ---------------------------------------------------------------------------- the file


def test_a_record_is_the_best_logits_of_the_whole_image(labelled: Path, pictures: Path, weights: Path) -> None:
    packed, images = Packed(labelled), open_data(str(pictures))
    assert (packed.header.images, packed.header.top, packed.header.grid) == (IMAGES, 5, [GRID, GRID])
    names = packed.names.tobytes()
    assert names[: packed.ends[0]] == b"a/picture.00.png" and packed.header.class_names is None
    annotator = open_annotator(f"timm:{NAME}", str(weights), (SIZE, SIZE))
    for i in (0, 1, IMAGES - 1):
        seen = resize(images.read(i), (SIZE, SIZE), annotator.interpolation)
        with torch.no_grad():
            scores, ids = annotator.dense(seen[None])[0].topk(5, 0)
        stored, classes = packed.record(i)
        np.testing.assert_allclose(stored.view(np.float16), scores.numpy(), rtol=2e-3, atol=2e-3)
        assert (classes == ids.numpy()).mean() > 0.95  # of equal logits any goes first
    assert len({tuple(packed.record(i)[1][0].ravel().tolist()) for i in range(IMAGES)}) > 1


def interrupted(after: int, monkeypatch: pytest.MonkeyPatch, given: list[str], committed: bool = True) -> None:
    """Label until so many batches are done, then end as Ctrl-C does, or as SIGKILL before the last were flushed."""
    write, done = Labelling._write, 0

    def one(self: Labelling, rows: range, items: Any, writer: Any) -> None:
        nonlocal done
        if done == after:
            raise KeyboardInterrupt
        write(self, rows, items, writer)
        if committed or done < after - 1:
            writer.commit()
        done += 1

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Labelling, "_write", one)
        generate_labels.main(given)


@pytest.mark.parametrize("committed", [True, False])
def test_an_interrupted_file_looks_unfinished_and_resumes_to_the_byte(
    committed: bool, labelled: Path, pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    out = tmp_path / "mine.labels"
    interrupted(3, monkeypatch, words(pictures, weights, out), committed)
    assert not out.exists() and part_of(out).exists()
    shutil.copy(part_of(out), tmp_path / "renamed")
    with pytest.raises(Refusal, match="records are empty"):
        Packed(tmp_path / "renamed")
    capsys.readouterr()
    assert generate_labels.main(words(pictures, weights, out)) == 0
    assert f"{12 if committed else 8} of {IMAGES} images are labelled already" in capsys.readouterr().out
    assert out.read_bytes() == labelled.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.labels", "renamed"]


def test_a_file_that_lacks_only_its_name_gets_it(
    labelled: Path, pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the last record, with nothing left to label."""
    out = tmp_path / "mine.labels"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pretrain.token_labels.packed.finish", Mock(side_effect=KeyboardInterrupt))
        generate_labels.main(words(pictures, weights, out))
    assert not out.exists()
    assert generate_labels.main([*words(pictures, weights, out), "--workers", "1"]) == 0
    assert out.read_bytes() == labelled.read_bytes()


def test_an_interrupted_file_of_another_command_is_refused(
    pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mine.labels"
    interrupted(1, monkeypatch, words(pictures, weights, out))
    before = part_of(out).read_bytes()
    with pytest.raises(
        Refusal, match=r"mine\.labels\.part is of an interrupted run that differs in top \(5 there, 3 now"
    ):
        generate_labels.main([*words(pictures, weights, out), "--top", "3"])
    assert part_of(out).read_bytes() == before and not out.exists()


def test_a_second_writer_of_a_file_is_refused(pictures: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.labels"
    with generate_labels.only_writer(out), pytest.raises(Refusal, match="another process is writing it"):
        generate_labels.main(words(pictures, weights, out))
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_written(
    pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(Refusal, match=r"[\d,]+ bytes are needed and 1,000 are free: make room"):
        generate_labels.main(words(pictures, weights, tmp_path / "mine.labels"))
    assert not list(tmp_path.iterdir())


def test_the_centre_alone_is_labelled_where_that_is_asked_for(
    pictures: Path, weights: Path, labelled: Path, tmp_path: Path
) -> None:
    out, images = tmp_path / "centre.labels", open_data(str(pictures))
    assert generate_labels.main([*words(pictures, weights, out), "--centre", "0.75"]) == 0
    packed = Packed(out)
    assert packed.header.crop == 0.75 and Packed(labelled).header.crop is None
    annotator = open_annotator(f"timm:{NAME}", str(weights), (SIZE, SIZE))
    seen = evaluation(images.read(5), (SIZE, SIZE), 0.75, annotator.interpolation)
    with torch.no_grad():
        scores = annotator.dense(seen[None])[0].topk(5, 0).values
    np.testing.assert_allclose(packed.record(5)[0].view(np.float16), scores.numpy(), rtol=2e-3, atol=2e-3)


def test_pictures_that_cannot_be_read_are_listed_and_counted(
    pictures: Path, weights: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(pictures, tmp_path / "some")
    (tmp_path / "some/a/picture.04.png").write_bytes(b"no picture")
    out = tmp_path / "mine.labels"
    given = words(tmp_path / "some", weights, out)
    with pytest.raises(Refusal, match=r"1 of 22 images .*more than the 0 that --max-bad 0 allows: .*picture\.04\.png"):
        generate_labels.main([*given, "--max-bad", "0"])
    assert not out.exists()
    assert generate_labels.main(given) == 0
    assert "1 of 22 images cannot be read and have no labels" in capsys.readouterr().out
    assert "picture.04.png" in (tmp_path / "mine.labels.bad_files.txt").read_text()
    packed, whole = Packed(out), Packed(labelled)
    assert packed.states.tolist() == [1, 1, 2] + [1] * 19
    for i in set(range(IMAGES)) - {2}:
        assert np.array_equal(packed.record(i), whole.record(i))


def test_a_preview_colours_the_cells_of_its_map(labelled: Path, pictures: Path, tmp_path: Path) -> None:
    """One of the pictures, whose map says class 1 in the upper right of 2x2 cells, for sure, and else class 0."""
    out, images = tmp_path / "drawn.labels", open_data(str(pictures)).subset([0])
    ends, names, _ = names_of(images)
    whole = Packed(labelled).header
    header = dataclasses.replace(
        whole, images=1, top=1, names_bytes=len(names), names_crc=index_crc(ends, names), class_names=list("abcdefg")
    )
    begin(out, header, ends, names)
    records = np.zeros((1, 2, 1, 2, 2), np.uint16)
    records[:, 0] = np.float16(30.0).view(np.uint16)
    records[0, 1, 0, 0, 1] = 1
    with closing(Writer(out, header)) as writer:
        writer.write([0], records, np.array([digest(images.read(0))]), np.array([1]))
        writer.commit()
    finish(out)
    path = draw(out, images, 1)
    pixels = np.array(Image.open(path).convert("RGB")).astype(int)
    map_of_cells = pixels[:, int(0.35 * pixels.shape[1]) : int(0.677 * pixels.shape[1])]
    for rows, is_orange in ((slice(0, None), True), (slice(None, None, -1), False)):
        red, _, blue = map_of_cells[rows][70].T  # a line through the upper cells, and one through the lower ones
        orange = red > blue + 60
        half = len(orange) // 2
        assert not orange[: half - 5].any() and (orange[half + 5 :].all() if is_orange else not orange.any())
    for colour in ([31, 119, 180], [255, 127, 14]):  # a square beside each name
        assert (np.abs(pixels[:, int(0.68 * pixels.shape[1]) :] - colour).max(-1) < 8).sum() > 50
    assert path == tmp_path / "drawn.labels.png"


REFUSED: list[tuple[list[str], str]] = [
    (["--annotator", "timm:no_such_net"], "no architecture of timm .*"),
    (
        ["--annotator", "timm:test_vit"],
        r"timm:test_vit: .* has no classifier \(head\.weight\): expected the weights",
    ),
    (["--annotator", "timm:resnet10t"], "timm:resnet10t: .* holds the weights of another model: .* of another shape"),
    (["--weights", "/nowhere.pth"], r"--weights /nowhere\.pth: no such file; expected weights of test_resnet"),
    (["--annotator", "runs/none", "--weights", ""], "goes with --annotator timm:NAME"),
    (["--top", "8"], "--top 8: expected 1 to 7, the classes of timm:test_resnet"),
    (["--top", "0"], "--top 0: expected a whole number of at least 1"),
    (["--size", "0"], "--size 0: expected one number of pixels, or height and width"),
    (["--centre", "1.5"], "--centre 1.5: expected a share above 0, at most 1"),
    (["--max-bad", "x"], "--max-bad x: expected a share below 1"),
    (["--data", "/nowhere"], "data=/nowhere: no such folder"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_input_is_refused_and_nothing_is_written(
    more: list[str], message: str, pictures: Path, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=message) as refused:
        generate_labels.main([*words(pictures, weights, tmp_path / "out.labels"), *more])
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vgg11", {"mlp_ratio": 0.01}, r"timm:vgg11 has no dense head: its classifier looks at 7x7 cells at once"),
        ("crossvit_tiny_240", {}, "has no dense head at 240x240: it gives no map of features"),
        ("pit_ti_224", {}, "has no dense head at 224x224: 0 tokens form no grid"),
        ("test_resnet", {"num_classes": 0}, r"has no classifier \(fc\.weight\)"),
    ],
)
def test_an_annotator_without_a_dense_head_is_refused(
    name: str, kwargs: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(timm.create_model(name, **kwargs), tmp_path)
    if "mlp_ratio" in kwargs:  # half a gigabyte otherwise
        monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **kwargs))
    with pytest.raises(Refusal, match=message):
        open_annotator(f"timm:{name}", file, None)


def test_a_backbone_without_a_classifier_is_refused(tmp_path: Path) -> None:
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone = create(ModelConfig("vit_tiny_patch16_224", kwargs), 16)
    export(tmp_path, backbone, describe(backbone, "full", "mean", {}))
    with pytest.raises(Refusal, match="has no classifier: expected timm:NAME, or a run that was trained with labels"):
        open_annotator(str(tmp_path), None, None)


def test_logits_that_are_no_numbers_are_refused(pictures: Path, tmp_path: Path) -> None:
    model: Any = timm.create_model(NAME, num_classes=CLASSES)
    model.fc.bias.data.fill_(torch.nan)
    with pytest.raises(Refusal, match="logits are not finite"):
        generate_labels.main(words(pictures, Path(saved(model, tmp_path)), tmp_path / "out.labels"))
    assert not (tmp_path / "out.labels").exists()


# ---------------------------------------------------------------------------- real processes


def started(given: list[str], processes: int = 1) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "pretrain/generate_labels.py")
    return subprocess.Popen([*launcher, script, *given], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(labelled: Path, pictures: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.labels"
    process = started(words(pictures, weights, out), 2)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and said.count("done: the labels are in") == 1
    assert out.read_bytes() == labelled.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_survives_kills_at_any_moment(
    processes: int, labelled: Path, pictures: Path, weights: Path, tmp_path: Path
) -> None:
    """SIGKILL, sooner and later, until a run ends by itself; never is there a file that looks complete and is not."""
    out, rng = tmp_path / "killed.labels", np.random.default_rng(processes)
    for _ in range(4):
        process = started(words(pictures, weights, out), processes)
        while process.poll() is None and not part_of(out).exists():
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.6)))
        if process.poll() is None:
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
            for child in [process.pid, *map(int, children.stdout.split())]:
                os.kill(child, signal.SIGKILL)
        process.communicate()
        assert not out.exists() or out.read_bytes() == labelled.read_bytes()
        out.unlink(missing_ok=True)
    process = started(words(pictures, weights, out), processes)
    process.communicate(timeout=200)
    assert out.read_bytes() == labelled.read_bytes()
