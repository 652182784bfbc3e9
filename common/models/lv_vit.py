"""LV-ViT: a vision transformer whose every token is classified (Token Labeling, arXiv 2104.10858).

A convolutional stem of stride 16, narrow blocks, branches divided by `skip_lam`, and beside `head` on the class token
an `aux_head` on the patches. Parameters have the published names. Letters: B images, N = h*w patches, D width, C
classes.
"""

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..batches.mixing import NO_BOX, Box, mix_box, swap_box
from ..errors import Refusal
from .embeddings import resize_embedding
from .names import described, register

_logger = logging.getLogger(__name__)

STRIDE = 16  # of the stem, in pixels: one token


# ---------------------------------------------------------------------------- the parts


class Stem(PatchEmbed):
    """Three convolutions at stride 2 and a projection at stride 8: images (B, 3, 16h, 16w) to tokens (B, N, D), or
    in timm's other output formats. Raises Refusal for a patch size other than 16 or an image size it does not divide.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = STRIDE,
        in_chans: int = 3,
        embed_dim: int = 384,
        width: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, STRIDE, in_chans, embed_dim, **kwargs)
        self.check(img_size, patch_size)
        dd = {name: kwargs.get(name) for name in ("device", "dtype")}
        for i, channels in enumerate((in_chans, width, width), 1):
            size, stride = (7, 2) if i == 1 else (3, 1)
            conv = nn.Conv2d(channels, width, size, stride, size // 2, bias=False, **dd)  # type: ignore[arg-type]
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(width, **dd))  # type: ignore[arg-type]
        self.proj = nn.Conv2d(width, embed_dim, STRIDE // 2, STRIDE // 2, bias=kwargs.get("bias", True), **dd)  # type: ignore[arg-type]

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the image size, as timm's method does. Raises Refusal as the constructor does."""
        self.check(img_size, patch_size)
        super().set_input_size(img_size)

    @staticmethod
    def check(img_size: Any, patch_size: Any) -> None:
        """Raises Refusal for a size that this stem cannot take."""
        if patch_size is not None and patch_size not in (STRIDE, (STRIDE, STRIDE), [STRIDE, STRIDE]):
            raise Refusal(f"patch_size={patch_size}: this stem's stride is {STRIDE}; leave patch_size out")
        sides = (img_size,) if isinstance(img_size, int) else tuple(img_size or ())
        if any(side < STRIDE or side % STRIDE for side in sides):
            below = "x".join(str(max(1, side // STRIDE) * STRIDE) for side in sides)
            raise Refusal(
                f"img_size={img_size}: expected multiples of the stem's stride, {STRIDE} pixels, such as {below}"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Embed images as (B, N, D), or in the form of `output_fmt`."""
        size = tuple(images.shape[-2:])
        full = tuple(side * STRIDE for side in self.dynamic_feat_size((size[0], size[1])))
        if self.strict_img_size and size != tuple(self.img_size):
            raise ValueError(f"images of {size} pixels: the model was built for {tuple(self.img_size)}")
        if full != size:
            if not self.dynamic_img_pad:
                raise ValueError(f"images of {size} pixels: expected multiples of {STRIDE}")
            images = F.pad(images, (0, full[1] - size[1], 0, full[0] - size[0]))
        images = images.contiguous(memory_format=torch.channels_last)  # half the time on a CPU, and tokens need no copy
        for i in (1, 2, 3):
            images = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(images)), inplace=True)
        tokens = self.proj(images).permute(0, 2, 3, 1)  # (B, h, w, D)
        if self.flatten or self.output_fmt == "NLC":
            return self.norm(tokens.flatten(1, 2))
        return self.norm(tokens if self.output_fmt == "NHWC" else tokens.permute(0, 3, 1, 2))


class Scale(nn.Module):
    """A fixed factor, where timm's blocks have their learned LayerScale: 1/skip_lam."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the factor."""
        return x * self.factor

    def extra_repr(self) -> str:
        """For print."""
        return f"{self.factor:g}"


# ---------------------------------------------------------------------------- the model


def draw_box(grid: tuple[int, int]) -> Box:
    """One box for a batch: lam ~ Beta(1, 1), which is uniform, and a centre uniform on `grid` (h, w), from torch's
    default generator."""
    lam = torch.rand((), dtype=torch.float64).item()
    row, column = (int(torch.randint(side, ())) for side in grid)
    return mix_box(grid, lam, (row, column))


USUAL: dict[str, Any] = {  # arguments of timm's; those of LV-ViT-S
    "embed_dim": 384,
    "depth": 16,
    "num_heads": 6,
    "mlp_ratio": 3.0,
    "qkv_bias": False,
    "norm_layer": partial(nn.LayerNorm, eps=1e-5),
}


class LvVit(VisionTransformer):
    """LV-ViT as a timm VisionTransformer, whose arguments it takes; any image size that is a multiple of 16.

    In training, with `return_dense` and classes: (logits (B, C), logits of the patches (B, N, C), box), where `box` is
    the tokens that MixToken exchanged, in `mix_box`'s order. `forward(images, box=...)` chooses it (NO_BOX: none);
    otherwise it is drawn if `mix_token`. The patches' logits have been put back: they belong to their own image.
    Otherwise: (B, C), which in eval is head + max over the patches of aux_head / 2. Without classes: pooled features.

    `aux_head` begins at zero. So it adds nothing in eval until it has been trained or loaded: published finetuning to
    new classes without dense targets adds the maximum of random numbers. Its first gradient is not zero.

    Raises Refusal for `mix_token` without `return_dense` and for options that take patches away.
    """

    dense_share = 0.5  # of the patches' largest logit that joins those of the class token in eval

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = STRIDE,
        *,
        skip_lam: float = 2.0,
        stem_width: int = 64,
        return_dense: bool = True,
        mix_token: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """skip_lam: every branch is divided by it. mix_token: None is `return_dense`. kwargs: timm's, such as
        drop_path_rate (linear from 0), attn_drop_rate, proj_drop_rate, dynamic_img_size (see USUAL)."""
        if mix_token and not return_dense:
            raise Refusal("mix_token=True needs return_dense=True: nothing else has dense logits to put back")
        if not skip_lam > 0:
            raise Refusal(f"skip_lam={skip_lam}: expected what branches are divided by, above 0")
        for name in ("patch_drop_rate", "reg_tokens", "init_values"):
            if kwargs.get(name):
                raise Refusal(f"{name}={kwargs[name]}: not for LV-ViT and SP-ViT; leave it out")
        if kwargs.get("class_token") is False:
            raise Refusal("class_token=False: LV-ViT and SP-ViT have one; leave it out")
        weight_init = kwargs.pop("weight_init", "")
        super().__init__(
            img_size, patch_size, embed_layer=partial(Stem, width=stem_width), weight_init="skip", **USUAL | kwargs
        )
        self.return_dense = return_dense
        self.mix_token = return_dense if mix_token is None else mix_token
        self.aux_head = self._aux_head()
        for block in self.blocks if skip_lam != 1 else ():
            block.ls1, block.ls2 = Scale(1 / skip_lam), Scale(1 / skip_lam)
        self.weight_init_mode = ""
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _aux_head(self) -> nn.Linear | None:
        if not self.return_dense or self.num_classes < 1:
            return None
        like: Any = self.cls_token
        head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype).train(self.training)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as published: linear layers, class token and position embedding from a normal distribution
        (deviation 0.02, cut off at 2), biases and `aux_head` 0, other layers as torch does (`needs_reset`: again)."""
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
            if isinstance(module, nn.Linear):
                _init_linear(module)
        for tensor in (self.cls_token, self.pos_embed):
            if tensor is not None:
                trunc_normal_(tensor, std=0.02)
        if self.aux_head is not None:
            nn.init.zeros_(self.aux_head.weight)

    def no_weight_decay(self) -> set[str]:
        """Parameters of more than one dimension that are not decayed."""
        return {"pos_embed", "cls_token"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads: `head` freshly drawn, `aux_head` at zero; both are removed for num_classes=0."""
        super().reset_classifier(num_classes, global_pool)
        if isinstance(self.head, nn.Linear):
            _init_linear(self.head.to(self.patch_embed.proj.weight))  # timm 1.0.20 makes it in float32, on the CPU
        self.aux_head = self._aux_head()

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the image size; the position embedding is resized as the authors resize it."""
        old = self.patch_embed.grid_size
        embedding, self.pos_embed = self.pos_embed, None
        try:  # without it: timm would resize with antialiasing
            super().set_input_size(img_size, patch_size)
        finally:
            self.pos_embed = embedding
        new = self.patch_embed.grid_size
        if embedding is not None and old != new:
            resized = resize_embedding(embedding.data, old, new)
            self.pos_embed = nn.Parameter(resized, requires_grad=embedding.requires_grad)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Grid (h, w) of the tokens of images (B, 3, H, W)."""
        return self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """Embedding (1, N, D), with the class token's entry first where it has one; resized if `grid` is not the
        model's."""
        embedding: Any = self.pos_embed
        return resize_embedding(embedding, self.patch_embed.grid_size, grid)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """timm's hook: patches (B, N, D) or (B, h, w, D) to (B, 1+N, D) with the class token and position embedding."""
        tokens = x.flatten(1, -2)
        token: Any = self.cls_token
        cls = token.expand(tokens.shape[0], -1, -1)
        if self.pos_embed is None:
            return self.pos_drop(torch.cat([cls, tokens], 1))
        embedding = self.position_embedding((x.shape[1], x.shape[2]) if x.ndim == 4 else self.patch_embed.grid_size)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([cls, tokens + embedding], 1))
        return self.pos_drop(torch.cat([cls, tokens], 1) + embedding)

    def forward_features(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False, box: Box = NO_BOX) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, 1+N, D) after the final norm, class token first. Masks as timm's.

        `box`: the tokens that are exchanged between neighbours in the batch after the stem, as `swap_box` does.
        """
        tokens = swap_box(self.patch_embed(x), self.grid_of(x), box)
        tokens = self.norm_pre(self._pos_embed(tokens))
        masks = {"attn_mask": attn_mask} if attn_mask is not None else {}
        if is_causal:
            masks["is_causal"] = True
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False, **masks)
            else:
                tokens = block(tokens, **masks)
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, 1+N, D) of `forward_features` to logits (B, C), in eval with half the patches' maximum added; or
        to pooled features (B, D)."""
        logits = super().forward_head(x, pre_logits)
        if self.training or pre_logits or self.aux_head is None or not self.global_pool:
            return logits
        return logits + self.dense_share * self.aux_head(x[:, 1:]).amax(1)

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Any = None, is_causal: bool = False, box: Box | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Box]:
        """Images (B, 3, H, W) to what the class says. Raises ValueError for a `box` where nothing is mixed."""
        if not self.training or self.aux_head is None:
            if box is not None:
                raise ValueError("a box of tokens to exchange goes with training, return_dense=True and classes")
            return self.forward_head(self.forward_features(x, attn_mask, is_causal))
        grid = self.grid_of(x)
        if box is None:
            box = draw_box(grid) if self.mix_token else NO_BOX
        tokens = self.forward_features(x, attn_mask, is_causal, box)
        return self.forward_head(tokens), swap_box(self.aux_head(tokens[:, 1:]), grid, box), box


def _init_linear(module: nn.Linear) -> None:
    trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------- files


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: Any, old_grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Convert a published file's state dict for `model`, an LvVit or SpVit: unwrapped, its position embedding at the
    model's size (bicubic; said in the log), without the auxiliary head if the model has none.

    `old_grid` (h, w): of the file; None finds it where it is the model's or a square. Raises Refusal where it cannot,
    or where one of the two has an entry for the class token and the other has not.
    """
    state: Mapping[str, Any] = state_dict
    for wrapper in ("state_dict", "model"):
        inner = state.get(wrapper)
        state = inner if isinstance(inner, Mapping) else state
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if model.aux_head is None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("aux_head.")}
    embedding = state.get("pos_embed")
    if embedding is None or model.pos_embed is None:
        return state
    grid = tuple(model.patch_embed.grid_size)
    prefix = 0 if model.no_embed_class else 1
    old = old_grid or _grid_of(embedding.shape[1], prefix, grid)
    if old is None or old[0] * old[1] + prefix != embedding.shape[1]:
        raise Refusal(
            f"pos_embed of the file has {embedding.shape[1]} entries: not {old or 'a square grid'} with {prefix} for "
            "the class token, as this model has (SP-ViT: 1 with local_blocks=0, else 0); give old_grid, or build the "
            "model with the file's local_blocks"
        )
    state["pos_embed"] = resize_embedding(embedding, old, grid)
    if old != grid:
        _logger.info(f"pos_embed: resized from {old[0]}x{old[1]} to {grid[0]}x{grid[1]} patches, bicubic")
    return state


def _grid_of(entries: int, prefix: int, grid: tuple[int, ...]) -> tuple[int, int] | None:
    if entries == grid[0] * grid[1] + prefix:
        return grid[0], grid[1]
    side = math.isqrt(max(entries - prefix, 0))
    return (side, side) if side and side * side + prefix == entries else None


# ---------------------------------------------------------------------------- the names


described_as = partial(described, first_conv="patch_embed.conv1", classifier=("head", "aux_head"))
T = {"embed_dim": 240, "depth": 12, "num_heads": 4, "skip_lam": 1.0}
M = {"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0}
L = {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "stem_width": 128}
default_cfgs = generate_default_cfgs(
    {name: described_as(1.0 if name[-1] in "ml" else 0.9) for name in ("lvvit_t", "lvvit_s", "lvvit_m", "lvvit_l")}
)
for _size, _usual, _millions in (("t", T, "8.5"), ("s", {}, "26.2"), ("m", M, "55.8"), ("l", L, "150")):
    _doc = f"LV-ViT-{_size.upper()}, {_millions} M parameters."
    register(__name__, f"lvvit_{_size}", _doc, LvVit, _usual, checkpoint_filter_fn)
