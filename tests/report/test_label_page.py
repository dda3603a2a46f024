"""What the page for labelling holds; test_label_browser.py uses it."""

import json
import logging
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vissl_lite.data.image_reader import ImageReader
from vissl_lite.errors import UserError
from vissl_lite.report.label_page import LabelImage, LabelledNeighbor, write_label_page


def drawn(file: Path, size: tuple[int, int] = (8, 8)) -> str:
    Image.new("RGB", size, (200, 30, 90)).save(file)
    return str(file)


def content(file: Path) -> dict[str, Any]:
    text = file.read_text()
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', text)
    assert found is not None
    return json.loads(found[1])


def test_pictures_are_reduced_and_thumbnails_of_neighbors_are_stored_once(tmp_path: Path) -> None:
    paths = [drawn(tmp_path / f"{name}.png", (900, 600)) for name in "abcd"]
    neighbors = [LabelledNeighbor(paths[2], "moss", 0.5), LabelledNeighbor(paths[3], "fern", 0.4)]
    images = [LabelImage(paths[0], neighbors), LabelImage(paths[1], neighbors[:1])]
    write_label_page(tmp_path / "label.html", images, ["fern", "alga"], "Plants")
    stored = content(tmp_path / "label.html")
    assert len(stored["thumbnails"]) == 2
    assert [one["neighbors"] for one in stored["images"]] == [
        [[0, "moss", 0.5], [1, "fern", 0.4]],
        [[0, "moss", 0.5]],
    ]
    assert stored["classes"] == ["fern", "alga", "moss"]
    picture = stored["images"][0]["picture"].partition(",")[2]
    assert Image.open(BytesIO(b64decode(picture))).size == (512, 341)


def test_progress_is_kept_by_the_list_of_images_alone(tmp_path: Path) -> None:
    images = [LabelImage(drawn(tmp_path / f"{name}.png")) for name in "abc"]

    def key(chosen: list[LabelImage], title: str) -> str:
        write_label_page(tmp_path / "label.html", chosen, [title], title)
        return content(tmp_path / "label.html")["key"]

    assert key(images, "one") == key(images, "another") != key(images[:2], "one")


def test_unreadable_images_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = str(tmp_path / "broken.png")
    whole = LabelImage(drawn(tmp_path / "a.png"), [LabelledNeighbor(broken, "moss", 0.5)])
    with caplog.at_level(logging.WARNING):
        write_label_page(tmp_path / "label.html", [LabelImage(broken), whole], [], "Plants")
    assert "broken.png" in caplog.text
    (shown,) = content(tmp_path / "label.html")["images"]
    assert shown["path"] == whole.path
    assert shown["neighbors"] == [[None, "moss", 0.5]]  # its vote counts without a picture
    with pytest.raises(UserError, match="none of the 1 images"):
        write_label_page(tmp_path / "none.html", [LabelImage(broken)], [], "Plants")
    assert not (tmp_path / "none.html").exists()


def test_names_that_are_not_utf8_are_in_the_page_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = drawn(tmp_path / "a\udce4.png")
    write_label_page(tmp_path / "label.html", [LabelImage(path)], [], "Plants")
    assert content(tmp_path / "label.html")["images"][0]["path"] == path
    assert not caplog.text


def test_similar_images_are_named_by_their_places_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken, *paths = (
        str(tmp_path / "broken.png"), *(drawn(tmp_path / f"{name}.png") for name in "ab")
    )  # fmt: skip
    images = [
        LabelImage(broken, similar=[(paths[0], 0.9)]),
        LabelImage(paths[0], similar=[(broken, 0.9), (paths[1], 0.12345)]),
        LabelImage(paths[1], similar=[(paths[0], 0.12345)]),
    ]
    write_label_page(tmp_path / "label.html", images, [], "Plants")
    stored = content(tmp_path / "label.html")
    assert [one["similar"] for one in stored["images"]] == [[[1, 0.1235]], [[0, 0.1235]]]


def brightness(uri: str) -> float:
    return float(np.asarray(Image.open(BytesIO(b64decode(uri.partition(",")[2])))).mean())


def deep(folder: Path) -> list[str]:
    """A dark and a bright image of 16 bits."""
    noise = np.random.default_rng(0).integers(0, 1000, (24, 32), np.uint16)
    paths = [str(folder / f"{name}.tif") for name in ("dark", "bright")]
    for path, offset in zip(paths, (0, 50_000), strict=True):
        Image.fromarray(noise + np.uint16(offset)).save(path)
    return paths


def test_images_of_16_bits_are_as_bright_as_the_reader_has_them(tmp_path: Path) -> None:
    paths = deep(tmp_path)
    images = [
        LabelImage(paths[0], [LabelledNeighbor(paths[1], "moss", 0.5)]),
        LabelImage(paths[1]),
    ]
    file = tmp_path / "label.html"
    one = ImageReader(bands=(0,), low=(0.0,), high=(60_000.0,), mean=(0.5,), std=(0.2,))
    write_label_page(file, images, [], "Plants", reader=one)
    dark, bright = content(file)["images"]
    for name in ("picture", "thumbnail"):
        assert brightness(dark[name]) < 10
        assert brightness(bright[name]) > 200
    assert brightness(content(file)["thumbnails"][0]) > 200
    assert "do not compare" not in file.read_text()


def test_the_page_says_which_brightness_cannot_be_compared(tmp_path: Path) -> None:
    paths = [*deep(tmp_path), drawn(tmp_path / "a.png")]
    file = tmp_path / "label.html"
    write_label_page(file, [LabelImage(path) for path in paths], [], "Plants")
    dark, bright, _ = content(file)["images"]
    assert brightness(dark["picture"]) == pytest.approx(brightness(bright["picture"]), abs=2)
    assert "Each of 2 of the 3 pictures is drawn from the range of values" in file.read_text()
    own = ImageReader(bands=(0,), scope="image", mean=(0.5,), std=(0.2,))
    write_label_page(file, [LabelImage(path) for path in paths[:2]], [], "Plants", reader=own)
    assert "Each picture is drawn from the range of values" in file.read_text()


def test_a_hundred_photographs_make_a_page_of_some_megabytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((1024, 768), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "photo.jpg", quality=95)
    images = [LabelImage(str(tmp_path / "photo.jpg"))] * 5
    write_label_page(tmp_path / "label.html", images, [], "Photographs")
    assert (tmp_path / "label.html").stat().st_size < 5 * 80_000
