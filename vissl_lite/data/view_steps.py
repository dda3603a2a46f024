"""Steps of augmented views: crops, flips, colors and blur, on OpenCV.

A step is a pure function of an image and of the numbers it draws. Which numbers it draws, and in
which order, its docstring says. A step with a probability ``p`` between 0 and 1 first draws one
uniform number that decides whether it is applied, and nothing more if it is not.

All of them take ``(H, W, C)`` pixels, leave them alone and return others: photographs, which are
uint8 with three channels, or bands, which are uint16 with any number of channels (see
``image_reader``). Of bands no step assumes that they are colors; each step says what it does.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import cv2
import numpy as np

# Weights of red, green and blue in a pixel's luma (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)

# Places that are tried for a random crop before the largest central one is taken (torchvision).
CROP_TRIES = 10

# How many times too large an image is halved before it is resized: then three pixels of smoothing
# suffice, and what comes of 2 x 2 pixels is not smoothed more than area interpolation would.
HALVED = 2.5

# Half the width of a blur's kernel in standard deviations.
BLUR_REACH = 3.5


class Step(ABC):
    """One step of a view.

    Attributes:
        p: Probability of being applied.
    """

    p: float = 1.0

    def __call__(self, image: np.ndarray, random: Random) -> np.ndarray:
        if self.p < 1 and random.random() >= self.p:
            return image
        return self.apply(image, random)

    @abstractmethod
    def apply(self, image: np.ndarray, random: Random) -> np.ndarray:
        """Apply the step.

        Args:
            image: ``(H, W, C)`` uint8 or uint16; not to be written to.
            random: Generator to draw from.
        """


def is_photograph(image: np.ndarray) -> bool:
    """Whether an image is 8-bit RGB; otherwise it has bands."""
    return image.dtype == np.uint8 and image.shape[2] == 3


class Crop(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class RandomResizedCrop(Step):
    """A random part of the image, resized (Szegedy et al. 2014, torchvision's definition).

    Up to ``CROP_TRIES`` times it draws an area, uniformly, and the logarithm of an aspect ratio,
    uniformly; the first rectangle that fits into the image gets a random place: top, then left are
    drawn. If none fits, as in most strips and panoramas, the largest part with an allowed aspect
    ratio is taken, at a random place too, and not in the center as torchvision does: the ends of
    long images would hardly ever be seen.

    Args:
        size: Height and width of the result in pixels.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width over height.
        central: Whether the part lies in the largest central square, which is all that evaluation
            shows of an image. ``scale`` is then of the square's area. Crops of square images are
            the same.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    central: bool = False

    def apply(self, image: np.ndarray, random: Random) -> np.ndarray:
        whole = image.shape[0], image.shape[1]
        return self.cut(image, self.draw(*whole, random), whole)

    def draw(self, height: int, width: int, random: Random) -> Crop:
        """Draw a crop of an image of this height and width."""
        if self.central and height != width:
            side = min(height, width)
            crop = self.draw(side, side, random)
            down, right = (height - side) // 2, (width - side) // 2
            return crop._replace(top=crop.top + down, left=crop.left + right)
        area, (low, high) = height * width, self.ratio
        for _ in range(CROP_TRIES):
            share = random.uniform(*self.scale)
            ratio = math.exp(random.uniform(math.log(low), math.log(high)))
            rows = round(math.sqrt(share * area / ratio))
            columns = round(math.sqrt(share * area * ratio))
            if 0 < rows <= height and 0 < columns <= width:
                break
        else:
            rows, columns = min(height, round(width / low)), min(width, round(height * high))
        top = random.randint(0, height - rows)
        return Crop(top, random.randint(0, width - columns), rows, columns)

    def cut(self, image: np.ndarray, crop: Crop, whole: tuple[int, int]) -> np.ndarray:
        """Crop and resize a part of an image.

        Args:
            image: ``(H, W, C)``, which may have been reduced since the crop was drawn.
            crop: The part, in pixels of the whole image.
            whole: Height and width of the whole image.
        """
        top, left, height, width = crop
        rows, columns = image.shape[:2]
        if (rows, columns) != whole:
            down, across = rows / whole[0], columns / whole[1]
            height, width = max(1, round(height * down)), max(1, round(width * across))
            top = min(round(top * down), rows - height)
            left = min(round(left * across), columns - width)
        part = image[top : top + height, left : left + width]
        return resized(part, self.size)


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image: linear interpolation for enlarging, antialiased for shrinking.

    Halved by means of 2 x 2 pixels as long as it is much too large, then smoothed over three pixels
    and sampled linearly. Smoothing brings the filter's variance from that of the linear one, 1/6,
    to that of averaging over the area of a pixel of the result, (s^2 + 1) / 12 for a shrinking by
    s. It takes a third of the time of OpenCV's area interpolation, and averages noise as much.

    Args:
        image: ``(H, W, C)`` uint8 or uint16.
        size: Height and width of the result.
    """
    height, width, channels = image.shape
    twice = 2 * size[0], 2 * size[1]
    while (height, width) == twice or min(height / size[0], width / size[1]) >= HALVED:
        height, width = height // 2, width // 2
        even = image[: 2 * height, : 2 * width]
        image = cv2.resize(even, (width, height), interpolation=cv2.INTER_AREA)
    if (height, width) != size:
        if height > size[0] or width > size[1]:
            image = cv2.sepFilter2D(
                image, -1, _smoothing(width / size[1]), _smoothing(height / size[0])
            )
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(image).reshape(*size, channels)  # OpenCV drops a single channel


def _smoothing(shrinking: float) -> np.ndarray:
    """A smoothing kernel of three pixels for linear sampling at a reduction factor."""
    side = min(1 / 3, max(0.0, (shrinking**2 - 1) / 24))
    return np.array([side, 1 - 2 * side, side])


@dataclass(frozen=True)
class HorizontalFlip(Step):
    """Swap left and right."""

    p: float = 0.5

    def apply(self, image: np.ndarray, random: Random) -> np.ndarray:
        return cv2.flip(image, 1).reshape(image.shape)


@dataclass(frozen=True)
class D4(Step):
    """One of the eight flips and quarter turns of a square (the dihedral group D4).

    Draws the number of quarter turns from 0 to 3, then whether left and right are swapped before.
    """

    p: float = 1.0

    def apply(self, image: np.ndarray, random: Random) -> np.ndarray:
        turns, flipped = random.randrange(4), random.randrange(2)
        if flipped:
            image = cv2.flip(image, 1).reshape(image.shape)
        if turns and image.shape[2] != 3:  # OpenCV turns few other numbers of channels
            return np.ascontiguousarray(np.rot90(image, turns))
        return cv2.rotate(image, _TURNS[turns - 1]) if turns else image


_TURNS = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)


@dataclass(frozen=True)
class ColorJitter(Step):
    """Change brightness, contrast, saturation and hue in random order (torchvision's definition).

    Draws the factors of brightness, contrast and saturation, uniformly from ``[max(0, 1 - x),
    1 + x]``, and the turn of the hue, uniformly from ``[-hue, hue]``; then the order of the four.

    Brightness multiplies all values; contrast blends the image with its mean luma, saturation each
    pixel with its luma. Values are rounded and cut off at 0 and 255 after what may exceed them.

    Bands have no saturation or hue. Of them brightness and contrast change, contrast about the mean
    of each band; then a gamma from ``[1 - saturation / 2, 1 + saturation / 2]``, and a gain of each
    band from ``[1 - hue, 1 + hue]``; see ``jitter_bands``.

    Args:
        brightness: Largest change of the factor.
        contrast: Likewise.
        saturation: Likewise.
        hue: Largest turn as a share of the circle, at most 0.5.
        p: Probability of being applied.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float = 1.0

    def apply(self, image: np.ndarray, random: Random) -> np.ndarray:
        if not is_photograph(image):
            return jitter_bands(
                image,
                random.uniform(max(0.0, 1 - self.brightness), 1 + self.brightness),
                random.uniform(max(0.0, 1 - self.contrast), 1 + self.contrast),
                random.uniform(1 - self.saturation / 2, 1 + self.saturation / 2),
                [random.uniform(1 - self.hue, 1 + self.hue) for _ in range(image.shape[2])],
            )
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [random.uniform(max(0.0, 1 - x), 1 + x) for x in strengths]
        factors.append(random.uniform(-self.hue, self.hue))
        order = [BRIGHTNESS, CONTRAST, SATURATION, HUE]
        random.shuffle(order)
        return jitter(image, factors, order)


BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def jitter_bands(
    image: np.ndarray, brightness: float, contrast: float, gamma: float, gains: Sequence[float]
) -> np.ndarray:
    """Change the values of bands.

    With values x in [0, 1] and the mean m of a band: ``(contrast (brightness gain x - m') + m')
    ^ gamma``, where m' is ``brightness gain m``, cut off at 0 and 1 before the power.

    Args:
        image: ``(H, W, C)`` uint16, or uint8.
        brightness: Factor of all values.
        contrast: Factor of the distance from the mean of the band.
        gamma: Exponent.
        gains: Factor of each band.
    """
    largest = np.iinfo(image.dtype).max
    factors = np.asarray(gains, np.float32) * brightness
    means = image.mean(axis=(0, 1), dtype=np.float32) * factors
    values = image * (contrast * factors) + (1 - contrast) * means
    values = np.clip(values * np.float32(1 / largest), 0, 1, dtype=np.float32)
    if gamma != 1:
        values = cv2.pow(values, gamma).reshape(image.shape)
    return np.rint(values * largest).astype(image.dtype)


def jitter(image: np.ndarray, factors: list[float], order: list[int]) -> np.ndarray:
    """Change brightness, contrast, saturation and hue in the order given.

    The first three turn a pixel x of luma y into ``a x + b y + c``, and so do several of them in a
    row. As long as nothing has to be cut off in between, which a factor up to 1 never asks for,
    they are applied as one product with a matrix, which rounds once.

    Args:
        image: ``(H, W, 3)`` uint8.
        factors: Of the four; 1 changes nothing, for the hue 0.
        order: Those to change.
    """
    a, b, c = 1.0, 0.0, 0.0
    for what in order:
        factor = factors[what]
        if factor == (0 if what == HUE else 1):
            continue
        if what == HUE:
            image = turn_hue(mix_luma(image, a, b, c), factor)
            a, b, c = 1.0, 0.0, 0.0
            continue
        if what == BRIGHTNESS:
            a, b, c = factor * a, factor * b, factor * c
        elif what == CONTRAST:
            red, green, blue, _ = cv2.mean(image)
            mean = (a + b) * (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue) + c
            a, b, c = factor * a, factor * b, factor * c + (1 - factor) * mean
        else:
            # the luma of a x + b y + c is (a + b) y + c
            a, b = factor * a, factor * b + (1 - factor) * (a + b)
        if factor > 1:
            image = mix_luma(image, a, b, c)
            a, b, c = 1.0, 0.0, 0.0
    return mix_luma(image, a, b, c)


def mix_luma(image: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """``a x + b y + c`` of each pixel x of luma y, rounded and cut off at 0 and 255.

    Args:
        image: ``(H, W, 3)`` uint8.
        a: Factor of the pixel.
        b: Factor of its luma.
        c: What is added, in steps of 256.
    """
    if a == 1 and b == 0 and c == 0:
        return image
    red, green, blue = b * LUMA[0], b * LUMA[1], b * LUMA[2]
    matrix = [[a + red, green, blue, c], [red, a + green, blue, c], [red, green, a + blue, c]]
    return cv2.transform(image, np.array(matrix))


def turn_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hues of an image in HSV.

    Args:
        image: ``(H, W, 3)`` uint8.
        turn: As a share of the circle.
    """
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    step = np.zeros(3 * image.shape[1], np.uint8)
    step[::3] = round(256 * turn) % 256
    rows = hsv.reshape(len(hsv), -1)
    rows += step  # runs over from 255 to 0, as the circle does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


@dataclass(frozen=True)
class Grayscale(Step):
    """Replace each pixel by its luma (ITU-R BT.601), in all three channels.

    As gray takes the color from a photograph, bands lose some of their number: each is kept with
    probability 0.5, one at least, and the others get their mean. Which are kept, is drawn.
    """

    p: float = 1.0

    def apply(self, image: np.ndarray, random: Random) -> np.ndarray:
        if not is_photograph(image):
            return drop_bands(image, random)
        return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def drop_bands(image: np.ndarray, random: Random) -> np.ndarray:
    """Replace some bands by their mean; see ``Grayscale``.

    Args:
        image: ``(H, W, C)``.
        random: Generator to draw from.
    """
    count = image.shape[2]
    kept = random.randrange(count)
    dropped = [band for band in range(count) if random.random() < 0.5 and band != kept]
    if not dropped:
        return image
    image = image.copy()
    image[..., dropped] = image[..., dropped].mean(axis=(0, 1))
    return image


@dataclass(frozen=True)
class GaussianBlur(Step):
    """Gaussian blur (SimCLR, Chen et al. 2020, appendix A).

    Draws the standard deviation, uniformly.

    Args:
        sigma: Smallest and largest standard deviation in pixels.
        p: Probability of being applied.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5

    def apply(self, image: np.ndarray, random: Random) -> np.ndarray:
        sigma = random.uniform(*self.sigma)
        reach = int(sigma * BLUR_REACH)
        if reach == 0:
            return image
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        kernel /= kernel.sum()
        return cv2.sepFilter2D(image, -1, kernel, kernel).reshape(image.shape)


@dataclass(frozen=True)
class Solarize(Step):
    """Invert the values of the upper half, for 8 bits from 128 on (BYOL, Grill et al. 2020,
    appendix B)."""

    p: float = 0.2

    def apply(self, image: np.ndarray, random: Random) -> np.ndarray:
        return cv2.min(image, cv2.bitwise_not(image)).reshape(image.shape)
