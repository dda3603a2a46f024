import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from vissl_lite.data import view_steps
from vissl_lite.data.images import read_image, resize_and_crop
from vissl_lite.data.stream import ViewDataset
from vissl_lite.data.views import (
    Views,
    color_distortion,
    crop_decode_size,
    distorted_crop,
    flip,
    random_crop,
)
from vissl_lite.errors import UserError
from vissl_lite.transfer.classification.training import classifier_views

SIZE = 24


def gradient() -> np.ndarray:
    """An image in which every pixel says where it stands."""
    y, x = np.mgrid[:64, :64].astype(np.uint8)
    return np.dstack([4 * y, 4 * x, np.full_like(x, 128)])


def two_views() -> Views:
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
    assert all(view.shape == (64, 64, 3) and view.dtype == np.uint8 for view in made)


def test_the_same_key_gives_the_same_pixels_whatever_was_drawn_before() -> None:
    views, key = two_views(), (7, 3, 11)
    first = views(gradient(), *key)
    for index in range(20):
        views(gradient(), 1, 2, index)
    random.seed(5)
    np.random.seed(5)
    assert same(views(gradient(), *key), first)
    assert same(two_views()(gradient(), *key), first)


def test_a_views_pixels_do_not_depend_on_the_views_beside_it() -> None:
    beside = Views([[random_crop(SIZE, 0.2)], color_distortion(1.0)], shortest=SIZE)
    alone = Views([[random_crop(SIZE, 0.2)]], shortest=SIZE)
    assert same(beside(gradient(), 0, 1, 2)[:1], alone(gradient(), 0, 1, 2))


def test_making_other_views_of_the_same_transforms_changes_nothing() -> None:
    one = [random_crop(SIZE, 0.2), *color_distortion(1.0)]
    views = Views([one], shortest=SIZE)
    before = views(gradient(), 0, 1, 2)
    Views([one], shortest=SIZE)(gradient(), 5, 5, 5)
    assert same(views(gradient(), 0, 1, 2), before)


@pytest.mark.parametrize("key", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (0, 0, 2**32)])
def test_seed_epoch_and_index_each_change_the_pixels(key: tuple[int, int, int]) -> None:
    views = two_views()
    for a, b in zip(views(gradient(), 0, 0, 0), views(gradient(), *key), strict=True):
        assert not np.array_equal(a, b)


@pytest.mark.slow
def test_keys_do_not_run_into_one_another() -> None:
    views = crops()
    keys = [(s, e, i) for s in range(4) for e in range(4) for i in range(4)]
    made = {view.tobytes() for key in keys for view in views(colorful(600, 600), *key)}
    assert len(made) == 2 * len(keys)


def test_two_views_of_an_image_differ() -> None:
    views = two_views()
    for index in range(10):
        one, other = views(gradient(), 0, 0, index)
        assert not np.array_equal(one, other)


def test_the_images_of_a_batch_get_different_crops() -> None:
    views = crops()
    centers = {
        tuple(views(gradient(), 0, 0, index)[0][SIZE // 2, SIZE // 2]) for index in range(16)
    }
    assert len(centers) >= 14


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
def test_a_copy_in_another_process_makes_the_same_views(duplicate: Any) -> None:
    views = two_views()
    views(gradient(), 9, 9, 9)
    copied = duplicate(views)
    assert copied.shortest == views.shortest
    for key in ((0, 0, 0), (3, 1, 4), (0, 0, 0)):
        made = copied(gradient(), *key)
        assert same(made, views(gradient(), *key))
        assert same(made, two_views()(gradient(), *key))
    assert not same(copied(gradient(), 0, 0, 1), copied(gradient(), 0, 0, 2))


def test_the_image_itself_is_left_alone() -> None:
    image, views = gradient(), two_views()
    for index in range(20):
        views(image, 0, 0, index)
    np.testing.assert_array_equal(image, gradient())


def colorful(height: int = 64, width: int = 64) -> np.ndarray:
    """Smooth patches of all colors, black, white and gray ones among them."""
    coarse = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    coarse[0], coarse[1, :4], coarse[1, 4:] = np.arange(0, 256, 32)[:, None], 0, 255
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("smallest", [0.08, 0.2, 0.5, 1.0])
def test_the_smallest_crop_of_a_decoded_image_needs_no_enlarging(smallest: float) -> None:
    side = crop_decode_size(100, smallest)
    shorter = np.sqrt(smallest * side * side * 3 / 4)  # of a crop with aspect ratio 3/4
    assert 99 <= shorter <= 100


def cuts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Will hold height and width of every part of an image that is resized to a view."""
    found, resize = [], view_steps.resized

    def seen(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        found.append(image.shape[:2])
        return resize(image, size)

    monkeypatch.setattr(view_steps, "resized", seen)
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
    whole = colorful(480, 640)
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


def test_a_view_that_begins_without_a_crop_keeps_the_shortest_side() -> None:
    crop = random_crop(SIZE, 0.2)
    views = Views([[crop], [flip(), crop]], shortest=100)
    assert {views.times(399, 500, 0, 0, index) for index in range(20)} == {3}
    assert views.times(199, 500, 0, 0, 0) == 1
    small = np.zeros((200, 250, 3), np.uint8)
    made = views(small, 0, 0, 0, (399, 500))  # drawn from the image as it is
    assert [view.shape for view in made] == 2 * [(SIZE, SIZE, 3)]


@pytest.mark.parametrize("smallest", [0.0, -0.1, 1.01])
def test_a_share_out_of_range_is_a_mistake(smallest: float) -> None:
    with pytest.raises(UserError, match="must be above 0, at most 1"):
        random_crop(SIZE, smallest)


@pytest.mark.parametrize(("height", "width"), [(0, 0), (0, 900), (1, 900), (1, 1)])
def test_images_of_next_to_no_size_are_not_reduced(height: int, width: int) -> None:
    assert crops().times(height, width, 0, 0, 0) == 1


def test_flips_are_horizontal_where_images_have_an_up() -> None:
    image = gradient()
    for upright, corners in ((True, 2), (False, 4)):
        views = Views([[flip(upright)]], shortest=SIZE)
        seen = {tuple(views(image, 0, 0, index)[0][0, 0]) for index in range(40)}
        assert len(seen) == corners


def large_and_small() -> Views:
    """Multi-crop's, whole images alone, so that all shrink as evaluated images do."""
    return Views([[random_crop(64, 1.0)], [random_crop(32, 1.0), flip(upright=False)]], 64)


@pytest.mark.parametrize(
    ("name", "make", "sizes"),
    [
        ("a.png", large_and_small, [64, 32]),
        ("a.tif", lambda: Views([distorted_crop(224, 1.0, 0.0, 0.0)], 224), [224]),
        ("a.jpg", lambda: Views([distorted_crop(224, 1.0, 0.0, 0.0)], 224), [224]),
        ("a.png", lambda: classifier_views(96, 1.0, True), [96]),
    ],
)
def test_shrinking_averages_pixel_noise_in_training_as_in_evaluation(
    name: str, make: Callable[[], Views], sizes: list[int], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    grain = np.clip(127 + 40 * random.standard_normal((1024, 1024, 1)), 0, 255)
    file = tmp_path / name
    options = {"quality": 95} if name.endswith("jpg") else {}
    Image.fromarray(np.repeat(np.uint8(grain), 3, axis=2)).save(file, **options)
    data = ViewDataset([str(file)], make(), 0)
    made = [data[epoch, 0].views for epoch in range(4)]
    for number, size in enumerate(sizes):
        evaluated = resize_and_crop(read_image(file, size), size).std()
        trained = np.mean([views[number].std() for views in made])
        assert 0.8 * evaluated < trained < 1.2 * evaluated
