"""Views: augmented versions of an image, each made by a pipeline of steps.

Every view draws from a generator that is keyed afresh from (seed, epoch, image index, view number),
so that it is a pure function of those four. The steps draw in their order; see ``view_steps``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import numpy as np

from vissl_lite.data.view_steps import (
    D4,
    ColorJitter,
    Crop,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomResizedCrop,
    Solarize,
    Step,
)
from vissl_lite.errors import UserError

# Gray, where a view reaches past its image.
PADDING_GRAY = 114

# An image whose shorter side is more than so many times a view's is segmented at its own scale.
OWN_SCALE_RATIO = 1.5


def rekey(random: Random, seed: int, epoch: int, index: int, view: int = 0) -> None:
    """Seed a generator by numbers.

    Args:
        random: The generator.
        seed: Seed of the run; below 2^64, as the others are.
        epoch: Number of the epoch, from 0.
        index: The image's number in the data set.
        view: The view's number.
    """
    random.seed(seed | epoch << 64 | index << 128 | view << 192)


class Views:
    """Pipelines of steps, one for each view.

    Args:
        pipelines: The steps of each view, in the order in which they are applied. The same pipeline
            may stand for several views: they differ by their view number.
        shortest: Shorter side in pixels that a cache keeps, and that decoding keeps for pipelines
            that do not begin with a ``RandomResizedCrop``.
    """

    def __init__(self, pipelines: Sequence[Sequence[Step]], shortest: int) -> None:
        self.shortest = shortest
        self._pipelines = [_split(list(steps)) for steps in pipelines]
        self._random = Random()

    def __len__(self) -> int:
        return len(self._pipelines)

    @property
    def smallest_crop(self) -> int | None:
        """Side in pixels of the smallest view that begins with a random crop, if there is one."""
        return min((first.size[0] for first, _ in self._pipelines if first), default=None)

    def __add__(self, other: "Views") -> "Views":
        """These views, followed by others."""
        pipelines = [
            steps if first is None else [first, *steps]
            for first, steps in self._pipelines + other._pipelines
        ]
        return Views(pipelines, max(self.shortest, other.shortest))

    def times(self, height: int, width: int, seed: int, epoch: int, index: int) -> int:
        """Largest factor by which decoding can reduce an image so that no view enlarges its crop.

        The crops that views begin with are drawn as they are for the views themselves.

        Args:
            height: Height of the whole image in pixels.
            width: Width of the whole image in pixels.
            seed: Seed of the run.
            epoch: Number of the epoch, from 0.
            index: The image's number in the data set.

        Returns:
            At least 1.
        """
        factor = least = min(height, width)
        for view, (first, _) in enumerate(self._pipelines):
            fits = least // max(1, min(first.size) if first else self.shortest)
            if first and fits > 1:
                crop = self._begin(first, height, width, seed, epoch, index, view)
                fits = min(crop.height // first.size[0], crop.width // first.size[1])
            if fits < 2:  # as it is with all small images: no more crops are drawn
                return 1
            factor = min(factor, fits)
        return max(1, factor)

    def __call__(
        self,
        image: np.ndarray,
        seed: int,
        epoch: int,
        index: int,
        whole: tuple[int, int] | None = None,
    ) -> list[np.ndarray]:
        """All views of one image.

        Args:
            image: ``(H, W, C)`` uint8 or uint16.
            seed: Seed of the run.
            epoch: Number of the epoch, from 0.
            index: The image's number in the data set.
            whole: Height and width of the image before it was reduced; default: it was not.

        Returns:
            One ``(h, w, C)`` array for each view.
        """
        height, width = whole or image.shape[:2]
        views = []
        for view, (first, steps) in enumerate(self._pipelines):
            if first:
                crop = self._begin(first, height, width, seed, epoch, index, view)
                made = first.cut(image, crop, (height, width))
            else:
                rekey(self._random, seed, epoch, index, view)
                made = image
            for step in steps:
                made = step(made, self._random)
            views.append(made)
        return views

    def resized(self, share: float, fitting: Callable[[float], int]) -> "Views":
        """The same views at a lower resolution: equal crops and distortions, blurred in proportion.

        Views that do not begin with a random crop keep their size.

        Args:
            share: Side of the new views, relative to the side of these, in (0, 1].
            fitting: Function from a side in pixels to the nearest one that the encoder takes.
        """
        pipelines: list[list[Step]] = []
        for first, steps in self._pipelines:
            if first is None:
                pipelines.append(steps)
                continue
            height, width = (min(side, fitting(side * share)) for side in first.size)
            factor = height / first.size[0]
            smaller = [_less_blurred(step, factor) for step in steps]
            pipelines.append([replace(first, size=(height, width)), *smaller])
        return Views(pipelines, round(self.shortest * share))

    def _begin(self, first: RandomResizedCrop, height: int, width: int, *key: int) -> Crop:
        """Seed the generator for a view and draw its initial crop."""
        rekey(self._random, *key)
        return first.draw(height, width, self._random)


def _split(steps: list[Step]) -> tuple[RandomResizedCrop | None, list[Step]]:
    """Split a pipeline into its initial crop, if any, and the other steps."""
    if steps and isinstance(steps[0], RandomResizedCrop):
        return steps[0], steps[1:]
    return None, steps


def _less_blurred(step: Step, factor: float) -> Step:
    if not isinstance(step, GaussianBlur):
        return step
    low, high = step.sigma
    return replace(step, sigma=(low, max(low, high * factor)))


def random_crop(
    size: int, smallest: float, largest: float = 1.0, central: bool = False
) -> RandomResizedCrop:
    """A random part of the image, resized to a square.

    Args:
        size: Side in pixels.
        smallest: Smallest share of the image's area, in (0, 1].
        largest: Largest share.
        central: Whether it comes from the central square; see ``RandomResizedCrop``.

    Raises:
        UserError: The share is out of range.
    """
    check_crop_scale(smallest)
    return RandomResizedCrop((size, size), (smallest, max(smallest, largest)), central=central)


def padding_value(dtype: np.dtype[np.generic]) -> int:
    """The value of ``PADDING_GRAY`` in images of 8 or of 16 bits."""
    return PADDING_GRAY * (1 if dtype == np.uint8 else 257)


def check_crop_scale(smallest: float) -> None:
    """Check the smallest fraction of an image's area in a crop.

    Raises:
        UserError: It is out of range.
    """
    if not 0 < smallest <= 1:
        raise UserError(f"min_crop_scale {smallest} is not a share: it must be above 0, at most 1")


def distorted_crop(
    size: int,
    min_crop_scale: float,
    color: float = 0.5,
    blur_probability: float = 0.5,
    solarize: float = 0.0,
    upright: bool = True,
    largest_crop: float = 1.0,
    central: bool = False,
) -> list[Step]:
    """A random crop with a flip, color distortion, and optional blur and solarization.

    One view of the pretexts that compare views: SimCLR (appendix A) and, with other
    probabilities, BYOL (Grill et al. 2020, appendix B) and those after it.

    Args:
        size: Side in pixels.
        min_crop_scale: Smallest share of the image's area.
        color: Strength of the color distortion, see ``color_distortion``. 0.5 is that of MoCo v2,
            and of BYOL and most methods after it but for the saturation, which they change half as
            much; SimCLR has 1 on ImageNet and 0.5 on CIFAR-10 (appendix B.9).
        blur_probability: Probability of being blurred; views below 64 pixels never are (SimCLR,
            appendix B.9).
        solarize: Probability of inverting the bright values.
        upright: Whether the images have an up; see ``flip``.
        largest_crop: Largest share of the image's area.
        central: Whether the crop comes from the central square; see ``RandomResizedCrop``.
    """
    crop = random_crop(size, min_crop_scale, largest_crop, central)
    steps: list[Step] = [crop, flip(upright)]
    steps += color_distortion(color)
    if blur_probability > 0 and size >= 64:
        steps.append(blur(size, blur_probability))
    if solarize > 0:
        steps.append(Solarize(solarize))
    return steps


def crop_decode_size(size: int, smallest: float) -> int:
    """Shorter side at which the smallest crop of an image needs no enlarging.

    A crop of area share s and aspect ratio 3/4 has a shorter side of sqrt(3 s / 4) of the image's.
    """
    return int(size / (smallest * 0.75) ** 0.5)


def flip(upright: bool = True) -> Step:
    """A flip that leaves the meaning of an image.

    Args:
        upright: Whether the images have an up: then left and right are swapped half of the time;
            else the view is any of the eight flips and quarter turns of a square.
    """
    return HorizontalFlip() if upright else D4()


def color_distortion(strength: float) -> list[Step]:
    """Color jitter with probability 0.8, then gray with probability 0.2 (SimCLR, appendix A).

    Args:
        strength: S of the paper: brightness, contrast and saturation change by up to 0.8 s, the
            hue by up to 0.2 s of the circle. 1 for ImageNet, 0.5 for CIFAR-10.
    """
    return [color_jitter(strength), Grayscale(p=0.2)]


def color_jitter(strength: float) -> Step:
    """Color jitter with probability 0.8, without turning gray; see ``color_distortion``."""
    change = 0.8 * strength
    return ColorJitter(change, change, change, hue=min(0.5, 0.2 * strength), p=0.8)


def gray(probability: float) -> Step:
    """Convert an image to gray, with three channels.

    Args:
        probability: Probability of being applied.
    """
    return Grayscale(probability)


def blur(size: int, probability: float = 0.5) -> Step:
    """Gaussian blur, sigma between 0.1 and 2 pixels at 224 (SimCLR, appendix A), less at smaller.

    Args:
        size: Side of the view in pixels.
        probability: Probability of being applied.
    """
    return GaussianBlur((0.1, 2.0 * size / 224), probability)
