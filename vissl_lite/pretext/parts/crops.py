"""Views that several pretexts take: one crop of an image, two, or large and small ones."""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from vissl_lite.data.views import Views, crop_decode_size, distorted_crop, flip, random_crop
from vissl_lite.encoder import Encoder
from vissl_lite.errors import LARGEST_DEPTH, UserError, check_count


def cropped_views(size: int, smallest_crop: float, upright: bool) -> Views:
    """One view: a random crop, perhaps flipped, for tasks that predict part of the image.

    Args:
        size: side in pixels.
        smallest_crop: smallest share of the image's area.
        upright: whether the images have an up.
    """
    one = [random_crop(size, smallest_crop), flip(upright)]
    return Views([one], shortest=crop_decode_size(size, smallest_crop))


def two_views(
    size: int,
    smallest_crop: float,
    colour: float | None,
    upright: bool,
    blur: tuple[float, float] = (0.5, 0.5),
    solarize: tuple[float, float] = (0.0, 0.0),
) -> Views:
    """Two random crops, flipped, their colours distorted, perhaps blurred (SimCLR, appendix A).

    Args:
        size: side in pixels.
        smallest_crop: smallest share of the image's area.
        colour: strength of the colour distortion; see ``distorted_crop``.
        upright: whether the images have an up.
        blur: probability for each view.
        solarize: probability for each view.
    """
    first, second = (
        distorted_crop(size, smallest_crop, colour, blurred, inverted, upright)
        for blurred, inverted in zip(blur, solarize, strict=True)
    )
    return Views([first, second], shortest=crop_decode_size(size, smallest_crop))


# BYOL (Grill et al. 2020, appendix B): one view is always blurred, the other seldom, but sometimes
# solarized.
BYOL_BLUR, BYOL_SOLARIZE = (1.0, 0.1), (0.0, 0.2)


def multicrop_views(
    encoder: Encoder,
    large_crops: int,
    small_crops: int | None,
    smallest_crop: float,
    largest_small_crop: float,
    colour: float | None,
    upright: bool,
    solarize: bool,
) -> Views:
    """Large crops of the encoder's size, then small ones of 96/224 of it (SwAV, Caron et al. 2020).

    Args:
        encoder: what they are for.
        large_crops: how many.
        small_crops: how many; default ``default_small_crops``.
        smallest_crop: smallest share of the image's area in a small crop.
        largest_small_crop: where the shares of small crops end and those of large ones begin.
        colour: strength of the colour distortion; see ``distorted_crop``.
        upright: whether the images have an up.
        solarize: blur and solarize the large crops as BYOL does; else blur each half of the time.

    Raises:
        UserError: the backbone can't take the small crops, or the shares are none.
    """
    size = encoder.image_size
    if not 0 < smallest_crop <= largest_small_crop:
        raise UserError(
            f"--pretext.smallest_crop {smallest_crop} must be above 0 and at most "
            f"--pretext.smallest_large_crop {largest_small_crop}"
        )
    if solarize:
        pairs = [
            distorted_crop(size, largest_small_crop, colour, blurred, inverted, upright)
            for blurred, inverted in zip(BYOL_BLUR, BYOL_SOLARIZE, strict=True)
        ]
    else:
        pairs = [distorted_crop(size, largest_small_crop, colour, upright=upright)]
    pipelines = [pairs[number % len(pairs)] for number in range(large_crops)]
    shortest = crop_decode_size(size, largest_small_crop)
    if small_crops is None:
        small_crops = default_small_crops(encoder)
    check_count("pretext.small_crops", small_crops or None, LARGEST_DEPTH)
    if small_crops:
        small = encoder.fitting_size(size * 96 / 224)
        try:
            encoder.check_image_size(small)
        except UserError as error:
            raise UserError(f"{error}; --pretext.small_crops 0 does without") from None
        one = distorted_crop(
            small, smallest_crop, colour, upright=upright, largest_crop=largest_small_crop
        )
        pipelines += [one] * small_crops
        shortest = max(shortest, crop_decode_size(small, smallest_crop))
    return Views(pipelines, shortest)


def by_size(network: Callable[[Tensor], Tensor], views: list[Tensor]) -> list[Tensor]:
    """Run a network over views, in one pass for each run of views of equal size.

    Args:
        network: takes ``(N, C, H, W)``, gives ``(N, ...)``.
        views: ``(B, C, H, W)`` each.

    Returns:
        One ``(B, ...)`` output for each view.
    """
    outputs: list[Tensor] = []
    for _, group in groupby(views, key=lambda view: view.shape[-1]):
        same = list(group)
        outputs += network(torch.cat(same)).chunk(len(same))
    return outputs


def default_small_crops(encoder: Encoder) -> int:
    """Six, as SwAV has on ImageNet; none below 64 pixels, where they would show next to nothing."""
    return 6 if encoder.image_size >= 64 else 0
