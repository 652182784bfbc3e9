"""How the models of a file here get their names with timm."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model

from ..errors import Refusal


def described(crop: float, first_conv: str, classifier: str | tuple[str, ...]) -> dict[str, Any]:
    """Describe, in timm's form, a published model that shows the central `crop` of the short side."""
    return {
        "url": "",  # the authors' files are given by pretrained_cfg_overlay={"file": ...}
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": crop,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
    }


def register(
    module: str, name: str, doc: str, make: Any, usual: Mapping[str, Any], convert: Callable[..., Any]
) -> None:
    """Let timm.create_model(name, ...) build make(**usual, ...), as if a function of that name stood in `module`; with
    features_only, a wrapper that returns maps. `convert`: the state dict of a published file."""

    def build(pretrained: bool = False, **kwargs: Any) -> Any:
        given = [kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")]
        cfg = {key: value for each in given if isinstance(each, dict) for key, value in each.items()}
        if pretrained and not (cfg.get("file") or cfg.get("hf_hub_id")):
            raise Refusal(f"timm hosts no weights of {name}: download the authors' file and give checkpoint_path=FILE")
        return build_model_with_cfg(
            make,
            name,
            pretrained,
            pretrained_filter_fn=convert,
            feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
            **{**usual, **kwargs},
        )

    build.__name__ = build.__qualname__ = name
    build.__module__, build.__doc__ = module, doc
    setattr(sys.modules[module], name, register_model(build))  # timm puts the name into its __all__
