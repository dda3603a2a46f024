"""The training stream from shards: images in an order of their own, read from front to back.

An epoch is the shards in an order by chance, joined to one sequence of images. Each rank gets an
equal stretch of it, and each of its data workers a stretch of that, in whole batches, so that
nothing is seen twice and what is missed is what fills no batch. A shard that lies across a border
is read on both sides. Within its stretch a worker gives the images in an order by chance, too,
which takes them from a window that moves along: a million images need not be in memory to be mixed.

All of that follows from the numbers of images in the shards, so that a stream can begin anywhere:
the order of what is gone is worked out again, and not one of its shards is opened.
"""

import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import count as counting
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from vissl_lite.data.fingerprints import EXACT_BYTES, LOOK_BYTES, Fingerprints, fingerprint
from vissl_lite.data.images import BROKEN_IMAGE, decode_image, decode_reduced
from vissl_lite.data.reading import Broken, reason
from vissl_lite.data.shards.source import BrokenShardError, Shards
from vissl_lite.data.stream import Batch, Item, Lost, Source, collate
from vissl_lite.data.views import Views
from vissl_lite.data.workers import WorkerLoader
from vissl_lite.errors import UserError

# Undecoded images that a worker holds to mix them: bytes in all, and their number at least, at
# most, and where their size is not known.
WINDOW_BYTES, LEAST, MOST, USUAL = 128 << 20, 16, 4096, 256

# Images to look at without training on them, and the shards and bytes that they may take.
SAMPLE, SAMPLE_SHARDS, SAMPLE_BYTES = 512, 8, 256 << 20

# After as many shards in a row that can't be read something else is wrong than with shards.
IN_A_ROW = 8


class Found(NamedTuple):
    """An image out of a shard: its number among all, its name, and the image file's bytes."""

    number: int
    name: str
    data: bytes


class Order:
    """The sequence of images in an epoch.

    Args:
        shards: Shards to read.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        lost: Receives what cannot be read.
    """

    def __init__(self, shards: Shards, seed: int, epoch: int, lost: list[Lost]) -> None:
        self.shards, self.lost, self.first = shards, lost, epoch == 0
        self.order = np.random.default_rng((seed, epoch)).permutation(len(shards.urls))
        self.ends = np.cumsum(shards.counts[self.order])

    def read(self, places: np.ndarray, again: int = 0) -> Iterator[Found]:
        """The images at some places of the sequence.

        Where a shard can't be read, the images that follow it in the sequence, which has no end,
        stand for those that are missing: each for one.

        Args:
            places: Ascending positions; those beyond the end count from the start.
            again: Number of successive shards that could not be read.

        Raises:
            UserError: Too many shards in a row can't be read.
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
                    if again == IN_A_ROW:
                        raise UserError(
                            f"{url} can't be read, nor can the {again} shards before it: {error}"
                        ) from None
                    yield from self.read(end + left - error.at, again + 1)


def mixed(images: int, window: int, first: int, seed: Sequence[int]) -> Iterator[int]:
    """Places of a stretch in an order by chance, each taken from a window that moves along.

    The window grows from small, for the first batch not to wait until it is full.

    Args:
        images: Length of the stretch.
        window: Places to choose from.
        first: The same for the first one; it grows by one place each time.
        seed: Seed of the choice.
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


class ShardStream(IterableDataset[Batch]):
    """The batches of one rank; see the module. Its workers take turns, a batch each.

    Args:
        shards: The images.
        views: The augmentations.
        seed: Seed of the run.
        batch_size: Images per batch over all ranks, a multiple of ``world``.
        epochs: Number of epochs; None for an endless stream.
        start: Number of the first batch, to resume: exactly with the same ``world`` and workers.
        rank: This process.
        world: Number of processes.
    """

    def __init__(
        self,
        shards: Shards,
        views: Views,
        seed: int,
        batch_size: int,
        epochs: int | None = None,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.shards, self.views, self.seed = shards, views, seed
        self.share, self.epochs, self.start, self.rank = batch_size // world, epochs, start, rank
        self.per_epoch = len(shards) // batch_size
        images = WINDOW_BYTES / shards.image_bytes if shards.image_bytes else USUAL
        self.window = max(LEAST, min(MOST, int(images)))

    def __len__(self) -> int:
        if self.epochs is None:
            raise TypeError("this stream has no end")
        return self.epochs * self.per_epoch

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        lost: list[Lost] = []
        found = self._found((self.start + worker) % workers, workers, lost)
        ahead: deque[Found] = deque()
        for number in counting(self.start + worker, workers):
            if self.epochs is not None and number >= len(self):
                return
            epoch = number // self.per_epoch
            items = [self._item(epoch, ahead, found) for _ in range(self.share)]
            yield collate(items)._replace(lost=list(lost))
            lost.clear()

    def _found(self, turn: int, workers: int, lost: list[Lost]) -> Iterator[Found]:
        """What one worker reads, epoch after epoch, without end.

        Args:
            turn: Batches to make: those whose number modulo ``workers`` is this.
            workers: Workers of the rank.
            lost: Receives what cannot be read.
        """
        epoch, done = divmod(self.start, self.per_epoch)
        while True:
            first = epoch * self.per_epoch
            shares = [range((t - first) % workers, self.per_epoch, workers) for t in range(workers)]
            begin = self.rank * self.per_epoch + sum(map(len, shares[:turn]))
            skip = sum(batch < done for batch in shares[turn])
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

    def _item(self, epoch: int, ahead: deque[Found], found: Iterator[Found]) -> Item:
        """The next image's views; a broken image gives way to its successor."""
        broken: list[Broken] = []
        while True:
            if len(broken) == len(ahead):
                ahead.append(next(found))
            one = ahead[len(broken)]
            try:
                item = _item(one, self.views, self.seed, epoch)
                ahead.popleft()
                return item._replace(broken=broken)
            except BROKEN_IMAGE as error:
                broken.append(Broken(one.name, reason(error, one.name)))
                if len(broken) == len(self.shards):
                    raise


def _item(found: Found, views: Views, seed: int, epoch: int) -> Item:
    """What ``ViewDataset`` gives of an image file; raises what decoding raises."""
    key = seed, epoch, found.number
    image, whole = decode_reduced(found.data, found.name, lambda h, w: views.times(h, w, *key))
    taken = fingerprint(found.data, image) if epoch == 0 else None
    return Item(views(image, *key, whole), found.number, [], fingerprint=taken, name=found.name)


class ShardSource(Source):
    """Shards as the images of a run.

    Args:
        shards: Shards to read.
        views: The augmentations.
        seed: Seed of the run.
    """

    def __init__(self, shards: Shards, views: Views, seed: int) -> None:
        self.shards, self.views, self.seed = shards, views, seed

    def __len__(self) -> int:
        return len(self.shards)

    def first(self) -> Item:
        why, lost = "", list[str]()
        for shard in np.flatnonzero(self.shards.counts)[: IN_A_ROW + 1].tolist():
            numbers = self.shards.starts[shard] + np.arange(self.shards.counts[shard])
            for found in read_images(self.shards, numbers, lost):
                try:
                    return _item(found, self.views, self.seed, 0)
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
    ) -> WorkerLoader[Batch]:
        assert weights is None, "shards are read from front to back"
        return WorkerLoader(
            ShardStream(self.shards, self.views, self.seed, batch_size, epochs, start, rank, world),
            _as_it_is,  # no list, as nothing is to be joined
            workers,
            batch_size=None,
            pin_memory=pin_memory,
            prefetch_factor=4 if workers else None,
        )

    def digest(self) -> str:
        words = "\0".join([*self.shards.urls, str(self.shards.counts.tolist())])
        return blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

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
    """Some images by their numbers, ascending; what can't be read is left out.

    Args:
        shards: Shards to read.
        numbers: Numbers of the images.
        lost: Gets why some of a shard can't be read.
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
    """Write some images from a few shards as files, for all that looks at images.

    Args:
        shards: Shards to read.
        folder: Existing folder; files are named by the numbers of the images.

    Raises:
        UserError: None can be read.
    """
    some, lost = np.flatnonzero(shards.counts), list[str]()
    if len(some) > SAMPLE_SHARDS:
        some = some[np.linspace(0, len(some) - 1, SAMPLE_SHARDS).astype(int)]
    for shard in some.tolist():
        each = min(-(-SAMPLE // len(some)), int(shards.counts[shard]))
        room = SAMPLE_BYTES // len(some)
        for found in read_images(shards, shards.starts[shard] + np.arange(each), lost):
            suffix = os.path.splitext(found.name)[1]
            (folder / f"{found.number:09}{suffix}").write_bytes(found.data)
            room -= len(found.data)
            if room <= 0:
                break
    if not any(folder.iterdir()):
        raise _unreadable(shards, lost[0])


def _unreadable(shards: Shards, why: str) -> UserError:
    return UserError(
        f"no image can be read in {len(shards.urls)} shards, the first {shards.urls[0]}"
        f"{why and f': {why}'}"
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch
