"""The sampler and the samples: pure functions of (seed, epoch, index), whoever asks and however often."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from common.batches.crops import augment
from common.batches.sampler import HELD_OUT_EPOCH, StepSampler, generator, held_out, order
from common.batches.samples import Batch, Samples, loader
from common.batches.views import View
from common.data import Images
from common.errors import Refusal


class Numbers:
    """Source: image i is grey, of brightness i; those in `broken` cannot be read."""

    def __init__(self, size: int, broken: tuple[int, ...] = ()) -> None:
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def read(self, i: int, channels: int) -> torch.Tensor:
        if i in self.broken:
            raise OSError("cut short")
        return torch.full((channels, 6, 8), i, dtype=torch.uint8)

    def name(self, i: int) -> str:
        return f"image{i}"

    def identity(self) -> bytes:
        return b"numbers"


PLAIN = View(size=4, jitter=0.0, grayscale=0.0)


def samples(size: int = 20, broken: tuple[int, ...] = (), seed: int = 0, draws=None) -> Samples:
    return Samples(Images(Numbers(size, broken), "numbers"), {"global": PLAIN}, seed, 1, draws)


class Noise(Numbers):
    """Source: every image is noise of its own."""

    def read(self, i: int, channels: int) -> torch.Tensor:
        pixels = np.random.default_rng(i).integers(0, 256, (channels, 20, 24), dtype=np.uint8)
        return torch.from_numpy(pixels)


GLOBAL = View(size=16, count=2, flip=0.5, blur=[1.0, 0.1], solarise=[0.0, 0.2])
LOCAL = View(size=8, count=3, scale=[0.05, 0.4], blur=0.5)


def crops(keys: list[tuple[int, int]], **views: View) -> dict[str, torch.Tensor]:
    return Samples(Images(Noise(20), "noise"), views, 0, 3).__getitems__(keys).views


def seen(processes: int = 1, accumulate: int = 1, start: int = 0, steps: int = 10, size: int = 21, batch: int = 8):
    """Per step the (epoch, index) of all processes, micro-batch by micro-batch."""
    each = [list(StepSampler(size, batch, 3, steps, start, rank, processes, accumulate)) for rank in range(processes)]
    return [
        [key for part in range(accumulate) for rank in range(processes) for key in each[rank][step * accumulate + part]]
        for step in range(steps - start)
    ]


# ---------------------------------------------------------------------------- the order


def test_an_epoch_visits_every_image_at_most_once_and_drops_the_rest():
    one, two = seen()[:2], seen()[2:4]  # 21 images are two batches of 8, and 5 that wait for another epoch
    for epoch, steps in enumerate((one, two)):
        keys = [key for step in steps for key in step]
        assert {e for e, _ in keys} == {epoch}
        assert len({index for _, index in keys}) == 16
    assert one != two


def test_over_the_epochs_every_image_is_seen():
    assert {index for step in seen(steps=20) for _, index in step} == set(range(21))


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_and_accumulation_share_the_same_steps(processes, accumulate):
    assert seen(processes, accumulate) == seen()


@pytest.mark.parametrize("start", [1, 2, 3, 7, 9, 10])
def test_a_resumed_sampler_goes_on_where_the_other_would(start):
    assert seen(start=start, processes=2, accumulate=2) == seen()[start:]


def test_the_order_is_a_permutation_of_its_own_for_every_seed_and_epoch():
    orders = [order(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(each) == list(range(50)) for each in orders)
    assert len({tuple(each) for each in orders}) == 6


def test_the_order_is_pinned():
    """So that a run that was begun with an older version goes on alike."""
    assert order(0, 0, 8).tolist() == [3, 7, 5, 6, 2, 0, 4, 1]
    assert generator(0, 0, 0).random(2).tolist() == [0.011546754286331562, 0.24154919656271812]


@pytest.mark.parametrize("processes", [1, 2])
def test_length(processes):
    sampler = StepSampler(21, 8, 0, 10, 4, 0, processes, 2)
    assert len(sampler) == len(list(sampler)) == 12
    assert len(StepSampler(21, 8, 0, 10, 10)) == len(StepSampler(21, 8, 0, 10, 12)) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"batch": 22}, "batch=22 is larger than the training data, 21 images: set batch=21 or less"),
        ({"batch": 0}, "batch=0: expected at least 1"),
        ({"accumulate": 0}, "accumulate=0: expected at least 1"),
        ({"batch": 9, "processes": 2}, "batch=9 (global) cannot be shared by 2 processes x 1 accumulation"),
        ({"batch": 6, "processes": 2, "accumulate": 2}, "choose a multiple of 4"),
    ],
)
def test_batches_that_cannot_be(words, message):
    with pytest.raises(Refusal) as refusal:
        StepSampler(**{"size": 21, "batch": 8, "seed": 0, "steps": 10} | words)
    assert message in str(refusal.value)


# ---------------------------------------------------------------------------- the samples


def test_a_sample_looks_the_same_in_any_company():
    together = samples().__getitems__([(0, 3), (0, 4), (1, 3)])
    alone = samples().__getitems__([(0, 4)])
    assert torch.equal(together.views["global"][1], alone.views["global"][0])
    assert together.index.tolist() == [3, 4, 3]


def test_draws_belong_to_the_sample():
    draws = {"pairs": lambda rng: {"which": rng.integers(0, 1000, 3)}}
    one = samples(draws=draws).__getitems__([(0, 1), (0, 2), (1, 1)]).draws["pairs/which"]
    two = samples(draws=draws).__getitems__([(1, 1), (0, 1)]).draws["pairs/which"]
    assert one.shape == (3, 3) and torch.equal(one[2], two[0]) and torch.equal(one[0], two[1])
    assert len({tuple(row) for row in one.tolist()}) == 3
    other = samples(seed=1, draws=draws).__getitems__([(0, 1)]).draws["pairs/which"]
    assert not torch.equal(other[0], one[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing_and_leave_the_generator_alone(workers):
    def batches(workers: int) -> list[Batch]:
        return list(loader(samples(), StepSampler(20, 4, 0, 6), workers, pin=False))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    alone, many = batches(0), batches(workers)
    assert torch.equal(torch.get_rng_state(), state)  # dropout's: an interruption starts workers once more
    for one, other in zip(alone, many, strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.views["global"], other.views["global"])


def test_a_batch_holds_no_labels():
    assert {field.name for field in dataclasses.fields(Batch)} == {
        "views",
        "index",
        "draws",
        "unreadable",
        "hopeless",
        "mixtures",
        "uncut",
    }
    labelled = Images(Numbers(4), "numbers", labels=[0, 1, 2, 3], classes="abcd")
    batch = Samples(labelled, {"global": PLAIN}, 0, 1).__getitems__([(0, 0)])
    assert not batch.draws and batch.index.tolist() == [0]


def test_an_unreadable_image_gives_its_place_to_another_always_the_same():
    batch = samples(broken=(3, 10)).__getitems__([(0, 2), (0, 3), (0, 4)])
    again = samples(broken=(3, 10)).__getitems__([(5, 3)])
    brightness = batch.views["global"].flatten(1).float().mean(1).tolist()
    assert brightness[0] == 2 and brightness[2] == 4 and brightness[1] not in (3, 10)
    assert again.views["global"].float().mean() == brightness[1]
    assert batch.unreadable == again.unreadable == ["image3: cut short", "image10: cut short"]
    assert not batch.hopeless


def test_without_any_readable_image_there_is_no_hope():
    batch = samples(4, broken=(0, 1, 2, 3)).__getitems__([(0, 0), (0, 1)])
    assert batch.hopeless and set(batch.unreadable) == {f"image{i}: cut short" for i in range(4)}


# ---------------------------------------------------------------------------- several crops


KEYS = [(0, 3), (0, 4), (1, 3), (1, 0)]


def test_crops_are_crop_major():
    views = crops(KEYS, **{"global": GLOBAL, "local": LOCAL})
    assert views["global"].shape == (8, 3, 16, 16) and views["local"].shape == (12, 3, 8, 8)
    for i, (epoch, index) in enumerate(KEYS):
        image = Noise(20).read(index, 3)
        for name, view, purpose in (("global", GLOBAL, ""), ("local", LOCAL, "view/local")):
            rng = generator(0, epoch, index, purpose)
            for c in range(view.count):
                assert torch.equal(views[name][c * len(KEYS) + i], augment(image, view, rng, c))
    assert len({tuple(crop.flatten().tolist()) for crop in views["local"]}) == 12


def test_a_crop_depends_on_no_other_image_view_or_crop():
    whole = crops(KEYS, **{"global": GLOBAL, "local": LOCAL})
    alone = crops([(1, 3)], **{"local": LOCAL, "global": GLOBAL})
    for name, count in (("global", 2), ("local", 3)):
        assert torch.equal(whole[name][2 :: len(KEYS)], alone[name]) and len(alone[name]) == count
    one = dataclasses.replace(GLOBAL, count=1, blur=1.0, solarise=0.0)
    assert torch.equal(crops(KEYS, **{"global": one})["global"], whole["global"][: len(KEYS)])
    more = dataclasses.replace(LOCAL, count=5)
    assert torch.equal(crops(KEYS, local=more)["local"][: 3 * len(KEYS)], whole["local"])


def sums(draws: dict[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    """Collates: one number for the whole batch, and one per image."""
    (which,) = draws.values()
    return {"total": which.sum() * times, "each": which.sum(1)}


def test_collate_sees_its_own_draws_stacked():
    draws = {name: lambda rng: {"which": rng.integers(0, 1000, 3)} for name in ("a", "b")}
    plain = samples(draws=draws).__getitems__(KEYS).draws
    both = Samples(samples().images, {"global": PLAIN}, 0, 1, draws, {"b": functools.partial(sums, times=2)})
    found = both.__getitems__(KEYS).draws
    assert set(found) == {"a/which", "b/which", "b/total", "b/each"}
    assert torch.equal(found["a/which"], plain["a/which"]) and torch.equal(found["b/which"], plain["b/which"])
    assert torch.equal(found["b/each"], plain["b/which"].sum(1))
    assert found["b/total"] == 2 * plain["b/which"].sum()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_no_crop_and_collate_alike():
    def batches(workers: int) -> list[Batch]:
        draws, collate = {"a": lambda rng: {"which": rng.random(2)}}, {"a": functools.partial(sums, times=1)}
        made = Samples(Images(Noise(12), "noise"), {"global": GLOBAL, "local": LOCAL}, 0, 3, draws, collate)
        return list(loader(made, StepSampler(12, 4, 0, 5), workers, pin=False))

    for one, other in zip(batches(0), batches(2), strict=True):
        assert one.views.keys() == other.views.keys() and one.draws.keys() == other.draws.keys()
        for name in one.views:
            assert torch.equal(one.views[name], other.views[name])
        for name in one.draws:
            assert torch.equal(one.draws[name], other.draws[name])


# ---------------------------------------------------------------------------- held out


def test_held_out_images_are_never_trained_on():
    train, out = held_out(100, 0.1, 1000)
    assert len(out) == 10 and sorted([*train, *out]) == list(range(100))
    assert np.array_equal(train, np.sort(train)) and np.array_equal(out, np.sort(out))
    assert not np.array_equal(out, np.arange(90, 100)) and not np.array_equal(out, np.arange(10))


@pytest.mark.parametrize(
    ("share", "most", "count"), [(0.0, 10, 0), (0.1, 3, 3), (0.1, 0, 0), (0.09, 1000, 9), (0.9, 1000, 90)]
)
def test_how_many_are_held_out(share, most, count):
    train, out = held_out(100, share, most)
    assert (len(train), len(out)) == (100 - count, count)


def test_held_out_crops_are_none_that_training_sees():
    assert HELD_OUT_EPOCH > 10**18
    assert generator(0, HELD_OUT_EPOCH, 0).random() != generator(0, 0, 0).random()
