"""Classifiers of features: a linear layer on what stands for an image and, of dense ones, another on its patches.

Letters: B images, D width, K classes.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from ..models import Features
from ..numerics import wide

DENSE = ("dense.weight", "dense.bias")  # of the layer on patches


class ClassHead(nn.Linear):
    """Linear layer on pooled features (B, D), or (B, 2 D), drawn by `std`; with `dense`, its layer of that name is on
    patches (B, N, D) and begins at zero, so that it adds nothing until it is trained or loaded."""

    def __init__(self, width: int, classes: int, std: float = 0.02, dense: int | None = None) -> None:
        """dense: width of the patches that are classified too; None: none are."""
        super().__init__(width, classes)
        nn.init.trunc_normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)
        self.dense: nn.Linear | None = None
        if dense is not None:
            self.dense = nn.Linear(dense, classes)
            nn.init.zeros_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, as in a checkpoint's head file."""
        return dict(self.named_parameters())


def class_logits(features: Features, pooling: str, head: Mapping[str, Tensor], dense_share: float = 0.0) -> Tensor:
    """Logits (B, K), float32 or wider, of the classes, from final-norm features.

    head: "weight" (K, D, or 2 D) and "bias" (K,) of the layer on what `pooling` makes of an image and, where patches
    are classified too, those of DENSE. `dense_share` of the largest logit of any patch is added, if it is not 0:
    `Backbone.dense_share`, as LV-ViT and SP-ViT are evaluated (arXiv 2104.10858, its code).
    """
    logits = wide(F.linear(features.pooled(pooling), head["weight"], head["bias"]))
    if dense_share and all(name in head for name in DENSE):
        of_patches = F.linear(features.tokens, *(head[name] for name in DENSE))
        logits = logits + dense_share * wide(of_patches).amax(1)
    return logits
