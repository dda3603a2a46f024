import copy
import pickle
import random
from typing import Any

import albumentations as A  # noqa: N812
import numpy as np
import pytest

from vissl_lite.data.views import (
    Views,
    blur,
    colour_distortion,
    crop_decode_size,
    flip,
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


def test_the_same_key_gives_the_same_pixels_whatever_was_drawn_before() -> None:
    views, key = two_views(), (7, 3, 11)
    first = views(gradient(), *key)
    for index in range(20):
        views(gradient(), 1, 2, index)
    random.seed(5)
    np.random.seed(5)
    assert same(views(gradient(), *key), first)
    assert same(two_views()(gradient(), *key), first)


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
    image = gradient()
    two_views()(image, 0, 0, 0)
    np.testing.assert_array_equal(image, gradient())


@pytest.mark.parametrize("smallest", [0.08, 0.2, 0.5, 1.0])
def test_the_smallest_crop_of_a_decoded_image_needs_no_enlarging(smallest: float) -> None:
    side = crop_decode_size(100, smallest)
    shorter = np.sqrt(smallest * side * side * 3 / 4)  # of a crop with aspect ratio 3/4
    assert 99 <= shorter <= 100


def test_flips_are_horizontal_where_images_have_an_up() -> None:
    image = gradient()
    for upright, corners in ((True, 2), (False, 4)):
        views = Views([[flip(upright)]], shortest=SIZE)
        seen = {tuple(views(image, 0, 0, index)[0][0, 0]) for index in range(40)}
        assert len(seen) == corners
