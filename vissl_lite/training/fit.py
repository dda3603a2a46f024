"""``fit``: a module, a stream and a pace through Lightning's Trainer."""

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync
from timm.layers import convert_sync_batchnorm

from vissl_lite.run import MetricsFile
from vissl_lite.training.checkpoints import (
    CHECKPOINT,
    AtomicCheckpointIO,
    Checkpoints,
    read_checkpoint,
)
from vissl_lite.training.guard import LossGuard
from vissl_lite.training.hardware import Hardware, choose_precision
from vissl_lite.training.memory import out_of_memory
from vissl_lite.training.pace import Pace
from vissl_lite.training.progress import Bar, Meter, MetricsLogger
from vissl_lite.training.stream import BrokenImages, StreamData

# Lightning's warnings that do not apply: the stream can be resumed, and few workers are meant.
_NOISE = (
    ".*does not have many workers.*",
    ".*ended before the epoch ended.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*`IterableDataset` has `__len__`.*",
)


def fit(
    module: pl.LightningModule,
    data: StreamData,
    pace: Pace,
    hardware: Hardware,
    callbacks: Sequence[Callback] = (),
    metrics: MetricsFile | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
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
        metrics: where what is logged goes.
        checkpoints: folder to keep ``last.ckpt`` in.
        resume: continue from ``last.ckpt`` if it is there.
        title: of the progress bar.
        loggers: further ones beside ``metrics``.
        chance_loss: the loss of guessing, where it is known; see ``LossGuard``.

    Returns:
        The trainer, done.

    Raises:
        UserError: the batch does not fit into the device's memory; it says which one would. Or the
            loss is no longer a number.
    """
    module.to(memory_format=torch.channels_last)
    module.train()  # Lightning leaves the modes of modules as it finds them
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    log_every = max(1, min(50, math.ceil(data.batches_per_epoch / pace.accumulate / 5)))
    every = [
        pace,
        BrokenImages(len(data.dataset)),
        LossGuard(pace, log_every, title, chance_loss),
        Bar(title, data, pace),
        *callbacks,
    ]
    last = None
    if checkpoints is not None:
        every.append(Checkpoints(checkpoints))
        if resume and (checkpoints / CHECKPOINT).is_file():
            last = checkpoints / CHECKPOINT
            done = read_checkpoint(last)["global_step"]
            if metrics is not None:
                metrics.forget_after(done - 1)
    every.append(Meter(data, pace, log_every))  # last: what the others do is no waiting for data
    synchronised = [SyncBatchNorm()] if torch.cuda.is_available() else []
    trainer = pl.Trainer(
        accelerator="auto",
        devices=_devices(hardware),
        num_nodes=hardware.num_nodes,
        strategy=hardware.strategy,
        precision=choose_precision(hardware.precision, module),  # type: ignore[arg-type]
        max_epochs=1,  # the stream: its length is the whole run
        logger=[*([] if metrics is None else [MetricsLogger(metrics)]), *loggers],
        log_every_n_steps=log_every,
        accumulate_grad_batches=pace.accumulate,
        callbacks=every,
        plugins=[AtomicCheckpointIO(), *synchronised],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message)
        too_large = False
        try:
            trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
        except torch.OutOfMemoryError:
            too_large = True  # tried out below, once the exception has let go of its tensors
        if too_large:
            raise out_of_memory(module, trainer, data.dataset, data.batch_size, pace.accumulate)
    return trainer


class SyncBatchNorm(LayerSync):
    """BatchNorm over all GPUs by timm's conversion: torch's drops what timm adds to its norms."""

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        return convert_sync_batchnorm(model)

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        return model  # in evaluation they are ordinary BatchNorms


def _devices(hardware: Hardware) -> int | str:
    if hardware.devices == "auto" and not torch.cuda.is_available():
        return 1
    return hardware.devices
