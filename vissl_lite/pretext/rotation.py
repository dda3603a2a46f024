"""Rotation (RotNet): predict by which of four angles an image was rotated.

Gidaris, Singh & Komodakis 2018, "Unsupervised Representation Learning by Predicting Image
Rotations", arXiv 1803.07728.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.data.views import Views, crop_decode_size, flip, random_crop
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.optim import OptimizerSettings
from vissl_lite.plots import Picture
from vissl_lite.pretext.base import PretextInfo, PretextTask, Visualization
from vissl_lite.pretext.modules.chance_monitor import ChanceMonitor
from vissl_lite.pretext.modules.visualization import to_pixels


def rotation_views(size: int, min_crop_scale: float) -> Views:
    """One randomly cropped and flipped view; the loss rotates it.

    Args:
        size: Side of the view in pixels.
        min_crop_scale: Smallest fraction of the image area in the view.
    """
    one = [random_crop(size, min_crop_scale), flip()]
    return Views([one], shortest=crop_decode_size(size, min_crop_scale))


def all_rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each image by all four angles, which helps in one batch (paper, section 2.2).

    Args:
        images: ``(B, C, S, S)`` images.

    Returns:
        ``(4 B, C, S, S)`` images and ``(4 B,)`` labels: the number of quarter turns.
    """
    turned = torch.cat([torch.rot90(images, k, dims=(2, 3)) for k in range(4)])
    labels = torch.arange(4, device=images.device).repeat_interleave(len(images))
    return turned.contiguous(memory_format=torch.channels_last), labels


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate each image by its own number of quarter turns.

    Args:
        images: ``(B, C, S, S)`` images.
        turns: ``(B,)`` number of quarter turns; negative ones rotate back.
    """
    pairs = zip(images, turns.tolist(), strict=True)
    return torch.stack([torch.rot90(image, count, dims=(1, 2)) for image, count in pairs])


def visualize_rotations(
    images: Tensor, encoder: Encoder, classify: Callable[[Tensor], Tensor]
) -> Visualization:
    """Visualize images rotated at random, and rotated back by the prediction.

    Args:
        images: ``(B, 3, S, S)`` normalized images.
        encoder: Encoder that the images were normalized for.
        classify: Function from images to ``(B, 4)`` logits.
    """
    turns = torch.randint(4, (len(images),), device=images.device)
    turned = rotate(images, turns)
    predictions = classify(turned).argmax(dim=1)
    rotated, restored = to_pixels(turned, encoder), to_pixels(rotate(turned, -predictions), encoder)
    rows = [
        [
            Picture(image, f"by {90 * true}°"),
            Picture(back, f"by {90 * predicted}°", right=true == predicted),
        ]
        for image, back, true, predicted in zip(
            rotated, restored, turns.tolist(), predictions.tolist(), strict=True
        )
    ]
    return Visualization(("rotated", "rotated back\nas predicted"), rows)


class Rotation(PretextTask):
    """Rotation prediction. Unsuited to images without a natural orientation (microscopy).

    Args:
        encoder: Encoder to train.
        min_crop_scale: Smallest fraction of the image area in a view.
    """

    info = PretextInfo(
        name="rotation",
        family="predictive",
        views="1",
        paper="Gidaris et al. 2018, arXiv 1803.07728",
        use="photographs with a natural orientation; learns quickly",
        any_size=True,
        token_drop=0.0,
        orientation=True,
    )
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(self, encoder: Encoder, min_crop_scale: float = 0.5) -> None:
        super().__init__(encoder)
        self.head = nn.Linear(encoder.num_features, 4)
        self.signal = ChanceMonitor("rotation", chance=1 / 4)
        self.min_crop_scale = min_crop_scale

    def views(self, upright: bool = True) -> Views:
        return rotation_views(self.encoder.image_size, self.min_crop_scale)

    def loss(self, views: list[Tensor]) -> Tensor:
        images, labels = all_rotations(views[0])
        logits = self.head(self.encoder(images)).float()
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.measure("accuracy", accuracy)
        self.signal.update(accuracy, self.progress)
        return F.cross_entropy(logits, labels)

    def visualize(self, views: list[Tensor]) -> Visualization:
        return visualize_rotations(views[0], self.encoder, nn.Sequential(self.encoder, self.head))
