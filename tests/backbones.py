"""Every backbone that is offered, small: the rows of the matrices in tests/common."""

import re
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from common.models import Backbone, Features, ModelConfig, create
from common.models.backbone import IMAGENET_STD
from common.models.irpe import add_irpe
from common.models.stem import add_stem
from common.models.swin import alter

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
LV = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SP = LV | {"depth": 3, "local_blocks": 2}
SWIN = {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}


@dataclass(frozen=True)
class Row:
    """One backbone, small, and what is known of it without running it."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=lambda: dict(VIT))
    irpe: dict[str, Any] | None = None
    size: tuple[int, int] = (24, 24)
    grid: tuple[int, int] = (3, 3)
    prefix: int = 1
    width: int = 32
    oblong: tuple[tuple[int, int], tuple[int, int]] | None = ((16, 24), (2, 3))  # a size, and its grid
    odd: tuple[tuple[int, int], tuple[int, int]] | None = ((40, 40), (5, 5))
    idle: str = "nothing"  # parameters whose gradient is zero until others have moved
    stem: dict[str, Any] | None = None


PLAIN = "vit_tiny_patch16_224"
DISTILLED = "deit_tiny_distilled_patch16_224"
LV_SIZES = {"size": (48, 48), "oblong": ((32, 48), (2, 3)), "odd": ((80, 80), (5, 5))}
# A new prior is 1 whatever the offset: its last weights w2 are zero, and hide the first from the loss.
UNTIL_W2_MOVES = r"blocks\.[01]\.attn\.w1\.(weight|bias)"
SWIN_SIZES: dict[str, Any] = {
    "size": (32, 32), "grid": (4, 4), "prefix": 0, "oblong": ((32, 48), (4, 6)), "odd": ((40, 40), (5, 5))
}  # fmt: skip
ROWS = {
    "vit": Row(PLAIN),
    "vit, no class token": Row(PLAIN, VIT | {"class_token": False, "global_pool": "avg"}, prefix=0),
    "vit, registers": Row("vit_small_patch14_reg4_dinov2", prefix=5),
    "vit, qk norm": Row(PLAIN, VIT | {"qk_norm": True, "init_values": 0.1}),
    "vit, dynamic": Row(PLAIN, VIT | {"dynamic_img_size": True}),
    "deit, distilled": Row(DISTILLED, prefix=2),
    "beit": Row("beit_base_patch16_224"),
    "eva": Row("eva02_tiny_patch14_224"),
    "swin": Row("swin_tiny_patch4_window7_224", SWIN, **SWIN_SIZES),
    "swin, altered": Row(
        "swin_tiny_patch4_window7_224",
        SWIN | {"swin_conv": True, "swin_bias": False, "swin_merge_last": False},
        **SWIN_SIZES | {"grid": (8, 8), "oblong": ((32, 48), (8, 12)), "odd": ((40, 40), (10, 10))},
    ),
    "nest": Row("nest_tiny", {}, None, (64, 64), (4, 4), 0, 384, oblong=None, odd=((80, 80), (5, 5))),
    "irpe, k": Row("deit_tiny_patch16_224_ctx_product_50_shared_k"),
    "irpe, qkv": Row(PLAIN, irpe={"on": "qkv", "method": "product"}),
    "irpe, cross": Row(PLAIN, irpe={"on": "qkv", "method": "cross", "ratio": 20}),
    "irpe, bias": Row(PLAIN, irpe={"on": "qk", "method": "euclidean", "mode": "bias", "ratio": 20}),
    "irpe, per head": Row(PLAIN, irpe={"on": "qkv", "method": "quantization", "shared_head": False, "ratio": 33}),
    "irpe, distilled": Row(DISTILLED, irpe={"on": "qkv", "method": "product"}, prefix=2),
    "irpe, dynamic": Row(PLAIN, VIT | {"dynamic_img_size": True}, {"on": "qkv", "method": "product"}),
    "irpe, no class token": Row(
        PLAIN, VIT | {"class_token": False, "global_pool": "avg"}, {"on": "k", "method": "product"}, prefix=0
    ),
    "stem": Row(PLAIN, stem={"filters": 12, "side": 6}),
    "lv-vit": Row("lvvit_t", LV, **LV_SIZES),
    "lv-vit, dynamic": Row("lvvit_t", LV | {"dynamic_img_size": True}, **LV_SIZES),
    "sp-vit": Row("spvit_s", SP, **LV_SIZES, idle=UNTIL_W2_MOVES),
    "sp-vit, dynamic": Row("spvit_s", SP | {"dynamic_img_size": True}, **LV_SIZES, idle=UNTIL_W2_MOVES),
    "sp-vit, legacy": Row("spvit_l", SP | {"legacy": True}, **LV_SIZES),
}
IRPE = [name for name in ROWS if name.startswith("irpe")]
LV_AND_SP = [name for name in ROWS if name.startswith(("lv-vit", "sp-vit"))]
WHOLE = [*LV_AND_SP, "swin", "swin, altered", "nest", "beit", "eva"]


def build(name: str, size: tuple[int, int] | None = None, drop_path: float = 0.0, **more: Any) -> Backbone:
    """The row's backbone, freshly initialised; unless asked for nothing in it is random, whatever timm's default."""
    row = ROWS[name]
    if row.irpe is not None:
        more["irpe"] = dict(row.irpe)
    if row.stem is not None:
        more["stem"] = dict(row.stem)
    torch.manual_seed(0)
    kwargs = row.kwargs | {"drop_path_rate": drop_path}
    return create(ModelConfig(row.name, kwargs, **more), size or row.size)


def own(name: str, **kwargs: Any) -> Any:
    """The row's timm model, as timm makes it."""
    row = ROWS[name]
    kwargs = {"img_size": row.size, "num_classes": 5} | row.kwargs | kwargs
    swin = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith("swin_")}
    if row.prefix or "lv" in name:
        kwargs.setdefault("global_pool", "token")
    torch.manual_seed(0)
    model = timm.create_model(row.name, **kwargs)
    if row.irpe is not None:
        add_irpe(model, **row.irpe)
    if row.stem is not None:
        add_stem(model, IMAGENET_STD, **row.stem)
    if swin:
        alter(model, **{key.removeprefix("swin_"): value for key, value in swin.items()})
    return model


def redraw(module: nn.Module, std: float = 0.1) -> Any:
    """Weights drawn so large that nothing hides: much is zero or one when it is new."""
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def pixels(backbone: Backbone, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *backbone.size, generator=generator).to(next(backbone.parameters()).dtype)


def everything(features: Features) -> Tensor:
    """(B, P + N, D)"""
    return torch.cat([features.prefix, features.tokens], 1)


def loss(features: Features) -> Tensor:
    """Of every token; the mean square would tell next to nothing, since the final norm fixes it."""
    tokens = everything(features)
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return (tokens * torch.randn(tokens.shape[1:], generator=torch.Generator().manual_seed(2))).sum(1).mean()


def gradients(backbone: Backbone) -> dict[str, Tensor | None]:
    """Of every trained parameter, by its name in timm's model."""
    backbone.zero_grad()
    loss(backbone(pixels(backbone))).backward()
    return {name: p.grad for name, p in backbone.model.named_parameters() if p.requires_grad}


def without_gradient(found: dict[str, Tensor | None]) -> set[str]:
    """Whose gradient is zero in all its entries. Softmax does not see what is added to all keys: that of k_norm.bias is
    what rounding leaves, and does not count."""
    return {name for name, gradient in found.items() if not gradient.any() and not name.endswith("k_norm.bias")}


def block(model: Any) -> tuple[str, nn.Module]:
    """Name and module of the first block."""
    types = r"(blocks|layers\.0\.blocks|levels\.0\.transformer_encoder)\.0"
    return next((name, module) for name, module in model.named_modules() if re.fullmatch(types, name))
