"""What the first bytes of an image file say: its size, without decoding it.

Read by hand for JPEG and PNG: opening a file with Pillow for it costs more than decoding a small
one.
"""

from typing import NamedTuple

from PIL import Image

# Cameras put a thumbnail of up to 64 KB before the size; most other files have it at the start.
_START = 4096

_ORIENTATION = 0x0112  # the EXIF tag
_ON_ITS_SIDE = range(5, 9)  # its values that make height of width


class JpegHeader(NamedTuple):
    """What a JPEG's header says.

    Attributes:
        height: in pixels, as it is shown: EXIF orientation is applied.
        width: likewise.
        channels: 1, 3, or 4 (CMYK).
    """

    height: int
    width: int
    channels: int


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None if it has none.

    Reads the markers by hand (ITU T.81, B.1.1).

    Args:
        data: the file's bytes, at least up to its frame header.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, turned = 2, False
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            width = int.from_bytes(data[at + 7 : at + 9], "big")
            if turned:
                height, width = width, height
            return JpegHeader(height, width, data[at + 9])
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            turned = _lies_on_its_side(data[at + 10 : end])
        at = end
    return None


def _lies_on_its_side(exif: bytes) -> bool:
    """Whether the orientation in EXIF data (a TIFF header and its first directory) is a quarter."""
    order = "little" if exif[:2] == b"II" else "big"

    def number(at: int, length: int) -> int:
        return int.from_bytes(exif[at : at + length], order)  # type: ignore[arg-type]

    directory = number(4, 4)
    entries = range(directory + 2, len(exif) - 11, 12)
    for at in entries[: number(directory, 2)]:
        if number(at, 2) == _ORIENTATION:
            return number(at + 8, 2) in _ON_ITS_SIDE
    return False


def image_size(path: str) -> tuple[int, int]:
    """Height and width that an image file decodes to, by its header.

    Args:
        path: the file.

    Raises:
        OSError, ValueError, SyntaxError: it is missing, or no image (``BROKEN_IMAGE``).
    """
    with open(path, "rb", buffering=0) as file:
        data = file.read(_START)
        if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
            return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
        if data[:2] == b"\xff\xd8":
            header = jpeg_header(data) or jpeg_header(data + file.read())
            if header is None:
                raise ValueError(f"{path} has no size")
            return header.height, header.width
    with Image.open(path) as image:
        width, height = image.size
        # of a TIFF, Pillow gives the size as it is shown
        turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    return (width, height) if turned else (height, width)
