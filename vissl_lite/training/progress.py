"""Throughput, metrics and progress of a training."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from datetime import datetime, timedelta
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vissl_lite.data.stream import Batch
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.run import console, is_main_process
from vissl_lite.training.memory import peak_memory
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData

log = logging.getLogger(__name__)

# The forecast follows after so many batches or seconds, whichever is first. The first two batches
# are not counted: ``torch.compile`` takes a minute for each size of views, and the second batch may
# be the first of its size (see ``resizing`` and ``token_drop``).
FORECAST_BATCHES, FORECAST_SECONDS, SKIPPED_BATCHES = 10, 20.0, 2


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
        due = self.schedule.batches % (self.log_every * self.schedule.accumulate) == 0
        # Lightning writes a row after the last step too.
        if due or trainer.should_stop:
            # Logged through the module: Lightning would log its own epoch otherwise, and a stream
            # is a single one. This waits for the GPU, so it is not done at every step.
            module.log("epoch", self.schedule.batches / self.data.batches_per_epoch)
            seconds = max(time.monotonic() - self._since, 1e-9)
            values = {
                "lr": self.schedule.current_lr,
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
        watching: Where the time spent waiting for data is measured.
    """

    def __init__(self, *watching: ThroughputMonitor | Schedule) -> None:
        self.watching = watching

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        for one in self.watching:
            one.step_ended()


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
        self._began, self._first = math.nan, self.schedule.batches
        self._first_fraction: float | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if math.isnan(self._began):  # not before, as an evaluation may come first
            self._began = time.monotonic()

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
                most = "at most " if self.schedule.open_ended else ""
                info += f"  {most}{timedelta(seconds=round(left))} left"
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


class Forecast(Callback):
    """Log once how fast the training is, how long it will take or how far it will get, and memory.

    It is measured on a few batches after the first ones, which are slower than the others. A
    resumed run is measured again.

    Args:
        data: Training stream.
        schedule: Schedule of the run.
        cost: Relative time of a batch at a fraction of the run, in any unit; batches with small
            views take less.
        paused: Seconds between batches that were not spent on training so far, such as those of
            evaluations.
    """

    def __init__(
        self,
        data: StreamData,
        schedule: Schedule,
        cost: Callable[[float], float] = lambda fraction: 1.0,
        paused: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.data, self.schedule, self.cost, self.paused = data, schedule, cost, paused

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._since: float | None = None
        self._first, self._done = self.schedule.batches, False

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if self._done or not is_main_process():
            return
        batches = self.schedule.batches - self._first - SKIPPED_BATCHES
        if batches < 0:
            return
        if self._since is None:
            self._since = self._clock(module)
        elif batches >= FORECAST_BATCHES or self._now() - self._since >= FORECAST_SECONDS:
            self._done = True
            seconds = max(self._clock(module) - self._since, 1e-9) / batches
            log.info("%s", self.message(seconds, peak_memory(module.device)))

    def _now(self) -> float:
        return time.monotonic() - self.paused()

    def _clock(self, module: pl.LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)  # Kernels are launched ahead of their execution.
        return self._now()

    def message(self, seconds_per_batch: float, memory: int | None) -> str:
        """The forecast as a line of the log.

        Args:
            seconds_per_batch: Mean time of a batch now.
            memory: Peak memory in bytes; None if it is not known.
        """
        schedule, per_epoch = self.schedule, self.data.batches_per_epoch
        now = schedule.fraction
        costs = np.array([self.cost(f) for f in np.linspace(now, 1, 100)]) / self.cost(now)
        if schedule.seconds is None:
            assert schedule.total is not None
            left = (schedule.total - schedule.batches) * seconds_per_batch * float(costs.mean())
            total = _duration(schedule.elapsed() + left)
            most = "at most " if schedule.open_ended else ""
            text = f"{most}{_figure(schedule.total / per_epoch)} epochs take about {total}"
        else:
            left = max(0.0, schedule.seconds - schedule.elapsed())
            speedup = float((1 / costs).mean())
            batches = max(0.0, left - schedule.reserve) / seconds_per_batch * speedup
            epochs = (schedule.batches + batches) / per_epoch
            text = f"about {_figure(epochs)} epochs in {_duration(schedule.seconds)}"
        speed = _figure(self.data.batch_size / seconds_per_batch)
        text = f"{speed} images per second: {text}"
        with suppress(OverflowError):  # after the year 9999
            expected = "latest" if schedule.open_ended else "expected"
            text += f", {expected} end {datetime.now() + timedelta(seconds=left):%Y-%m-%d %H:%M:%S}"
        if memory is None:
            return text
        text += f"; peak memory so far {memory / 2**30:.2f} GiB"
        if schedule.encoder_frozen:
            text += ", more when the encoder is trained"
        elif costs.max() > 1 and not (schedule.tries_memory and self._first == 0):
            text += ", more with the larger batches to come"
        return text


def _duration(seconds: float) -> str:
    """Days, hours, minutes and seconds, as Python writes them."""
    return str(timedelta(seconds=round(min(seconds, 1e13))))


def _figure(value: float) -> str:
    """A number with three digits that matter, or all those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


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
