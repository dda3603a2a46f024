from base64 import b64decode
from typing import Any

import numpy as np
import pytest
from bokeh.embed import components
from bokeh.model import Model
from bokeh.models import (
    CDSView,
    ColumnDataSource,
    Div,
    LayoutDOM,
    MultiChoice,
    Plot,
    RadioButtonGroup,
)

from vissl_lite.evaluation.embedding import ImageMap
from vissl_lite.report.map import common_folder, map_layout


def image_map(images: int = 12, classes: int = 3, methods: tuple[str, ...] = ("pca",)) -> ImageMap:
    random = np.random.default_rng(0)
    return ImageMap(
        paths=[f"/data/<b>{index}</b> $$x$$.jpg" for index in range(images)],
        labels=np.arange(images) % classes if classes else None,
        classes=[f"<i>{index}" for index in range(classes)],
        coordinates={name: random.normal(size=(images, 2)) for name in methods},
        neighbors=np.stack([(np.arange(images) + step) % images for step in (1, 2)], axis=1),
        similarities=np.full((images, 2), 0.5, np.float32),
        outlier_score=np.linspace(0, 1, images, dtype=np.float32),
        duplicates=np.array([[1, 4]]),
        thumbnails=[b"thumbnail %d" % index for index in range(images)],
    )


def parts(layout: LayoutDOM, kind: type[Model]) -> list[Any]:
    found = [model for model in layout.references() if isinstance(model, kind)]
    return sorted(found, key=lambda model: int(model.id.removeprefix("p")))


@pytest.mark.slow
def test_every_image_is_one_row_and_every_class_a_layer_of_it() -> None:
    layout = map_layout(image_map())
    (source,) = parts(layout, ColumnDataSource)
    assert [b64decode(one) for one in source.data["thumbnail"]] == image_map().thumbnails
    layers = [view.filter.indices for view in parts(layout, CDSView)]
    assert sorted(layers) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    (legend,) = parts(layout, Plot)[0].legend
    assert legend.click_policy == "hide"
    assert len(legend.items) == 3


@pytest.mark.slow
@pytest.mark.parametrize("classes", [0, 60])
def test_without_classes_and_with_too_many_there_is_no_legend(classes: int) -> None:
    layout = map_layout(image_map(60, classes), explore=True)
    assert list(parts(layout, Plot)[0].legend) == []
    assert parts(layout, MultiChoice) == []
    colors = set(parts(layout, ColumnDataSource)[0].data["color"])
    assert len(colors) == (20 if classes else 1)


@pytest.mark.slow
def test_a_class_without_images_has_no_layer() -> None:
    given = image_map()
    given.classes.append("empty")
    assert len(parts(map_layout(given), Plot)[0].legend[0].items) == 3


def test_a_class_that_is_marked_is_large() -> None:
    layout = map_layout(image_map(), marked="<i>1")
    layers = parts(layout, Plot)[0].renderers
    assert [(layer.glyph.marker, layer.glyph.size) for layer in layers] == [
        ("circle", 8),
        ("diamond", 15),
        ("circle", 8),
    ]


@pytest.mark.slow
def test_two_maps_have_a_switch() -> None:
    assert parts(map_layout(image_map()), RadioButtonGroup) == []
    layout = map_layout(image_map(methods=("pca", "umap")))
    assert parts(layout, RadioButtonGroup)[0].labels == ["UMAP", "PCA"]
    shown = parts(layout, ColumnDataSource)[0].data
    assert np.array_equal(shown["x"], shown["umap_x"])
    assert not np.array_equal(shown["x"], shown["pca_x"])


@pytest.mark.slow
def test_exploring_lists_the_odd_ones_first_and_the_pairs() -> None:
    *_, odd, pairs = parts(map_layout(image_map(), explore=True), Div)
    assert odd.text.index("1.000") < odd.text.index("0.909") < odd.text.index("0.000")
    assert "selected.indices = [1] }" in pairs.text
    assert "selected.indices = [4] }" in pairs.text
    assert "<i>" not in pairs.text
    assert "&lt;i&gt;1" in pairs.text
    assert len(parts(map_layout(image_map()), Div)) == 1  # in a run's report


@pytest.mark.slow
def test_one_image_alone_can_be_shown() -> None:
    given = image_map(1, 0)
    alone = ImageMap(
        given.paths, None, [], given.coordinates, np.empty((1, 0), int), np.empty((1, 0)),
        given.outlier_score, np.empty((0, 2), int), given.thumbnails,
    )  # fmt: skip
    assert "Near-duplicates" in components(map_layout(alone, explore=True))[0]


def test_the_folder_that_all_paths_share() -> None:
    assert common_folder(["/a/bc/1.jpg", "/a/bd/2.jpg"]) == "/a/"
    assert common_folder(["/a/b/1.jpg"]) == "/a/b/"
    assert common_folder(["/1.jpg", "/a/2.jpg"]) == "/"
