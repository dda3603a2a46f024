"""Views made by Albumentations: images with boxes or masks, and user-defined transforms.

The only file that imports Albumentations. It keeps its random state inside its transforms: copied
into worker processes it repeats itself there and again every epoch. Here that state is keyed afresh
for every view, as that of the steps in ``view_steps`` is.
"""

from collections.abc import Sequence
from random import Random
from typing import Any, TypeAlias

import cv2
import numpy as np

from vissl_lite.data.environment import default_variable
from vissl_lite.data.view_steps import ColorJitter, Step
from vissl_lite.data.views import OWN_SCALE_RATIO, PADDING_GRAY, check_crop_scale, rekey

# At import Albumentations asks the network for its newest version, and warns where there is none.
with default_variable("NO_ALBUMENTATIONS_UPDATE", "1"):
    import albumentations as A  # noqa: N812

# Weaker than in pre-training, because colors may tell the class.
MILD_COLORS = ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02, p=0.8)

Transforms: TypeAlias = Sequence[A.BasicTransform | A.BaseCompose]


class Albumentations(Step):
    """Transforms of Albumentations as a step of a view. Draws 128 bits that key their state.

    Args:
        transforms: What ``albumentations.Compose`` takes, or one that is composed already.
    """

    def __init__(self, transforms: "Transforms | A.Compose") -> None:
        self.compose: A.Compose = transforms
        if not isinstance(transforms, A.Compose):
            self.compose = A.Compose(list(transforms))

    def apply(self, image: np.ndarray, random: Random) -> np.ndarray:
        _rekey(self.compose, random)
        return np.asarray(self.compose(image=image)["image"])


def _rekey(compose: A.Compose, random: Random) -> None:
    """Seed the generators of a pipeline from ``random``."""
    numbers = np.random.default_rng(random.getrandbits(64))
    compose.set_random_state(numbers, Random(random.getrandbits(64)))


def _recolored(image: np.ndarray, colors: Step | None, random: Random) -> np.ndarray:
    return image if colors is None else colors(image, random)


class BoxView:
    """One augmented version of an image together with its boxes.

    Args:
        transforms: Applied in this order.
        smallest: A box of which less than this share is left in the view is dropped.
        colors: Changes the colors afterwards; None leaves them.
    """

    def __init__(
        self, transforms: Transforms, smallest: float = 0.25, colors: Step | None = MILD_COLORS
    ) -> None:
        self._random, self._colors = Random(), colors
        boxes = A.BboxParams("pascal_voc", ["labels"], min_visibility=smallest, clip=True)
        self._compose = A.Compose(list(transforms), bbox_params=boxes)

    def __call__(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        seed: int,
        epoch: int,
        index: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The view, its boxes and their labels.

        Args:
            image: ``(H, W, C)`` uint8 or uint16.
            boxes: ``(N, 4)`` x1, y1, x2, y2 in pixels.
            labels: ``(N,)`` class indices.
            seed: Seed of the run.
            epoch: Number of the epoch, from 0.
            index: The image's number in the data set.
        """
        rekey(self._random, seed, epoch, index)
        _rekey(self._compose, self._random)
        made = self._compose(image=image, bboxes=boxes, labels=labels)
        view = _recolored(made["image"], self._colors, self._random)
        kept = np.asarray(made["bboxes"], np.float32).reshape(-1, 4)
        return view, kept, np.asarray(made["labels"], np.int64).reshape(-1)


class InstanceView:
    """One augmented version of an image together with its objects: their boxes and masks.

    Args:
        transforms: Applied in this order. Masks are resampled as the image is, not by the nearest
            pixel, and what is at least half inside the object stays.
        smallest: An object of whose box less than this share is left in the view is dropped.
        colors: Changes the colors afterwards; None leaves them.
    """

    def __init__(
        self, transforms: Transforms, smallest: float = 0.25, colors: Step | None = MILD_COLORS
    ) -> None:
        self._random, self._colors = Random(), colors
        for step in transforms:
            if isinstance(step, A.DualTransform):
                step.mask_interpolation = cv2.INTER_LINEAR
            if getattr(step, "area_for_downscale", None) == "image":
                step.area_for_downscale = "image_mask"
        boxes = A.BboxParams("pascal_voc", ["numbers"], min_visibility=smallest, clip=True)
        self._compose = A.Compose(list(transforms), bbox_params=boxes)

    def __call__(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        masks: np.ndarray,
        drawn: np.ndarray,
        seed: int,
        epoch: int,
        index: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The view, and the objects in it.

        Where a side of the box of an object is further than a pixel from its mask, as where the
        view cuts the object, the side is moved to the mask.

        Args:
            image: ``(H, W, C)`` uint8 or uint16.
            boxes: ``(N, 4)`` x1, y1, x2, y2 in pixels.
            masks: ``(M, H, W)`` uint8 of 0 and 1.
            drawn: ``(N,)`` bool with M times True: the objects that have a mask, in their order.
            seed: Seed of the run.
            epoch: Number of the epoch, from 0.
            index: The image's number in the data set.

        Returns:
            The view ``(H', W', C)``; the boxes of the K objects in it, ``(K, 4)`` float32; their
            masks ``(K, H', W')`` bool, empty for those without one; and their indices ``(K,)``
            among the N.
        """
        rekey(self._random, seed, epoch, index)
        _rekey(self._compose, self._random)
        given = {"masks": masks * np.uint8(255)} if len(masks) else {}
        made = self._compose(image=image, bboxes=boxes, numbers=np.arange(len(boxes)), **given)
        kept = np.asarray(made["bboxes"], np.float32).reshape(-1, 4)
        numbers = np.asarray(made["numbers"], np.int64).reshape(-1)
        view = _recolored(made["image"], self._colors, self._random)
        pixels = np.zeros((len(kept), *view.shape[:2]), bool)
        visible = np.ones(len(kept), bool)
        place = np.cumsum(drawn) - 1
        for row, number in enumerate(numbers):
            if not drawn[number]:
                continue
            soft = made["masks"][place[number]]
            visible[row] = soft.any()
            if visible[row]:
                pixels[row] = soft >= min(128, soft.max())  # a thin object does not vanish
                kept[row] = _fitted(kept[row], pixels[row])
        return view, kept[visible], pixels[visible], numbers[visible]


def _fitted(box: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A box, with the sides moved to a mask that are further than a pixel from it."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    around = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
    return np.where(np.abs(around - box) > 1, around, box)


class MaskView:
    """One augmented version of an image together with its mask.

    Args:
        transforms: Applied in this order.
        colors: Changes the colors afterwards; None leaves them.
    """

    def __init__(self, transforms: Transforms, colors: Step | None = MILD_COLORS) -> None:
        self._random, self._colors = Random(), colors
        self._compose = A.Compose(list(transforms))

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, seed: int, epoch: int, index: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The view and its mask.

        Args:
            image: ``(H, W, C)`` uint8 or uint16.
            mask: ``(H, W)`` uint8.
            seed: Seed of the run.
            epoch: Number of the epoch, from 0.
            index: The image's number in the data set.
        """
        rekey(self._random, seed, epoch, index)
        _rekey(self._compose, self._random)
        made = self._compose(image=image, mask=mask)
        return _recolored(made["image"], self._colors, self._random), made["mask"]


def box_pipeline(
    canvas: tuple[int, int], min_crop_scale: float, upright: bool, fill: int = PADDING_GRAY
) -> list[A.BasicTransform]:
    """The geometry of a training view for detection: scale jitter (Ghiasi et al. 2021), a flip.

    The image is flipped, fitted into the canvas at the upper left as ``fit_into`` does in
    evaluation, then enlarged or shrunk about its own size, and moved.

    Args:
        canvas: Height and width in pixels.
        min_crop_scale: Smallest share of the image's area that an enlargement leaves; it is shrunk
            by as much.
        upright: Whether the images have an up; without one they are flipped in both directions,
            and turned where the canvas is a square.
        fill: Value of what lies outside the image.
    """
    height, width = canvas
    zoom = min_crop_scale**-0.5
    turn = [A.HorizontalFlip()]
    if not upright:
        turn.insert(0, A.D4() if height == width else A.VerticalFlip())
    return [
        *turn,
        A.LongestMaxSize(max_size_hw=canvas, area_for_downscale="image"),
        A.PadIfNeeded(height, width, position="top_left", fill=fill),
        A.Affine(
            scale=(1 / zoom, zoom),
            balanced_scale=True,
            keep_ratio=True,
            translate_percent=(-0.1, 0.1),
            fill=fill,
            p=1.0 if min_crop_scale < 1 else 0.0,
        ),
    ]


class _ResizedCrop(A.RandomResizedCrop):
    """A random part of the image, or of a window at a random place in a longer one than 4:3.

    Of a long image hardly any part is as large as asked for and yet of a moderate aspect ratio.
    Albumentations would then take the center, always the same part.
    """

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, tuple[int, int, int, int]]:
        height, width = params["shape"][:2]
        longest = round(self.ratio[1] * min(height, width))
        window = min(height, longest), min(width, longest)
        down, right = height - window[0], width - window[1]
        top, left = (self.py_random.randint(0, room) if room else 0 for room in (down, right))
        found = super().get_params_dependent_on_data({**params, "shape": window}, data)
        x1, y1, x2, y2 = found["crop_coords"]
        return {"crop_coords": (x1 + left, y1 + top, x2 + left, y2 + top)}


def mask_pipeline(
    size: int, min_crop_scale: float, upright: bool, own_scale: bool = False
) -> list[A.BasicTransform]:
    """The geometry of a training view for segmentation: a random crop, a flip.

    The crop lies inside the image, so no pixel of the mask is made up.

    Args:
        size: Side in pixels.
        min_crop_scale: Smallest share of the area of the image, or of the window in a long one.
        upright: Whether the images have an up; see ``flip``.
        own_scale: For images more than 1.5 times as large as the view: the crop has about
            its size, enlarged or shrunk by as much as ``min_crop_scale`` does, but not more than
            1.5 times.
    """
    check_crop_scale(min_crop_scale)
    crop = _ResizedCrop((size, size), scale=(min_crop_scale, 1.0), area_for_downscale="image")
    if own_scale:
        zoom = min(OWN_SCALE_RATIO, min_crop_scale**-0.5)
        crop = A.RandomSizedCrop(
            (round(size / zoom), round(size * zoom)), (size, size), area_for_downscale="image"
        )
    # OpenCV's plain nearest neighbor is up to half a pixel off
    crop.mask_interpolation = cv2.INTER_NEAREST_EXACT
    return [crop, A.HorizontalFlip() if upright else A.D4()]
