"""Throughput, metrics and progress of a training."""

import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vissl_lite.data.stream import Batch
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.run import console, is_main_process
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData

log = logging.getLogger(__name__)


class ThroughputMonitor(Callback):
    """Log images per second, the fraction of time spent waiting for data, epoch and learning rate.

    Other callbacks run between two steps too, which is not counted as waiting: ``StepEnd``, the
    last callback, marks the end of a step.

    Args:
        data: Training stream.
        schedule: Schedule of the run.
        log_every: Optimizer steps between two logged values.
    """

    def __init__(self, data: StreamData, schedule: Schedule, log_every: int) -> None:
        self.data, self.schedule, self.log_every = data, schedule, log_every
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
        if self.schedule.batches % (self.log_every * self.schedule.accumulate) == 0:
            # Logged through the module: Lightning would log its own epoch otherwise, and a stream
            # is a single one. This waits for the GPU, so it is not done at every step.
            module.log("epoch", self.schedule.batches / self.data.batches_per_epoch)
            seconds = max(time.monotonic() - self._since, 1e-9)
            values = {
                "lr": trainer.optimizers[0].param_groups[-1]["lr"],
                "images_per_second": self._steps * self.data.batch_size / seconds,
                "data_wait": self._waited / seconds,
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, step=self.schedule.steps - 1)
            self._restart()

    def step_ended(self) -> None:
        """Start counting the time until the next batch as waiting."""
        self._step_ended = time.monotonic()


class StepEnd(Callback):
    """Mark the end of a step, as the last of all callbacks.

    Args:
        monitor: Monitor that measures the time spent waiting for data.
    """

    def __init__(self, monitor: ThroughputMonitor) -> None:
        self.monitor = monitor

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self.monitor.step_ended()


class MetricsLogger(Logger):
    """Lightning logger that writes ``metrics.csv``.

    Args:
        metrics: File to write.
    """

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
        self.metrics.add(int(step or 0), {k: float(v) for k, v in metrics.items()})
        self.metrics.flush()

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` holds the hyperparameters."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with (
            suppress(OSError) if status == "failed" else nullcontext()
        ):  # The run has failed already.
            self.metrics.flush(final=True)


class ProgressBar(Callback):
    """A progress bar on a terminal, a line of the log every 20 seconds elsewhere.

    Args:
        title: Description of the bar.
        data: Training stream.
        schedule: Schedule of the run.
    """

    def __init__(self, title: str, data: StreamData, schedule: Schedule) -> None:
        self.title, self.data, self.schedule = title, data, schedule
        self._shown_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._bar = progress_bar()
        if is_main_process():
            self._bar.start()
        self._task = self._bar.add_task(self.title, total=1.0, info="")
        self._began, self._first = time.monotonic(), self.schedule.batches
        self._first_fraction: float | None = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        now = time.monotonic()
        if self._first_fraction is None:
            self._first_fraction = self.schedule.fraction
            self._bar.update(self._task, completed=self.schedule.fraction)
        if now - self._shown_at < (0.5 if console.is_terminal else 20) or not is_main_process():
            return
        self._shown_at = now
        speed = (self.schedule.batches - self._first) * self.data.batch_size / (now - self._began)
        epoch = self.schedule.batches / self.data.batches_per_epoch
        # Lightning divides the loss by the number of accumulated batches.
        loss = float(outputs["loss"]) * self.schedule.accumulate
        info = f"epoch {epoch:.1f}  loss {loss:.3f}  {speed:.0f} images/s"
        self._bar.update(self._task, completed=self.schedule.fraction, info=info)
        if not console.is_terminal:
            left = self._seconds_left(now)
            if left is not None:
                info += f"  {timedelta(seconds=round(left))} left"
            log.info("%s %3.0f %%  %s", self.title, 100 * self.schedule.fraction, info)

    def _seconds_left(self, now: float) -> float | None:
        """Seconds left of the time budget or at the speed so far; None if not known yet."""
        if self.schedule.seconds is not None:
            return max(0.0, self.schedule.seconds - self.schedule.elapsed())
        assert self._first_fraction is not None
        done = self.schedule.fraction - self._first_fraction
        return (now - self._began) * (1 - self.schedule.fraction) / done if done > 0 else None

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._bar.update(self._task, completed=1.0)
        self._bar.stop()

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        with suppress(AttributeError):  # Training has not started.
            self._bar.stop()


def progress_bar() -> Progress:
    """A progress bar in the style that all commands share; its tasks need a field ``info``."""
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
