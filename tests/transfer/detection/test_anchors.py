import numpy as np
import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.transfer.detection.anchors import (
    ANCHOR_SCALES,
    ASPECT_RATIOS,
    DEFAULT_ANCHOR_SCALE,
    StridedAnchors,
    best_anchor_iou,
    choose_anchor_scale,
)
from vissl_lite.transfer.detection.data import BoxedImage
from vissl_lite.transfer.detection.options import DetectorName


def squares(side: float, count: int, label: int = 0, size: int = 256) -> BoxedImage:
    """An image with squares of one size at random places."""
    corner = np.random.default_rng(label).uniform(0, size - side, (count, 2))
    boxes = np.hstack([corner, corner + side]).astype(np.float32)
    labels, ignored = np.full(count, label), np.zeros(count, dtype=bool)
    return BoxedImage("x.jpg", (size, size), boxes, labels, ignored)


def choose(images: list[BoxedImage], kind: DetectorName = "faster_rcnn") -> float:
    return choose_anchor_scale(images, kind, (256, 256), build_encoder("test_resnet", 256))


def place(generator: AnchorGenerator, height: int, width: int) -> torch.Tensor:
    """Anchors on maps of strides 8 and 16."""
    maps = [torch.zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in (8, 16)]
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    (anchors,) = generator(images, maps)
    return torch.as_tensor(anchors)


def test_anchors_lie_at_multiples_of_the_stride() -> None:
    sizes = ((32, 40), (64,))
    strided = StridedAnchors(sizes, (8, 16))
    own = AnchorGenerator(sizes, (ASPECT_RATIOS,) * 2)
    assert torch.equal(place(strided, 64, 96), place(own, 64, 96))
    anchors = place(strided, 68, 100)  # maps of 9 by 13 and 5 by 7 pixels
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centers[: 9 * 13 * 6].amax(dim=0).tolist() == [96, 64]
    assert centers[9 * 13 * 6 :].amax(dim=0).tolist() == [96, 64]


def test_best_iou_is_that_with_torchvisions_anchors() -> None:
    random = np.random.default_rng(0)
    corner = random.uniform(0, 150, (200, 2))
    boxes = np.hstack([corner, corner + random.uniform(15, 106, (200, 2))])
    sizes, strides = ((40, 56), (80,)), (8, 16)
    anchors = place(AnchorGenerator(sizes, (ASPECT_RATIOS,) * 2), 256, 256)
    expected = box_iou(torch.from_numpy(boxes), anchors.double()).amax(dim=1)
    # torchvision rounds half of a side of an anchor to whole pixels
    np.testing.assert_allclose(best_anchor_iou(boxes, sizes, strides), expected, atol=0.04)


@pytest.mark.parametrize(("side", "scale"), [(8, 2.0), (10, 2.5), (25, 6.3), (128, 8.0)])
def test_the_scale_follows_the_size_of_the_boxes_on_the_canvas(side: float, scale: float) -> None:
    assert choose([squares(side, 200)]) == scale
    assert choose([squares(4 * side, 200, size=1024)]) == scale


def test_a_rare_class_of_small_objects_counts_as_much_as_a_common_one() -> None:
    common = [squares(50, 500)]
    assert choose(common) > 5
    assert choose([*common, squares(7, 5, label=1)]) < 4


def test_ignored_boxes_do_not_count_and_fcos_has_no_anchors() -> None:
    image = squares(8, 20)
    assert choose([image], "retinanet") == ANCHOR_SCALES[0]
    assert choose([image], "fcos") == DEFAULT_ANCHOR_SCALE
    ignored = BoxedImage(image.path, image.size, image.boxes, image.labels, ~image.ignored)
    assert choose([ignored]) == DEFAULT_ANCHOR_SCALE
