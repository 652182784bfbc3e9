"""Streams: every sample once an epoch, shuffled, and gone on with from any position, none left out or repeated."""

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pictures import write_tar
from PIL import Image
from runs.children import Run

from common.batches.samples import loader
from common.batches.views import View
from common.data import open_data
from common.data.location import Location
from common.errors import Refusal
from pretrain.streaming.reading import Position, Stream, images_of
from pretrain.streaming.sampling import StreamSampler, StreamSamples
from pretrain.streaming.source import open_source

SHARDS, EACH = 4, 15
COUNT = SHARDS * EACH
BRACES = "shards-{000..003}.tar"
STREAM = ["data_stream=true", "data_block=10", "monitor.most=8"]  # 16 of them are not trained on


def picture(number: int) -> bytes:
    """A PNG whose first pixel says its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    pixels[0, 0] = number
    aside = io.BytesIO()
    Image.fromarray(pixels).save(aside, "PNG")
    return aside.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        numbers = range(shard * EACH, (shard + 1) * EACH)
        members = [(f"{n:04d}{end}", data) for n in numbers for end, data in ((".png", picture(n)), (".cls", b"1"))]
        write_tar(folder / f"shards-{shard:03d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    rows = {"image": [{"bytes": picture(n), "path": None} for n in range(COUNT)], "label": [0] * COUNT}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(rows, features=features)
    (folder / "parquet").mkdir()
    for shard in range(SHARDS):
        table.shard(SHARDS, shard).to_parquet(folder / "parquet" / f"train-{shard:05d}-of-00004.parquet", batch_size=4)
    table.save_to_disk(folder / "saved")
    return folder


@pytest.fixture
def specs(shards: Path, tables: Path) -> dict[str, str]:
    return {
        "shards": f"{shards}/{BRACES}",
        "one shard": f"{shards}/shards-000.tar",
        "parquet": f"hf:{tables}/parquet",
        "saved": f"hf:{tables}/saved",
    }


def stream_of(spec: str, rank: int = 0, processes: int = 1, block: int = 7, seed: int = 3) -> Stream:
    return Stream(open_source(Location(spec)), seed, rank, processes, block)


def taken(stream: Stream, count: int) -> list[tuple[tuple[int, int], int, Position]]:
    """(key, number of the picture, position behind it) of the next samples."""
    samples = stream.samples()
    found = []
    for _ in range(count):
        key, item, position = next(samples)
        assert item.data is not None
        found.append((key, int(np.asarray(Image.open(io.BytesIO(item.data)))[0, 0, 0]), position))
    return found


@pytest.mark.parametrize("kind", ["shards", "parquet", "saved"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_sample_is_read_once_an_epoch_and_by_one_process(
    kind: str, processes: int, specs: dict[str, str]
) -> None:
    parts: dict[int, list[list[int]]] = {0: [], 1: []}
    keys = set()
    for rank in range(processes):
        found = taken(stream_of(specs[kind], rank, processes), 2 * COUNT)
        keys |= {key for key, _, _ in found if key[0] < 2}
        for epoch, of_ranks in parts.items():
            of_ranks.append([number for key, number, _ in found if key[0] == epoch])
    for of_ranks in parts.values():
        assert sorted(number for part in of_ranks for number in part) == list(range(COUNT))
        assert all(part and part != sorted(part) for part in of_ranks)
    assert parts[0][0] != parts[1][0] and len(keys) == 2 * COUNT


def test_fewer_shards_than_processes_are_read_by_all_and_shared_by_content(specs: dict[str, str]) -> None:
    parts = [[n for key, n, _ in taken(stream_of(specs["one shard"], rank, 2), EACH) if key[0] == 0] for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(EACH)) and all(parts)


@pytest.mark.parametrize("kind", ["shards", "parquet", "saved", "one shard"])
def test_from_any_position_it_goes_on_alike(kind: str, specs: dict[str, str], tmp_path: Path) -> None:
    whole = stream_of(specs[kind], 1, 2)
    expected = taken(whole, 45)
    for at in range(0, 45, 4):
        torch.save(expected[at][2].stored(), tmp_path / "position")
        rest = stream_of(specs[kind], 1, 2)
        rest.go_on(at, torch.load(tmp_path / "position", weights_only=True))
        assert taken(rest, 44 - at) == expected[at + 1 :]


def test_the_head_is_not_trained_on(specs: dict[str, str]) -> None:
    stream = stream_of(specs["shards"])
    head = stream.head(20)
    images = images_of(head, "x")
    assert [int(images.read(i)[0, 0, 0]) for i in range(20)] == list(range(20)) and not images.has_labels
    assert sorted(number for _, number, _ in taken(stream, COUNT - 20)) == list(range(20, COUNT))
    small = stream_of(specs["one shard"])
    small.head(EACH)
    with pytest.raises(Refusal, match=r"nothing to train on for process 0 of 1: its first 15 samples are kept"):
        next(small.samples())


def test_an_epoch_whose_shards_are_all_left_out_is_passed_over(shards: Path) -> None:
    """Of three shards one process has one: in some epochs the very one that monitors look at."""
    spec = f"{shards}/shards-{{000..002}}.tar"
    epochs, parts = 12, list[set[tuple[int, int]]]()
    for rank in (0, 1):
        stream = stream_of(spec, rank, 2)
        stream.head(EACH)
        found = ((key[0], number) for key, number, _ in taken(stream, 2 * EACH * epochs))
        parts.append({sample for sample in found if sample[0] < epochs})
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {(epoch, n) for epoch in range(epochs) for n in range(EACH, 3 * EACH)}
    assert any({epoch for epoch, _ in part} != set(range(epochs)) for part in parts)


def test_seeds_and_blocks_decide_the_order(specs: dict[str, str]) -> None:
    one, same, other, whole = (
        [number for _, number, _ in taken(stream_of(specs["shards"], seed=seed, block=block), COUNT)]
        for seed, block in ((0, 7), (0, 7), (1, 7), (0, COUNT))
    )
    assert one == same != other and sorted(one) == sorted(other) == sorted(whole) and whole != one


def batches_of(spec: str, workers: int, start: int = 0, stream: Stream | None = None) -> list:
    stream = stream or stream_of(spec)
    views = {"global": View(size=16, flip=0.5), "local": View(size=8, count=2)}
    head = images_of(stream.head(16), spec)
    samples = StreamSamples(head, views, 3, 3)
    return list(loader(samples, StreamSampler(stream, 6, 8, start, 2), workers, pin=False))


def test_batches_do_not_depend_on_workers_and_positions_are_remembered(specs: dict[str, str]) -> None:
    one, other = (batches_of(specs["shards"], workers) for workers in (0, 2))
    assert len(one) == len(other) == 16 and {len(batch.index) for batch in one} == {3}
    for first, second in zip(one, other, strict=True):
        assert first.index.equal(second.index) and not first.unreadable
        assert all(first.views[name].equal(second.views[name]) for name in first.views)
    stream = stream_of(specs["shards"])
    batches_of(specs["shards"], 0, stream=stream)
    assert sorted(stream.positions) == list(range(1, 9))
    again = stream_of(specs["shards"])
    again.go_on(5, stream.positions[5].stored())
    rest = batches_of(specs["shards"], 2, 5, again)
    assert [batch.index.tolist() for batch in rest] == [batch.index.tolist() for batch in one[10:]]
    assert all(a.views["local"].equal(b.views["local"]) for a, b in zip(rest, one[10:], strict=True))


def test_in_place_of_what_cannot_be_read_stands_the_next_of_its_part(tmp_path: Path) -> None:
    members = [(f"{n:04d}.png", b"no picture" if n in (20, 21) else picture(n)) for n in range(40)]
    members = [part for name, data in members for part in ((name, data), (name.replace("png", "cls"), b"0"))]
    where = str(write_tar(tmp_path / "x.tar", members))
    made = batches_of(where, 0)
    bad = [name for batch in made for name in batch.unreadable]
    assert bad and all("none of the kinds of pictures" in name and "x.tar/00" in name for name in bad)
    assert not any(batch.hopeless for batch in made)
    assert [batch.views["global"].sum().item() for batch in made] == [
        batch.views["global"].sum().item() for batch in batches_of(where, 2)
    ]


def test_a_shard_that_is_cut_short_is_refused_and_a_missing_member_is_an_unreadable_sample(tmp_path: Path) -> None:
    members = [(f"{n:04d}.{end}", data) for n in range(12) for end, data in (("png", picture(n)), ("cls", b"1"))]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    for cut in (len(whole) // 2, whole.index(b"0007.png"), len(whole.rstrip(b"\0"))):  # within and between members
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(Refusal, match=r"cut\.tar is cut short: it has no end mark; fetch or write it again$"):
            open_source(Location(str(tmp_path / "cut.tar")))
    late = write_tar(tmp_path / "late.tar", [member for member in members if member[0] != "0009.png"])
    items = list(open_source(Location(str(late))).shard(0))
    assert [item.data is None for item in items] == [number == 9 for number in range(12)]
    early = write_tar(tmp_path / "early.tar", [member for member in members if member[0] != "0002.png"])
    with pytest.raises(Refusal, match="the same members in each sample"):
        open_source(Location(str(early)))


# ------------------------------------------------------------------------------------------------------------- runs


def test_a_run_that_was_stopped_goes_on_to_the_bit(
    inside: Callable[..., int], tiny: list[str], shards: Path, tmp_path: Path, at_step: Callable[..., None], capsys
) -> None:
    words = [*tiny, f"data={shards}/{BRACES}", *STREAM, "steps=9"]
    whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
    assert inside(*words, f"run={whole.path}") == 0
    said = capsys.readouterr().out
    assert "a stream of 4 shards to train on, 10 samples shuffled at a time, without its first 16, 8 held out" in said
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert inside(*words, f"run={parts.path}", "loader.workers=2") == 0
    assert parts.steps == [1, 2, 3, 4, 5, 6]
    assert inside("--resume", parts.path, "loader.workers=0") == 0
    assert parts.losses == whole.losses and len(parts.losses) == 9
    with pytest.raises(Refusal, match="data_block"):
        inside("--resume", parts.path, "data_block=20")
    with pytest.raises(Refusal, match=r"its stream has 4 shards, ordered by their number, .* has 3: expected the same"):
        inside("--resume", parts.path, f"data={shards}/shards-{{000..002}}.tar", "steps=12")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epochs=1", "steps=null"], "steps=null: a stream has no list of its images; set steps=N"),
        (["loader.cache=full"], "loader.cache=full: a stream has no list"),
        (["loader.decode=scaled"], "loader.decode=scaled: a stream has no list"),
        (["data=builtin"], "data_stream=true goes with shards, .* data=builtin is none of them"),
        (["data_label=cls"], "data_label=cls: the labels of a stream are not read"),
        (["data_train=x"], "data_train=x does not go with a stream of shards"),
        (["data=absent-{0..3}.tar"], "4 of 4 shards are not there: absent-0.tar, …"),
        (["objectives.classification.weight=1"], "classification reads labels, and .* the labels of a stream are not"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(
    words: list[str], message: str, inside: Callable[..., int], tiny: list[str], shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=message) as refusal:
        where = [] if any(word.startswith("data=") for word in words) else [f"data={shards}/{BRACES}"]
        inside(tiny[0], *where, *STREAM, f"run={tmp_path / 'run'}", *words)
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


def test_a_url_is_read_by_pretraining_alone() -> None:
    with pytest.raises(
        Refusal, match=r"behind a URL, .* with data_stream=true; evaluations need images on this machine"
    ):
        open_data("http" + "://127.0.0.1/shards-{000..003}.tar")
