"""Encoders that see images on another scale on the scale of their own training."""

import logging

import numpy as np
import torch
from torch import Tensor

from vissl_lite.data.image_reader import PHOTOGRAPH_MAX, ImageReader, ValueRange
from vissl_lite.encoders.encoder import Encoder, adapt_encoder, band_names, band_places

log = logging.getLogger(__name__)


class RescaledEncoder(Encoder):
    """An encoder for images on another scale, which it sees on the scale of its training.

    ``normalize`` converts the values of the images to that scale, cuts them off at its ends, as the
    reader of the training did, and normalizes them with the encoder's own mean and std.

    Args:
        encoder: The encoder, whose model it shares.
        reader: How the images are read, with the same bands in the same order.
        before: Values that became 0 and the largest value in the training.
        after: Values that become 0 and the largest value in the images, in the same units.

    Attributes:
        lowest, highest: ``(1, C, 1, 1)`` buffers: the ends of the scale, normalized.
    """

    def __init__(
        self, encoder: Encoder, reader: ImageReader, before: ValueRange, after: ValueRange
    ) -> None:
        super().__init__(encoder.model, encoder.model_args, encoder.image_size, reader)
        mean, std = np.array(self.mean), np.array(self.std)
        width = before.high - before.low
        gain, offset = (after.high - after.low) / width, (after.low - before.low) / width
        for name, values in (
            ("scale", gain / (reader.max_value * std)),
            ("shift", (offset - mean) / std),
            ("lowest", -mean / std),
            ("highest", (1 - mean) / std),
        ):
            buffer = torch.from_numpy(values).float().view(1, -1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        self.lowest: Tensor
        self.highest: Tensor

    def normalize(self, images: Tensor) -> Tensor:
        return super().normalize(images).clamp(self.lowest, self.highest)


def rescale_encoder(encoder: Encoder, reader: ImageReader, role: str) -> Encoder | None:
    """An encoder for images on another scale that keeps its mean and std, where that is possible.

    Bands that have the same names in another order are put into the order of the images. Bands
    are compared in the units of the files. So are photographs with bands of 8 bits; of other
    bands and photographs only the ends of the scales are taken for the same.

    Args:
        encoder: Left as it is.
        reader: How the images are read.
        role: What the log calls it.

    Returns:
        The encoder; None if the images have other bands, or if their values cannot be converted.

    Raises:
        UserError: The bands have another order, and the first convolution is not known.
    """
    before, names = band_names(encoder.reader), band_names(reader)
    places = band_places(encoder.reader)
    order = list(range(reader.channels))
    if encoder.reader.channels != reader.channels:
        return None
    if before != names and any(name in places for name in names):
        if sorted(places) != sorted(names):
            return None
        order = [places[name] for name in names]
    ranges = _ranges(encoder.reader, reader)
    if ranges is None:
        log.info(
            "The values of the images can't be converted to the scale that the %s was trained on "
            "(other units, or a range for each image, volume or file): it gets the mean and "
            "standard deviation of the images",
            role,
        )
        return None
    if order != sorted(order):
        mean, std = ([values[n] for n in order] for values in (encoder.mean, encoder.std))
        encoder = adapt_encoder(encoder, reader, role)
        encoder.model.pretrained_cfg = {**encoder.model.pretrained_cfg, "mean": mean, "std": std}
    own, given = ranges
    own = ValueRange(own.low[order], own.high[order])
    log.info(
        "The %s keeps its mean and standard deviation: values of the images are converted to the "
        "scale of its training",
        role,
    )
    return RescaledEncoder(encoder, reader, own, given)


def _ranges(before: ImageReader, after: ImageReader) -> tuple[ValueRange, ValueRange] | None:
    """Value ranges of two readers of equally many bands in common units; None if there are none."""
    first, second = _value_range(before), _value_range(after)
    alike = ValueRange(np.zeros(after.channels), np.ones(after.channels))
    if before.bands is None or after.bands is None:
        if first is None or second is None:
            return alike, alike
        tops = first.high.max(), second.high.max()
        # Up to 1 it is a share, such as a reflectance.
        in_8_bits = min(tops) > 1 and max(tops) <= PHOTOGRAPH_MAX
        in_8_bits = in_8_bits and min(first.low.min(), second.low.min()) >= 0
        return (first, second) if in_8_bits else (alike, alike)
    if all(
        getattr(before, name) == getattr(after, name)
        for name in ("scope", "use_window", "low", "high")
    ):
        return alike, alike
    if first is None or second is None:
        return None
    overlap = (first.low < second.high).all() and (second.low < first.high).all()
    return (first, second) if overlap else None


def _value_range(reader: ImageReader) -> ValueRange | None:
    """The range of values that is the same for all images; None if there is no such range."""
    if reader.bands is None:
        return ValueRange(np.zeros(3), np.full(3, float(PHOTOGRAPH_MAX)))
    if reader.scope != "dataset" or reader.use_window:
        return None
    return ValueRange(np.array(reader.low), np.array(reader.high))
