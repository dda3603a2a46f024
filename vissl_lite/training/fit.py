"""``fit``: train a module on a stream with Lightning's Trainer."""

import logging
import math
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from vissl_lite.errors import Terminated, UserError
from vissl_lite.faults import is_out_of_memory
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.run import CHECKPOINT
from vissl_lite.slurm import requeue
from vissl_lite.training.checkpoints import (
    AtomicCheckpointIO,
    Checkpoints,
    Stopping,
    check_checkpoint,
    read_checkpoint,
)
from vissl_lite.training.compiling import compiled
from vissl_lite.training.cpu.operators import fast_cpu_operators
from vissl_lite.training.guard import LossGuard
from vissl_lite.training.hardware import Hardware, choose_precision, tf32
from vissl_lite.training.memory import out_of_memory
from vissl_lite.training.progress import MetricsLogger, ProgressBar, StepEnd, ThroughputMonitor
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.sharding import SHARDED_PRECISIONS, check_same_sharding
from vissl_lite.training.stream import BrokenImages, StreamData
from vissl_lite.training.sync_batchnorm import SyncBatchNorm

# Warnings of Lightning that do not apply: the stream can be resumed, and few workers suffice.
_NOISE = (
    ".*does not have many workers.*",
    ".*ended before the epoch ended.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*broadcast_buffers. is deprecated.*",  # Older torches lack its replacement.
)


@dataclass(frozen=True)
class TrainingFiles:
    """Files of a training.

    Attributes:
        metrics: File that metrics are logged to; None for none.
        checkpoints: Folder of ``last.ckpt``; None for no checkpoints.
        resume: Whether to continue from ``last.ckpt`` if it exists.
    """

    metrics: MetricsFile | None = None
    checkpoints: Path | None = None
    resume: bool = False


NO_FILES = TrainingFiles()


@contextmanager
def settings_restored() -> Iterator[None]:
    """Restore the log level of Lightning and cuDNN's benchmark mode on exit."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    benchmark = torch.backends.cudnn.benchmark
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@settings_restored()
def fit(
    module: pl.LightningModule,
    data: StreamData,
    schedule: Schedule,
    hardware: Hardware,
    callbacks: Sequence[Callback] = (),
    files: TrainingFiles = NO_FILES,
    title: str = "training",
    loggers: Sequence[Logger] = (),
    chance_loss: float | None = None,
) -> pl.Trainer:
    """Train a module on a stream.

    Args:
        module: Module with ``training_step`` and ``configure_optimizers``.
        data: Training stream.
        schedule: Length and learning rate of the run.
        hardware: Devices, strategy and precision.
        callbacks: Additional callbacks, which run before a checkpoint is written.
        files: Where metrics and checkpoints are written.
        title: Description of the progress bar.
        loggers: Loggers in addition to ``files.metrics``.
        chance_loss: Loss of a random guess, if it is known; see ``LossGuard``.

    Returns:
        The trainer after the last step.

    Raises:
        UserError: The batch does not fit into memory (the message names a batch size that does),
            the loss is not finite, or the run to resume used another strategy or other images.
        KeyboardInterrupt: SIGINT was received. A checkpoint has been written if training had begun.
        Terminated: SIGTERM was received; as above.
    """
    module.to(memory_format=torch.channels_last)
    module.train()  # Lightning keeps the mode that it finds.
    log_every = max(1, min(50, math.ceil(data.batches_per_epoch / schedule.accumulate / 5)))
    all_callbacks = [
        schedule,
        BrokenImages(len(data.dataset)),
        LossGuard(schedule, log_every, title, chance_loss),
        ProgressBar(title, data, schedule),
        *callbacks,
    ]
    monitor = ThroughputMonitor(data, schedule, log_every)
    all_callbacks.append(monitor)
    last, checkpoints, metrics = None, None, files.metrics
    if files.checkpoints is not None:
        checkpoints = Checkpoints(files.checkpoints, data, metrics, log_every)
        all_callbacks.append(checkpoints)
        if files.resume and metrics is not None and not (files.checkpoints / CHECKPOINT).is_file():
            metrics.drop_after(-1)  # Killed before the first checkpoint: start over.
        if files.resume and (files.checkpoints / CHECKPOINT).is_file():
            last = files.checkpoints / CHECKPOINT
            saved = read_checkpoint(last)
            check_same_sharding(saved, hardware.sharded)
    all_callbacks.append(StepEnd(monitor, schedule))
    precision = choose_precision(hardware.precision, module)
    if hardware.sharded and precision not in SHARDED_PRECISIONS:
        precision = "32-true"  # A GPU without bf16.
    trainer = pl.Trainer(
        accelerator="auto",
        devices=hardware.devices_here(),
        num_nodes=hardware.num_nodes,
        strategy=hardware.lightning_strategy(),
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,  # The stream is one epoch.
        logger=[*([] if metrics is None else [MetricsLogger(metrics)]), *loggers],
        log_every_n_steps=log_every,
        accumulate_grad_batches=schedule.accumulate,
        callbacks=all_callbacks,
        plugins=[AtomicCheckpointIO(), SyncBatchNorm()],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    if last is not None:
        check_checkpoint(last, saved, module, trainer, data, hardware.sharded)
        if metrics is not None:
            metrics.drop_after(saved["global_step"] - 1)
        del saved
    fast = compiled(module) if hardware.compile else fast_cpu_operators()
    with warnings.catch_warnings(), tf32(), fast:
        for message in _NOISE:
            warnings.filterwarnings("ignore", message)
        too_large = False
        try:
            trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
        except Stopping as stop:
            raise _exception_of(stop.signal) from None
        except SystemExit as error:  # Lightning turns a Ctrl-C into it.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
        except (RuntimeError, MemoryError) as error:
            if trainer.world_size > 1 and _lost_another(error):
                raise UserError(
                    "another process of this run has ended, so this one stops too: see the output "
                    "of that process, then start all of them again with --resume"
                ) from error
            if not is_out_of_memory(error) or "DataLoader worker" in str(error):
                raise
            too_large = True  # Handled below, when the exception has released its tensors.
        if too_large:
            raise out_of_memory(module, trainer, data.dataset, data.batch_size, schedule.accumulate)
    if checkpoints is not None and checkpoints.signal:  # received after the last step
        if checkpoints.signal == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()
        raise _exception_of(checkpoints.signal)
    return trainer


def _exception_of(number: int) -> BaseException:
    """The exception that stands for a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


def _lost_another(error: Exception) -> bool:
    """Whether torch.distributed has lost the connection to another process."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
