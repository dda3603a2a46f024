import re
import shutil
from pathlib import Path

import pytest
from bokeh.models import Div

from tests.conftest import blobs
from vissl_lite.commands.explore import explore, folder_classes
from vissl_lite.data.images import find_images
from vissl_lite.errors import UserError


@pytest.mark.slow
def test_a_folder_becomes_one_page(encoder: Path, labelled: Path, tmp_path: Path) -> None:
    file = explore(
        encoder=str(encoder), data=str(labelled), out=str(tmp_path / "new" / "map.html"), most=20
    )
    page = file.read_text(encoding="utf-8")
    assert f"20 images of {labelled}" in page
    assert "a sample of 54, --most 54 shows all" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.?https?:", page)
    assert [f.name for f in file.parent.iterdir()] == ["map.html"]
    with pytest.raises(UserError, match="exists: give a new file, or --overwrite"):
        explore(encoder=str(encoder), data=str(labelled), out=str(file))


def test_folders_in_an_archive_are_classes(
    encoder: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", labelled)
    shown = []
    monkeypatch.setattr(
        "vissl_lite.commands.explore.map_layout",
        lambda image_map, explore: shown.append(image_map) or Div(),
    )
    explore(encoder=str(encoder), data=archive, out=str(tmp_path / "map.html"))
    assert shown[0].classes == ["blue", "green", "red"]


def test_mistakes_are_said_before_anything_is_embedded(encoder: Path, tmp_path: Path) -> None:
    for out, most, words in (
        ("map", 10, "give a name that ends in .html"),
        ("map.html", 0, "--most 0 must be at least 1"),
        ("map.html", 10, "nowhere does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            explore(encoder=str(encoder), data="nowhere", out=str(tmp_path / out), most=most)
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_not_utf8_or_look_like_html(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9 <script>"
    (folder / "a").mkdir(parents=True)
    for index, name in enumerate(("</script>", "\udcff")):
        blobs(index).save(str(folder / "a" / f"{name.replace('/', '')}.png"))
    file = explore(encoder=str(encoder), data=str(folder), out=str(tmp_path / "map.html"))
    text = file.read_text(encoding="utf-8")
    assert "caf? &lt;script&gt;" in text


def tree(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        blobs(0, 8, 8).save(folder / file)
    return folder


def test_folders_are_classes_where_they_look_like_it(tmp_path: Path) -> None:
    def classes(folder: Path, *more: Path) -> tuple[list[int] | None, list[str]]:
        sources = [str(one) for one in (folder, *more)]
        labels, names = folder_classes(sources, find_images(sources))
        return None if labels is None else labels.tolist(), names

    plain = tree(tmp_path / "plain", "cat/1.png", "cat/2.png", "dog/1.png")
    parts = tree(tmp_path / "parts", "train/cat/1.png", "test/dog/1.png", "val/cat/3.png")
    deep = tree(tmp_path / "deep", "cat/1.png", "dog/more/1.png")
    mixed = tree(tmp_path / "mixed", "1.png", "cat/1.png")
    one = tree(tmp_path / "one", "cat/1.png")
    many = tree(tmp_path / "many", *(f"{index}/1.png" for index in range(51)))
    assert classes(plain) == ([0, 0, 1], ["cat", "dog"])
    assert classes(parts) == ([1, 0, 0], ["cat", "dog"])
    assert classes(plain, parts) == ([0, 0, 1, 1, 0, 0], ["cat", "dog"])
    named = tree(tmp_path / "named", "Training/cat/1.png", "eval/dog/1.png")
    assert classes(named) == ([0, 1], ["cat", "dog"])
    unsorted = tree(tmp_path / "unsorted", "train/1.png", "test/1.png")
    for folder in (deep, mixed, one, many, unsorted):
        assert classes(folder) == (None, [])
    (tmp_path / "list.txt").write_text("plain/cat/1.png\nplain/dog/1.png\n")
    assert classes(tmp_path / "list.txt") == (None, [])
