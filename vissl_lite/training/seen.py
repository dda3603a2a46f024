"""Keeps the fingerprints of the images that a run has trained on: for the leak guard."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback

from vissl_lite.data.fingerprints import EXACT_BYTES, LOOK_BYTES, Fingerprints, fingerprints_of
from vissl_lite.data.leaks import FINGERPRINTS
from vissl_lite.data.stream import Batch
from vissl_lite.training.pace import Pace
from vissl_lite.training.stream import StreamData

# An image's number in the data set and its fingerprint. A record may be there twice.
_RECORD = np.dtype([("index", "<i8"), ("fingerprint", "u1", (EXACT_BYTES + LOOK_BYTES,))])


class KeepFingerprints(Callback):
    """Writes down the fingerprints that come with the batches of the first epoch.

    Each process appends to a file of its own after every batch, so that a run that is killed has
    those of all its steps; at the end they become one file, ``fingerprints.npz``. What the first
    epoch leaves over, as it fills no batch, is added then, if there was a second one.

    Args:
        run: the run folder.
        data: the training stream.
        pace: the run's; its batches are counted before this callback runs.
        before: images that the encoder has seen before this run, if it did not start untrained.
    """

    def __init__(
        self, run: Path, data: StreamData, pace: Pace, before: Fingerprints | None = None
    ) -> None:
        self.file, self.parts = run / FINGERPRINTS, run / "fingerprints"
        self.data, self.pace, self.before = data, pace, before

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.parts.mkdir(parents=True, exist_ok=True)
        self._part = self.parts / f"{trainer.global_rank}.bin"
        if self._part.exists():  # the last record of a run that was killed may be cut off
            size = self._part.stat().st_size
            os.truncate(self._part, size - size % _RECORD.itemsize)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if batch.fingerprints is None:
            return
        records = np.empty(len(batch.fingerprints), _RECORD)
        records["index"] = batch.indices.cpu().numpy()
        records["fingerprint"] = batch.fingerprints
        with self._part.open("ab") as out:
            out.write(records.tobytes())

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        paths = self.data.dataset.paths
        records = _read(self.parts)
        indices = records["index"]
        found = Fingerprints.of(records["fingerprint"], _absolute(paths, indices))
        if self.pace.batches > self.data.batches_per_epoch:
            rest = np.setdiff1d(np.arange(len(paths)), indices, assume_unique=True)
            found = found.join(fingerprints_of(_absolute(paths, rest)))
        if self.file.exists():  # written, and killed before the last checkpoint was
            found = Fingerprints.load(self.file).join(found)
        (found if self.before is None else self.before.join(found)).save(self.file)
        shutil.rmtree(self.parts)


def _read(parts: Path) -> np.ndarray:
    """The ``_RECORD``s that all processes have written, each image once, by their numbers."""
    files = [np.fromfile(file, _RECORD) for file in sorted(parts.glob("*.bin"))]
    records = np.concatenate([np.empty(0, _RECORD), *files])
    return records[np.unique(records["index"], return_index=True)[1]]


def _absolute(paths: Sequence[str], indices: np.ndarray) -> list[str]:
    return [os.path.abspath(paths[index]) for index in indices]
