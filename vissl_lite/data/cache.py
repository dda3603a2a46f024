"""A cache of decoded images for later epochs, in memory or in one file, shared by all workers.

An image is down-sized as far as the smallest crop allows and stored when it is first decoded; a
byte beside it then says that it is there. Where each one lies is known before, from the sizes in
the files' headers. The worker that comes next finds it in the same memory: nothing is copied.
"""

import logging
import mmap
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.data.formats import file_of, image_size
from vissl_lite.data.free_memory import free_memory
from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.images import BROKEN_IMAGE, resize
from vissl_lite.data.path_list import PathList
from vissl_lite.errors import UserError

log = logging.getLogger(__name__)

# The file that holds the images, in the run's folder as long as it trains.
CACHE = "cache.bin"

# The share of the memory that is free which a cache may take.
MEMORY_SHARE = 0.5

_DIGEST_BYTES = 32
_GIGABYTE = 1e9
_STRETCH = 1024  # files that a thread looks at in one go
_WAIT = 600  # seconds for the main process to make the file


@dataclass(frozen=True)
class CachePlan:
    """Plan of a cache: which images it keeps, at which size, and where.

    Attributes:
        wholes: ``(N, 2)`` int32, height and width of each image; 0 where its header doesn't say.
        sizes: ``(N, 2)`` int32, the same of what is kept of it.
        starts: ``(N,)`` int64, where its pixels begin, in bytes.
        total: Number of bytes.
        shortest: Shorter side of what is kept, in pixels.
        digest: Digest of what the cache was planned for: other files or other sizes have another
            one.
        in_memory: Or else in a file.
        channels: Number of channels of an image.
        dtype: Name of its dtype.
    """

    wholes: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    total: int
    shortest: int
    digest: bytes
    in_memory: bool
    channels: int = 3
    dtype: str = "uint8"

    def open(self, folder: Path, maker: bool = True) -> "ImageCache":
        """Create the cache, or open that of an interrupted run.

        Args:
            folder: Folder of the file, where it is one.
            maker: Whether this process makes the file; the others wait for it.
        """
        where = "memory" if self.in_memory else str(folder / CACHE)
        kept = int((self.wholes[:, 0] > 0).sum())
        log.info(
            "decoded images are kept: %d of %d, %.2f GB, in %s",
            kept,
            len(self.wholes),
            self.total / _GIGABYTE,
            where,
        )
        if self.in_memory:
            return ImageCache(self, None)
        file = folder / CACHE
        if not self._is_in(file):
            if maker:
                self._make(file)
            else:
                self._wait_for(file)
        return ImageCache(self, file)

    def _make(self, file: Path) -> None:
        with atomic_write(file) as part, part.open("wb") as out:
            out.write(self.digest)
            out.write(bytes(len(self.wholes)))
            out.truncate(self.total)  # a hole, which is filled as images come

    def _is_in(self, file: Path) -> bool:
        try:
            with file.open("rb") as content:
                whole = os.fstat(content.fileno()).st_size == self.total
                return whole and content.read(_DIGEST_BYTES) == self.digest
        except OSError:
            return False

    def _wait_for(self, file: Path) -> None:
        end = time.monotonic() + _WAIT
        while not self._is_in(file):
            if time.monotonic() > end:
                raise UserError(f"--cache: {file} was not made within {_WAIT} seconds")
            time.sleep(0.1)


class ImageCache:
    """Cache of the decoded images of a data set.

    Args:
        plan: Plan of what is kept.
        file: File to use; None for memory that forked workers share.
    """

    def __init__(self, plan: CachePlan, file: Path | None) -> None:
        self.plan, self.file = plan, file
        self._open()

    def _open(self) -> None:
        if self.file is None:
            self._map = mmap.mmap(-1, self.plan.total)
        else:
            with self.file.open("rb") as content:
                self._map = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def __getstate__(self) -> dict[str, object]:
        if self.file is None:
            raise TypeError("memory can't be sent to a process that is started anew")
        return {"plan": self.plan, "file": self.file}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def get(self, index: int) -> tuple[np.ndarray, tuple[int, int]] | None:
        """A cached image.

        Args:
            index: Number of the image.

        Returns:
            ``(h, w, C)``, not to be written to, and height and width of the whole image;
            None if it is not there.
        """
        if not self._bytes[_DIGEST_BYTES + index]:
            return None
        start, (height, width) = int(self.plan.starts[index]), self.plan.sizes[index].tolist()
        dtype, channels = np.dtype(self.plan.dtype), self.plan.channels
        size = height * width * channels * dtype.itemsize
        pixels = self._bytes[start : start + size].view(dtype).reshape(height, width, channels)
        pixels.flags.writeable = False
        height, width = self.plan.wholes[index].tolist()
        return pixels, (height, width)

    def put(self, index: int, image: np.ndarray, whole: tuple[int, int]) -> None:
        """Add an image, unless its size differs from its header or the disk is full.

        Args:
            index: Number of the image.
            image: ``(h, w, C)``, from ``decode_down_sized``.
            whole: Height and width of the whole image.
        """
        if tuple(self.plan.wholes[index].tolist()) != whole:
            return
        start, ready = int(self.plan.starts[index]), _DIGEST_BYTES + index
        pixels = np.ascontiguousarray(image)
        if self.file is None:
            self._bytes[start : start + pixels.nbytes] = pixels.reshape(-1).view(np.uint8)
            self._bytes[ready] = 1  # last: who sees it may read the pixels
            return
        try:
            # written, not mapped: a full disk is then an error and not the end of the process
            with self.file.open("r+b") as out:
                out.seek(start)
                out.write(pixels.data)
                out.flush()
                out.seek(ready)
                out.write(b"\1")
        except OSError:
            return

    def remove(self) -> None:
        """Delete the file; the cache stays readable until the process ends."""
        if self.file is not None:
            try:
                self.file.unlink(missing_ok=True)
            except OSError:  # Windows keeps a file that is mapped
                log.warning(
                    "%(file)s is no longer needed, but can't be deleted",
                    {"file": self.file},
                    extra={"code": "cache.kept"},
                )


def plan_cache(
    paths: Sequence[str],
    shortest: int,
    folder: Path,
    shareable: bool,
    reader: ImageReader = PHOTOGRAPHS,
) -> CachePlan:
    """Read the headers of all images and choose where to keep the pixels.

    Args:
        paths: Image files.
        shortest: Shorter side of what is kept, in pixels; see ``decode_down_sized``.
        folder: Folder of the file; it need not exist yet.
        shareable: Whether memory of this process reaches all that read the cache; see
            ``forks_workers``.
        reader: How the images are read.

    Raises:
        UserError: The disk has too little room.
    """
    paths = PathList.of(paths)
    seen = np.concatenate([np.empty((0, 4), np.int64), *_headers(paths)])
    wholes = seen[:, :2].astype(np.int32)
    sizes = np.array(
        [kept_size(height, width, shortest) for height, width in wholes.tolist()], np.int32
    )
    first = _DIGEST_BYTES + len(paths)
    first += first % 2  # where values of two bytes may begin
    itemsize = 1 if reader.bands is None else 2
    ends = np.cumsum(reader.channels * itemsize * sizes.astype(np.int64).prod(axis=1)) + first
    starts = np.concatenate([[first], ends[:-1]])
    total = int(ends[-1])
    names = "\0".join(paths).encode("utf-8", "surrogatepass")
    # after the machine went down, a file may lack what had not reached the disk
    about = f"{_boot()} {shortest} {len(paths)} {reader}\n".encode()
    digest = blake2b(about + seen.tobytes() + names, digest_size=_DIGEST_BYTES)
    free = free_memory() if shareable else None
    in_memory = free is not None and total < MEMORY_SHARE * free
    if not in_memory:
        _check_disk(total, folder)
    return CachePlan(
        wholes,
        sizes,
        starts,
        total,
        shortest,
        digest.digest(),
        in_memory,
        reader.channels,
        "uint8" if reader.bands is None else "uint16",
    )


def forks_workers(workers: int) -> bool:
    """Whether data workers share the memory of the process that starts them.

    Args:
        workers: Number of data workers.
    """
    method = multiprocessing.get_start_method(allow_none=True)
    return workers == 0 or (method or multiprocessing.get_all_start_methods()[0]) == "fork"


def kept_size(height: int, width: int, shortest: int) -> tuple[int, int]:
    """Height and width of an image in the cache: the shorter side is at most ``shortest``."""
    least = min(height, width)
    if least <= shortest:
        return height, width
    return (
        max(shortest, round(height * shortest / least)),
        max(shortest, round(width * shortest / least)),
    )


def decode_down_sized(
    data: bytes | None, path: str, shortest: int, reader: ImageReader = PHOTOGRAPHS
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode an image at the size of the cache.

    Args:
        data: Result of ``read_content``; None reads the file.
        path: The file; may name a frame.
        shortest: Shorter side of what is kept; smaller images are left as they are.
        reader: How the image is read.

    Returns:
        ``(h, w, C)``, and height and width of the whole image.
    """
    image, whole = reader.decode_reduced(
        data, path, lambda height, width: min(height, width) // max(1, shortest)
    )
    height, width = kept_size(*whole, shortest)
    if image.shape[:2] != (height, width):
        image = resize(image, (height, width))
    return image, whole


def _headers(paths: PathList) -> list[np.ndarray]:
    """Yield ``(n, 4)`` int64 headers of successive paths; see ``_header``."""
    # a disk far away is asked by several at once
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        firsts = range(0, len(paths), _STRETCH)
        return list(threads.map(lambda at: _some_headers(paths[at : at + _STRETCH]), firsts))


def _some_headers(paths: list[str]) -> np.ndarray:
    return np.array([_header(path) for path in paths], np.int64)


def _header(path: str) -> tuple[int, int, int, int]:
    """Height, width, bytes and time of change of an image file; zeros for a broken one."""
    try:
        about = os.stat(file_of(path))
        return *image_size(path), about.st_size, about.st_mtime_ns
    except BROKEN_IMAGE:
        return 0, 0, 0, 0


def _boot() -> str:
    """An identifier of the current boot of this machine, the same for all processes of a run."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # not Linux: the minute of the boot
        return str(round((time.time() - time.monotonic()) / 60))


def _check_disk(total: int, folder: Path) -> None:
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    with suppress(OSError):
        free += (folder / CACHE).stat().st_size  # of a run that was interrupted
    if total > free:
        raise UserError(
            f"--cache needs {total / _GIGABYTE:.1f} GB and {there} has {free / _GIGABYTE:.1f} GB "
            f"free: give an --out on a larger disk, or leave --cache out"
        )
