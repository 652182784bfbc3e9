"""How a task's weights are changed: parameter groups, rates, and the clipping of gradients."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from timm.models import group_parameters
from torch import Tensor, nn

from ..errors import Refusal

STAND_INS = {"mask_token", "hidden_position"}  # for an embedding that is not shown; `pretrain.objectives` have them
TOKENS = {"pos_embed", "cls_token", "dist_token", "reg_token", *STAND_INS}
NO_DECAY = {"relative_position_bias_table", "filters"}  # of Swin; of a stem, whose answers a threshold meets
EMBEDDINGS = ("pos_embed", "_token", "rel_pos_bias")
STEM = ("patch_embed", "norm_pre", "rel_pos_bias", "stem")  # what a model does before its first block
TOP = ("norm.", "fc_norm.", "head", "aux_head", "attn_pool.")  # and after its last one
ClipBy = Literal["global", "per_tensor"]
MOST_SKIPPED = 50  # steps in a row that are not finite, before a run gives up; fp16's scale needs a dozen


@dataclass
class Optimization:
    """How the weights of a task are changed at each step."""

    optimizer: Any
    rate: Callable[[int], float]  # learning rate of a 0-based step; a group multiplies it by its lr_scale
    decay: Callable[[int], float] | None = None  # weight decay of a 0-based step, of groups that decay; None: constant
    accumulate: int = 1  # parts of a step
    clip: float = 0.0  # see `clip_gradients`
    clip_by: ClipBy = "global"
    most_skipped: int = MOST_SKIPPED

    def set_rates(self, step: int) -> None:
        """Give every group its learning rate and weight decay of `step`, from 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step - 1) * group["lr_scale"]
            if self.decay is not None and group["decays"]:
                group["weight_decay"] = self.decay(step - 1)

    def clip_gradients(self, accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Clip the gradients in place; returns their common norm before that, ()."""
        return clip_gradients(accelerator, parameters, self.clip, self.clip_by)


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    layer_decay: float | None = None,
    patch_embed: float = 1.0,
    decay_tokens: bool = False,
) -> list[dict[str, Any]]:
    """AdamW groups of the trained parameters: {"params", "weight_decay", "decays", "lr_scale"}.

    No decay on biases, norms and other 1-D parameters, nor (unless `decay_tokens`) on position embeddings and tokens
    (timm's own `no_weight_decay` misses NesT's). With `layer_decay`, a layer's rate is scaled by layer_decay ** (layers
    above it) (BEiT, arXiv 2106.08254); the rate of the patch embedding also by `patch_embed` (DINOv2: 0.2).

    `decay_tokens`: position embeddings and tokens are treated as matrices, which they are in the code of DINO, DINOv2,
    iBOT and DropPos, where only what has one dimension is spared; a mask token is then of the lowest layer.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    layers = layer_ids(module) if layer_decay is not None else {}
    if decay_tokens:
        layers |= {name: 0 for name in layers if not STAND_INS.isdisjoint(name.split("."))}
    top = max(layers.values(), default=0)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = set(name.split("."))
        kept = not decay_tokens if parts & TOKENS else parameter.ndim <= 1 or bool(parts & NO_DECAY)
        scale = 1.0 if layer_decay is None else layer_decay ** (top - layers[name])
        scale *= patch_embed if "patch_embed" in parts else 1.0
        decay = 0.0 if kept else weight_decay
        group = groups.setdefault(
            (kept, scale), {"params": [], "weight_decay": decay, "decays": not kept, "lr_scale": scale}
        )
        group["params"].append(parameter)
    return list(groups.values())


def layer_ids(module: nn.Module) -> dict[str, int]:
    """Layer of every parameter of a module that holds one timm model: 0 for the stem and embeddings, i + 1 for block i,
    depth + 1 for everything else (final norm and heads), as in MAE's finetuning.

    timm's own matchers number the blocks only: what one of them does not know (registers, before timm 1.0.28) would be
    a layer above the last block, and every block slower by one more step of the decay. Raises Refusal for an
    architecture of which it has none.
    """
    known_to_timm = [(name, part) for name, part in module.named_modules() if hasattr(part, "group_matcher")]
    if not known_to_timm:  # PiT
        raise Refusal(
            "layer_decay: timm does not say which layers this architecture has; leave it out, or choose another"
        )
    prefix, model = known_to_timm[0]
    prefix = f"{prefix}." if prefix else ""
    inside = [name for name, _ in model.named_parameters()]
    stem = {name for name in inside if name.startswith(STEM) or (name.endswith(EMBEDDINGS) and "." not in name)}
    top = {name for name in inside if name.startswith(TOP)}
    matcher: Any = model.group_matcher(coarse=False)  # type: ignore[operator]
    if not callable(matcher):  # CaiT's is
        matcher = matcher | {"stem": "|".join(re.escape(name) + "$" for name in sorted(stem)) or "$^"}
    groups: dict[int, list[str]] = group_parameters(model, matcher)  # type: ignore[assignment]
    of_blocks = {layer: [name for name in names if name not in stem | top] for layer, names in groups.items()}
    numbered = enumerate((names for _, names in sorted(of_blocks.items()) if names), 1)
    known = dict.fromkeys(stem, 0) | {name: layer for layer, names in numbered for name in names}
    rest = max(known.values()) + 1
    return {
        name: known.get(name.removeprefix(prefix), rest) if name.startswith(prefix) else rest
        for name, _ in module.named_parameters()
    }


def clip_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter], most: float, by: str) -> Tensor:
    """Scale gradients down in place; returns the norm of them all as it was, (), without waiting for the device.

    `by` "global": all alike, so that their common norm is at most `most`; "per_tensor": each parameter on its own, as
    DINO's released code does (arXiv 2104.14294). The two are different algorithms. 0 as `most` does not clip.
    """
    if by == "global":
        return accelerator.clip_grad_norm_(parameters, most or math.inf)  # type: ignore[arg-type, return-value]
    accelerator.unscale_gradients()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if most:
        shares = (most / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(shares.unbind()))
    return torch.linalg.vector_norm(norms)
