"""Views shared by several pretexts: one crop, two crops, or global and local crops."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from vissl_lite.data.views import Views, crop_decode_size, distorted_crop, flip, random_crop
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import LARGEST_DEPTH, UserError, check_count


def cropped_views(size: int, min_crop_scale: float, upright: bool) -> Views:
    """One randomly cropped and flipped view, for tasks that predict part of the image.

    Args:
        size: Side of the view in pixels.
        min_crop_scale: Smallest fraction of the image area in the crop.
        upright: Whether the images have a natural orientation.
    """
    one = [random_crop(size, min_crop_scale), flip(upright)]
    return Views([one], shortest=crop_decode_size(size, min_crop_scale))


def distorted_view(
    size: int, min_crop_scale: float, color: float, upright: bool, central: bool = False
) -> Views:
    """One view of each image: a crop with changed colors.

    Args:
        size: Side of the view in pixels.
        min_crop_scale: Smallest fraction of the image area in the view.
        color: Strength of the color distortion; see ``distorted_crop``.
        upright: Whether the images have a natural orientation.
        central: Whether the crop comes from the central square; see ``RandomResizedCrop``.
    """
    view = distorted_crop(size, min_crop_scale, color, upright=upright, central=central)
    return Views([view], shortest=crop_decode_size(size, min_crop_scale))


def two_views(
    size: int,
    min_crop_scale: float,
    color: float,
    upright: bool,
    blur: tuple[float, float] = (0.5, 0.5),
    solarize: tuple[float, float] = (0.0, 0.0),
) -> Views:
    """Two random crops with flips, color distortion and blur (SimCLR, appendix A).

    Args:
        size: Side of the views in pixels.
        min_crop_scale: Smallest fraction of the image area in a crop.
        color: Strength of the color distortion; see ``distorted_crop``.
        upright: Whether the images have a natural orientation.
        blur: Probability of blurring each of the views.
        solarize: Probability of solarizing each of the views.
    """
    first, second = (
        distorted_crop(size, min_crop_scale, color, blurred, inverted, upright)
        for blurred, inverted in zip(blur, solarize, strict=True)
    )
    return Views([first, second], shortest=crop_decode_size(size, min_crop_scale))


# BYOL (Grill et al. 2020, appendix B): the first view is always blurred; the second is rarely
# blurred and sometimes solarized.
BYOL_BLUR, BYOL_SOLARIZE = (1.0, 0.1), (0.0, 0.2)


def local_views(
    encoder: Encoder,
    count: int,
    largest: float,
    color: float,
    upright: bool,
    smallest: float = 0.05,
    solarize: float = 0.0,
) -> Views:
    """Local crops, whose side is 96/224 of the encoder's (SwAV, Caron 2020).

    Args:
        encoder: The encoder that the views are for.
        count: Number of local crops; may be 0.
        largest: Largest fraction of the image area in a crop.
        color: Strength of the color distortion; see ``distorted_crop``.
        upright: Whether the images have a natural orientation.
        smallest: Smallest fraction of the image area, but at most ``largest``; default as SwAV's.
        solarize: Probability of solarizing a crop.

    Raises:
        UserError: If the backbone does not support the size of the local crops.
    """
    check_count("pretext.local_crops", count or None, LARGEST_DEPTH)
    if not count:
        return Views([], shortest=0)
    side = encoder.fitting_size(encoder.image_size * 96 / 224)
    try:
        encoder.check_image_size(side)
    except UserError as error:
        raise UserError(f"{error}; --pretext.local_crops 0 does without") from None
    smallest = min(smallest, largest)
    local = distorted_crop(side, smallest, color, 0.5, solarize, upright, largest)
    return Views([local] * count, crop_decode_size(side, smallest))


@dataclass(frozen=True)
class MultiCrop:
    """Global crops of the encoder's size, then local ones; see ``local_views``.

    Attributes:
        global_crops: Number of global crops.
        local_crops: Number of local crops; default ``default_local_crops``.
        min_crop_scale: Smallest fraction of the image area in a local crop.
        min_global_scale: Smallest fraction in a global crop, and largest fraction in a local one.
        color: Strength of the color distortion; see ``distorted_crop``.
        solarize: Blur and solarize the global crops as BYOL does; else blur each with probability
            0.5.
        solarize_all: Otherwise, probability of solarizing a crop, be it global or local.
    """

    global_crops: int
    local_crops: int | None
    min_crop_scale: float
    min_global_scale: float
    color: float
    solarize: bool = False
    solarize_all: float = 0.0

    def views(self, encoder: Encoder, upright: bool) -> Views:
        """Build the augmentations.

        Args:
            encoder: The encoder that the views are for.
            upright: Whether the images have a natural orientation.

        Raises:
            UserError: If the backbone does not support the size of the local crops, or if a
                fraction is out of range.
        """
        size, border = encoder.image_size, self.min_global_scale
        if not 0 < self.min_crop_scale <= border:
            raise UserError(
                f"--pretext.min_crop_scale {self.min_crop_scale} must be above 0 and at most "
                f"--pretext.min_global_crop_scale {border}"
            )
        each = self.solarize_all
        chances = zip(BYOL_BLUR, BYOL_SOLARIZE, strict=True) if self.solarize else [(0.5, each)]
        kinds = [
            distorted_crop(size, border, self.color, blur, solarize, upright)
            for blur, solarize in chances
        ]
        pipelines = [kinds[number % len(kinds)] for number in range(self.global_crops)]
        count = default_local_crops(encoder) if self.local_crops is None else self.local_crops
        local = local_views(encoder, count, border, self.color, upright, self.min_crop_scale, each)
        return Views(pipelines, crop_decode_size(size, border)) + local


def forward_multi_crop(network: Callable[[Tensor], Tensor], views: list[Tensor]) -> list[Tensor]:
    """Run a network on views, with one forward pass per group of consecutive views of equal size.

    Args:
        network: Maps ``(N, C, H, W)`` to ``(N, ...)``.
        views: Tensors of shape ``(B, C, H, W)``.

    Returns:
        One ``(B, ...)`` output per view.
    """
    outputs: list[Tensor] = []
    for _, group in groupby(views, key=lambda view: view.shape[-1]):
        same = list(group)
        outputs += network(torch.cat(same)).chunk(len(same))
    return outputs


def default_local_crops(encoder: Encoder) -> int:
    """Return 6 as SwAV uses on ImageNet; 0 below 64 pixels, where local crops show too little."""
    return 6 if encoder.image_size >= 64 else 0
