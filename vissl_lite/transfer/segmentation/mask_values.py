"""The classes of mask files: class numbers, gray levels or colors, found out from all masks."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import cv2
import numpy as np

from vissl_lite.data.formats import image_size, volume_layout
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import reason
from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.segmentation.mask_source import (
    IGNORE_INDEX,
    MaskSource,
    color_codes,
    color_name,
    color_runs,
    read_colors,
    read_raw,
)
from vissl_lite.transfer.sources.reading_log import ReadingLog

# Maximum number of colors that are made classes without a table of colors.
MAX_COLORS = 64

# Names of classes that mean no object.
BACKGROUND = ("background", "bg", "void", "none", "unlabelled", "unlabeled")

# Masks with at least so many gray levels between black and white are smoothed, if so many of their
# pixels are black or white, and some level is above the usual numbers of classes.
_SMOOTHED_LEVELS, _SMOOTHED_SHARE, _SMOOTHED_MAX = 16, 0.8, 200

# Number of masks that are read at once.
_CHUNK = 256

VOC_NAMES = tuple(
    """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
    motorbike person pottedplant sheep sofa train tvmonitor""".split()
)

Pair = tuple[str, tuple[str, ...]]  # image file and mask files


class ColorTable(NamedTuple):
    """Colors of classes.

    Attributes:
        file: File that they stand in.
        names: Class name of each color ``65536 R + 256 G + B``.
    """

    file: str
    names: dict[int, str]


def voc_colors() -> dict[int, int]:
    """Class index of each color of Pascal VOC's palette; that of borders is ignored.

    From ``VOClabelcolormap.m`` of the VOC2012 development kit.
    """
    codes: dict[int, int] = {}
    for number in (*range(len(VOC_NAMES)), IGNORE_INDEX):
        color, rest = [0, 0, 0], number
        for bit in range(7, -1, -1):
            for channel in range(3):
                color[channel] |= (rest >> channel & 1) << bit
            rest >>= 3
        codes[color[0] << 16 | color[1] << 8 | color[2]] = number
    return codes


class _FileValues(NamedTuple):
    """What occurs in a mask file.

    Attributes:
        counts: Number of pixels ``(256,)`` int64 of each gray value or palette index; None if the
            file is in color.
        colors: Number of pixels of each color; empty if the file is gray.
    """

    counts: np.ndarray | None
    colors: dict[int, int]


@dataclass(frozen=True)
class _Values:
    """What occurs in the masks of a data set.

    Attributes:
        gray: Which values occur in each file that is not in color, 32 bytes each.
        colors: The colors of each file in color or with a palette.
        gray_counts: Pixels of each value in all files.
        color_counts: Pixels of each color in all files, gray ones, too.
        in_color: Files in color.
    """

    gray: dict[str, bytes]
    colors: dict[str, tuple[int, ...]]
    gray_counts: np.ndarray
    color_counts: Counter[int]
    in_color: list[str]


def number_classes(
    source: str,
    pairs: Sequence[Pair],
    names: list[str] | None,
    table: ColorTable | None,
    voc: bool,
    log: ReadingLog,
) -> tuple[list[tuple[MaskSource, tuple[int, ...]]], list[str]]:
    """Read all masks once, and find out what their values mean.

    Args:
        source: Data set, for messages.
        pairs: Images with their masks.
        names: Names of classes, where given.
        table: Colors of classes, where given.
        voc: Whether colors may be those of Pascal VOC.
        log: Gets notes on what values mean.

    Returns:
        For each pair its mask and the classes that occur in it; and the names of all classes.

    Raises:
        UserError: See ``load_masks``.
    """
    values = _read_values(pairs, max(MAX_COLORS, len(table.names) if table else 0))
    by_color = _by_color(source, values, names, table, voc, log)
    if by_color is not None:
        numbers, names = by_color
        colors = tuple(sorted(numbers.items()))
        found = {
            file: {numbers[code] for code in values.colors.get(file) or _gray_codes(values, file)}
            for _, files in pairs
            for file in files
        }
        sources = [MaskSource(files, colors=colors) for _, files in pairs]
    else:
        if names is None and table is not None:
            names = list(dict.fromkeys(table.names.values()))
        levels, names = _by_level(source, values, names, log)
        _check_values(values, names, levels)
        found = {
            file: {levels[value] for value in _unpacked(occurring)}
            for file, occurring in values.gray.items()
        }
        plain = levels == bytes(range(256))
        sources = [MaskSource(files, None if plain else levels) for _, files in pairs]
    several = next((pair for pair in pairs if len(pair[1]) > 1), None)
    if several is not None and len(names) > 2:
        raise UserError(
            f"{several[0]} has {len(several[1])} masks, which are merged only where masks are "
            f"binary, but those of {source} hold {len(names)} classes: keep one mask per image"
        )
    occurring = [
        tuple(sorted(set().union(*(found[file] for file in files)) - {IGNORE_INDEX}))
        for _, files in pairs
    ]
    return list(zip(sources, occurring, strict=True)), names


def _read_values(pairs: Sequence[Pair], max_colors: int) -> _Values:
    values = _Values({}, {}, np.zeros(256, np.int64), Counter(), [])
    files = ((image, file) for image, masks in pairs for file in masks)
    with ThreadPoolExecutor(4) as pool:
        while chunk := list(islice(files, _CHUNK)):
            results: Iterator[_FileValues] = pool.map(
                lambda pair: _values_of(pair[0], pair[1], max_colors), chunk
            )
            for (_, file), one in zip(chunk, results, strict=True):
                if one.counts is None:
                    values.in_color.append(file)
                else:
                    values.gray[file] = np.packbits(one.counts > 0).tobytes()
                    values.gray_counts[:] += one.counts
                if one.colors:
                    values.colors[file] = tuple(one.colors)
                    values.color_counts.update(one.colors)
                elif one.counts is not None:
                    shades = np.flatnonzero(one.counts).tolist()
                    pixels = {value * 0x010101: int(one.counts[value]) for value in shades}
                    values.color_counts.update(pixels)
    return values


def _unpacked(occurring: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(occurring, np.uint8))
    return [int(value) for value in np.flatnonzero(bits)]


def _gray_codes(values: _Values, file: str) -> list[int]:
    """The colors of a gray file."""
    return [value * 0x010101 for value in _unpacked(values.gray[file])]


def _values_of(image: str, file: str, max_colors: int) -> _FileValues:
    """What occurs in a mask. Raises a UserError if it does not fit its image."""
    try:
        raw = read_raw(file)
        height, width = raw.values.shape[:2]
        in_color = raw.values.ndim == 3
        colors: dict[int, int] = {}
        if in_color or raw.palette:
            codes = color_codes(raw.values) if in_color else read_colors(file)
            colors = _count_colors(codes)
    except BROKEN_IMAGE as error:
        raise UserError(
            f"the mask {file} can't be read ({reason(error, file)}): repair it, or "
            f"remove it together with {image}"
        ) from None
    size = _image_size(image)
    if size is not None and size != (height, width):
        raise UserError(
            f"the mask {file} has {width} x {height} pixels, its image "
            f"{image} has {size[1]} x {size[0]} after its EXIF rotation"
        )
    _check_layout(image, file)
    if in_color:
        if len(colors) > max_colors:
            raise UserError(
                f"the mask {file} holds {len(colors)} colors, more than {max_colors}, as if it "
                f"were smoothed or a photograph: save masks as PNG without smoothing, and list the "
                f"colors of more classes in a class_dict.csv with name,r,g,b"
            )
        return _FileValues(None, colors)
    counts = cv2.calcHist([raw.values], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    return _FileValues(counts, colors)


def _check_layout(image: str, file: str) -> None:
    """Raise a UserError if a mask is a volume that shows other places than that of its image.

    Its slices would be mirrored or turned.
    """
    try:
        of_mask, of_image = volume_layout(file), volume_layout(image)
    except BROKEN_IMAGE:  # the mask could be read, and images are checked when they are read
        return
    if of_mask is not None and of_image is not None and not of_mask.matches(of_image):
        raise UserError(
            f"the mask {file} has another orientation ({of_mask}) than its image {image} "
            f"({of_image}), and another place: save the mask with the affine of the image"
        )


def _count_colors(codes: np.ndarray) -> dict[int, int]:
    """Pixels of each color."""
    values, lengths = color_runs(codes)
    colors, places = np.unique(values, return_inverse=True)
    counts = np.bincount(places.ravel(), lengths)
    return dict(zip(colors.tolist(), counts.astype(np.int64).tolist(), strict=True))


def _image_size(path: str) -> tuple[int, int] | None:
    """Height and width after EXIF rotation, from the header; None for images that can't be read."""
    try:
        return image_size(path)
    except BROKEN_IMAGE:
        return None


# Colors


def _by_color(
    source: str,
    values: _Values,
    names: list[str] | None,
    table: ColorTable | None,
    voc: bool,
    log: ReadingLog,
) -> tuple[dict[int, int], list[str]] | None:
    """The class index of each color, and the names; None if masks hold numbers."""
    counts = values.color_counts
    if table is not None and set(counts) <= set(table.names):
        own = list(dict.fromkeys(table.names.values()))
        log.label = f"colors of {table.file}"
        return {code: own.index(name) for code, name in table.names.items()}, own
    if not values.in_color:
        return None
    gray = [file for file in values.gray if file not in values.colors]
    numbers = {value for file in gray for value in _unpacked(values.gray[file])} - {0, 255}
    if numbers and len(gray) > len(values.in_color):
        raise UserError(
            f"the mask {values.in_color[0]} holds colors, but {len(gray)} others hold class "
            f"numbers: convert each color to its class number, 0, 1, 2 and so on, in one gray "
            f"channel"
        )
    if table is not None:
        unknown = next(code for code, _ in counts.most_common() if code not in table.names)
        raise UserError(
            f"the masks of {source} hold the color {color_name(unknown)}, which {table.file} does "
            f"not name: add it there, as name,{unknown >> 16},{unknown >> 8 & 255},{unknown & 255}"
        )
    known = voc_colors()
    border = next(code for code, number in known.items() if number == IGNORE_INDEX)
    if set(counts) <= known.keys() and (voc or border in counts):
        log.label = "colors of Pascal VOC"
        own = list(VOC_NAMES)
        if names is not None and len(names) == len(own):
            own = names
        return known, own
    if len(counts) > MAX_COLORS:
        raise UserError(
            f"the masks of {source} hold {len(counts)} colors, more than {MAX_COLORS}: if they are "
            f"smoothed, save them as PNG without smoothing; otherwise list the colors of the "
            f"classes in {source}/class_dict.csv with name,r,g,b"
        )
    order = sorted(counts, key=lambda code: (code != 0, -counts[code], code))
    own = [color_name(code) if code else "background" for code in order]
    if names is not None and len(names) == len(own):
        own = names
    elif names is not None and len(names) == len(own) - 1 and order[0] == 0:
        own = ["background", *names]
    elif names is not None:
        raise UserError(
            f"the masks of {source} hold {len(own)} colors, but {len(names)} classes are named: "
            f"list the color of each class in {source}/class_dict.csv with name,r,g,b"
        )
    pairs = [f"{color_name(code)} is {name}" for code, name in zip(order, own, strict=True)]
    if names is None:
        pairs = [color_name(code) for code in order]
    log.note(
        f"Each color in the masks is made a class, black first and then by number of pixels: "
        f"{', '.join(pairs)}. A file class_dict.csv with name,r,g,b would name them"
    )
    log.label = "colors"
    return {code: number for number, code in enumerate(order)}, own


# Gray levels


def _by_level(
    source: str, values: _Values, names: list[str] | None, log: ReadingLog
) -> tuple[bytes, list[str]]:
    """The class index of each value, and the names of the classes."""
    used = [int(value) for value in np.flatnonzero(values.gray_counts)]
    below = [value for value in used if value != IGNORE_INDEX]
    if not below:
        raise UserError(f"the masks of {source} hold no class: two or more are needed")
    if used == [0, IGNORE_INDEX] and (names is None or len(names) <= 2):
        log.note("The masks hold only 0 and 255: 255 is used as the second class")
        return _table({0: 0, IGNORE_INDEX: 1}), _named(["background", "foreground"], names)
    largest = below[-1]
    if names is not None and len(names) == largest and names[0].lower() not in BACKGROUND:
        names = ["background", *names]
    if names is not None and largest < len(names):
        return bytes(range(256)), names
    _check_smoothing(source, values.gray_counts, used)
    even = _evenly_spaced(used)
    sparse = used if even and IGNORE_INDEX in used else below
    spread = even or 2 * len(below) <= largest
    fits = names is None or len(sparse) - len(names) in (0, 1)
    if not (spread and fits):
        if names is None:
            numbers = [str(index) for index in range(largest + 1)]
            names = ["background", "foreground"] if largest == 1 else numbers
        return bytes(range(256)), names  # of which some may be too large, see _check_values
    own = _named([str(value) for value in sparse], names)
    words = [str(value) for value in sparse]
    if names is not None:
        words = [f"{value} is {name}" for value, name in zip(sparse, own, strict=True)]
    ignored = "" if sparse == used else "; 255 is ignored"
    log.note(
        f"The masks hold gray levels, each of which is made a class: {brief(', '.join(words))}"
        f"{ignored}"
    )
    return _table({value: number for number, value in enumerate(sparse)}), own


def _table(numbers: Mapping[int, int]) -> bytes:
    return bytes(numbers.get(value, IGNORE_INDEX) for value in range(256))


def _named(usual: list[str], names: list[str] | None) -> list[str]:
    """The usual names, or the given ones if they are as many or lack the background only."""
    if names is None or len(usual) - len(names) not in (0, 1):
        return usual
    return names if len(names) == len(usual) else ["background", *names]


def _evenly_spaced(used: list[int]) -> bool:
    """Whether values are gray levels at equal distances, such as 0, 127 and 255."""
    if len(used) < 3:
        return False
    steps = np.diff(used)
    return bool(steps.min() > 1 and steps.max() - steps.min() <= 1)


def _check_smoothing(source: str, counts: np.ndarray, used: list[int]) -> None:
    between = [value for value in used if value not in (0, IGNORE_INDEX)]
    extreme = counts[[0, IGNORE_INDEX]]
    if (
        len(between) >= _SMOOTHED_LEVELS
        and between[-1] >= _SMOOTHED_MAX
        and extreme.min() > 0
        and extreme.sum() >= _SMOOTHED_SHARE * counts.sum()
    ):
        raise UserError(
            f"the masks of {source} are mostly 0 and 255, with {len(between)} gray levels between "
            f"as from smoothing or resizing: save them as PNG with 0 below 128, and 255 from "
            f"there on"
        )


def _check_values(values: _Values, names: list[str], levels: bytes) -> None:
    """Raise a UserError if a value is neither a class nor ignored."""
    for file, occurring in values.gray.items():
        invalid = [v for v in _unpacked(occurring) if len(names) <= levels[v] < IGNORE_INDEX]
        if invalid:
            raise UserError(
                f"the mask {file} holds {invalid[0]}, which is neither "
                f"a class (0 to {len(names) - 1}) nor 255 (ignored)"
            )
