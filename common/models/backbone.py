"""The one adapter over timm: images in, patch tokens and their grid out.

Letters: B images, N = h*w patches, P prefix tokens (class, distillation, registers), D width.
"""

import inspect
import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.nest import Nest
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..batches.mixing import NO_BOX, Box, Mixture, swap_box
from ..errors import Refusal
from ..limits import Share
from ..paths import if_there, path_option
from . import token_plans
from .irpe import RelativeAttention
from .lv_vit import LvVit
from .plan import PlanSpec, TokenPlan
from .sp_vit import SpVit

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
WHOLE = TokenPlan()
CARRIERS = ("relative_position_bias_table", "pos_embed")  # of Swin and BEiT; of NesT, BEiT and EVA
# What tells a token its place in a model that can leave it out from pass to pass, and is frozen where every pass does:
# the position embedding; tables of iRPE; SP-ViT's prior and its convolutions.
POSITIONAL = re.compile(r"pos_embed$|\.rpe_[qkv]\.|\.attn\.(w1\.|w2$|b2$)|\.pos_block\.")


def _is_name(init: str) -> bool:
    """Whether model.init names published weights, and no file."""
    return init.startswith("timm:")


@dataclass
class ModelConfig:
    """The backbone: a timm architecture and how images are put into it. Its input size is that of the `global` view."""

    name: str = "vit_small_patch16_224"
    """Any timm ViT, DeiT, Swin, NesT, BEiT or EVA by its timm name; or deit_*_ctx_* (iRPE), lvvit_*, spvit_*."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, such as {patch_size: 4, embed_dim: 192, depth: 6, drop_path_rate:
    0.1}. Of Swin also swin_conv, swin_bias and swin_merge_last: see common/models/swin.py."""
    irpe: dict[str, Any] | None = None
    """Give a plain ViT or DeiT the relative position encoding iRPE: {on: k|qk|qkv, method: product|euclidean|
    quantization|cross, mode: ctx|bias, shared_head: true, ratio: 1.9}; {} is on qkv by product."""
    stem: dict[str, Any] | None = None
    """Give a plain ViT or DeiT filters inside a patch as patch embedding: {filters: 200, side: 6}; {} is that. They
    begin as whitened patches of the training images, and are trained. null: one linear map of a patch."""
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    """Channel means in [0, 1] that are subtracted from the images; one per input channel."""
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    """Channel standard deviations in [0, 1] that the images are divided by."""
    crop: Share = 0.875
    """Evaluation shows the central `crop` of the short side (ImageNet's habit is 224/256); 1.0 shows all of it."""
    attention: Literal["auto", "fused", "explicit"] = "auto"
    """fused (scaled_dot_product_attention), explicit (matrix products, often faster in bf16 on a CPU), or auto:
    measured."""
    position_embedding: Literal["learned", "sincos"] = "learned"
    """Of plain ViTs: learned, or sincos (fixed 2-D sine-cosine, never trained, as in MAE and DropPos)."""
    init: str | None = field(
        default=None, metadata=path_option(lambda init: init if _is_name(init) else if_there(init))
    )
    """Begin from these weights of the same architecture: timm:NAME, a run folder or a backbone.safetensors, and from
    the classifier beside them where it is of the same classes; other heads are fresh. null: from scratch."""
    weights: str | None = field(default=None, metadata=path_option(if_there))
    """With init=timm:NAME: a local file with those weights, instead of timm's cache or the hub; of a file that holds
    several models FILE::PART, such as FILE::student (default: the teacher, else an average, else the model)."""
    checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the backbone. Pays on GPUs in long runs; on a CPU it mostly costs the compilation."""


@dataclass
class Features:
    """Output of a backbone for B images."""

    tokens: Tensor  # (B, N, D) patches, row-major, final norm applied; (B, K, D) where a plan keeps some
    prefix: Tensor  # (B, P, D) class, distillation, register tokens; P may be 0
    grid: tuple[int, int]  # (h, w), N = h*w
    plan: TokenPlan = WHOLE  # which patches these are, and what they knew of their place
    box: Box = NO_BOX  # patches that were exchanged between neighbours before the blocks

    @property
    def own_tokens(self) -> Tensor:
        """Tokens (B, N, D), where those that were exchanged are back with the image that they show."""
        return swap_box(self.tokens, self.grid, self.box)

    def pooled(self, kind: str = "class") -> Tensor:
        """One vector for each image: the "class" token (B, D), or the mean patch of a backbone without one; the "mean"
        patch (B, D); or "both", side by side (B, 2 D)."""
        if kind == "both":
            return torch.cat([self.pooled("class"), self.pooled("mean")], 1)
        return self.prefix[:, 0] if kind == "class" and self.prefix.shape[1] else self.tokens.mean(1)

    def float(self) -> "Features":
        """The same features in float32."""
        return replace(self, tokens=self.tokens.float(), prefix=self.prefix.float())


class Backbone(nn.Module):
    """Adapter over timm.create_model(name, **kwargs) with one output: `Features`.

    Images are uint8 (normalised here, on the device, in float32) or already normalised floats, (B, C, H, W).
    Plain ViTs choose per pass whether position embeddings are added. Swin, NesT, BEiT and EVA carry position inside
    their blocks, where it can only be on or off for the whole model: see `use_plans`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, config: ModelConfig, size: tuple[int, int]) -> None:
        super().__init__()
        self.model: Any = model
        self.config = config
        self.size = size
        self.register_buffer("mean", torch.tensor(config.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(-1, 1, 1), persistent=False)
        self.plain = isinstance(model, VisionTransformer) and not isinstance(model, LvVit)  # takes every token plan
        self.returns_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters  # type: ignore[arg-type]
        self.width: int = model.num_features  # type: ignore[assignment]
        self.without_position = False  # of Swin, NesT, BEiT and EVA: their encodings were removed for good
        self.has_no_encoding = False  # of those: without an encoding "full" and "none" are the same
        features = self._try(size)
        self.grid, self.num_prefix_tokens = features.grid, features.prefix.shape[1]

    @torch.no_grad()
    def _try(self, size: tuple[int, int]) -> Features:
        """Features of an empty image, in eval mode."""
        was_training = self.training
        try:
            return self.eval()(torch.zeros(1, self.channels, *size, device=self.mean.device))
        finally:
            self.train(was_training)

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        return getattr(self.model, "cls_token", None) is not None

    @property
    def takes_mixture(self) -> bool:
        """Whether its patches can be exchanged between images after the patch embedding (MixToken)."""
        return isinstance(self.model, VisionTransformer)

    @property
    def dense_share(self) -> float:
        """Share of the patches' largest logit that joins those of a classifier: of LV-ViT and SP-ViT."""
        return getattr(self.model, "dense_share", 0.0)

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return len(self.config.mean)

    def forward(
        self,
        images: Tensor,
        plan: TokenPlan | None = None,
        hidden: Tensor | None = None,
        masked: token_plans.Masked | None = None,
        mixture: Mixture | None = None,
    ) -> Features:
        """Final-norm features. `plan=None`: every patch, with position encoding unless `use_plans` removed it.

        `hidden` (D,): stands for the position embeddings that a plan with position "partial" hides. `masked`: (B, N)
        bool and (D,): patches that are not shown, and the mask token in their place; plain ViTs only. `mixture`: of
        MixToken; where `takes_mixture`, and whole grids.
        """
        return self.layers(images, 1, plan, hidden, masked, mixture=mixture)[0]

    def layers(
        self,
        images: Tensor,
        last: int | Sequence[int],
        plan: TokenPlan | None = None,
        hidden: Tensor | None = None,
        masked: token_plans.Masked | None = None,
        norm: bool = True,
        mixture: Mixture | None = None,
    ) -> list[Features]:
        """Features of the `last` blocks (of a hierarchical model: stages), shallowest first; the final norm is applied
        to each of a plain ViT's and, elsewhere, where timm applies it. `last` may also be the blocks themselves, from
        0 and increasing: those above the deepest are not run. norm=False: tokens as the blocks leave them.
        Raises ValueError if there are fewer blocks."""
        plan = plan or TokenPlan("none" if self.without_position else "full")
        if images.dtype == torch.uint8:
            images = self.normalised(images)
        blocks = self._wanted(last) if isinstance(self.model, VisionTransformer) else []
        if not self.plain and (masked is not None or not plan.whole):
            raise ValueError(f"{self.config.name} runs whole grids only, and takes no mask token")
        if mixture is not None and not (self.takes_mixture and plan.kept is None):
            raise ValueError(f"{self.config.name} cannot exchange patches between images under this plan")
        deep: Iterable[tuple[Tensor, int, tuple[int, int]]] = ()
        if isinstance(self.model, SpVit):
            deep = self.model.run(images, blocks, plan.position == "full", norm, mixture)
        elif isinstance(self.model, VisionTransformer):
            P = self.model.num_prefix_tokens
            outputs = token_plans.run(self.model, images, blocks, plan, hidden, masked, norm, mixture)
            deep = ((tokens, P, grid) for tokens, grid in outputs)
        if isinstance(self.model, VisionTransformer):
            return [
                Features(tokens[:, P:], tokens[:, :P], grid, plan, NO_BOX if mixture is None else mixture.tokens(grid))
                for tokens, P, grid in deep
            ]
        if (plan.position == "none") != self.without_position and not self.has_no_encoding:
            raise ValueError(
                f"{self.config.name} was prepared for whole grids "
                f"{'without' if self.without_position else 'with'} position"
            )
        options: dict[str, Any] = {"return_prefix_tokens": True} if self.returns_prefix else {}
        if not isinstance(last, int):
            last, options = list(last), options | {"stop_early": True}
        maps = self.model.forward_intermediates(
            images, indices=last, norm=norm, output_fmt="NCHW", intermediates_only=True, **options
        )
        return [_from_map(plan, *output) if isinstance(output, tuple) else _from_map(plan, output) for output in maps]

    def normalised(self, images: Tensor) -> Tensor:
        """Normalise uint8 images."""
        # one buffer: on a CPU each further pass over the images costs as much as decoding a tenth of them
        return images.float().mul_(1 / (255 * self.std)).sub_(self.mean / self.std)

    def _wanted(self, last: int | Sequence[int]) -> list[int]:
        """Numbers, from 0, of the blocks of a plain ViT that `last` asks for."""
        depth = len(self.model.blocks)
        blocks = list(range(depth - last, depth) if isinstance(last, int) else last)
        if not blocks or blocks[0] < 0 or blocks[-1] >= depth or sorted(set(blocks)) != blocks:
            raise ValueError(f"{self.config.name} has {depth} blocks; {last} were asked for")
        return blocks

    def use_plans(self, plans: Set[PlanSpec]) -> None:
        """Prepare the backbone for the plans that its passes will use, before it is trained.

        A position embedding that no pass adds is frozen, so that no parameter is left without a gradient; so are iRPE's
        tables and SP-ViT's prior and convolutions, which a pass without position does without. The relative
        position bias of Swin and BEiT and the embeddings of NesT, BEiT and EVA are zeroed and frozen, which equals
        their absence; EVA's rotary embedding is withheld. Raises Refusal with the reason where a plan cannot be had.
        """
        positions = {plan.position for plan in plans}
        for plan in plans:
            self._check(plan)
        if positions == {"full"}:
            return
        if isinstance(self.model, VisionTransformer):
            if positions == {"none"}:
                for name, parameter in self.model.named_parameters():
                    if POSITIONAL.search(name):
                        parameter.requires_grad_(False)
            return
        if not isinstance(self.model, (SwinTransformer, Nest, Beit, Eva)):
            raise Refusal(
                f"model {self.config.name!r} ({type(self.model).__name__}) cannot run with position=none: it is known "
                "how to remove position only from timm's VisionTransformer, DeiT, Swin, NesT, BEiT and EVA; choose "
                "one, or position=full (where the objective may then read the answer off the encoding)"
            )
        rope: Any = getattr(self.model, "rope", None)
        carriers = [p for name, p in self.model.named_parameters() if name.endswith(CARRIERS)]
        if not carriers and rope is None:  # a Swin without its bias
            self.has_no_encoding = True
            return
        if positions != {"none"}:
            raise Refusal(
                f"model {self.config.name!r} carries position inside its blocks, so it cannot run with position=none "
                "in one pass and position=full in another: give all objectives the same position"
            )
        for parameter in carriers:
            parameter.data.zero_()
            parameter.requires_grad_(False)
        if rope is not None:  # EVA: a rotation that it is not given is one it does not do
            rope.requires_grad_(False)
            rope.get_embed = lambda *_, **__: None
        self.without_position = True

    def why_not(self, size: tuple[int, int]) -> str | None:
        """Reason why this architecture cannot run on images of `size` (height, width in pixels); None if it can."""
        try:
            self._try(size)
        except Exception as error:  # timm asserts and raises in many ways
            return " ".join(str(error).split())[:200] or type(error).__name__
        return None

    def _check(self, plan: PlanSpec) -> None:
        """Raises Refusal if this architecture, on this grid, cannot run under `plan`."""
        if plan.whole:
            return
        plan.counts(self.grid[0] * self.grid[1])
        what = f"keep={plan.keep:g}" if plan.keep < 1 else f"context={plan.context:g}"
        what = "position=partial" if plan.keep == 1 and plan.position == "partial" else what
        kind = f"model {self.config.name!r} ({type(self.model).__name__})"
        if not self.plain:
            raise Refusal(
                f"{kind} cannot run with {what}: its windows, merging, encodings or stem need the whole grid; use a "
                f"plain ViT or DeiT, or leave {what.split('=')[0]} out"
            )
        if plan.position == "partial" and any(isinstance(module, RelativeAttention) for module in self.model.modules()):
            raise Refusal(
                f"{kind} cannot run with {what}: iRPE tells every pair of patches how they lie; use position=none or "
                "full, or a model without iRPE"
            )
        if plan.position == "partial" and self.model.pos_embed is None:
            raise Refusal(f"{kind} has no position embedding of which position=partial could show a part")
        if plan.context < 1 and (reason := token_plans.without_context(self.model)):
            raise Refusal(f"{kind} cannot run with {what}: {reason}; use a plain ViT or DeiT, or context=1")


def _from_map(plan: TokenPlan, features: Tensor, prefix: Tensor | None = None) -> Features:
    B, D, h, w = features.shape
    tokens = features.flatten(2).transpose(1, 2)
    return Features(tokens, tokens.new_empty(B, 0, D) if prefix is None else prefix, (h, w), plan)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
