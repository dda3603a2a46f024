import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import albumentations as A  # noqa: N812
import cv2
import numpy as np
import pytest

from vissl_lite.data.view_steps import jitter, turn_hue
from vissl_lite.data.views import (
    BoxView,
    ImageTransform,
    MaskView,
    Views,
    blur,
    box_pipeline,
    colour_distortion,
    crop_decode_size,
    distorted_crop,
    flip,
    grey,
    mask_pipeline,
    random_crop,
)

SIZE = 24


def gradient() -> np.ndarray:
    """An image in which every pixel says where it stands."""
    y, x = np.mgrid[:64, :64].astype(np.uint8)
    return np.dstack([4 * y, 4 * x, np.full_like(x, 128)])


def two_views() -> Views:
    one = [random_crop(SIZE, 0.2), flip(upright=False), *colour_distortion(1.0), blur(SIZE)]
    nested = A.OneOf([A.GaussNoise(p=1), A.Posterize(p=1)], p=0.5)
    one.append(nested)
    return Views([one, one], shortest=SIZE)


def fast_views() -> Views:
    """Views of transforms that are all our own steps; ``two_views`` are Albumentations' own."""
    one = distorted_crop(64, 0.2, solarize=0.5, upright=False)
    return Views([one, one], shortest=64)


def crops() -> Views:
    one = [random_crop(SIZE, 0.2)]
    return Views([one, one], shortest=SIZE)


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_view_has_the_size_asked_for_and_stays_uint8() -> None:
    views = two_views()
    made = views(gradient(), 0, 0, 0)
    assert len(made) == len(views) == 2
    assert all(view.shape == (SIZE, SIZE, 3) and view.dtype == np.uint8 for view in made)


@pytest.mark.parametrize("make", [two_views, fast_views])
def test_the_same_key_gives_the_same_pixels_whatever_was_drawn_before(
    make: Callable[[], Views],
) -> None:
    views, key = make(), (7, 3, 11)
    first = views(gradient(), *key)
    for index in range(20):
        views(gradient(), 1, 2, index)
    random.seed(5)
    np.random.seed(5)
    assert same(views(gradient(), *key), first)
    assert same(make()(gradient(), *key), first)


class OneDraw(A.ImageOnlyTransform):
    """Takes half a 64-bit word from the generator, which keeps the other half for later."""

    def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
        draw = self.random_generator.integers(0, 2**32, dtype=np.uint32)
        return np.full_like(img, draw % 251)


def test_nothing_is_left_over_from_one_view_for_the_next() -> None:
    views = Views([[OneDraw(p=1)]], shortest=SIZE)
    first = [views(gradient(), 0, 0, index) for index in range(8)]
    again = [views(gradient(), 0, 0, index) for index in reversed(range(8))][::-1]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_a_views_pixels_do_not_depend_on_the_views_beside_it() -> None:
    beside = Views([[random_crop(SIZE, 0.2)], [A.GaussNoise(p=1)]], shortest=SIZE)
    alone = Views([[random_crop(SIZE, 0.2)]], shortest=SIZE)
    assert same(beside(gradient(), 0, 1, 2)[:1], alone(gradient(), 0, 1, 2))


def test_making_other_views_of_the_same_transforms_changes_nothing() -> None:
    one = [random_crop(SIZE, 0.2), *colour_distortion(1.0)]
    views = Views([one], shortest=SIZE)
    before = views(gradient(), 0, 1, 2)
    Views([one], shortest=SIZE)(gradient(), 5, 5, 5)
    assert same(views(gradient(), 0, 1, 2), before)


@pytest.mark.parametrize("key", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (0, 0, 2**32)])
def test_seed_epoch_and_index_each_change_the_pixels(key: tuple[int, int, int]) -> None:
    views = two_views()
    for a, b in zip(views(gradient(), 0, 0, 0), views(gradient(), *key), strict=True):
        assert not np.array_equal(a, b)


def test_keys_do_not_run_into_one_another() -> None:
    views = crops()
    keys = [(s, e, i) for s in range(4) for e in range(4) for i in range(4)]
    made = {view.tobytes() for key in keys for view in views(gradient(), *key)}
    assert len(made) == 2 * len(keys)


def test_two_views_of_an_image_differ() -> None:
    views = two_views()
    for index in range(10):
        one, other = views(gradient(), 0, 0, index)
        assert not np.array_equal(one, other)


def test_the_images_of_a_batch_get_different_crops() -> None:
    views = crops()
    centres = {
        tuple(views(gradient(), 0, 0, index)[0][SIZE // 2, SIZE // 2]) for index in range(16)
    }
    assert len(centres) >= 14


@pytest.mark.parametrize("axis", ["seed", "epoch", "index"])
def test_flips_are_even_along_each_part_of_the_key(axis: str) -> None:
    views = Views([[flip()], [flip()]], shortest=SIZE)
    image = gradient()
    flipped = np.array(
        [
            [
                view[0, 0, 1] != 0
                for view in views(image, **{"seed": 0, "epoch": 0, "index": 0, axis: n})
            ]
            for n in range(400)
        ]
    )
    # five standard deviations of 400 fair coins are 0.125
    assert np.abs(flipped.mean(axis=0) - 0.5).max() < 0.125
    assert abs((flipped[:, 0] == flipped[:, 1]).mean() - 0.5) < 0.125
    assert abs((flipped[1:] == flipped[:-1]).mean() - 0.5) < 0.125


@pytest.mark.parametrize("duplicate", [lambda v: pickle.loads(pickle.dumps(v)), copy.deepcopy])
@pytest.mark.parametrize("make", [two_views, fast_views])
def test_a_copy_in_another_process_makes_the_same_views(
    make: Callable[[], Views], duplicate: Any
) -> None:
    views = make()
    views(gradient(), 9, 9, 9)
    copied = duplicate(views)
    assert copied.shortest == views.shortest
    for key in ((0, 0, 0), (3, 1, 4), (0, 0, 0)):
        made = copied(gradient(), *key)
        assert same(made, views(gradient(), *key))
        assert same(made, make()(gradient(), *key))
    assert not same(copied(gradient(), 0, 0, 1), copied(gradient(), 0, 0, 2))


@pytest.mark.parametrize("make", [two_views, fast_views])
def test_the_image_itself_is_left_alone(make: Callable[[], Views]) -> None:
    image = gradient()
    for index in range(20):
        make()(image, 0, 0, index)
    np.testing.assert_array_equal(image, gradient())


def colourful(height: int = 64, width: int = 64) -> np.ndarray:
    """Smooth patches of all colours, black, white and grey ones among them."""
    coarse = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    coarse[0], coarse[1, :4], coarse[1, 4:] = np.arange(0, 256, 32)[:, None], 0, 255
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def by_albumentations(pipeline: list[ImageTransform], image: np.ndarray, index: int) -> np.ndarray:
    """The view that Albumentations makes: one transform that we don't know leaves it all to it."""
    views = Views([[*pipeline, A.InvertImg(p=0)]], shortest=SIZE)
    return views(image, 4, 0, index)[0]


@pytest.mark.parametrize(
    ("pipeline", "apart"),
    [
        ([random_crop(SIZE, 0.2)], 0),
        ([random_crop(SIZE, 1.0)], 0),
        ([flip()], 0),
        ([flip(upright=False)], 0),
        ([grey(0.5)], 0),
        ([blur(224, 0.7)], 1),
        ([A.Solarize(threshold_range=(0.5, 0.5), p=0.5)], 0),
        ([A.ColorJitter(brightness=0.8, contrast=0, saturation=0, hue=0, p=0.8)], 1),
        ([A.ColorJitter(brightness=0, contrast=0.8, saturation=0, hue=0, p=0.8)], 1),
        ([A.ColorJitter(brightness=0, contrast=0, saturation=0.8, hue=0, p=0.8)], 1),
        (
            [A.ColorJitter(brightness=0, contrast=0, saturation=0, hue=0.5, p=0.8)],
            9,
        ),  # a step of hue
        ([A.ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0, p=0.8)], 5),
    ],
)
@pytest.mark.parametrize("shape", [(64, 64), (24, 24), (9, 90), (90, 9), (2, 3)])
def test_each_step_draws_and_makes_what_albumentations_does(
    shape: tuple[int, int], pipeline: list[ImageTransform], apart: int
) -> None:
    image = colourful(*shape)
    views = Views([pipeline], shortest=SIZE)
    for index in range(25):
        made, expected = views(image, 4, 0, index)[0], by_albumentations(pipeline, image, index)
        assert made.shape == expected.shape
        assert made.flags.c_contiguous
        difference = np.abs(made.astype(int) - expected)
        assert difference.max() <= apart
        assert difference.mean() <= min(apart, 1.5)


@pytest.mark.parametrize("size", [32, 64])
def test_whole_views_are_those_of_albumentations_up_to_rounding(size: int) -> None:
    image, pipeline = colourful(), distorted_crop(size, 0.2, 1.0, solarize=0.3, upright=False)
    views = Views([pipeline], shortest=size)
    differences = []
    for index in range(60):
        made, expected = views(image, 4, 0, index)[0], by_albumentations(pipeline, image, index)
        differences.append(np.abs(made.astype(int) - expected))
    # a wrong draw would put them tens of steps apart; OpenCV's hues come in steps of 2 degrees
    assert np.mean(differences) < 0.5
    assert np.quantile(differences, 0.99) <= 4
    assert max(view.mean() for view in differences) < 2


def test_brightening_cuts_off_before_what_follows() -> None:
    image = np.full((4, 4, 3), 200, np.uint8)
    assert np.all(jitter(image, [1.8, 1, 1, 0], [0, 1, 2, 3]) == 255)
    image[:2] = 0
    darkened_last = jitter(image, [0.5, 1.8, 1, 0], [1, 0, 2, 3])
    assert darkened_last.max() == 127  # of 255, not of the 280 that the contrast would have made
    assert darkened_last.min() == 0


def test_a_jitter_of_no_strength_changes_nothing() -> None:
    views = Views([colour_distortion(0.0)[:1]], shortest=SIZE)
    assert all(same(views(colourful(), 0, 0, i), [colourful()]) for i in range(10))


@pytest.mark.parametrize("turn", [-180, -90, -77, -76, -30, -1, 0, 1, 30, 76, 77, 90, 180])
def test_hues_turn_in_both_directions(turn: int) -> None:
    hues = np.arange(0, 180, 30)
    cone = np.uint8([[[hue, 255, 255] for hue in hues]])
    turned = cv2.cvtColor(turn_hue(cv2.cvtColor(cone, cv2.COLOR_HSV2RGB), turn), cv2.COLOR_RGB2HSV)
    apart = (turned[0, :, 0].astype(int) - hues - turn) % 180
    assert np.all(np.minimum(apart, 180 - apart) <= 1)


class Darker(A.HorizontalFlip):
    """Somebody's own transform, made of one that has a step here."""

    def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
        return img // 2


def test_a_transform_of_ones_own_is_applied_as_it_is() -> None:
    views = Views([[Darker(p=1)]], shortest=SIZE)
    np.testing.assert_array_equal(views(gradient(), 0, 0, 0)[0], gradient() // 2)


@pytest.mark.parametrize("smallest", [0.08, 0.2, 0.5, 1.0])
def test_the_smallest_crop_of_a_decoded_image_needs_no_enlarging(smallest: float) -> None:
    side = crop_decode_size(100, smallest)
    shorter = np.sqrt(smallest * side * side * 3 / 4)  # of a crop with aspect ratio 3/4
    assert 99 <= shorter <= 100


def cuts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Will hold height and width of every part of an image that is resized to a view."""
    found, resize = [], cv2.resize

    def seen(image: np.ndarray, *rest: Any, **named: Any) -> np.ndarray:
        found.append(image.shape[:2])
        return resize(image, *rest, **named)

    monkeypatch.setattr(cv2, "resize", seen)
    return found


@pytest.mark.parametrize(("height", "width"), [(600, 800), (811, 407), (100, 1500), (193, 193)])
def test_an_image_is_reduced_no_further_than_its_own_crops_allow(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, small = [random_crop(SIZE, 0.05), flip()], [random_crop(SIZE // 2, 0.02, 0.3)]
    views = Views([one, small, one], shortest=crop_decode_size(SIZE, 0.02))
    whole, all_times = np.zeros((height, width, 3), np.uint8), set()
    found = cuts(monkeypatch)
    for index in range(40):
        times = views.times(height, width, 0, 1, index)
        all_times.add(times)
        found.clear()
        views(whole, 0, 1, index)
        needed = np.array([SIZE, SIZE // 2, SIZE])
        fits = np.array(found).min(axis=1) // needed
        assert times == max(1, fits.min())
        reduced = np.zeros((-(-height // times), -(-width // times), 3), np.uint8)
        found.clear()
        made = views(reduced, 0, 1, index, (height, width))
        assert [view.shape[0] for view in made] == needed.tolist()
        if times > 1:  # nothing is enlarged
            assert (np.array(found) >= needed[:, None]).all()
        assert times >= min(height, width) // views.shortest
    assert len(all_times) > 1


def test_views_of_a_reduced_image_are_those_of_the_whole_image() -> None:
    whole = colourful(480, 640)
    one = distorted_crop(64, 0.2, 0.5, blur_probability=0.3, solarize=0.2, upright=False)
    views = Views([one, one], shortest=64)
    for index in range(30):
        expected = views(whole, 3, 1, index)
        assert same(views(whole, 3, 1, index, (480, 640)), expected)
        for times in (2, 4):
            small = cv2.resize(
                whole, None, fx=1 / times, fy=1 / times, interpolation=cv2.INTER_AREA
            )
            for ours, theirs in zip(views(small, 3, 1, index, (480, 640)), expected, strict=True):
                assert np.abs(ours.astype(int) - theirs).mean() < 12  # other draws: 50 and more


def test_what_is_not_sure_to_begin_with_a_crop_goes_by_the_smallest_that_may_be_drawn() -> None:
    crop, noisy = random_crop(SIZE, 0.2), A.GaussNoise(p=1)
    by_chance = A.RandomResizedCrop((SIZE, SIZE), p=0.5)
    for pipeline in ([crop, noisy], [flip(), crop], [by_chance]):
        views = Views([[crop], pipeline], shortest=100)
        assert {views.times(399, 500, 0, 0, index) for index in range(20)} <= {1, 2, 3}
        assert views.times(199, 500, 0, 0, 0) == 1
        small = np.zeros((200, 250, 3), np.uint8)
        views(small, 0, 0, 0, (399, 500))  # drawn from the image as it is


@pytest.mark.parametrize(("height", "width"), [(0, 0), (0, 900), (1, 900), (1, 1)])
def test_images_of_next_to_no_size_are_not_reduced(height: int, width: int) -> None:
    assert crops().times(height, width, 0, 0, 0) == 1


def test_flips_are_horizontal_where_images_have_an_up() -> None:
    image = gradient()
    for upright, corners in ((True, 2), (False, 4)):
        views = Views([[flip(upright)]], shortest=SIZE)
        seen = {tuple(views(image, 0, 0, index)[0][0, 0]) for index in range(40)}
        assert len(seen) == corners


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


@pytest.mark.parametrize("smallest_crop", [1.0, 0.1])
def test_a_view_at_its_own_scale_is_hardly_enlarged_or_shrunk(smallest_crop: float) -> None:
    y = np.mgrid[:240, :240][0]
    image = np.repeat(np.uint8(y)[..., None], 3, axis=2)
    view = MaskView(mask_pipeline(48, smallest_crop, True, own_scale=True))
    spans = []
    for index in range(40):
        _, rows = view(image, np.uint8(y), 0, 0, index)  # the mask says where a row came from
        spans.append(int(rows[-1, 0]) - int(rows[0, 0]) + 1)
    assert 30 <= min(spans) <= max(spans) <= 73  # 48 by 1.5 in either direction
    assert len(set(spans)) > (10 if smallest_crop < 1 else 0)
    if smallest_crop == 1:
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
