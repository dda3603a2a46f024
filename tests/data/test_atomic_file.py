import os
from pathlib import Path

import pytest

from vissl_lite.data.atomic_file import atomic_write, check_place
from vissl_lite.errors import UserError


def test_a_file_is_there_as_a_whole_or_as_it_was_before(tmp_path: Path) -> None:
    file = tmp_path / "new" / "words.txt"
    with atomic_write(file) as part:
        part.write_text("first")
        assert not file.exists()
    with pytest.raises(ZeroDivisionError), atomic_write(file) as part:
        part.write_text(f"sec {1 / 0}")
    assert file.read_text() == "first"
    assert list(file.parent.iterdir()) == [file]


def test_places_where_nothing_can_be_made(tmp_path: Path) -> None:
    check_place(tmp_path / "a" / "b")
    check_place(tmp_path)
    file = tmp_path / "file"
    file.touch()
    check_place(file)  # may be replaced
    with pytest.raises(UserError, match=r"can't be made: .*file is a file"):
        check_place(file / "inside")
    if os.geteuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="no permission"):
            check_place(tmp_path / "new")
