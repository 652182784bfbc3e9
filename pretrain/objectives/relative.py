"""`relative`: pairs of patches say where one is as seen from the other (Positional Label's RPL, arXiv 2206.04981), or
how far from it (dense relative localisation, arXiv 2106.03746).

Letters: B images, N patches, K of them kept, Q pairs an image, C = (2h-1)(2w-1) offsets.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from common import positions
from common.errors import Refusal
from common.limits import NotNegative, PatchShare, Range
from common.models import Backbone, Features
from common.models.plan import PlanSpec, Position
from common.numerics import wide
from pretrain.heads import DensePairHead, PairHead
from pretrain.objectives import Answers, Pass, Positional

# Bytes of the pairs that are worked on at a time. On a CPU few enough for its caches, and for memory that is used again
# rather than fetched anew from the system, which costs more than the arithmetic; on a GPU enough to fill it.
PIECE = {"cpu": 8 << 20, "cuda": 512 << 20}
FEW_PAIRS = 64  # that head=distance asks for, after arXiv 2106.03746

Piece = tuple[slice, slice]  # some of the images, some of the pairs of each


@dataclass
class RelativeOptions:
    """Options of `relative`."""

    weight: NotNegative = 1.0
    """Share of this objective in the summed loss; 0 leaves it out."""
    head: Literal["half", "separable", "regression", "distance"] = "half"
    """half: the paper's, one class per offset. separable: row and column apart, losses summed. regression: the offset
    in patches, smooth L1 (after PART). Each on half of the channels of either patch. distance: the offset without its
    sign in sides of the grid, L1, by an MLP on all channels (dense relative localisation)."""
    pairs: Any = "auto"
    """Ordered pairs per image, drawn without replacement from those of the kept patches: a number, auto (4 per kept
    patch, with head=distance 64; or all if they are fewer), or all."""
    diagonal: bool = True
    """Whether a patch is also asked where it is as seen from itself, as in the paper: nearly free answers."""
    keep: PatchShare = 1.0
    """Share of the patches that the encoder sees."""
    position: Position = "none"
    """Position embedding in the pass: none (leak-free) or full (the answer follows from it by subtraction, and the
    audit refuses it)."""
    context: PatchShare = 1.0
    """Share of the kept patches that are keys and values, in every layer (MP3)."""
    view: str = "global"
    """The view whose patches are asked."""

    def automatic_pairs(self, kept: int) -> tuple[int, str]:
        """What `pairs: auto` means for so many kept patches, and the rule in words."""
        every = positions.num_pairs(kept, self.diagonal)
        few, rule = positions.default_pairs(kept, self.diagonal), f"4 for each of {kept} patches"
        if self.head == "distance":
            few, rule = min(FEW_PAIRS, every), "the authors' number for head=distance"
        return (few, rule) if few < every else (every, f"all of {kept} patches")


class Joint:
    """One class per offset: cross-entropy over C of them."""

    prior = staticmethod(positions.offset_prior)  # of the classes that are right answers
    head: type[PairHead] | type[DensePairHead] = PairHead

    def __init__(self, grid: tuple[int, int], same: float) -> None:
        self.grid = grid
        self.outputs = positions.num_offsets(grid)
        self.columns = 2 * grid[1] - 1
        self.blind = positions.prior_entropy(grid, same)

    def right(self, labels: Tensor) -> Tensor:
        """The class that is the right answer for pairs whose offset has the class `labels`, in their shape."""
        return labels

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Summed over pairs: outputs (Q, C), labels (Q,)."""
        return F.cross_entropy(outputs, labels, reduction="sum")

    def guess(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Class (Q,), and the offset it stands for counted from the first class's, (Q, 2)."""
        guesses = outputs.argmax(-1)
        return guesses, self.split(guesses)

    def split(self, classes: Tensor) -> Tensor:
        """Row and column of the offset counted from the first class's, (..., 2)."""
        return torch.stack([classes // self.columns, classes % self.columns], -1)


class Separable(Joint):
    """Row and column of the offset answered apart: (2h-1) + (2w-1) logits, cross-entropies summed."""

    def __init__(self, grid: tuple[int, int], same: float) -> None:
        super().__init__(grid, same)
        self.rows = 2 * grid[0] - 1
        self.outputs = self.rows + self.columns
        self.blind = positions.axis_entropy(grid, same)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Summed over pairs: outputs (Q, 2h-1 + 2w-1), labels (Q,)."""
        down, right = outputs.split([self.rows, self.columns], -1)
        of_rows = F.cross_entropy(down, labels // self.columns, reduction="sum")
        return of_rows + F.cross_entropy(right, labels % self.columns, reduction="sum")

    def guess(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Class (Q,), and its row and column counted from the first class's, (Q, 2)."""
        places = torch.stack([part.argmax(-1) for part in outputs.split([self.rows, self.columns], -1)], -1)
        return places[..., 0] * self.columns + places[..., 1], places


class Regression(Joint):
    """The offset itself, two numbers in patches: smooth L1 with beta 1, mean over row and column (after PART)."""

    def __init__(self, grid: tuple[int, int], same: float) -> None:
        super().__init__(grid, same)
        self.outputs = 2
        self.most = (grid[0] - 1, grid[1] - 1)  # an offset in either direction
        self.blind = positions.constant_loss(grid, same)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Summed over pairs: outputs (Q, 2), labels (Q,)."""
        return F.smooth_l1_loss(self._places(outputs), self.split(labels).to(outputs.dtype), reduction="sum") / 2

    def guess(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest class (Q,), and the offset as it was answered, counted from the first class's, (Q, 2)."""
        places = self._places(outputs)
        row, column = (place.round().long() for place in places.unbind(-1))
        down, right = row.clamp(0, 2 * self.most[0]), column.clamp(0, 2 * self.most[1])
        return down * self.columns + right, places

    def _places(self, outputs: Tensor) -> Tensor:
        return torch.stack([outputs[..., 0] + self.most[0], outputs[..., 1] + self.most[1]], -1)


class Distance(Joint):
    """The offset without its sign, two numbers in sides of the grid, |rows|/h and |columns|/w: L1, mean over row and
    column (dense relative localisation, arXiv 2106.03746).

    Its classes are those of the offsets down and to the right, hw of them: an answer is right where both its numbers,
    in patches, round to those of the pair. By guessing that is likelier than with signs: `prior` adds up what they tell
    apart.
    """

    prior = staticmethod(positions.distance_prior)
    head = DensePairHead

    def __init__(self, grid: tuple[int, int], same: float) -> None:
        super().__init__(grid, same)
        self.outputs = 2
        self.most = (grid[0] - 1, grid[1] - 1)  # an offset down or to the right
        self.blind = positions.constant_distance_loss(grid, same)

    def right(self, labels: Tensor) -> Tensor:
        """The class of the same distances down and to the right."""
        return positions.folded(self.grid, labels)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Summed over pairs: outputs (Q, 2), labels (Q,)."""
        sides = outputs.new_tensor(self.grid)
        away = (self.split(labels) - outputs.new_tensor(self.most)) / sides
        return F.l1_loss(outputs, away, reduction="sum") / 2

    def guess(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest class (Q,), and the offset as it was answered, in patches counted from the first class's, (Q, 2)."""
        answered = outputs * outputs.new_tensor(self.grid)
        row, column = (part.round().long() for part in answered.unbind(-1))
        down, right = row.clamp(0, self.most[0]), column.clamp(0, self.most[1])
        classes = (down + self.most[0]) * self.columns + right + self.most[1]
        return classes, answered + outputs.new_tensor(self.most)


READINGS: dict[str, Callable[[tuple[int, int], float], Joint]] = {
    "half": Joint,
    "separable": Separable,
    "regression": Regression,
    "distance": Distance,
}


def draw_pairs(rng: np.random.Generator, count: int, some: int, diagonal: bool) -> dict[str, np.ndarray]:
    """One sample's pairs by number, {"pairs": (Q,)}; drawn in the loader's workers."""
    return {"pairs": positions.sample_pairs(rng, count, some, diagonal)}


class Relative(Positional):
    """Every ordered pair that is asked against its offset, query minus key."""

    Options = RelativeOptions
    crops_seen = "first"
    of_pairs = True

    codes: Tensor

    def __init__(self, options: RelativeOptions, backbone: Backbone) -> None:
        super().__init__()
        if options.position == "partial":
            raise Refusal(
                "objectives.relative.position='partial': which pairs would then be asked is not defined; use none, or "
                "the objective absolute"
            )
        plan = PlanSpec(options.keep, options.position, context=options.context)
        self.passes = {"tokens": Pass(options.view, plan)}
        self.options, self.grid = options, backbone.grid
        self.num_kept = plan.counts(math.prod(self.grid))[0]
        self._ask_about(options.pairs, options.diagonal)
        self.head = self.reading.head(backbone.width, self.reading.outputs)
        self.register_buffer("codes", positions.offset_codes(self.grid), persistent=False)

    def _ask_about(self, pairs: Any, diagonal: bool) -> None:
        self.diagonal = diagonal
        every = self.num_pairs = positions.num_pairs(self.num_kept, diagonal)
        some = every if pairs == "all" else pairs
        if some not in Range(at_least=1, at_most=every, whole=True):
            raise Refusal(
                f"objectives.relative.pairs={pairs!r}: expected auto, all, or a number from 1 to {every} "
                f"({self.num_kept} patches have that many ordered pairs{'' if diagonal else ' with diagonal=false'})"
            )
        draw = functools.partial(draw_pairs, count=self.num_kept, some=some, diagonal=diagonal)
        self.draw = draw if some < every else None
        self.same = 1 / self.num_kept if diagonal else 0.0  # share of the pairs of a patch with itself
        self.same_label = positions.num_offsets(self.grid) // 2
        self.reading = READINGS[self.options.head](self.grid, self.same)
        self.chance = float(self.prior(self.same).max())

    def prior(self, same: float) -> Tensor:
        """Probability of each class where this share of the pairs is of a patch with itself, (C,), float64."""
        return self.reading.prior(self.grid, same)

    def apart(self) -> "Relative":
        """A copy that asks about different patches only: that two are the same one is seen without any leak."""
        other, pairs = copy.deepcopy(self), self.options.pairs
        most = positions.num_pairs(self.num_kept, False)
        other._ask_about(min(pairs, most) if isinstance(pairs, int) else pairs, False)
        return other

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """loss (mean over pairs; nats, smooth L1 of patches, or L1 of sides), accuracy, distance (mean, in patches),
        gain (by how much the loss is below that of the best answer that ignores the image), chance (accuracy of such an
        answer)."""
        parts = self.head.parts(features["tokens"].tokens)
        codes_BK = self._codes(features["tokens"])

        def measure(piece: Piece, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            outputs, labels = self._ask(piece, parts, codes_BK, draws)
            loss = self.reading.loss(outputs, labels)
            with torch.no_grad():
                guesses, distances = self._judge(outputs, labels)
                return loss, (guesses == labels).sum(), distances.sum()

        B, Q = len(codes_BK), self._num_asked(draws)
        add_up = _SumOfPieces.apply if torch.is_grad_enabled() else _sum_of_pieces
        loss, right, away = (total / (B * Q) for total in add_up(measure, self._pieces(parts, Q), *parts))
        return {
            "loss": loss,
            "accuracy": right,
            "distance": away,
            "gain": self.reading.blind - loss.detach(),
            "chance": loss.new_full((), self.chance),
        }

    @torch.no_grad()
    def answers(
        self, features: Mapping[str, Features], draws: Mapping[str, Tensor], origin: Tensor | None = None
    ) -> Answers:
        """Answer as Positional says: a question is a pair, a class one of `positions.relative`."""
        parts = self.head.parts(features["tokens"].tokens)
        codes_BK = self._codes(features["tokens"], origin)
        labels_BQ = codes_BK.new_empty(len(codes_BK), self._num_asked(draws))
        guesses_BQ, distances_BQ = torch.empty_like(labels_BQ), torch.empty_like(labels_BQ, dtype=torch.float32)
        for piece in self._pieces(parts, labels_BQ.shape[1]):
            outputs, labels = self._ask(piece, _share(parts, piece), codes_BK, draws)
            guesses, distances = self._judge(outputs, labels)
            for whole, part in ((labels_BQ, labels), (guesses_BQ, guesses), (distances_BQ, distances)):
                whole[piece] = part.view(whole[piece].shape)
        return Answers(guesses_BQ, labels_BQ, distances_BQ)

    def _codes(self, features: Features, origin: Tensor | None = None) -> Tensor:
        """Offset code of the place of every kept patch, (B, K); with `origin`, of the place it came from."""
        B = len(features.tokens)
        codes = self.codes.expand(B, -1) if origin is None else self.codes[origin]
        kept = features.plan.kept
        return codes if kept is None else codes.gather(1, kept)

    def _ask(
        self, piece: Piece, parts: tuple[Tensor, ...], codes_BK: Tensor, draws: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Answers of the head to a piece's pairs, (Q, outputs), and their classes, (Q,); Q of all images together."""
        images, asked = piece
        codes = codes_BK[images]
        if "pairs" in draws:
            pairs = draws["pairs"][piece]
        else:  # all of them, the same in every image
            pairs = torch.arange(asked.start, asked.stop, device=codes.device).expand(len(codes), -1)
        queries, keys = positions.pair_ends(pairs, self.num_kept, self.diagonal)
        labels = codes.gather(1, queries) - codes.gather(1, keys) + positions.num_offsets(self.grid) // 2
        return wide(self.head.outputs(parts, queries, keys)).flatten(0, 1), self.reading.right(labels.flatten())

    def _judge(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Guessed classes and how far they are off, in patches, (Q,) each."""
        guesses, places = self.reading.guess(outputs)
        return guesses, (places - self.reading.split(labels)).float().norm(dim=-1)

    def _num_asked(self, draws: Mapping[str, Tensor]) -> int:
        return draws["pairs"].shape[1] if "pairs" in draws else self.num_pairs

    def _pieces(self, parts: tuple[Tensor, ...], num_asked: int) -> list[Piece]:
        """The pairs of all images cut into pieces of about PIECE bytes: several images', or a part of one's."""
        B = len(parts[0])
        each = parts[0].element_size() * (3 * self.reading.outputs + self.head.held)  # what backward needs of a pair
        most = max(1, PIECE.get(parts[0].device.type, PIECE["cuda"]) // each)
        images = max(1, min(B, most // num_asked))
        pairs = math.ceil(num_asked / math.ceil(num_asked / most))  # of equal size
        return [
            (slice(image, min(image + images, B)), slice(pair, min(pair + pairs, num_asked)))
            for image in range(0, B, images)
            for pair in range(0, num_asked, pairs)
        ]


def _share(parts: tuple[Tensor, ...], piece: Piece) -> tuple[Tensor, ...]:
    """`PairHead.parts` for the images of a piece."""
    query_part, key_part, *last = parts
    return query_part[piece[0]], key_part[piece[0]], *last


def _sum_of_pieces(measure: Callable[..., tuple[Tensor, ...]], pieces: list[Piece], *parts: Tensor) -> list[Tensor]:
    """measure(piece, *parts of it), summed over pieces."""
    return [
        torch.stack(of).sum() for of in zip(*(measure(piece, *_share(parts, piece)) for piece in pieces), strict=True)
    ]


class _SumOfPieces(torch.autograd.Function):
    """The same, with the gradient of the first sum, taken piece by piece while the piece is there.

    Nothing of a piece is kept for backward, which only scales the gradient that is already known: memory does not grow
    with the number of pairs, and, unlike with checkpointing, nothing is computed twice. What is summed is not yet
    divided by the number of pairs, so that half-precision gradients neither vanish nor overflow.
    """

    @staticmethod
    def forward(
        ctx: Any, measure: Callable[..., tuple[Tensor, ...]], pieces: list[Piece], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        gradients = tuple(torch.zeros_like(part) for part in parts)
        last = [part.detach().requires_grad_() for part in parts[2:]]
        measured = []
        for piece in pieces:
            with torch.enable_grad():
                leaves = [part[piece[0]].detach().requires_grad_() for part in parts[:2]] + last
                sums = measure(piece, *leaves)
                shares = torch.autograd.grad(sums[0], leaves)
            for gradient, share in zip(_share(gradients, piece), shares, strict=True):
                gradient += share
            measured.append([total.detach() for total in sums])
        ctx.save_for_backward(*gradients)
        totals = [torch.stack(of).sum() for of in zip(*measured, strict=True)]
        ctx.mark_non_differentiable(*totals[1:])
        return tuple(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return None, None, *(scale * gradient for gradient in ctx.saved_tensors)
