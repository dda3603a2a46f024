from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vissl_lite.plots import (
    Picture,
    class_colors,
    draw_boxes,
    draw_caption,
    draw_mask,
    metrics_of_classes,
    plot_confusion,
    plot_grid,
    plot_neighbors,
    plot_per_class,
    plot_views,
)


def gray(height: int = 60, width: int = 80) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def test_boxes_are_drawn_where_they_are_in_their_classes_color() -> None:
    image = gray()
    drawn = draw_boxes(image, np.array([[20.0, 30, 50, 50]]), np.array([1]), ["a", "b"])
    assert drawn.shape == image.shape
    assert class_colors(2)[1] in {tuple(drawn[row, 35]) for row in (49, 50)}  # the lower edge
    assert tuple(drawn[40, 75]) == (128, 128, 128)
    assert (image == 128).all()  # left as it was
    nothing = draw_boxes(image, np.empty((0, 4)), np.empty(0, int), ["a"])
    assert np.array_equal(nothing, image)


def test_text_of_crowded_small_boxes_is_left_out() -> None:
    """What it would hide is the objects; a box alone keeps its text, however small it is."""
    large, small = [10.0, 10, 70, 50], [12.0, 12, 18, 18]

    def colored(boxes: list[list[float]]) -> int:
        count = len(boxes)
        drawn = draw_boxes(gray(), np.array(boxes), np.zeros(count, int), ["long name"])
        return int((drawn != 128).any(axis=2).sum())

    bare = 4 * (18 - 12)  # the pixels of the small box's edge
    assert colored([small]) > 2 * bare
    text = colored([large]) - 2 * (60 + 40)
    assert text > bare
    neighbors = [[12.0 + 8 * n, 12, 18 + 8 * n, 18] for n in range(3)]
    assert colored(neighbors) < 3 * bare + text  # only the last one's is clear of the others
    assert colored([large, small]) <= colored([large]) + bare


def test_a_mask_leaves_the_first_class_and_what_is_ignored_clear() -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[:20], mask[20:40] = 1, 255
    drawn = draw_mask(gray(), mask, 3)
    assert (drawn[20:] == 128).all()
    expected = 0.45 * 128 + 0.55 * np.array(class_colors(3)[1])
    assert np.abs(drawn[5, 5] - expected).max() <= 1


def test_words_stand_below_an_image() -> None:
    large = draw_caption(gray(300, 400), "star 0.91")
    assert large.shape[1] == 400
    assert (large[:300] == 128).all()
    assert (large[300:].min(axis=2) < 100).any()
    small = draw_caption(gray(30, 40), "star")
    assert small.shape[1] == 160


@pytest.mark.parametrize("classes", [2, 10, 11, 25])
def test_colors_tell_the_first_twenty_classes_apart(classes: int) -> None:
    colors = class_colors(classes)
    assert len(colors) == classes
    assert len(set(colors)) == min(classes, 20)


@pytest.mark.slow
def test_figures_are_written_whatever_their_number(tmp_path: Path) -> None:
    scores = {"a": {"ap": 0.5, "f1": 0.25}, "$5_$10": {"ap": 1.0, "f1": 0.0}}
    plot_per_class(scores, tmp_path / "c.png")
    plot_per_class({}, tmp_path / "none.png")
    classes = ["a", "$5_$10"]  # which would be no valid formula
    plot_confusion(np.array([[5, 0], [2, 3]]), classes, tmp_path / "m.png", "pixels")
    for name in ("c", "none", "m"):
        assert Image.open(tmp_path / f"{name}.png").width > 100


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of Matplotlib, which are not drawn."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure))
    return found


def test_classes_without_a_metric_come_last(figures: list[Figure], tmp_path: Path) -> None:
    scores = {"a": {"ap": 0.9}, "b": {"mask_ap": 0.2, "ap": 0.1}, "c": {"mask_ap": 0.8, "ap": 0.3}}
    assert metrics_of_classes(scores) == ["mask_ap", "ap"]
    plot_per_class(scores, tmp_path / "c.png")
    axes: Any = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]  # upwards
    values = [bar.get_width() for bar in axes.patches]
    assert np.nan_to_num(values, nan=-1).tolist() == [0.9, 0.1, 0.3, -1, 0.2, 0.8]


def test_of_thousands_of_classes_the_best_and_the_worst_are_shown(
    figures: list[Figure], tmp_path: Path
) -> None:
    plot_per_class({f"{n:04}": {"f1": n / 2000} for n in range(2000)}, tmp_path / "c.png")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{n:04}" for n in (*range(50), *range(1950, 2000))
    ]
    assert axes.get_title() == "the 50 best and the 50 worst of 2,000 classes"
    assert figures[0].get_figheight() < 50


def test_a_confusion_matrix_of_many_classes_has_no_names(
    figures: list[Figure], tmp_path: Path
) -> None:
    for count in (100, 101):
        plot_confusion(np.eye(count, dtype=int), [str(n) for n in range(count)], tmp_path / "m.png")
    few, many = (figure.axes[0] for figure in figures)
    assert len(few.get_xticklabels()) == len(few.get_yticklabels()) == 100
    assert len(many.get_xticklabels()) == len(many.get_yticklabels()) == 0


def test_a_legend_has_each_class_in_its_color(tmp_path: Path) -> None:
    legend = dict(zip([f"class {n}" for n in range(7)], class_colors(7), strict=True))
    for rows in (1, 5):
        pictures = [[Picture(gray()), Picture(gray(90, 30))]] * rows
        plot_grid(pictures, tmp_path / "p.png", ("truth", "found"), legend)
        found = colors(tmp_path / "p.png")
        assert all(found.get(color, 0) > 100 for color in legend.values())


@pytest.mark.slow
def test_a_caption_that_is_too_long_is_cut(tmp_path: Path) -> None:
    plot_grid([[Picture(gray(), "x" * 500), Picture(gray(), "y")]], tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").width < 400


def test_words_are_cut_to_the_width_of_what_they_belong_to(tmp_path: Path) -> None:
    pictures = [[Picture(gray(), "x" * 500), Picture(gray())]]
    legend = {"w" * 100: (255, 0, 0), "b": (0, 255, 0)}
    plot_grid(pictures, tmp_path / "p.png", legend=legend, cell=320)
    page = np.asarray(Image.open(tmp_path / "p.png")).min(axis=2)
    captions, names = page[-36:-20], page[-20:]
    ends = np.flatnonzero((captions < 100).any(axis=0))[-1]
    assert 300 < ends < 326
    assert (names[:, 165:176] == 255).all()  # up to the color of the second class


def colors(file: Path) -> dict[tuple[int, ...], int]:
    """How many pixels of each color a picture has."""
    image = Image.open(file).convert("RGB")
    return {color: count for count, color in image.getcolors(image.width * image.height)}


GREEN, RED = (44, 160, 44), (214, 39, 40)


def test_predictions_are_framed_by_whether_they_are_right(tmp_path: Path) -> None:
    file = tmp_path / "e.png"
    for right, seen in ((None, set()), (True, {GREEN}), (False, {RED})):
        rows = [[Picture(gray()), Picture(gray(), "by 90° ½ (日)", right)]]
        plot_grid(rows, file, ("given", "made of it"))
        assert {one for one in (GREEN, RED) if colors(file).get(one, 0) > 300} == seen
    sizes = set()
    for count in (1, 3, 4):
        plot_grid([[Picture(gray())]] * count, file, ("given",))
        sizes.add(Image.open(file).size)
        assert colors(file)[(128, 128, 128)] > count * 10_000
    assert len(sizes) == 3


def test_small_views_are_drawn_small(tmp_path: Path) -> None:
    red, blue = np.zeros((64, 64, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    plot_views([gray(50, 300), gray(300, 50)], [[red, blue]] * 2, tmp_path / "v.png")
    counts = colors(tmp_path / "v.png")
    assert counts[(255, 0, 0)] > 10_000
    assert counts.get((0, 0, 0), 0) < 2000  # but white around them
    assert counts[(255, 0, 0)] / counts[(0, 0, 255)] == pytest.approx(4, rel=0.1)


def test_neighbors_of_another_class_are_framed_red(tmp_path: Path) -> None:
    rows, values = [[gray()] * 3] * 2, np.array([[0.91, 0.5], [0.9, -0.1]])
    plot_neighbors(rows, values, tmp_path / "n.png")
    assert not colors(tmp_path / "n.png").keys() & {GREEN, RED}
    classes = [["cat", "cat", "dog"], ["dog", "dog", "dog"]]
    plot_neighbors(rows, values, tmp_path / "n.png", classes)
    counts = colors(tmp_path / "n.png")
    assert counts[GREEN] == pytest.approx(3 * counts[RED], rel=0.2)


def test_masks_are_filled_and_outlined_in_the_color_of_their_class() -> None:
    image = np.full((100, 100, 3), 90, np.uint8)
    mask = np.zeros((100, 100), np.uint8)
    mask[30:80, 20:70] = 1
    boxes, labels = np.array([[10.0, 10, 90, 90], [0, 0, 5, 5]]), np.array([1, 0])
    drawn = draw_boxes(image, boxes, labels, ["a", "b"], masks=[mask, None])
    color = np.array(class_colors(2)[1])
    assert np.abs(drawn[50, 50] - (0.6 * 90 + 0.4 * color)).max() <= 1
    assert drawn[50, 20].tolist() == color.tolist()  # the contour
    assert drawn[50, 80].tolist() == [90] * 3
    assert (image == 90).all()
