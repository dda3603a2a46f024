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
from vissl_lite.run import CHECKPOINT, MetricsFile
from vissl_lite.training.hardware import under_slurm
from vissl_lite.training.sharding import mark_sharding
from vissl_lite.training.stream import StreamData

log = logging.getLogger(__name__)


class Stopping(BaseException):
    """Ends a training that was told to stop by a signal.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and that are never unpickled beyond tensors."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        part = Path(f"{path}.part")
        try:
            with part.open("wb") as opened:  # its errors say more than those of torch's own writer
                torch.save(checkpoint, opened)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

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

    SIGTERM, by which machines are taken back, and SIGINT (Ctrl-C) end the run after the step that
    it is in, or at once while it waits for data, with a checkpoint. So does SIGUSR1 under SLURM
    (``#SBATCH --signal=USR1@SECONDS``), and then the job is put into the queue again. It is enough
    that one process gets the signal. A second Ctrl-C ends the run at once, without a checkpoint.

    It is the last callback that sees a step, so that a checkpoint holds what the others did.

    Args:
        folder: made if missing.
        data: the training stream.
        metrics: written out before each checkpoint, so that a resumed run has all its rows.
        log_every: optimizer steps between rows.
    """

    TIME_SHARE = 0.01

    # Steps after which processes on GPUs agree on what to do: each time waits for the GPU.
    AGREE_EVERY = 10

    def __init__(
        self, folder: Path, data: StreamData, metrics: MetricsFile | None, log_every: int
    ) -> None:
        self.folder, self.data = folder, data
        self.metrics, self.log_every = metrics, log_every
        self._saved_at: float | None = None
        self._seconds = 0.0
        self._signal = 0
        self._alone = True
        self._whole = True  # whether no gradients have been gathered that no step has used yet

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._alone = trainer.world_size == 1
        # In place of Lightning's handlers, which save from within a step, into the current folder,
        # and wait for the other processes there, or end the run as if it were done. It sets them
        # after on_fit_start, and puts back what was before them at the end.
        if threading.current_thread() is threading.main_thread():
            for number in (
                signal.SIGINT,
                signal.SIGTERM,
                *([signal.SIGUSR1] if under_slurm() else []),
            ):
                signal.signal(number, self._receive)

    def _receive(self, number: int, _: Any) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        if self._alone and self.data.waiting:
            raise Stopping(number)  # nothing else is going on

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not self._whole:
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
        if due and not stop:
            self.save(trainer)
            stop = self._signal if self._alone else 0  # it may have come while that was written
        if stop:
            raise Stopping(stop)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mark_sharding(checkpoint, module)

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, Stopping):
            return
        if self._whole and trainer.global_step:
            self.save(trainer)
        log.warning("told to stop by %s after step %d", exception.signal.name, trainer.global_step)
        if exception.signal == signal.SIGUSR1 and trainer.is_global_zero:
            _requeue()

    @property
    def told_to_stop(self) -> int:
        """The number of the signal that has come; 0 if none has."""
        return self._signal

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.save(trainer)
        if self._signal and self._alone:
            raise Stopping(self._signal)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint now."""
        started = time.monotonic()
        if self.metrics is not None:
            step = trainer.global_step - 1
            logs = (step + 1) % self.log_every == 0 or trainer.should_stop
            if logs:  # Lightning does, after this
                self.metrics.add(step, {k: float(v) for k, v in trainer.logged_metrics.items()})
            self.metrics.flush(final=True)
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
