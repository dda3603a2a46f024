"""The stream of training batches: views of images, in an order that can be resumed.

The whole run is one stream. Its sampler gives keys (epoch, image index, resolution) and can start
anywhere, so resuming continues with the very batch that came next, and no worker waits at the end
of an epoch.
"""

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from vissl_lite.data.cache import ImageCache, decode_down_sized
from vissl_lite.data.fingerprints import Fingerprints, fingerprint, fingerprints_of
from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.images import BROKEN_IMAGE, decode_image, read_content
from vissl_lite.data.path_list import PathList
from vissl_lite.data.reading import Broken, printable, reason
from vissl_lite.data.views import Views
from vissl_lite.data.workers import WorkerLoader
from vissl_lite.errors import UserError

# Epoch, image index, and the number of the resolution of the views where there are several.
Key = tuple[int, int] | tuple[int, int, int]

# At most this share of the images may be unreadable.
BROKEN_SHARE = 0.2


def too_many_broken(broken: int, images: int, first: Broken) -> UserError:
    """The error that ends a run if more than ``BROKEN_SHARE`` of the images cannot be read."""
    # in one line, as it may come from a data worker, of whose errors the last line is kept
    return UserError(
        f"{broken} of {images} images can't be read, the first {printable(first.path)} "
        f"({first.why})"
    )


class Lost(NamedTuple):
    """A shard that cannot be read to its end.

    Attributes:
        shard: File or URL.
        images: Number of missing images.
        why: Reason.
    """

    shard: str
    images: int
    why: str


class Batch(NamedTuple):
    """A batch of a training step.

    Attributes:
        views: One ``(B, C, H, W)`` tensor per view, uint8 or uint16, channels last in memory.
        indices: ``(B,)`` int64, the images' numbers in the data set.
        broken: Images that could not be read and gave way to their successors.
        targets: Targets of the images, such as boxes; empty if there are none.
        fingerprints: ``(B, F)`` uint8, see ``fingerprint``, where the data set gives them.
        names: Names of the images, where they come with fingerprints and are not known before.
        lost: Shards that were found to be broken, other images in the place of theirs.
    """

    views: list[Tensor]
    indices: Tensor
    broken: list[Broken]
    targets: list[Any]
    fingerprints: np.ndarray | None = None
    names: Sequence[str] = ()
    lost: Sequence[Lost] = ()


class Item(NamedTuple):
    """The views of one image; see ``Batch``."""

    views: list[np.ndarray]
    number: int
    broken: list[Broken]
    target: Any = None
    fingerprint: np.ndarray | None = None
    name: str | None = None


class Source(ABC):
    """The numbered images of a run, from files or shards.

    Attributes:
        seed: Seed of the run.
    """

    seed: int

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def first(self) -> Item:
        """The item of the first readable image.

        Raises:
            UserError: Not even one image can be read.
        """

    @abstractmethod
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
        """The training stream of one process.

        Args:
            batch_size: Images per batch over all ranks; a multiple of ``world``.
            epochs: Number of epochs; None for an endless stream.
            start: Number of the first batch, to resume.
            rank: This process.
            world: Number of processes.
            workers: Data workers.
            pin_memory: Whether batches lie where a GPU can fetch them from.
            weights: Sampling weights, where images come in any order; see ``StreamSampler``.
            resolution: See ``StreamSampler``.
        """

    @abstractmethod
    def digest(self) -> str:
        """A digest of the images and their order, which must be equal for a resumed run."""

    @abstractmethod
    def order(self, world: int, workers: int) -> dict[str, int]:
        """What the order of images within an epoch depends on, beside their digest and the seed.

        Args:
            world: Number of processes.
            workers: Data workers of each.
        """

    @abstractmethod
    def name(self, number: int) -> str:
        """Absolute path or URL of an image."""

    @abstractmethod
    def fingerprints(self, numbers: np.ndarray) -> Fingerprints:
        """Fingerprints of some images; unreadable ones are left out."""


class KeyedDataset(Dataset[Item], Source):
    """Items by (epoch, image index); a broken image is replaced by its successor.

    Args:
        paths: Image files.
        seed: Seed of the run.
    """

    def __init__(self, paths: Sequence[str], seed: int) -> None:
        # packed: the workers of a run must not copy a list of a million strings
        self.paths, self.seed = PathList.of(paths), seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> Item:
        epoch, index, *rest = key
        resolution = rest[0] if rest else 0
        broken: list[Broken] = []
        while True:
            try:
                return self.item(epoch, index, resolution)._replace(broken=broken)
            except BROKEN_IMAGE as error:
                path = self.paths[index]
                broken.append(Broken(path, reason(error, path)))
                if len(broken) > BROKEN_SHARE * len(self.paths):  # as when the folder is gone
                    raise too_many_broken(len(broken), len(self.paths), broken[0]) from None
                index = (index + 1) % len(self.paths)

    def first(self) -> Item:
        why = ""
        for index in range(len(self)):
            try:
                return self.item(0, index)
            except BROKEN_IMAGE as error:
                why = why or reason(error, self.paths[index])
        raise UserError(
            f"none of {len(self)} images can be read, the first {self.paths[0]} ({why})"
        )

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
        sampler = StreamSampler(
            len(self), batch_size, self.seed, epochs, start, rank, world, weights, resolution
        )
        return stream(self, sampler, workers, pin_memory)

    def digest(self) -> str:
        return self.paths.digest()

    def order(self, world: int, workers: int) -> dict[str, int]:
        return {}

    def name(self, number: int) -> str:
        return os.path.abspath(self.paths[number])

    def fingerprints(self, numbers: np.ndarray) -> Fingerprints:
        return fingerprints_of([self.name(number) for number in numbers])

    @abstractmethod
    def item(self, epoch: int, index: int, resolution: int = 0) -> Item:
        """The item of one image; raises errors of decoding (``BROKEN_IMAGE``)."""


class ViewDataset(KeyedDataset):
    """Decode images and make their views; in the first epoch also compute fingerprints.

    Args:
        paths: Image files.
        views: The augmentations.
        seed: Seed of the run.
        cache: Keeps what has been decoded; without one, every epoch decodes each image, as small as
            the crops that it draws allow.
        reader: How the images are read.
        smaller: The augmentations at other resolutions: numbers 1 and up in a key.
    """

    def __init__(
        self,
        paths: Sequence[str],
        views: Views,
        seed: int,
        cache: ImageCache | None = None,
        reader: ImageReader = PHOTOGRAPHS,
        smaller: Sequence[Views] = (),
    ) -> None:
        super().__init__(paths, seed)
        self.views, self.cache, self.reader = (views, *smaller), cache, reader

    def item(self, epoch: int, index: int, resolution: int = 0) -> Item:
        """All views of one image."""
        views = self.views[resolution]
        kept = None if self.cache is None else self.cache.get(index)
        taken = None
        if kept is None or epoch == 0:
            path = self.paths[index]
            data = read_content(path) if epoch == 0 else None
            kept = kept or self._decode(data, path, views, epoch, index)
            if data is not None:
                taken = take_fingerprint(data, path, kept[0], self.reader)
        image, whole = kept
        made = views(image, self.seed, epoch, index, whole)
        return Item(made, index, [], fingerprint=taken)

    def _decode(
        self, data: bytes | None, path: str, views: Views, epoch: int, index: int
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """``(h, w, C)``, and height and width of the whole image."""
        key = self.seed, epoch, index
        if self.cache is None:
            return self.reader.decode_reduced(data, path, lambda h, w: views.times(h, w, *key))
        image, whole = decode_down_sized(data, path, self.cache.plan.shortest, self.reader)
        self.cache.put(index, image, whole)
        return image, whole


def take_fingerprint(data: bytes, path: str, image: np.ndarray, reader: ImageReader) -> np.ndarray:
    """Fingerprint of an image that is read for training; see ``fingerprint``.

    Args:
        data: Content of the file or frame.
        path: The file.
        image: What the reader makes of it. Bands are decoded again as they are shown, so that
            fingerprints do not depend on the reader.
        reader: How the image is read.
    """
    return fingerprint(data, image if reader.bands is None else decode_image(data, path))


class StreamSampler(Sampler[list[Key]]):
    """Batches of keys: a new permutation per epoch, without the incomplete last batch.

    Args:
        images: Number of images.
        batch_size: Images per batch over all ranks; at most ``images``, a multiple of ``world``.
        seed: Seed of the run: the order depends on it and on the epoch alone.
        epochs: Number of epochs; None for an endless stream.
        start: Number of the first batch, to resume.
        rank: This process: joined in the order of ranks, the shares are the batch.
        world: Number of processes.
        weights: ``(images,)`` positive sampling weights: each epoch then draws with replacement.
        resolution: Function from the number of a batch to that of the resolution of its views; it
            is asked when the batch is sent to a data worker. Default: always 0.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        epochs: int | None = None,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        weights: np.ndarray | None = None,
        resolution: Callable[[int], int] | None = None,
    ) -> None:
        self.resolution = resolution
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.epochs, self.start, self.rank, self.world = epochs, start, rank, world
        self.weights = None if weights is None else weights / weights.sum()
        self.batches_per_epoch = images // batch_size

    def __len__(self) -> int:
        if self.epochs is None:
            raise TypeError("this stream has no end")
        return self.epochs * self.batches_per_epoch

    def __iter__(self) -> Iterator[list[Key]]:
        first, skip = divmod(self.start, self.batches_per_epoch)
        for epoch in itertools.count(first) if self.epochs is None else range(first, self.epochs):
            random = np.random.default_rng((self.seed, epoch))
            if self.weights is None:
                order = random.permutation(self.images)
            else:
                order = random.choice(self.images, self.images, p=self.weights)
            for batch in range(skip, self.batches_per_epoch):
                share = self.batch_size // self.world
                mine = order[batch * self.batch_size + self.rank * share :][:share]
                if self.resolution is None:
                    yield [(epoch, int(index)) for index in mine]
                else:
                    resolution = self.resolution(epoch * self.batches_per_epoch + batch)
                    yield [(epoch, int(index), resolution) for index in mine]
            skip = 0


def collate(items: Sequence[Item]) -> Batch:
    """Join items to a batch; images stay integers and channels last."""
    views = [
        torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        for arrays in zip(*(item.views for item in items), strict=True)
    ]
    indices = torch.tensor([item.number for item in items])
    broken = [one for item in items for one in item.broken]
    targets = [item.target for item in items if item.target is not None]
    taken = [item.fingerprint for item in items if item.fingerprint is not None]
    # a batch lies within an epoch: all of its images have one, or none
    prints = np.stack(taken) if taken else None
    names = [item.name for item in items if taken and item.name is not None]
    return Batch(views, indices, broken, targets, prints, names)


def stream(
    dataset: KeyedDataset, sampler: StreamSampler, workers: int, pin_memory: bool
) -> WorkerLoader[Batch]:
    """The loader of a training stream."""
    return WorkerLoader(
        dataset,
        collate,
        workers,
        batch_sampler=sampler,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
