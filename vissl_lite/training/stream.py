"""The training stream as a LightningDataModule, and the callback that counts broken images."""

import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vissl_lite.data.reading import Broken
from vissl_lite.data.stream import BROKEN_SHARE, Batch, Source, too_many_broken
from vissl_lite.data.workers import WorkerLoader
from vissl_lite.errors import UserError
from vissl_lite.training.schedule import Schedule

log = logging.getLogger(__name__)


class StreamData(pl.LightningDataModule):
    """The training stream of a run, from the batch at which the run continues.

    Args:
        dataset: Images.
        batch_size: Images per batch over all devices.
        epochs: Number of epochs; None for an endless stream.
        schedule: Schedule of the run, which counts the batches done.
        workers: Data workers per device.
        weights: Sampling weights; see ``StreamSampler``.
        resolution: Resolution of the views of a batch; see ``StreamSampler``.

    Attributes:
        indices: ``(B,)`` indices of the current batch on the CPU: reading those of the batch itself
            would wait for the GPU.
        batches_per_epoch: Batches per epoch.
        sides: Height of each view of an image in pixels.

    Raises:
        UserError: No image can be read.
    """

    def __init__(
        self,
        dataset: Source,
        batch_size: int,
        epochs: int | None,
        schedule: Schedule,
        workers: int,
        weights: np.ndarray | None = None,
        resolution: Callable[[int], int] | None = None,
    ) -> None:
        super().__init__()
        self.sides = [len(view) for view in dataset.first().views]
        self.dataset, self.batch_size, self.epochs = dataset, batch_size, epochs
        self.schedule, self.workers, self.weights = schedule, workers, weights
        self.resolution = resolution
        self.batches_per_epoch = len(dataset) // batch_size
        self.indices: Tensor
        self._loader: WorkerLoader[Batch] | None = None
        self._saved_order: dict[str, int] | None = None

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self.indices = batch.indices
        return batch

    def train_dataloader(self) -> WorkerLoader[Batch]:
        assert self.trainer is not None
        world = self.trainer.world_size
        if self.batch_size % world:
            raise UserError(f"--batch_size {self.batch_size} can't be divided by {world} devices")
        before, now = self._saved_order or {}, self._order()
        if now and before and now != before and self.schedule.batches % self.batches_per_epoch:
            log.warning(
                "the order of images in shards depends on the number of processes and of data "
                "workers: there were %(processes_before)d with %(workers_before)d each, and are "
                "%(processes)d with %(workers)d; some images of this epoch are repeated, and "
                "others skipped",
                {**{f"{name}_before": before[name] for name in now}, **now},
                extra={"code": "shard.order"},
            )
        self._loader = self.dataset.loader(
            self.batch_size,
            self.epochs,
            start=self.schedule.batches,
            rank=self.trainer.global_rank,
            world=world,
            workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            weights=self.weights,
            resolution=self.resolution,
        )
        return self._loader

    @property
    def waiting(self) -> bool:
        """Whether the training waits for the next batch at this moment."""
        return self._loader is not None and self._loader.waiting

    def _order(self) -> dict[str, int]:
        world = 1 if self.trainer is None else self.trainer.world_size
        return self.dataset.order(world, self.workers)

    def state_dict(self) -> dict[str, Any]:
        images = {"images": len(self.dataset), "digest": self.dataset.digest()}
        return {**images, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_order = state_dict["order"]
        if state_dict != {**self.state_dict(), "order": self._saved_order}:
            raise UserError(
                f"the training images are not those that the run began with "
                f"({state_dict['images']} then, {len(self.dataset)} now): put them back, or start "
                f"a new run with --overwrite"
            )


class BrokenImages(Callback):
    """Count and log images that cannot be read; too many of them stop the run.

    Each process counts those that it was to read, which are a part of an epoch, and the images of
    broken shards, of all of them.

    Args:
        images: Number of images in the data set.

    Attributes:
        paths: Number of unreadable images by file; a shard may hold many.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.seen = 0
        self.paths: dict[str, int] = {}
        self._first: Broken | None = None
        self._shards: set[str] = set()

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        images = [(one, 1) for one in batch.broken]
        shards = [(Broken(lost.shard, lost.why), lost.images) for lost in batch.lost]
        for one, count in images + shards:
            if one.path not in self.paths:
                log.warning(
                    "skipped, can't be read: %(path)s (%(why)s)",
                    one._asdict(),
                    extra={"code": "image.unreadable"},
                )
            self._first = self._first or one
            self.paths[one.path] = max(count, self.paths.get(one.path, 0))
        self._shards.update(one.path for one, _ in shards)
        broken = sum(self.paths.values())
        own = len(self.paths.keys() - self._shards)
        self.seen += len(batch.indices) + len(batch.broken)
        share = max(self.images / trainer.world_size, min(self.seen, self.images))
        if self._first is None:
            return
        if broken > BROKEN_SHARE * self.images:
            raise too_many_broken(broken, self.images, self._first)
        if own > BROKEN_SHARE * share:
            raise too_many_broken(own, round(share), self._first)
