"""Place of images: a data set, which of its parts serve as what, and which columns hold what."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import Refusal
from ..paths import absolute, expanded

NAMED = ("builtin", "fashion-mnist", "cifar10", "cifar100", "stl10")
HUB = "hf:"
ARCHIVE = ".tar"  # also {000..099}.tar
MOST_SHARDS = 100_000
OPTIONS = {  # field of a Location -> the option that sets it
    "spec": "data",
    "root": "data_root",
    "train": "data_train",
    "validation": "data_validation",
    "image": "data_image",
    "label": "data_label",
    "span": "data_range",
}


@dataclass(frozen=True)
class Location:
    """Place of the images. What is None is decided by names: of folders, splits and columns."""

    spec: str = "builtin"  # one of NAMED, hf:NAME_OR_PATH, or the path of a folder or of archives
    root: str | None = None  # folder in which a named data set is looked for, and fetched to
    train: str | None = None  # sub-folder, archive or split to train on; of a folder "." is all of it
    validation: str | None = None  # sub-folder, archive or split to judge on
    image: str | None = None  # column of the images (hf:), or how their names end (shards)
    label: str | None = None  # column of their labels (hf:), or field of .json (shards)
    span: str | None = None  # values of black and white in pictures deeper than 8 bits; None: by the rules of `depth`

    @property
    def is_named(self) -> bool:
        """Whether it is a data set known by name: the name goes before a folder that is called so."""
        return self.spec in NAMED

    @property
    def is_hub(self) -> bool:
        """Whether Hugging Face's `datasets` reads it."""
        return self.spec.startswith(HUB)

    @property
    def path(self) -> Path:
        """The path, of a folder or of what follows hf:."""
        return Path(expanded(self.spec.removeprefix(HUB)))

    @property
    def is_remote(self) -> bool:
        """Whether it is the URL of a tar archive, or of several in braces."""
        return "://" in self.spec and self.spec.lower().endswith(ARCHIVE)

    @property
    def is_archive(self) -> bool:
        """Whether it is the path of a tar archive, or of several in braces."""
        return not self.is_named and not self.is_hub and self.spec.lower().endswith(ARCHIVE)

    def options(self) -> dict[str, str | None]:
        """Return {name of the option: value}, as a run stores it."""
        return {OPTIONS[name]: value for name, value in asdict(self).items()}

    def refuse_unused(self, in_one: bool, columns: bool = False) -> None:
        """Raises Refusal if a part, a column or a range is named where there is none to choose; `in_one`: of data whose
        parts are known, as are those of IDX files; `columns`: of data that has such a choice, as the hub's have."""
        chosen = () if self.is_hub or columns else ("image", "label")
        for name in ("train", "validation", "span", *chosen) if in_one else chosen:
            if getattr(self, name) is not None:
                choice = name in ("image", "label")
                kinds = "hf:NAME or tar archives" if choice else "a folder of images, tar archives, or hf:NAME"
                raise Refusal(
                    f"{OPTIONS[name]}={getattr(self, name)} goes with {kinds}, and data={self.spec} is none: "
                    "leave it out"
                )

    def named_as_folder(self) -> str:
        """Say that a folder here has the name that was taken for something else; nothing where none has."""
        if self.is_named and Path(self.spec).is_dir():
            return f"{self.spec} is the data set of that name, not the folder here: that is data=./{self.spec}"
        name = self.spec.removeprefix(HUB)
        if self.is_hub and name[:1] not in ("", ".", "/", "~") and Path(name).exists():
            return f"{self.spec} is what lies here under that name, not a data set of the hub"
        return ""


def place(spec: str) -> str:
    """Return `spec` as it is stored: a path is made absolute, if it was taken for one and exists."""
    where = Location(spec)
    if where.is_named or not spec or not where.path.exists():
        shards = where.is_archive and os.path.exists(braced(expanded(spec))[0])
        return os.path.abspath(expanded(spec)) if shards else spec
    return (HUB if where.is_hub else "") + absolute(str(where.path))


def braced(text: str) -> list[str]:
    """Return the paths that a text with braces means, as a shell would write them out: a{00..12}.tar, {a,b}.tar. Raises
    Refusal for more than MOST_SHARDS."""
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        return [text]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if ends is None:
        middles = found[1].split(",")
    else:
        first, last = int(ends[1]), int(ends[2])
        if abs(last - first) >= MOST_SHARDS:
            raise Refusal(f"{found[0]} in {text} means {abs(last - first) + 1:,} archives: expected a smaller range")
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        width = max(map(len, ends.groups())) if any(end[0] == "0" and len(end) > 1 for end in ends.groups()) else 0
        middles = [f"{number:0{width}d}" for number in numbers]
    return [path for middle in middles for path in braced(text[: found.start()] + middle + text[found.end() :])]


def location_of(options: Mapping[str, Any]) -> Location:
    """Return the location that the options of a run, or what it stored of them, say."""
    given = {field: options.get(name) for field, name in OPTIONS.items()}
    spec = given.pop("spec")
    return Location("builtin" if spec is None else spec, **given)


def changed_location(stored: Mapping[str, Any], given: Mapping[str, str | None]) -> Location:
    """Return the location that `given` options ask for; data other than the `stored` share none of their settings."""
    before = location_of(stored) if given.get("data") is None else Location(str(given["data"]))
    before = replace(before, spec=place(before.spec))
    known = {field: given.get(name) for field, name in OPTIONS.items() if field != "spec"}
    return replace(before, **{field: value for field, value in known.items() if value is not None})
