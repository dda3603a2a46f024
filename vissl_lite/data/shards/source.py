"""Shards: tar files of images, on a disk or behind URLs, as WebDataset has them.

An image is a sample of WebDataset's: the members of a tar that follow one another and share a key,
which is their path up to the first dot of the file name (Aizman, Maltby & Breuel 2019, "High
Performance I/O For Large Scale Deep Learning", section IV). Its first member whose whole extension
is that of an image file is read, others such as labels are passed over.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vissl_lite.data.images import EXTENSIONS
from vissl_lite.data.reading import open_regular
from vissl_lite.data.shards.download import open_url
from vissl_lite.data.shards.tar_reader import BROKEN_TAR, TarReader

log = logging.getLogger(__name__)


class BrokenShardError(Exception):
    """A shard can't be read from some image on.

    Args:
        at: Number of images before it.
        why: Reason.
    """

    def __init__(self, at: int, why: str) -> None:
        super().__init__(why)
        self.at = at


class Member(NamedTuple):
    """An image in a shard.

    Attributes:
        position: Number of the image in the shard.
        name: Name in the tar file.
        data: The image file's bytes.
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
        image_bytes: Size of an image file on average; None where it is not known.
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
        return full_name(self.urls[shard])

    def read(
        self, shard: int, positions: Sequence[int] | np.ndarray, name_rest: bool = False
    ) -> Iterator[Member]:
        """Some images of a shard, one after the other, each once.

        Args:
            shard: Shard.
            positions: Numbers of images in it, ascending.
            name_rest: Whether the log says so where the last image that is known is read and the
                shard has more.

        Raises:
            BrokenShardError: Not all of them are there.
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


class ImageMembers:
    """Which members of a tar are images, told in their order.

    Attributes:
        count: Number of images.
    """

    def __init__(self) -> None:
        self.count = 0
        self._key: str | None = None

    def __call__(self, name: str) -> bool:
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


def _holds_more(tar: TarReader, images: ImageMembers) -> bool:
    """Whether an image follows in a tar."""
    with suppress(*BROKEN_TAR):
        while (name := tar.next()) is not None:
            if images(name):
                return True
            tar.skip()
    return False


def full_name(url: str) -> str:
    """A local name is made absolute."""
    return url if is_remote(url) else os.path.abspath(url)


def is_remote(url: str) -> bool:
    """Whether a shard is behind a URL or a command."""
    return not os.path.exists(url) and ("://" in url or url.startswith("pipe:"))
