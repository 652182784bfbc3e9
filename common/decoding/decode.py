"""Encoded bytes -> uint8 tensor: JPEG straight into a tensor, everything else (and every odd JPEG) through PIL.

What a picture says of itself (size, orientation, range) is read once, in `headers`, for both ways.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor

from .depth import Range, check_deep_colours, deep_to_8_bit, is_deep, strips
from .headers import Header, read_header
from .tags import ORIENTATION

# What is opened, by Pillow's names: pictures that are whole in themselves. Left out are those for which Pillow starts a
# program (EPS: Ghostscript; WMF and EMF), asks other software (BUFR, GRIB, HDF5), unpacks without a bound (FITS), or
# which are containers of others (ICNS, ICO, IPTC, MIC, FPX).
PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "PCX", "QOI", "SGI", "TGA")
MORE_ENDINGS = {".mpo": "JPEG"}  # the first picture of several

# Pillow's own line above which it warns. Peak memory of a decoder is about 25 bytes a pixel at most (README).
MAX_PIXELS = 89_478_485
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `check_size` refuses what it is about

WHITE = (255, 255, 255, 255)


@functools.cache
def formats() -> tuple[str, ...]:
    """List the PICTURES that this Pillow knows."""
    Image.init()
    return tuple(name for name in PICTURES if name in Image.OPEN)


@functools.cache
def endings() -> frozenset[str]:
    """Return the lower-case file name endings of the pictures that can be opened, with the dot."""
    known = {**Image.registered_extensions(), **MORE_ENDINGS}
    return frozenset(ending for ending, name in known.items() if name in formats())


JpegDecoder = Callable[[np.ndarray, int], Tensor]  # (encoded bytes, channels 1 or 3) -> uint8 (channels, H, W)


def jpeg_by_simplejpeg() -> JpegDecoder:
    """Load simplejpeg's decoder. Raises ImportError where there is none."""
    from simplejpeg import decode_jpeg

    modes = {1: "GRAY", 3: "RGB"}
    return lambda data, channels: torch.from_numpy(decode_jpeg(data, modes[channels])).permute(2, 0, 1)


def jpeg_by_torchvision() -> JpegDecoder:
    """Load torchvision's operator itself: the function around it warns at every image since 0.29, which deprecates
    both. Raises AttributeError in a build without libjpeg."""
    import torchvision.io  # noqa: F401  (registers it)

    operator = torch.ops.image.decode_jpeg
    return lambda data, channels: operator(torch.from_numpy(data), channels, False)  # its modes: 1 is grey, 3 is RGB


def jpeg_by_torchcodec() -> JpegDecoder:
    """Load TorchCodec's decoder (from version 0.16, without FFmpeg). Raises ImportError where there is none."""
    from torchcodec.decoders import decode_jpeg

    modes = {1: "GRAY", 3: "RGB"}
    return lambda data, channels: decode_jpeg(torch.from_numpy(data), mode=modes[channels])


# In the order in which they are taken, the fastest first; Pillow without any. All are libjpeg-turbo: on 400 photographs
# and 400 JPEGs of 32x32 their pixels were equal, in colour and in grey, so which one is used is no part of what a run
# is (simplejpeg 1.9, torchvision 0.29, TorchCodec 0.17, Pillow 13; so are PyTurboJPEG's, which gains nothing). Speed as
# a share of the first: 1, 0.95, 0.93 and 0.70 at 500x375, 1, 0.69, 0.60 and 0.16 at 32x32, Pillow last
# (`python benchmarks/loader.py --decoders FOLDER`).
JPEG_DECODERS = {
    "simplejpeg": jpeg_by_simplejpeg,
    "torchvision": jpeg_by_torchvision,
    "torchcodec": jpeg_by_torchcodec,
}


@functools.cache
def jpeg_decoder() -> tuple[str, JpegDecoder] | None:
    """Return the fastest JPEG decoder of this installation and its name; None where only Pillow can read them."""
    for name, load in JPEG_DECODERS.items():
        with contextlib.suppress(ImportError, AttributeError, OSError, RuntimeError):  # not there, or of another torch
            return name, load()
    return None


def jpeg_decoder_name() -> str:
    """Name the package that decodes JPEGs here."""
    fast = jpeg_decoder()
    return "Pillow" if fast is None else fast[0]


REDUCTIONS = (1, 2, 4, 8)  # by which a JPEG's sides can be divided while it is decoded, by transforms of fewer points
Reduce = Callable[[int, int], int]  # (height, width) of an upright picture -> one of REDUCTIONS


def decode(data: np.ndarray, channels: int = 3, span: Range | None = None) -> Tensor:
    """Decode uint8 (bytes,) to uint8 (channels, H, W), upright (EXIF applied), transparency over white, first frame.

    span  values of black and white in pictures deeper than 8 bits, if the rules of `depth` shall not decide

    The memory layout is the decoder's. Raises ValueError or what PIL raises on data that is broken or too large.
    """
    return decode_reduced(data, channels, span, lambda height, width: 1)[0]


def decode_reduced(
    data: np.ndarray, channels: int, span: Range | None, reduce: Reduce
) -> tuple[Tensor, tuple[int, int]]:
    """Decode as `decode` does, but a JPEG to sides divided by what `reduce` says, rounded up: (pixels, (height, width)
    of the whole picture, upright). Pictures of other kinds are decoded whole."""
    header, _ = read_header(data.data, bare=False)
    check_size(header.height, header.width)
    pixels, whole = None, None
    if header.components in (1, 3) and header.height and header.width:
        whole = upright_size(header.height, header.width, header.orientation)
        if (divisor := reduce(*whole)) > 1:
            pixels, header = decode_with_pil(data, channels, span, divisor)
        elif (fast := jpeg_decoder()) is not None:
            with contextlib.suppress(RuntimeError, ValueError):  # PIL reads some JPEGs that this decoder does not
                pixels = fast[1](data, channels)
    if pixels is None:
        pixels, header = decode_with_pil(data, channels, span)
    image = upright(pixels, header.orientation)
    return image, whole or (image.shape[1], image.shape[2])


def decode_with_pil(data: np.ndarray, channels: int, span: Range | None, divisor: int = 1) -> tuple[Tensor, Header]:
    """Decode any picture that is opened to uint8 (channels, H, W), as it is stored, and read its header. `divisor`: one
    of REDUCTIONS, for a JPEG."""
    with open_picture(data) as (image, header):
        if channels == 1 or divisor > 1:
            # grey: a JPEG's stored luma, as the fast decoders take it; 1.3 times as fast
            image.draft("L" if channels == 1 else None, (image.width // divisor, image.height // divisor))
        pixels = torch.from_numpy(to_8_bit(image, channels, header, span))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1), header


@contextlib.contextmanager
def open_picture(data: np.ndarray) -> Iterator[tuple[ImageFile, Header]]:
    """Open the picture in uint8 (bytes,), not decoded or turned yet, and its header. The only way to PIL's decoders.

    Raises ValueError if there is nothing or it has more than MAX_PIXELS, and what PIL raises.
    """
    if len(data) == 0:
        raise ValueError("the file is empty")
    header, bare = read_header(data.data)
    check_size(header.height, header.width)  # some decoders take memory as soon as they are opened
    try:
        opened = Image.open(io.BytesIO(bare), formats=formats())
    except UnidentifiedImageError:
        if header.kind:
            raise ValueError(f"broken, or a kind of {header.kind} that Pillow does not read") from None
        raise ValueError(f"none of the kinds of pictures that are opened ({', '.join(formats())})") from None
    with opened as image:
        check_size(image.height, image.width)
        if not header.kind or header.kind == "AVIF":
            with contextlib.suppress(Exception):  # it raises almost anything
                header.orientation = int(image.getexif().get(ORIENTATION, 1))
        yield image, header


def check_size(height: int | None, width: int | None) -> None:
    if height and width and height * width > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than the {MAX_PIXELS:,} allowed (README: Your own images)")


def upright_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """Return (height, width) of a picture stored as height x width when it is seen as `orientation` says."""
    return (width, height) if orientation in range(5, 9) else (height, width)


def upright(pixels: Tensor, orientation: int) -> Tensor:
    """Turn (C, H, W) as it is to be seen; `orientation` as EXIF counts, 1 or anything unknown: as it is."""
    if orientation not in range(2, 9):
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    flips = [axis for axis, turned in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in turned]
    return pixels.flip(flips) if flips else pixels  # in the memory's order, so it costs a third of a decoding


def to_8_bit(image: Image.Image, channels: int, header: Header, span: Range | None = None) -> np.ndarray:
    """Convert any PIL mode to uint8 (H, W, 3), or (H, W) for one channel."""
    if header.kind == "TIFF" and header.bits == 8 and not header.unsigned:
        raise ValueError("signed values of 8 bits, which are read without their sign: write them unsigned")
    if is_deep(image):
        grey = deep_to_8_bit(image, header, span)
        return grey if channels == 1 else np.repeat(grey[..., None], 3, -1)
    if header.deep:
        check_deep_colours(image, header, span)
        if isinstance(image.info.get("transparency"), tuple):
            image.load()
            image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    mode = "RGB" if channels == 3 else "L"
    pixels = np.empty((image.height, image.width, 3)[: 2 + (channels == 3)], np.uint8)
    for top, part in strips(image):
        pixels[top : top + part.height] = np.asarray(opaque(part, mode))
    return pixels


def opaque(image: Image.Image, mode: str) -> Image.Image:
    """Lay a picture of 8 bits over white, as "RGB" or "L"."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, WHITE), colour)
    elif image.mode not in ("RGB", "L"):
        image = image.convert("RGB")  # CMYK has no direct way to luma
    return image if image.mode == mode else image.convert(mode)
