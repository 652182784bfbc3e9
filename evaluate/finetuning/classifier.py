"""A backbone with a linear layer on top.

Letters: B images, D width, K classes.
"""

from torch import Tensor, nn

from common.errors import Refusal
from common.models import Backbone


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
        """Classify uint8 (B, C, H, W): logits (B, K), float32."""
        return self.head(self.backbone(images).pooled(self.pooling)).float()
