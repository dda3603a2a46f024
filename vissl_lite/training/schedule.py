"""The pace of a run: where it stands, its learning rate, its end."""

import time
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from vissl_lite.data.stream import Batch
from vissl_lite.optim import cosine_with_warmup, set_lr


class Schedule(Callback):
    """Where a run stands: sets the learning rate, seeds each step, ends a time budget on time.

    A pretext's schedules read the share of the run that is done from its ``progress``.

    Everything random in a step follows from (seed, step, rank), so that a resumed run draws what
    an uninterrupted one would have drawn, with no generator's state to save.

    Args:
        lr: peak learning rate.
        warmup: share of the training in which the rate rises.
        seed: the run's seed.
        batches: length of the run, or
        seconds: its time budget.
        started: ``time.monotonic()`` at the start of the command, which the budget counts from.
        accumulate: batches an optimizer step.
    """

    def __init__(
        self,
        lr: float,
        warmup: float,
        seed: int,
        batches: int | None = None,
        seconds: float | None = None,
        started: float | None = None,
        accumulate: int = 1,
    ) -> None:
        self.accumulate = accumulate
        self.lr, self.warmup, self.seed = lr, warmup, seed
        self.total, self.seconds = batches, seconds
        self.started = time.monotonic() if started is None else started
        self.batches = 0
        self.ended = False  # whether training has come to its end
        self.fraction = 0.0
        self.reserve = 0.0  # seconds kept for what comes after the last step
        self._earlier = 0.0  # seconds spent before a resume
        self._step_seconds = 0.0

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return -(-self.batches // self.accumulate)

    def elapsed(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self._earlier + time.monotonic() - self.started

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.ended:  # before the run was killed, which was resumed for what comes after it
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.ended = True

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
        module.progress = self.fraction  # type: ignore[assignment]
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
        whole_step = self.batches % self.accumulate == 0
        if whole_step and left < self.accumulate * self._step_seconds / 2:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "elapsed": self.elapsed(), "ended": self.ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches, self.ended = state_dict["batches"], state_dict["ended"]
        self._earlier = state_dict["elapsed"]
