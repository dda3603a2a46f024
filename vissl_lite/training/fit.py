"""``fit``: a module, a stream and a pace through Lightning's Trainer."""

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
from vissl_lite.training.sharding import PRECISIONS, check_same_sharding
from vissl_lite.training.stream import BrokenImages, StreamData
from vissl_lite.training.sync_batchnorm import SyncBatchNorm

# Lightning's warnings that do not apply: the stream can be resumed, and few workers are meant.
_NOISE = (
    ".*does not have many workers.*",
    ".*ended before the epoch ended.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*`IterableDataset` has `__len__`.*",
    ".*broadcast_buffers. is deprecated.*",  # what is to replace it is not there in older torches
)


@dataclass(frozen=True)
class TrainingFiles:
    """What a training writes.

    Attributes:
        metrics: where what is logged goes.
        checkpoints: folder to keep ``last.ckpt`` in.
        resume: continue from ``last.ckpt`` if it is there.
    """

    metrics: MetricsFile | None = None
    checkpoints: Path | None = None
    resume: bool = False


NO_FILES = TrainingFiles()


@contextmanager
def settings_restored() -> Iterator[None]:
    """Keep Lightning's chatter and cuDNN's search for convolutions to a training."""
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
    pace: Schedule,
    hardware: Hardware,
    callbacks: Sequence[Callback] = (),
    files: TrainingFiles = NO_FILES,
    title: str = "training",
    loggers: Sequence[Logger] = (),
    chance_loss: float | None = None,
) -> pl.Trainer:
    """Train a module on a stream.

    Args:
        module: with ``training_step`` and ``configure_optimizers``.
        data: the stream.
        pace: its length and learning rate.
        hardware: where and how.
        callbacks: further ones, run before the checkpoint is written.
        files: where metrics and checkpoints go.
        title: of the progress bar.
        loggers: further ones beside ``files.metrics``.
        chance_loss: the loss of guessing, where it is known; see ``LossGuard``.

    Returns:
        The trainer, done.

    Raises:
        UserError: the batch does not fit into memory; it says which one would. Or the loss is no
            longer a number, or the run to continue had another kind of strategy or other images.
        KeyboardInterrupt, Terminated: a signal said so; the training is saved, if it has begun and
            is kept at all.
    """
    module.to(memory_format=torch.channels_last)
    module.train()  # Lightning leaves the modes of modules as it finds them
    log_every = max(1, min(50, math.ceil(data.batches_per_epoch / pace.accumulate / 5)))
    every = [
        pace,
        BrokenImages(len(data.dataset)),
        LossGuard(pace, log_every, title, chance_loss),
        ProgressBar(title, data, pace),
        *callbacks,
    ]
    meter = ThroughputMonitor(data, pace, log_every)
    every.append(meter)
    last, keeper, metrics = None, None, files.metrics
    if files.checkpoints is not None:
        keeper = Checkpoints(files.checkpoints, data, metrics, log_every)
        every.append(keeper)
        if files.resume and metrics is not None and not (files.checkpoints / CHECKPOINT).is_file():
            metrics.drop_after(-1)  # killed before there was a checkpoint: all is done again
        if files.resume and (files.checkpoints / CHECKPOINT).is_file():
            last = files.checkpoints / CHECKPOINT
            saved = read_checkpoint(last)
            check_same_sharding(saved, hardware.sharded)
    every.append(StepEnd(meter))
    precision = choose_precision(hardware.precision, module)
    if hardware.sharded and precision not in PRECISIONS:
        precision = "32-true"  # on a GPU without bf16
    trainer = pl.Trainer(
        accelerator="auto",
        devices=hardware.devices_here(),
        num_nodes=hardware.num_nodes,
        strategy=hardware.lightning_strategy(),
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,  # the stream: its length is the whole run
        logger=[*([] if metrics is None else [MetricsLogger(metrics)]), *loggers],
        log_every_n_steps=log_every,
        accumulate_grad_batches=pace.accumulate,
        callbacks=every,
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
            raise _ended_by(stop.signal) from None
        except SystemExit as error:  # which Lightning makes of a Ctrl-C
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
        except (RuntimeError, MemoryError) as error:
            if trainer.world_size > 1 and _lost_another(error):
                raise UserError(
                    "another process of this run has ended, and so this one does: its own output "
                    "says why; start all of them again, with --resume"
                ) from error
            if not is_out_of_memory(error) or "DataLoader worker" in str(error):
                raise
            too_large = True  # tried out below, once the exception has let go of its tensors
        if too_large:
            raise out_of_memory(module, trainer, data.dataset, data.batch_size, pace.accumulate)
    if keeper is not None and keeper.told_to_stop:
        raise _ended_by(keeper.told_to_stop)
    return trainer


def _ended_by(number: int) -> BaseException:
    """What a signal ends a process with."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


def _lost_another(error: Exception) -> bool:
    """Whether torch.distributed could no longer reach another process."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
