"""``vissl-lite embed``: the features of images as a file, for anything else to work with."""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vissl_lite.data.images import find_images, suitable_size
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.data.whole_file import check_place, whole_file
from vissl_lite.encoder import Encoder
from vissl_lite.encoder_folder import encoder_for
from vissl_lite.errors import UserError, check_arguments, check_image_size, did_you_mean
from vissl_lite.inference import check_outputs, run_over
from vissl_lite.run import forget_log, logged_to_console
from vissl_lite.training.progress import progress_bar

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedResult:
    """What was embedded.

    Attributes:
        path: the file.
        images: how many images were read.
        num_features: D, how many numbers each has.
    """

    path: Path
    images: int
    num_features: int


def embed(
    encoder: str,
    data: list[str] | str,
    out: str,
    format: Literal["parquet", "npz"] | None = None,
    layer: str | None = None,
    image_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
) -> EmbedResult:
    """Write the features of images: a row of numbers for each.

    An .npz file holds the arrays paths (N) and features (N, D), a .parquet file the columns path
    and embedding (a list of D numbers), all float32.

    Args:
        encoder: A run, an encoder folder, timm:NAME (pre-trained weights) or random:NAME.
        data: Folders (searched recursively) or .txt files of paths.
        out: The file to write: FILE.parquet or FILE.npz.
        format: parquet or npz; default by the name of --out.
        layer: The stage whose mean-pooled map to write, as probe --layers names them; default the
            encoder's output.
        image_size: Side in pixels; default the encoder's, or for random:NAME that of the images.
        max_pixels: Skip images with more pixels (height times width): a small file may decode to
            billions. The default is what Pillow takes.
        overwrite: Replace the file.

    Returns:
        The file, the number of images and of features.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    check_arguments(embed, locals())
    limit_pixels(max_pixels)
    check_image_size(image_size)
    file = Path(out)
    if format is None and file.suffix.lower() not in (".parquet", ".npz"):
        raise UserError(f"--out {file} ends in neither .parquet nor .npz: give one, or --format")
    check_file(file, overwrite)
    kind = format or file.suffix.lower().removeprefix(".")
    if kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError("a Parquet file needs pyarrow: pip install 'vissl-lite[parquet]'; "
                        "or give --format npz")  # fmt: skip
    paths = find_images([data] if isinstance(data, str) else data)
    if kind == "parquet":
        _check_utf8(paths)
    judged = encoder_for_images(encoder, image_size, paths)
    with logged_to_console():
        features, good = _features(judged, paths, layer)
        read = [path for path, fine in zip(paths, good, strict=True) if fine]
        with whole_file(file) as part:
            (_write_parquet if kind == "parquet" else _write_npz)(part, read, features)
        log.info("%d images, %d features each: %s", *features.shape, file)
    return EmbedResult(file, *features.shape)


def check_file(file: Path, overwrite: bool) -> None:
    """Refuse a file that must not be written. Nothing is changed yet.

    Raises:
        UserError: it exists, is a folder, or can't be written.
    """
    forget_log()
    if file.is_dir():
        raise UserError(f"--out {file} is a folder: give the name of a file")
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists: give a new file, or --overwrite")
    check_place(file)


def encoder_for_images(source: str, image_size: int | None, paths: Sequence[str]) -> Encoder:
    """Load an encoder to be used on images without labels.

    Args:
        source: a run, an encoder folder, ``timm:NAME`` or ``random:NAME``; the last one always
            comes with the same weights.
        image_size: side in pixels; default the encoder's, for ``random:NAME`` that of the images.
        paths: the images.

    Raises:
        UserError: there is no such encoder, it has diverged, or it can't take the size.
    """
    torch.manual_seed(0)
    if image_size is None and source.startswith("random:"):
        image_size = suitable_size(paths)
    return encoder_for(source, image_size)


def _check_utf8(paths: Sequence[str]) -> None:
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            name = path.encode(errors="backslashreplace").decode()
            raise UserError(f"a Parquet file can't hold the name {name}, which is not UTF-8: "
                            f"rename it, or give --format npz") from None  # fmt: skip


def _features(
    encoder: Encoder, paths: Sequence[str], layer: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """``(N, D)`` float32 features of the images that can be read, and ``(M,)`` bool: which can."""
    stage: int | None = None
    if layer is not None:
        names = encoder.stage_names()
        if layer not in names:
            raise UserError(f"{encoder.backbone} has no layer {layer}: "
                            f"{did_you_mean(layer, names)}")  # fmt: skip
        stage = names.index(layer)

    def compute(images: Tensor) -> list[Tensor]:
        if stage is None:
            return [encoder(images)]
        return [encoder.stages(images)[stage].float().mean(dim=(2, 3))]

    with progress_bar() as bar:
        task = bar.add_task("embed", total=len(paths), info="")
        (features,), good = run_over(
            encoder,
            compute,
            encoder.normalize,
            paths,
            encoder.image_size,
            lambda images: bar.advance(task, images),
        )
    check_outputs([features], f"some of the {len(features)} images")
    return features.numpy(), good


def _write_npz(file: Path, paths: list[str], features: np.ndarray) -> None:
    with file.open("wb") as opened:  # by its name NumPy would add a suffix
        np.savez(opened, paths=np.array(paths, dtype=np.str_), features=features)


def _write_parquet(file: Path, paths: list[str], features: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(features.reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
    pq.write_table(pa.table({"path": pa.array(paths), "embedding": rows}), file)
