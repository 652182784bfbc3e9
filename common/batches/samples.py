"""Samples: what each image of a step looks like, and the batches that are made of them in the loader's workers."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import UNLABELLED, Images, Unreadable
from ..errors import Refusal
from .crops import Placed, crop_draws, reduction
from .cutting import CropDraws, Cutting, Size, Uncutting
from .device import Uncut
from .loading import Loader
from .mixing import Mixture, drawn, mix
from .sampler import StepPart, generator
from .strong import GREY, Colours, Moves, num_moves
from .views import FIRST_VIEW, View

Draw = Callable[[np.random.Generator], Mapping[str, np.ndarray]]
Collate = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Beside(Protocol):
    """What is kept of every image beside its pixels, such as dense labels. It is pickled into the loader's workers."""

    def read(self, i: int) -> Mapping[str, np.ndarray]:
        """Read what there is of image `i` of the source: "what" -> an array, of one shape for all images. Raises
        Unreadable where there is nothing."""
        ...

    def blank(self) -> Mapping[str, np.ndarray]:
        """Return arrays of these names and shapes that say nothing."""
        ...


@dataclass
class Batch:
    """Input of a training step, from B images. It holds labels only as draws, for the objectives that read them.

    Crops are crop-major: with `count` crops per image, row c * B + i of a view is crop c of image i.
    """

    views: dict[str, Tensor]  # name -> uint8 (count * B, C, h, w)
    index: Tensor  # (B,) which images
    draws: dict[str, Tensor] = field(default_factory=dict)  # "purpose/what" -> (B, ...); what is collated: any shape
    unreadable: list[str] = field(default_factory=list)  # files that were replaced by another image
    hopeless: bool = False  # so many of them in a row that none was found to take the place
    mixtures: dict[str, list[Mixture | None]] = field(default_factory=dict)  # of views whose images are to be mixed
    uncut: Uncut | None = None  # from which the views are made where the batch goes to its device

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on `device`, with all its views."""
        views = {name: view.to(device, non_blocking=True) for name, view in self.views.items()}
        if self.uncut is not None:
            views |= self.uncut.crops(device)
        draws = {name: draw.to(device, non_blocking=True) for name, draw in self.draws.items()}
        return replace(self, views=views, draws=draws, uncut=None)

    def mixed(self) -> "Batch":
        """Return the same batch, its images mixed with each other as was drawn."""
        views = {name: mix(self.views[name], mixtures) for name, mixtures in self.mixtures.items()}
        return replace(self, views=self.views | views)

    def tokens_of(self, view: str) -> Mixture | None:
        """Return by what patches of `view` are exchanged between images, if they are."""
        mixture = next(iter(self.mixtures.get(view, ())), None)
        return None if mixture is None or mixture.centre is None else mixture

    def pin_memory(self) -> "Batch":
        """Return the same batch in page-locked memory, from which copies to a GPU are asynchronous."""
        self.views = {name: view.pin_memory() for name, view in self.views.items()}
        self.draws = {name: draw.pin_memory() for name, draw in self.draws.items()}
        self.uncut = None if self.uncut is None else self.uncut.pin_memory()
        return self


@dataclass(frozen=True)
class Faster:
    """Faster ways to crops that differ a little (docs/data.md).

    scaled     JPEGs are decoded to a half, quarter or eighth of their sides where all crops keep their pixels
    on_device  crops are made where the batch goes to its device, see `device`; not of views with a policy or erasing,
               or whose patches are changed one by one
    """

    scaled: bool = False
    on_device: bool = False


SAME = Faster()


class Samples(Dataset):
    """Data set that decodes, crops and draws, in the loader's workers: (epoch, index) pairs in, one `Batch` out.

    `draws` (purpose -> function of a generator) is called for every image. `collate` (purpose -> function) is called
    once per batch, with the stacked draws of its purpose, {what: (B, ...)}; the tensors it returns join them.
    Each purpose in `labelled` finds among its draws "label" (B,), the class of the image that is shown, or -1, and
    "known" (), the images with a label in the whole step, divided by its parts: the same in all parts of the step.
    `colours`: mean and standard deviation of the channels, in [0, 1], for views that are strongly augmented.
    `beside` (purpose -> source) is read for the image that is shown, and an image without it counts as unreadable. Its
    purpose finds it among its draws, and where the first crop of the first view lies: "box" (B, 4) float32, top, left,
    height and width in shares of the image; "flip" (B,) bool; "size" (B, 2) int64, the image's height and width; where
    the view has a policy, also "moves" (B, M, 2) float32, what that moved the crop by: kinds, as in MOVES, and values.
    `faster`: ways to the same crops, but for a few grey levels.
    """

    ATTEMPTS = 64  # other images tried when one cannot be read

    def __init__(
        self,
        images: Images,
        views: Mapping[str, View],
        seed: int,
        channels: int,
        draws: Mapping[str, Draw] | None = None,
        collate: Mapping[str, Collate] | None = None,
        labelled: Collection[str] = (),
        colours: Colours = GREY,
        beside: Mapping[str, Beside] | None = None,
        faster: Faster = SAME,
    ) -> None:
        self.images, self.views, self.seed, self.channels = images, dict(views), seed, channels
        self.colours, self.faster = colours, faster
        for name, view in self.views.items():
            if view.patch_drop_colour > 0 and channels != 3:
                raise Refusal(
                    f"views.{name}.patch_drop_colour={view.patch_drop_colour}: expected a model of 3 channels, and it "
                    f"has {channels}: set it to 0"
                )
        self.draws, self.collate, self.labelled = dict(draws or {}), dict(collate or {}), tuple(labelled)
        self.beside = dict(beside or {})
        first = self.views.get(FIRST_VIEW)
        self.num_moves = num_moves(first.auto_augment) if self.beside and first is not None else 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        """Make one batch of a list of (epoch, index)."""
        crops = Uncutting(self.views) if self.faster.on_device else Cutting(self.views, self.seed, self.colours)
        draws: dict[str, dict[str, list[np.ndarray]]] = {
            name: {} for name in (*self.draws, *self.labelled, *self.beside)
        }
        unreadable: list[str] = []
        places: list[tuple[Placed, Size, Moves]] = []
        hopeless = False
        for epoch, index in keys:
            rows = self._crop_draws(epoch, index)
            image, whole, shown, kept = self._read(index, unreadable, rows)
            for name in self.labelled:
                draws[name].setdefault("label", []).append(np.asarray(self._labels[shown]))
            if image is None:  # `watch` ends the run; an exception would come out of the worker with its traceback
                hopeless, image, whole = True, torch.zeros(self.channels, 1, 1, dtype=torch.uint8), (1, 1)
            for name, draw in self.draws.items():
                _add(draws[name], draw(generator(self.seed, epoch, index, name)))
            for name, values in kept.items():
                _add(draws[name], values)
            placed, moves = crops.add((epoch, index), image, whole, rows)
            if placed is not None and self.beside:
                places.append((placed, whole, moves))
        stacked = self._stacked(draws)
        for what, tensor in self._where(places).items():
            stacked |= {f"{name}/{what}": tensor for name in self.beside}
        for name in self.labelled:
            stacked[f"{name}/known"] = torch.tensor(self._known(keys))
        views, uncut = crops.done()
        indices = torch.tensor([index for _, index in keys])
        return Batch(views, indices, stacked, unreadable, hopeless, self._mixtures(keys), uncut)

    def _mixtures(self, keys: list[tuple[int, int]]) -> dict[str, list[Mixture | None]]:
        """Return the mixtures of each view whose images are mixed; none where nothing is trained."""
        step = keys.number if isinstance(keys, StepPart) else None
        mixed = {name: view for name, view in self.views.items() if view.is_mixed} if step is not None else {}
        return {name: drawn(view, self.seed, step, keys) for name, view in mixed.items()}  # type: ignore[arg-type]

    def _where(self, places: Sequence[tuple[Placed, Size, Moves]]) -> dict[str, Tensor]:
        """Return where the first crops lie in their images, and how they were moved."""
        if not places:  # the first view is not looked at
            return {}
        placed, sizes, moves = zip(*places, strict=True)
        where = {
            "box": torch.tensor([each.box for each in placed]),
            "flip": torch.tensor([each.flipped for each in placed]),
            "size": torch.tensor(sizes),
        }
        if self.num_moves:
            none = [(0, 0.0)] * self.num_moves
            where["moves"] = torch.tensor([[*each, *none[len(each) :]] for each in moves], dtype=torch.float32)
        return where

    def _stacked(self, draws: Mapping[str, Mapping[str, list[np.ndarray]]]) -> dict[str, Tensor]:
        """Return {"purpose/what": (B, ...)}: the draws, and what `collate` makes of them."""
        tensors: dict[str, Tensor] = {}
        for name in {**draws, **self.collate}:
            stacked = {what: torch.from_numpy(np.stack(values)) for what, values in draws.get(name, {}).items()}
            if name in self.collate:
                stacked |= self.collate[name](dict(stacked))
            tensors |= {f"{name}/{what}": tensor for what, tensor in stacked.items()}
        return tensors

    def _crop_draws(self, epoch: int, index: int) -> CropDraws:
        """Return what the crops of each view depend on beside the image."""
        return {
            name: crop_draws(view, generator(self.seed, epoch, index, "" if name == FIRST_VIEW else f"view/{name}"))
            for name, view in self.views.items()
        }

    def _read(
        self, index: int, unreadable: list[str], rows: CropDraws | None = None
    ) -> tuple[Tensor | None, Size, int, dict[str, Mapping]]:
        """Return (image, size of the whole image, its index, what is kept beside it): image `index` or, where it cannot
        be read, another one, always the same; None if no other can be read. Where labels are asked for, the other one
        has a label if this one has, so that as many images of a step have one as was known before. `rows`: of the crops
        that it is read for, if it may be reduced."""
        for attempt in range(self.ATTEMPTS):
            at = self._instead(index, attempt) if attempt else index
            try:
                kept = {name: source.read(self.images.source_index(at)) for name, source in self.beside.items()}
                return *self._pixels(at, rows), at, kept
            except Unreadable as error:
                unreadable.append(str(error))
        return None, (1, 1), index, {name: source.blank() for name, source in self.beside.items()}

    def _pixels(self, at: int, rows: CropDraws | None) -> tuple[Tensor, Size]:
        """Return image `at` and the size of it whole. The memory layout is the decoder's: `cut` copies what it cuts."""
        if self.faster.scaled and rows is not None:
            crops = [(view, row) for name, view in self.views.items() for row in rows[name]]
            return self.images.read_reduced(at, self.channels, lambda height, width: reduction(height, width, crops))
        image = self.images.read(at, self.channels, contiguous=False)
        return image, (image.shape[1], image.shape[2])

    def _instead(self, index: int, attempt: int) -> int:
        """Return the index of the image that stands for image `index` at this attempt, counted from 1."""
        has_label = self._labels >= 0
        candidates = np.flatnonzero(has_label == has_label[index])  # seldom: not worth remembering
        size = len(candidates)
        return int(candidates[(int(np.searchsorted(candidates, index)) + attempt * (size // 3 + 1)) % size])

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        """Class of each image, int64 (n,), or -1; of none where labels are not asked for."""
        labels = self.images.labels if self.labelled else None
        return np.full(len(self.images), UNLABELLED) if labels is None else np.asarray(labels, np.int64)

    def _known(self, keys: list[tuple[int, int]]) -> float:
        """Count the images with a label in the step that `keys` are a part of, divided by its parts; `keys` that are no
        `StepPart` are a whole step."""
        step = keys.step if isinstance(keys, StepPart) else np.array([index for _, index in keys])
        return int((self._labels[step] >= 0).sum()) * len(keys) / len(step)


def _add(draws: dict[str, list[np.ndarray]], values: Mapping[str, np.ndarray]) -> None:
    for what, value in values.items():
        draws.setdefault(what, []).append(value)


def loader(samples: Samples, sampler: Any, workers: int, pin: bool) -> Loader:
    """Return a loader of batches from `workers` processes (0: in this one), in the sampler's order."""
    return Loader(samples, sampler, workers, prefetch=4, held=sampler.accumulate + 1, pin=pin)
