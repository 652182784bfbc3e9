"""Symmetry: do tokens merely follow their patches when these change places? If not, the culprits by name.

A backbone that knows nothing of places is equivariant: permuting the patches of an image, and the plan with them,
permutes the tokens and changes nothing else. Letters: B images, N = h*w patches, K of them kept, P prefix tokens, D
width.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import Refusal
from common.models import Backbone, Features
from common.models.plan import PlanSpec, TokenPlan
from pretrain.leaks.controls import rearrange
from pretrain.objectives import Positional

TRIALS = 3  # permutations
TOLERANCE = 1e-8  # of the largest token, in float64; rounding is below 1e-11 in every architecture that was tried
REDRAWN = 0.1  # standard deviation of redrawn parameters; encodings that start at zero would hide otherwise

# Parameters and buffers that carry position, by the names that timm and the authors' own code give them.
ENCODINGS = {
    "rotary position embedding": re.compile(r"rope|rotary"),
    "position embedding": re.compile(r"pos_?emb|position_?emb|pos_bias"),
    "relative position encoding": re.compile(r"\brpe_[qkv]|lookup_table"),
    "relative position bias": re.compile(r"relative_?pos|rel_?pos|bias_table"),
}
RELATIVE = re.compile(r"relative_?pos|rel_?pos|bias_table|rpe|cpb")
PADDED = re.compile(r"same", re.IGNORECASE)  # timm's classes that pad inside their forward
PLACELESS = re.compile(
    r"norm|linear|dropout|droppath|identity|softmax|relu|gelu|silu|swish|tanh|sigmoid", re.IGNORECASE
)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)


Move = Callable[[Tensor], Tensor]

# ------------------------------------------------------------------------------------------------------ what is run


def draw(plan: PlanSpec, num_patches: int, rng: np.random.Generator, count: int) -> TokenPlan:
    """A plan for `count` images."""
    return plan.plan(_stacked([plan.draw(rng, num_patches) for _ in range(count)]))


def draws(objective: Positional, rng: np.random.Generator, count: int) -> dict[str, Tensor]:
    """Draws of `objective` beside each of `count` images."""
    return _stacked([objective.draw(rng) for _ in range(count)]) if objective.draw is not None else {}


def _stacked(samples: list[Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def run(
    backbone: Backbone, objective: Positional, images: Tensor, plans: Mapping[str, TokenPlan]
) -> dict[str, Features]:
    """Features of every pass of `objective`, by name."""
    hidden = getattr(objective, "hidden_position", None)
    return {
        name: backbone(images, plan, hidden if plan.position == "partial" else None) for name, plan in plans.items()
    }


def copies(backbone: Backbone, objective: Positional, dtype: torch.dtype) -> tuple[Backbone, Positional]:
    """Copies of both on the CPU, in eval mode, free to be changed."""
    return tuple(copy.deepcopy(module).cpu().to(dtype).eval() for module in (backbone, objective))  # type: ignore[return-value]


# ----------------------------------------------------------------------------------------------------- the symmetry


@dataclass
class Symmetry:
    """Measure of how far tokens are from following their patches, with the culprits."""

    deviation: float  # largest change of a token that a permutation does not explain, relative to the largest token
    breaks: list[str]  # what is to blame, in words; empty where nothing is

    @property
    def holds(self) -> bool:
        """Whether what the loss reads is free of position."""
        return self.deviation <= TOLERANCE  # false for NaN, too


@torch.no_grad()
def symmetry(backbone: Backbone, objective: Positional) -> Symmetry:
    """Permute the patches that the loss asks about, and the plan with them, under redrawn parameters in float64.

    Under position=partial the patches that are told their place stay at it, unless the loss asks about them as well.
    Changes neither argument, and not torch's generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone, objective = copies(backbone, objective, torch.float64)
        for parameter in [*backbone.parameters(), *objective.parameters()]:
            if parameter.requires_grad:  # what was removed on purpose, or is fixed, is frozen
                nn.init.normal_(parameter, std=REDRAWN)
        images = torch.randn(2, backbone.channels, *backbone.size, dtype=torch.float64)
        plan = draw(objective.passes["tokens"].plan, math.prod(backbone.grid), np.random.default_rng(0), len(images))
        before = _Read(backbone, objective, images, plan)
        movable = _movable(before, objective, plan, math.prod(backbone.grid))
        deviations = []
        for _ in range(TRIALS):
            order = _permutation(movable)
            moved, follow = _move(plan, order)
            after = _Read(backbone, objective, rearrange(images, order, backbone.grid), moved)
            deviations.append(after.differs(before, follow))
        deviation = float(torch.stack(deviations).max())
        if not math.isfinite(deviation):
            raise Refusal(f"the audit: {backbone.config.name} gives tokens that are not finite under redrawn weights")
        result = Symmetry(deviation, [])
        if not result.holds:
            result.breaks = breaks(backbone, lambda: run(backbone, objective, images, {"tokens": plan})["tokens"])
            if not result.breaks:
                result.breaks = ["the objective's own layers" if before.same_tokens else "the model's own forward"]
        return result


class _Read:
    """Outputs of a pass that the loss reads: tokens, prefix, and the logits that the objective makes of them."""

    def __init__(self, backbone: Backbone, objective: Positional, images: Tensor, plan: TokenPlan) -> None:
        self.features = run(backbone, objective, images, {"tokens": plan})["tokens"]
        logits = getattr(objective, "logits", None)  # a decoder mixes tokens: the last word is the logits'
        self.logits = logits({"tokens": self.features}) if logits is not None else self.features.tokens
        self.same_tokens = True  # so far

    def differs(self, before: "_Read", follow: Tensor) -> Tensor:
        """Largest relative difference to what was `before`, of which token follow[b, k] is now token k."""

        def difference(now: Tensor, then: Tensor, moved: bool) -> Tensor:
            then = then.gather(1, follow[..., None].expand_as(then)) if moved else then
            return (now - then).abs().max() / then.abs().max() if now.numel() else torch.zeros(())

        of_tokens = difference(self.features.tokens, before.features.tokens, moved=True)
        before.same_tokens &= bool(of_tokens <= TOLERANCE)
        of_prefix = difference(self.features.prefix, before.features.prefix, moved=False)
        of_logits = difference(self.logits, before.logits, moved=True)
        return torch.stack([value.double() for value in (of_tokens, of_prefix, of_logits)]).max()


def _movable(read: _Read, objective: Positional, plan: TokenPlan, num_patches: int) -> Tensor:
    """Places whose patches change them, (B, N) bool."""
    movable = torch.ones(len(read.features.tokens), num_patches, dtype=torch.bool)
    if plan.visible is None:
        return movable
    drawn = draws(objective, np.random.default_rng(0), len(movable))
    asked = objective.answers({"tokens": read.features}, drawn).asked
    if asked is None or bool((asked & plan.visible).any()):
        return movable
    places = plan.kept if plan.kept is not None else torch.arange(num_patches).expand_as(plan.visible)
    return movable.scatter(1, places, ~plan.visible)


def _permutation(movable: Tensor) -> Tensor:
    """A random order of the movable places, the others as they are, (B, N): at place n lies what lay at order[b, n]."""
    order = torch.arange(movable.shape[1]).repeat(len(movable), 1)
    for row, free in zip(order, movable, strict=True):
        places = free.nonzero()[:, 0]
        row[places] = places[torch.randperm(len(places))]
    return order


def _move(plan: TokenPlan, order: Tensor) -> tuple[TokenPlan, Tensor]:
    """The plan of the permuted images, and which token of before each of its tokens is."""
    if plan.kept is None:
        kept, follow = None, order
    else:  # the same patches at their new places, in another sequence: who reads that reads places
        follow = torch.rand(plan.kept.shape).argsort(1)
        kept = order.argsort(1).gather(1, plan.kept).gather(1, follow)
    visible = plan.visible if plan.visible is None else plan.visible.gather(1, follow)
    context = plan.context if plan.context is None else follow.argsort(1).gather(1, plan.context)
    return replace(plan, kept=kept, visible=visible, context=context), follow


# ---------------------------------------------------------------------------------------------------- what breaks it


@torch.no_grad()
def breaks(backbone: Backbone, forward: Callable[[], Features]) -> list[str]:
    """Name what makes tokens know their places, deepest modules only. Changes the backbone."""
    tokens = forward().tokens
    culprits: dict[str, list[str]] = {}
    for kind in ENCODINGS:
        tables = [
            (name, table)
            for name, table in _tensors(backbone.model)
            if _encoding(name) == kind and table.is_floating_point() and bool(table.any())
        ]
        for name, table in tables:  # in use, if without it the tokens are others; and then it stays away,
            kept = table.clone()  # to see what else there is
            table.zero_()
            if torch.equal(forward().tokens, tokens):
                table.copy_(kept)
            else:
                culprits.setdefault(kind, []).append(name)
                tokens = forward().tokens
    for name, kind in _Suspects(backbone, tokens.shape[1]).watch(forward).items():
        culprits.setdefault(kind, []).append(name)
    return [
        f"{kind} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
        for kind, names in culprits.items()
    ]


def _encoding(name: str) -> str | None:
    """Kind of encoding that a parameter or buffer of that name is, if any."""
    return next((kind for kind, pattern in ENCODINGS.items() if pattern.search(name.lower())), None)


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


class _Suspects:
    """Modules whose outputs do not follow their inputs alone: each is asked in the middle of a forward pass."""

    def __init__(self, backbone: Backbone, num_tokens: int) -> None:
        self.grid, self.prefix, self.num_tokens = backbone.grid, backbone.num_prefix_tokens, num_tokens
        self.names = {module: name for name, module in backbone.model.named_modules() if name}
        self.merges = any("merging" in type(module).__name__.lower() for module in self.names)
        self.cells = torch.randperm(math.prod(self.grid))
        self.culprits: dict[str, str] = {}
        self.asking = False

    def watch(self, forward: Callable[[], Any]) -> dict[str, str]:
        """Run `forward`; {name of the module: what it is} of those whose outputs do not follow."""
        hooks = [module.register_forward_hook(self._ask, with_kwargs=True) for module in self.names]
        forward()
        for hook in hooks:
            hook.remove()
        return self.culprits

    def _ask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        name = self.names[module]
        output = output[0] if isinstance(output, (tuple, list)) and output else output
        if self.asking or PLACELESS.search(type(module).__name__) or not args or not isinstance(output, Tensor):
            return
        if not output.is_floating_point():
            return  # indices, no tokens
        if not isinstance(args[0], Tensor) or any(f"{other}.".startswith(f"{name}.") for other in self.culprits):
            return  # a part of it is to blame
        self.asking = True
        try:
            if not self._follows(module, args, kwargs):
                self.culprits[name] = self._kind(name, module, args[1:], kwargs)
        finally:
            self.asking = False

    def _follows(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
        def outcome(tensor: Tensor) -> Tensor:
            result = module(tensor.clone(), *args[1:], **kwargs)  # a copy: some modules work in place
            return result[0] if isinstance(result, (tuple, list)) else result

        def follows(move: Move) -> bool:
            moved = outcome(move(args[0]))
            return any(
                expected.shape == moved.shape and torch.allclose(moved, expected, rtol=0, atol=tolerance)
                for expected in self._expected(usual, move, args[0])
            )

        usual, moves = outcome(args[0]), self._moves(args[0])
        tolerance = TOLERANCE * float(usual.abs().max())
        return not moves or any(map(follows, moves))

    def _moves(self, tensor: Tensor) -> list[Move]:
        """Ways to permute what may be patches in a module's input."""
        if tensor.ndim == 4:
            across = torch.randperm(tensor.shape[2])  # windows as (B, windows, patches, D)
            return [*self._in_maps(tensor), lambda rows: rows[:, :, across]]
        if tensor.ndim != 3:
            return []
        first = self.prefix if tensor.shape[1] == self.prefix + self.num_tokens else 0
        order = torch.cat([torch.arange(first), first + torch.randperm(tensor.shape[1] - first)])
        moves: list[Move] = [lambda rows: rows[:, order]]
        if self._side(tensor.shape[1]) > 1:
            moves.append(self._in_rows)
        return moves

    def _expected(self, usual: Tensor, move: Move, tensor: Tensor) -> Iterable[Tensor]:
        """Outputs that may be expected when the input was moved."""
        if usual.shape[:-1] == tensor.shape[:-1]:
            yield move(usual)
        elif usual.ndim == 3 and self._side(usual.shape[1]):
            yield self._in_rows(usual)
        if usual.ndim == 4:
            yield from (in_map(usual) for in_map in self._in_maps(usual))

    def _side(self, rows: int) -> int:
        """Rows of a module as tokens of side r in each patch: r, or 0 where they are something else."""
        side = math.isqrt(rows // len(self.cells))
        return side if side * side * len(self.cells) == rows else 0

    def _in_maps(self, tensor: Tensor) -> list[Move]:
        """Ways to permute a map (B, D, H, W) or (B, H, W, D), where it has the patches' sides."""
        h, w = self.grid
        sides = ((self._in_first, tensor.shape[2:]), (self._in_last, tensor.shape[1:3]))
        return [move for move, (height, width) in sides if not height % h and not width % w]

    def _in_first(self, tensor: Tensor) -> Tensor:
        return rearrange(tensor, self.cells.expand(len(tensor), -1), self.grid)

    def _in_last(self, tensor: Tensor) -> Tensor:
        return self._in_first(tensor.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _in_rows(self, tensor: Tensor) -> Tensor:
        side = self._side(tensor.shape[1])
        h, w = self.grid
        return self._in_last(tensor.unflatten(1, (h * side, w * side))).flatten(1, 2)

    def _kind(self, name: str, module: nn.Module, others: tuple, kwargs: dict[str, Any]) -> str:
        """Describe a module in words."""
        merging = "patch merging by " if re.search(r"pool|downsample|merg", name.lower()) else ""
        if isinstance(module, (nn.Conv2d, *POOLS)):
            what = "convolution" if isinstance(module, nn.Conv2d) else "pooling"
            kernel = "x".join(str(side) for side in _pair(module.kernel_size))
            padded = module.padding not in (0, (0, 0), "valid") or PADDED.search(type(module).__name__)
            return f"{merging}{what} {kernel} {'with zero padding' if padded else 'that overlaps'}"
        if any("rope" in key and value is not None for key, value in kwargs.items()):
            return "rotary position embedding"
        shifted = any(_pair(getattr(module, "shift_size", 0)))
        if hasattr(module, "window_size") and any(isinstance(other, Tensor) for other in [*others, *kwargs.values()]):
            shifted = True  # the attention inside, under the mask of a shifted window
        elif not hasattr(module, "shift_size") and any(RELATIVE.search(key.lower()) for key, _ in _tensors(module)):
            return "relative position bias"
        if hasattr(module, "window_size"):
            sizes = "x".join(str(side) for side in _pair(module.window_size))
            return f"{'shifted ' if shifted else ''}windows of {sizes}{' before patch merging' if self.merges else ''}"
        return f"{'patch merging' if merging else 'module'} of class {type(module).__name__}"


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
