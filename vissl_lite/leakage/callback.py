"""Record the fingerprints of the training images of a run for the leak check."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback

from vissl_lite.data.fingerprints import EXACT_BYTES, LOOK_BYTES, Fingerprints
from vissl_lite.data.stream import Batch
from vissl_lite.leakage.matching import FINGERPRINTS
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData

# Index of an image in the data set and its fingerprint. A record may occur twice.
_RECORD = np.dtype([("index", "<i8"), ("fingerprint", "u1", (EXACT_BYTES + LOOK_BYTES,))])


class FingerprintCallback(Callback):
    """Record the fingerprints in the batches of the first epoch.

    Each process appends to its own file after every batch, so that a killed run keeps those of all
    its steps. At the end of training the files are merged into ``fingerprints.npz``. Images that
    the first epoch drops with its incomplete batch are added if there was a second epoch.

    Args:
        run: Run folder.
        data: Training stream.
        schedule: Schedule of the run; it counts batches before this callback runs.
        before: Images of earlier training of the encoder, or of one that it learns from.
    """

    def __init__(
        self, run: Path, data: StreamData, schedule: Schedule, before: Fingerprints | None = None
    ) -> None:
        self.file, self.parts = run / FINGERPRINTS, run / "fingerprints"
        self.data, self.schedule, self.before = data, schedule, before

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.parts.mkdir(parents=True, exist_ok=True)
        self._part = self.parts / f"{trainer.global_rank}.bin"
        if self._part.exists():  # The last record of a killed run may be incomplete
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
        if batch.names:  # Written before the records, so that every record has a name
            pairs = zip(self.data.indices.tolist(), batch.names, strict=True)
            with self._part.with_suffix(".names").open("a", encoding="ascii") as out:
                out.writelines(f"{json.dumps(pair)}\n" for pair in pairs)
        records = np.empty(len(batch.fingerprints), _RECORD)
        records["index"] = self.data.indices.numpy()
        records["fingerprint"] = batch.fingerprints
        with self._part.open("ab") as part:
            part.write(records.tobytes())

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        if self.file.exists() and not any(self.parts.iterdir()):
            shutil.rmtree(self.parts)  # Resumed after being killed past the last step
            return
        source = self.data.dataset
        records, names = _read(self.parts), _read_names(self.parts)
        indices = records["index"]
        seen = [names.get(index) or source.name(index) for index in indices.tolist()]
        found = Fingerprints.of(records["fingerprint"], seen)
        if self.schedule.batches > self.data.batches_per_epoch:
            rest = np.setdiff1d(np.arange(len(source)), indices, assume_unique=True)
            found = found.join(source.fingerprints(rest))
        if self.file.exists():  # Killed between this file and the last checkpoint
            found = Fingerprints.load(self.file).join(found)
        (found if self.before is None else self.before.join(found)).save(self.file)
        shutil.rmtree(self.parts)


def _read(parts: Path) -> np.ndarray:
    """Records of all processes, one for each image, sorted by index."""
    files = [np.fromfile(file, _RECORD) for file in sorted(parts.glob("*.bin"))]
    records = np.concatenate([np.empty(0, _RECORD), *files])
    return records[np.unique(records["index"], return_index=True)[1]]


def _read_names(parts: Path) -> dict[int, str]:
    """Names of images by index, for batches that carry names."""
    names: dict[int, str] = {}
    for file in sorted(parts.glob("*.names")):
        for line in file.read_text(encoding="ascii").splitlines():
            with suppress(ValueError):  # The last line may be incomplete
                number, name = json.loads(line)
                names[number] = name
    return names
