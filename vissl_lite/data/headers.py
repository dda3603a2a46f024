"""Headers of image files: size and orientation without decoding.

Read by hand for JPEG and PNG: opening a file with Pillow for it costs more than decoding a small
one. Read by hand for WebP, of which Pillow makes room for all pixels when it opens the file, and
for TIFF, of which OpenCV reads kinds that Pillow does not know.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from vissl_lite.data.reading import check_pixels, max_pixels

# Segments of a JPEG before its size at most; a color profile takes up to 255.
_MOST_MARKERS = 10_000

_ORIENTATION = 0x0112  # the EXIF tag
ON_ITS_SIDE = range(5, 9)  # its values that make height of width

PNG = b"\x89PNG\r\n\x1a\n"

# What Pillow may open: what the suffixes of images stand for. Pillow knows dozens, and hands one of
# them to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")

# Major brands of HEIF files; the last two may also be AVIF.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_MOST_HEIF_HEADER = 1 << 16  # bytes of a HEIF file in which image sizes are looked for

_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_J2K = b"\xff\x4f\xff\x51"
_MOST_BOXES = 1000  # of a JPEG 2000 file before its pixels
_MOST_TILES = 1 << 14  # of a JPEG 2000 file: OpenJPEG takes about 10 kB for each at once

# What Pillow raises on bytes that it does not expect, beside what ``BROKEN_IMAGE`` names.
_CONFUSED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    struct.error,
    zlib.error,
)

# Tags of a TIFF: width and height of the image and of a tile; the types of integers, with their
# bytes, that they may have.
_TIFF_SIDES = ((257, 256), (323, 322))
_TIFF_INTEGERS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 16: 8, 17: 8}
_MOST_TAGS = 65535

_MOST_EXIF = 1 << 20  # bytes of EXIF data that are looked at


class JpegHeader(NamedTuple):
    """Header of a JPEG.

    Attributes:
        height: Height in pixels, as it is shown: EXIF orientation is applied.
        width: Likewise.
        channels: 1, 3, or 4 (CMYK).
        orientation: The EXIF orientation, 1 to 8.
    """

    height: int
    width: int
    channels: int
    orientation: int


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None if it has none.

    Reads the markers by hand (ITU T.81, B.1.1).

    Args:
        data: The file's bytes, at least up to its frame header.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, turn = 2, 1
    for _ in range(_MOST_MARKERS):
        # as libjpeg does: what stands between markers is passed over, and a marker may follow
        # upon any number of fill bytes
        at = data.find(b"\xff", at)
        if at < 0:
            return None
        if data[at + 1 : at + 2] == b"\xff":
            at = len(data) - len(data[at:].lstrip(b"\xff")) - 1
        if at + 9 >= len(data):
            return None
        marker = data[at + 1]
        if marker <= 0x01 or 0xD0 <= marker <= 0xD7:  # these have no length
            at += 2
            continue
        if marker in (0xD8, 0xD9, 0xDA):  # no size comes after these
            return None
        # 0xF7 is JPEG-LS's
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            width = int.from_bytes(data[at + 7 : at + 9], "big")
            if turn in ON_ITS_SIDE:
                height, width = width, height
            return JpegHeader(height, width, data[at + 9], turn)
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            turn = _exif_orientation(data[at + 10 : end])
        at = max(end, at + 4)
    return None


def _exif_orientation(exif: bytes) -> int:
    """The orientation in EXIF data (a TIFF header and its first directory); 1 if there is none."""
    order = "little" if exif[:2] == b"II" else "big"

    def number(at: int, length: int) -> int:
        return int.from_bytes(exif[at : at + length], order)  # type: ignore[arg-type]

    directory = number(4, 4)
    entries = range(directory + 2, len(exif) - 11, 12)
    for at in entries[: number(directory, 2)]:
        if number(at, 2) == _ORIENTATION:
            value = number(at + 8, 2)
            return value if value in range(1, 9) else 1
    return 1


class ImageHeader(NamedTuple):
    """Header of an image file.

    Attributes:
        height: Height in pixels as the image is shown: EXIF orientation is applied.
        width: Likewise.
        orientation: The EXIF orientation, 1 to 8.
    """

    height: int
    width: int
    orientation: int


def image_header_of(file: BinaryIO, start: bytes, path: str) -> ImageHeader:
    """Height, width and orientation of a photograph or TIFF, without decoding it.

    Args:
        file: The file.
        start: Its first 4096 bytes.
        path: Named in errors.

    Raises:
        OSError, ValueError, SyntaxError: It is no image, or has more pixels than are allowed
            (``BROKEN_IMAGE``).
    """
    if is_png(start):
        return _shown(*png_size(start, path), png_orientation(file))
    if start[:2] == b"\xff\xd8":
        header = jpeg_header(start)
        if header is None:
            file.seek(0)
            header = jpeg_header(file.read())
        if header is None:
            raise ValueError(f"{path}: no size in it")
        check_pixels(header.height, header.width, path)
        return ImageHeader(header.height, header.width, header.orientation)
    if is_tiff(start):
        return _shown(*check_tiff(file, path))
    with opened_image(file, path) as image:
        return _shown(image.height, image.width, orientation(image))


def _shown(height: int, width: int, turn: int) -> ImageHeader:
    """The header of an image with this stored height and width."""
    if turn in ON_ITS_SIDE:
        height, width = width, height
    return ImageHeader(height, width, turn)


def png_orientation(file: BinaryIO) -> int:
    """The EXIF orientation of a PNG, which may stand behind the pixels; 1 if there is none."""
    at = 8
    while True:
        file.seek(at)
        start = file.read(8)
        length, kind = int.from_bytes(start[:4], "big"), start[4:]
        if kind == b"eXIf":
            return _exif_orientation(file.read(min(length, _MOST_EXIF)))
        if len(start) < 8 or kind == b"IEND":
            return 1
        at += 12 + length


def is_png(data: bytes) -> bool:
    """Whether data begin as a PNG file, including its size."""
    return data[:8] == PNG and data[12:16] == b"IHDR" and len(data) >= 33


def png_size(data: bytes, path: str | Path) -> tuple[int, int]:
    """Height and width of a PNG.

    Args:
        data: Beginning of the file, for which ``is_png`` is true.
        path: Named in errors.

    Raises:
        ValueError: It has more pixels than are allowed.
    """
    height, width = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    check_pixels(height, width, path)
    return height, width


@contextmanager
def opened_image(file: BinaryIO, path: str | Path) -> Iterator[Image.Image]:
    """Open an image file with Pillow without decoding it, if it has no more pixels than allowed.

    Within it, what Pillow raises on bytes that it does not expect becomes a ValueError.

    Args:
        file: The file.
        path: Named in errors.

    Raises:
        UnidentifiedImageError: Pillow does not know the format.
        OSError, ValueError, SyntaxError: It is damaged, or has too many pixels.
    """
    try:
        heif = _check_by_hand(file, path)
        formats = [*_formats(), "HEIF"] if heif and _knows_heif() else _formats()
        with Image.open(file, formats=formats) as image:
            check_pixels(image.height, image.width, path)
            yield image
    except UnidentifiedImageError:
        file.seek(0)
        if is_heif(file.read(12)) and not _knows_heif():
            raise ValueError(f"{path}: HEIC is read with pip install 'vissl-lite[heic]'") from None
        raise UnidentifiedImageError(f"{path}: no image of a format that is known") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: more pixels than --max_pixels {max_pixels()}") from None
    except _CONFUSED as error:
        raise ValueError(f"{path}: {error or type(error).__name__}") from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 if it is missing or unreadable."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, *_CONFUSED):
        return 1
    return value if value in range(1, 9) else 1


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image ``(H, W, ...)`` upright by its EXIF orientation (EXIF 2.32, 4.6.4, tag 274)."""
    if orientation in ON_ITS_SIDE:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


@cache
def _knows_heif() -> bool:
    """Register HEIF with Pillow if ``pi_heif`` is installed, which is looked for only when needed.

    Returns:
        Whether it is.
    """
    try:
        import pi_heif
    except ImportError:
        return False
    pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    return True


def is_heif(data: bytes) -> bool:
    """Whether a file begins as a HEIF file, such as HEIC."""
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS


def _check_by_hand(file: BinaryIO, path: str | Path) -> bool:
    """Check the size of a file before Pillow opens it, which may allocate memory at once.

    Returns:
        Whether it begins as a HEIF file.
    """
    file.seek(0)
    start = file.read(33)
    if is_png(start):
        png_size(start, path)
    elif is_tiff(start):
        check_tiff(file, path)
    elif is_heif(start):
        # The size that Pillow sees is a part of the image that is decoded.
        file.seek(0)
        _check_heif(file.read(_MOST_HEIF_HEADER), path)
    elif start[:4] == _J2K or start[:12] == _JP2:
        _check_jpeg2000(file, path)
    else:
        size = _size_in_start(start)
        if size is not None:
            check_pixels(*size, path)
    file.seek(0)
    return is_heif(start)


def _check_heif(header: bytes, path: str | Path) -> None:
    """Check the sizes of all images in a HEIF file (ISO/IEC 23008-12, 6.5.3: ``ispe``)."""
    at = header.find(b"ispe\0\0\0\0")
    while at >= 0:
        width, height = (int.from_bytes(header[at + i : at + i + 4], "big") for i in (8, 12))
        check_pixels(height, width, path)
        at = header.find(b"ispe\0\0\0\0", at + 8)


def _check_jpeg2000(file: BinaryIO, path: str | Path) -> None:
    """Check the size of the codestream of a JPEG 2000 file, which may differ from its header's.

    Reads the boxes and the marker SIZ by hand (ITU T.800, annexes I.4 and A.5.1).

    Raises:
        ValueError: It has too many pixels, tiles or channels, or none.
    """
    at = 0
    for _ in range(_MOST_BOXES):
        file.seek(at)
        start = file.read(42)
        if start[:4] == _J2K:
            break
        length, head = int.from_bytes(start[:4], "big"), 8
        if length == 1:
            length, head = int.from_bytes(start[8:16], "big"), 16
        is_pixels = start[4:8] == b"jp2c"
        if not is_pixels and length < head:  # 0: up to the end
            raise ValueError(f"{path}: no size in it")
        at += head if is_pixels else length
    if start[:4] != _J2K or len(start) < 42:
        raise ValueError(f"{path}: no size in it")
    right, bottom, left, top, wide, high, from_left, from_top = struct.unpack(">8I", start[8:40])
    check_pixels(bottom - top, right - left, path)
    if not wide or not high:
        raise ValueError(f"{path}: its tiles have no size")
    tiles = -(-(right - from_left) // wide) * -(-(bottom - from_top) // high)
    channels = int.from_bytes(start[40:42], "big")
    if not 0 < tiles <= _MOST_TILES or channels > 4:
        raise ValueError(f"{path}: {tiles} tiles of {channels} channels")


def _size_in_start(start: bytes) -> tuple[int, int] | None:
    """Height and width of a GIF, BMP or WebP file, else None.

    GIF89a, section 18; Windows' BITMAPINFOHEADER and the older BITMAPCOREHEADER; RFC 9649, sections
    2.5 to 2.7, with RFC 6386, section 9.1.
    """

    def number(at: int, length: int) -> int:
        return int.from_bytes(start[at : at + length], "little")

    if start[:4] == b"GIF8":
        return number(8, 2), number(6, 2)
    if start[:2] == b"BM":
        length = 2 if number(14, 4) == 12 else 4
        height, width = number(18 + length, length), number(18, length)
        # a height below zero: the first row is at the top
        return (height if height < 1 << 31 else (1 << 32) - height), width
    kind = start[12:16] if start[:4] == b"RIFF" and start[8:12] == b"WEBP" else b""
    if kind == b"VP8X":
        return number(27, 3) + 1, number(24, 3) + 1
    if kind == b"VP8 ":
        return number(28, 2) & 0x3FFF, number(26, 2) & 0x3FFF
    if kind == b"VP8L":
        bits = number(21, 4)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return None


def codestream_size(data: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG, JPEG-LS or JPEG 2000 stream states itself; None for others.

    Reads the frame header (ITU T.81, B.2.2; ITU T.87, C.2.2) or the marker SIZ (ITU T.800, A.5.1).

    Args:
        data: The stream, at least up to its header.
    """
    at = data.find(_J2K, 0, _MOST_HEIF_HEADER)
    if data[:4] == _J2K or (data[:12] == _JP2 and at > 0):
        if len(data) < at + 24:
            return None
        right, bottom, left, top = struct.unpack(">4I", data[at + 8 : at + 24])
        return bottom - top, right - left
    header = jpeg_header(data)
    return None if header is None else (header.height, header.width)


def is_tiff(data: bytes) -> bool:
    """Whether a file begins as a TIFF or a BigTIFF."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def check_tiff(file: BinaryIO, path: str | Path) -> tuple[int, int, int]:
    """Check the number of pixels of a TIFF and of its tiles.

    Reads the first directory by hand (TIFF 6.0, section 2; libtiff's BigTIFF design).

    Args:
        file: The file.
        path: Named in errors.

    Returns:
        Height and width as stored, and the orientation, 1 to 8.

    Raises:
        ValueError: There are too many, or none.
    """
    file.seek(0)
    start = file.read(16)
    order = "little" if start[:1] == b"I" else "big"
    big = b"+" in start[2:4]

    def number(data: bytes) -> int:
        return int.from_bytes(data, order)  # type: ignore[arg-type]

    file.seek(number(start[8:16] if big else start[4:8]))
    length = 20 if big else 12
    count = min(number(file.read(8 if big else 2)), _MOST_TAGS)
    directory = file.read(length * count)
    values: dict[int, int] = {}
    for at in range(0, len(directory) - length + 1, length):
        tag, kind = number(directory[at : at + 2]), number(directory[at + 2 : at + 4])
        value = at + (12 if big else 8)
        if kind in _TIFF_INTEGERS:
            found = number(directory[value : value + _TIFF_INTEGERS[kind]])
            values[tag] = max(found, values.get(tag, 0))  # which of two counts, readers disagree
    for number_of, (down, across) in enumerate(_TIFF_SIDES):
        if number_of == 0 or down in values or across in values:
            check_pixels(values.get(down, 0), values.get(across, 0), path)
    turn = values.get(_ORIENTATION, 1)
    return values[257], values[256], turn if turn in range(1, 9) else 1
