"""Named views of an image: the options by which crops are cut and coloured, and published values for them.

PRESETS holds the multi-crop views of DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ..errors import Refusal
from ..limits import Count, NotNegative, Probability, Range, Shares, check

FIRST_VIEW = "global"  # which every recipe has; its crops need no purpose (see `sampler.generator`)
Interpolation = Literal["bicubic", "bilinear"]
Chances = Annotated[Any, Range(at_least=0, at_most=1)]  # a probability, or a list of them


@dataclass
class View:
    """One named view in a recipe: how crops are cut out of an image, and how their colours are changed."""

    size: Any = 224
    """Pixels of the view: one number, or [height, width]."""
    preset: Literal["dino", "dinov2"] | None = None
    """The published values for the view of this name, `global` or `local`, wherever the recipe and
    the command line say nothing. Its blur_sigma is meant for its own size (224, 96) and scaled to any other."""
    count: Count = 1
    """Crops of each image. Those after the first leave the first as it is."""
    scale: Shares = field(default_factory=lambda: [0.4, 1.0])
    """Smallest and largest share of the image's area in a crop. A positional label means "where in this crop": with
    small crops the same object part appears under every label, so the default keeps most of the image."""
    ratio: Annotated[list[float], Range(above=0, length=2, rising=True)] = field(default_factory=lambda: [0.75, 4 / 3])
    """Narrowest and widest width:height of a crop before it is stretched to the size."""
    flip: Probability = 0.0
    """Probability of a horizontal flip. 0 because a flip makes left and right ambiguous for positional labels."""
    brightness: Probability = 0.3
    """Brightness is multiplied by 1 ± this. Colour changes are on, mildly: they spoil shortcuts such as vignetting and
    chromatic aberration, which tell a patch's position without its content."""
    contrast: Probability = 0.3
    """Contrast is multiplied by 1 ± this."""
    saturation: Probability = 0.3
    """Saturation is multiplied by 1 ± this."""
    hue: Annotated[float, Range(at_least=0, at_most=0.5)] = 0.05
    """Hue is turned by at most this share of the colour circle, either way."""
    jitter: Probability = 0.8
    """Probability that brightness, contrast, saturation and hue change at all."""
    grayscale: Probability = 0.1
    """Probability that colour is removed."""
    blur: Chances = 0.0
    """Probability of a Gaussian blur: one number, or a list with one per crop."""
    blur_sigma: Annotated[list[float], Range(above=0, at_most=100, length=2, rising=True)] = field(
        default_factory=lambda: [0.1, 2.0]
    )
    """Smallest and largest standard deviation of the blur, in pixels of the view (after it got its size): what suits
    224 pixels wipes out 28."""
    solarise: Chances = 0.0
    """Probability that values of 128 and more are inverted: one number, or a list with one per crop."""
    interpolation: Interpolation = "bicubic"
    """How pixels are resized, antialiased either way."""

    auto_augment: str | None = None
    """A policy in timm's notation, after all of the above: rand-m9-mstd0.5-inc1 (RandAugment; DeiT, Swin), original or
    v0 (AutoAugment), augmix-m3-w3, 3a (3-Augment; DeiT III); null is none."""

    patch: Any = None
    """Pixels of a patch's side, one number or [height, width], for the four options below; null: the backbone's."""
    gap: Annotated[int, Range(at_least=0, at_most=256)] = 0
    """Pixels left out between neighbouring patches: after all of the above the crop has cells of patch + gap pixels,
    and of each one patch is kept. What continues across a border tells who is whose neighbour, without any content
    (arXiv 1505.05192, 1603.09246). Evaluations have no gap."""
    patch_at: Literal["random", "centre"] = "random"
    """Where in its cell a patch lies: anywhere, drawn for each, so that 0 to twice the gap is left out; or centre."""
    patch_jitter: Probability = 0.0
    """Brightness, then contrast, of each patch are multiplied by factors of its own, 1 ± this: neighbours do not have
    their light in common."""
    patch_drop_colour: Probability = 0.0
    """Probability, for each patch, that two of its three channels become noise about the recipe's mean, of a hundredth
    of the third's deviation (colour dropping, arXiv 1505.05192): chromatic aberration tells a patch's place."""

    erasing: Probability = 0.0
    """Probability that a box of the crop becomes noise, last of all (random erasing; DeiT: 0.25)."""
    mixup: NotNegative = 0.0
    """Alpha of mixup, in which images are blended with their neighbours in the batch, and so are their labels (DeiT:
    0.8); 0 is off. Of views with one crop."""
    cutmix: NotNegative = 0.0
    """Alpha of CutMix, which pastes a box of the neighbour (DeiT: 1.0); 0 is off."""
    mix: Probability = 1.0
    """Probability that images are mixed at all, where mixup or cutmix is on."""
    switch: Probability = 0.5
    """Probability of CutMix where both are on."""
    mix_by: Literal["batch", "pair", "element"] = "batch"
    """Who shares a draw: all images of a step (batch), two partners (pair), or nobody (element)."""
    mix_token: NotNegative = 0.0
    """Alpha of MixToken, in which the neighbour's patches are put in place of a box of the image's, after the patch
    embedding and in place of mixup and CutMix (LV-ViT: 1.0); 0 is off. Of plain ViTs, LV-ViT and SP-ViT."""

    @property
    def by_patch(self) -> bool:
        """Whether anything is done to its patches one by one."""
        return max(self.gap, self.patch_jitter, self.patch_drop_colour) > 0

    @property
    def cut_size(self) -> tuple[int, int]:
        """Height and width of its crops before patches are cut out of them: the size, and the gaps."""
        height, width = height_width(self.size)
        if not self.gap:
            return height, width
        patch_height, patch_width = height_width(self.patch, "patch")
        return height + height // patch_height * self.gap, width + width // patch_width * self.gap

    @property
    def is_mixed(self) -> bool:
        """Whether its images are mixed with each other."""
        return max(self.mixup, self.cutmix, self.mix_token) > 0 and self.mix > 0

    def __post_init__(self) -> None:
        """Raises Refusal that names the field when a value is impossible."""
        check(self, "view: ")
        size = height_width(self.size)
        if self.patch is not None:
            patch = height_width(self.patch, "patch", " (or null)")
            if size[0] % patch[0] or size[1] % patch[1]:
                raise Refusal(
                    f"view: size={self.size} is no multiple of patch={self.patch}: expected whole patches; "
                    "choose another size, or patch=null"
                )
        by = f"mixup={self.mixup} and cutmix={self.cutmix}"
        if self.mix_token > 0 and (self.mixup > 0 or self.cutmix > 0 or self.mix_by != "batch"):
            raise Refusal(
                f"view: mix_token={self.mix_token} stands in place of mixup and CutMix, once a step: expected "
                f"mixup=0, cutmix=0 and mix_by=batch, and here are {by}, mix_by={self.mix_by}"
            )
        if self.is_mixed and self.count != 1:
            by = f"mix_token={self.mix_token}" if self.mix_token > 0 else by
            raise Refusal(f"view: {by} need count=1, and count={self.count}")
        for name, chances in (("blur", self.blur), ("solarise", self.solarise)):
            if hasattr(chances, "__iter__") and len(chances) != self.count:
                raise Refusal(
                    f"view: {name}={chances}: expected a probability, or a list of one per crop, count={self.count}"
                )


def height_width(size: Any, name: str = "size", otherwise: str = "") -> tuple[int, int]:
    """Return (height, width) from one number or a pair of them. Raises Refusal unless both are whole and positive."""
    pair = (size, size) if isinstance(size, int) else tuple(size) if hasattr(size, "__iter__") else ()
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise Refusal(f"view: {name}={size}: expected a positive whole number of pixels, or [height, width]{otherwise}")
    return pair[0], pair[1]


# Patches of 14 pixels need local crops of 98; without local crops DINO's authors set the global scale to [0.14, 1].
SHARED: dict[str, Any] = {
    "flip": 0.5, "jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale": 0.2,
    "blur_sigma": [0.1, 2.0], "ratio": [0.75, 4 / 3], "interpolation": "bicubic",
}  # fmt: skip
GLOBAL: dict[str, Any] = SHARED | {"count": 2, "size": 224, "blur": [1.0, 0.1], "solarise": [0.0, 0.2]}
LOCAL: dict[str, Any] = SHARED | {"count": 8, "size": 96, "blur": 0.5, "solarise": 0.0}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "dino": {"global": GLOBAL | {"scale": [0.4, 1.0]}, "local": LOCAL | {"scale": [0.05, 0.4]}},
    "dinov2": {"global": GLOBAL | {"scale": [0.32, 1.0]}, "local": LOCAL | {"scale": [0.05, 0.32]}},
}


def presets(views: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return {name of a view: the values of its preset} for the given views that name a preset.

    A preset is fitted to the given count and size: lists with one number per crop are cut off, or end in repetitions of
    their last; sigma keeps its ratio to the (shorter) side. Raises Refusal for a name that the preset has not.
    """
    values_of: dict[str, dict[str, Any]] = {}
    for name, given in views.items():
        preset = (given or {}).get("preset")
        if preset is None:
            continue
        named = PRESETS[preset]
        if name not in named:
            raise Refusal(f"views.{name}: preset={preset} has no view of that name: expected {' or '.join(named)}")
        values = dict(named[name])
        if "count" in given:
            for key in ("blur", "solarise"):
                if isinstance(values[key], list):
                    values[key] = [values[key][min(crop, len(values[key]) - 1)] for crop in range(given["count"])]
        if "size" in given:
            zoom = min(height_width(given["size"])) / values["size"]
            values["blur_sigma"] = [round(sigma * zoom, 5) for sigma in values["blur_sigma"]]
        values_of[name] = {key: list(value) if isinstance(value, list) else value for key, value in values.items()}
    return values_of
