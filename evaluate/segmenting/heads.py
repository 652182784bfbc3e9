"""Decoders of segmentation: a backbone's tokens in, logits of every class on a map out.

Letters: B images, h x w patches, D width of the backbone, C channels of a decoder, K classes.

UperNet (arXiv 1807.10221) on a vision transformer, as LV-ViT's authors have it (arXiv 2104.10858): all blocks have one
grid, so side layers make a pyramid of four of them, at strides of 4, 8, 16 and again 16 pixels. Behind it stands the
decoder of segmentation-models-pytorch: pooling to 1, 2, 3 and 6 cells a side, 3x3 bottleneck, 1x1 laterals, bilinear
sums from the top (align_corners=False), 3x3 convolutions, all resized to the widest grid, concatenated and fused by
3x3. It differs from the published head, mmsegmentation's, in one thing, and that is undone here: a LayerNorm before
each of the four maps, 2 (3 D + 2048) parameters. What is left has the published number of parameters to the last one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.errors import Refusal
from common.features.extraction import depth
from common.models import Backbone
from common.models.lv_vit import LvVit
from common.models.plan import TokenPlan

CHANNELS = 256  # of the decoder; LV-ViT-L has 512
TOP = 2048  # channels of the last side layer
APART = 3  # blocks of LV-ViT: the last one, and three times the third below


class Linear(nn.Module):
    """DINOv3's linear probe (arXiv 2508.10104) of final-norm tokens: channel dropout, batch norm, 1x1 convolution."""

    normed = True  # which tokens it wants of a block

    def __init__(self, width: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.norm = nn.BatchNorm2d(width)
        self.classifier = _classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Convert [(B, D, h, w)] to {"logits": (B, K, h, w)}, float32."""
        return {"logits": self.classifier(self.norm(self.dropout(maps[-1]))).float()}


class UperNet(nn.Module):
    """Side layers, the decoder of segmentation-models-pytorch, a classifier, and beside them the auxiliary FCN head on
    the third side layer, whose loss the authors weigh 0.4. Raises Refusal if segmentation-models-pytorch is missing."""

    normed = False  # the published backbone has no final norm

    def __init__(self, width: int, num_classes: int, channels: int = CHANNELS, dropout: float = 0.1) -> None:
        super().__init__()
        raised = [
            nn.Sequential(*_unit(nn.ConvTranspose2d(width, width, by, by, bias=False)), *_point(width, width))
            for by in (4, 2)
        ]
        self.side = nn.ModuleList([*raised, nn.Sequential(*_point(width, width)), nn.Sequential(*_point(width, TOP))])
        self.fpn = _pyramid(width, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, num_classes)
        self.auxiliary = nn.Sequential(
            *_unit(nn.Conv2d(width, channels, 3, padding=1, bias=False)),
            nn.Dropout2d(dropout),
            _classifier(channels, num_classes),
        )
        for part in (self.fpn, self.auxiliary[0]):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):  # mmsegmentation's; the side layers have torch's, as published
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Four maps (B, D, h, w), shallowest first -> {"logits": (B, K, 4h, 4w), "auxiliary": (B, K, h, w)}, float32.

        "auxiliary" only in training. Raises Refusal for a single image in training.
        """
        norms = [part for part in self.fpn.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        alone = all(type(norm) is nn.BatchNorm2d for norm in norms)  # others also see the images of other processes
        if self.training and len(maps[0]) == 1 and alone:
            raise Refusal(
                "upernet pools an image to one value per channel, which batch norm cannot train on: 1 image per step, "
                "process and accumulated part was given, and 2 are needed; use a larger --batch, or a smaller "
                "--accumulate"
            )
        levels = [side(level) for side, level in zip(self.side, maps, strict=True)]
        # strides of 1 and 2 pixels come first in its list, and are not read
        fused = self.fpn([levels[0], levels[0], *levels])
        logits = {"logits": self.classifier(self.dropout(fused)).float()}
        return logits | {"auxiliary": self.auxiliary(levels[2]).float()} if self.training else logits


def _unit(convolution: nn.Module) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)]  # type: ignore[arg-type]


def _point(width: int, channels: int) -> list[nn.Module]:
    return _unit(nn.Conv2d(width, channels, 1, bias=False))


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """Convolution 1x1, initialised as in mmsegmentation and DINOv3."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _pyramid(width: int, channels: int) -> nn.Module:
    try:  # here: it takes seconds, and nothing else needs it
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as error:
        raise Refusal(
            f"--head upernet needs segmentation-models-pytorch ({error}): pip install '.[segmentation]', or use "
            "--head linear"
        ) from error
    decoder: Any = UPerNetDecoder([0, 0, width, width, width, TOP], 5, channels)
    decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in decoder.feature_norms)
    return decoder


class Segmenter(nn.Module):
    """A backbone, and a decoder of the tokens of some of its blocks.

    frozen: the backbone stays in eval mode whatever `train` says, runs without gradients, and has none. Otherwise only
    those of its parameters are frozen that the decoder does not see: blocks above the deepest that is asked for, and
    the final norm where it is not; so every trained parameter gets a gradient.
    """

    def __init__(
        self,
        backbone: Backbone,
        decoder: Linear | UperNet,
        blocks: int | Sequence[int] = 1,
        plan: TokenPlan | None = None,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        self.backbone, self.decoder, self.plan, self.frozen = backbone, decoder, plan, frozen
        self.blocks = blocks if isinstance(blocks, int) else list(blocks)
        if frozen:
            backbone.requires_grad_(False).eval()
            return
        model = backbone.model
        above = list(model.blocks)[max(blocks) + 1 :] if not isinstance(blocks, int) else []
        norms = [getattr(model, name, None) for name in ("norm", "fc_norm")] if not decoder.normed else []
        for part in (*above, *norms):
            if part is not None:
                part.requires_grad_(False)

    def train(self, mode: bool = True) -> "Segmenter":
        """Like nn.Module.train, except that a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W), uint8 or normalised, to {"logits": (B, K, h, w)} and, from UperNet in training,
        "auxiliary", each at the decoder's own resolution, float32."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            layers = self.backbone.layers(images, self.blocks, self.plan, norm=self.decoder.normed)
        return self.decoder([layer.tokens.mT.unflatten(2, layer.grid) for layer in layers])


def make(
    head: str,
    backbone: Backbone,
    num_classes: int,
    *,
    plan: TokenPlan | None = None,
    frozen: bool,
    blocks: Sequence[int] | None = None,
    channels: int | None = None,
    dropout: float = 0.1,
) -> Segmenter:
    """Make a segmenter of `num_classes` classes on `backbone`, whose position embedding fits the size of the images.

    `plan`: how the backbone is run; None is every patch with its position. `blocks`, `channels`: of upernet only,
    None for the usual ones (`usual_blocks`; 256). Raises Refusal for blocks the backbone
    does not have, and for a backbone that upernet does not go with.
    """
    if head == "linear":
        for name, value in (("--blocks", blocks), ("--channels", channels)):
            if value is not None:
                raise Refusal(f"{name} {value} goes with --head upernet: a linear head sees the last block")
        return Segmenter(backbone, Linear(backbone.width, num_classes, dropout), 1, plan, frozen)
    chosen = _checked(backbone, blocks)
    decoder = UperNet(backbone.width, num_classes, CHANNELS if channels is None else channels, dropout)
    return Segmenter(backbone, decoder, chosen, plan, frozen)


def usual_blocks(backbone: Backbone) -> list[int]:
    """The four blocks, from 0, whose tokens upernet sees unless told otherwise: of LV-ViT and SP-ViT the last and each
    third below it (S: 6, 9, 12, 15), of others a quarter of the depth apart (12 blocks: 2, 5, 8, 11)."""
    count = depth(backbone)
    if isinstance(backbone.model, LvVit) and count > 3 * APART:
        return [count - 1 - APART * below for below in (3, 2, 1, 0)]
    return [count * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]


def _checked(backbone: Backbone, blocks: Sequence[int] | None) -> list[int]:
    name, model = backbone.config.name, backbone.model
    if not isinstance(model, VisionTransformer) and not backbone.returns_prefix:
        raise Refusal(
            f"--head upernet makes a pyramid of four blocks of one grid, and {name} ({type(model).__name__}) has a "
            "grid for each stage: use --head linear, or a plain ViT, DeiT, BEiT, EVA, LV-ViT or SP-ViT"
        )
    count = depth(backbone)
    if count < 4:
        raise Refusal(f"--head upernet makes a pyramid of four blocks, and {name} has {count}: use --head linear")
    if blocks is None:
        return usual_blocks(backbone)
    numbers = list(blocks)
    if len(numbers) != 4 or sorted(set(numbers)) != numbers or numbers[0] < 0 or numbers[-1] >= count:
        raise Refusal(
            f"--blocks {numbers}: expected four blocks of {name}, increasing, from 0 to {count - 1}, such as "
            f"{usual_blocks(backbone)}"
        )
    return numbers
