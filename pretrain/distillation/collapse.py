"""The collapse light: what the statistics of self-distillation say of its health, and what to try.

The loss by itself tells little. It rises in healthy runs, and falls where the teacher says the same of every image.
"""

import math
from collections.abc import Mapping

from pretrain.objectives import Verdict

HEALTHY = Verdict("healthy")
UNIFORM = Verdict(
    "uniform collapse (loss pinned at ln K)",
    "the teacher calls all prototypes equally likely: lower teacher_temperature, lower the learning rate, use "
    "last_layer=normed and freeze it for longer (freeze_last_layer), or use centering=sinkhorn",
)
ONE_PROTOTYPE = Verdict(
    "one prototype",
    "the teacher gives all images the same prototype or two: use centering=sinkhorn, lower centre_momentum, raise "
    "teacher_temperature, or lower the learning rate",
)
DIMENSIONAL = Verdict(
    "dimensional",
    "all images lie along a line of the feature space, or at a point: lower the learning rate or warm up for longer, "
    "add koleo, or use a larger batch",
)

# Nats. A healthy run may pass ln K with its loss, but then teacher and student disagree about something: a small ViT
# had a teacher 0.4 below ln K; with a teacher temperature of 1 the same fell below this after 40 steps, and stayed. A
# teacher this close says nothing, whatever the loss; nor does a student, if the loss is pinned too.
PINNED = 1e-3
# Prototypes that the images of a batch share evenly. The same ViT used 900 of 1,024, 2.9 without centring, and with a
# teacher temperature of 0.02 it passed through 4.8 before its centre had moved, and recovered.
FEW_PROTOTYPES = 3.5
# Dimensions, by RankMe. A point has 1, a line at most 2; the healthy run had 2.6 early on and 7 later (2.5 in a batch
# of 8), one with a thirtyfold learning rate 1.3. More says little: it depends on batch, width and data.
FEW_DIMENSIONS = 2.0
SAME_POINT = 0.01  # feature_std where nearly nothing tells images apart, though noise may fill dimensions; healthy: 0.5
# Shares of the training before which nothing is judged, and features are not: an untrained teacher is sharp before its
# centre has moved, and the features of an untrained ViT lie close together.
BEFORE, BEFORE_FEATURES = 0.02, 0.1


def judge(numbers: Mapping[str, float], images: int, progress: float) -> Verdict | None:
    """Judge the statistics of a self-distillation, measured over `images` images when `progress` of the training was
    done. `numbers`: loss, uniform, teacher_entropy, marginal_entropy (nats) and, where they are judged too,
    feature_std, rankme and student_entropy, as `dino` names them. None where it is too early, or one of the first four
    is missing or not finite.

    The fewer the images, the less is a few prototypes or dimensions a sign of anything: limits fall with them.
    """
    needed = [numbers.get(name, math.nan) for name in ("loss", "uniform", "teacher_entropy", "marginal_entropy")]
    if progress < BEFORE or not all(map(math.isfinite, needed)):
        return None
    ceiling = numbers["uniform"]
    given_up = abs(numbers["loss"] - ceiling) < PINNED and ceiling - numbers.get("student_entropy", 0.0) < PINNED
    if ceiling - numbers["teacher_entropy"] < PINNED or given_up:
        return UNIFORM
    few = min(FEW_PROTOTYPES, images**0.5 / 2, math.exp(ceiling) / 4)
    if math.exp(min(numbers["marginal_entropy"], ceiling)) < few:
        return ONE_PROTOTYPE
    if progress >= BEFORE_FEATURES:
        along_a_line = numbers.get("rankme", math.inf) < min(FEW_DIMENSIONS, 1 + images / 16)
        if along_a_line or numbers.get("feature_std", math.inf) < SAME_POINT:
            return DIMENSIONAL
    return HEALTHY
