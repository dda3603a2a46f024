"""Each step against a slow literal version of its definition."""

import colorsys
from collections.abc import Callable
from dataclasses import replace
from random import Random

import cv2
import numpy as np
import pytest

from vissl_lite.data.view_steps import (
    D4,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomResizedCrop,
    Solarize,
    Step,
    drop_bands,
    jitter,
    jitter_bands,
    resized,
    turn_hue,
)

LUMA = np.array([0.299, 0.587, 0.114])


def colorful(height: int = 40, width: int = 50) -> np.ndarray:
    """Smooth patches of all colors, black, white and gray ones among them."""
    coarse = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    coarse[0], coarse[1, :4], coarse[1, 4:] = np.arange(0, 256, 32)[:, None], 0, 255
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def clipped(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255)


def slow_jitter(image: np.ndarray, factors: list[float], order: list[int]) -> np.ndarray:
    """torchvision's definition in floating point, values cut off after every change."""
    x = image.astype(float)
    for what in order:
        luma, factor = (x @ LUMA)[..., None], factors[what]
        if what == 0:
            x = factor * x
        elif what == 1:
            x = factor * x + (1 - factor) * luma.mean()
        elif what == 2:
            x = factor * x + (1 - factor) * luma
        else:
            x = slow_hue(x, factor)
        x = x.clip(0, 255)
    return x


def slow_hue(image: np.ndarray, turn: float) -> np.ndarray:
    def turned(pixel: np.ndarray) -> tuple[float, float, float]:
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        return colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)

    return 255 * np.apply_along_axis(turned, 2, image)


def slow_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    reach = int(3.5 * sigma)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = np.pad(image.astype(float), ((reach, reach), (reach, reach), (0, 0)), "reflect")
    height, width = image.shape[:2]
    total = np.zeros(image.shape)
    for y, a in enumerate(weights):
        for x, b in enumerate(weights):
            total += a * b * padded[y : y + height, x : x + width]
    return total


@pytest.mark.slow
def test_the_jitter_is_that_of_its_definition() -> None:
    image, random = colorful(), Random(0)
    for _ in range(40):
        factors = [random.uniform(0.2, 1.8) for _ in range(3)] + [random.uniform(-0.2, 0.2)]
        order = random.sample(range(4), 4)
        apart = np.abs(jitter(image, factors, order) - slow_jitter(image, factors, order))
        assert apart.mean() < 1.5
        assert np.quantile(apart, 0.99) < 14  # OpenCV's hues come in 256 steps


@pytest.mark.parametrize("what", range(3))
def test_brightness_contrast_and_saturation_are_exact_up_to_rounding(what: int) -> None:
    image = colorful()
    for factor in (0.0, 0.4, 1.0, 1.6):
        factors = [1.0, 1.0, 1.0, 0.0]
        factors[what] = factor
        expected = slow_jitter(image, factors, [what])
        assert np.abs(jitter(image, factors, [0, 1, 2, 3]) - expected).max() < 1


def test_hues_turn_in_both_directions_and_around_the_circle() -> None:
    image = colorful()
    for turn in (-0.5, -0.1, 0.0, 0.02, 0.3, 0.5):
        assert np.abs(turn_hue(image, turn) - slow_hue(image, turn)).mean() < 1.5


def test_what_exceeds_the_range_is_cut_off_before_what_follows() -> None:
    image = np.full((4, 4, 3), 200, np.uint8)
    assert np.all(jitter(image, [1.8, 1, 1, 0], [0, 1, 2, 3]) == 255)
    image[:2] = 0
    darkened_last = jitter(image, [0.5, 1.8, 1, 0], [1, 0, 2, 3])
    assert darkened_last.max() == 128  # of 255, not of the 280 that the contrast would have made


def test_factors_are_drawn_from_their_ranges_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[float], list[int]]] = []
    monkeypatch.setattr(
        "vissl_lite.data.view_steps.jitter", lambda image, *rest: drawn.append(rest) or image
    )
    random = Random(0)
    for _ in range(500):
        ColorJitter(0.8, 0.4, 1.5, 0.2)(colorful(), random)
    factors = np.array([factors for factors, _ in drawn])
    low, high = [0.2, 0.6, 0.0, -0.2], [1.8, 1.4, 2.5, 0.2]
    np.testing.assert_allclose(factors.min(axis=0), low, atol=0.03)
    np.testing.assert_allclose(factors.max(axis=0), high, atol=0.03)
    assert len({tuple(order) for _, order in drawn}) == 24


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (HorizontalFlip(p=1), lambda x: x[:, ::-1]),
        (Grayscale(), lambda x: np.repeat((x @ LUMA)[..., None].round(), 3, axis=2)),
        (Solarize(p=1), lambda x: np.where(x >= 128, 255 - x, x)),
        (GaussianBlur((1.3, 1.3), p=1), lambda x: slow_blur(x, 1.3)),
        (GaussianBlur((0.1, 0.1), p=1), lambda x: x),  # too little to reach a neighbor
        (ColorJitter(0, 0, 0, 0), lambda x: x),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Step) else "",
)
def test_steps_are_those_of_their_definition(
    step: Step, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    image = colorful()
    made = step(image, Random(0))
    assert np.abs(made - expected(image).astype(float)).max() <= 1
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(image, colorful())


def test_a_step_is_applied_with_its_probability() -> None:
    image, random = colorful(), Random(0)
    for p in (0.0, 0.3, 1.0):
        flipped = [np.any(HorizontalFlip(p)(image, random) != image) for _ in range(1000)]
        assert abs(np.mean(flipped) - p) <= 5 * (p * (1 - p) / 1000) ** 0.5


@pytest.mark.parametrize("part", [(1024, 1024), (700, 560), (430, 450), (300, 390), (230, 260)])
def test_shrinking_averages_as_area_interpolation_does(part: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*part, 3), np.uint8)
    area = cv2.resize(noise, (224, 224), interpolation=cv2.INTER_AREA).std()
    assert 0.78 * area < resized(noise, (224, 224)).std() < 1.15 * area
    smooth = colorful(*part)
    expected = cv2.resize(smooth, (224, 224), interpolation=cv2.INTER_AREA)
    assert np.abs(resized(smooth, (224, 224)).astype(int) - expected).mean() < 1


@pytest.mark.parametrize("part", [(20, 30), (24, 24), (1, 1)])
def test_enlarging_is_linear(part: tuple[int, int]) -> None:
    image = colorful(*part)
    np.testing.assert_array_equal(resized(image, (48, 32)), cv2.resize(image, (32, 48)))


def test_the_eight_flips_and_turns_of_a_square_are_equally_likely() -> None:
    image, random = np.arange(27, dtype=np.uint8).reshape(3, 3, 3), Random(0)
    all_of_them = {
        np.rot90(start, turns).tobytes() for start in (image, image[:, ::-1]) for turns in range(4)
    }
    made = [D4()(image, random).tobytes() for _ in range(800)]
    assert set(made) == all_of_them
    assert min(map(made.count, all_of_them)) > 100 - 5 * 10


def test_crops_follow_torchvision() -> None:
    crop, random = RandomResizedCrop((24, 24), (0.2, 0.9)), Random(0)
    drawn = np.array([crop.draw(300, 400, random) for _ in range(3000)])
    top, left, height, width = drawn.T
    assert top.min() == left.min() == 0
    assert (top + height).max() == 300
    assert (left + width).max() == 400
    share, ratio = height * width / (300 * 400), width / height
    assert 0.195 < share.min() < 0.22
    assert share.max() <= 0.9 * 1.01
    assert 0.74 < ratio.min() < 0.77
    assert 1.31 < ratio.max() < 1.35
    small = share < 0.4  # where nearly every rectangle fits
    assert abs(np.log(ratio[small]).mean()) < 0.03
    assert abs(share[small].mean() - 0.3) < 0.01
    assert abs((top / np.maximum(1, 300 - height))[small].mean() - 0.5) < 0.05


@pytest.mark.parametrize("shape", [(10, 400), (400, 10)])
def test_of_a_strip_the_largest_part_at_a_random_place_is_taken(shape: tuple[int, int]) -> None:
    step, random = RandomResizedCrop((24, 24), (0.9, 0.9)), Random(0)
    drawn = np.array([step.draw(*shape, random) for _ in range(200)])
    long = int(np.argmax(shape))
    start, sides = drawn[:, long], drawn[:, 2:]
    assert (drawn[:, 1 - long] == 0).all()
    assert (sides[:, 1 - long] == 10).all()
    assert (sides[:, long] == 13).all()
    assert start.min() < 20
    assert start.max() > 400 - 13 - 20
    assert start.max() <= 400 - 13


@pytest.mark.parametrize("shape", [(60, 360), (361, 60), (64, 64)])
def test_central_crops_come_from_the_largest_central_square(shape: tuple[int, int]) -> None:
    step, side = RandomResizedCrop((24, 24), (0.2, 1.0), central=True), min(shape)
    ends = [(length - side) // 2 for length in shape]
    square = replace(step, central=False)
    for seed in range(200):
        expected = square.draw(side, side, Random(seed))
        top, left, height, width = step.draw(*shape, Random(seed))
        assert (top - ends[0], left - ends[1], height, width) == expected


@pytest.mark.parametrize("shape", [(64, 64), (9, 90), (2, 3), (1, 1)])
def test_a_crop_is_the_resized_part_of_the_image(shape: tuple[int, int]) -> None:
    step, image = RandomResizedCrop((24, 24), (0.3, 1.0)), colorful(*shape)
    for seed in range(10):
        top, left, height, width = step.draw(*shape, Random(seed))
        part = image[top : top + height, left : left + width]
        made = step(image, Random(seed))
        assert made.shape == (24, 24, 3)
        assert made.flags.c_contiguous
        assert abs(made.mean() - part.mean()) < 12


# Bands


def bands(count: int = 5, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, (side, side, count), np.uint16)


def test_jitter_of_bands_against_a_literal_version() -> None:
    image, gains = bands(2, 3), [0.8, 1.3]
    result = jitter_bands(image, 1.2, 0.5, 1.7, gains)
    for band in range(2):
        values = [1.2 * gains[band] * x / 65535 for x in image[..., band].ravel().tolist()]
        mean = sum(values) / len(values)
        changed = [min(1.0, max(0.0, 0.5 * (x - mean) + mean)) ** 1.7 for x in values]
        expected = [round(65535 * x) for x in changed]
        assert result[..., band].ravel().tolist() == pytest.approx(expected, abs=2)
    assert (jitter_bands(image, 1, 1, 1, [1, 1]) == image).all()


def test_dropped_bands_are_flat_and_one_is_kept() -> None:
    image = bands(6)
    flat = []
    for seed in range(40):
        dropped = drop_bands(image, Random(seed))
        same = (dropped == image).all(axis=(0, 1))
        assert same.any()
        assert all(np.ptp(dropped[..., band]) == 0 for band in np.flatnonzero(~same))
        flat.append(int((~same).sum()))
    assert 1.5 < np.mean(flat) < 3.5
    assert (drop_bands(bands(1), Random(0)) == bands(1)).all()


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_steps_keep_the_number_of_bands(count: int) -> None:
    image, random = bands(count, 20), Random(0)
    for step in (
        RandomResizedCrop((9, 7)), HorizontalFlip(p=1), D4(), ColorJitter(0.4, 0.4, 0.4, 0.1),
        Grayscale(), GaussianBlur((1.0, 1.0), p=1), Solarize(p=1),
    ):  # fmt: skip
        result = step(image, random)
        assert (result.shape[2], result.dtype) == (count, np.uint16), step
        assert result.flags.c_contiguous


def test_turns_of_many_bands_are_those_of_three() -> None:
    image = bands(5)
    for seed in range(8):
        turned = D4().apply(image, Random(seed))
        three = D4().apply(np.ascontiguousarray(image[..., :3]), Random(seed))
        assert (turned[..., :3] == three).all()
