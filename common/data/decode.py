"""Encoded bytes -> uint8 tensor: JPEG straight into a tensor, everything else (and every odd JPEG) through PIL."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

try:
    # The operator itself: torchvision 0.29 deprecates the function around it, which then warns at every image, and will
    # remove both. Builds without libjpeg have neither. PIL then reads JPEGs too, at two thirds of the speed.
    import torchvision.io  # noqa: F401  (registers it)

    fast_jpeg: Any = torch.ops.image.decode_jpeg
except (ImportError, AttributeError):
    fast_jpeg = None

RGB, GRAY = 3, 1  # torchvision.io.ImageReadMode

# PIL's own line between a large picture and an attack: twice its warning limit.
MAX_PIXELS = 2 * int(Image.MAX_IMAGE_PIXELS or 89_478_485)

ORIENTATION = 0x0112  # EXIF tag
WHITE = (255, 255, 255, 255)


def decode(data: np.ndarray, channels: int = 3) -> Tensor:
    """Encoded uint8 (bytes,) -> uint8 (channels, H, W), upright (EXIF applied), transparency over white, first frame.

    The memory layout is the decoder's. Raises ValueError or what PIL raises on data that is broken or absurdly large.
    """
    if len(data) == 0:
        raise ValueError("the file is empty")
    frame = jpeg_frame(data)
    if frame is not None:
        height, width, components = frame
        check_size(height, width)
        if components in (1, 3) and fast_jpeg is not None:
            with contextlib.suppress(RuntimeError):  # PIL reads some JPEGs that this decoder does not
                return fast_jpeg(torch.from_numpy(data), RGB if channels == 3 else GRAY, True)  # True: EXIF applied
    return decode_with_pil(data, channels)


def jpeg_frame(data: np.ndarray) -> tuple[int, int, int] | None:
    """(height, width, components) from a JPEG's frame header, None when there is none. A few microseconds."""
    view = memoryview(data.data)
    if view[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    while at + 9 < len(view):
        if view[at] != 0xFF:
            return None
        marker = view[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame, not DHT, JPG, DAC
            height, width = view[at + 5] << 8 | view[at + 6], view[at + 7] << 8 | view[at + 8]
            return height, width, view[at + 9]
        else:
            at += 2 + (view[at + 2] << 8 | view[at + 3])
    return None


def check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels is more than the {MAX_PIXELS:,} allowed (decompression bomb?)")


def decode_with_pil(data: np.ndarray, channels: int) -> Tensor:
    """The same as `decode` for any format PIL opens."""
    with Image.open(io.BytesIO(data.tobytes())) as image:
        check_size(image.height, image.width)
        upright = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
        pixels = np.array(to_8_bit(upright, channels))
    tensor = torch.from_numpy(pixels)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def to_8_bit(image: Image.Image, channels: int) -> Image.Image:
    """Any PIL mode -> "RGB" for three channels, "L" for one."""
    mode = "RGB" if channels == 3 else "L"
    if image.mode.startswith("I"):  # 16 bits per pixel; PIL's own convert would clip them to white
        deep = np.asarray(image)
        image = Image.fromarray((deep.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":  # floating-point TIFF: no declared range, so either 0 … 1 or 0 … 255
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ValueError("some of its pixels are NaN or infinite: replace them, or remove the image")
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, WHITE), colour)
    elif image.mode not in ("RGB", "L"):
        image = image.convert("RGB")  # CMYK has no direct way to luma
    return image if image.mode == mode else image.convert(mode)
