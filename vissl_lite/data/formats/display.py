"""Raw images as 8-bit RGB, to look at. Training has its own scaling, by the whole data set."""

import numpy as np

from vissl_lite.data.formats.common import RawImage

# Percentiles of the values that become black and white.
_LOW, _HIGH = 1.0, 99.0

# Values that percentiles are taken of, at most.
_SAMPLE = 1 << 16

# Names of the bands of color, of which GeoTIFFs and Sentinel-2 use several.
_COLORS = (("red", "b4", "b04", "r"), ("green", "b3", "b03", "g"), ("blue", "b2", "b02", "b"))


def to_rgb(image: RawImage) -> np.ndarray:
    """Show a raw image as well as it can be shown.

    One band is gray, and so is the first of two. Of more than three, those named red, green and
    blue are shown, else the first three. 8-bit values stay as they are; others are stretched from
    their percentile 1 to 99, or to the file's own window: the bands of an image of exactly three
    unsigned ones together, other bands each on its own. Pixels without data are black.

    Returns:
        ``(H, W, 3)`` uint8.
    """
    bands = display_bands(image.pixels.shape[2], image.band_names)
    pixels = image.pixels[..., bands]
    if pixels.dtype == np.uint8 and image.window is None:
        shown = pixels
        if image.nodata is not None:
            missing = (pixels == image.nodata).all(axis=2, keepdims=True)
            shown = np.where(missing, np.uint8(0), pixels)
    else:
        # a photograph of 16 bits keeps its colors, while bands of a satellite differ in scale
        together = image.pixels.shape[2] == 3 and pixels.dtype.kind == "u"
        parts = [pixels] if together else np.split(pixels, len(bands), axis=2)
        stretched = [_stretched(part, image.nodata, image.window) for part in parts]
        shown = np.concatenate(stretched, axis=2)
    return np.ascontiguousarray(np.broadcast_to(shown, (*shown.shape[:2], 3)))


def display_bands(count: int, names: tuple[str, ...]) -> list[int]:
    """The numbers of the bands to show: one, or those of red, green and blue."""
    if count < 3:
        return [0]
    lower = [name.lower() for name in names]
    found = [next((lower.index(one) for one in color if one in lower), None) for color in _COLORS]
    known = [one for one in found if one is not None]
    return known if len(known) == 3 else [0, 1, 2]


def _stretched(
    values: np.ndarray, nodata: float | None, window: tuple[float, float] | None
) -> np.ndarray:
    valid = np.isfinite(values) if values.dtype.kind == "f" else None
    if nodata is not None:
        valid = (values != nodata) if valid is None else valid & (values != nodata)
    if window is not None:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    else:
        sample = values.reshape(-1) if valid is None else values[valid]
        if not sample.size:
            return np.zeros(values.shape, np.uint8)
        sample = sample[:: -(-sample.size // _SAMPLE)].astype(np.float64)
        low, high = np.percentile(sample, (_LOW, _HIGH))
        if low == high:  # nearly all pixels are alike
            low, high = float(sample.min()), float(sample.max())
    if valid is not None:
        values = np.where(valid, values, values.dtype.type(0))
    # float32 holds 16 bits exactly
    exact = values.dtype.itemsize <= 2 or values.dtype == np.float32
    scaled: np.ndarray = values.astype(np.float32 if exact else np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(scaled, low, out=scaled)
        np.multiply(scaled, 255.0 / ((high - low) or 1.0), out=scaled)
    np.clip(scaled, 0, 255, out=scaled)
    np.rint(scaled, out=scaled)
    shown = np.nan_to_num(scaled).astype(np.uint8) if valid is not None else scaled.astype(np.uint8)
    if valid is not None:
        shown[~valid] = 0
    return shown
