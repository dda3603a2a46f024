"""A pretext at work on some images of the run, as pictures, and the views it was given."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.data.images import BROKEN_IMAGE, read_image
from vissl_lite.data.stream import Item, ViewDataset, collate
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.inference import inference_mode
from vissl_lite.plots import Picture, plot_views
from vissl_lite.pretext.base import PretextTask, Visualization

# Images whose views are drawn, images that a pretext is shown on (the same and more), and how many
# files are tried at most to find them.
NUM_VIEWED, NUM_VISUALIZED, MAX_TRIES = 4, 8, 200


def visualization_of(
    task: PretextTask, paths: Sequence[str], views: Views, seed: int
) -> Visualization | None:
    """A pretext at work on some images, with nothing of its state changed.

    Args:
        task: put on the accelerator if there is one, and back where it was afterwards.
        paths: image files; broken ones are passed over.
        views: the task's.
        seed: which images, and what is asked of them: equal for equal seeds.

    Returns:
        None if there is nothing to see, or none of the images that were tried can be read.
    """
    items = _readable_items(paths, views, seed, NUM_VISUALIZED)
    if not items:
        return None
    with inference_mode(task) as device:
        others = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=others, device_type="cuda"):
            torch.manual_seed(seed)
            raw = [view.to(device) for view in collate(items).views]
            return task.visualize([task.encoder.normalize(view) for view in raw])


def draw_views(paths: Sequence[str], views: Views, seed: int, file: Path) -> None:
    """Draw some images beside their views, as a run with this seed sees them in its first epoch.

    Args:
        paths: image files; broken ones are passed over.
        views: the task's.
        seed: the run's.
        file: the PNG to write; nothing is, if none of the images that were tried can be read.
    """
    items = _readable_items(paths, views, seed, NUM_VIEWED)
    if items:
        images = [read_image(paths[item.number], views.shortest) for item in items]
        plot_views(images, [item.views for item in items], file)


def _readable_items(paths: Sequence[str], views: Views, seed: int, count: int) -> list[Item]:
    """Up to ``count`` random images that can be read, with their views."""
    dataset = ViewDataset(paths, views, seed)
    tried = min(MAX_TRIES, len(paths))
    items: list[Item] = []
    for index in np.random.default_rng(seed).choice(len(paths), tried, replace=False):
        with suppress(*BROKEN_IMAGE):
            items.append(dataset.item(0, int(index)))
        if len(items) == count:
            break
    return items


def to_pixels(images: Tensor, encoder: Encoder) -> np.ndarray:
    """Pictures of images that an encoder takes.

    Args:
        images: ``(B, 3, H, W)``, normalized; see ``Encoder.denormalize``.
        encoder: The encoder that they were normalized for.

    Returns:
        ``(B, H, W, 3)`` uint8.
    """
    return encoder.denormalize(images).permute(0, 2, 3, 1).cpu().numpy()


def picture_rows(encoder: Encoder, *columns: Tensor) -> list[list[Picture]]:
    """Rows of pictures without captions.

    Args:
        encoder: The encoder that the images were normalized for.
        columns: ``(B, 3, H, W)``, normalized.
    """
    pixels = [to_pixels(images, encoder) for images in columns]
    return [[Picture(image) for image in row] for row in zip(*pixels, strict=True)]


def reconstruction(
    encoder: Encoder, images: Tensor, mask: Tensor, predicted: Tensor, title: str
) -> Visualization:
    """What was hidden, and what was made of it.

    Args:
        encoder: The encoder that the images were normalized for.
        images: ``(B, 3, S, S)``, normalized.
        mask: ``(B, 1, g, g)`` bool, true where hidden; g divides S.
        predicted: ``(B, 3, S, S)``, normalized. What was not hidden is left as it was.
        title: of the column that it fills.
    """
    hidden = F.interpolate(mask.float(), size=images.shape[2:], mode="nearest") > 0
    seen = images.masked_fill(hidden, 0.0)  # 0 is the mean
    filled = torch.where(hidden, predicted.float(), images)
    return Visualization(("masked", title, "truth"), picture_rows(encoder, seen, filled, images))
