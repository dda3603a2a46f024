"""``vissl-lite embed``: write the features of images to a file."""

import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vissl_lite.data.atomic_file import atomic_write, check_place
from vissl_lite.data.image_survey import ImageSet, ImageSettings
from vissl_lite.data.images import find_images, suitable_size
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.encoders.folder import choose_slice_axis, encoder_for, fitting_size, is_untrained
from vissl_lite.errors import UserError, check_image_size, did_you_mean
from vissl_lite.inference import check_outputs, predict_images
from vissl_lite.options import Options, Paths, StrPath, command, path_list
from vissl_lite.run import logged_to_console
from vissl_lite.training.progress import progress_bar

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedResult:
    """Result of embedding.

    Attributes:
        path: File that was written.
        images: Number of images that were read.
        num_features: Number of features per image.
    """

    path: Path
    images: int
    num_features: int


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(Options, ImageSettings):
    """Options of ``embed``."""

    encoder: StrPath
    """A run, an encoder folder, timm:NAME (pre-trained weights) or random:NAME (untrained)."""
    data: Paths
    """Folders of images (searched recursively) or .txt files of paths."""
    out: StrPath
    """File to write: FILE.parquet or FILE.npz."""
    format: Literal["parquet", "npz"] | None = None
    """File format: parquet or npz. Default: from the extension of --out."""
    layer: str | None = None
    """Stage whose mean-pooled feature map to write, named as by probe --layers. Default: the output
    of the encoder."""
    image_size: int | None = None
    """Side length of the input in pixels. Default: that of the encoder, or for random:NAME that of
    the images."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width) than this; a small file can decode to
    billions of pixels. The default is Pillow's limit."""
    overwrite: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_images()
        check_image_size(self.image_size)


@command(EmbedOptions)
def embed(options: EmbedOptions) -> EmbedResult:
    """Compute the features of images and write them to a file.

    An .npz file holds the arrays paths (N) and features (N, D), a .parquet file the columns path
    and embedding (a list of D numbers), all float32.

    Returns:
        The file, the number of images and the number of features.

    Raises:
        UserError: An option is invalid; nothing is written then.
    """
    limit_pixels(options.max_pixels)
    choose_slice_axis(options.axis, options.encoder)
    file = Path(options.out)
    if options.format is None and file.suffix.lower() not in (".parquet", ".npz"):
        raise UserError(
            f"--out {file} ends in neither .parquet nor .npz: use one of these, or give --format"
        )
    check_file(file, options.overwrite)
    kind = options.format or file.suffix.lower().removeprefix(".")
    if kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "a Parquet file needs pyarrow: pip install 'vissl-lite[parquet]'; or give --format npz"
        )
    paths = find_images(path_list(options.data))
    if kind == "parquet":
        _check_utf8(paths)
    encoder = encoder_for_images(os.fspath(options.encoder), options.image_size, paths, options)
    with logged_to_console():
        features, readable = _features(encoder, paths, options.layer)
        names = [path for path, is_readable in zip(paths, readable, strict=True) if is_readable]
        with atomic_write(file) as part:
            (_write_parquet if kind == "parquet" else _write_npz)(part, names, features)
        log.info("%d images, %d features each: %s", *features.shape, file)
    return EmbedResult(file, *features.shape)


def check_file(file: Path, overwrite: bool) -> None:
    """Raise a UserError if a file exists, is a folder, or can't be written. Changes nothing."""
    if file.is_dir():
        raise UserError(f"--out {file} is a folder: give the name of a file")
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists: give a new file, or --overwrite")
    check_place(file)


def encoder_for_images(
    source: str, image_size: int | None, paths: Sequence[str], settings: ImageSettings
) -> Encoder:
    """Load an encoder for use on images without labels.

    Args:
        source: A run, an encoder folder, ``timm:NAME`` or ``random:NAME``; the weights of the last
            one are always the same.
        image_size: Side in pixels. Default: that of the encoder, for ``random:NAME`` that of the
            images.
        paths: Paths of the images.
        settings: What the user says of them.

    Raises:
        UserError: The encoder does not exist, has diverged, or can't take images of this size.
    """
    torch.manual_seed(0)
    if image_size is None and is_untrained(source):
        image_size = fitting_size(source, suitable_size(paths))
    return encoder_for(source, image_size, ImageSet(paths, settings))


def _check_utf8(paths: Sequence[str]) -> None:
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            name = path.encode(errors="backslashreplace").decode()
            raise UserError(
                f"a Parquet file can't hold the name {name}, which is not UTF-8: "
                f"rename it, or give --format npz"
            ) from None


def _features(
    encoder: Encoder, paths: Sequence[str], layer: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """``(N, D)`` float32 features of the readable images, and ``(M,)`` bool: which are readable."""
    stage: int | None = None
    if layer is not None:
        names = encoder.stage_names()
        if layer not in names:
            raise UserError(
                f"{encoder.backbone} has no layer {layer}: {did_you_mean(layer, names)}"
            )
        stage = names.index(layer)

    def compute(images: Tensor) -> list[Tensor]:
        if stage is None:
            return [encoder(images)]
        return [encoder.stages(images)[stage].float().mean(dim=(2, 3))]

    with progress_bar() as bar:
        task = bar.add_task("embed", total=len(paths), info="")
        (features,), good = predict_images(
            encoder,
            compute,
            encoder,
            paths,
            lambda images: bar.advance(task, images),
        )
    check_outputs([features], f"some of the {len(features)} images")
    return features.numpy(), good


def _write_npz(file: Path, paths: list[str], features: np.ndarray) -> None:
    with file.open("wb") as opened:  # given a name, NumPy would append .npz
        np.savez(opened, paths=np.array(paths, dtype=np.str_), features=features)


def _write_parquet(file: Path, paths: list[str], features: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(features.reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
    pq.write_table(pa.table({"path": pa.array(paths), "embedding": rows}), file)
