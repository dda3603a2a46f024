"""Text files of paths."""

from pathlib import Path

import pytest

from vissl_lite.data.text_file import read_paths, write_paths
from vissl_lite.errors import UserError


def test_any_path_is_read_back(tmp_path: Path) -> None:
    paths = ["/a b.png", "/two\nlines\udce9.png", '"quoted".png', "/a\\n.png", "/c\r.png", "/日\n"]
    write_paths(tmp_path / "paths.txt", paths)
    assert read_paths(tmp_path / "paths.txt") == paths
    assert (tmp_path / "paths.txt").read_bytes().startswith(b"/a b.png\n")


def test_a_damaged_list_of_paths_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "paths.txt").write_text('"/a\n')
    with pytest.raises(UserError, match=r"paths\.txt is damaged"):
        read_paths(tmp_path / "paths.txt")
