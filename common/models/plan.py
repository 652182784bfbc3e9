"""Token plans: which patches a pass of the backbone sees, where it is told they are, and which of them are keys.

    APL, RPL (arXiv 2206.04981)  keep 1,    position none (the released ViT: full)
    Jigsaw-ViT (2207.11971)      keep 0.5,  position none
    MP3 (2207.07611)             context,   position none
    DropPos (2309.03576)         keep 0.25, position partial, position_keep 0.25

A `PlanSpec` is what a recipe says: declarative and hashable, so that equal passes of different objectives are run once.
A `TokenPlan` is what was drawn from it for one batch. Letters: B images, N patches, K kept, V of them told their
place, C keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from ..errors import Refusal
from ..limits import PatchShare, Range, check

Position = Literal["none", "full", "partial"]


@dataclass(frozen=True)
class PlanSpec:
    """Request for a pass of the backbone: which patches, with which position encoding.

    keep: share of the patches that enter the encoder at all. position: "full" adds whatever position encoding the
    backbone has, "none" runs it without, "partial" shows the position embeddings of `position_keep` of the kept patches
    and hides the others'. context: share of the kept patches that serve as keys and values, in every layer.
    Raises Refusal for values out of range.
    """

    keep: PatchShare = 1.0
    position: Position = "full"
    position_keep: Annotated[float, Range(at_least=0, below=1, noun="a share of the kept patches")] = 0.0
    context: Annotated[float, Range(above=0, at_most=1, noun="a share of the kept patches")] = 1.0

    def __post_init__(self) -> None:
        check(self)
        if self.position_keep and self.position != "partial":
            raise Refusal(
                f"position_keep={self.position_keep:g} goes with position=partial, and position={self.position}: "
                "set position=partial, or leave position_keep out"
            )

    def __str__(self) -> str:
        share = f" ({self.position_keep:g} of them)" if self.position == "partial" else ""
        parts = [f"keep {self.keep:g}"] * (self.keep < 1) + [f"position {self.position}{share}"]
        return ", ".join(parts + [f"context {self.context:g}"] * (self.context < 1))

    @property
    def whole(self) -> bool:
        """Whether nothing is drawn: every patch is there, is a key, and is treated like every other."""
        return self.keep == 1 and self.context == 1 and self.position != "partial"

    def counts(self, num_patches: int) -> tuple[int, int, int]:
        """Numbers (K, V, C) on a grid of `num_patches`. Raises Refusal if too few are left to ask about."""
        kept = _share(self.keep, num_patches)
        if kept < 2:
            raise Refusal(
                f"keep={self.keep:g} of {num_patches} patches leaves {kept}: at least 2 are needed; raise keep, or use "
                "larger images or smaller patches"
            )
        keys = _share(self.context, kept)
        if keys < 1:
            raise Refusal(f"context={self.context:g} of {kept} patches leaves no key: raise context")
        return kept, _share(self.position_keep, kept), keys

    def draw(self, rng: Any, num_patches: int) -> dict[str, Any]:
        """Draw one sample's plan: "kept" (K,) patches, rising; "visible" (K,) bool, told their place; "context" (C,)
        rising, which of the K are keys. Only what this spec needs. `rng`: a numpy Generator."""
        kept, visible, keys = self.counts(num_patches)
        drawn = {}
        if self.keep < 1:
            drawn["kept"] = _choose(rng, num_patches, kept)
        if self.position == "partial":
            drawn["visible"] = rng.permutation(kept) < visible
        if self.context < 1:
            drawn["context"] = _choose(rng, kept, keys)
        return drawn

    def plan(self, draws: Mapping[str, Tensor] | None = None) -> "TokenPlan":
        """The plan of a batch, from its stacked draws."""
        return TokenPlan(self.position, **(draws or {}))


def _share(share: float, count: int) -> int:
    return int(count * share + 1e-9)  # 0.29 * 100 is 28.999999999999996


def _choose(rng: Any, count: int, some: int) -> Any:
    chosen = rng.permutation(count)[:some]
    chosen.sort()
    return chosen


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """Plan that was drawn for a batch; a field that is None concerns every patch."""

    position: str = "full"
    kept: Tensor | None = None  # (B, K) row-major indices of the patches that enter the encoder
    visible: Tensor | None = None  # (B, K) bool; with position "partial": which keep their position embedding
    context: Tensor | None = None  # (B, C) which of the K patches are keys and values

    @property
    def whole(self) -> bool:
        """Whether every patch is there, is a key, and is treated like every other."""
        return self.kept is None and self.visible is None and self.context is None
