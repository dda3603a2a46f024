"""Models for export, from decoded images to predictions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vissl_lite.data.image_reader import ImageReader
from vissl_lite.data.images import resize_and_crop
from vissl_lite.encoders.config import ENCODER_CONFIG
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.encoders.folder import load_encoder


def crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The shorter side resized, the central square taken.

    Args:
        image: ``(h, w, C)`` uint8.
        size: Height and width, which are equal.
    """
    return resize_and_crop(image, size[0])


@dataclass(frozen=True)
class ExportModel:
    """A model from decoded images to predictions.

    Attributes:
        layers: ``Normalization``, the model, and the last step: from ``(B, C, H, W)``, see
            ``blank``.
        task: ``encoder``, or the name of the task.
        outputs: The names of what comes out.
        image_size: Height and width in pixels.
        timm_folder: Folder in timm's format; None if there is none.
        about: More facts for users of the ONNX file, by name.
        any_size: Whether images of other sizes mean something to it.
        fixed_size: Why images can't have another size than it was trained at; empty if they can.
        prepare: Function from an image and ``image_size`` to the input of the model.
        preparation: The resizing in words, in which ``{size}`` is the size.
        translations: Operators of its own, for torch's ONNX exporter.
    """

    layers: nn.Sequential
    task: str
    outputs: tuple[str, ...]
    image_size: tuple[int, int]
    timm_folder: Path | None
    about: dict[str, str] = field(default_factory=dict)
    any_size: bool = False
    fixed_size: str = ""
    prepare: Callable[[np.ndarray, tuple[int, int]], np.ndarray] = crop
    preparation: str = "the shorter side resized to {size} pixels"
    translations: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    @property
    def reader(self) -> ImageReader:
        """How the images of the model are read."""
        first = self.layers[0]
        assert isinstance(first, Normalization)
        return first.encoder.reader

    def blank(self, batch: int, height: int, width: int) -> Tensor:
        """Images of zeros as the model takes them, see ``ImageReader.to_units``."""
        dtype = torch.uint8 if self.reader.bands is None else torch.float32
        return torch.zeros(batch, self.reader.channels, height, width, dtype=dtype)


class Normalization(nn.Module):
    """``Encoder.normalize`` as the first layer of an exported network.

    Bands are in the units of the files, and scaled first; see ``ImageReader.to_units``. Values that
    are not finite, or ``nodata``, become the mean of their band, as in ``ImageReader.scale``.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.low: Tensor
        self.width: Tensor
        self.fill: Tensor
        reader = encoder.reader
        low, high = (torch.tensor(ends).view(1, -1, 1, 1) for ends in (reader.low, reader.high))
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("width", high - low, persistent=False)
        fill = (torch.tensor(encoder.mean) * reader.max_value).round().view(1, -1, 1, 1)
        self.register_buffer("fill", fill, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to what the backbone takes."""
        reader = self.encoder.reader
        if reader.bands is not None:
            valid = images.isfinite()
            if reader.scope == "dataset":
                if reader.nodata is not None:
                    valid = valid & (images != reader.nodata)
                images = (images - self.low) / self.width
            images = torch.where(valid, images.clamp(0, 1) * reader.max_value, self.fill)
        return self.encoder.normalize(images)


def export_encoder(source: str, image_size: int | None) -> ExportModel:
    """An encoder to be exported.

    Args:
        source: Source of the encoder; see ``load_encoder``.
        image_size: Side of the images in pixels; see ``load_encoder``.

    Raises:
        UserError: There is no encoder, or it is damaged.
    """
    encoder = load_encoder(source, image_size)
    # not `encoder` itself, whose care for bf16 on small images the exporter can't follow
    layers = nn.Sequential(Normalization(encoder), encoder.model, nn.Identity())
    places = (Path(source), Path(source) / "encoder")
    folder = next((place for place in places if (place / ENCODER_CONFIG).is_file()), None)
    size = encoder.image_size
    return ExportModel(layers, "encoder", ("features",), (size, size), folder)
