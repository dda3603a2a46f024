"""What a run tells while it goes: speed, metrics, a progress bar."""

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
    """Logs the speed, the share of the time spent waiting for data, the epoch and the rate.

    What runs between two steps beside the loading of data is no waiting for it: ``StepEnd`` comes
    after that.
    """

    def __init__(self, data: StreamData, pace: Schedule, log_every: int) -> None:
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
        if self.pace.batches % (self.log_every * self.pace.accumulate) == 0:
            # Through Lightning, which else logs an epoch of its own, and a stream is but one of
            # those. It makes a tensor of it, which waits for a GPU: not at every step.
            module.log("epoch", self.pace.batches / self.data.batches_per_epoch)
            seconds = max(time.monotonic() - self._since, 1e-9)
            values = {
                "lr": trainer.optimizers[0].param_groups[-1]["lr"],
                "images_per_second": self._steps * self.data.batch_size / seconds,
                "data_wait": self._waited / seconds,
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, step=self.pace.steps - 1)
            self._restart()

    def step_ended(self) -> None:
        """Waiting for the next batch begins now."""
        self._step_ended = time.monotonic()


class StepEnd(Callback):
    """The last callback: tells a meter when all others are done with a step.

    Args:
        meter: what measures the waiting.
    """

    def __init__(self, meter: ThroughputMonitor) -> None:
        self.meter = meter

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self.meter.step_ended()


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
        self.metrics.add(int(step or 0), {k: float(v) for k, v in metrics.items()})
        self.metrics.flush()

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """``config.yaml`` holds them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with suppress(OSError) if status == "failed" else nullcontext():  # it has failed already
            self.metrics.flush(final=True)


class ProgressBar(Callback):
    """A progress bar; a line now and then where the output is no terminal."""

    def __init__(self, title: str, data: StreamData, pace: Schedule) -> None:
        self.title, self.data, self.pace = title, data, pace
        self._said = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._bar = progress_bar()
        if is_main_process():
            self._bar.start()
        self._task = self._bar.add_task(self.title, total=1.0, info="")
        self._began, self._first = time.monotonic(), self.pace.batches
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
            self._first_fraction = self.pace.fraction
            self._bar.update(self._task, completed=self.pace.fraction)
        if now - self._said < (0.5 if console.is_terminal else 20) or not is_main_process():
            return
        self._said = now
        speed = (self.pace.batches - self._first) * self.data.batch_size / (now - self._began)
        epoch = self.pace.batches / self.data.batches_per_epoch
        # Lightning divides it, for the gradients of accumulated batches to add up
        loss = float(outputs["loss"]) * self.pace.accumulate
        info = f"epoch {epoch:.1f}  loss {loss:.3f}  {speed:.0f} images/s"
        self._bar.update(self._task, completed=self.pace.fraction, info=info)
        if not console.is_terminal:
            left = self._seconds_left(now)
            if left is not None:
                info += f"  {timedelta(seconds=round(left))} left"
            log.info("%s %3.0f %%  %s", self.title, 100 * self.pace.fraction, info)

    def _seconds_left(self, now: float) -> float | None:
        """What is left of a time budget, or at the pace since training went on; None at first."""
        if self.pace.seconds is not None:
            return max(0.0, self.pace.seconds - self.pace.elapsed())
        assert self._first_fraction is not None
        done = self.pace.fraction - self._first_fraction
        return (now - self._began) * (1 - self.pace.fraction) / done if done > 0 else None

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
