import os
import pickle
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing  # noqa: F401  (teaches the pickler about tensors)

from vissl_lite.data.path_list import PathList

# what files are called, and what no file can be: every text comes back
ODD = [
    "plain.jpg",
    "two\nlines.jpg",
    " spaces \t.png",
    "",
    "größe/日本/🙂.jpg",
    "e\u0301.jpg",  # not to be composed to one letter
    os.fsdecode(b"caf\xe9.jpg"),  # Latin-1: no UTF-8
    os.fsdecode(b"\xc3") + os.fsdecode(b"\xa9") + ".jpg",  # surrogates that together are UTF-8
    "nul\0.jpg",
]


def many(count: int) -> list[str]:
    return [f"/data/photos/{index // 1000:04}/photo-{index:06}.jpg" for index in range(count)]


@pytest.mark.parametrize("paths", [[], ["one.jpg"], ODD, many(9000)])
def test_paths_come_back_as_they_went_in(paths: list[str]) -> None:
    packed = PathList(path for path in paths)
    assert len(packed) == len(paths)
    assert list(packed) == paths
    assert [packed[index] for index in range(len(paths))] == paths


def test_it_is_indexed_like_a_list() -> None:
    packed = PathList(ODD)
    for index in range(-len(ODD), len(ODD)):
        assert packed[index] == ODD[index]
    assert packed[np.int64(2)] == ODD[2]
    assert [packed[index] for index in np.array([5, 0], np.int32)] == [ODD[5], ODD[0]]
    for part in (slice(None), slice(2, 5), slice(-2, None), slice(None, None, -3), slice(7, 3)):
        assert packed[part] == ODD[part]
    assert "two\nlines.jpg" in packed
    assert "lines.jpg" not in packed
    assert packed.index(ODD[4]) == 4


@pytest.mark.parametrize("index", [9, -10, 10**6])
def test_what_is_beyond_the_end_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match="of 9"):
        PathList(ODD)[index]


def test_nothing_is_indexed_by_what_is_no_number() -> None:
    with pytest.raises(TypeError):
        PathList(ODD)["plain.jpg"]  # type: ignore[call-overload]
    with pytest.raises(IndexError):
        PathList([])[0]


def test_memory_is_that_of_the_text_and_eight_bytes_a_path() -> None:
    paths = many(5000)
    packed = PathList(paths)
    text = sum(len(path) for path in paths)
    assert packed.nbytes == text + 8 * (len(paths) + 1)
    assert packed.nbytes < 0.6 * sum(sys.getsizeof(path) + 8 for path in paths)
    assert len(pickle.dumps(packed)) < packed.nbytes + 2000


def test_what_is_packed_is_not_packed_again() -> None:
    packed = PathList(ODD)
    assert PathList.of(packed) is packed
    assert list(PathList.of(ODD)) == ODD


def test_names_on_the_disk_can_be_opened(tmp_path: Path) -> None:
    names = [b"caf\xe9.jpg", "日本.jpg".encode(), b"two\nlines.jpg"]
    try:
        for name in names:
            Path(tmp_path, os.fsdecode(name)).write_bytes(name)
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    for path in PathList(entry.path for entry in os.scandir(tmp_path)):
        assert os.fsencode(path).endswith(Path(path).read_bytes())


def test_a_process_that_is_started_anew_maps_the_memory_and_copies_nothing() -> None:
    packed = PathList(ODD)
    sent = bytes(ForkingPickler.dumps(packed))  # what a spawned data worker gets
    assert b"plain.jpg" not in sent
    there = pickle.loads(sent)
    assert list(there) == list(packed) == ODD  # also here, whence it has moved
    assert there[-1] == packed[-1] == ODD[-1]


def test_it_can_be_pickled() -> None:
    assert list(pickle.loads(pickle.dumps(PathList(ODD)))) == ODD
