"""Finding and decoding of image files. An image is an ``(H, W, 3)`` RGB uint8 array."""

import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from vissl_lite.data.archives import is_archive, unpack
from vissl_lite.data.headers import (
    check_tiff,
    image_size,
    is_png,
    is_tiff,
    jpeg_header,
    opened_image,
    orientation,
    png_size,
)
from vissl_lite.data.reading import check_pixels, read_regular
from vissl_lite.errors import UserError

log = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
    | {".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"}
)

# What macOS adds to an archive: for each file one of the same suffix that is not an image.
_NO_FOLDERS = frozenset({"__MACOSX"})

# What decoding raises on a broken file; anything else is a bug of ours and must surface.
BROKEN_IMAGE = (OSError, ValueError, SyntaxError, EOFError, cv2.error, Image.DecompressionBombError)


# What a JPEG can be divided by in decoding, and OpenCV's flags for it.
_REDUCED = {1: 0, 2: 16, 4: 32, 8: 64}

# What turns an image upright, by its EXIF orientation (EXIF 2.32, 4.6.4, tag 274).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def find_images(sources: Sequence[str | Path]) -> list[str]:
    """All image files in folders (searched recursively) and in text files of paths.

    Links to folders are followed, each folder once; hidden files and folders are left out, and so
    are pipes, devices and links to nothing, which the log counts. The paths of one source come
    sorted, so that an image has the same index on every machine.

    Args:
        sources: Folders, archives (which are unpacked beside), image files, or ``.txt`` files with
            one path a line (relative to the text file; empty lines and lines that start with ``#``
            are skipped).

    Returns:
        The paths, sources in the order given, without repetitions.

    Raises:
        UserError: A source does not exist, can't be read, or holds no image.
    """
    found: list[str] = []
    for source in map(Path, sources):
        odd: list[str] = []
        if source.is_dir():
            paths = walk(source, EXTENSIONS, odd)
        elif is_archive(source):
            paths = walk(unpack(source), EXTENSIONS, odd)
        elif source.suffix.lower() == ".txt" and source.is_file():
            paths = _read_list(source)
        elif source.suffix.lower() in EXTENSIONS and source.is_file():
            paths = [str(source)]
        elif source.exists():
            raise UserError(
                f"{source} is neither a folder, an archive, an image nor a .txt file of paths"
            )
        else:
            raise UserError(f"{source} does not exist")
        if not paths and odd:
            raise UserError(
                f"no images found in {source}: {len(odd)} are not regular files but "
                f"{_ODD}, the first {odd[0]}"
            )
        if not paths:
            kinds = " ".join(sorted(e[1:] for e in EXTENSIONS))
            raise UserError(f"no images found in {source} (looked for {kinds}, recursively)")
        found += paths
    # one folder holds each path once: a million need no dictionary
    one_folder = len(sources) == 1 and os.path.isdir(sources[0])
    return found if one_folder else list(dict.fromkeys(found))


_ODD = "pipes, devices or links to nothing"


def walk(
    folder: str | Path, suffixes: Collection[str] | None = None, odd: list[str] | None = None
) -> list[str]:
    """The regular files below a folder, folder by folder, sorted; hidden ones are left out.

    So are folders ``__MACOSX``. Links to folders are followed, each folder once. Pipes, devices and
    links to nothing are left out, and counted in the log.

    Args:
        folder: Folder to search; the paths begin with it.
        suffixes: Suffixes of the files to find, in lower case and with a dot.
        odd: Gets the paths of those that are not regular files.

    Raises:
        UserError: A folder can't be read.
    """

    endings = None if suffixes is None else tuple(suffixes)
    paths: list[str] = []
    odd = [] if odd is None else odd
    seen, ahead = set(), [os.fspath(folder)]
    while ahead:
        root = ahead.pop()
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back
            continue
        seen.add(real)
        files, folders, others = _entries(root, endings)
        start = os.path.join(root, "")
        paths += [start + name for name in files]
        odd += [start + name for name in others]
        ahead += [start + name for name in reversed(folders)]
    if odd:
        log.warning(
            f"left out, as no regular files but {_ODD}: %(files)d, the first %(first)s",
            {"files": len(odd), "first": odd[0]},
            extra={"code": "file.irregular"},
        )
    return paths


def _entries(
    folder: str, endings: tuple[str, ...] | None
) -> tuple[list[str], list[str], list[str]]:
    """Entries of a folder, sorted by name.

    Returns:
        Regular files with one of the endings, folders, and what else has one of the endings.
    """
    files: list[str] = []
    folders: list[str] = []
    others: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if _is(entry.is_dir):
                    if name in _NO_FOLDERS:
                        continue
                    folders.append(name)
                elif endings is None or name.lower().endswith(endings):
                    # the folder says which it is; of a link, what is_dir has found is known
                    (files if _is(entry.is_file) else others).append(name)
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from None
    return sorted(files), sorted(folders), sorted(others)


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself
        return False


def _read_list(file: Path) -> list[str]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} can't be read as a text file of paths: {error}") from None
    if b"\0" in content:  # UTF-16, or no text at all
        raise UserError(f"{file} can't be read as a text file of paths: it is not in UTF-8")
    # names on the disk need not be UTF-8
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = [line.strip() for line in text.split("\n")]
    paths = [str(file.parent / line) for line in lines if line and not line.startswith("#")]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{file} names {len(missing)} missing files, the first {missing[0]}")
    return paths


def read_image(path: str | Path, shortest: int | None = None) -> np.ndarray:
    """Decode an image file to RGB.

    Plain 8-bit JPEG and PNG files go through OpenCV, the rest through Pillow: the first frame of a
    GIF, palettes, alpha (laid over white), CMYK, 16 bits. EXIF orientation is applied. Sixteen-bit
    gray values are scaled to eight bits: by 1/16 where all fit into 12 bits (as cameras and
    scanners store them), else by 1/257. Floating-point images are scaled from their own minimum
    and maximum. A PGM or PPM file whose header has another maximum than 65535 is scaled by that.

    Args:
        path: The file.
        shortest: The shorter side, in pixels, that is needed. A JPEG that is at least twice as
            large is decoded at 1/2, 1/4 or 1/8 of its size, several times as fast.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        OSError, ValueError, SyntaxError, cv2.error: the file is missing, no regular file, broken,
            or has more pixels than are allowed (``BROKEN_IMAGE``).
    """
    return decode_image(read_regular(path), path, shortest)


def decode_image(data: bytes, path: str | Path, shortest: int | None = None) -> np.ndarray:
    """Decode the bytes of an image file; see ``read_image``.

    Args:
        data: The file's bytes.
        path: Named in errors.
        shortest: The shorter side, in pixels, that is needed.
    """
    if shortest is None:
        return decode_reduced(data, path, lambda height, width: 1)[0]
    needed = max(shortest, 1)
    return decode_reduced(data, path, lambda height, width: min(height, width) // needed)[0]


def decode_reduced(
    data: bytes, path: str | Path, times: Callable[[int, int], int]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode the bytes of an image file, a JPEG no larger than needed; see ``read_image``.

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
        read = _read_pnm(data, path)
        if read is None:
            read = _read_with_pillow(data, path)
        return read, (read.shape[0], read.shape[1])
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise ValueError(f"{path}: can't be decoded")
    height, width = image.shape[:2]
    # a header may have an orientation that OpenCV does not follow
    if whole is None or (height, width) != (-(-whole[0] // factor), -(-whole[1] // factor)):
        whole = height, width
    return image, whole


def _is_plain_png(data: bytes) -> bool:
    """Whether a PNG is 8-bit gray or RGB without transparency, which OpenCV decodes as it is."""
    if not is_png(data):
        return False
    depth, kind = data[24], data[25]
    return depth == 8 and kind in (0, 2) and b"tRNS" not in data[33 : data.find(b"IDAT")]


_PNM_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_HEADER = re.compile(
    rb"P([56])" + _PNM_GAP + rb"(\d{1,9})" + _PNM_GAP + rb"(\d{1,9})" + _PNM_GAP + rb"(\d{1,5})\s"
)


def _read_pnm(data: bytes, path: str | Path) -> np.ndarray | None:
    """Decode a binary PGM or PPM file whose maximum is not 255, which takes Pillow seconds.

    Format: https://netpbm.sourceforge.net/doc/ppm.html and pgm.html.

    Returns:
        ``(H, W, 3)`` uint8; None for other files.
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
    if largest == 65535:
        scaled = _to_eight_bits(values)
    else:
        table = np.minimum(np.arange(np.iinfo(dtype).max + 1), largest) * 255.0 / largest
        scaled = table.round().astype(np.uint8)[values]
    image = scaled.reshape(height, width, channels)
    return image if channels == 3 else np.repeat(image, 3, axis=2)


def _read_with_pillow(data: bytes, path: str | Path) -> np.ndarray:
    try:
        with opened_image(BytesIO(data), path) as image:
            return _from_pillow(image)
    except UnidentifiedImageError:
        if not is_tiff(data):
            raise
    # 16-bit color and the like, which Pillow does not know
    check_tiff(BytesIO(data), path)
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYDEPTH | 256)
    if decoded is None:
        raise ValueError(f"{path}: can't be decoded")
    return _to_eight_bits(decoded)


def _from_pillow(image: Image.Image) -> np.ndarray:
    image.load()  # by which a TIFF is turned, and what EXIF data stands behind the pixels is read
    turn = _UPRIGHT.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_to_eight_bits(np.asarray(image))[..., None], 3, axis=2)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if np.issubdtype(values.dtype, np.floating):
        low, high = np.nanmin(values), np.nanmax(values)
        scaled = (values - low) * (255.0 / ((high - low) or 1.0))
        return np.nan_to_num(scaled).round().astype(np.uint8)
    values = np.clip(values, 0, 65535)
    return (values // 16 if values.max() < 4096 else values // 257).astype(np.uint8)


# An image longer than so many times its shorter side is cut before its shorter side is enlarged: a
# line of a hundred thousand pixels would become billions.
_STRIP = 16


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side to ``size`` and crop the central square, as for evaluation.

    Args:
        image: ``(H, W, C)``.
        size: Side of the result in pixels.

    Returns:
        ``(size, size, C)``, the dtype of the image.
    """
    height, width = image.shape[:2]
    if min(height, width) != size:
        longest = _STRIP * min(height, width)
        if max(height, width) > longest:
            top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
            image = image[top : top + longest, left : left + longest]
            height, width = image.shape[:2]
        scale = size / min(height, width)
        shape = (max(size, round(width * scale)), max(size, round(height * scale)))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        image = cv2.resize(image, shape, interpolation=how)
        height, width = image.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def suitable_size(
    paths: Sequence[str], side: Callable[[tuple[int, int]], int] = min, most: int = 224
) -> int:
    """Image size that suits the images: their median shorter side, as a multiple of 32.

    Args:
        paths: Image files, of which some are looked at.
        side: Side to compare, the shorter (``min``) or the longer (``max``).
        most: Largest result; the smallest is 32.
    """
    sides = []
    for path in paths[:: max(1, len(paths) // 50)]:
        try:
            sides.append(side(image_size(path)))
        except BROKEN_IMAGE:
            continue
    median = float(np.median(sides)) if sides else most
    return int(min(most, max(32, round(median / 32) * 32)))
