"""Patches in three rows and three columns of an image, each at a random place near its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import LARGEST_IMAGE, UserError, check_count

# Rows and columns of the grid, and all its places.
GRID_ROWS = 3
NUM_PATCHES = GRID_ROWS * GRID_ROWS


@dataclass(frozen=True)
class Grid:
    """Where patches may lie.

    Attributes:
        side: of a patch, in pixels.
        step: pixels from one place to the next.
        slack: pixels by which a patch may lie further down or right than its place begins.
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
        """Side in pixels of the image that just holds the grid."""
        return (GRID_ROWS - 1) * self.step + self.side + self.slack

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random places of the patches, independent of one another in both directions.

        Args:
            count: B, how many images.
            device: where.

        Returns:
            ``(B, 9)`` top rows and ``(B, 9)`` left columns, in reading order.
        """
        place = torch.arange(NUM_PATCHES, device=device)
        jitter = torch.randint(self.slack + 1, (2, count, NUM_PATCHES), device=device)
        return place // GRID_ROWS * self.step + jitter[0], place % GRID_ROWS * self.step + jitter[1]

    def cut(self, images: Tensor) -> Tensor:
        """Nine patches of each image, at random places.

        Args:
            images: ``(B, C, image_size, image_size)``.

        Returns:
            ``(9 B, C, side, side)``: image by image, each in reading order.
        """
        return cut(images, *self.draw(len(images), images.device), self.side)


def cut(images: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Cut square patches.

    Args:
        images: ``(B, C, H, W)``.
        rows: ``(B, N)`` top rows.
        columns: ``(B, N)`` left columns.
        side: of a patch, in pixels.

    Returns:
        ``(N B, C, side, side)``, image by image, channels last in memory.
    """
    offsets = torch.arange(side, device=images.device)
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    down = (rows[:, :, None] + offsets)[:, :, :, None]
    right = (columns[:, :, None] + offsets)[:, :, None, :]
    patches = images.permute(0, 2, 3, 1)[image, down, right]
    return patches.flatten(0, 1).permute(0, 3, 1, 2)


def patch_side(encoder: Encoder, given: int | None, share: float, option: str) -> int:
    """The side of the patches in pixels.

    Args:
        encoder: what takes them, one by one.
        given: what the user wants; default what fits the encoder, about
        share: of its image size.
        option: its name, for errors.

    Raises:
        UserError: the encoder can't take patches of this size.
    """
    check_count(f"pretext.{option}", given, LARGEST_IMAGE)
    side = given or encoder.fitting_size(share * encoder.image_size)
    try:
        encoder.check_image_size(side)
    except UserError as error:
        raise UserError(
            f"{error}; give another --pretext.{option}, or a larger --image_size"
        ) from None
    return side
