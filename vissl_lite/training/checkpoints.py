"""Checkpoints to resume from: whole or not there, and never unpickled beyond tensors."""

import logging
import os
import pickle
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vissl_lite.data.stream import Batch
from vissl_lite.errors import UserError
from vissl_lite.training.hardware import under_slurm
from vissl_lite.training.sharding import mark_sharding

log = logging.getLogger(__name__)

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
    """Keeps ``last.ckpt``, as often as one per cent of the time allows, and when told to stop.

    SIGTERM, by which machines are taken back, ends the run after the step that it is in, with a
    checkpoint. So does SIGUSR1 under SLURM (``#SBATCH --signal=USR1@SECONDS``), and then the job is
    put into the queue again. It is enough that one process gets the signal.

    Args:
        folder: made if missing.
    """

    TIME_SHARE = 0.01

    # Steps after which processes on GPUs agree on what to do: each time waits for the GPU.
    AGREE_EVERY = 10

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._saved_at: float | None = None
        self._seconds = 0.0
        self._signal = 0

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # In place of Lightning's handlers, which save from within a step, into the current folder,
        # and wait for the other processes there. Lightning puts back what was before.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, *([signal.SIGUSR1] if under_slurm() else [])):
                signal.signal(number, self._receive)

    def _receive(self, number: int, _: Any) -> None:
        self._signal = number

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
        due = int(now - self._saved_at > max(1.0, self._seconds / self.TIME_SHARE))
        stop = self._signal
        if trainer.world_size > 1:
            on_gpu = module.device.type == "cuda"
            if on_gpu and (batch_idx + 1) // trainer.accumulate_grad_batches % self.AGREE_EVERY:
                return
            said = torch.tensor([due, stop], device=module.device)
            due, stop = trainer.strategy.reduce(said, reduce_op="max").tolist()
        if due or stop:
            self.save(trainer)
        if stop:
            self._stop(trainer, signal.Signals(stop))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mark_sharding(checkpoint, module)

    def _stop(self, trainer: pl.Trainer, received: signal.Signals) -> None:
        log.warning(
            "told to stop by %s: step %d is saved, and --resume goes on from there",
            received.name, trainer.global_step,
        )  # fmt: skip
        if received == signal.SIGUSR1 and trainer.is_global_zero:
            _requeue()
        raise SystemExit(128 + received)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint now."""
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self.folder / CHECKPOINT, weights_only=False)
        self._saved_at = time.monotonic()
        self._seconds = self._saved_at - started


def _requeue() -> None:
    """Ask SLURM to start this job again; of an array, this one of its jobs."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ["SLURM_JOB_ID"]
    name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
    try:
        subprocess.run(["scontrol", "requeue", name], check=True)
        log.warning("job %s is in the queue again", name)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("job %s is not in the queue again: %s", name, error)
