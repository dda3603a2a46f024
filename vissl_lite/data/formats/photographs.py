"""Photographs: JPEG, PNG, WebP and whatever else Pillow reads, as 8-bit RGB; 16-bit PNG and PNM."""

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

from vissl_lite.data.formats.common import Description, RawImage, Source, check_frame, converting
from vissl_lite.data.formats.display import to_rgb
from vissl_lite.data.headers import (
    image_header_of,
    is_png,
    jpeg_header,
    opened_image,
    orientation,
    png_orientation,
    png_size,
    turned,
)
from vissl_lite.data.reading import check_pixels

# What a JPEG can be divided by in decoding, and OpenCV's flags for it.
_REDUCED = {1: 0, 2: 16, 4: 32, 8: 64}

# NumPy's dtypes of Pillow's modes that are not of 8 bits.
_DEEP_MODES = {"I": "int32", "F": "float32", "I;16": "uint16", "I;16L": "uint16", "I;16B": "uint16"}

_PNM_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_HEADER = re.compile(
    rb"P([56])" + _PNM_GAP + rb"(\d{1,9})" + _PNM_GAP + rb"(\d{1,9})" + _PNM_GAP + rb"(\d{1,5})\s"
)


def is_usual(data: bytes) -> bool:
    """Whether a file begins as a JPEG or PNG, which need no further look at what they are."""
    return data[:2] == b"\xff\xd8" or data[:4] == b"\x89PNG"


def decode(
    data: bytes, path: str | Path, times: Callable[[int, int], int]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a photograph to 8-bit RGB, a JPEG no larger than needed.

    Args:
        data: The file's bytes.
        path: Named in errors.
        times: Function from the displayed height and width of the whole image: how many times as
            large as needed it is. It is asked before anything is decoded, and for a JPEG only.

    Returns:
        ``(H, W, 3)`` uint8, and the height and width of the whole image.
    """
    flags, whole, factor = cv2.IMREAD_COLOR_RGB, None, 1
    jpeg = jpeg_header(data)
    if jpeg is not None:
        check_pixels(jpeg.height, jpeg.width, path)
    elif data[:2] == b"\xff\xd8":
        raise ValueError(f"{path}: no size in it")
    if jpeg is not None and jpeg.channels != 4:
        # from behind: looking through megabytes takes a tenth of the time of decoding them
        if data.rfind(b"\xff\xd9") < 0:  # OpenCV would fill the missing part with gray
            raise ValueError(f"{path}: cut short")
        whole = jpeg.height, jpeg.width
        larger = max(1, times(*whole))
        factor = max(one for one in _REDUCED if one <= larger)
        flags |= _REDUCED[factor]
    elif _is_plain_png(data):
        png_size(data, path)
    else:
        pixels = _decode_others(data, path)
        if pixels.dtype != np.uint8:
            pixels = to_rgb(RawImage(pixels))
        return pixels, (pixels.shape[0], pixels.shape[1])
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise ValueError(f"{path}: can't be decoded")
    height, width = image.shape[:2]
    # a header may have an orientation that OpenCV does not follow
    if whole is None or (height, width) != (-(-whole[0] // factor), -(-whole[1] // factor)):
        whole = height, width
    return image, whole


def read(data: bytes, path: str) -> RawImage:
    """Decode a photograph as it is: 8-bit RGB, or one or three bands of more bits."""
    if not is_usual(data) or _is_deep_png(data):
        return _named(_decode_others(data, path))
    return _named(decode(data, path, lambda height, width: 1)[0])


def read_page(file: BinaryIO, path: str, page: int) -> RawImage:
    """Decode a page of a TIFF as ``read`` does, without reading the others.

    Args:
        file: The file.
        path: Named in errors.
        page: Number of the page.
    """
    with opened_image(file, path) as image:
        if page:
            image.seek(page)
            check_pixels(image.height, image.width, path)
        return _named(_from_pillow(image))


def _named(pixels: np.ndarray) -> RawImage:
    names = ("red", "green", "blue") if pixels.shape[2] == 3 else ()
    return RawImage(pixels, None, None, names)


def describe(source: Source) -> Description:
    """Describe a photograph by its header."""
    height, width, _ = image_header_of(source.file, source.start, source.path)
    start = source.start
    bands, dtype = 3, "uint8"
    header = _PNM_HEADER.match(start)
    if _is_deep_png(start):
        bands, dtype = 1 if start[25] == 0 and not _has_transparency(start) else 3, "uint16"
    elif header is not None:
        if int(header[4]) > 255:
            bands, dtype = 3 if header[1] == b"6" else 1, "uint16"
    elif not is_usual(start):
        with opened_image(source.file, source.path) as image:
            if image.mode in _DEEP_MODES:
                bands, dtype = 1, _DEEP_MODES[image.mode]
    depth = 8 * np.dtype(dtype).itemsize
    return Description(
        "photograph",
        1,
        height,
        width,
        bands,
        dtype,
        ("red", "green", "blue") if bands == 3 else (),
        acquisition={"bit depth": str(depth), "size": f"{width} x {height}"},
    )


def check_one_frame(frame: int | None, path: str) -> None:
    """Raise a ValueError if another frame than the first of a photograph is asked for."""
    check_frame(frame or 0, 1, path)


def _is_plain_png(data: bytes) -> bool:
    """Whether a PNG is 8-bit gray or RGB without transparency, which OpenCV decodes as it is."""
    if not is_png(data):
        return False
    depth, kind = data[24], data[25]
    return depth == 8 and kind in (0, 2) and not _has_transparency(data)


def _has_transparency(data: bytes) -> bool:
    """Whether a PNG has a chunk of transparency before its pixels."""
    return b"tRNS" in data[33 : data.find(b"IDAT")]


def _is_deep_png(data: bytes) -> bool:
    return is_png(data) and data[24] == 16


def _decode_others(data: bytes, path: str | Path) -> np.ndarray:
    """``(H, W, 3)`` uint8, or ``(H, W, C)`` of another dtype."""
    if _is_deep_png(data):
        return _decode_deep_png(data, path)
    pixels = _decode_pnm(data, path)
    if pixels is not None:
        return pixels
    with opened_image(BytesIO(data), path) as image:
        return _from_pillow(image)


def _decode_deep_png(data: bytes, path: str | Path) -> np.ndarray:
    """Decode a PNG of 16 bits, alpha laid over white: ``(H, W, 1)`` or ``(H, W, 3)`` uint16."""
    png_size(data, path)
    with converting(str(path)):
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise ValueError(f"{path}: can't be decoded")
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.float64) / 65535
        mixed = pixels[..., :3] * alpha + 65535 * (1 - alpha)
        pixels = mixed.round().astype(np.uint16)
    if pixels.shape[2] == 3:
        pixels = pixels[..., ::-1]
    return np.ascontiguousarray(turned(pixels, png_orientation(BytesIO(data))))


def _decode_pnm(data: bytes, path: str | Path) -> np.ndarray | None:
    """Decode a binary PGM or PPM file whose maximum is not 255, which takes Pillow seconds.

    Values of 8 bits are scaled by that maximum; others are as stored. Format:
    https://netpbm.sourceforge.net/doc/ppm.html and pgm.html.

    Returns:
        ``(H, W, 3)`` uint8, or ``(H, W, 1)`` or ``(H, W, 3)`` uint16; None for other files.
    """
    header = _PNM_HEADER.match(data, 0, 1 << 16)
    if header is None:
        return None
    kind, width, height, largest = map(int, header.groups())
    if largest == 255:
        return None
    check_pixels(height, width, path)
    if not 0 < largest < 1 << 16:
        raise ValueError(f"{path}: its largest value is {largest}")
    channels = 3 if kind == 6 else 1
    dtype = np.dtype(">u2" if largest > 255 else "u1")
    if len(data) - header.end() < height * width * channels * dtype.itemsize:
        raise ValueError(f"{path}: cut short")
    values = np.frombuffer(data, dtype, height * width * channels, header.end())
    if largest > 255:
        return values.astype(np.uint16).reshape(height, width, channels)
    table = np.minimum(np.arange(256), largest) * 255.0 / largest
    image = table.round().astype(np.uint8)[values].reshape(height, width, channels)
    return image if channels == 3 else np.repeat(image, 3, axis=2)


def _from_pillow(image: Image.Image) -> np.ndarray:
    image.load()  # by which a TIFF is turned, and what EXIF data stands behind the pixels is read
    turn = orientation(image)
    if image.mode in _DEEP_MODES:
        pixels = np.array(image).astype(_DEEP_MODES[image.mode], copy=False)[..., None]
    else:
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        pixels = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(turned(pixels, turn))
