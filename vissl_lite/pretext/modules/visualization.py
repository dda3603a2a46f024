"""Pictures of the views of a pretext and of its predictions on images of a run."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.stream import Item, ViewDataset, collate
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.inference import inference_mode
from vissl_lite.plots import Picture, plot_views
from vissl_lite.pretext.base import PretextTask, Visualization

# Number of images whose views are drawn, number of images that predictions are visualized for (the
# same and more), and maximum number of files to try to read.
NUM_VIEWED, NUM_VISUALIZED, MAX_TRIES = 4, 8, 200


def visualization_of(
    task: PretextTask, paths: Sequence[str], views: Views, seed: int
) -> Visualization | None:
    """Visualize a pretext on a few images, without changing its state.

    Args:
        task: Pretext task; moved to the accelerator if there is one, and back afterwards.
        paths: Image files; unreadable ones are skipped.
        views: Views of the task.
        seed: Seed of the choice of images and of the random state of the task.

    Returns:
        The visualization; None if the task has none, or if no image can be read.
    """
    items = _readable_items(paths, views, seed, NUM_VISUALIZED, task.encoder.reader)
    if not items:
        return None
    with inference_mode(task) as device:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, device_type="cuda"):
            torch.manual_seed(seed)
            raw = [view.to(device) for view in collate(items).views]
            return task.visualize([task.encoder.normalize(view) for view in raw])


def draw_views(
    paths: Sequence[str],
    views: Views,
    seed: int,
    file: Path,
    reader: ImageReader = PHOTOGRAPHS,
) -> None:
    """Draw a few images and their views in the first epoch of a run with this seed.

    Args:
        paths: Image files; unreadable ones are skipped.
        views: Views of the task.
        seed: Seed of the run.
        file: PNG file to write; not written if no image can be read.
        reader: How the images are read.
    """
    items = _readable_items(paths, views, seed, NUM_VIEWED, reader)
    if items:
        images = [reader.read_picture(paths[item.number], views.shortest) for item in items]
        pictures = [[reader.picture(view) for view in item.views] for item in items]
        plot_views(images, pictures, file)


def _readable_items(
    paths: Sequence[str], views: Views, seed: int, count: int, reader: ImageReader
) -> list[Item]:
    dataset = ViewDataset(paths, views, seed, reader=reader)
    tries = min(MAX_TRIES, len(paths))
    items: list[Item] = []
    for index in np.random.default_rng(seed).choice(len(paths), tries, replace=False):
        with suppress(*BROKEN_IMAGE):
            items.append(dataset.item(0, int(index)))
        if len(items) == count:
            break
    return items


def to_pixels(images: Tensor, encoder: Encoder) -> np.ndarray:
    """Convert normalized images to pixels; see ``Encoder.denormalize``.

    Args:
        images: ``(B, 3, H, W)`` normalized images.
        encoder: Encoder that the images were normalized for.

    Returns:
        ``(B, H, W, 3)`` uint8.
    """
    return encoder.denormalize(images).permute(0, 2, 3, 1).cpu().numpy()


def picture_rows(encoder: Encoder, *columns: Tensor) -> list[list[Picture]]:
    """Arrange images in rows of pictures without captions.

    Args:
        encoder: Encoder that the images were normalized for.
        columns: ``(B, 3, H, W)`` normalized images of each column.
    """
    pixels = [to_pixels(images, encoder) for images in columns]
    return [[Picture(image) for image in row] for row in zip(*pixels, strict=True)]


def reconstruction(
    encoder: Encoder, images: Tensor, mask: Tensor, predicted: Tensor, title: str
) -> Visualization:
    """Visualize masked images, reconstructions and originals.

    Args:
        encoder: Encoder that the images were normalized for.
        images: ``(B, 3, S, S)`` normalized images.
        mask: ``(B, 1, g, g)`` bool, true where masked; g divides S.
        predicted: ``(B, 3, S, S)`` normalized predictions; only masked pixels are used.
        title: Title of the column of reconstructions.
    """
    masked = F.interpolate(mask.float(), size=images.shape[2:], mode="nearest") > 0
    visible = images.masked_fill(masked, 0.0)  # 0 is the mean.
    restored = torch.where(masked, predicted.float(), images)
    rows = picture_rows(encoder, visible, restored, images)
    return Visualization(("masked", title, "truth"), rows)
