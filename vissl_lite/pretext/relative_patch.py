"""Relative patch: predict in which of eight directions a patch lies from another one.

Doersch, Gupta & Efros 2015, "Unsupervised Visual Representation Learning by Context Prediction",
arXiv 1505.05192.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.plots import Picture
from vissl_lite.pretext.base import PretextInfo, PretextTask, Visualization
from vissl_lite.pretext.modules.chance_monitor import ChanceMonitor
from vissl_lite.pretext.modules.crops import cropped_views
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.patches import NUM_PATCHES, Grid, cut, patch_side
from vissl_lite.pretext.modules.visualization import to_pixels

Color = Literal["drop", "project", "keep"]

# Indices of the grid in reading order. The label of a neighbor is its position in ``NEIGHBORS``.
CENTER = 4
NEIGHBORS = [0, 1, 2, 3, 5, 6, 7, 8]
DIRECTIONS = (
    "above left",
    "above",
    "above right",
    "left",
    "right",
    "below left",
    "below",
    "below right",
)


def drop_colors(patches: Tensor) -> Tensor:
    """Keep one random channel of each patch and replace the others by noise (section 3.1).

    With a single channel, chromatic aberration can't reveal the position of a patch.

    Args:
        patches: ``(N, C, S, S)`` normalized patches.

    Returns:
        Tensor of the same shape; the noise is Gaussian with a hundredth of the standard deviation
        of the kept channel.
    """
    count, channels = patches.shape[:2]
    kept = torch.randint(channels, (count,), device=patches.device)
    image = torch.arange(count, device=patches.device)
    deviation = patches[image, kept].std(dim=(1, 2))[:, None, None, None]
    noise = torch.randn_like(patches) * deviation / 100
    is_kept = kept[:, None] == torch.arange(channels, device=patches.device)
    return torch.where(is_kept[:, :, None, None], patches, noise)


def project_colors(patches: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Remove the green-magenta direction: B = I - a^T a / (a a^T), a = [-1, 2, -1].

    From section 3.1; B acts on RGB values. This removes green and magenta fringes. Aberration
    between red and blue is orthogonal and remains; ``drop_colors`` removes that too.

    Args:
        patches: ``(N, 3, S, S)`` normalized patches, ``values * scale + shift``.
        scale: ``(1, 3, 1, 1)`` scale of the normalization.
        shift: ``(1, 3, 1, 1)`` shift of the normalization.

    Returns:
        Tensor of the same shape, normalized in the same way.
    """
    colors = (patches - shift) / scale
    axis = colors.new_tensor([-1.0, 2.0, -1.0])[None, :, None, None]
    along = (colors * axis).sum(dim=1, keepdim=True) / axis.square().sum()
    return (colors - along * axis) * scale + shift


class RelativePatch(PretextTask):
    """Relative patch prediction.

    The encoder processes the patches of a 3 x 3 grid independently, and a small head takes the
    features of the center and of one neighbor (late fusion in the paper, figure 3). Shortcuts are
    prevented as in section 3.1: gaps and jitter hide lines that cross a border, processing of
    colors hides chromatic aberration. The paper also downsamples some patches, for robustness to
    pixelation (section 3.2), which is omitted here.

    Args:
        encoder: Encoder to train.
        patch_size: Side of a patch in pixels; default a size that the encoder supports near 3/7 of
            its image size: 96 at 224 as in the paper (section 3).
        gap: Distance between patches in pixels; default half of a patch: 48 for 96 (section 3.2).
        jitter: Largest random offset of a patch in each direction in pixels; default 7/96 of a
            patch: 7 for 96 (section 3.2).
        color: Protection against chromatic aberration (section 3.1). ``drop`` keeps one random
            channel of each patch; ``project`` removes the green-magenta direction; ``keep`` does
            nothing.
        hidden_size: Hidden size of the head; the paper uses two layers of 4096, for a million
            images.
        min_crop_scale: Smallest fraction of the image area in the view that contains the grid; in
            the paper the grid covers a third of an image to all of it (398^2 of 150,000 to 450,000
            pixels, section 3.2).
    """

    info = PretextInfo(
        name="relative_patch",
        family="predictive",
        views="1",
        paper="Doersch et al. 2015, arXiv 1505.05192",
        use="photographs of objects with parts; nine small patches per image",
    )
    # The paper trains with SGD for weeks on ImageNet; AdamW suits short runs.
    optimizer_settings = OptimizerSettings("adamw", lr=1e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        patch_size: int | None = None,
        gap: int | None = None,
        jitter: int | None = None,
        color: Color = "drop",
        hidden_size: int = 512,
        min_crop_scale: float = 0.33,
    ) -> None:
        super().__init__(encoder)
        if color not in ("drop", "project", "keep"):
            raise UserError(f"--pretext.color {color} is unknown: give drop, project or keep")
        if color == "project" and encoder.reader.bands is not None:
            raise UserError(
                "--pretext.color project needs photographs of 8-bit color, and these images have "
                "bands: give drop or keep"
            )
        check_sizes(hidden_size=hidden_size)
        side = patch_side(encoder, patch_size, 3 / 7, "patch_size")
        gap = side // 2 if gap is None else gap
        jitter = round(side * 7 / 96) if jitter is None else jitter
        for name, value in (("gap", gap), ("jitter", jitter)):
            if value < 0:
                raise UserError(f"--pretext.{name} {value} must not be negative")
        self.grid = Grid(side, step=side + gap, slack=2 * jitter)
        self.head = ProjectionHead(2 * encoder.num_features, hidden_size, len(NEIGHBORS))
        self.signal = ChanceMonitor("relative_patch", chance=1 / len(NEIGHBORS))
        self.color, self.min_crop_scale = color, min_crop_scale

    def views(self, upright: bool = True) -> Views:
        return cropped_views(self.grid.image_size, self.min_crop_scale, upright)

    def patches(self, images: Tensor) -> Tensor:
        """Cut nine patches out of each image and process their colors.

        Args:
            images: ``(B, C, S, S)`` normalized images.

        Returns:
            ``(9 B, C, side, side)`` patches, image by image, each in reading order.
        """
        return self.process_colors(self.grid.cut(images))

    def process_colors(self, patches: Tensor) -> Tensor:
        """Apply the option ``color`` to patches ``(N, C, side, side)``."""
        if self.color == "drop":
            return drop_colors(patches)
        if self.color == "project":
            return project_colors(patches, self.encoder.scale, self.encoder.shift)
        return patches

    def predict(self, patches: Tensor) -> Tensor:
        """Predict the direction of each neighbor from the center.

        Args:
            patches: ``(9 B, C, side, side)`` patches after ``process_colors``.

        Returns:
            ``(8 B, 8)`` logits in float32, image by image.
        """
        features = self.encoder(patches).unflatten(0, (-1, NUM_PATCHES))
        neighbors = torch.cat([features[:, :CENTER], features[:, CENTER + 1 :]], dim=1)
        centers = features[:, CENTER : CENTER + 1].expand_as(neighbors)
        pairs = torch.cat([centers, neighbors], dim=2).flatten(0, 1)
        return self.head(pairs).float()

    def loss(self, views: list[Tensor]) -> Tensor:
        logits = self.predict(self.patches(views[0]))
        labels = torch.arange(len(NEIGHBORS), device=logits.device).repeat(len(views[0]))
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.measure("accuracy", accuracy)
        self.signal.update(accuracy, self.progress)
        return F.cross_entropy(logits, labels)

    def visualize(self, views: list[Tensor]) -> Visualization:
        images, side = views[0], self.grid.side
        down, right = self.grid.draw(len(images), images.device)
        patches = cut(images, down, right, side)
        predictions = self.predict(self.process_colors(patches)).argmax(dim=1).view(len(images), -1)
        pixels = to_pixels(patches, self.encoder).reshape(len(images), NUM_PATCHES, side, side, 3)
        rows = []
        for number, whole in enumerate(to_pixels(images, self.encoder)):
            label = int(torch.randint(len(NEIGHBORS), ()))
            predicted = int(predictions[number, label])
            faded = (0.25 * whole + 0.75 * 255).astype(np.uint8)
            pair = (pixels[number, CENTER], pixels[number, NEIGHBORS[label]])
            pictures = []
            for place in (NEIGHBORS[label], NEIGHBORS[predicted]):
                picture = faded.copy()
                for patch, at in zip(pair, (CENTER, place), strict=True):
                    y, x = int(down[number, at]), int(right[number, at])
                    picture[y : y + side, x : x + side] = patch
                pictures.append(picture)
            truth = Picture(pictures[0], DIRECTIONS[label])
            rows.append(
                [truth, Picture(pictures[1], DIRECTIONS[predicted], right=predicted == label)]
            )
        return Visualization(("two patches", "placed as predicted"), rows)
