"""Finding out how the images of a data set are to be read, from a sample of them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from vissl_lite.data.formats import Description, describe, read_raw
from vissl_lite.data.image_reader import (
    BAND_MAX,
    BINS,
    FRAMES,
    MAX_BANDS,
    PHOTOGRAPHS,
    ImageReader,
    joined,
    percentile_range,
    sampled,
    volume_of,
)
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import slice_axis
from vissl_lite.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

# Headers and images that are looked at.
HEADERS, SAMPLE = 64, 300

# Ratio of the values of volumes (90th to 10th percentile of their highest values) from which each
# volume is taken to be on a scale of its own, and volumes that are compared.
OWN_SCALES, VOLUMES = 3.0, 32

# Windows of computed tomography: center and width in Hounsfield units.
WINDOWS: Mapping[str, tuple[float, float]] = {
    "abdomen": (60, 400),
    "bone": (400, 1800),
    "brain": (40, 80),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "soft_tissue": (40, 400),
}

# Value ranges that are not two numbers.
RANGES = ("percentile", "dtype", "image")

# Bands that are read of an image, at most: those that an array of OpenCV 5 can have
# (of OpenCV 4: 512).
MAX_CHOSEN_BANDS = 128

# Values in common use for pixels without data, where a file does not name its own.
_NODATA = (-9999.0, -32768.0, -99999.0, float(np.finfo(np.float32).min))


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """What a user says of images that are no photographs. An encoder remembers what it means."""

    bands: str | None = None
    """Bands of the images to use, numbered from 1 in the files, such as 4,3,2; or all. Default: all
    (8-bit gray or color images without --bands are photographs)."""
    window: str | None = None
    """Range of values of computed tomography to use: center,width in Hounsfield units; lung, bone,
    brain, abdomen, mediastinum or soft_tissue; or file for the one that each DICOM file names."""
    value_range: str | None = None
    """Range of values that each band is scaled from: percentile (0.1 to 99.9 of a sample of the
    training images), dtype (all values that the files can hold), low,high, or image (percentiles of
    each image by itself). Default: percentile; by volume, if volumes are on scales of their own."""
    axis: int | None = None
    """Axis of the slices of volumes: 0 from left to right, 1 from back to front, 2 upwards.
    Default: the one along which slices are farthest apart."""
    nodata: float | None = None
    """Value of pixels that hold no data. Default: the one that a file names."""

    def check_images(self) -> None:
        """Raise a UserError if an option is invalid."""
        self.band_numbers()
        if self.window is not None and self.value_range is not None:
            raise UserError("give --window or --value_range, not both")
        self.fixed_range()
        check_axis(self.axis)

    def chosen(self) -> dict[str, object]:
        """Those that were given, by name."""
        names = (field.name for field in fields(ImageSettings))
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def band_numbers(self) -> tuple[int, ...] | None:
        """Indices of the bands, from 0; None for all or where none are given.

        Raises:
            UserError: They are not numbers from 1.
        """
        if self.bands is None or self.bands == "all":
            return None
        words = self.bands.replace(" ", "").split(",")
        if not all(word.isascii() and word.isdigit() and 0 < len(word) < 6 for word in words):
            raise UserError(
                f"--bands {self.bands} is neither all nor numbers from 1, such as 4,3,2"
            )
        numbers = tuple(int(word) - 1 for word in words)
        if min(numbers) < 0 or max(numbers) >= MAX_BANDS:
            raise UserError(f"--bands {self.bands} must be from 1 to {MAX_BANDS}")
        return numbers

    def fixed_range(self) -> tuple[float, float] | None:
        """The lowest and the highest value, if they are given as numbers or as a named window.

        Raises:
            UserError: They are not numbers, or the first is not below the second.
        """
        if self.window in (None, "file") and self.value_range in (None, *RANGES):
            return None
        if self.window is not None:
            if self.window in WINDOWS:
                center, width = WINDOWS[self.window]
            else:
                names = [*WINDOWS, "file"]
                center, width = _pair("window", self.window, "CENTER,WIDTH", names)
            low, high = center - width / 2, center + width / 2
        else:
            assert self.value_range is not None
            low, high = _pair("value_range", self.value_range, "LOW,HIGH", RANGES)
        if not low < high:
            raise UserError(
                f"--window {self.window}: the width must be above 0"
                if self.window
                else f"--value_range {self.value_range}: the first must be below the second"
            )
        return low, high


NO_SETTINGS = ImageSettings()


def check_axis(axis: int | None) -> None:
    """Raise a UserError unless volumes have slices along this axis."""
    if axis not in (None, 0, 1, 2):
        raise UserError(
            f"--axis {axis} must be 0 (slices from left to right), 1 (from back to front) or 2 "
            f"(upwards)"
        )


@dataclass(frozen=True)
class ImageSet:
    """Images that an encoder is used on, and what the user says of them.

    Attributes:
        paths: Image files, those to train on first; none for any images.
        settings: What the user says of them.
    """

    paths: Sequence[str] = ()
    settings: ImageSettings = NO_SETTINGS

    @cached_property
    def reader(self) -> ImageReader:
        """How they are read, found out once; see ``survey``."""
        return survey(self.paths, self.settings) if self.paths else PHOTOGRAPHS


ANY_IMAGES = ImageSet()


def _pair(option: str, text: str, form: str, names: Sequence[str]) -> tuple[float, float]:
    try:
        first, second = (float(word) for word in text.split(","))
        if not (np.isfinite(first) and np.isfinite(second)):
            raise ValueError
    except ValueError:
        hint = did_you_mean(text, names) if text.isidentifier() else f"give {form}"
        raise UserError(
            f"--{option} {text} is neither {form} nor one of {', '.join(names)}: {hint}"
        ) from None
    return first, second


def survey(paths: Sequence[str], settings: ImageSettings) -> ImageReader:
    """Find out how the images of a data set are to be read.

    Sets of which at least half are photographs (8 bits, gray or RGB) are read as such unless bands
    are chosen. Of all others the bands, their value ranges, means and standard deviations are
    measured, and logged as a table.

    Args:
        paths: Image files, those to train on.
        settings: What the user says of them.

    Raises:
        UserError: The images differ in their number of bands, lack one, or none can be read.
    """
    described = _described(_spread(paths, HEADERS))
    sample = _spread(paths, SAMPLE)
    others = [path for path, one in described if not one.is_photograph]
    if not settings.chosen() and len(others) <= len(described) / 2:
        if others:
            log.info(
                "%d of %d images that were looked at are no 8-bit photographs, the first %s: they "
                "are shown as such, each stretched by itself; --bands reads the values of all",
                len(others),
                len(described),
                others[0],
            )
        return PHOTOGRAPHS
    reader = _with_bands(described, settings)
    fixed = settings.fixed_range()
    if fixed is not None:
        reader = _with_ends(reader, *fixed)
    elif settings.value_range == "dtype":
        reader = _with_ends(reader, *_dtype_range(described))
    elif settings.value_range == "image" or settings.window == "file":
        reader = replace(reader, scope="image", use_window=settings.window == "file")
    samples = _samples(reader, sample, described[0][0])
    nodata = _find_nodata(samples) if settings.nodata is None else None
    if nodata is not None:
        log.info("Pixels of value %g hold no data, it seems; --nodata gives another value", nodata)
        reader = replace(reader, nodata=nodata)
        samples = _samples(reader, sample, described[0][0])
    if reader.scope == "dataset" and not reader.low:
        ratio = _ratio(_highest(reader, paths)) if settings.value_range is None else 1.0
        if ratio >= OWN_SCALES:
            log.info(
                "The volumes are on scales of their own: highest values differ %.3g times. Each is "
                "scaled by its own range; --value_range percentile uses one for all.",
                ratio,
            )
            reader = replace(reader, scope="volume")
        else:
            low, high = percentile_range(samples)
            reader = replace(reader, low=tuple(low.tolist()), high=tuple(high.tolist()))
    reader = _with_statistics(reader, samples, sample)
    for line in table(reader):
        log.info("%s", line)
    return reader


def override(reader: ImageReader, paths: Sequence[str], settings: ImageSettings) -> ImageReader:
    """How a trained model reads images that are stored in another way than its training images.

    Means and standard deviations stay those of the training images, which the weights expect.

    Args:
        reader: How the training images are read.
        paths: Images to read.
        settings: What the user says of them; what is not given stays as it is.

    Raises:
        UserError: The model expects photographs, or another number of bands.
    """
    reader = replace(reader, axis=slice_axis()) if reader.bands is not None else reader
    chosen = settings.chosen().keys() - {"axis"}
    if not chosen:
        return reader
    options = ", ".join(f"--{name}" for name in chosen)
    if reader.bands is None:
        raise UserError(
            f"the model was trained on photographs and reads images as such: {options} cannot be "
            f"given"
        )
    settings = ImageSettings(
        bands=settings.bands or ",".join(str(band + 1) for band in reader.bands),
        window=settings.window,
        value_range=settings.value_range,
        nodata=reader.nodata if settings.nodata is None else settings.nodata,
    )
    measures = bool(chosen & {"window", "value_range"})
    if measures:
        found = survey(paths, settings)
    else:
        found = _with_bands(_described(_spread(paths, HEADERS)), settings)
    if found.channels != reader.channels:
        raise UserError(
            f"--bands {settings.bands}: the model needs {reader.channels} bands, in the order of "
            f"{', '.join(reader.names) or ', '.join(str(band + 1) for band in reader.bands)}"
        )
    if not measures:
        return replace(reader, bands=found.bands, names=found.names, nodata=found.nodata)
    return replace(found, mean=reader.mean, std=reader.std)


def _spread(paths: Sequence[str], most: int) -> list[str]:
    return [paths[index] for index in _spread_indices(len(paths), most)]


def _spread_indices(count: int, most: int) -> list[int]:
    indices = np.linspace(0, count - 1, min(most, count)).round().astype(int)
    return np.unique(indices).tolist()


def _described(paths: Sequence[str]) -> list[tuple[str, Description]]:
    found = []
    for path in paths:
        try:
            found.append((path, describe(path)))
        except BROKEN_IMAGE:
            continue
    return found


def _with_bands(
    described: Sequence[tuple[str, Description]], settings: ImageSettings
) -> ImageReader:
    """A reader of the chosen bands, still without value ranges."""
    if not described:
        raise UserError("none of the images that were looked at can be read")
    (first, one), *others = described
    chosen = settings.band_numbers()
    if chosen is None:
        for path, other in others:
            if other.bands != one.bands:
                raise UserError(
                    f"{first} has {one.bands} bands and {path} has {other.bands}: give --bands "
                    f"with those that all images have, such as --bands "
                    f"{','.join(str(n + 1) for n in range(min(one.bands, other.bands)))}"
                )
        chosen = tuple(range(one.bands))
    names = one.band_names
    if max(chosen) >= one.bands:
        raise UserError(
            f"--bands {settings.bands}: {first} has {one.bands} band{'s' * (one.bands > 1)}"
            + (f": {', '.join(names)}" if names else "")
        )
    if len(chosen) > MAX_CHOSEN_BANDS:
        raise UserError(
            f"{first}: {len(chosen)} bands are too many, OpenCV resizes at most "
            f"{MAX_CHOSEN_BANDS}: choose some with --bands"
        )
    named = tuple(names[band] for band in chosen) if len(names) == one.bands else ()
    return ImageReader(bands=chosen, names=named, nodata=settings.nodata, axis=slice_axis())


def _with_ends(reader: ImageReader, low: float, high: float) -> ImageReader:
    return replace(reader, low=(low,) * reader.channels, high=(high,) * reader.channels)


def _dtype_range(described: Sequence[tuple[str, Description]]) -> tuple[float, float]:
    types = {np.dtype(one.dtype) for _, one in described}
    if any(dtype.kind == "f" for dtype in types):
        return 0.0, 1.0
    limits = [np.iinfo(dtype) for dtype in types]
    return float(min(one.min for one in limits)), float(max(one.max for one in limits))


def _samples(reader: ImageReader, paths: Sequence[str], first: str) -> list[np.ndarray]:
    """Values of each band."""

    def read(path: str) -> tuple[np.ndarray, np.ndarray | None]:
        volume_of(path)  # a file that cannot be described is left out
        return reader.select(read_raw(path), path)

    found = list(sampled(paths, read))
    if not found:
        raise UserError(f"none of {len(paths)} images can be read, the first {first}")
    return joined((values for _, values in found), reader.channels)


def _highest(reader: ImageReader, paths: Sequence[str]) -> list[float]:
    """The highest values (99th percentile) of some volumes."""
    places: dict[str, int] = {}
    for index in _spread_indices(len(paths), SAMPLE):
        volume = _volume(paths[index])
        if volume is not None:
            places[volume] = index
    highest = []
    for volume in _spread(list(places), VOLUMES):
        slices = _slices(paths, places[volume], volume)
        found = sampled(slices, lambda path: reader.select(read_raw(path), path))
        values = np.concatenate([band for _, bands in found for band in bands] or [np.empty(0)])
        if len(values):
            highest.append(float(np.percentile(values, 99)))
    return highest


def _slices(paths: Sequence[str], index: int, volume: str) -> list[str]:
    """Some images of a volume, evenly spread, as its outer slices may be empty.

    Args:
        paths: Image files; those of a volume follow one another.
        index: Index of an image of the volume.
        volume: The volume.
    """
    ends = []
    for side in (-1, 1):
        end, step = index, 1
        while step:
            ahead = end + side * step
            if 0 <= ahead < len(paths) and _volume(paths[ahead]) == volume:
                end, step = ahead, 2 * step
            else:
                step //= 2
        ends.append(end)
    spread = _spread_indices(ends[1] - ends[0] + 1, FRAMES)
    slices = [paths[ends[0] + far] for far in spread]
    return [path for path in slices if _volume(path) == volume]


def _volume(path: str) -> str | None:
    try:
        return volume_of(path)
    except BROKEN_IMAGE:
        return None


def _find_nodata(samples: Sequence[np.ndarray]) -> float | None:
    """A value in common use for missing data that lies far below all others of its band."""
    for band in samples:
        for nodata in _NODATA:
            others = band[band != nodata]
            if 0 < len(others) < len(band):
                spread = float(others.max() - others.min())
                if others.min() - nodata > max(1.0, spread):
                    return nodata
    return None


def _ratio(highest: Sequence[float]) -> float:
    """How many times the highest values of volumes differ; 1 for fewer than two volumes."""
    if len(highest) < 2:
        return 1.0
    low, high = np.percentile(highest, (10, 90))
    return float("inf") if low <= 0 < high else float(high / low) if low > 0 else 1.0


def _with_statistics(
    reader: ImageReader, samples: Sequence[np.ndarray], paths: Sequence[str]
) -> ImageReader:
    """Mean and standard deviation of each band as it is scaled."""
    if reader.scope == "dataset":
        scaled = [
            np.clip((band - low) / (high - low), 0, 1)
            for band, low, high in zip(samples, reader.low, reader.high, strict=True)
        ]
    else:

        def scale(path: str) -> tuple[np.ndarray, np.ndarray | None]:
            raw = read_raw(path)
            _, valid = reader.select(raw, path)
            return reader.scale(raw, path).astype(np.float32) / BAND_MAX, valid

        found = sampled(paths, scale)
        scaled = joined((values for _, values in found), reader.channels)
    mean = tuple(float(band.mean()) if len(band) else 0.5 for band in scaled)
    std = tuple(max(float(band.std()), 1e-3) if len(band) else 1.0 for band in scaled)
    drawn = tuple(tuple(_shares(band)) for band in scaled)
    return replace(reader, mean=mean, std=std, histogram=drawn)


def _shares(values: np.ndarray) -> list[float]:
    """Share of scaled values in each interval of the histogram."""
    counts = np.histogram(values, BINS, (0, 1))[0]
    return [round(share, 4) for share in (counts / max(1, len(values))).tolist()]


def table(reader: ImageReader) -> list[str]:
    """Bands, value ranges, means and standard deviations of a reader, in lines of text."""
    rows = [list(reader.COLUMNS), *reader.rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return [reader.summary(), *(f"  {line}" for line in lines)]
