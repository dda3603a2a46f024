"""What commands add to their runs, and what becomes of failures."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vissl_lite.report.additions import add_test_pictures


def test_pictures_that_fail_do_not_end_a_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def visualize(*_: object) -> None:
        raise KeyError("mask_ap")

    nothing: Any = None
    task: Any = SimpleNamespace(visualize=visualize)
    add_test_pictures(tmp_path, task, nothing, nothing, nothing)
    assert "the pictures of the test images can't be made: KeyError('mask_ap')" in caplog.text


def test_a_full_disk_ends_it(tmp_path: Path) -> None:
    def visualize(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    nothing: Any = None
    task: Any = SimpleNamespace(visualize=visualize)
    with pytest.raises(OSError, match="no space left"):
        add_test_pictures(tmp_path, task, nothing, nothing, nothing)
