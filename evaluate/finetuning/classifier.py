"""A backbone with a linear layer on top.

Letters: B images, D width, K classes.
"""

import torch
from torch import Tensor, nn

from common.errors import Refusal
from common.models import Backbone, Features


def pool(features: Features, pooling: str) -> Tensor:
    """One vector for each image: the "class" token (B, D), the "mean" of the patches (B, D), or "both" (B, 2 D)."""
    parts = {"mean": features.tokens.mean(1)}
    if pooling != "mean":
        parts["class"] = features.prefix[:, 0]
    return torch.cat([parts[kind] for kind in ("class", "mean") if pooling in (kind, "both")], 1)


class Classifier(nn.Module):
    """A backbone, its pooled final-norm tokens, and a linear layer."""

    def __init__(self, backbone: Backbone, pooling: str, num_classes: int) -> None:
        super().__init__()
        if pooling != "mean" and not backbone.num_prefix_tokens:
            raise Refusal(f"--pool {pooling}: {backbone.config.name} has no class token; use --pool mean")
        self.backbone, self.pooling = backbone, pooling
        self.head = nn.Linear(backbone.width * (2 if pooling == "both" else 1), num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> logits (B, K), float32."""
        return self.head(pool(self.backbone(images), self.pooling)).float()
