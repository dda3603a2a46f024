"""The flips and quarter turns of a square, and how predictions for a turned image are mapped back.

Predictions that are averaged over them (test-time augmentation) use the same group as the training
views: ``turns_for``.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """One of the eight symmetries of a square (the dihedral group D4).

    Attributes:
        quarters: Number of quarter turns, counterclockwise, from 0 to 3.
        mirrored: Whether left and right are swapped before.
    """

    quarters: int = 0
    mirrored: bool = False

    @property
    def swaps_sides(self) -> bool:
        """Whether height becomes width and width becomes height."""
        return self.quarters % 2 == 1

    def image(self, image: np.ndarray) -> np.ndarray:
        """Turn an image ``(H, W, ...)``; the result is contiguous."""
        mirrored = image[:, ::-1] if self.mirrored else image
        return np.ascontiguousarray(np.rot90(mirrored, self.quarters))

    def batch(self, images: Tensor) -> Tensor:
        """Turn images ``(..., H, W)``."""
        mirrored = images.flip(-1) if self.mirrored else images
        return torch.rot90(mirrored, self.quarters, (-2, -1))

    def map_back(self, maps: Tensor) -> Tensor:
        """Map predictions per pixel ``(..., H, W)`` for turned images back to the images."""
        back = torch.rot90(maps, -self.quarters, (-2, -1))
        return back.flip(-1) if self.mirrored else back

    def boxes_back(self, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
        """Map boxes in a turned image back to the image.

        Args:
            boxes: ``(N, 4)`` x1, y1, x2, y2 in pixels of the turned image.
            height: Height of the image in pixels, before it is turned.
            width: Its width.

        Returns:
            ``(N, 4)`` x1, y1, x2, y2 in pixels of the image.
        """
        x1, y1, x2, y2 = boxes.T
        turned_height = width if self.swaps_sides else height
        for _ in range(self.quarters):  # a quarter turn clockwise each
            x1, y1, x2, y2 = turned_height - y2, x1, turned_height - y1, x2
            turned_height = height + width - turned_height
        if self.mirrored:
            x1, x2 = width - x2, width - x1
        return np.stack([x1, y1, x2, y2], axis=1)


UNTURNED = (Turn(),)


def turns_for(upright: bool) -> tuple[Turn, ...]:
    """The turns that leave the meaning of an image; the first one leaves the image as it is.

    Args:
        upright: Whether the images have an up: then left and right can be swapped; else all eight.
    """
    quarters = (0,) if upright else (0, 1, 2, 3)
    return tuple(Turn(number, mirrored) for mirrored in (False, True) for number in quarters)
