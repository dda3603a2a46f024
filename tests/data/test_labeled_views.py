import pickle

import albumentations as A  # noqa: N812
import cv2
import numpy as np
import pytest

from vissl_lite.data.images import resize_and_crop
from vissl_lite.data.labeled_views import (
    Albumentations,
    BoxView,
    InstanceView,
    MaskView,
    box_pipeline,
    mask_pipeline,
)
from vissl_lite.data.views import Views, random_crop

SIZE = 24


def gradient() -> np.ndarray:
    """An image in which every pixel says where it stands."""
    y, x = np.mgrid[:64, :64].astype(np.uint8)
    return np.dstack([4 * y, 4 * x, np.full_like(x, 128)])


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def composed() -> Views:
    """Two views whose last step is a nested pipeline that a user composes."""
    nested = A.Compose([A.OneOf([A.GaussNoise(p=1), A.Posterize(p=1)], p=0.5), A.RandomGamma()])
    one = [random_crop(SIZE, 0.2), Albumentations(nested)]
    return Views([one, one], shortest=SIZE)


def test_what_a_user_composes_is_a_function_of_the_key_alone() -> None:
    views = composed()
    first = [views(gradient(), 0, 0, index) for index in range(8)]
    for again in (views, composed(), pickle.loads(pickle.dumps(views))):
        for index in reversed(range(8)):
            assert same(again(gradient(), 0, 0, index), first[index])
    for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not same(views(gradient(), *key), first[0])
    assert not np.array_equal(*first[0])


def test_transforms_may_come_as_a_list() -> None:
    views = Views([[Albumentations([A.HorizontalFlip(p=1)])]], shortest=SIZE)
    np.testing.assert_array_equal(views(gradient(), 0, 0, 0)[0], gradient()[:, ::-1])


def halves(height: int, width: int) -> np.ndarray:
    """Black and white regions: an image that says itself what its mask is."""
    coarse = np.random.default_rng(3).integers(0, 2, (6, 6), np.uint8) * 255
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("shape", [(96, 96), (20, 30), (300, 220)])
def test_a_mask_follows_its_image(shape: tuple[int, int], upright: bool) -> None:
    mask = halves(*shape)
    image = np.repeat(mask[..., None], 3, axis=2)
    mask[mask == 0] = 7
    view = MaskView(mask_pipeline(48, 0.3, upright))
    wrong, seen = [], set()
    for index in range(24):
        pixels, classes = view(image, mask, 0, 0, index)
        assert pixels.shape == (48, 48, 3)
        assert classes.shape == (48, 48)
        assert pixels.dtype == classes.dtype == np.uint8
        assert set(np.unique(classes)) <= {7, 255}  # nothing in between, nothing made up
        light = pixels.mean(axis=2)
        wrong.append(((light > (light.min() + light.max()) / 2) != (classes == 255)).mean())
        seen.add(classes.tobytes())
    assert np.mean(wrong) < 0.01  # half a pixel off would be 0.02 to 0.04
    assert len(seen) > 20


def test_the_same_key_gives_the_same_mask() -> None:
    mask = halves(60, 60)
    image = np.repeat(mask[..., None], 3, axis=2)
    one, other = (MaskView(mask_pipeline(48, 0.3, True)) for _ in range(2))
    one(image, mask, 5, 5, 5)
    assert same(list(one(image, mask, 1, 2, 3)), list(other(image, mask, 1, 2, 3)))


@pytest.mark.parametrize("axis", [0, 1])
def test_views_of_a_long_image_come_from_all_of_it(axis: int) -> None:
    halved = np.arange(200, dtype=np.uint8).repeat(2)  # the mask says where a pixel came from
    mask = np.tile(halved, (64, 1)) if axis else np.tile(halved[:, None], (1, 64))
    image = np.repeat(mask[..., None], 3, axis=2)
    view = MaskView(mask_pipeline(48, 0.35, True), colors=None)
    ends = []
    for index in range(200):
        places = view(image, mask, 0, 0, index)[1]
        ends.append((int(places.min()), int(places.max())))
    first, last = np.array(ends).T
    assert first.min() < 15
    assert last.max() > 185
    assert (last - first).max() <= 43  # no longer than 4:3
    assert len(set(last - first)) > 10


@pytest.mark.parametrize("min_crop_scale", [1.0, 0.1])
def test_a_view_at_its_own_scale_is_hardly_enlarged_or_shrunk(min_crop_scale: float) -> None:
    y = np.mgrid[:240, :240][0]
    image = np.repeat(np.uint8(y)[..., None], 3, axis=2)
    view = MaskView(mask_pipeline(48, min_crop_scale, True, own_scale=True))
    spans = []
    for index in range(40):
        _, rows = view(image, np.uint8(y), 0, 0, index)  # the mask says where a row came from
        spans.append(int(rows[-1, 0]) - int(rows[0, 0]) + 1)
    assert 30 <= min(spans) <= max(spans) <= 73  # 48 by 1.5 in either direction
    assert len(set(spans)) > (10 if min_crop_scale < 1 else 0)
    if min_crop_scale == 1:
        assert set(spans) == {48}


def test_boxes_follow_their_image() -> None:
    image = np.full((60, 90, 3), 90, np.uint8)
    image[20:40, 30:70] = 250
    boxes, labels = np.array([[30, 20, 70, 40]], np.float32), np.array([3])
    view = BoxView(box_pipeline((64, 96), 0.4, upright=False))
    kept = 0
    for index in range(30):
        pixels, found, names = view(image, boxes, labels, 0, 0, index)
        assert pixels.shape == (64, 96, 3)
        for (x1, y1, x2, y2), name in zip(found, names, strict=True):
            assert name == 3
            bright = pixels.max(axis=2) > 170
            ys, xs = np.nonzero(bright)
            edges = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert np.abs(edges - [x1, y1, x2, y2]).max() < 2.5
            kept += 1
    assert kept >= 25


def test_the_same_key_gives_the_same_boxes() -> None:
    image = gradient()
    boxes, labels = np.array([[3, 5, 30, 40], [20, 10, 60, 60]], np.float32), np.array([0, 1])
    one, other = (BoxView(box_pipeline((48, 48), 0.3, True)) for _ in range(2))
    one(image, boxes, labels, 5, 5, 5)
    made, again = (view(image, boxes, labels, 1, 2, 3) for view in (one, other))
    assert same(list(made), list(again))


def test_a_box_that_is_mostly_outside_is_dropped() -> None:
    image = gradient()
    boxes, labels = np.array([[0, 0, 64, 64], [0, 0, 3, 3]], np.float32), np.array([0, 1])
    view = BoxView(box_pipeline((48, 48), 0.5, True))
    counts = {len(view(image, boxes, labels, 0, 0, index)[1]) for index in range(40)}
    assert counts == {1, 2}


@pytest.mark.parametrize("min_crop_scale", [1.0, 0.3])
def test_shrinking_is_antialiased(min_crop_scale: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    mask, boxes = np.zeros((1024, 1024), np.uint8), np.array([[0, 0, 1024, 1024]], np.float32)
    masked = MaskView(mask_pipeline(96, min_crop_scale, True)[:1], colors=None)
    boxed = BoxView(box_pipeline((96, 96), 1.0, True)[:3], colors=None)
    evaluated = resize_and_crop(noise, 96).std()
    for index in range(5):
        assert boxed(noise, boxes, np.array([0]), 0, 0, index)[0].std() < 1.2 * evaluated
        largest = evaluated * min_crop_scale**-0.5  # a crop is shrunk less
        assert masked(noise, mask, 0, 0, index)[0].std() < 1.2 * largest


def ellipse(shape: tuple[int, int], center: tuple[int, int], axes: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((x - center[0]) / axes[0]) ** 2 + ((y - center[1]) / axes[1]) ** 2 < 1


@pytest.mark.parametrize("size", [(60, 90), (240, 360)])
def test_masks_follow_their_image(size: tuple[int, int]) -> None:
    scale = size[0] // 60
    mask = ellipse(size, (55 * scale, 22 * scale), (20 * scale, 10 * scale))
    image = np.full((*size, 3), 90, np.uint8)
    image[mask] = 250
    edges = np.argwhere(mask)
    (top, left), (bottom, right) = edges.min(axis=0), edges.max(axis=0) + 1
    boxes = np.array([[1, 1, 30, 30], [left, top, right, bottom]], np.float32)
    view = InstanceView(box_pipeline((64, 96), 0.3, upright=False), colors=None)
    kept = cut = 0
    for index in range(40):
        pixels, found, masks, numbers = view(
            image, boxes, mask[None].astype(np.uint8), np.array([False, True]), 0, 0, index
        )
        assert pixels.shape == (64, 96, 3)
        assert masks.shape == (len(numbers), 64, 96)
        for box, drawn, number in zip(found, masks, numbers, strict=True):
            if number == 0:
                assert not drawn.any()
                continue
            bright = pixels.max(axis=2) > 170
            assert (bright & drawn).sum() > 0.98 * (bright | drawn).sum()
            rows, columns = np.nonzero(drawn)
            around = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(box - around).max() <= 1
            cut += drawn[0].any() or drawn[-1].any() or drawn[:, 0].any() or drawn[:, -1].any()
            kept += 1
    assert kept >= 30
    assert cut >= 3


def test_the_box_of_an_object_that_is_cut_is_that_of_its_mask() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:30, 10:60] = 1  # a bar to the right, and
    mask[20:60, 10:16] = 1  # one downwards
    view = InstanceView([A.Crop(20, 0, 64, 64)])
    box, drawn = np.array([[10, 20, 60, 60]], np.float32), np.array([True])
    image = np.zeros((64, 64, 3), np.uint8)
    _, (found,), (left,), _ = view(image, box, mask[None], drawn, 0, 0, 0)
    assert left.sum() == 10 * 40
    assert found.tolist() == [0, 20, 40, 30]  # without the bar that is outside


def test_an_object_whose_mask_is_outside_is_dropped() -> None:
    mask = np.zeros((1, 64, 64), np.uint8)
    mask[0, :, :4] = 1
    view = InstanceView([A.Crop(20, 0, 64, 64)])
    box, image = np.array([[0, 0, 64, 64]], np.float32), np.zeros((64, 64, 3), np.uint8)
    assert len(view(image, box, mask, np.array([True]), 0, 0, 0)[1]) == 0
    assert len(view(image, box, mask[:0], np.array([False]), 0, 0, 0)[1]) == 1
