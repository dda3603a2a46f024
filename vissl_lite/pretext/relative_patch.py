"""Relative patch: tell in which of eight directions a patch lies from another one.

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

# Places of the grid, in reading order: the label of a neighbor is its number in this list.
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
    """Keep one random channel of each patch, make the others noise (section 3.1).

    No two channels are left whose displacement could tell where in the photograph a patch lies.

    Args:
        patches: ``(N, C, S, S)``, normalized.

    Returns:
        The same shape; the noise is Gaussian with a hundredth of the kept channel's standard
        deviation.
    """
    count, channels = patches.shape[:2]
    kept = torch.randint(channels, (count,), device=patches.device)
    image = torch.arange(count, device=patches.device)
    deviation = patches[image, kept].std(dim=(1, 2))[:, None, None, None]
    noise = torch.randn_like(patches) * deviation / 100
    stays = kept[:, None] == torch.arange(channels, device=patches.device)
    return torch.where(stays[:, :, None, None], patches, noise)


def project_colors(patches: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Remove the direction from magenta to green: B = I - a^T a / (a a^T), a = [-1, 2, -1].

    From section 3.1; B acts on RGB values. Fringes of green and magenta vanish. A displacement of
    red against blue is at a right angle to them and stays: ``drop_colors`` removes that too.

    Args:
        patches: ``(N, 3, S, S)``, normalized: values times
        scale: ``(1, 3, 1, 1)`` plus
        shift: ``(1, 3, 1, 1)``.

    Returns:
        The same shape, normalized in the same way.
    """
    colors = (patches - shift) / scale
    axis = colors.new_tensor([-1.0, 2.0, -1.0])[None, :, None, None]
    along = (colors * axis).sum(dim=1, keepdim=True) / axis.square().sum()
    return (colors - along * axis) * scale + shift


class RelativePatch(PretextTask):
    """Relative patch prediction.

    Nine patches in three rows and columns go through the encoder one by one, and each neighbor's
    features meet the center's in a small head (the paper's late fusion, figure 3). Gaps and jitter
    keep the lines that cross a border from giving the direction away, the treatment of colors
    keeps the lens from doing so (section 3.1). The paper also makes some patches coarse, against
    pixelation (section 3.2), which is left out here.

    Args:
        encoder: Encoder to train.
        patch_size: side of a patch in pixels; default what fits the encoder, about 3/7 of its
            images: 96 at 224 as in the paper (section 3).
        gap: pixels between patches; default half of a patch: 48 for 96 (section 3.2).
        jitter: pixels by which a patch may lie off its place in each direction; default 7/96 of a
            patch: 7 for 96 (section 3.2).
        color: against chromatic aberration (section 3.1). ``drop`` keeps one random channel of
            each patch; ``project`` removes the direction from green to magenta; ``keep`` does
            nothing.
        hidden_size: of the head. The paper's has two layers of 4096, for a million images.
        min_crop_scale: Smallest fraction of the image area in the view that holds the grid; in the
            paper the grid takes from a third of an image to all of it (398^2 of 150,000 to 450,000
            pixels, section 3.2).
    """

    info = PretextInfo(
        name="relative_patch",
        family="predictive",
        views="1",
        paper="Doersch et al. 2015, arXiv 1505.05192",
        use="pictures of things with parts; nine small patches an image",
    )
    # The paper's SGD runs for weeks on ImageNet; AdamW suits short runs.
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
        if color == "project" and len(encoder.mean) != 3:
            raise UserError(
                f"--pretext.color project needs images of 3 channels, {encoder.backbone} takes "
                f"{len(encoder.mean)}: give drop or keep"
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
        """Nine patches of each image, their colors treated: what the encoder sees.

        Args:
            images: ``(B, C, S, S)``, normalized.

        Returns:
            ``(9 B, C, side, side)``: image by image, each in reading order.
        """
        return self.process_colors(self.grid.cut(images))

    def process_colors(self, patches: Tensor) -> Tensor:
        """Patches ``(N, C, side, side)`` with their colors treated as was asked for."""
        if self.color == "drop":
            return drop_colors(patches)
        if self.color == "project":
            return project_colors(patches, self.encoder.scale, self.encoder.shift)
        return patches

    def predict(self, patches: Tensor) -> Tensor:
        """In which direction each neighbor lies.

        Args:
            patches: ``(9 B, C, side, side)``, treated.

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
