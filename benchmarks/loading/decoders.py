"""JPEG decoders side by side: those that `common.decoding.decode` knows, Pillow, and others where they are installed.

All of them are libjpeg-turbo. simplejpeg and TorchCodec are extras of ours; PyTurboJPEG calls the library of the system
(`apt-get install libturbojpeg0`; `pip install 'PyTurboJPEG<2'` where that is older than 3).
"""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.loading.measuring import Method, each, measure
from common.decoding.decode import JPEG_DECODERS, JpegDecoder, decode_with_pil

SIDE = 224  # what a decoder that can decode to a part of a side shall cover


def by_pillow() -> JpegDecoder:
    return lambda data, channels: decode_with_pil(data, channels, None)[0]


def by_turbojpeg() -> JpegDecoder:
    from turbojpeg import TJPF_GRAY, TJPF_RGB, TurboJPEG

    turbo, formats = TurboJPEG(), {1: TJPF_GRAY, 3: TJPF_RGB}
    return lambda data, channels: torch.from_numpy(turbo.decode(data, formats[channels])).permute(2, 0, 1)


def scaled_by_pillow() -> Callable[[np.ndarray], Tensor]:
    def decode(data: np.ndarray) -> Tensor:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (SIDE, SIDE))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    return decode


def scaled_by_simplejpeg() -> Callable[[np.ndarray], Tensor]:
    from simplejpeg import decode_jpeg

    # Its scales are eighths; from a factor of 2 on they are Pillow's.
    return lambda data: torch.from_numpy(decode_jpeg(data, "RGB", min_height=SIDE, min_width=SIDE)).permute(2, 0, 1)


LOADERS = {**JPEG_DECODERS, "Pillow": by_pillow, "PyTurboJPEG": by_turbojpeg}
SCALED = {"Pillow": scaled_by_pillow, "simplejpeg": scaled_by_simplejpeg}


def installed(loaders: dict[str, Callable[[], Callable]]) -> dict[str, Callable]:
    decoders = {}
    for name, load in loaders.items():
        with contextlib.suppress(ImportError, AttributeError, OSError, RuntimeError):
            decoders[name] = load()
    return decoders


def decoder_methods(files: list[np.ndarray], channels: int) -> dict[str, Method]:
    """Every JPEG decoder that is installed, on encoded `files`; prints how many pictures they decode alike."""
    decoders = installed(LOADERS)
    first = next(iter(decoders.values()))
    for name, decoder in decoders.items():
        alike = sum(torch.equal(decoder(data, channels), first(data, channels)) for data in files)
        print(f"  {name}: {alike} of {len(files)} pictures have the pixels of the first, {channels} channels")
    methods = {
        name: each(lambda i, decoder=decoder: decoder(files[i], channels))  # type: ignore[misc]
        for name, decoder in decoders.items()
    }
    if channels == 3:
        for name, decoder in installed(SCALED).items():
            title = f"{name}, scaled to cover {SIDE} (other pixels)"
            methods[title] = each(lambda i, decoder=decoder: decoder(files[i]))  # type: ignore[misc]
    return methods


def compare_decoders(folder: Path, count: int, rounds: int) -> None:
    """Print the JPEG decoders' speeds on up to `count` files in `folder`, and on as many of 32x32 made from them."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
    files = [np.fromfile(path, np.uint8) for path in paths]
    small = []
    for data in files:
        packed = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32)).save(packed, "JPEG", quality=95)
        small.append(np.frombuffer(packed.getvalue(), np.uint8).copy())
    for title, group in (("files as they are", files), ("32x32", small)):
        for channels in (3, 1):
            name = f"decoding, {title}, {channels} channel{'s' if channels > 1 else ''}"
            measure(name, len(group), rounds, decoder_methods(group, channels), turn=8)
