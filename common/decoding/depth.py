"""Pictures deeper than 8 bits -> 8 bits: which values are black and white.

8 bits a channel are taken as they are. Otherwise the first of these that applies, and a refusal if none does:

1. `data_range`, an option: LOW is black, HIGH white, what lies beyond is clipped.
2. What the file declares: 12 bits a sample or a least and largest value (TIFF), significant bits (PNG's sBIT), a
   largest value (PNM).
3. Unsigned 16 bits: 0 to 65535 (the upper eight bits are kept), if some value exceeds a quarter of that. Below it may
   as well be 10, 12 or 14 bits.
4. Floats 0 to 1, or 0 to 255 if some value exceeds a quarter of that; integers of 32 bits 0 to 255 likewise.

Signed 8 bits are refused: Pillow gives them no sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from ..errors import Refusal
from .headers import Header

Range = tuple[float, float]  # the values of black and of white

FULL: Range = (0, 65535)
QUARTER = 4  # of the largest value: a picture that stays below may be of fewer bits
ADVICE = "set data_range=LOW:HIGH (--data-range) to the values of black and white"
ADVICE_COLOURS = "write them with 8 bits, or set data_range=65535 if they use all 16"
ROUNDING = 1e-6  # of white: by so much floats may lie outside
STRIP = 1 << 20  # pixels that are converted at once


def parse_range(text: str, option: str = "data_range") -> Range | None:
    """Parse "auto" as None, "4095" as (0, 4095), "-1000:3000" as (-1000, 3000). Raises Refusal for anything else."""
    if text == "auto":
        return None
    low, colon, high = text.rpartition(":")
    try:
        span = (float(low) if colon else 0.0, float(high))
    except ValueError:
        span = (0.0, 0.0)
    if not (np.isfinite(span).all() and span[0] < span[1]):
        raise Refusal(f"{option}={text}: expected auto, the value of white (4095) or those of black and white (-1:1)")
    return span


def is_deep(image: Image.Image) -> bool:
    """Return whether Pillow keeps more than 8 bits of it: one channel of integers or floats."""
    return image.mode.startswith("I") or image.mode == "F"


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield (first row, rows of the picture from there on), of about a million pixels each."""
    rows = max(1, STRIP // max(1, image.width))
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def deep_to_8_bit(image: Image.Image, header: Header, span: Range | None) -> np.ndarray:
    """Convert a deep picture to uint8 (H, W). Raises ValueError, naming its range, if no rule says what is white."""
    low, high = span or range_of(image, header)
    transparent = image.info.get("transparency")
    pixels = np.empty((image.height, image.width), np.uint8)
    for top, part in strips(image):
        values = values_of(part, header)
        if (low, high) == FULL:
            grey = (values.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        else:
            grey = ((values.astype(np.float64) - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)
        if header.inverted:
            grey = 255 - grey
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        pixels[top : top + len(grey)] = grey
    return pixels


def values_of(image: Image.Image, header: Header) -> np.ndarray:
    """Return the values of a deep picture, (H, W); Pillow gives unsigned 32 bits a sign. Raises ValueError for NaN."""
    values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("some of its pixels are NaN or infinite: replace them, or remove the image")
    unsigned = header.kind == "TIFF" and header.unsigned and header.bits == 32 and values.dtype.kind == "i"
    return values.view(np.uint32) if unsigned else values


def range_of(image: Image.Image, header: Header) -> Range:
    """Return the values of black and white in a deep picture. Raises ValueError if nothing says which."""
    least, most, step = np.inf, -np.inf, 0
    for _, part in strips(image):
        values = values_of(part, header)
        least, most = min(least, float(values.min())), max(most, float(values.max()))
        if header.significant:
            step |= int(np.bitwise_or.reduce(values, axis=None))
    floats, short = image.mode == "F", image.mode.startswith("I;16")
    name = f"{'floats' if floats else '16-bit values' if short else 'integers'} from {least:g} to {most:g}"
    declared = declared_range(image, header, most, step)
    if declared is not None:
        if declared[0] <= least and most <= declared[1]:
            return declared
        raise ValueError(f"{name}, but the file declares {declared[0]:g} to {declared[1]:g}: {ADVICE}")
    if least == most == 0:
        return FULL
    usual: list[Range] = [FULL] if short else [(0, 1), (0, 255)] if floats else [(0, 255)]
    for span in usual:
        slack = ROUNDING * span[1] if floats else 0
        if least >= -slack and most <= span[1] + slack and (most > span[1] / QUARTER or span == (0, 1)):
            return span
    raise ValueError(
        f"{name}: expected {' or '.join(f'0 to {high:g}' for _, high in usual)}, with some value above a quarter of "
        f"it, or a declared range; {ADVICE}"
    )


def declared_range(image: Image.Image, header: Header, most: float, bits: int) -> Range | None:
    """Return the range that the file declares; `bits`: those in some value of a PNG with significant bits."""
    if header.kind == "PNG" and header.significant:
        # The standard wants them as the upper ones of 16. Some writers leave them where they were.
        raw = most < 1 << header.significant and bits & ((1 << 16 - header.significant) - 1)
        return (0, (1 << header.significant) - 1) if raw else FULL
    if header.kind == "TIFF" and header.highest is not None and header.highest > (header.lowest or 0):
        return float(header.lowest or 0), float(header.highest)
    if header.kind == "TIFF" and 8 < header.bits < 16:
        return 0, (1 << header.bits) - 1
    # Pillow spreads their values over 16 bits, by the largest one or the number of bits that the file states.
    spread = (image.format == "PPM" and image.mode != "F") or (header.kind == "JPEG2000" and header.bits < 16)
    return FULL if spread else None


def check_deep_colours(image: Image.Image, header: Header, span: Range | None) -> None:
    """Raise ValueError where the upper eight bits of 16-bit colours, all that Pillow keeps, are not the picture."""
    declared = header.kind == "PNG" and header.significant == 16
    if span == FULL or declared:
        return
    if span is not None:
        raise ValueError(f"of 16-bit colours only the upper eight bits can be read: {ADVICE_COLOURS}")
    if image.mode not in ("RGB", "RGBA", "LA"):
        return
    ends: Any = zip(image.getbands(), image.getextrema(), strict=True)
    most = max(int(high) for band, (_, high) in ends if band != "A")
    if most < 256 // QUARTER:
        raise ValueError(
            f"16-bit colours below {(most + 1) * 256}, a quarter of their range or less, of which only the upper eight "
            f"bits can be read: {ADVICE_COLOURS}"
        )
