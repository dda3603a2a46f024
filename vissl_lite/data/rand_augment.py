"""RandAugment: random operations of one strength (Cubuk et al. 2020, arXiv 1909.13719)."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vissl_lite.data.view_steps import Step
from vissl_lite.data.views import PADDING_GRAY

# Strength from 0 to 1, with a random sign, to a picture.
Operation = Callable[[Image.Image, float], Image.Image]


def _moved(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> Operation:
    def operation(image: Image.Image, x: float) -> Image.Image:
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix(x, image),
            Image.Resampling.BILINEAR,
            fillcolor=(PADDING_GRAY,) * 3,
        )

    return operation


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, x: kind(image).enhance(1 + 0.9 * x)


# The operations of the paper; strength 1 is its magnitude 10. Turns are up to 30 degrees,
# shears up to 0.3, shifts up to 0.45 of the side, factors 0.1 to 1.9; at least 4 bits are kept.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, x: image,
    "autocontrast": lambda image, x: ImageOps.autocontrast(image),
    "equalize": lambda image, x: ImageOps.equalize(image),
    "rotate": lambda image, x: image.rotate(
        30 * x, Image.Resampling.BILINEAR, fillcolor=(PADDING_GRAY,) * 3
    ),
    "solarize": lambda image, x: ImageOps.solarize(image, round(256 * (1 - abs(x)))),
    "posterize": lambda image, x: ImageOps.posterize(image, 8 - round(4 * abs(x))),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _moved(lambda x, image: (1, 0.3 * x, -0.15 * x * image.height, 0, 1, 0)),
    "shear_y": _moved(lambda x, image: (1, 0, 0, 0.3 * x, 1, -0.15 * x * image.width)),
    "translate_x": _moved(lambda x, image: (1, 0, 0.45 * x * image.width, 0, 1, 0)),
    "translate_y": _moved(lambda x, image: (1, 0, 0, 0, 1, 0.45 * x * image.height)),
}
_OPERATIONS = tuple(OPERATIONS.values())


@dataclass(frozen=True)
class RandAugment(Step):
    """Operations on a photograph, drawn with replacement, all of the same strength.

    For each operation it draws which one, then its sign.

    Args:
        magnitude: Strength from 0 to 10; 9 in DeiT (Touvron et al. 2021) and MAE.
        operations: Number of operations; 2 in the paper for ImageNet.
    """

    magnitude: float
    operations: int = 2

    def apply(self, image: np.ndarray, random: Random) -> np.ndarray:
        picture = Image.fromarray(image)
        for _ in range(self.operations):
            operation = random.choice(_OPERATIONS)
            sign = 1 if random.random() < 0.5 else -1
            picture = operation(picture, sign * self.magnitude / 10)
        return np.asarray(picture)
