"""Training checkpoints: written atomically, read without unpickling anything but tensors."""

import logging
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.data.stream import Batch
from vissl_lite.encoders.encoder import first_line
from vissl_lite.encoders.folder import read_torch
from vissl_lite.errors import UserError
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.run import CHECKPOINT
from vissl_lite.slurm import requeue, under_slurm
from vissl_lite.training.sharding import mark_sharding
from vissl_lite.training.stream import StreamData

log = logging.getLogger(__name__)


class Stopping(BaseException):
    """A signal has asked the training to stop.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically and read them without unpickling anything but tensors."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        # Errors of a plain file are clearer than those of torch's writer.
        with atomic_write(Path(path)) as part, part.open("wb") as opened:
            torch.save(checkpoint, opened)
            opened.flush()
            os.fsync(opened.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a training checkpoint; only tensors and plain values are unpickled.

    Raises:
        UserError: The file is damaged, is not a training checkpoint, or holds other Python objects.
    """
    content = read_torch(file)
    if not isinstance(content, dict) or type(content.get("global_step")) is not int:
        raise UserError(f"{file} is damaged: it is not a training checkpoint")
    return content


_LIGHTNING_2 = re.compile(r"2\.\d{1,4}\.\d{1,4}([.+-]?[a-z0-9]+)?")


def check_checkpoint(
    file: Path,
    content: dict[str, Any],
    module: pl.LightningModule,
    trainer: pl.Trainer,
    data: StreamData,
    sharded: bool,
) -> None:
    """Refuse a checkpoint that this training cannot continue from. Nothing is changed.

    A checkpoint must hold what a new training would write: the same names, types and shapes, and
    finite numbers.

    Args:
        file: Name of the checkpoint in messages.
        content: Content as returned by ``read_checkpoint``.
        module: Module to continue with, not sharded.
        trainer: Trainer with the callbacks of the run.
        data: Training stream.
        sharded: Whether the network is sharded; torch then checks the state of the optimizer.

    Raises:
        UserError: The checkpoint is damaged or belongs to another training.
    """
    try:
        version = content["pytorch-lightning_version"]
        if not isinstance(version, str) or not _LIGHTNING_2.fullmatch(version):
            raise ValueError("it was not written by Lightning 2")
        _check_like(content["epoch"], 0, "epoch")
        _check_like(content["global_step"], 0, "global_step")
        _check_like(content["lr_schedulers"], [], "lr_schedulers")
        _check_names(content["state_dict"], module.state_dict(), "state_dict")
        _check_like(content["loops"]["fit_loop"], trainer.fit_loop.state_dict(), "loops")
        _check_like(content[type(data).__qualname__], data.state_dict(), "data")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if state := callback.state_dict():
                kept = content["callbacks"][callback.state_key]
                _check_like(kept, state, type(callback).__name__)
        _check_count(content, data)
        optimizers = content["optimizer_states"]
        if not isinstance(optimizers, list) or len(optimizers) != 1:
            raise ValueError("it does not have exactly one optimizer")
        if not sharded:
            _check_optimizer(optimizers[0], module)
    except (LookupError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{file} is damaged or belongs to another training: {reason}") from None


def _check_count(content: dict[str, Any], data: StreamData) -> None:
    """Refuse numbers of steps and batches that contradict each other."""
    schedule, steps = data.schedule, content["global_step"]
    batches = content["callbacks"][schedule.state_key]["batches"]
    loop = content["loops"]["fit_loop"]
    ready = loop["epoch_loop.batch_progress"]["current"]["ready"]
    stepped = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    if (
        (steps, stepped["total"]["completed"]) != (-(-batches // schedule.accumulate),) * 2
        or abs(ready - batches) > 1
        or (schedule.total is not None and batches > schedule.total)
    ):
        raise ValueError(f"it has seen {batches} batches in {steps} steps")


def _check_optimizer(saved: Any, module: pl.LightningModule) -> None:
    optimizer: Any = module.configure_optimizers()
    fresh = optimizer.state_dict()
    groups = [  # An int is accepted for a float.
        {name: float(one) if type(one) is int else one for name, one in group.items()}
        for group in fresh["param_groups"]
    ]
    _check_like(saved["param_groups"], groups, "optimizer")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if not isinstance(saved["state"], dict):
        raise TypeError("the optimizer's state is not a mapping")
    plain = isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam))  # AdamW is a subclass.
    kinds = set()
    for number, state in saved["state"].items():
        if type(number) is not int or not 0 <= number < len(weights):
            raise ValueError(f"the optimizer has no weight {str(number)[:60]!r}")
        if not isinstance(state, dict):
            raise TypeError("a state of the optimizer is not a mapping")
        kinds.add(frozenset(state))
        for name, value in state.items():
            place = f"optimizer {str(name)[:60]}"
            scalar = isinstance(value, Tensor) and not value.ndim  # as novograd has for a weight
            if name in _LIKE_WEIGHTS and (plain or not scalar):
                _check_like(value, weights[number].detach(), place)
            elif isinstance(value, Tensor):
                _check_like(value, value, place)
            step = value.item() if isinstance(value, Tensor) and not value.ndim else value
            if name == "step" and not _is_finite(step):
                raise ValueError("the optimizer's step is not a number")
    if plain and kinds - _STATES:
        raise ValueError("the state belongs to another optimizer")


# State tensors with the shape of their weight, and the states of torch's own optimizers.
_LIKE_WEIGHTS = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer"})
_STATES = {
    frozenset({"step", "exp_avg", "exp_avg_sq"}),
    frozenset({"momentum_buffer"}),
    frozenset[str](),
}


def _check_names(saved: Any, own: dict[str, Any], what: str) -> None:
    if not isinstance(saved, dict):
        raise TypeError(f"{what} is not a mapping")
    for name in sorted({*own, *map(str, saved)}):
        if name not in own or name not in saved:
            raise ValueError(f"{name[:80]} is in {what} or in the network, but not in both")
    _check_like(saved, own, what)


def _check_like(saved: Any, fresh: Any, what: str) -> None:
    """Raise a TypeError or ValueError if a saved value does not match a fresh one.

    A mapping must have all keys of the fresh one, a list its length unless that is empty; numbers
    must be finite, and non-negative integers where the fresh value is one; None may have become a
    number.
    """
    if isinstance(fresh, Tensor):
        if not isinstance(saved, Tensor) or saved.shape != fresh.shape:
            raise ValueError(f"{what} has another shape")
        if saved.is_floating_point() != fresh.is_floating_point() or not saved.isfinite().all():
            raise ValueError(f"{what} does not hold finite numbers only")
    elif isinstance(fresh, dict):
        if not isinstance(saved, dict):
            raise TypeError(f"{what} is not a mapping")
        for key, value in fresh.items():
            _check_like(saved[key], value, f"{what}.{key}")
    elif isinstance(fresh, list | tuple):
        if not isinstance(saved, list | tuple) or (fresh and len(saved) != len(fresh)):
            raise TypeError(f"{what} is not a list of {len(fresh) or 'any number of'} values")
        for one, like in zip(saved, fresh, strict=False):
            _check_like(one, like, what)
        if not fresh and not all(isinstance(one, str) or _is_finite(one) for one in saved):
            raise TypeError(f"{what} does not hold numbers and strings only")
    elif isinstance(fresh, bool | str):
        if type(saved) is not type(fresh):
            raise TypeError(f"{what} is not of the type {type(fresh).__name__}")
    elif isinstance(fresh, int):
        if type(saved) is not int or not 0 <= saved < 2**53:
            raise ValueError(f"{what} is not a non-negative integer")
    elif fresh is None and saved is None:
        pass
    elif (fresh is None or isinstance(fresh, float)) and not _is_finite(saved):
        raise ValueError(f"{what} is not a finite number")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


class Checkpoints(Callback):
    """Write ``last.ckpt`` during at most 1 % of the time, and when a signal asks to stop.

    SIGTERM and SIGINT (Ctrl-C) end the run with a checkpoint: after the current step, or at once
    while the run waits for data. SIGUSR1 does the same under SLURM
    (``#SBATCH --signal=USR1@SECONDS``) and puts the job into the queue again. One process that
    receives the signal is enough. A second Ctrl-C ends the run at once, without a checkpoint.

    This is the last callback of a step but ``StepEnd``, so that a checkpoint holds the state of all
    others.

    Args:
        folder: Folder of ``last.ckpt``; created if it is missing.
        data: Training stream.
        metrics: Metrics to write before each checkpoint, so that a resumed run has all rows.
        log_every: Optimizer steps between two rows of metrics.
    """

    TIME_SHARE = 0.01

    # Steps between two agreements of the processes on GPUs: each one waits for the GPU.
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
        self._step_complete = True  # Whether no accumulated gradients are pending.

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._alone = trainer.world_size == 1
        # These replace Lightning's handlers, which save in the middle of a step, into the current
        # folder, or end the run as if it were complete. Lightning sets its own after on_fit_start
        # and restores the previous ones at the end.
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
            raise Stopping(number)  # Only waiting for data.

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._step_complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not self._step_complete:
            return  # A checkpoint does not hold accumulated gradients.
        now = time.monotonic()
        if self._saved_at is None:
            self._saved_at = now - 1.0  # The first one comes early, to measure its duration.
        due = int(now - self._saved_at > max(1.0, self._seconds / self.TIME_SHARE))
        stop = self._signal
        if trainer.world_size > 1:
            on_gpu = module.device.type == "cuda"
            if on_gpu and (batch_idx + 1) // trainer.accumulate_grad_batches % self.AGREE_EVERY:
                return
            asked = torch.tensor([due, stop], device=module.device)
            due, stop = trainer.strategy.reduce(asked, reduce_op="max").tolist()
        if due and not stop:
            self.save(trainer)
            stop = self._signal if self._alone else 0  # It may have arrived meanwhile.
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
        if self._step_complete and trainer.global_step:
            self.save(trainer)
        log.warning(
            "stopped by %(signal)s after step %(step)d",
            {"signal": exception.signal.name, "step": trainer.global_step},
            extra={"code": "training.ended"},
        )
        if exception.signal == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()

    @property
    def signal(self) -> int:
        """Number of the signal that was received; 0 for none."""
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
            if logs:  # Lightning logs them only afterwards.
                self.metrics.add(step, {k: float(v) for k, v in trainer.logged_metrics.items()})
            self.metrics.flush(final=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self.folder / CHECKPOINT, weights_only=False)
        self._saved_at = time.monotonic()
        self._seconds = self._saved_at - started
