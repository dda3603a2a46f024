"""Reports opened in a real browser."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from vissl_lite.cli import main
from vissl_lite.evaluation.embedding import ImageMap
from vissl_lite.report.run_report import write_report

# Whether something is drawn: how many colors there are in a canvas.
COLORS = """canvas => {
  const {width, height} = canvas
  const data = new Uint32Array(
    canvas.getContext("2d").getImageData(0, 0, width, height).data.buffer)
  return new Set(data).size
}"""

# Where in the window the point at the origin of the map is.
ORIGIN = """() => {
  const [map] = [...Bokeh.index.query(view => view.model.type == "Figure"
    && view.model.renderers[0].data_source.data.thumbnail != null)]
  const {left, top} = map.canvas_view.el.getBoundingClientRect()
  return [left + map.frame.x_scale.compute(0), top + map.frame.y_scale.compute(0)]
}"""


def small_map() -> ImageMap:
    """Nine images in two classes, in a square around the origin."""
    places = np.stack(np.meshgrid([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]), axis=-1).reshape(9, 2)
    thumbnails = []
    for index in range(9):
        buffer = BytesIO()
        Image.new("RGB", (64, 64), (25 * index, 90, 200)).save(buffer, "JPEG")
        thumbnails.append(buffer.getvalue())
    others = np.array([[(index + 1) % 9, (index + 2) % 9] for index in range(9)])
    return ImageMap(
        paths=[f"/images/{index}.png" for index in range(9)],
        labels=np.arange(9) % 2,
        classes=["even", "odd"],
        coordinates={"pca": places},
        neighbors=others,
        similarities=np.full((9, 2), 0.5),
        outlier_score=np.linspace(0, 1, 9),
        duplicates=np.empty((0, 2), np.int64),
        thumbnails=thumbnails,
    )


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pretrain on images of which one is broken, so that there is a warning."""
    folder = tmp_path_factory.mktemp("runs")
    data, out = folder / "data", folder / "run"
    data.mkdir()
    for path in photos.rglob("*.jpg"):
        (data / path.name).write_bytes(path.read_bytes())
    (data / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    given = ("--backbone", "test_resnet", "--image_size", "32", "--epochs", "2",
             "--batch_size", "8", "--num_workers", "0")  # fmt: skip
    assert main(["pretrain", "--data", str(data), "--out", str(out), *given]) == 0
    small_map().save(out / "map.npz")
    write_report(out)
    return out


@pytest.mark.slow
def test_a_run_as_a_person_opens_it(run: Path, page: Page) -> None:
    page.goto((run / "report.html").as_uri())
    expect(page.locator("h1")).to_have_text("run")
    warning = page.locator("section").first.locator(".alert.warn").first
    expect(warning).to_contain_text("broken.jpg")
    assert warning.bounding_box()["y"] < page.locator(".tile").first.bounding_box()["y"]
    for heading in ("Curves", "Map of the images", "Provenance"):
        expect(page.locator("h2", has_text=heading)).to_be_visible()
    log = page.locator("summary", has_text="lines of the log")
    expect(page.locator("details pre")).to_be_hidden()
    log.click()
    expect(page.locator("details pre")).to_contain_text("The encoder is in")


@pytest.mark.slow
def test_curves_are_drawn_and_read_by_hovering(run: Path, page: Page) -> None:
    page.goto((run / "report.html").as_uri())
    chart = page.locator(".card", has=page.get_by_role("heading", name="loss", exact=True))
    chart.scroll_into_view_if_needed()
    canvas = chart.locator("canvas").first
    expect(canvas).to_be_visible()
    page.wait_for_function("() => Bokeh.documents.length > 0 && Bokeh.documents[0].is_idle")
    assert canvas.evaluate(COLORS) > 3
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator(".bk-Tooltip").first).to_contain_text("loss")


@pytest.mark.slow
def test_the_map_is_drawn_and_shows_an_image_where_it_is_hovered(run: Path, page: Page) -> None:
    page.goto((run / "report.html").as_uri())
    section = page.locator("section", has=page.locator("h2", has_text="Map of the images"))
    section.scroll_into_view_if_needed()
    page.wait_for_function("() => Bokeh.documents.length > 0 && Bokeh.documents[0].is_idle")
    assert section.locator("canvas").first.evaluate(COLORS) > 10
    tooltip = page.locator(".bk-Tooltip")
    expect(tooltip).to_have_count(0)
    page.mouse.move(*page.evaluate(ORIGIN))
    shown = tooltip.locator("img")
    expect(shown).to_be_visible()
    assert shown.evaluate("image => image.naturalWidth") == 64
    expect(tooltip).to_contain_text("4.png")


@pytest.mark.slow
def test_nothing_is_cut_off_in_a_narrow_window(run: Path, page: Page) -> None:
    page.set_viewport_size({"width": 380, "height": 800})
    page.emulate_media(color_scheme="dark")
    page.goto((run / "report.html").as_uri())
    page.wait_for_function("() => Bokeh.documents.length > 0 && Bokeh.documents[0].is_idle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in background.strip("rgb()").split(",")) < 80
