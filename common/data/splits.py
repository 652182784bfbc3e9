"""The names of splits, in folders, in Hugging Face's tables and beside masks: train, Training, val2017, test-dev, …"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import Refusal
from ..printable import printable

T = TypeVar("T")
TRAIN, VALIDATION, TEST, UNLABELLED = "train", "validation", "test", "unlabelled"

_WORDS = {
    TRAIN: "train|training|trn|trainval",
    VALIDATION: "val|valid|validation|validate|dev|devel|development|eval|evaluation|holdout|heldout",
    TEST: "test|testing|tst",
    UNLABELLED: "unlabeled|unlabelled|unsupervised",
}
# trainset, testdata, and CycleGAN's trainA
_TOKENS = {role: re.compile(f"(?:{words})(?:sets?|data|images?|imgs?|split|[ab])?") for role, words in _WORDS.items()}
_BEFORE = {"data", "dataset", "ilsvrc", "image", "images", "img", "imgs", "split"}  # ILSVRC2012_img_train
_AFTER = _BEFORE | {
    "a", "b", "challenge", "fold", "full", "labeled", "labelled", "mini", "of", "part", "px", "set", "small", "std",
    "subset", "v", "x",
}  # fmt: skip


def role_of(name: str) -> str | None:
    """Return the role that a split of this name has: TRAIN, VALIDATION, TEST or UNLABELLED; None for any other name."""
    words = _words(name)
    while words and words[0] in _BEFORE:
        words.pop(0)
    roles = [_role_of_word(word) for word in words]
    known = all(role is not None or word in _AFTER for role, word in zip(roles, words, strict=True))
    return roles[0] if roles and known else None


def roles_of(names: Sequence[str]) -> dict[str, str]:
    """Return {name: its role} for those among the `names` of siblings that are splits.

    Beside those that `role_of` knows, where it knows no training split, these are: names that differ in the role alone,
    cars_train and cars_test, one of which trains; and all of them, if each begins or ends with a role.
    """
    roles = {name: role for name in names if (role := role_of(name)) is not None}
    if TRAIN in roles.values():
        return roles
    partly = {name: part for name in names if (part := _role_within(name)) is not None}
    alike: dict[str, dict[str, str]] = {}  # by what a name says beside its role
    for name, (role, rest) in partly.items():
        alike.setdefault(rest, {})[name] = role
    if len(partly) == len(names):
        alike = {"": {name: role for name, (role, _) in partly.items()}}
    for group in alike.values():
        if TRAIN in group.values() and len(set(group.values())) > 1:
            roles |= group
    return roles


def _words(name: str) -> list[str]:
    """Return the words of a name, in lower case: also those of imagesTrain."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", name)
    return re.findall(r"[^\W\d_]+", re.sub(r"(hold|held)[-_ ]out", r"\1out", name.lower()))


def _role_of_word(word: str) -> str | None:
    return next((role for role, token in _TOKENS.items() if token.fullmatch(word)), None)


def _role_within(name: str) -> tuple[str, str] | None:
    """Return (the role that the last or the first word of a name says, the others); None if neither does."""
    words = _words(name)
    for at in (-1, 0) if words else ():
        if (role := _role_of_word(words[at])) is not None:
            return role, " ".join(words[:-1] if at else words[1:])
    return None


@dataclass(frozen=True)
class Division:
    """Division of a data set: what its parts are for."""

    train: str
    tests: tuple[tuple[str, ...], ...]  # parts that may judge; those of the first role are asked first
    unused: tuple[str, ...]

    def note(self) -> str:
        """Say in a line which part serves as what."""
        kept = [name for names in self.tests for name in names]
        clauses = [f"{_listed(['all of it' if self.train == '.' else self.train])} trained on"]
        clauses += [f"{_listed(kept)} kept to judge on"] if kept else []
        clauses += [f"{_listed(self.unused)} not used"] if self.unused else []
        return "; ".join(clauses)


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return f"{', '.join(map(printable, names[:most]))}{more} {'is' if len(names) == 1 else 'are'}"


def divide(names: Sequence[str], train: str | None, validation: str | None, where: str) -> Division:
    """Decide which parts `names` of `where` serve as what; `train` and `validation` name some. Raises Refusal."""
    by_role: dict[str, list[str]] = {}
    for name, role in roles_of(names).items():
        by_role.setdefault(role, []).append(name)
    if train is None:
        trains = [name for name in by_role.get(TRAIN, []) if name != validation]
        if len(trains) != 1:
            what = f"{', '.join(trains)} are all training splits by their names" if trains else "no training split"
            raise Refusal(
                f"{where}: {what}, among {', '.join(map(printable, names))}: say which is to be trained on with "
                "data_train=NAME (--data-train NAME)"
            )
        train = trains[0]
    tests = [tuple(name for name in by_role.get(role, []) if name != train) for role in (TEST, VALIDATION)]
    if validation is not None:
        tests = [(validation,)]
    taken = {train, *(name for group in tests for name in group)}
    return Division(train, tuple(filter(None, tests)), tuple(name for name in names if name not in taken))


def judge(division: Division, open_part: Callable[[str], T], has_labels: Callable[[T], bool], where: str) -> T | None:
    """Open the part to judge on: of the first role in which one has labels; without labels, of the first role.

    ImageNet's test images come without labels, its validation images with them. None where no part is there. Raises
    Refusal where two parts have the same role.
    """
    first: list[tuple[str, T]] = []
    for names in division.tests:
        opened = [(name, open_part(name)) for name in names]
        labelled = [(name, part) for name, part in opened if has_labels(part)]
        if len(labelled) > 1:
            _refuse_alike([name for name, _ in labelled], where)
        if labelled:
            return labelled[0][1]
        first = first or opened
    if len(first) > 1:
        _refuse_alike([name for name, _ in first], where)
    return first[0][1] if first else None


def _refuse_alike(names: Sequence[str], where: str) -> None:
    raise Refusal(
        f"{where}: {', '.join(names)} have the same role by their names: say which is to be judged on with "
        "data_validation=NAME (--data-validation NAME)"
    )
