"""TIFF and BigTIFF: any number of bands, 8 to 64 bits, tiles, pages, GeoTIFF, ImageJ and OME.

The directories are read by hand, so that a hostile file is refused before a library sees it.
Pixels that are not compressed are read by hand, too; others by tifffile, or without it by Pillow
and OpenCV as far as they can. Format: TIFF 6.0; BigTIFF as libtiff has it.

Pages of one shape are the frames of a file; smaller copies of a page (pyramids) and masks are left
out. Where ImageJ's or OME's metadata count channels, the pages of one frame are its bands.
"""

import math
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

from vissl_lite.data.formats.common import (
    Description,
    RawImage,
    Source,
    check_frame,
    check_size,
    converting,
    missing_extra,
    native,
    volumes,
)
from vissl_lite.data.headers import codestream_size, turned
from vissl_lite.data.reading import check_pixels

# Tags (TIFF 6.0; 42112 and 42113 by GDAL).
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_WORDS, _MAKER, _MODEL, _OFFSETS, _ORIENTATION, _BANDS = 270, 271, 272, 273, 274, 277
_COUNTS, _X_RESOLUTION, _Y_RESOLUTION, _PLANES, _UNIT, _SOFTWARE = 279, 282, 283, 284, 296, 305
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS = 317, 322, 323, 324
_TILE_COUNTS, _EXTRA, _FORMAT, _GDAL, _NODATA = 325, 338, 339, 42112, 42113
_ROWS = 278

# Tags that place an image on the earth (GeoTIFF 1.1, 7.1).
_PLACE_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)

_WANTED = frozenset(
    {_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _WORDS, _MAKER, _MODEL}
    | {_OFFSETS, _ORIENTATION, _BANDS, _COUNTS, _X_RESOLUTION, _Y_RESOLUTION, _PLANES, _UNIT}
    | {_SOFTWARE, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS, _EXTRA}
    | {_FORMAT, _GDAL, _NODATA, _ROWS}
)

# NumPy's types of the field types (TIFF 6.0, section 2; 16 to 18 of BigTIFF); 5 and 10 are pairs.
_TYPES = {
    1: "u1", 2: "S1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 10: "i4",
    11: "f4", 12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8",
}  # fmt: skip
_PAIRS = (5, 10)

# Compressions that are decoded: none, LZW, deflate, PackBits, LZMA, Zstandard; and those whose
# segments state a size of their own, which is checked: JPEG and JPEG 2000.
_PLAIN = (1, 5, 8, 32946, 32773, 34925, 50000)
_CODESTREAMS = (7, 33003, 33005, 34712)

_MAX_PAGES = 1 << 16
_MAX_TAGS = 4096
_MAX_BANDS = 4096
_MAX_SEGMENTS = 1 << 22

# Photometric interpretations of photographs: gray (twice), RGB, palette, CMYK, YCbCr, Lab.
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_PHOTOGRAPHIC = (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, 3, 5, 6, 8)
_ALPHA = (1, 2)  # values of ExtraSamples

_MICRONS = {"\u00b5m", "\\u00B5m", "um", "micron", "microns", "\u03bcm"}

Tags = Mapping[int, tuple[Any, ...] | str]


class Page(NamedTuple):
    """One directory of a file.

    Attributes:
        number: Its number in the file's chain of directories.
        at: Where it begins, in bytes.
        tags: Values of its tags, those that are read here.
    """

    number: int
    at: int
    tags: Tags

    def one(self, tag: int, default: int = 0) -> int:
        """The first integer of a tag."""
        value = self.tags.get(tag, ())
        return default if isinstance(value, str) or not value else int(value[0])

    def many(self, tag: int) -> tuple[Any, ...]:
        value = self.tags.get(tag, ())
        return () if isinstance(value, str) else value

    def text(self, tag: int) -> str:
        value = self.tags.get(tag, "")
        return value.strip() if isinstance(value, str) else ""

    @property
    def height(self) -> int:
        return self.one(_HEIGHT)

    @property
    def width(self) -> int:
        return self.one(_WIDTH)

    @property
    def bands(self) -> int:
        return self.one(_BANDS, 1)

    @property
    def bits(self) -> int:
        return max(map(int, self.many(_BITS)), default=1)

    @property
    def turned(self) -> bool:
        """Whether height and width change places when the image is shown."""
        return self.one(_ORIENTATION, 1) in range(5, 9)

    @property
    def dtype(self) -> np.dtype[np.generic] | None:
        """The dtype of its values; None for complex numbers and the like."""
        kinds = {int(one) for one in self.many(_FORMAT)} or {1}
        if len(kinds) > 1 or self.bits > 64:
            return None
        kind = {1: "u", 2: "i", 3: "f", 4: "u"}.get(kinds.pop())
        size = next(one for one in (8, 16, 32, 64) if one >= self.bits) // 8
        if kind is None or (kind == "f" and self.bits not in (16, 24, 32, 64)):
            return None
        return np.dtype(f"{kind}{size}")

    @property
    def alike(self) -> tuple[object, ...]:
        """What the frames of a file have in common."""
        return self.height, self.width, self.bands, self.bits, self.many(_FORMAT)[:1]


class _File(NamedTuple):
    """The pages of a file, sorted into frames.

    Attributes:
        frames: For each frame its pages, whose bands are joined.
        names: Names of the bands.
        virtual: Number of images that follow one another behind the first page, which describes
            all of them, as ImageJ writes large stacks; else 0.
        per_frame: Of those, how many are the bands of one frame.
    """

    frames: tuple[tuple[Page, ...], ...]
    names: tuple[str, ...]
    virtual: int = 0
    per_frame: int = 1

    @property
    def number(self) -> int:
        """Number of frames."""
        return self.virtual // self.per_frame if self.virtual else len(self.frames)

    @property
    def bands(self) -> int:
        if self.virtual:
            return self.per_frame * self.frames[0][0].bands
        return sum(page.bands for page in self.frames[0])


def pages(source: Source) -> tuple[Page, ...]:
    """The directories of a file, in the order of their chain.

    Raises:
        ValueError: A directory contradicts the file's size, or there are too many.
    """
    return volumes.get(source.key and ("tiff", *source.key), lambda: _pages_and_bytes(source))


def _pages_and_bytes(source: Source) -> tuple[tuple[Page, ...], int]:
    found = tuple(_walk(source))
    numbers = sum(len(value) for page in found for value in page.tags.values())
    return found, 40 * numbers + 1000 * len(found)


def _walk(source: Source) -> list[Page]:
    start = source.read(0, min(16, source.size))
    order = "<" if start[:1] == b"I" else ">"
    big = b"+" in start[2:4]
    byteorder = "little" if order == "<" else "big"

    def number(data: bytes) -> int:
        return int.from_bytes(data, byteorder)  # type: ignore[arg-type]

    word, entry, count_bytes = (8, 20, 8) if big else (4, 12, 2)
    at = number(start[8:16] if big else start[4:8])
    found: list[Page] = []
    seen: set[int] = set()
    while at:
        if at in seen:
            break
        if len(found) >= _MAX_PAGES:
            raise ValueError(f"{source.path}: more than {_MAX_PAGES} pages")
        seen.add(at)
        try:
            entries = number(source.read(at, count_bytes))
            if not 0 < entries <= _MAX_TAGS:
                raise ValueError(f"{source.path}: a directory of {entries} tags")
            directory = source.read(at + count_bytes, entries * entry)
        except ValueError:
            if found:  # a chain that leads nowhere: the pages before are whole
                break
            raise
        tags: dict[int, tuple[Any, ...] | str] = {}
        for first in range(0, len(directory), entry):
            one = directory[first : first + entry]
            tag, kind = number(one[:2]), number(one[2:4])
            if tag in _PLACE_TAGS:  # only that there are some; ``place_tags`` reads them
                tags[tag] = ()
            if tag not in _WANTED or kind not in _TYPES:
                continue
            dtype = np.dtype(order + _TYPES[kind])
            count = number(one[4 : 4 + word]) * (2 if kind in _PAIRS else 1)
            length = count * dtype.itemsize
            if length <= word:
                data = one[4 + word : 4 + word + length]
            elif length > source.size or count > _MAX_SEGMENTS * 4:
                raise ValueError(f"{source.path}: tag {tag} has {count} values")
            else:
                data = source.read(number(one[4 + word :]), length)
            if kind == 2:
                tags[tag] = data.split(b"\0")[0].decode("utf-8", "replace")
            else:
                tags[tag] = tuple(np.frombuffer(data, dtype).tolist())
        page = Page(len(found), at, tags)
        found.append(page)
        following = at + count_bytes + entries * entry
        at = number(source.read(following, word)) if following + word <= source.size else 0
    if not found:
        raise ValueError(f"{source.path}: no page in it")
    return found


def is_photograph(source: Source) -> bool:
    """Whether the first page is what Pillow turns into 8-bit RGB without any loss of meaning.

    8 bits or fewer per band, gray or in color, with or without transparency, and no value that
    stands for missing data. GDAL tags the fourth band of a GeoTIFF as transparency even if it is
    near infrared, so that it counts as a band there. Pillow knows pages, but not the images of a
    stack that has a single one.
    """
    page = pages(source)[0]
    colors = {_RGB: 3, 5: 4, 6: 3, 8: 3}.get(page.one(_PHOTOMETRIC), 1)
    extra = page.many(_EXTRA)
    placed = any(tag in page.tags for tag in _PLACE_TAGS)
    is_alpha = len(extra) == 1 and extra[0] in _ALPHA and not placed
    channels, images, _ = _channels(page)
    return (
        page.bits <= 8
        and set(page.many(_FORMAT)) <= {1, 4}
        and page.one(_PHOTOMETRIC) in _PHOTOGRAPHIC
        and (page.bands == colors or (page.bands == colors + 1 and is_alpha))
        and _NODATA not in page.tags
        and channels == 1
        and not (images > 1 and _frames(source).virtual)
    )


def _frames(source: Source) -> _File:
    every = pages(source)
    first = every[0]
    alike = tuple(
        page for page in every if page.alike == first.alike and not page.one(_SUBFILE) & 5
    )
    alike = alike or (first,)
    channels, images, names = _channels(first)
    if len(alike) == 1 and images > 1 and _is_virtual(first, images, source):
        per_frame = channels if images % channels == 0 else 1
        return _File((alike,), names if per_frame == channels else (), images, per_frame)
    step = channels if channels > 1 and len(alike) % channels == 0 else 1
    if step > 1:
        order = _order(first, len(alike), channels)
        alike = tuple(alike[index] for index in order)
    frames = tuple(alike[at : at + step] for at in range(0, len(alike), step))
    bands = sum(page.bands for page in frames[0])
    names = names if len(names) == bands else _gdal_names(first, bands)
    return _File(frames, names)


def _imagej(page: Page) -> dict[str, str]:
    """The metadata that ImageJ writes."""
    words = page.text(_WORDS)
    if not words.startswith("ImageJ="):
        return {}
    return dict(line.split("=", 1) for line in words.splitlines() if "=" in line)


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 10 else 0


def _channels(page: Page) -> tuple[int, int, tuple[str, ...]]:
    """Numbers of channels and of images that the metadata of ImageJ or OME state, and names."""
    imagej = _imagej(page)
    if imagej:
        return max(1, _number(imagej.get("channels"))), _number(imagej.get("images")), ()
    words = page.text(_WORDS)
    pixels = _ome_pixels(words)
    if pixels is None:
        return 1, 1, ()
    count = max(1, _number(pixels.get("SizeC")))
    names = tuple(name.lower() for name in re.findall(r'<Channel\b[^>]*?\bName="([^"]*)"', words))
    # the samples of one page are channels, too
    return max(1, count // max(1, page.bands)), 1, names if len(names) == count else ()


def _ome_pixels(words: str) -> dict[str, str] | None:
    """Attributes of the first element Pixels of OME-XML."""
    if "<OME" not in words[:1000]:
        return None
    element = re.search(r"<Pixels\b([^>]*)>", words)
    if element is None:
        return None
    return dict(re.findall(r'([\w:]+)="([^"]*)"', element[1]))


def _order(page: Page, count: int, channels: int) -> Sequence[int]:
    """The order of the pages in which the channels of one frame follow one another."""
    pixels = _ome_pixels(page.text(_WORDS))
    order = "XYCZT" if pixels is None else pixels.get("DimensionOrder", "XYCZT")
    sizes = {"C": channels}
    if pixels is not None:
        sizes |= {axis: max(1, _number(pixels.get(f"Size{axis}"))) for axis in "ZT"}
    axes = [axis for axis in order[2:] if axis in sizes]
    if len(axes) < 3 or math.prod(sizes.values()) != count:
        return range(count)
    # the first axis of the order runs fastest
    numbers = np.arange(count).reshape([sizes[axis] for axis in reversed(axes)])
    names = list(reversed(axes))
    return numbers.transpose([names.index(axis) for axis in "TZC"]).ravel().tolist()


def _is_virtual(page: Page, images: int, source: Source) -> bool:
    """Whether the images of a stack follow one another behind its only page, uncompressed."""
    offsets, dtype = page.many(_OFFSETS), page.dtype
    if page.one(_COMPRESSION, 1) != 1 or not offsets or dtype is None or page.bits % 8:
        return False
    size = page.height * page.width * page.bands * dtype.itemsize
    return 0 < int(offsets[0]) + images * size <= source.size


def _gdal_names(page: Page, bands: int) -> tuple[str, ...]:
    """Names of the bands by GDAL's metadata, else red, green and blue of a color image."""
    found = {
        int(number): name.strip().lower()
        for number, name in re.findall(
            r'<Item name="DESCRIPTION" sample="(\d{1,4})"[^>]*>([^<]*)<', page.text(_GDAL)
        )
    }
    if set(found) >= set(range(bands)):
        return tuple(found[number] for number in range(bands))
    if page.one(_PHOTOMETRIC) == _RGB and page.bands >= 3:
        extra = ["alpha" if int(one) in _ALPHA else "" for one in page.many(_EXTRA)]
        names = ["red", "green", "blue", *extra]
        return tuple(names) if len(names) == bands else ()
    return ()


def _nodata(page: Page) -> float | None:
    try:
        value = float(page.text(_NODATA))
    except ValueError:
        return None
    return None if math.isnan(value) else value


def _dtype(page: Page, path: str) -> np.dtype[np.generic]:
    dtype = page.dtype
    if dtype is None:
        raise ValueError(
            f"{path}: values of {page.bits} bits and the formats {page.many(_FORMAT)[:4]} can't be "
            f"read"
        )
    return dtype


def _checked(source: Source) -> _File:
    """The frames of a file whose sizes are allowed."""
    file = _frames(source)
    page = file.frames[0][0]
    if not 0 < page.bands <= _MAX_BANDS:
        raise ValueError(f"{source.path}: {page.bands} bands")
    dtype = _dtype(page, source.path)
    check_size(page.height, page.width, file.bands, dtype.itemsize, source.path)
    return file


def describe(source: Source) -> Description:
    """Describe a file by its directories."""
    if is_photograph(source):
        every = photograph_pages(source)
        page, bands, dtype, nodata = every[0], 3, np.dtype(np.uint8), None
        names: tuple[str, ...] = ("red", "green", "blue")
        check_pixels(page.height, page.width, source.path)
        frames = len(every)
    else:
        file = _checked(source)
        page, bands, names, frames = file.frames[0][0], file.bands, file.names, file.number
        dtype = native(np.empty(0, _dtype(page, source.path))).dtype
        nodata = _nodata(page)
    height, width = page.height, page.width
    if page.turned:
        height, width = width, height
    acquisition = {
        "maker": page.text(_MAKER),
        "model": page.text(_MODEL),
        "software": page.text(_SOFTWARE),
        "bit depth": str(page.bits),
        "size": f"{width} x {height}",
    }
    several = frames > 1
    return Description(
        "TIFF",
        frames,
        height,
        width,
        bands,
        dtype.name,
        names,
        nodata,
        _spacing(page),
        source.path if several else None,
        source.path if several else None,
        acquisition={key: value for key, value in acquisition.items() if value},
    )


def _spacing(page: Page) -> tuple[float, ...] | None:
    """Distances of rows, columns and, of an ImageJ stack, slices, in mm; None if not stated."""
    imagej = _imagej(page)
    x, y = page.many(_X_RESOLUTION), page.many(_Y_RESOLUTION)
    unit = imagej.get("unit", "")
    scale = 1e-3 if unit in _MICRONS else {"mm": 1.0, "cm": 10.0, "nm": 1e-6}.get(unit)
    if scale is None:
        pixels = _ome_pixels(page.text(_WORDS)) or {}
        try:
            sides = tuple(float(pixels[f"PhysicalSize{axis}"]) for axis in "YX")
        except (KeyError, ValueError):
            return None
        unit = pixels.get("PhysicalSizeXUnit", "\u00b5m")
        return tuple(1e-3 * side for side in sides) if unit in _MICRONS else None
    if len(x) != 2 or len(y) != 2 or not x[0] or not y[0]:
        return None
    sides = (scale * y[1] / y[0], scale * x[1] / x[0])
    try:
        return (*sides, scale * float(imagej["spacing"]))
    except (KeyError, ValueError):
        return sides


def photograph_pages(source: Source) -> tuple[Page, ...]:
    """The frames of a file for which ``is_photograph`` is true."""
    return tuple(frame[0] for frame in _frames(source).frames)


def photograph_page(source: Source, frame: int) -> int:
    """The number in the chain of directories of a frame of a photograph."""
    every = photograph_pages(source)
    check_frame(frame, len(every), source.path)
    return every[frame].number


def read(source: Source, frame: int) -> RawImage:
    """Read a frame of a file for which ``is_photograph`` is false."""
    file = _checked(source)
    check_frame(frame, file.number, source.path)
    first = file.frames[0][0]
    if file.virtual:
        pixels = _read_virtual(source, file, frame)
    else:
        parts = [_read_page(source, page) for page in file.frames[frame]]
        pixels = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
    if first.one(_PHOTOMETRIC) == _WHITE_IS_ZERO and pixels.dtype.kind == "u" and first.bands == 1:
        pixels = np.asarray((1 << first.bits) - 1 - pixels, pixels.dtype)
    pixels = turned(native(pixels), first.one(_ORIENTATION, 1))
    return RawImage(np.ascontiguousarray(pixels), _nodata(first), None, file.names)


def _order_of(source: Source) -> Literal["<", ">"]:
    return "<" if source.start[:1] == b"I" else ">"


def _read_virtual(source: Source, file: _File, frame: int) -> np.ndarray:
    page = file.frames[0][0]
    dtype = _dtype(page, source.path).newbyteorder(_order_of(source))
    shape = (file.per_frame, page.height, page.width, page.bands)
    size = math.prod(shape) * dtype.itemsize
    data = source.read(int(page.many(_OFFSETS)[0]) + frame * size, size)
    pixels = np.frombuffer(data, dtype).reshape(shape)
    return pixels.transpose(1, 2, 0, 3).reshape(page.height, page.width, -1)


def _read_page(source: Source, page: Page) -> np.ndarray:
    """``(H, W, C)`` of one page as stored."""
    _dtype(page, source.path)
    _check_segments(source, page)
    plain = page.one(_COMPRESSION, 1) == 1 and page.bits in (8, 16, 32, 64)
    if plain and not page.many(_TILE_OFFSETS) and page.one(_PREDICTOR, 1) == 1:
        return _read_strips(source, page)
    try:
        import tifffile
    except ImportError:
        return _read_without(source, page)
    source.file.seek(0)
    with converting(source.path), tifffile.TiffFile(source.file, name=source.path) as tif:
        tif.filehandle.seek(page.at)
        pixels = tifffile.TiffPage(tif, index=page.number).asarray(maxworkers=1)
    return _with_bands(pixels, page, source.path)


def _with_bands(pixels: np.ndarray, page: Page, path: str) -> np.ndarray:
    if pixels.ndim == 3 and page.one(_PLANES, 1) == 2 and page.bands > 1:
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape != (page.height, page.width, page.bands):
        raise ValueError(f"{path}: its pixels have the shape {pixels.shape}")
    return pixels


def _segments(page: Page) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Offsets and numbers of bytes of the strips or tiles."""
    if page.many(_TILE_OFFSETS):
        return page.many(_TILE_OFFSETS), page.many(_TILE_COUNTS)
    return page.many(_OFFSETS), page.many(_COUNTS)


def _check_segments(source: Source, page: Page) -> None:
    """Check the strips or tiles of a page, those of a codec of images by their own headers."""
    offsets, counts = _segments(page)
    planes = page.bands if page.one(_PLANES, 1) == 2 else 1
    high, wide = page.one(_TILE_HEIGHT), page.one(_TILE_WIDTH)
    if page.many(_TILE_OFFSETS):
        check_size(high, wide, page.bands // planes, page.bits // 8 or 1, source.path)
        needed = -(-page.height // high) * -(-page.width // wide) * planes
    else:
        high, wide = min(page.one(_ROWS, page.height) or page.height, page.height), page.width
        needed = -(-page.height // high) * planes
    if len(offsets) < needed or len(counts) < needed or needed > _MAX_SEGMENTS:
        raise ValueError(f"{source.path}: {len(offsets)} strips or tiles where {needed} are needed")
    compression = page.one(_COMPRESSION, 1)
    if compression not in (*_PLAIN, *_CODESTREAMS):
        raise ValueError(f"{source.path}: its compression {compression} can't be read")
    for at, count in zip(offsets[:needed], counts[:needed], strict=True):
        if at + count > source.size:
            raise ValueError(f"{source.path}: cut short")
        if compression in _CODESTREAMS and count:
            size = codestream_size(source.read(at, count))
            if size is not None and (size[0] > max(high, 16) * 2 or size[1] > max(wide, 16) * 2):
                raise ValueError(f"{source.path}: a strip or tile of {size[1]} x {size[0]} pixels")


def _read_strips(source: Source, page: Page) -> np.ndarray:
    """Read strips that are not compressed."""
    dtype = _dtype(page, source.path).newbyteorder(_order_of(source))
    planes = page.bands if page.one(_PLANES, 1) == 2 else 1
    row = page.width * (page.bands // planes) * dtype.itemsize
    rows = min(page.one(_ROWS, page.height) or page.height, page.height)
    each = -(-page.height // rows)
    offsets, counts = page.many(_OFFSETS), page.many(_COUNTS)
    out = []
    for strip in range(each * planes):
        lines = min(rows, page.height - strip % each * rows)
        if counts[strip] < lines * row:
            raise ValueError(f"{source.path}: cut short")
        out.append((int(offsets[strip]), lines * row))
    joined = all(a + n == b for (a, n), (b, _) in pairwise(out))
    if joined:
        data = source.read(out[0][0], sum(length for _, length in out))
    else:
        data = b"".join(source.read(at, length) for at, length in out)
    pixels = np.frombuffer(data, dtype)
    if planes > 1:
        return pixels.reshape(planes, page.height, page.width).transpose(1, 2, 0)
    return pixels.reshape(page.height, page.width, page.bands)


def _read_without(source: Source, page: Page) -> np.ndarray:
    """Read a compressed page without tifffile, if Pillow or OpenCV knows its kind.

    Raises:
        UserError: They do not.
    """
    source.file.seek(0)
    data = source.file.read()
    if page.bands == 1 and page.bits in (8, 16, 32):
        with converting(source.path), Image.open(BytesIO(data), formats=["TIFF"]) as image:
            # an image is turned when it is loaded, which happens here afterwards
            image.seek(page.number)
            pixels = np.array(image) if page.one(_ORIENTATION, 1) == 1 else None
        if pixels is not None and pixels.dtype == page.dtype and pixels.ndim == 2:
            return _with_bands(pixels, page, source.path)
    elif page.bands in (3, 4) and page.number == 0 and page.one(_ORIENTATION, 1) == 1:
        with converting(source.path):
            decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is not None and decoded.dtype == page.dtype and decoded.ndim == 3:
            order = [2, 1, 0, 3][: decoded.shape[2]]
            return _with_bands(decoded[..., order], page, source.path)
    raise missing_extra(source.path, "tifffile", "tiff")


def place_tags(path: str) -> list[tuple[int, int, int, Any, bool]]:
    """The tags that place a GeoTIFF on the earth, as tifffile writes them.

    Args:
        path: The image.

    Returns:
        Empty for other images, or if tifffile is not installed.
    """
    try:
        import tifffile
    except ImportError:
        return []
    with converting(path), tifffile.TiffFile(path) as image:
        tags = image.pages[0].tags
        found = [tags[code] for code in _PLACE_TAGS if code in tags]
        return [(tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in found]


def write_mask(
    mask: np.ndarray, tags: Sequence[tuple[int, int, int, Any, bool]], file: Path
) -> None:
    """Write a mask as a GeoTIFF.

    Args:
        mask: ``(H, W)`` uint8.
        tags: Result of ``place_tags``.
        file: File to write.
    """
    import tifffile

    tifffile.imwrite(file, mask, photometric="minisblack", compression="zlib", extratags=tags)
