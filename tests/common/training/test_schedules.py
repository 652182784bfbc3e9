"""Numbers that change over the training, and lengths of time."""

import math
from typing import Any

import pytest

from common.errors import Refusal
from common.training.schedules import Schedule, parse, rate, share


@pytest.mark.parametrize(
    ("schedule", "values"),  # after 0, 1/8, 1/4, 1/2 and all of the training
    [
        (Schedule("constant", 3.0, 3.0), [3, 3, 3, 3, 3]),
        (Schedule("linear", 1.0, 3.0), [1, 1.25, 1.5, 2, 3]),
        (Schedule("linear", 1.0, 3.0, 0.5), [1, 1.5, 2, 3, 3]),
        (Schedule("cosine", 1.0, 3.0), [1, 2 - math.cos(math.pi / 8), 2 - math.cos(math.pi / 4), 2, 3]),
        (Schedule("cosine", 3.0, 1.0, 0.25), [3, 2, 1, 1, 1]),
        (Schedule("linear", 1.0, 3.0, 0.0), [3, 3, 3, 3, 3]),
    ],
)
def test_values(schedule: Schedule, values: list[float]) -> None:
    assert [schedule.at(progress) for progress in (0.0, 0.125, 0.25, 0.5, 1.0)] == pytest.approx(values, abs=1e-12)


def test_ends_exactly() -> None:
    """A teacher whose momentum ends at 1 must not end a rounding error above it."""
    for kind in ("linear", "cosine"):
        assert Schedule(kind, 0.996, 0.1, 0.3).at(0.3) == 0.1
        assert max(Schedule(kind, 0.996, 1.0).at(step / 997) for step in range(997)) <= 1


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Schedule("cosine", 0.996, 1.0), "cosine 0.996 -> 1"),
        (Schedule("linear", 0.04, 0.07, 0.1), "linear 0.04 -> 0.07 over 10 % of the training"),
        (Schedule("constant", 0.04, 0.04), "0.04"),
    ],
)
def test_text(schedule: Schedule, text: str) -> None:
    assert str(schedule) == text


@pytest.mark.parametrize(
    ("value", "schedule"),
    [
        (1, Schedule("constant", 1.0, 1.0)),
        (0.05, Schedule("constant", 0.05, 0.05)),
        ({"schedule": "constant", "start": 0.05}, Schedule("constant", 0.05, 0.05)),
        ({"schedule": "cosine", "start": 0.04, "end": 0.4}, Schedule("cosine", 0.04, 0.4)),
        ({"schedule": "linear", "start": 0, "end": 1, "over": 0.3}, Schedule("linear", 0.0, 1.0, 0.3)),
    ],
)
def test_what_a_recipe_says(value: Any, schedule: Schedule) -> None:
    assert parse(value, "x") == schedule


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (True, r"x=True: expected a number or \{schedule: cosine"),
        ("0.1", r"x='0\.1': expected a number or"),
        (None, "x=None: expected a number or"),
        ([0.1, 0.2], "expected a number or"),
        (math.nan, "x=nan: expected a number or"),
        (10**400, "expected a number or"),
        (
            {"schedule": "cosin", "start": 0, "end": 1},
            "x.schedule='cosin': expected one of constant, linear, cosine; did",
        ),
        ({"schedule": ["cosine"], "start": 0, "end": 1}, "expected one of constant"),
        ({"schedule": "cosine", "strat": 0, "end": 1}, "unknown option 'strat' in x; did you mean 'start'"),
        ({"schedule": "cosine", "end": 1}, "x: start is missing"),
        ({"start": 0.1, "end": 1}, "x: schedule is missing"),
        ({"schedule": "cosine", "start": 0.1}, "x: end is missing: a cosine schedule"),
        ({"schedule": "cosine", "start": 0.1, "end": math.inf}, "x.end=inf: expected a number"),
        ({"schedule": "cosine", "start": False, "end": 1}, "x.start=False: expected a number"),
        ({"schedule": "cosine", "start": 0, "end": 1, "over": 1.5}, "x.over=1.5: expected a share"),
        ({"schedule": "cosine", "start": 0, "end": 1, "over": "all"}, "x.over='all': expected a share"),
        ({"schedule": "constant", "start": 0, "end": 1}, "a constant schedule has one value, not 0 and 1"),
    ],
)
def test_what_a_recipe_cannot_say(value: Any, told: str) -> None:
    with pytest.raises(Refusal, match=told) as caught:
        parse(value, "x")
    assert "\n" not in str(caught.value)


def test_rate_is_warmed_up_and_falls() -> None:
    """Six steps, two of warm-up, by hand; the last step stands one before the end."""
    half = math.sqrt(0.5)
    assert [rate(step, 6, 2, 1.0) for step in range(6)] == pytest.approx(
        [0.5, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2]
    )
    assert [rate(step, 6, 2, 1.0, 0.2, "linear") for step in range(2, 6)] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert [rate(step, 6, 2, 1.0, 0.2, "constant") for step in range(6)] == [0.5, 1, 1, 1, 1, 1]
    assert rate(6, 6, 2, 1.0, 0.2) == 0.2
    assert rate(0, 1, 0, 3.0) == 3.0


def test_rate_is_what_it_always_was() -> None:
    """To the bit: runs of before this vocabulary are resumed with it."""
    for steps, warmup in ((7, 0), (100, 5), (997, 100), (5, 5)):
        for step in range(steps):
            done = (step - warmup) / max(1, steps - warmup)
            before = 1e-6 + (5e-4 - 1e-6) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            assert rate(step, steps, warmup, 5e-4, 1e-6) == (5e-4 * (step + 1) / warmup if step < warmup else before)


@pytest.mark.parametrize(
    ("value", "expected"),  # of 200 steps, 10 of them an epoch
    [
        (0, 0.0),
        (0.05, 0.05),
        (1, 1.0),
        ("1 epoch", 0.05),
        ("10 epochs", 0.5),
        ("0.5 epochs", 0.025),
        (".5epochs", 0.025),
        ("20 epochs", 1.0),
        ("1 step", 0.005),
        (" 50 steps ", 0.25),
        ("0 steps", 0.0),
    ],
)
def test_lengths_of_time(value: Any, expected: float) -> None:
    assert share(value, 200, 10, "x") == (expected, None)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (True, "x=True: expected a share of the training"),
        (1.5, "x=1.5: expected a share of the training"),
        (-0.1, "x=-0.1: expected a share"),
        (math.nan, "x=nan: expected a share"),
        (None, "x=None: expected a share"),
        ("-1 epochs", "x='-1 epochs': expected a share"),
        ("10", "x='10': expected a share"),
        ("10 epoches", "x='10 epoches': .*did you mean 'epoch"),
        ("10 minutes", "x='10 minutes': expected a share"),
        ({"epochs": 3}, "expected a share"),
    ],
)
def test_no_lengths_of_time(value: Any, told: str) -> None:
    with pytest.raises(Refusal, match=told):
        share(value, 200, 10, "x")


def test_too_long_a_time_is_cut() -> None:
    assert share("10 epochs", 50, 10, "optimizer.warmup", instead=0.3) == (
        0.3,
        "optimizer.warmup=10 epochs is longer than the training (5 epochs): 30 % of it, 1.5 epochs, is used instead",
    )
    assert share("2000 steps", 1000, 10, "x", most=0.1) == (
        0.1,
        "x=2000 steps is longer than 10 % of the training (1,000 steps): 10 % of it, 100 steps, is used instead",
    )
    assert share("4 epochs", 50, 10, "x", instead=0.3) == (0.8, None)
    assert share("2 epochs", 10, 10, "x")[1] == (
        "x=2 epochs is longer than the training (1 epoch): 100 % of it, 1 epoch, is used instead"
    )
