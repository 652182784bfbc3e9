"""Sources of streams: WebDataset's shards, here or behind a URL, and all that Hugging Face's `datasets` streams."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.huggingface import division_of, image_column, load_splits, quiet_hub
from common.data.location import Location, braced
from common.data.tar_index import BLOCK, COMPRESSED
from common.errors import Refusal
from common.paths import expanded
from common.printable import printable


@dataclass(frozen=True)
class Item:
    """One sample, not decoded yet."""

    data: bytes | None  # None: there is none under its name
    name: str


class Source:
    """Shards of samples, each of which is read from its beginning, or from where a state says.

    where    path or name, for messages
    dataset  a `datasets.IterableDataset`
    column   of the images, which are not decoded
    """

    def __init__(self, where: str, dataset: Any, column: str) -> None:
        from datasets import Image

        self.where, self.column = where, column
        self.dataset = dataset.cast_column(column, Image(decode=False))
        self.num_shards = int(self.dataset.num_shards)

    def shard(self, number: int, state: Any = None) -> Shard:
        """Open shard `number`; `state`: of a `Shard`, from which it goes on."""
        return Shard(self, number, state)


class Shard:
    """One shard as it is read: an iterator of its items, and the `state` behind the last one."""

    def __init__(self, source: Source, number: int, state: Any) -> None:
        self.source, self.number = source, number
        self.dataset = source.dataset.shard(num_shards=source.num_shards, index=number)
        if state is not None:
            self.dataset.load_state_dict(state)
        self._examples = iter(self.dataset)

    @property
    def state(self) -> Any:
        """What the shard goes on from: numbers and texts in containers."""
        return self.dataset.state_dict()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        """Read the next item. Raises Refusal where the stream breaks off."""
        try:
            with quiet_hub():
                example = next(self._examples)
        except StopIteration:
            raise
        except Exception as error:  # each format, and each way to it, has errors of its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise Refusal(
                f"the stream {self.source.where} broke off in shard {self.number}: {reason}; nothing that was saved is "
                "lost: when it can be read again, go on with --resume"
            ) from error
        return self._item(example)

    def _item(self, example: dict[str, Any]) -> Item:
        cell = example[self.source.column] or {}
        path, data = cell.get("path"), cell.get("bytes")
        if data is None and path is not None:
            with contextlib.suppress(OSError):
                data = Path(path).read_bytes()
        key = example.get("__key__")
        name = f"{example.get('__url__', self.source.where)}/{key}" if key is not None else path
        return Item(data, printable(str(name or f"{self.source.where}, shard {self.number}")))


def open_source(where: Location) -> Source:
    """Open what `data`, with data_stream=true, says. Raises Refusal for what is no stream."""
    if where.label is not None:
        raise Refusal(f"data_label={where.label}: the labels of a stream are not read; leave it out")
    if where.is_hub:
        with quiet_hub():
            splits = load_splits(where, streaming=True)
            name = division_of(splits, where).train
            return Source(where.spec, *image_column(with_features(splits[name]), where))
    if where.is_remote or where.is_archive:
        return _shards(where)
    raise Refusal(
        f"data_stream=true goes with shards, 'NAME-{{000..099}}.tar' here or behind a URL, and with hf:NAME_OR_PATH; "
        f"data={printable(where.spec)} is none of them: leave data_stream out"
    )


def _shards(where: Location) -> Source:
    import datasets

    for option, value in (("data_train", where.train), ("data_validation", where.validation)):
        if value is not None:
            raise Refusal(f"{option}={value} does not go with a stream of shards, all of which are trained on")
    paths = braced(where.spec if where.is_remote else expanded(where.spec))
    if not where.is_remote and (absent := [path for path in paths if not Path(path).is_file()]):
        raise Refusal(
            f"data={where.spec}: {len(absent):,} of {len(paths):,} shards are not there: {printable(absent[0])}"
            f"{', …' if len(absent) > 1 else ''}; expected paths of tar archives"
        )
    if not where.is_remote:
        for path in paths:
            _refuse_cut_short(path)
    if where.is_remote and importlib.util.find_spec("aiohttp") is None:
        raise Refusal(f"data={where.spec} is read through the package aiohttp, which is not there: pip install aiohttp")
    try:
        dataset = datasets.load_dataset("webdataset", data_files={"train": paths}, streaming=True, split="train")
        return Source(where.spec, *image_column(with_features(dataset), where))
    except Refusal:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Refusal(
            f"cannot open data={where.spec} as a stream: {reason}; expected shards as WebDataset has them (KEY.jpg, "
            "KEY.cls, …), the same members in each sample"
        ) from error


def _refuse_cut_short(path: str) -> None:
    """Raises Refusal for an archive without an end mark: read as a stream, what is missing would not be noticed."""
    with open(path, "rb") as file:
        begins, size = file.read(BLOCK), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - BLOCK))
        if any(file.read()) and not begins.startswith(tuple(COMPRESSED)):
            raise Refusal(f"{printable(path)} is cut short: it has no end mark; fetch or write it again")


def with_features(dataset: Any) -> Any:
    """Return a stream that knows its columns; those of some formats are known by reading its beginning."""
    return dataset if dataset.features is not None else dataset._resolve_features()
