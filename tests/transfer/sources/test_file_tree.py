import unicodedata
from pathlib import Path

import pytest

from vissl_lite.transfer.sources.file_tree import FileTree


def tree_of(folder: Path, *files: str) -> FileTree:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return FileTree(folder)


def test_litter_is_not_listed(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "a.jpg", ".b.jpg", "Thumbs.db", "c/desktop.ini", "__MACOSX/d.jpg")
    assert tree.files == ["a.jpg"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("train/1.jpg", "train/1.jpg"),
        ("1.jpg", None),  # there are two
        ("2", "val/2.jpg"),
        ("C:\\pets\\val\\2.jpg", "val/2.jpg"),
        ("/home/somebody/pictures/2.jpg", "val/2.jpg"),  # the tree has no folder pictures
        ("train/2.jpg", None),  # another image: the tree has a folder train
        ("val/2.png", None),
        ("", None),
    ],
)
def test_the_image_of_an_annotation(name: str, found: str | None, tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "train/1.jpg", "val/1.jpg", "val/2.jpg")
    assert tree.image(name) == (None if found is None else str(tmp_path / found))


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_names_in_either_unicode_form_are_found(stored: str, tmp_path: Path) -> None:
    names = {form: unicodedata.normalize(form, "Prüfung/Tür.jpg") for form in ("NFC", "NFD")}
    tree = tree_of(tmp_path, names[stored])
    for name in names.values():
        assert tree.image(name) == str(tmp_path / names[stored])


def test_an_image_of_another_part_is_not_taken(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "val/1.jpg")
    assert tree.image("1.jpg", "train") is None
    assert tree.image("1.jpg", "val") == str(tmp_path / "val/1.jpg")
