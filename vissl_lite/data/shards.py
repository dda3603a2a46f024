"""Shards: tar files of images, on a disk or behind URLs, as WebDataset has them.

An image is a sample of WebDataset's: the members of a tar that follow one another and share a key,
which is their path up to the first dot of the file name (Aizman, Maltby & Breuel 2019, "High
Performance I/O For Large Scale Deep Learning", section IV). Its first member whose whole extension
is that of an image file is read, others such as labels are passed over.
"""

import os
import re
import tarfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vissl_lite.data.images import EXTENSIONS

# Seconds to wait before a connection that was lost is tried again, from the image that it was at.
PAUSES = (1.0, 4.0)

# What reading a tar raises that is damaged or that can't be reached.
BROKEN_TAR = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error)

# How curl ends (its manual, section "Exit codes"). What is ours to stop ends by a closed pipe; what
# the server refuses it will refuse again, and curl has waited for a busy one by itself.
_STOPPED, _REFUSED = (0, 23, 141, -13), 22
_CURL = {
    6: "the host is unknown",
    7: "there is no connection",
    18: "the connection was lost",
    22: "the server refuses it, as it does what is not there",
    28: "the server does not answer",
    52: "the connection was lost",
    56: "the connection was lost",
}


class BrokenShardError(Exception):
    """A shard can't be read from some image on.

    Args:
        at: how many images come before.
        why: what went wrong.
    """

    def __init__(self, at: int, why: str) -> None:
        super().__init__(why)
        self.at = at


class Member(NamedTuple):
    """An image in a shard.

    Attributes:
        position: its number in the shard.
        name: in the tar.
        data: the image file's bytes.
    """

    position: int
    name: str
    data: bytes


@dataclass(frozen=True)
class Shards:
    """Shards and how many images each holds.

    Attributes:
        urls: S files or URLs.
        counts: ``(S,)`` int64, images in each.
        image_bytes: size of an image file on average; None where it is not known.
    """

    urls: list[str]
    counts: np.ndarray
    image_bytes: float | None = None

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def starts(self) -> np.ndarray:
        """``(S,)`` the number of each shard's first image, in the order of ``urls``."""
        return np.cumsum(self.counts) - self.counts

    def place(self, shard: int) -> str:
        """Where a shard is, from wherever one looks."""
        return for_gopen(self.urls[shard])

    def read(self, shard: int, positions: Sequence[int] | np.ndarray) -> Iterator[Member]:
        """Some images of a shard, one after the other.

        A connection that is lost is tried again from the image that it was at.

        Args:
            shard: which.
            positions: numbers of images in it, ascending.

        Raises:
            BrokenShardError: not all of them are there.
        """
        left = np.asarray(positions)
        pauses = list(PAUSES)
        while len(left):
            try:
                for member in _read(self.urls[shard], left):
                    left = left[1:]
                    pauses = list(PAUSES)
                    yield member
                return
            except _LostError as error:
                if not pauses or not error.again:
                    raise BrokenShardError(error.at, str(error)) from None
                time.sleep(pauses.pop(0))


class _LostError(BrokenShardError):
    """A shard ended too early; ``again`` where another try may help."""

    def __init__(self, at: int, why: str, again: bool) -> None:
        super().__init__(at, why)
        self.again = again


class ImageMembers:
    """Which members of a tar are images, told in their order.

    Attributes:
        count: how many were.
        whole: how many of them are there to their end, as another member follows.
    """

    def __init__(self) -> None:
        self.count = self.whole = 0
        self._key: str | None = None

    def __call__(self, name: str) -> bool:
        self.whole = self.count
        folder, _, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        # WebDataset passes over what __ stands around, as its own meta data
        if not stem or f".{extension.lower()}" not in EXTENSIONS or re.match(r"__[^/]*__/", name):
            return False
        key = f"{folder}/{stem}"
        if key == self._key:  # another image of the sample
            return False
        self._key = key
        self.count += 1
        return True


def _read(url: str, positions: np.ndarray) -> Iterator[Member]:
    """Images of a shard from one attempt to open it."""
    from webdataset.gopen import Pipe, gopen, set_options
    from webdataset.tariterators import tar_file_iterator

    wanted, end = set(positions.tolist()), int(positions[-1]) + 1
    images, stream = ImageMembers(), None
    given = -1

    def chosen(name: str) -> bool:
        return images(name) and images.count - 1 in wanted

    why = ""
    try:
        stream = gopen(for_gopen(url))
        set_options(stream, ignore_errors=True)  # what arrived is read before the loss is noticed
        for member in tar_file_iterator(stream, select_files=chosen):
            given = images.count - 1
            yield Member(given, member["fname"], member["data"])
            if images.count == end:
                return
    except BROKEN_TAR as error:
        why = f"{getattr(error, 'strerror', None) or error}".split(" @ ")[0]
        if given < images.count - 1:  # of an image that is cut off the header was there
            images.count = images.whole
    finally:
        if stream is not None:
            with suppress(OSError):
                stream.close()
    status: int = stream.status if isinstance(stream, Pipe) else 0
    if status not in _STOPPED:
        program = url.split(":")[0]
        curl = _CURL.get(status) if program in ("http", "https") else None
        why = curl or f"{program} ended with {status}"
    elif not why:
        why = "the file ends there"
    raise _LostError(images.count, why, again=status not in (*_STOPPED, _REFUSED))


def for_gopen(url: str) -> str:
    """A local name, made absolute, does not look like a URL."""
    return url if is_remote(url) else os.path.abspath(url)


def is_remote(url: str) -> bool:
    """Whether a shard is behind a URL or a command."""
    return not os.path.exists(url) and ("://" in url or url.startswith("pipe:"))
