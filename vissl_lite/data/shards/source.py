"""Shards: local or remote tar files of images in the WebDataset format.

An image is a WebDataset sample: consecutive members of a tar that share a key, which is their path
up to the first dot of the file name (Aizman, Maltby & Breuel 2019, "High Performance I/O For Large
Scale Deep Learning", section IV). The first member of a sample whose full extension is that of an
image file is read; others, such as labels, are skipped.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vissl_lite.data.formats.common import ARRAY_SUFFIXES, FRAME_SUFFIX
from vissl_lite.data.images import EXTENSIONS
from vissl_lite.data.reading import open_regular
from vissl_lite.data.shards.download import open_url
from vissl_lite.data.shards.tar_reader import BROKEN_TAR, TarReader

log = logging.getLogger(__name__)


class BrokenShardError(Exception):
    """A shard can't be read beyond some image.

    Args:
        at: Number of images before the failure.
        why: Reason.
    """

    def __init__(self, at: int, why: str) -> None:
        super().__init__(why)
        self.at = at


class Member(NamedTuple):
    """An image in a shard.

    Attributes:
        position: Index of the image in the shard.
        name: Name of the member in the tar.
        data: Bytes of the image file.
    """

    position: int
    name: str
    data: bytes


@dataclass(frozen=True)
class Shards:
    """Shards and the number of images in each.

    Attributes:
        urls: S files or URLs.
        counts: ``(S,)`` int64 number of images in each shard.
        image_bytes: Mean size of an image file in bytes; None if unknown.
        axis: Axis of the slices of volumes; None for each volume's own.
    """

    urls: list[str]
    counts: np.ndarray
    image_bytes: float | None = None
    axis: int | None = None

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def starts(self) -> np.ndarray:
        """``(S,)`` index of the first image of each shard, in the order of ``urls``."""
        return np.cumsum(self.counts) - self.counts

    def place(self, shard: int) -> str:
        """URL or absolute path of a shard."""
        return full_name(self.urls[shard])

    def read(
        self, shard: int, positions: Sequence[int] | np.ndarray, name_rest: bool = False
    ) -> Iterator[Member]:
        """Yield some images of a shard in order, each once.

        Args:
            shard: Index of the shard.
            positions: Indices of images in the shard, ascending.
            name_rest: Warn if the shard has more images than its index lists, once the last
                listed one is read.

        Raises:
            BrokenShardError: If the shard ends or is damaged before the last of them.
        """
        if not len(positions):
            return
        url, count = self.urls[shard], int(self.counts[shard])
        wanted, last = set(np.asarray(positions).tolist()), int(positions[-1])
        images, whole = ImageMembers(), 0
        try:
            with open_url(url) if is_remote(url) else open_regular(url) as file:
                tar = TarReader(file)
                while (name := tar.next()) is not None:
                    if not images(name) or images.count - 1 not in wanted:
                        tar.skip()
                        whole = images.count
                        continue
                    data = tar.read()
                    whole = images.count
                    yield Member(whole - 1, name, data)
                    if whole - 1 == last:
                        if name_rest and whole == count and _holds_more(tar, images):
                            log.warning(
                                "%(shard)s holds more images than the %(images)d that its "
                                "index.json says: the rest is left out",
                                {"shard": url, "images": count},
                                extra={"code": "shard.longer"},
                            )
                        return
        except BROKEN_TAR as error:
            why = getattr(error, "strerror", None) or str(error)
            raise BrokenShardError(whole, why) from None
        raise BrokenShardError(whole, "it ends there")


# Arrays beside an image of the same name are its labels or embeddings.
_SUFFIXES = EXTENSIONS - ARRAY_SUFFIXES | {FRAME_SUFFIX}


class ImageMembers:
    """Decide which members of a tar are images, called for each member in order.

    Attributes:
        count: Number of images so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._key: str | None = None  # of the last image
        self._sample: str | None = None  # key of the last member
        self._lone: list[str] = []
        self._waiting: list[str] = []  # of the sample, which may have an image yet

    @property
    def dotted(self) -> list[str]:
        """Members that end like images and do not count, of samples without an image.

        WebDataset's extension begins at the first dot: ``0001.seg.png`` is of the sample ``0001``.
        """
        return self._lone + (self._waiting if self._key != self._sample else [])

    def __call__(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        # WebDataset skips names like __meta__/ as its own metadata
        if not stem or re.match(r"__[^/]*__/", name):
            return False
        key = f"{folder}/{stem}"
        if key != self._sample:
            self._lone, self._waiting, self._sample = self.dotted, [], key
        if f".{extension.lower()}" not in _SUFFIXES:
            if f".{extension.rpartition('.')[2].lower()}" in _SUFFIXES:
                self._waiting.append(name)
            return False
        if key == self._key:  # Another image of the same sample
            return False
        self._key = key
        self.count += 1
        return True


def _holds_more(tar: TarReader, images: ImageMembers) -> bool:
    """Whether a tar contains a further image."""
    with suppress(*BROKEN_TAR):
        while (name := tar.next()) is not None:
            if images(name):
                return True
            tar.skip()
    return False


def full_name(url: str) -> str:
    """Return a URL as it is, and a local path as an absolute path."""
    return url if is_remote(url) else os.path.abspath(url)


def is_remote(url: str) -> bool:
    """Whether a shard is a URL or a command."""
    return not os.path.exists(url) and ("://" in url or url.startswith("pipe:"))
