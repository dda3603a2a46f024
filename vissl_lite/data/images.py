"""Finding of image files, and decoding to ``(H, W, 3)`` RGB uint8 arrays.

``data/formats`` reads the values of files that are not 8-bit photographs as they are.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from vissl_lite.data import formats
from vissl_lite.data.archives import is_archive, unpack
from vissl_lite.data.formats import encode_frame, image_size, is_image_path, read_raw, split_path
from vissl_lite.data.formats.common import (
    ARRAY_SUFFIXES,
    DICOM_SUFFIXES,
    NIFTI_SUFFIXES,
    TIFF_SUFFIXES,
    NoImageError,
)
from vissl_lite.data.formats.dicom import PREFIX_END, is_dicom
from vissl_lite.data.reading import open_regular, read_regular
from vissl_lite.errors import UserError

log = logging.getLogger(__name__)

_PHOTOGRAPHS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".avif", ".jp2", ".j2k"}
    | {".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"}
)
EXTENSIONS = _PHOTOGRAPHS | TIFF_SUFFIXES | DICOM_SUFFIXES | NIFTI_SUFFIXES | ARRAY_SUFFIXES

_ENDINGS, _ARRAY_ENDINGS = tuple(EXTENSIONS), tuple(ARRAY_SUFFIXES)

# The most frequent ones first: each name is compared with one after another.
_USUAL = (".jpg", ".png", ".jpeg")
_PHOTOGRAPH_ENDINGS = (*_USUAL, *sorted(_PHOTOGRAPHS.difference(_USUAL)))

# The last letters of photographs, by which a million of them are told from other images at once.
_PHOTOGRAPH_ENDS = frozenset(suffix[-3:] for suffix in _PHOTOGRAPHS)

# What a name ends with that is not one of a DICOM file without suffix, such as ``IM0001``, or one
# named by its UID.
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]*$")

# After so many files without suffix of which none is DICOM, a folder is taken to hold none.
_MAX_OTHERS = 100

# What macOS adds to an archive: for each file one of the same suffix that is not an image.
_NO_FOLDERS = frozenset({"__MACOSX"})

# What decoding raises on a broken file; anything else is a bug of ours and must surface.
BROKEN_IMAGE = (OSError, ValueError, SyntaxError, EOFError, cv2.error, Image.DecompressionBombError)

# Files that a thread describes in one go.
_STRETCH = 64


def find_images(sources: Sequence[str | Path]) -> list[str]:
    """All image files in folders (searched recursively) and in text files of paths.

    Links to folders are followed, each folder once; hidden files and folders are left out, and so
    are pipes, devices and links to nothing, which the log counts. The paths of one source come
    sorted, so that an image has the same index on every machine.

    Of files that hold several images (volumes, stacks, pages) each is a path of its own, such as
    ``scan.nii.gz#17``; the files of a DICOM series are sorted by their position; see
    ``expand_frames``. In a folder without other images DICOM files are found without a suffix, and
    arrays (.npy, .npz).

    Args:
        sources: Folders, archives (which are unpacked beside), image files, or ``.txt`` files with
            one path a line (relative to the text file; empty lines and lines that start with ``#``
            are skipped).

    Returns:
        The paths, sources in the order given, without repetitions.

    Raises:
        UserError: A source does not exist, can't be read, holds no image, or needs a library that
            is not installed.
    """
    found: list[str] = []
    for source in map(Path, sources):
        odd: list[str] = []
        others = True
        if source.is_dir():
            paths, others, odd = _walk(source, True)
        elif is_archive(source):
            paths, others, odd = _walk(unpack(source), True)
        elif source.suffix.lower() == ".txt" and source.is_file():
            paths = _read_list(source)
        elif _is_image_file(str(source)):
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
        if others:  # a million photographs need no further look
            paths = expand_frames(paths)
        if not paths:
            kinds = " ".join(sorted(e[1:] for e in EXTENSIONS))
            raise UserError(f"no images found in {source} (looked for {kinds}, recursively)")
        found += paths
    # one folder holds each path once: a million need no dictionary
    one_folder = len(sources) == 1 and os.path.isdir(sources[0])
    return found if one_folder else list(dict.fromkeys(found))


def _is_image_file(path: str) -> bool:
    file, _ = split_path(path)
    if not os.path.isfile(file):
        return False
    return file.lower().endswith(_ENDINGS) or _is_bare_dicom(file)


def _is_bare_dicom(file: str) -> bool:
    """Whether a file without a suffix begins as a DICOM file."""
    if _SUFFIX.search(os.path.basename(file)):
        return False
    try:
        with open_regular(file) as opened:
            return is_dicom(opened.read(PREFIX_END))
    except OSError:
        return False


class _Frames(NamedTuple):
    """What ``expand_frames`` needs to know of a file.

    Attributes:
        frames: Number of frames; 0 for a file without images.
        series: Series of a DICOM file.
        position: Its position in the series.
    """

    frames: int
    series: str | None = None
    position: float = 0.0


def expand_frames(paths: Sequence[str]) -> list[str]:
    """Replace files of several images by paths of their slices, pages or frames, in order.

    Their headers are read by several threads, those of photographs not at all. The DICOM files of
    one folder and series are sorted by their position along the normal of the slices. DICOM
    objects without pixels (DICOMDIR, structured reports) are left out, and counted in the log.
    Broken files stay, to be counted where images are read.

    Args:
        paths: Image files; those that name a frame stay as they are.

    Raises:
        UserError: A file needs a library that is not installed.
    """
    asked = [index for index, path in enumerate(paths) if _may_hold_frames(path)]

    def look(first: int) -> list[_Frames]:
        return [_frames(paths[index]) for index in asked[first : first + _STRETCH]]

    known: dict[int, _Frames] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        firsts = range(0, len(asked), _STRETCH)
        for first, some in zip(firsts, threads.map(look, firsts), strict=True):
            known |= zip(asked[first : first + _STRETCH], some, strict=True)
    places = _sorted_series(paths, known)
    found: list[str] = []
    empty: list[str] = []
    for index in range(len(paths)):
        at = places.get(index, index)
        path, frames = paths[at], known.get(at, _Frames(1)).frames
        if frames == 0:
            empty.append(path)
        elif frames == 1:
            found.append(path)
        else:
            found += [f"{path}#{number}" for number in range(frames)]
    if empty:
        log.warning(
            "left out, as DICOM objects without an image: %(files)d, the first %(first)s",
            {"files": len(empty), "first": empty[0]},
            extra={"code": "file.no_image"},
        )
    return found


def _may_hold_frames(path: str) -> bool:
    return path[-3:].lower() not in _PHOTOGRAPH_ENDS and split_path(path)[1] is None


def _frames(path: str) -> _Frames:
    try:
        found = formats.describe(path)
    except NoImageError:
        return _Frames(0)
    except BROKEN_IMAGE:
        return _Frames(1)
    series = found.volume if found.format == "DICOM" and found.frames == 1 else None
    return _Frames(found.frames, series, found.position or 0.0)


def _sorted_series(paths: Sequence[str], known: dict[int, _Frames]) -> dict[int, int]:
    """Which DICOM file stands at each place: those of a folder by series, and by position in it.

    Returns:
        Index of a path, by place; places of other files are missing.
    """
    folders: dict[str, dict[str, list[int]]] = {}
    for index, one in known.items():
        if one.series is not None:
            folder = folders.setdefault(os.path.dirname(paths[index]), {})
            folder.setdefault(one.series, []).append(index)
    places: dict[int, int] = {}
    for folder in folders.values():
        ordered = [
            index
            for series in folder.values()
            for index in sorted(series, key=lambda at: (known[at].position, paths[at]))
        ]
        places |= zip(sorted(ordered), ordered, strict=True)
    return places


_ODD = "pipes, devices or links to nothing"


def walk(folder: str | Path) -> list[str]:
    """The regular files below a folder, folder by folder, sorted; hidden ones are left out.

    So are folders ``__MACOSX``. Links to folders are followed, each folder once. Pipes, devices and
    links to nothing are left out, and counted in the log.

    Args:
        folder: Folder to search; the paths begin with it.

    Raises:
        UserError: A folder can't be read.
    """
    return _walk(folder, False)[0]


def _walk(folder: str | Path, images: bool) -> tuple[list[str], bool, list[str]]:
    """The files below a folder; see ``walk``.

    Args:
        folder: Folder to search.
        images: Whether to find only images; see ``image_names``.

    Returns:
        Paths, whether some may be no photographs, and paths of what is no regular file.
    """
    paths: list[str] = []
    odd: list[str] = []
    others = False
    seen, ahead = set(), [os.fspath(folder)]
    while ahead:
        root = ahead.pop()
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back
            continue
        seen.add(real)
        found = _entries(root, images)
        start = os.path.join(root, "")
        paths += [start + name for name in found.files]
        odd += [start + name for name in found.odd]
        ahead += [start + name for name in reversed(found.folders)]
        others = others or found.others
    if odd:
        log.warning(
            f"left out, as no regular files but {_ODD}: %(files)d, the first %(first)s",
            {"files": len(odd), "first": odd[0]},
            extra={"code": "file.irregular"},
        )
    return paths, others, odd


class _Entries(NamedTuple):
    """Entries of a folder, sorted by name.

    Attributes:
        files: Regular files, or the images among them.
        folders: Folders.
        odd: What else could be a file to find, by its name.
        others: Whether images may be no photographs.
    """

    files: list[str]
    folders: list[str]
    odd: list[str]
    others: bool


def _entries(folder: str, images: bool) -> _Entries:
    files: list[str] = []
    folders: list[str] = []
    odd: list[str] = []
    unknown: list[str] = []
    others = False
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
                elif not images or name.endswith(_PHOTOGRAPH_ENDINGS):
                    # the folder says which it is; of a link, what is_dir has found is known
                    (files if _is(entry.is_file) else odd).append(name)
                elif name.lower().endswith(_ENDINGS):
                    others = True
                    (files if _is(entry.is_file) else odd).append(name)
                elif not files and _is(entry.is_file):
                    unknown.append(name)
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from None
    if images and (others or not files):
        files = image_names(folder, files or unknown)
        others = bool(files)
    return _Entries(sorted(files), sorted(folders), sorted(odd), others)


def image_names(folder: str | Path, names: Iterable[str]) -> list[str]:
    """The images among the files of one folder, in their order.

    By their suffixes; arrays (.npy, .npz) only where there are no others, as they may hold
    anything; and where there are none at all, DICOM files without suffix, by their content.

    Args:
        folder: The folder.
        names: Names of regular files in it.
    """
    names = list(names)
    found = [name for name in names if name.lower().endswith(_ENDINGS)]
    if found:
        return [name for name in found if not name.lower().endswith(_ARRAY_ENDINGS)] or found
    for tried, name in enumerate(names):
        if tried >= _MAX_OTHERS and not found:
            break
        if _is_bare_dicom(os.path.join(folder, name)):
            found.append(name)
    return found


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
    missing = [path for path in paths if not os.path.isfile(path) and not is_image_path(path)]
    if missing:
        raise UserError(f"{file} names {len(missing)} missing files, the first {missing[0]}")
    return paths


def read_content(path: str | Path) -> bytes:
    """The content of an image file; of a path that names a frame, that of a file of it alone.

    Args:
        path: The file; may name a frame.

    Returns:
        Bytes for ``decode_image``: those of the file, or an ``.npz`` file of the frame.

    Raises:
        OSError, ValueError, SyntaxError, cv2.error: See ``read_image``.
    """
    if split_path(path)[1] is None:
        return read_regular(path)
    return encode_frame(path)


def read_image(path: str | Path, shortest: int | None = None) -> np.ndarray:
    """Decode an image file to RGB, to be looked at.

    Plain 8-bit JPEG and PNG files go through OpenCV, other photographs through Pillow: the first
    frame of a GIF, palettes, alpha (laid over white), CMYK. EXIF orientation is applied. Everything
    else (more bits, other numbers of bands, DICOM, NIfTI, arrays) is stretched by its own
    percentiles; see ``formats.to_rgb``, and ``formats.read_raw`` for the values.

    Args:
        path: The file; may name a slice, page or frame.
        shortest: The shorter side, in pixels, that is needed. A JPEG that is at least twice as
            large is decoded at 1/2, 1/4 or 1/8 of its size, several times as fast.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        OSError, ValueError, SyntaxError, cv2.error: the file is missing, no regular file, broken,
            or has more pixels than are allowed (``BROKEN_IMAGE``).
        UserError: It needs a library that is not installed.
    """
    if split_path(path)[1] is not None:
        return formats.to_rgb(read_raw(path))
    return decode_image(read_regular(path), path, shortest)


def decode_image(data: bytes, path: str | Path, shortest: int | None = None) -> np.ndarray:
    """Decode the bytes of an image file; see ``read_image``.

    Args:
        data: The file's bytes, or what ``read_content`` returns.
        path: Named in errors.
        shortest: The shorter side, in pixels, that is needed.
    """
    if shortest is None:
        return formats.decode_reduced(data, path, lambda height, width: 1)[0]
    needed = max(shortest, 1)
    return formats.decode_reduced(data, path, lambda height, width: min(height, width) // needed)[0]


# An image longer than so many times its shorter side is cut before its shorter side is enlarged: a
# line of a hundred thousand pixels would become billions.
_STRIP = 16


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image: by averaging over areas to a smaller one, else by linear interpolation.

    Args:
        image: ``(H, W, C)`` of any number of channels.
        size: Height and width of the result.
    """
    shape, channels = size[::-1], image.shape[2]
    smaller = size[0] < image.shape[0] or size[1] < image.shape[1]
    how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    if channels == 3:
        return np.asarray(cv2.resize(image, shape, interpolation=how))
    parts = [  # OpenCV averages at most four channels, and drops a single one
        cv2.resize(np.ascontiguousarray(image[..., at : at + 4]), shape, interpolation=how)
        for at in range(0, channels, 4)
    ]
    return np.concatenate([part.reshape(*size, -1) for part in parts], axis=2)


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
        shape = (max(size, round(height * scale)), max(size, round(width * scale)))
        image = resize(image, shape)
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
