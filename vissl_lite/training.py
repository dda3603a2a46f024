"""Training on Lightning: precision, workers, the pace of a run, checkpoints, progress."""

import logging
import math
import os
import pickle
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader

from vissl_lite.data.stream import Batch, StreamSampler, ViewDataset, stream
from vissl_lite.errors import UserError
from vissl_lite.optim import cosine_with_warmup, set_lr
from vissl_lite.run import MetricsFile, console, is_main_process

log = logging.getLogger(__name__)

CHECKPOINT = "last.ckpt"

# Lightning's warnings that do not apply: the stream can be resumed, and few workers are meant.
_NOISE = (
    ".*does not have many workers.*",
    ".*ended before the epoch ended.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*`IterableDataset` has `__len__`.*",
)

# At most this share of the images may be unreadable.
BROKEN_SHARE = 0.2


@dataclass(frozen=True)
class Hardware:
    """Where and how to compute; Lightning's names and meanings.

    Attributes:
        precision: ``auto``, or a precision of Lightning such as ``32-true`` or ``bf16-mixed``.
        devices: number of devices, or ``auto``.
        num_nodes: number of machines.
        strategy: ``auto``, ``ddp`` and so on.
        num_workers: data workers a device; None decides by the cores there are.
    """

    precision: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    num_workers: int | None = None

    def workers(self) -> int:
        """Data workers for each device.

        A worker feeds several hundred images a second; beside a training step on the CPU itself,
        one is enough, and more take cores away from it.
        """
        if self.num_workers is not None:
            return self.num_workers
        if not torch.cuda.is_available():
            return 1
        return max(1, min(16, _cores() // max(1, torch.cuda.device_count())))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_precision(precision: str, model: nn.Module) -> str:
    """The precision for ``auto``: bf16 where it is faster.

    On CPUs with bf16 instructions that is so for plain convolutions and transformers (ResNet-18 at
    224 pixels: 2.0 times as fast as float32), not for depthwise convolutions (MobileNet,
    EfficientNet, ConvNeXt: no gain).
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    depthwise = any(
        isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules()
    )
    return "bf16-mixed" if cpu_has_bf16() and not depthwise else "32-true"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16, AMX)."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


class Pace(Callback):
    """Where a run stands: sets the learning rate, seeds each step, ends a time budget on time.

    Everything random in a step follows from (seed, step, rank), so that a resumed run draws what
    an uninterrupted one would have drawn, with no generator's state to save.

    Args:
        lr: peak learning rate.
        warmup: share of the training in which the rate rises.
        seed: the run's seed.
        batches: length of the run, or
        seconds: its time budget.
        started: ``time.monotonic()`` at the start of the command, which the budget counts from.
    """

    def __init__(
        self,
        lr: float,
        warmup: float,
        seed: int,
        batches: int | None = None,
        seconds: float | None = None,
        started: float | None = None,
    ) -> None:
        self.lr, self.warmup, self.seed = lr, warmup, seed
        self.total, self.seconds = batches, seconds
        self.started = time.monotonic() if started is None else started
        self.batches = 0
        self.fraction = 0.0
        self.reserve = 0.0  # seconds kept for what comes after the last step
        self._earlier = 0.0  # seconds spent before a resume
        self._step_seconds = 0.0

    def elapsed(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self._earlier + time.monotonic() - self.started

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._step_started = time.monotonic()
        if self.seconds is None:
            assert self.total is not None
            self.fraction = self.batches / self.total
        else:
            elapsed = self.elapsed()
            if trainer.world_size > 1:
                elapsed = trainer.strategy.broadcast(elapsed)
            self.fraction = min(1.0, elapsed / max(self.seconds - self.reserve, 1e-9))
        rate = self.lr * cosine_with_warmup(self.fraction, self.warmup)
        for optimizer in trainer.optimizers:
            set_lr(optimizer, rate)
        step = np.random.SeedSequence((self.seed, self.batches, trainer.global_rank))
        torch.manual_seed(int(step.generate_state(1, np.uint64)[0]) >> 1)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self.batches += 1
        if self.seconds is None:
            return
        last = time.monotonic() - self._step_started
        self._step_seconds = (
            last if not self._step_seconds else 0.8 * self._step_seconds + 0.2 * last
        )
        left = self.seconds - self.reserve - self.elapsed()
        if trainer.world_size > 1:
            left = trainer.strategy.broadcast(left)
        if left < self._step_seconds / 2:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "elapsed": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]
        self._earlier = state_dict["elapsed"]


class StreamData(pl.LightningDataModule):
    """The training stream of a run, beginning where the run stands.

    Args:
        dataset: the images.
        batch_size: over all devices.
        epochs: how many; None for a stream without end.
        pace: knows how many batches are done.
        workers: data workers a device.
        weights: sampling weights; see ``StreamSampler``.
    """

    def __init__(
        self,
        dataset: ViewDataset,
        batch_size: int,
        epochs: int | None,
        pace: Pace,
        workers: int,
        weights: np.ndarray | None = None,
    ) -> None:
        super().__init__()
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


class Meter(Callback):
    """Logs the speed, the share of the time spent waiting for data, the epoch and the rate."""

    def __init__(self, data: StreamData, pace: Pace, log_every: int) -> None:
        self.data, self.pace, self.log_every = data, pace, log_every
        self._restart()

    def _restart(self) -> None:
        self._since = self._step_ended = time.monotonic()
        self._steps, self._waited = 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._restart()

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._waited += time.monotonic() - self._step_ended

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._steps += 1
        if self.pace.batches % self.log_every == 0:
            seconds = max(time.monotonic() - self._since, 1e-9)
            values = {
                "epoch": self.pace.batches / self.data.batches_per_epoch,
                "lr": trainer.optimizers[0].param_groups[-1]["lr"],
                "images_per_second": self._steps * self.data.batch_size / seconds,
                "data_wait": self._waited / seconds,
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, step=self.pace.batches - 1)
            self._restart()
        self._step_ended = time.monotonic()


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


class MetricsLogger(Logger):
    """Lightning's way to ``metrics.csv``."""

    def __init__(self, metrics: MetricsFile) -> None:
        super().__init__()
        self.metrics = metrics

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {k: float(v) for k, v in metrics.items()}
        if "images_per_second" not in values:
            values.pop("epoch", None)  # Lightning's own, which a stream does not have
        self.metrics.add(int(step or 0), values)
        self.metrics.flush()

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """``config.yaml`` holds them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.metrics.flush(final=True)


class Bar(Callback):
    """A progress bar; a line now and then where the output is no terminal."""

    def __init__(self, title: str, data: StreamData, pace: Pace) -> None:
        self.title, self.data, self.pace = title, data, pace
        self._said = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._bar = progress_bar()
        if is_main_process():
            self._bar.start()
        self._task = self._bar.add_task(self.title, total=1.0, info="")
        self._began, self._first = time.monotonic(), self.pace.batches

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        now = time.monotonic()
        if now - self._said < (0.5 if console.is_terminal else 20) or not is_main_process():
            return
        self._said = now
        speed = (self.pace.batches - self._first) * self.data.batch_size / (now - self._began)
        epoch = self.pace.batches / self.data.batches_per_epoch
        loss = float(outputs["loss"])
        info = f"epoch {epoch:.1f}  loss {loss:.3f}  {speed:.0f} images/s"
        self._bar.update(self._task, completed=self.pace.fraction, info=info)
        if not console.is_terminal:
            log.info("%s %3.0f %%  %s", self.title, 100 * self.pace.fraction, info)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._bar.update(self._task, completed=1.0)
        self._bar.stop()

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        with suppress(AttributeError):  # before training started
            self._bar.stop()


def progress_bar() -> Progress:
    """The one look of all progress bars; tasks need a field ``info``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[info]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
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

    Returns:
        The trainer, done.
    """
    module.to(memory_format=torch.channels_last)
    module.train()  # Lightning leaves the modes of modules as it finds them
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    log_every = max(1, min(50, math.ceil(data.batches_per_epoch / 5)))
    every = [
        pace,
        BrokenImages(len(data.dataset)),
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
    trainer = pl.Trainer(
        accelerator="auto",
        devices=_devices(hardware),
        num_nodes=hardware.num_nodes,
        strategy=hardware.strategy,
        precision=choose_precision(hardware.precision, module),  # type: ignore[arg-type]
        max_epochs=1,  # the stream: its length is the whole run
        logger=MetricsLogger(metrics) if metrics is not None else False,
        log_every_n_steps=log_every,
        callbacks=every,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        sync_batchnorm=torch.cuda.is_available(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message)
        trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
    return trainer


def _devices(hardware: Hardware) -> int | str:
    if hardware.devices == "auto" and not torch.cuda.is_available():
        return 1
    return hardware.devices
