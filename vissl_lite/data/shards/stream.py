"""Training stream from shards: sequential reads with shuffled shards and a shuffle window.

In each epoch the shards are concatenated in random order to one sequence of images. Each rank gets
an equal segment of it, and each of its data workers a part of that segment, in full batches, so
that no image repeats and only an incomplete batch is dropped. A shard that spans two segments is
read for both. A worker shuffles its images within a moving window, so that only the window has to
be in memory.

The order depends only on the number of images per shard, the seed, and the numbers of processes and
data workers, so a stream can resume at any batch: the order of earlier images is recomputed without
opening their shards.
"""

import random
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import count as counting
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler, get_worker_info

from vissl_lite.data.fingerprints import EXACT_BYTES, LOOK_BYTES, Fingerprints, fingerprint
from vissl_lite.data.formats import split_suffix
from vissl_lite.data.formats.arrays import with_volume
from vissl_lite.data.formats.common import FRAME_SUFFIX
from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.images import BROKEN_IMAGE, decode_image
from vissl_lite.data.reading import Broken, reason
from vissl_lite.data.shards.source import BrokenShardError, Shards
from vissl_lite.data.stream import Batch, Item, Lost, Source, collate, take_fingerprint
from vissl_lite.data.views import Views
from vissl_lite.data.workers import WorkerLoader
from vissl_lite.errors import UserError

# Shuffle window of a worker, of undecoded images: size in bytes, minimum and maximum number of
# images, and number of images if their size is unknown
WINDOW_BYTES, MIN_WINDOW, MAX_WINDOW, DEFAULT_WINDOW = 128 << 20, 16, 4096, 256

# Sample for inspection: number of images, and maximum number of shards and bytes to read
SAMPLE_IMAGES, SAMPLE_SHARDS, SAMPLE_BYTES = 512, 8, 256 << 20

# Name of a slice of a volume in a shard, and number of slices in the sample that tell enough of the
# values of a volume
_SLICE = re.compile(rf"(.+)#\d+(?:-\d+)?{re.escape(FRAME_SUFFIX)}", re.DOTALL)
MIN_SLICES = 3

# Consecutive unreadable shards before an error: more are unlikely to be damage of the shards
MAX_FAILED_SHARDS = 8


class Found(NamedTuple):
    """An image of a shard: its index among all images, its name and the bytes of the file."""

    number: int
    name: str
    data: bytes


class Order:
    """Sequence of images in an epoch.

    Args:
        shards: Shards with the images.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        lost: List to which unreadable parts of shards are appended.
    """

    def __init__(self, shards: Shards, seed: int, epoch: int, lost: list[Lost]) -> None:
        self.shards, self.lost, self.first = shards, lost, epoch == 0
        self.order = np.random.default_rng((seed, epoch)).permutation(len(shards.urls))
        self.ends = np.cumsum(shards.counts[self.order])

    def read(self, places: np.ndarray, again: int = 0) -> Iterator[Found]:
        """Yield the images at some positions of the sequence.

        Images that can't be read are replaced by as many that follow their shard in the sequence,
        which wraps around.

        Args:
            places: Ascending positions; those beyond the end wrap around.
            again: Number of consecutive shards that could not be read.

        Raises:
            UserError: If too many consecutive shards can't be read.
        """
        images, starts = int(self.ends[-1]), self.shards.starts
        for some in (places[places < images], places[places >= images] - images):
            parts = np.searchsorted(self.ends, some, side="right")
            for part in np.unique(parts):
                shard, end = int(self.order[part]), int(self.ends[part])
                begin = end - int(self.shards.counts[shard])
                left = some[parts == part] - begin
                url = self.shards.place(shard)
                try:
                    for member in self.shards.read(shard, left, name_rest=self.first):
                        left = left[1:]
                        number = int(starts[shard]) + member.position
                        yield Found(number, f"{url}!{member.name}", member.data)
                except BrokenShardError as error:
                    missing = int(self.shards.counts[shard]) - error.at
                    self.lost.append(Lost(url, missing, f"from image {error.at} on: {error}"))
                    if again == MAX_FAILED_SHARDS:
                        raise UserError(
                            f"{url} can't be read, nor can the {again} shards before it: {error}"
                        ) from None
                    yield from self.read(end + left - error.at, again + 1)


def mixed(images: int, window: int, first: int, seed: Sequence[int]) -> Iterator[int]:
    """Yield the positions of a segment, shuffled within a moving window.

    The window starts small and grows, so that the first batch does not wait for a full one.

    Args:
        images: Length of the segment.
        window: Size of the window.
        first: Initial size of the window; it grows by one position per step.
        seed: Seed of the order.
    """
    words = np.random.SeedSequence(seed).generate_state(4)
    draw = random.Random(words.tobytes()).random
    waiting: list[int] = []
    head = 0
    for given in range(images):
        reach = min(images, given + min(window, first + given))
        waiting.extend(range(head, reach))
        head = reach
        at = int(draw() * len(waiting))
        waiting[at], waiting[-1] = waiting[-1], waiting[at]
        yield waiting.pop()


class ShardStream(Dataset[Batch]):
    """Batches of one rank by (number, resolution); see the module docstring.

    Workers alternate, one batch each, and read on from batch to batch. For a batch that is not the
    next one of its worker, the order of its epoch is computed anew.

    Args:
        shards: Shards with the images.
        views: Augmentations.
        seed: Seed of the run.
        batch_size: Images per batch over all ranks, a multiple of ``world``.
        rank: Rank of this process.
        world: Number of processes.
        reader: How the images are read.
        smaller: Augmentations at other resolutions, from number 1.
    """

    def __init__(
        self,
        shards: Shards,
        views: Views,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        reader: ImageReader = PHOTOGRAPHS,
        smaller: Sequence[Views] = (),
    ) -> None:
        self.shards, self.views, self.seed, self.reader = shards, (views, *smaller), seed, reader
        self.share, self.rank = batch_size // world, rank
        self.per_epoch = len(shards) // batch_size
        images = WINDOW_BYTES / shards.image_bytes if shards.image_bytes else DEFAULT_WINDOW
        self.window = max(MIN_WINDOW, min(MAX_WINDOW, int(images)))
        self._next: int | None = None

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        number, resolution = key
        info = get_worker_info()
        workers = 1 if info is None else info.num_workers
        due, self._next = self._next, None  # an error leaves the images where they are not expected
        if number != due:
            self._lost: list[Lost] = []
            self._images = self._found(number, workers, self._lost)
            self._ahead: deque[Found] = deque()
        epoch, views = number // self.per_epoch, self.views[resolution]
        batch = collate([self._item(epoch, views) for _ in range(self.share)])
        self._next = number + workers
        batch = batch._replace(lost=list(self._lost))
        self._lost.clear()
        return batch

    def _found(self, batch: int, workers: int, lost: list[Lost]) -> Iterator[Found]:
        """Yield the images of every ``workers``-th batch, epoch after epoch, without end.

        Args:
            batch: First batch.
            workers: Number of workers of the rank.
            lost: List to which unreadable parts of shards are appended.
        """
        turn, (epoch, done) = batch % workers, divmod(batch, self.per_epoch)
        while True:
            first = epoch * self.per_epoch
            shares = [range((t - first) % workers, self.per_epoch, workers) for t in range(workers)]
            begin = self.rank * self.per_epoch + sum(map(len, shares[:turn]))
            skip = sum(number < done for number in shares[turn])
            images = len(shares[turn]) * self.share
            order = mixed(images, self.window, self.share, (self.seed, epoch, self.rank, turn))
            left = np.ones(images, bool)
            for place in islice(order, skip * self.share):
                left[place] = False
            places = np.flatnonzero(left)
            sequence = Order(self.shards, self.seed, epoch, lost)
            reading = zip(places.tolist(), sequence.read(begin * self.share + places), strict=True)
            held: dict[int, Found] = {}
            for place in order:
                while place not in held:
                    at, one = next(reading)
                    held[at] = one
                yield held.pop(place)
            epoch, done = epoch + 1, 0

    def _item(self, epoch: int, views: Views) -> Item:
        """Views of the next image; a broken image is replaced by its successor."""
        broken: list[Broken] = []
        while True:
            if len(broken) == len(self._ahead):
                self._ahead.append(next(self._images))
            one = self._ahead[len(broken)]
            try:
                item = _item(one, views, self.seed, epoch, self.reader)
                self._ahead.popleft()
                return item._replace(broken=broken)
            except BROKEN_IMAGE as error:
                broken.append(Broken(one.name, reason(error, one.name)))
                if len(broken) == len(self.shards):
                    raise


class BatchKeys(Sampler[tuple[int, int]]):
    """Keys of ``ShardStream``: the batches of a run in order.

    Args:
        start: Number of the first batch; resuming is exact for the same processes and workers.
        batches: Number of batches of the run; None for an infinite stream.
        resolution: See ``StreamSampler``.
    """

    def __init__(
        self, start: int, batches: int | None, resolution: Callable[[int], int] | None = None
    ) -> None:
        self.start, self.batches, self.resolution = start, batches, resolution

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("this stream has no end")
        return self.batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for batch in counting(self.start) if self.batches is None else range(self.start, len(self)):
            yield batch, 0 if self.resolution is None else self.resolution(batch)


def _item(found: Found, views: Views, seed: int, epoch: int, reader: ImageReader) -> Item:
    """Item of an image, as ``ViewDataset`` returns it; raises the errors of decoding."""
    key = seed, epoch, found.number
    image, whole = reader.decode_reduced(
        found.data, found.name, lambda h, w: views.times(h, w, *key)
    )
    taken = take_fingerprint(found.data, found.name, image, reader) if epoch == 0 else None
    return Item(views(image, *key, whole), found.number, [], fingerprint=taken, name=found.name)


class ShardSource(Source):
    """Source of training images in shards.

    Args:
        shards: Shards with the images.
        views: Augmentations.
        seed: Seed of the run.
        reader: How the images are read.
        smaller: Augmentations at other resolutions, from number 1.
    """

    def __init__(
        self,
        shards: Shards,
        views: Views,
        seed: int,
        reader: ImageReader = PHOTOGRAPHS,
        smaller: Sequence[Views] = (),
    ) -> None:
        self.shards, self.views, self.seed, self.reader = shards, views, seed, reader
        self.smaller = smaller

    def __len__(self) -> int:
        return len(self.shards)

    def first(self) -> Item:
        why, lost = "", list[str]()
        for shard in np.flatnonzero(self.shards.counts)[: MAX_FAILED_SHARDS + 1].tolist():
            numbers = self.shards.starts[shard] + np.arange(self.shards.counts[shard])
            for found in read_images(self.shards, numbers, lost):
                try:
                    return _item(found, self.views, self.seed, 0, self.reader)
                except BROKEN_IMAGE as error:
                    why = why or str(error)
        raise _unreadable(self.shards, why or lost[0])

    def loader(
        self,
        batch_size: int,
        epochs: int | None,
        start: int,
        rank: int,
        world: int,
        workers: int,
        pin_memory: bool,
        weights: np.ndarray | None = None,
        resolution: Callable[[int], int] | None = None,
    ) -> WorkerLoader[Batch]:
        assert weights is None, "shards are read from front to back"
        batches = None if epochs is None else epochs * (len(self) // batch_size)
        return WorkerLoader(
            ShardStream(
                self.shards,
                self.views,
                self.seed,
                batch_size,
                rank,
                world,
                self.reader,
                self.smaller,
            ),
            _identity,  # Batches are collated by the stream
            workers,
            batch_size=None,
            sampler=BatchKeys(start, batches, resolution),
            pin_memory=pin_memory,
            prefetch_factor=4 if workers else None,
        )

    def digest(self) -> str:
        words = "\0".join([*self.shards.urls, str(self.shards.counts.tolist())])
        return blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def order(self, world: int, workers: int) -> dict[str, int]:
        return {"processes": world, "workers": max(1, workers)}

    def name(self, number: int) -> str:
        shard = int(np.searchsorted(np.cumsum(self.shards.counts), number, side="right"))
        return f"{self.shards.place(shard)}!{number - self.shards.starts[shard]}"

    def fingerprints(self, numbers: np.ndarray) -> Fingerprints:
        records, names = [np.empty((0, EXACT_BYTES + LOOK_BYTES), np.uint8)], []
        for found in read_images(self.shards, np.sort(numbers)):
            with suppress(*BROKEN_IMAGE):
                image = decode_image(found.data, found.name, self.views.shortest)
                records.append(fingerprint(found.data, image)[None])
                names.append(found.name)
        return Fingerprints.of(np.concatenate(records), names)


def read_images(
    shards: Shards, numbers: np.ndarray, lost: list[str] | None = None
) -> Iterator[Found]:
    """Yield images by index, ascending, skipping those that can't be read.

    Args:
        shards: Shards with the images.
        numbers: Indices of the images.
        lost: List to which the reasons for unreadable parts are appended.
    """
    starts = shards.starts
    places = np.searchsorted(np.cumsum(shards.counts), numbers, side="right")
    for shard in np.unique(places).tolist():
        place, start = shards.place(shard), int(starts[shard])
        try:
            for member in shards.read(shard, numbers[places == shard] - start):
                yield Found(start + member.position, f"{place}!{member.name}", member.data)
        except BrokenShardError as error:
            if lost is not None:
                lost.append(str(error))


def write_sample(shards: Shards, folder: Path) -> None:
    """Write some images from a few shards as files, for code that inspects images.

    Slices name their volume, by its file, if there are several of it.

    Args:
        shards: Shards with the images.
        folder: Existing folder; files are named by the index of the image.

    Raises:
        UserError: If no image can be read.
    """
    some, lost = np.flatnonzero(shards.counts), list[str]()
    volumes: dict[str, list[Path]] = {}
    if len(some) > SAMPLE_SHARDS:
        some = some[np.linspace(0, len(some) - 1, SAMPLE_SHARDS).astype(int)]
    for shard in some.tolist():
        each = min(-(-SAMPLE_IMAGES // len(some)), int(shards.counts[shard]))
        room = SAMPLE_BYTES // len(some)
        for found in read_images(shards, shards.starts[shard] + np.arange(each), lost):
            file = folder / f"{found.number:09}{split_suffix(found.name)[1]}"
            file.write_bytes(found.data)
            if one := _SLICE.fullmatch(found.name.removeprefix(f"{shards.place(shard)}!")):
                volumes.setdefault(one[1], []).append(file)
            room -= len(found.data)
            if room <= 0:
                break
    if not any(folder.iterdir()):
        raise _unreadable(shards, lost[0])
    for volume, slices in volumes.items():
        for file in slices if len(slices) >= MIN_SLICES else []:
            with suppress(*BROKEN_IMAGE):
                file.write_bytes(with_volume(file.read_bytes(), volume))


def _unreadable(shards: Shards, why: str) -> UserError:
    return UserError(
        f"no image can be read in {len(shards.urls)} shards, the first {shards.urls[0]}"
        f"{why and f': {why}'}"
    )


def _identity(batch: Batch) -> Batch:
    return batch
