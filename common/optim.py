"""Parameter groups, and the one schedule: linear warm-up, then cosine, per optimizer step."""

import math
from typing import Any

from timm.models import group_parameters
from torch import nn

NO_DECAY = {"pos_embed", "cls_token", "dist_token", "reg_token", "mask_token", "relative_position_bias_table"}


def parameter_groups(module: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """AdamW groups of the trained parameters: {"params", "weight_decay", "lr_scale"}.

    No decay on biases, norms and other 1-D parameters, position embeddings and tokens (timm's own `no_weight_decay`
    misses NesT's). With `layer_decay`, a layer's rate is scaled by layer_decay ** (layers above it) (BEiT, arXiv
    2106.08254).
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    layers = layer_ids(module) if layer_decay is not None else {}
    top = max(layers.values(), default=0)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        kept = parameter.ndim <= 1 or not NO_DECAY.isdisjoint(name.split("."))
        scale = 1.0 if layer_decay is None else layer_decay ** (top - layers[name])
        key = (0.0 if kept else weight_decay, scale)
        group = groups.setdefault(key, {"params": [], "weight_decay": key[0], "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def layer_ids(module: nn.Module) -> dict[str, int]:
    """Layer of every parameter of a module that holds one timm model: 0 for the stem and embeddings, i + 1 for block i,
    depth + 1 for everything else (final norm and heads), as in MAE's finetuning."""
    prefix, model = next((name, part) for name, part in module.named_modules() if hasattr(part, "group_matcher"))
    prefix = f"{prefix}." if prefix else ""
    matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
    groups: dict[int, list[str]] = group_parameters(model, matcher)  # type: ignore[arg-type, assignment]
    known = {name: layer for layer, names in groups.items() for name in names}
    rest = max(known.values()) + 1
    return {
        name: rest
        if not name.startswith(prefix) or name[len(prefix) :].startswith(("norm.", "fc_norm.", "head"))
        else known[name[len(prefix) :]]
        for name, _ in module.named_parameters()
    }


def cosine(step: int, steps: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """The value at optimizer step `step` (0-based) of `steps`: linear to `peak` over `warmup` steps, cosine to
    `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
