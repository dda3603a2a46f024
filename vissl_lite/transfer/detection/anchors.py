"""Pyramid levels and anchors of the detectors, and the choice of anchors that suit the boxes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.transfer.detection.data import BoxedImage
from vissl_lite.transfer.detection.options import DetectorName
from vissl_lite.transfer.pyramid import pyramid_strides

# Height by width of the anchors of each size (Ren et al. 2015, section 3.1.1).
ASPECT_RATIOS = (0.5, 1.0, 2.0)

# Sizes of the anchors of a level, as multiples of its smallest: one for Faster R-CNN (Lin et al.
# 2017, FPN), three for RetinaNet (Lin et al. 2017, Focal Loss).
ONE_SIZE, THREE_SIZES = (1.0,), (1.0, 2 ** (1 / 3), 2 ** (2 / 3))

# Smallest anchor of a level as a multiple of its stride. The papers have 8 for Faster R-CNN and 4
# for RetinaNet, on images of 800 pixels. Neighbors of anchors below twice the stride miss boxes.
ANCHOR_SCALES = (2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0)  # an octave in three steps, as levels double
DEFAULT_ANCHOR_SCALE = 4.0


class StridedAnchors(AnchorGenerator):
    """Anchors around the multiples of given strides.

    torchvision's own takes the side of the image divided by that of the map, rounded down: of 300
    pixels and a map of 38 it makes a stride of 7, and the last anchors lie 37 pixels too far left.

    Args:
        sizes: Sizes of the anchors of each level in pixels.
        strides: Strides of the levels in pixels.
        ratios: Height by width of the anchors of each size.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        strides: Sequence[int],
        ratios: Sequence[float] = ASPECT_RATIOS,
    ) -> None:
        super().__init__(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
        self.strides = list(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors ``(N, 4)`` of x1, y1, x2, y2 for each image, level by level."""
        self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)
        grids = [level.shape[-2:] for level in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(s, s) for s in self.strides]))
        return [anchors] * len(image_list.image_sizes)


def finest_stride(kind: DetectorName) -> int:
    """Smallest stride of the maps that a detector works on, as in its paper."""
    return 8 if kind in ("fcos", "retinanet") else 4


def has_extra_level(kind: DetectorName) -> bool:
    """Whether a detector has a level of twice the coarsest stride, P6 over a ResNet."""
    # Anchors of P5 end at half of a canvas of 416 pixels; P7's would be larger than the canvas.
    # FCOS needs neither: its coarsest level takes all larger objects.
    return kind != "fcos"


def level_strides(kind: DetectorName, strides: Sequence[int]) -> list[int]:
    """Strides of the levels that have anchors, fine to coarse.

    Args:
        kind: Architecture of the detector.
        strides: Strides of the pyramid, fine to coarse.
    """
    return [*strides, 2 * strides[-1]] if has_extra_level(kind) else list(strides)


def anchor_sizes(
    kind: DetectorName, strides: Sequence[int], scale: float
) -> tuple[tuple[int, ...], ...]:
    """Sizes of the anchors of each level: the square roots of their areas, in pixels.

    Args:
        kind: Architecture of the detector, one that has anchors.
        strides: Strides of the levels, fine to coarse.
        scale: Smallest size of a level as a multiple of its stride.
    """
    multiples = THREE_SIZES if kind == "retinanet" else ONE_SIZE
    return tuple(tuple(round(scale * stride * one) for one in multiples) for stride in strides)


def best_anchor_iou(
    boxes: np.ndarray, sizes: Sequence[Sequence[float]], strides: Sequence[int]
) -> np.ndarray:
    """IoU of each box with the anchor that fits it best.

    Args:
        boxes: Boxes ``(N, 4)`` of x1, y1, x2, y2 in pixels of the canvas.
        sizes: Sizes of the anchors of each level in pixels.
        strides: Strides of the levels. The centers of anchors are the multiples of the stride, as
            if the canvas had no borders.

    Returns:
        Array ``(N,)`` of values in [0, 1].
    """
    side = boxes[:, 2:] - boxes[:, :2]
    area, center = side.prod(axis=1), (boxes[:, :2] + boxes[:, 2:]) / 2
    best = np.zeros(len(boxes))
    for stride, level in zip(strides, sizes, strict=True):
        offset = np.abs(center - stride * np.round(center / stride))
        for size in level:
            for ratio in ASPECT_RATIOS:
                anchor = size * np.array([ratio**-0.5, ratio**0.5])
                reach = (side + anchor) / 2 - offset
                overlap = np.clip(np.minimum(np.minimum(side, anchor), reach), 0, None).prod(axis=1)
                best = np.maximum(best, overlap / (area + size**2 - overlap))
    return best


def choose_anchor_scale(
    images: Sequence[BoxedImage],
    kind: DetectorName,
    canvas: tuple[int, int],
    encoder: Encoder,
) -> float:
    """Choose the scale of the anchors that fit the training boxes best.

    It is the one of ``ANCHOR_SCALES`` with the largest mean IoU of a box with its best anchor. The
    mean is over the boxes of a class, then over classes, so that a rare class of small objects
    counts as much as the others, as in mean average precision. Only the shape of the encoder
    matters, not its weights.

    Args:
        images: Training images with their boxes. Ignored boxes are left out.
        kind: Architecture of the detector. FCOS has no anchors.
        canvas: Height and width in pixels that images are fitted into.
        encoder: Encoder of the detector.

    Returns:
        Smallest anchor of a level as a multiple of the stride; the default without boxes.
    """
    labels = np.concatenate([image.labels[~image.ignored] for image in images])
    if kind == "fcos" or len(labels) == 0:
        return DEFAULT_ANCHOR_SCALE
    boxes = np.concatenate(
        [image.boxes[~image.ignored] * min(np.divide(canvas, image.size)) for image in images]
    )
    strides = level_strides(kind, pyramid_strides(encoder, finest_stride(kind)))
    counts = np.bincount(labels)
    weights = 1 / counts[labels]  # sum to one for each class
    fits = [
        float(best_anchor_iou(boxes, anchor_sizes(kind, strides, scale), strides) @ weights)
        for scale in ANCHOR_SCALES
    ]
    return ANCHOR_SCALES[int(np.argmax(fits))]
