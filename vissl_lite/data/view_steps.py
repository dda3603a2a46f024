"""The transforms of views, on OpenCV alone: Albumentations' pixels at a fraction of its time.

Albumentations checks, copies and converts around every transform, which at 32 pixels takes several
times as long as the pixels do. These steps draw the same numbers in the same order as its
transforms of the same name (version 2.0.8), so that their views are its views up to rounding.
"""

import math
import random
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import cv2
import numpy as np

# The share of each channel in an RGB pixel's light, for red, green and blue (Rec. 601).
LIGHT = (0.299, 0.587, 0.114)
# Albumentations cuts off what is behind the point, OpenCV rounds: less this before rounding is the
# same. It is just below a half, so that whole numbers stay what they are.
_CUT = 0.499
# The largest turn of the hue, in OpenCV's 180 steps, after which the hues still fit into a byte.
_LARGEST_TURN = 255 - 179


class Step(Protocol):
    """One transform of ``(H, W, 3)`` uint8 pixels, which it leaves alone, into others."""

    def __call__(
        self, image: np.ndarray, python: random.Random, generator: np.random.Generator
    ) -> np.ndarray: ...


# Each with its probability.
Steps: TypeAlias = list[tuple[float, Step]]


class RandomStream:
    """The generators that transforms draw from, keyed afresh for every view.

    Attributes:
        python: draws most numbers.
        generator: draws the others.
    """

    def __init__(self) -> None:
        # A Philox stream is keyed by assignment, in a microsecond; building a generator costs ten.
        self._bits = np.random.Philox(0)
        self._state = self._bits.state
        self.python = random.Random(0)
        self.generator = np.random.Generator(self._bits)

    def rekey(self, seed: int, epoch: int, index: int, view: int) -> None:
        # Philox takes four 64-bit counter words; it counts up in the first, so that one stays 0.
        counter, key = self._state["state"]["counter"], self._state["state"]["key"]
        counter[0], counter[1], counter[2], counter[3] = 0, view, index, epoch
        key[0], key[1] = seed, 0
        self._state["buffer_pos"] = 4  # empty: the next number comes from the new counter
        self._state["has_uint32"] = 0
        self._bits.state = self._state
        self.python.seed(int(self._bits.random_raw()))

    def first_place(self, crop: "Crop", height: int, width: int) -> tuple[int, int, int, int]:
        """Where the crop lies that ``run`` will begin with; the stream has to be keyed again."""
        self.python.random()
        return crop.place(height, width, self.python)

    def run(
        self, steps: Steps, image: np.ndarray, whole: tuple[int, int] | None = None
    ) -> np.ndarray:
        """What Albumentations' ``Compose`` makes of an image.

        Args:
            steps: in the order in which they are applied.
            image: ``(H, W, 3)`` uint8.
            whole: height and width of the image before it was reduced: a crop that comes first is
                drawn for these.
        """
        python, generator = self.python, self.generator
        python.random()  # whether anything is done at all, which it always is
        if whole is not None and (crop := first_crop(steps)) is not None:
            image, steps = crop.cut(image, crop.place(*whole, python), whole), steps[1:]
        for probability, step in steps:
            if probability > 0 and (probability >= 1 or python.random() < probability):
                image = step(image, python, generator)
        return image


@dataclass(frozen=True)
class Crop:
    """A random part of the image, resized; see ``RandomResizedCrop``.

    Attributes:
        size: height and width of the result in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width over height.
        interpolation: OpenCV's number of a way to resize.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: int

    def __call__(
        self, image: np.ndarray, python: random.Random, generator: np.random.Generator
    ) -> np.ndarray:
        whole = image.shape[0], image.shape[1]
        return self.cut(image, self.place(*whole, python), whole)

    def cut(
        self, image: np.ndarray, place: tuple[int, int, int, int], whole: tuple[int, int]
    ) -> np.ndarray:
        """The part of an image, resized.

        Args:
            image: ``(H, W, 3)`` uint8, maybe reduced.
            place: top, left, height and width in the whole image.
            whole: the whole image's height and width.
        """
        top, left, height, width = place
        rows, columns = image.shape[:2]
        if (rows, columns) != whole:
            down, across = rows / whole[0], columns / whole[1]
            height, width = max(1, round(height * down)), max(1, round(width * across))
            top = min(round(top * down), rows - height)
            left = min(round(left * across), columns - width)
        part = image[top : top + height, left : left + width]
        if (height, width) == self.size:
            return np.ascontiguousarray(part)
        return cv2.resize(part, self.size[::-1], interpolation=self.interpolation)

    def place(self, rows: int, columns: int, python: random.Random) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part, all in pixels."""
        area, (narrow, wide) = rows * columns, self.ratio
        least, most = self.scale[0] * area, self.scale[1] * area
        low, high = math.log(narrow), math.log(wide)
        for _ in range(10):
            drawn = python.uniform(least, most)
            ratio = math.exp(python.uniform(low, high))
            width, height = round(math.sqrt(drawn * ratio)), round(math.sqrt(drawn / ratio))
            if 0 < width <= columns and 0 < height <= rows:
                down, right = python.random(), python.random()
                return (
                    int((rows - height + 1) * down),
                    int((columns - width + 1) * right),
                    height,
                    width,
                )
        # long strips: the largest part in the middle that has an allowed ratio
        height, width = rows, columns
        if columns / rows < narrow:
            height = round(columns / narrow)
        elif columns / rows > wide:
            width = round(rows * wide)
        return (rows - height) // 2, (columns - width) // 2, height, width


def first_crop(steps: Steps) -> Crop | None:
    """The crop that steps certainly begin with; None if they do not."""
    probability, step = steps[0]
    return step if probability >= 1 and isinstance(step, Crop) else None


class Mirror:
    """Left and right change places; see ``HorizontalFlip``."""

    def __call__(
        self, image: np.ndarray, python: random.Random, generator: np.random.Generator
    ) -> np.ndarray:
        return cv2.flip(image, 1)


class Turn:
    """Any of the eight flips and quarter turns of a square; see ``D4``."""

    def __call__(
        self, image: np.ndarray, python: random.Random, generator: np.random.Generator
    ) -> np.ndarray:
        number = int(generator.integers(8))
        if number == 0:
            return image
        if number <= 3:
            turns = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)
            return cv2.rotate(image, turns[number - 1])
        if number == 5:
            return cv2.transpose(cv2.rotate(image, cv2.ROTATE_180))
        if number == 7:
            return cv2.transpose(image)
        return cv2.flip(image, 0 if number == 4 else 1)


@dataclass(frozen=True)
class Jitter:
    """Brightness, contrast, saturation and hue change, in random order; see ``ColorJitter``.

    The first three turn a pixel x of light g into ``a x + b g + c``, and so do several of them in a
    row. As long as nothing has to be cut off in between, which a factor up to 1 never asks for,
    they are applied as one product with a matrix. That rounds once: values are up to 4 steps of 256
    away from Albumentations' (0.2 on average), single ones more where OpenCV's coarse hue follows.

    Attributes:
        brightness: smallest and largest factor.
        contrast: likewise.
        saturation: likewise.
        hue: smallest and largest turn, as a share of the circle.
    """

    brightness: tuple[float, float]
    contrast: tuple[float, float]
    saturation: tuple[float, float]
    hue: tuple[float, float]

    def __call__(
        self, image: np.ndarray, python: random.Random, generator: np.random.Generator
    ) -> np.ndarray:
        ranges = (self.brightness, self.contrast, self.saturation, self.hue)
        factors = [python.uniform(*bounds) for bounds in ranges]
        order = [0, 1, 2, 3]
        generator.shuffle(order)
        return jitter(image, factors, order)


def jitter(image: np.ndarray, factors: list[float], order: list[int]) -> np.ndarray:
    """Change brightness (0), contrast (1), saturation (2) and hue (3) in the order given.

    Args:
        image: ``(H, W, 3)`` uint8.
        factors: of the four; 1 changes nothing, for the hue 0.
        order: numbers of those to change.
    """
    a, b, c = 1.0, 0.0, 0.0
    for what in order:
        factor = factors[what]
        if factor == (0 if what == 3 else 1):
            continue
        if what == 3:
            image = turn_hue(mix(image, a, b, c), math.floor(180 * factor))
            a, b, c = 1.0, 0.0, 0.0
            continue
        if what == 0:
            a, b, c = factor * a, factor * b, factor * c - _CUT
        elif what == 1:
            red, green, blue, _ = cv2.mean(image)
            light = LIGHT[0] * red + LIGHT[1] * green + LIGHT[2] * blue
            mean = (a + b) * light + c
            a, b, c = factor * a, factor * b, factor * c + (1 - factor) * mean - _CUT
        else:
            a, b = factor * a, factor * b + (1 - factor) * (a + b)
        if factor > 1:
            image = mix(image, a, b, c)
            a, b, c = 1.0, 0.0, 0.0
    return mix(image, a, b, c)


def mix(image: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """``a x + b g + c`` of each pixel x of light g, rounded and cut off at 0 and 255.

    Args:
        image: ``(H, W, 3)`` uint8.
        a: what is taken of the pixel.
        b: what is taken of its light.
        c: what is added, in steps of 256.
    """
    if a == 1 and b == 0 and c == 0:
        return image
    red, green, blue = b * LIGHT[0], b * LIGHT[1], b * LIGHT[2]
    matrix = [[a + red, green, blue, c], [red, a + green, blue, c], [red, green, a + blue, c]]
    return cv2.transform(image, np.array(matrix))


def turn_hue(image: np.ndarray, turn: int) -> np.ndarray:
    """Turn the hues of an image, in the HSV cone.

    Args:
        image: ``(H, W, 3)`` uint8.
        turn: by how much, in 180 steps a circle; from -180 to 180.
    """
    if abs(turn) > _LARGEST_TURN:
        cone = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        cone[..., 0] = (cone[..., 0].astype(np.int16) + turn) % 180
        return cv2.cvtColor(cone, cv2.COLOR_HSV2RGB)
    # OpenCV takes hues beyond the circle's end, but not before its start: with red for blue the
    # circle runs backwards (and one value in fifty is rounded to the neighbouring hue).
    there, back = cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB
    if turn < 0:
        there, back = cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR
    return cv2.cvtColor(cv2.add(cv2.cvtColor(image, there), (abs(turn), 0, 0, 0)), back)


class Grey:
    """An image without colours that keeps its channels; see ``ToGray``."""

    def __call__(
        self, image: np.ndarray, python: random.Random, generator: np.random.Generator
    ) -> np.ndarray:
        return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur; see ``GaussianBlur``.

    Attributes:
        sigma: smallest and largest standard deviation in pixels.
    """

    sigma: tuple[float, float]

    def __call__(
        self, image: np.ndarray, python: random.Random, generator: np.random.Generator
    ) -> np.ndarray:
        sigma = python.uniform(*self.sigma)
        python.randint(0, 0)  # the kernel's side, which Albumentations draws even where it is given
        reach = int(sigma * 3.5)
        if reach == 0:
            return image
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        kernel /= kernel.sum()
        return cv2.sepFilter2D(image, -1, kernel, kernel)


class Solarize:
    """Inverts the brighter half of the values; see ``Solarize``."""

    def __call__(
        self, image: np.ndarray, python: random.Random, generator: np.random.Generator
    ) -> np.ndarray:
        python.random()  # the threshold, which is always a half
        return cv2.min(image, cv2.bitwise_not(image))
