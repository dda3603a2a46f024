"""Views: augmented versions of an image. The only file that imports Albumentations.

Albumentations keeps its random state inside its transforms: copied into worker processes it
repeats itself there and again every epoch. Here every view's generators are keyed afresh from
(seed, epoch, image index, view number), so that a view is a pure function of those four.
"""

import copy
from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np

from vissl_lite.data.environment import default_variable
from vissl_lite.data.view_steps import (
    Blur,
    Crop,
    Grey,
    Jitter,
    Mirror,
    RandomStream,
    Solarize,
    Step,
    Steps,
    Turn,
    first_crop,
)
from vissl_lite.errors import UserError

# At import Albumentations asks the network for its newest version, and warns where there is none.
with default_variable("NO_ALBUMENTATIONS_UPDATE", "1"):
    import albumentations as A  # noqa: N812

ImageTransform: TypeAlias = A.BasicTransform | A.Compose

# Grey, where a view reaches past its image.
PADDING = 114

# An image whose shorter side is more than so many times a view's is segmented at its own scale.
LARGE = 1.5


class Views:
    """Augmentation pipelines, one a view, each drawing from a random stream of its own.

    Args:
        pipelines: one sequence of Albumentations transforms for each view. The same sequence may
            stand for several views: they differ by their view number.
        shortest: shorter side in pixels that decoding has to keep; see ``read_image``.
    """

    def __init__(self, pipelines: Sequence[Sequence[ImageTransform]], shortest: int) -> None:
        self.shortest = shortest
        self._random = RandomStream()
        made: dict[int, Steps | A.Compose] = {}
        for pipeline in pipelines:
            if id(pipeline) not in made:
                made[id(pipeline)] = self._made(pipeline)
        self._pipelines = [made[id(pipeline)] for pipeline in pipelines]

    def _made(self, pipeline: Sequence[ImageTransform]) -> Steps | A.Compose:
        steps = [_step(transform) for transform in pipeline]
        known = [step for step in steps if step is not None]
        return known if len(known) == len(steps) else _composed(pipeline, self._random)

    def __len__(self) -> int:
        return len(self._pipelines)

    def times(self, height: int, width: int, seed: int, epoch: int, index: int) -> int:
        """How many times as large as its views need an image is: decoding may reduce it so far.

        A crop that a view begins with is drawn here as it will be drawn from the image, so that it
        is this crop that counts and not the smallest that might be drawn, as for ``shortest``.

        Args:
            height: of the whole image in pixels.
            width: likewise.
            seed: the run's seed.
            epoch: how often the image has been seen before.
            index: the image's number in the data set.

        Returns:
            At least 1.
        """
        least = min(height, width)
        bounds = [least]
        for number, pipeline in enumerate(self._pipelines):
            crop = None if isinstance(pipeline, A.Compose) else first_crop(pipeline)
            bound = least // max(1, self.shortest if crop is None else min(crop.size))
            if crop is not None and bound > 1:
                self._random.rekey(seed, epoch, index, number)
                _, _, rows, columns = self._random.first_place(crop, height, width)
                bound = min(rows // crop.size[0], columns // crop.size[1])
            if bound < 2:  # as it is with all small images: no more crops are drawn
                return 1
            bounds.append(bound)
        return min(bounds)

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
            image: ``(H, W, 3)`` uint8.
            seed: the run's seed.
            epoch: how often the image has been seen before.
            index: the image's number in the data set.
            whole: height and width of the image before it was reduced; default: it was not.

        Returns:
            One ``(h, w, 3)`` uint8 array for each view.
        """
        views = []
        for number, pipeline in enumerate(self._pipelines):
            self._random.rekey(seed, epoch, index, number)
            if isinstance(pipeline, A.Compose):
                views.append(pipeline(image=image)["image"])
            else:
                views.append(self._random.run(pipeline, image, whole))
        return views


def _composed(
    pipeline: Sequence[ImageTransform], stream: RandomStream, boxes: A.BboxParams | None = None
) -> A.Compose:
    # a copy: the same transforms may serve other views, with generators of their own
    composed = A.Compose(copy.deepcopy(list(pipeline)), bbox_params=boxes)
    composed.set_random_state(stream.generator, stream.python)
    return composed


def _step(transform: ImageTransform) -> tuple[float, Step] | None:
    """Probability and pixel work of a transform that ``view_steps`` knows; None for any other."""
    if not type(transform).__module__.startswith("albumentations."):
        return None  # somebody's own one, which may be made of one of these
    step: Step | None = None
    match transform:
        case A.RandomResizedCrop(area_for_downscale=None):
            size, scale = tuple(transform.size), tuple(transform.scale)
            step = Crop(size, scale, tuple(transform.ratio), transform.interpolation)
        case A.HorizontalFlip():
            step = Mirror()
        case A.D4():
            step = Turn()
        case A.ColorJitter():
            ranges = transform.brightness, transform.contrast, transform.saturation, transform.hue
            step = Jitter(*ranges)
        case A.ToGray(method="weighted_average", num_output_channels=3):
            step = Grey()
        case A.GaussianBlur(blur_limit=(0, 0)):
            step = Blur(transform.sigma_limit)
        case A.Solarize(threshold_range=(0.5, 0.5)):
            step = Solarize()
    return None if step is None else (transform.p, step)


class BoxView:
    """One augmented version of an image together with its boxes.

    Args:
        pipeline: Albumentations transforms.
        smallest: a box of which less than this share is left in the view is dropped.
    """

    def __init__(self, pipeline: Sequence[ImageTransform], smallest: float = 0.25) -> None:
        self._random = RandomStream()
        boxes = A.BboxParams("pascal_voc", ["labels"], min_visibility=smallest, clip=True)
        self._pipeline = _composed(pipeline, self._random, boxes)

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
            image: ``(H, W, C)`` uint8.
            boxes: ``(N, 4)`` x1, y1, x2, y2 in pixels.
            labels: ``(N,)`` class indices.
            seed: the run's seed.
            epoch: how often the image has been seen before.
            index: the image's number in the data set.
        """
        self._random.rekey(seed, epoch, index, 0)
        made = self._pipeline(image=image, bboxes=boxes, labels=labels)
        kept = np.asarray(made["bboxes"], np.float32).reshape(-1, 4)
        return made["image"], kept, np.asarray(made["labels"], np.int64).reshape(-1)


class MaskView:
    """One augmented version of an image together with its mask.

    Args:
        pipeline: Albumentations transforms.
    """

    def __init__(self, pipeline: Sequence[ImageTransform]) -> None:
        self._random = RandomStream()
        self._pipeline = _composed(pipeline, self._random)

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, seed: int, epoch: int, index: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The view and its mask.

        Args:
            image: ``(H, W, C)`` uint8.
            mask: ``(H, W)`` uint8.
            seed: the run's seed.
            epoch: how often the image has been seen before.
            index: the image's number in the data set.
        """
        self._random.rekey(seed, epoch, index, 0)
        made = self._pipeline(image=image, mask=mask)
        return made["image"], made["mask"]


def random_crop(size: int, smallest: float, largest: float = 1.0) -> ImageTransform:
    """A random part of the image, resized to a square.

    Args:
        size: side in pixels.
        smallest: smallest share of the image's area, in (0, 1].
        largest: largest share.

    Raises:
        UserError: the share is out of range.
    """
    if not 0 < smallest <= 1:
        raise UserError(f"smallest_crop {smallest} is not a share: it must be above 0, at most 1")
    return A.RandomResizedCrop((size, size), scale=(smallest, max(smallest, largest)))


def distorted_crop(
    size: int,
    smallest_crop: float,
    colour: float | None = None,
    blur_probability: float = 0.5,
    solarize: float = 0.0,
    upright: bool = True,
    largest_crop: float = 1.0,
) -> list[ImageTransform]:
    """A random crop, flipped, its colours distorted, perhaps blurred and solarized.

    One view of the pretexts that compare views: SimCLR (appendix A) and, with other
    probabilities, BYOL (Grill et al. 2020, appendix B) and those after it.

    Args:
        size: side in pixels.
        smallest_crop: smallest share of the image's area.
        colour: strength of the colour distortion, see ``colour_distortion``; default 1, below 64
            pixels 0.5 (SimCLR, appendix B.9).
        blur_probability: of being blurred; views below 64 pixels never are (likewise).
        solarize: probability of inverting the bright pixels.
        upright: whether the images have an up; see ``flip``.
        largest_crop: largest share of the image's area.
    """
    small = size < 64
    strength = colour if colour is not None else (0.5 if small else 1.0)
    steps = [random_crop(size, smallest_crop, largest_crop), flip(upright)]
    steps += colour_distortion(strength)
    if blur_probability > 0 and not small:
        steps.append(blur(size, blur_probability))
    if solarize > 0:
        steps.append(A.Solarize(threshold_range=(0.5, 0.5), p=solarize))
    return steps


def crop_decode_size(size: int, smallest: float) -> int:
    """Shorter side that an image must keep, so that its smallest crop needs no enlarging.

    A crop of area share s and aspect ratio 3/4 has a shorter side of sqrt(3 s / 4) of the image's.
    """
    return int(size / (smallest * 0.75) ** 0.5)


def flip(upright: bool = True) -> ImageTransform:
    """A flip that leaves the meaning of an image.

    Args:
        upright: the images have an up: flip left and right, half of the time. Else any of the
            eight flips and quarter turns of a square.
    """
    return A.HorizontalFlip(p=0.5) if upright else A.D4(p=1.0)


def colour_distortion(strength: float) -> list[ImageTransform]:
    """Colour jitter with probability 0.8, then grey with probability 0.2 (SimCLR, appendix A).

    Args:
        strength: s of the paper: brightness, contrast and saturation change by up to 0.8 s, the
            hue by up to 0.2 s of the circle. 1 for ImageNet, 0.5 for CIFAR-10.
    """
    jitter = A.ColorJitter(
        brightness=0.8 * strength,
        contrast=0.8 * strength,
        saturation=0.8 * strength,
        hue=min(0.5, 0.2 * strength),
        p=0.8,
    )
    return [jitter, grey(0.2)]


def grey(probability: float) -> ImageTransform:
    """Makes an image grey; it keeps its channels.

    Args:
        probability: of being applied.
    """
    return A.ToGray(p=probability)


def blur(size: int, probability: float = 0.5) -> ImageTransform:
    """Gaussian blur, sigma between 0.1 and 2 pixels at 224 (SimCLR, appendix A), less at smaller.

    Args:
        size: side of the view in pixels.
        probability: of being applied.
    """
    return A.GaussianBlur(sigma_limit=(0.1, 2.0 * size / 224), blur_limit=0, p=probability)


def box_pipeline(
    canvas: tuple[int, int], smallest_crop: float, upright: bool
) -> list[ImageTransform]:
    """A training view for detection: scale jitter (Ghiasi et al. 2021), a flip, mild colours.

    The image is fitted into the canvas, then enlarged or shrunk about its own size, and moved.

    Args:
        canvas: height and width in pixels.
        smallest_crop: smallest share of the image's area that an enlargement leaves; it is shrunk
            by as much.
        upright: whether the images have an up; without one they are flipped in both directions,
            and turned where the canvas is a square.
    """
    height, width = canvas
    zoom = smallest_crop**-0.5
    turn = [flip()] if upright else [A.D4() if height == width else A.VerticalFlip(), flip()]
    return [
        A.LongestMaxSize(max_size_hw=canvas),
        A.PadIfNeeded(height, width, fill=PADDING),
        *turn,
        A.Affine(
            scale=(1 / zoom, zoom),
            balanced_scale=True,
            keep_ratio=True,
            translate_percent=(-0.1, 0.1),
            fill=PADDING,
            p=1.0 if smallest_crop < 1 else 0.0,
        ),
        _mild_colours(),
    ]


def mask_pipeline(
    size: int, smallest_crop: float, upright: bool, own_scale: bool = False
) -> list[ImageTransform]:
    """A training view for segmentation: a random crop, a flip, mild colours.

    The crop lies inside the image, so no pixel of the mask is made up.

    Args:
        size: side in pixels.
        smallest_crop: smallest share of the image's area.
        upright: whether the images have an up; see ``flip``.
        own_scale: for images more than ``LARGE`` times as large as the view: the crop has about
            its size, enlarged or shrunk by as much as ``smallest_crop`` does, but not more than
            ``LARGE`` times.
    """
    crop = random_crop(size, smallest_crop)
    if own_scale:
        zoom = min(LARGE, smallest_crop**-0.5)
        crop = A.RandomSizedCrop((round(size / zoom), round(size * zoom)), (size, size))
    # OpenCV's plain nearest neighbour is up to half a pixel off
    crop.mask_interpolation = cv2.INTER_NEAREST_EXACT
    return [crop, flip(upright), _mild_colours()]


def _mild_colours() -> ImageTransform:
    """Colours may tell what a thing is: they change less than where views are compared."""
    return A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02, p=0.8)
