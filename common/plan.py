"""Token plans: what a backbone may know of the positions in one pass.

A plan is declarative and hashable, so that equal passes of different objectives can be run once.
"""

from dataclasses import dataclass

from .errors import Refusal, nearest

POSITIONS = ("none", "full")


@dataclass(frozen=True)
class PlanSpec:
    """One way to run a backbone over the whole grid.

    position: "full" adds whatever position encoding the backbone has; "none" runs it without (MP3, arXiv 2207.07611).
    """

    position: str = "full"

    def __post_init__(self) -> None:
        if self.position not in POSITIONS:
            raise Refusal(
                f"position={self.position!r} is not a way to run a backbone: expected one of {', '.join(POSITIONS)}"
                f"{nearest(str(self.position), POSITIONS)}"
            )
