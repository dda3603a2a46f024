"""The training stream of a run, as Lightning wants it, and the images in it that are broken."""

import logging

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from vissl_lite.data.stream import Batch, KeyedDataset, StreamSampler, stream
from vissl_lite.errors import UserError
from vissl_lite.training.pace import Pace

log = logging.getLogger(__name__)

# At most this share of the images may be unreadable.
BROKEN_SHARE = 0.2


class StreamData(pl.LightningDataModule):
    """The training stream of a run, beginning where the run stands.

    Args:
        dataset: the images.
        batch_size: over all devices.
        epochs: how many; None for a stream without end.
        pace: knows how many batches are done.
        workers: data workers a device.
        weights: sampling weights; see ``StreamSampler``.

    Raises:
        UserError: no image can be read.
    """

    def __init__(
        self,
        dataset: KeyedDataset,
        batch_size: int,
        epochs: int | None,
        pace: Pace,
        workers: int,
        weights: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        dataset.check_readable()
        self.dataset, self.batch_size, self.epochs = dataset, batch_size, epochs
        self.pace, self.workers, self.weights = pace, workers, weights
        self.batches_per_epoch = len(dataset) // batch_size

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        world = self.trainer.world_size
        if self.batch_size % world:
            raise UserError(f"--batch_size {self.batch_size} can't be shared by {world} devices")
        sampler = StreamSampler(
            len(self.dataset),
            self.batch_size,
            self.dataset.seed,
            self.epochs,
            start=self.pace.batches,
            rank=self.trainer.global_rank,
            world=world,
            weights=self.weights,
        )
        return stream(self.dataset, sampler, self.workers, torch.cuda.is_available())


class BrokenImages(Callback):
    """Counts and names images that could not be read; too many of them stop the run."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.paths: dict[str, None] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        for path in batch.broken:
            if path not in self.paths:
                self.paths[path] = None
                log.warning("skipped, can't be read: %s", path)
        if len(self.paths) > BROKEN_SHARE * self.images:
            raise UserError(
                f"{len(self.paths)} of {self.images} images can't be read, the first "
                f"{next(iter(self.paths))}"
            )
