"""The map of ``explore`` in a browser."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from vissl_lite.data.images import find_images
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.evaluation.embedding import ImageMap, make_map
from vissl_lite.report.map import map_layout
from vissl_lite.report.page import Block, write_page

CLASSES = ["green", "<img src=x onerror=fail()>", "$$x$$"]

# Where a point is drawn, in pixels of the window
_PLACE = """([index]) => {
  const models = [...Bokeh.documents[0]._all_models.values()]
  const plot = models.find((model) => model.type == "Figure")
  const view = Bokeh.index.find_one(plot)
  const data = plot.renderers[0].data_source.data
  const box = view.canvas_view.el.getBoundingClientRect()
  return {x: box.x + view.frame.x_scale.compute(data.x[index]),
          y: box.y + view.frame.y_scale.compute(data.y[index])}
}"""

_STATE = """() => {
  const plot = [...Bokeh.documents[0]._all_models.values()].find((one) => one.type == "Figure")
  return {
    selected: [...plot.renderers[0].data_source.selected.indices].sort((a, b) => a - b),
    visible: plot.renderers.map((layer) => layer.visible)
  }
}"""


@pytest.fixture(scope="module")
def image_map(tmp_path_factory: pytest.TempPathFactory) -> ImageMap:
    """24 images of three classes in a grid of 6 columns and 4 rows; names that look like HTML."""
    folder = tmp_path_factory.mktemp("explore & <b>")
    for index in range(24):
        image = np.random.default_rng(index).integers(0, 100, (32, 32, 3), dtype=np.uint8)
        image[..., index % 3] += 150
        Image.fromarray(image).save(folder / f"{index:02} <u> $$y$$.png")
    paths = find_images([folder])
    made = make_map(build_encoder("test_resnet", 32), paths, np.arange(24) % 3, CLASSES)
    grid = np.stack([np.arange(24) % 6, np.arange(24) // 6], axis=1).astype(np.float32)
    return replace(made, coordinates={"pca": grid[:, ::-1], "umap": grid})


@pytest.fixture
def opened(page: Page, image_map: ImageMap, tmp_path: Path) -> Page:
    file = tmp_path / "map.html"
    write_page(file, "Map", [Block("", map_layout(image_map, explore=True))])
    page.goto(file.as_uri())
    page.wait_for_function("() => window.Bokeh?.documents[0]?.is_idle")
    return page


def place(page: Page, index: int) -> dict[str, Any]:
    return page.evaluate(_PLACE, [index])


def cards(page: Page, heading: str) -> Locator:
    return page.locator(".bk-Div", has_text=heading).locator("button")


def color(page: Page, index: int) -> tuple[int, int, int]:
    """Of the screen where a point is."""
    where = place(page, index)
    clip = {"x": where["x"] - 1, "y": where["y"] - 1, "width": 2, "height": 2}
    return Image.open(BytesIO(page.screenshot(clip=clip))).convert("RGB").getpixel((0, 0))


@pytest.mark.slow
def test_hovering_shows_the_image_with_its_class_and_path(
    opened: Page, image_map: ImageMap
) -> None:
    for index in (0, 13):
        where = place(opened, index)
        opened.mouse.move(where["x"], where["y"])
        shown = opened.locator(".bk-Tooltip img")
        expect(shown).to_have_count(1)
        assert shown.evaluate("image => image.naturalWidth") == 64
        words = shown.evaluate("image => image.parentElement.innerText")
        assert CLASSES[index % 3] in words
        assert f"{index:02} <u> $$y$$.png" in words
    assert len({color(opened, index) for index in (9, 10, 11)}) == 3
    assert color(opened, 9) == color(opened, 15)


@pytest.mark.slow
def test_clicking_a_point_or_an_odd_one_shows_its_nearest_neighbors(
    opened: Page, image_map: ImageMap
) -> None:
    where = place(opened, 8)
    opened.mouse.click(where["x"], where["y"])
    row = cards(opened, "nearest neighbors, with")
    expect(row).to_have_count(11)  # itself, and ten
    names = [Path(image_map.paths[index]).name for index in (8, *image_map.neighbors[8])]
    assert row.evaluate_all("all => all.map((one) => one.title)") == names
    assert row.locator("img").evaluate_all("all => all.every((one) => one.naturalWidth == 64)")
    row.nth(1).click()  # a neighbor shows its own
    expect(row.first).to_have_attribute("title", names[1])
    assert opened.evaluate(_STATE)["selected"] == [int(image_map.neighbors[8, 0])]
    odd = cards(opened, "Outliers")
    expect(odd).to_have_count(24)
    odd.first.click()
    assert opened.evaluate(_STATE)["selected"] == [int(image_map.outlier_score.argmax())]
    expect(cards(opened, "nearest neighbors, with")).to_have_count(11)


@pytest.mark.slow
def test_selected_paths_are_saved_as_a_list_that_reads_back(
    opened: Page, image_map: ImageMap, tmp_path: Path
) -> None:
    button = opened.locator("button.bk-btn", has_text="Save the paths")
    expect(button).to_be_disabled()
    opened.evaluate("""() => { const all = [...Bokeh.documents[0]._all_models.values()]
      all.find((one) => one.type == "BoxSelectTool").active = true }""")
    first, last = place(opened, 6), place(opened, 20)  # columns 0 to 2, rows 1 to 3
    opened.mouse.move(first["x"] - 20, first["y"] + 20)
    opened.mouse.down()
    opened.mouse.move(last["x"] + 20, last["y"] - 20, steps=4)
    opened.mouse.up()
    chosen = [6, 7, 8, 12, 13, 14, 18, 19, 20]
    assert opened.evaluate(_STATE)["selected"] == chosen
    expect(cards(opened, "9 images selected")).to_have_count(9)
    with opened.expect_download() as download:
        button.click()
    assert download.value.suggested_filename == "selected.txt"
    download.value.save_as(tmp_path / "elsewhere" / "selected.txt")
    read = find_images([tmp_path / "elsewhere" / "selected.txt"])
    assert sorted(read) == [image_map.paths[index] for index in chosen]


@pytest.mark.slow
def test_classes_are_filtered_and_the_switch_moves_the_points(opened: Page) -> None:
    opened.locator(".choices").click()
    opened.locator(".choices__item--selectable", has_text="$$x$$").click()
    assert opened.evaluate(_STATE)["visible"] == [False, False, True]
    assert opened.locator(".choices img").count() == 0  # a class name is text
    for index, expected in ((11, [11]), (9, [])):
        for _ in range(50):  # the map moves down as the list of classes closes
            where = place(opened, index)
            opened.mouse.click(where["x"], where["y"])
            opened.wait_for_timeout(200)
            if opened.evaluate(_STATE)["selected"] == expected:
                break
        assert opened.evaluate(_STATE)["selected"] == expected
    before = place(opened, 1)
    opened.locator("button.bk-btn", has_text="PCA").click()
    after = place(opened, 1)
    assert before["x"] - 50 > after["x"]  # to the second row of the first column
    assert place(opened, 6)["x"] - 50 > after["x"]
