"""Methods that take turns on one thread: images per second, and ratios to the first of them."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

Method = Callable[[range], None]  # goes through images of these numbers


def each(one: Callable[[int], object]) -> Method:
    def run(numbers: range) -> None:
        for i in numbers:
            one(i)

    return run


def in_batches(size: int, one: Callable[[int], Tensor], finish: Callable[[Tensor], object]) -> Method:
    def run(numbers: range) -> None:
        for start in range(0, len(numbers), size):
            finish(torch.stack([one(i) for i in numbers[start : start + size]]))

    return run


Seconds = dict[str, list[float]]  # by method: of each round


def speeds(seconds: Seconds, name: str, other: str) -> list[float]:
    """How much faster a method is than another, round by round."""
    return [theirs / its for its, theirs in zip(seconds[name], seconds[other], strict=True)]


def measure(title: str, count: int, rounds: int, methods: dict[str, Method], turn: int = 0) -> Seconds:
    """Prints images/s and the ratio to the first method (medians over the rounds); returns the seconds.

    `turn`: images after which it is the next method's turn, 0: all of them. A machine that is busy for a second then
    slows all methods, and not one.
    """
    order = list(methods)
    seconds: Seconds = {name: [] for name in order}
    for number in range(rounds + 1):
        spent = dict.fromkeys(order, 0.0)
        for start in range(0, count, turn or count):
            for name in order:
                before = time.process_time()
                methods[name](range(start, min(count, start + (turn or count))))
                spent[name] += time.process_time() - before
            order = [*order[1:], order[0]]
        if number:  # the first round warms up
            for name in order:
                seconds[name].append(spent[name])
    first = next(iter(methods))
    print(f"\n{title:<46} images/s   ratio  (range)")
    for name, times in seconds.items():
        ratios = speeds(seconds, name, first)
        extent = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {name:<44} {count / statistics.median(times):8.0f} {statistics.median(ratios):7.2f}  {extent}")
    return seconds
