"""The schedule of a run: progress, learning rate, seeds and end."""

import logging
import time
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from vissl_lite.data.stream import Batch
from vissl_lite.optim import cosine_with_warmup, set_lr, set_weight_decay

log = logging.getLogger(__name__)

# In shorter runs, a first step on whole views would take much of the time.
TRIAL_SECONDS = 600


class Schedule(Callback):
    """Track the progress of a run, set the learning rate, seed each step, keep the time budget.

    The learning rate rises linearly, then falls along a cosine; the weight decay changes along a
    cosine where ``OptimizerSettings`` ask for it. The module's ``progress``, from 0
    to 1, is set before each step. All randomness of a step follows from (seed, step, rank), so that
    a resumed run draws the same numbers as one that was not interrupted.

    If the encoder is frozen at first, its learning rate is 0 then, and rises and falls in the rest
    of the run. That of the heads rises within the frozen phase, and falls until the end.

    Args:
        lr: Peak learning rate; see ``OptimizerSettings``.
        warmup: Share of the run in which the learning rate rises: of the part in which the encoder
            is trained, and for the heads of the frozen phase, if there is one.
        seed: Seed of the run.
        batches: Length of the run in batches; None with a time budget.
        seconds: Time budget in seconds; None with a number of batches. What is left of it at the
            first step is the length of the run.
        started: ``time.monotonic()`` at the start of the command, from which the time budget
            counts; default now.
        accumulate: Batches per optimizer step.
        freeze_share: Share of the run at its start in which the encoder is frozen, in [0, 1).

    Attributes:
        batches: Batches done so far.
        ended: Whether the training has reached its end.
        fraction: Fraction of the run that is done.
        current_lr: Learning rate of the encoder in the current step, before layer decay.
        reserve: Seconds of the time budget kept for what follows the last step.
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
        freeze_share: float = 0.0,
    ) -> None:
        self.accumulate, self.freeze_share = accumulate, freeze_share
        self.lr, self.warmup, self.seed = lr, warmup, seed
        self.head_warmup = warmup * freeze_share if freeze_share else warmup
        self.total, self.seconds = batches, seconds
        self.started = time.monotonic() if started is None else started
        self.batches = 0
        self.ended = False
        self.fraction = self.current_lr = 0.0
        self.reserve = 0.0
        self._earlier = 0.0  # Seconds of training before the run was resumed.
        self._begun = 0.0  # Seconds of the time budget before the first step.
        self._step_seconds = 0.0  # Mean time of a batch lately, with waiting for it.
        self._waiting_since: float | None = None
        self._fraction_of = 0  # Batch that ``fraction`` is of.

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far."""
        return -(-self.batches // self.accumulate)

    @property
    def encoder_frozen(self) -> bool:
        """Whether the encoder is frozen in the current step."""
        return self.fraction < self.freeze_share

    @property
    def warmup_end(self) -> float:
        """Fraction of the run at which the warm-up of the encoder ends."""
        return self.freeze_share + (1 - self.freeze_share) * self.warmup

    @property
    def tries_memory(self) -> bool:
        """Whether the first step is on whole views with all patches.

        A batch that is too large for the memory then shows at once. Runs of less than
        ``TRIAL_SECONDS`` begin as ``--progressive_resizing`` and ``--token_drop`` have it.
        """
        return self.seconds is None or self.seconds >= TRIAL_SECONDS

    @property
    def open_ended(self) -> bool:
        """Whether the run may end before ``batches`` or ``seconds``."""
        return False

    def progress(self) -> float:
        """Fraction of the run that is done after the last batch, in [0, 1]."""
        if self.seconds is None:
            return self.fraction_at(self.batches)
        return min(1.0, (self.elapsed() - self._begun) / self._length)

    @property
    def _length(self) -> float:
        """Seconds from the first step to the end, with a time budget."""
        assert self.seconds is not None
        return max(self.seconds - self.reserve - self._begun, 1e-9)

    def fraction_at(self, batch: int) -> float:
        """Fraction of the run that is done before a batch, in [0, 1].

        With a time budget, later batches are expected to follow as fast as the last ones.
        """
        if self.total is not None:
            return batch / self.total
        ahead = max(0, batch - self._fraction_of) * self._step_seconds
        return min(1.0, self.fraction + ahead / self._length)

    def encoder_factor(self) -> float:
        """Learning rate of the encoder in the current step, as a factor of the peak."""
        if self.encoder_frozen:
            return 0.0
        trained = (self.fraction - self.freeze_share) / (1 - self.freeze_share)
        return self.factor_at(trained, self.warmup)

    def head_factor(self) -> float:
        """Learning rate of the heads in the current step, as a factor of their peak."""
        return self.factor_at(self.fraction, self.head_warmup)

    def factor_at(self, fraction: float, warmup: float) -> float:
        """Factor on a peak learning rate in the current step.

        Args:
            fraction: Share that is done of the time in which it is not 0, in [0, 1].
            warmup: Share of that time in which it rises.
        """
        return cosine_with_warmup(fraction, warmup)

    def elapsed(self) -> float:
        """Seconds of training so far, including those before the run was resumed."""
        return self._earlier + time.monotonic() - self.started

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.ended:  # The run was killed after its last step.
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        again, self.ended = self.ended, True
        one_step = self.seconds is not None and self.accumulate > 1 and self.steps == 1
        if one_step and not self.current_lr and not again:
            log.warning(
                "All of --max_time was one step of %(batches)d accumulated batches, the first, at "
                "a learning rate of 0: give more time, or a lower --accumulate_grad_batches",
                {"batches": self.batches},
                extra={"code": "training.no_time"},
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._step_started = time.monotonic()
        # Time of other callbacks, such as evaluations, does not count.
        if self._waiting_since is not None:
            self._step_started = self._waiting_since
        if self.batches == 0 and self.seconds is not None:
            self._begun = self.elapsed()
            if self.seconds - self.reserve <= self._begun:
                log.warning(
                    "Starting took %(begun).0f s, which leaves no time of --max_time to train: the "
                    "encoder stays as it was but for one step. Give more time.",
                    {"begun": self._begun},
                    extra={"code": "training.no_time"},
                )
        if self.batches % self.accumulate == 0:  # a step has one rate, that of its start
            self._begin_step(trainer, module)
        step = np.random.SeedSequence((self.seed, self.batches, trainer.global_rank))
        torch.manual_seed(int(step.generate_state(1, np.uint64)[0]) >> 1)

    def _begin_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.fraction, self._fraction_of = self.progress(), self.batches
        if self.seconds is not None and trainer.world_size > 1:
            self.fraction = trainer.strategy.broadcast(self.fraction)
        self.current_lr = self.lr * self.encoder_factor()
        for optimizer in trainer.optimizers:
            set_lr(optimizer, self.current_lr, self.lr * self.head_factor())
            set_weight_decay(optimizer, self.fraction)
        module.progress = self.fraction  # type: ignore[assignment]

    def step_ended(self) -> None:
        """Start counting the time until the next batch as waiting for it."""
        self._waiting_since = time.monotonic()

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
            left, self._step_seconds = trainer.strategy.broadcast((left, self._step_seconds))
        whole_step = self.batches % self.accumulate == 0
        if whole_step and left < self.accumulate * self._step_seconds / 2:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {
            "batches": self.batches,
            "elapsed": self.elapsed(),
            "begun": self._begun,
            "step_seconds": self._step_seconds,
            "ended": self.ended,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches, self.ended = state_dict["batches"], state_dict["ended"]
        self._fraction_of = self.batches
        self._earlier, self._begun = state_dict["elapsed"], state_dict["begun"]
        self._step_seconds = state_dict["step_seconds"]
        if self.seconds is not None:  # asked for before the first step, by the data workers' views
            self.fraction = self.progress()
