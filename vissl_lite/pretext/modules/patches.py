"""Grids of 3 x 3 patches of an image with random jitter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import LARGEST_IMAGE, UserError, check_count

# Number of rows and columns of the grid, and number of patches.
GRID_ROWS = 3
NUM_PATCHES = GRID_ROWS * GRID_ROWS


@dataclass(frozen=True)
class Grid:
    """Geometry of a grid of patches.

    Attributes:
        side: Side of a patch in pixels.
        step: Distance between neighboring grid cells in pixels.
        slack: Largest offset of a patch from the top left corner of its cell in pixels.

    Raises:
        UserError: If the grid needs images larger than ``LARGEST_IMAGE``.
    """

    side: int
    step: int
    slack: int

    def __post_init__(self) -> None:
        if self.image_size > LARGEST_IMAGE:
            raise UserError(
                f"the patches of this pretext would need images of {self.image_size} "
                f"pixels, more than {LARGEST_IMAGE}: give smaller ones"
            )

    @property
    def image_size(self) -> int:
        """Side in pixels of the smallest image that contains the grid."""
        return (GRID_ROWS - 1) * self.step + self.side + self.slack

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw random positions of the patches, independently for each patch and axis.

        Args:
            count: B, number of images.
            device: Device to draw on.

        Returns:
            ``(B, 9)`` top rows and ``(B, 9)`` left columns, in reading order.
        """
        cell = torch.arange(NUM_PATCHES, device=device)
        jitter = torch.randint(self.slack + 1, (2, count, NUM_PATCHES), device=device)
        return cell // GRID_ROWS * self.step + jitter[0], cell % GRID_ROWS * self.step + jitter[1]

    def cut(self, images: Tensor) -> Tensor:
        """Cut nine patches out of each image, at random positions.

        Args:
            images: ``(B, C, image_size, image_size)`` images.

        Returns:
            ``(9 B, C, side, side)`` patches, image by image, each in reading order.
        """
        return cut(images, *self.draw(len(images), images.device), self.side)


def cut(images: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Cut square patches out of images.

    Args:
        images: ``(B, C, H, W)`` images.
        rows: ``(B, N)`` top rows of the patches.
        columns: ``(B, N)`` left columns of the patches.
        side: Side of a patch in pixels.

    Returns:
        ``(N B, C, side, side)`` patches, image by image, in channels-last memory format.
    """
    offsets = torch.arange(side, device=images.device)
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    down = (rows[:, :, None] + offsets)[:, :, :, None]
    right = (columns[:, :, None] + offsets)[:, :, None, :]
    patches = images.permute(0, 2, 3, 1)[image, down, right]
    return patches.flatten(0, 1).permute(0, 3, 1, 2)


def patch_side(encoder: Encoder, requested: int | None, fraction: float, option: str) -> int:
    """Return the side of the patches in pixels.

    Args:
        encoder: Encoder of the patches.
        requested: Side that the user asks for; None for a supported size near ``fraction`` of the
            encoder's image size.
        fraction: Default side as a fraction of the encoder's image size.
        option: Name of the option, for errors.

    Raises:
        UserError: If the encoder does not support patches of this size.
    """
    check_count(f"pretext.{option}", requested, LARGEST_IMAGE)
    side = requested or encoder.fitting_size(fraction * encoder.image_size)
    try:
        encoder.check_image_size(side)
    except UserError as error:
        raise UserError(
            f"{error}; give another --pretext.{option}, or a larger --image_size"
        ) from None
    return side
