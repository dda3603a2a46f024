"""Images as the network takes them: photographs as 8-bit RGB, all others as bands on one scale.

The bands of a scan or a satellite scene have units of their own. They are scaled linearly from a
range of values, the same for all images of the data set, to 16 bits, so that views, cache and
transfers keep their precision. The reader is stored with the encoder: whoever uses the encoder
reads images as its training did.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from vissl_lite.data.formats import (
    RawImage,
    decode_reduced,
    describe,
    read_raw,
    read_raw_content,
    split_path,
)
from vissl_lite.data.formats.display import display_bands
from vissl_lite.data.images import BROKEN_IMAGE, read_content, read_image

# Largest value of a photograph and of a scaled band.
PHOTOGRAPH_MAX, BAND_MAX = 255, 65535

# Percentiles between which the values of a band are scaled.
PERCENTILES = (0.1, 99.9)

# Values of a band of one image that percentiles are taken of, and frames of a volume.
VALUES, FRAMES = 4096, 16

# What one range of values holds for.
Scope = Literal["dataset", "volume", "image"]


class ValueRange(NamedTuple):
    """Values of each band that become 0 and the largest value; ``(C,)`` float64."""

    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """Reads image files as arrays.

    Without ``bands`` it reads photographs: ``(H, W, 3)`` uint8. With them, ``(H, W, C)`` uint16:
    the values of each band, scaled from its range and cut off at its ends.

    Attributes:
        bands: Indices of the bands of a file, from 0; None for photographs.
        names: Names of these bands.
        scope: What one range holds for: the data set, each volume (a DICOM series, a NIfTI file)
            or each image. The range of a volume or image goes from its percentile 0.1 to 99.9.
        low: Values that become 0, by band, in the units of the files; for the data set only.
        high: Values that become 65535, by band, in the units of the files.
        use_window: Whether the range of an image is the window that its file names, if it does.
        nodata: Value of pixels without data; None for the value that a file names.
        axis: Axis of the slices of volumes, as ``slice_along`` has it; None for each volume's own.
        mean: Mean of each band, scaled to [0, 1]. Pixels without data get it.
        std: Standard deviation of each band, scaled to [0, 1].
        histogram: Share of the values of each band in ``BINS`` equal intervals of [0, 1]; for
            reports only.
    """

    COLUMNS: ClassVar = ("band", "name", "low", "high", "mean", "std")

    bands: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    scope: Scope = "dataset"
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    use_window: bool = False
    nodata: float | None = None
    axis: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    histogram: tuple[tuple[float, ...], ...] = field(default=(), compare=False, repr=False)

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return 3 if self.bands is None else len(self.bands)

    @property
    def max_value(self) -> int:
        """Largest value of a channel."""
        return PHOTOGRAPH_MAX if self.bands is None else BAND_MAX

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of the values of an image."""
        return np.dtype(np.uint8 if self.bands is None else np.uint16)

    def read(self, path: str | Path, shortest: int | None = None) -> np.ndarray:
        """Read an image.

        Args:
            path: The file; may name a frame.
            shortest: The shorter side in pixels that is needed, of a photograph; see
                ``read_image``.

        Returns:
            ``(H, W, C)``.

        Raises:
            OSError, ValueError, SyntaxError, cv2.error: The file is missing, broken, or lacks a
                band (``BROKEN_IMAGE``).
        """
        if self.bands is None:
            return read_image(path, shortest)
        return self.scale(read_raw(path), path)

    def decode_reduced(
        self, data: bytes | None, path: str, times: Callable[[int, int], int]
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Decode the content of an image file, no larger than needed; see ``decode_reduced``.

        Args:
            data: Result of ``read_content``; None reads the file, of bands no more than needed.
            path: The file; may name a frame.
            times: See ``decode_reduced`` of photographs. Bands are not reduced.

        Returns:
            ``(h, w, C)``, and height and width of the whole image.
        """
        if self.bands is None:
            return decode_reduced(read_content(path) if data is None else data, path, times)
        image = self.scale(read_raw(path) if data is None else read_raw_content(data, path), path)
        return image, (image.shape[0], image.shape[1])

    def scale(self, raw: RawImage, path: str | Path) -> np.ndarray:
        """Select the bands of a raw image and scale them.

        Args:
            raw: The image.
            path: Its file, for the range of its volume and for errors.

        Returns:
            ``(H, W, C)`` uint16.

        Raises:
            ValueError: The image lacks a band.
        """
        values, valid = self.select(raw, path)
        low, high = self._range(raw, path, values, valid)
        # in place, as each pass over the values takes time
        values -= low.astype(np.float32)
        values *= (BAND_MAX / (high - low)).astype(np.float32)
        values += np.float32(0.5)  # rounds what is cut off below
        np.clip(values, 0, BAND_MAX, out=values)
        if valid is not None:
            fill = np.rint(np.array(self.mean or [0.5] * self.channels) * BAND_MAX)
            values = np.where(valid, values, fill.astype(np.float32))
        return values.astype(np.uint16)

    def select(self, raw: RawImage, path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
        """Values of the bands ``(H, W, C)`` float32, and which are data; None for all."""
        assert self.bands is not None
        if max(self.bands) >= raw.pixels.shape[2]:
            raise ValueError(
                f"{path}: it has {raw.pixels.shape[2]} bands, and band {max(self.bands) + 1} is "
                f"needed"
            )
        pixels = raw.pixels
        if self.bands != tuple(range(pixels.shape[2])):
            pixels = pixels[..., list(self.bands)]
        valid = np.isfinite(pixels) if pixels.dtype.kind == "f" else None
        nodata = raw.nodata if self.nodata is None else self.nodata
        if nodata is not None and not math.isnan(nodata):
            data = pixels != nodata
            valid = data if valid is None else valid & data
        if valid is not None and valid.all():
            valid = None
        values = pixels.astype(np.float32)
        return (values if valid is None else np.where(valid, values, np.float32(0))), valid

    def _range(
        self, raw: RawImage, path: str | Path, values: np.ndarray, valid: np.ndarray | None
    ) -> ValueRange:
        if self.use_window and raw.window is not None:
            center, width = raw.window
            ends = (np.full(self.channels, center + side * width / 2) for side in (-1, 1))
            return ValueRange(*ends)
        if self.scope == "dataset":
            return ValueRange(np.array(self.low), np.array(self.high))
        if self.scope == "volume":
            return volume_range(self, str(path))
        return percentile_range(sample_values(values, valid, 0))

    def to_units(self, image: np.ndarray) -> np.ndarray:
        """Undo the scaling of bands, as far as it is the same for all images.

        Args:
            image: ``(..., C)`` from this reader.

        Returns:
            Photographs as they are; bands as float32, in the units of the files, or scaled to
            [0, 1] where each volume or image has a range of its own.
        """
        if self.bands is None:
            return image
        values = image.astype(np.float32) * np.float32(1 / BAND_MAX)
        if self.scope != "dataset":
            return values
        low, high = (np.array(ends, np.float32) for ends in (self.low, self.high))
        return low + values * (high - low)

    def units(self) -> str:
        """What ``to_units`` returns, and missing data beside it, in words."""
        if self.bands is None:
            return "uint8 RGB as decoded"
        numbers = ", ".join(str(band + 1) for band in self.bands)
        if self.scope == "dataset":
            missing = "" if self.nodata is None else f" or {self.nodata:.9g}"
            return f"float32, bands {numbers} in the units of the files, missing data NaN{missing}"
        window = "the window that its file names, else from " if self.use_window else ""
        return (
            f"float32, bands {numbers}, each scaled to [0, 1] from {window}the percentiles "
            f"{PERCENTILES[0]} to {PERCENTILES[1]} of its {self.scope}, missing data NaN"
        )

    def picture_bands(self) -> list[int]:
        """Indices of the channels to show: three, or one as gray."""
        return [0, 1, 2] if self.bands is None else display_bands(self.channels, self.names)

    def picture(self, image: np.ndarray) -> np.ndarray:
        """Show an image.

        Args:
            image: ``(H, W, C)`` from this reader, or a view of it.

        Returns:
            ``(H, W, 3)`` uint8: bands of color as such, else the first three, or one as gray.
        """
        if self.bands is None:
            return image
        shown = (image[..., self.picture_bands()] / 257).round()
        return np.ascontiguousarray(np.broadcast_to(shown, (*image.shape[:2], 3)).astype(np.uint8))

    def read_picture(self, path: str | Path, shortest: int | None = None) -> np.ndarray:
        """Read an image to be looked at; see ``read`` and ``picture``.

        Images of bands are as bright as the network gets them, unlike from ``read_image``.

        Returns:
            ``(H, W, 3)`` uint8.
        """
        return self.picture(self.read(path, shortest))

    def has_own_range(self, path: str | Path) -> bool:
        """Whether the range of values of a picture is that of its image or volume alone.

        The brightness of such pictures can't be compared. It holds for images that are not 8-bit
        photographs but are read as such, and for bands with a range for each volume or image.

        Args:
            path: The file; may name a frame.

        Raises:
            OSError, ValueError, SyntaxError, cv2.error: It can't be read (``BROKEN_IMAGE``).
        """
        if self.bands is not None:
            return self.scope != "dataset" or self.use_window
        found = describe(path)
        return found.dtype != "uint8" or found.format == "DICOM"  # which may name a window

    def summary(self) -> str:
        """How bands are scaled, as a sentence."""
        scopes = {
            "dataset": "the same range for all images",
            "volume": "the range of its volume, as the volumes are on scales of their own",
            "image": "the range of its image",
        }
        window = "; the window that a file names takes precedence" if self.use_window else ""
        bands = f"{self.channels} bands" if self.channels > 1 else "One band"
        return f"{bands} of 16 bits, scaled from {scopes[self.scope]}{window}."

    def rows(self) -> list[list[str]]:
        """A row of ``COLUMNS`` for each band; mean and deviation are of scaled values."""
        rows = []
        for number, band in enumerate(self.bands or ()):
            ends = ["", ""]
            if self.low:
                ends = [f"{self.low[number]:.5g}", f"{self.high[number]:.5g}"]
            name = self.names[number] if self.names else ""
            scaled = [f"{self.mean[number]:.3f}", f"{self.std[number]:.3f}"]
            rows.append([str(band + 1), name, *ends, *scaled])
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Content for ``config.json``; empty for photographs. Bands are numbered from 1."""
        if self.bands is None:
            return {}
        content: dict[str, Any] = {"bands": [band + 1 for band in self.bands], "scope": self.scope}
        for name in ("names", "low", "high"):
            if getattr(self, name):
                content[name] = list(getattr(self, name))
        for name in ("nodata", "axis"):
            if getattr(self, name) is not None:
                content[name] = getattr(self, name)
        if self.use_window:
            content["use_window"] = True
        if self.histogram:
            content["histogram"] = [list(shares) for shares in self.histogram]
        return content

    @classmethod
    def from_dict(
        cls, content: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]
    ) -> "ImageReader":
        """The reader of an encoder folder, whose content may be anything.

        Args:
            content: Result of ``as_dict``.
            mean: Mean of each channel.
            std: Standard deviation of each channel.

        Raises:
            ValueError, TypeError: It is no such content.
        """
        if not content:
            return cls()
        bands = _numbers(content.get("bands"), "bands", len(mean))
        if not all(type(one) is int and 1 <= one <= MAX_BANDS for one in content["bands"]):
            raise ValueError(f"bands are not numbers from 1: {str(content['bands'])[:60]}")
        scope = content.get("scope")
        if scope not in ("dataset", "volume", "image"):
            raise ValueError(f"scope is not dataset, volume or image: {str(scope)[:60]}")
        names = content.get("names", [])
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise TypeError("names is not a list of texts")
        low: tuple[float, ...] = ()
        high: tuple[float, ...] = ()
        if scope == "dataset":
            low = _numbers(content.get("low"), "low", len(mean))
            high = _numbers(content.get("high"), "high", len(mean))
            if not all(a < b for a, b in zip(low, high, strict=True)):
                raise ValueError("a value in low is not below that in high")
        nodata, axis = content.get("nodata"), content.get("axis")
        if nodata is not None:
            (nodata,) = _numbers([nodata], "nodata", 1)
        if axis not in (None, 0, 1, 2) or isinstance(axis, bool):
            raise ValueError(f"axis is not 0, 1 or 2: {str(axis)[:60]}")
        drawn = content.get("histogram", [[]] * len(bands))
        if not isinstance(drawn, list) or len(drawn) != len(bands):
            raise TypeError("histogram is not a list for each band")
        shares = tuple(_numbers(one, "histogram", BINS if drawn[0] else 0) for one in drawn)
        return cls(
            bands=tuple(int(one) - 1 for one in bands),
            names=tuple(names),
            scope=scope,
            low=low,
            high=high,
            use_window=content.get("use_window") is True,
            nodata=nodata,
            axis=axis,
            mean=tuple(mean),
            std=tuple(std),
            histogram=shares if drawn[0] else (),
        )


PHOTOGRAPHS = ImageReader()

# Intervals of a histogram of scaled values.
BINS = 32

# Bands of an image at most.
MAX_BANDS = 4096


def _numbers(values: Any, what: str, count: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != count:
        raise TypeError(f"{what} is not a list of {count} numbers: {str(values)[:60]}")
    for one in values:
        if not isinstance(one, int | float) or isinstance(one, bool) or not math.isfinite(one):
            raise TypeError(f"{what} is not a list of {count} numbers: {str(values)[:60]}")
    return tuple(float(one) for one in values)


def sample_values(values: np.ndarray, valid: np.ndarray | None, seed: int) -> list[np.ndarray]:
    """Values of each band at random pixels that hold data.

    Args:
        values: ``(H, W, C)``.
        valid: ``(H, W, C)`` bool; None for all.
        seed: Seed of the pixels.

    Returns:
        An array for each band.
    """
    flat = values.reshape(-1, values.shape[2])
    chosen: np.ndarray | slice = slice(None)
    if len(flat) > VALUES:
        chosen = np.random.default_rng(seed).integers(len(flat), size=VALUES)
    some = flat[chosen]
    if valid is None:
        return list(some.T)
    data = valid.reshape(flat.shape)[chosen]
    return [band[has] for band, has in zip(some.T, data.T, strict=True)]


def sampled(
    paths: Sequence[str], read: Callable[[str], tuple[np.ndarray, np.ndarray | None]]
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield the paths of some images and values of their bands; broken ones are left out.

    Args:
        paths: Image files.
        read: Function from a path to the first two arguments of ``sample_values``.
    """
    for number, path in enumerate(paths):
        try:
            values, valid = read(path)
        except BROKEN_IMAGE:
            continue
        yield path, sample_values(values, valid, number)


def joined(samples: Iterable[Sequence[np.ndarray]], bands: int) -> list[np.ndarray]:
    """Values of each band in all samples, of which there may be none."""
    parts = [[np.empty(0, np.float32)] * bands, *samples]
    return [np.concatenate(band) for band in zip(*parts, strict=True)]


def percentile_range(samples: Sequence[np.ndarray]) -> ValueRange:
    """The range of each band from its percentile 0.1 to 99.9; 0 to 1 for a band without values.

    Args:
        samples: Values of each band.
    """
    ends = np.array(
        [np.percentile(one, PERCENTILES) if len(one) else (0.0, 1.0) for one in samples], float
    )
    low, high = ends.T
    whole = [(one.min(), one.max()) if len(one) else (0.0, 1.0) for one in samples]
    for band, (least, most) in enumerate(whole):
        if low[band] >= high[band]:  # nearly all values are alike
            low[band], high[band] = least, most if most > least else least + 1
    return ValueRange(low, high)


# Name, bytes and time of change of a file or folder.
_State = tuple[str, int, int]

# Volumes by file, and ranges by the file, or the folder and its series, and what of it is read, as
# each slice needs them.
_volumes: dict[_State, str | None] = {}
_volume_ranges: dict[tuple[_State, str | None, ImageReader], ValueRange] = {}


def _state(path: str | Path) -> _State:
    about = os.stat(path)
    return os.fspath(path), about.st_size, about.st_mtime_ns


def volume_of(path: str) -> str | None:
    """The volume of an image; see ``Description``. A file is described once."""
    file = _state(split_path(path)[0])
    if file not in _volumes:
        _volumes[file] = describe(path).volume
    return _volumes[file]


def volume_range(reader: ImageReader, path: str) -> ValueRange:
    """The range of values of the volume that an image belongs to.

    Args:
        reader: Reader of the image.
        path: The file; may name a frame. Of a series of DICOM files those in its folder are read.
    """
    file, volume = split_path(path)[0], volume_of(path)
    folder = Path(file).parent
    own = _state(file), None, reader
    key = own if volume in (None, file) else (_state(folder), volume, reader)
    if own in _volume_ranges:
        key = own
    if key not in _volume_ranges:
        described = describe(path)
        if described.frames > 1:
            key = own
            frames = np.unique(np.linspace(0, described.frames - 1, FRAMES).round().astype(int))
            paths = [f"{file}#{number}" for number in frames]
        elif volume is not None:
            paths = _series(folder, volume)
        else:
            paths = [path]
        found = sampled(paths, lambda one: reader.select(read_raw(one), one))
        samples = joined((values for _, values in found), reader.channels)
        _volume_ranges[key] = percentile_range(samples)
    return _volume_ranges[key]


def _series(folder: Path, volume: str) -> list[str]:
    """Files of a DICOM series in a folder, evenly spread."""
    found = []
    for file in sorted(folder.iterdir()):
        try:
            if file.is_file() and volume_of(str(file)) == volume:
                found.append(str(file))
        except BROKEN_IMAGE:
            continue
    return found[:: max(1, len(found) // FRAMES)]
