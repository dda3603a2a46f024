import numpy as np
import pytest

from vissl_lite.transfer.sources.shapes import (
    Shape,
    coco_shape,
    draw_shape,
    labelme_shape,
    outline_of,
)


def drawn(shape: Shape | None, size: tuple[int, int], within: tuple[float, float]) -> np.ndarray:
    assert shape is not None
    mask = np.zeros(size, np.uint8)
    draw_shape(mask, shape, within)
    return mask


def holds(points: np.ndarray, x: float, y: float) -> bool:
    """Whether a ray from a point to the right crosses the edges of a polygon oddly often."""
    inside = False
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if (y1 <= y) != (y2 <= y) and x < x1 + (y - y1) * (x2 - x1) / (y2 - y1):
            inside = not inside
    return inside


@pytest.mark.parametrize("seed", range(6))
def test_a_polygon_holds_the_pixels_whose_centers_it_holds(seed: int) -> None:
    random = np.random.default_rng(seed)
    points = random.uniform(-4, 20, (int(random.integers(3, 9)), 2)).astype(np.float32)
    mask = drawn(Shape((points.tobytes(),)), (14, 16), (0, 0))
    expected = [[holds(points.astype(float), x + 0.5, y + 0.5) for x in range(16)]
                for y in range(14)]  # fmt: skip
    assert np.array_equal(mask, np.array(expected))


def test_a_polygon_is_scaled_to_the_mask() -> None:
    mask = drawn(coco_shape([[2, 1, 6, 1, 6, 4, 2, 4]], (10, 20)), (20, 20), (10, 20))
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 7, 2, 5)
    assert mask.sum() == 24


def test_a_polygon_too_thin_for_a_pixel_is_drawn() -> None:
    mask = drawn(coco_shape([[1, 2.6, 7, 2.6, 7, 2.8, 1, 2.8]], (8, 8)), (8, 8), (8, 8))
    assert mask.sum() >= 5


def test_run_lengths_as_numbers_and_as_text() -> None:
    size = [3, 4]
    for counts in ([4, 2, 6], [4, 2], "426"):
        mask = drawn(coco_shape({"size": size, "counts": counts}, (3.0, 4.0)), (3, 4), (3, 4))
        assert np.argwhere(mask).tolist() == [[1, 1], [2, 1]]
    assert coco_shape({"size": size, "counts": [4, 2, 6]}, (4.0, 3.0)) is None  # another size


def test_shapes_of_labelme() -> None:
    square = labelme_shape({"points": [[1, 1], [4, 3]], "shape_type": "rectangle"})
    assert drawn(square, (6, 6), (6, 6)).sum() == 6
    circle = labelme_shape({"points": [[8, 8], [8, 12]], "shape_type": "circle"})
    assert drawn(circle, (16, 16), (16, 16)).sum() == pytest.approx(np.pi * 16, rel=0.1)
    assert labelme_shape({"points": [[1, 1], [4, 3]], "shape_type": "line"}) is None


def test_the_area() -> None:
    outline = outline_of([0, 0, 4, 0, 4, 3, 0, 3])
    assert outline is not None
    assert Shape((outline,)).area == 12
    assert Shape(runs=np.array([2, 3, 4, 5], np.uint32).tobytes()).area == 8
