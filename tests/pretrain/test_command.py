"""The command line of pretraining: recipe options as words and as flags."""

from pathlib import Path

import pytest

from common.errors import Refusal
from pretrain.command import parse


def test_every_option_is_understood_as_a_flag_too():
    words = ["tiny.yaml", "--threads", "1", "--batch=64", "seed=3", "--monitor.held-out", "0.5", "--dry-run"]
    given = parse([*words, "--model.kwargs.depth", "2", "--objectives.absolute.weight=2", "--data", "a b=c"], "")
    assert given.words == [
        "threads=1", "batch=64", "seed=3", "monitor.held_out=0.5", "model.kwargs.depth=2",
        "objectives.absolute.weight=2", "data=a b=c",
    ]  # fmt: skip
    assert given.dry_run and given.recipe == Path("tiny.yaml")
    for typed, said in (
        (["--thread", "1"], "unrecognized arguments: --thread.*did you mean '--threads'"),
        (["--monitor-every", "5"], "did you mean '--monitor.every'"),
        (["--batch"], "--batch needs a value: --batch VALUE, or batch=VALUE"),
        (["--batch", "--dry-run"], "--batch needs a value"),
    ):
        with pytest.raises(Refusal, match=said):
            parse(typed, "")


def test_shards_that_a_shell_wrote_out_are_refused():
    with pytest.raises(Refusal, match=r"2 archives are named, .*: quote them, data='NAME-\{000\.\.099\}\.tar'"):
        parse(["data=s-0.tar", "data=s-1.tar"], "")
    assert parse(["data=s-{0..1}.tar"], "").words == ["data=s-{0..1}.tar"]
