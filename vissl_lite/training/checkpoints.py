"""Checkpoints to resume from: whole or not there, and never unpickled beyond tensors."""

import os
import pickle
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vissl_lite.data.stream import Batch
from vissl_lite.errors import UserError

CHECKPOINT = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and that are never unpickled beyond tensors."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        part = f"{path}.part"
        torch.save(checkpoint, part)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a training checkpoint; nothing is unpickled but tensors and plain values.

    Raises:
        UserError: the file is damaged, or holds other Python objects.
    """
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} holds pickled Python objects beside tensors, which are never executed"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
    return content


class Checkpoints(Callback):
    """Keeps ``last.ckpt``, as often as one per cent of the time allows.

    Args:
        folder: made if missing.
        pace: the run's; its batches are counted before this callback runs.
    """

    TIME_SHARE = 0.01

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._saved_at: float | None = None
        self._seconds = 0.0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gathered gradients are in no checkpoint
        now = time.monotonic()
        if self._saved_at is None:
            self._saved_at = now - 1.0  # the first comes early, to learn how long one takes
        due = now - self._saved_at > max(1.0, self._seconds / self.TIME_SHARE)
        if trainer.world_size > 1:
            due = trainer.strategy.broadcast(due)
        if due:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint now."""
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self.folder / CHECKPOINT, weights_only=False)
        self._saved_at = time.monotonic()
        self._seconds = self._saved_at - started
