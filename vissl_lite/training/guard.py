"""A callback that checks the loss: not finite, no better than chance, or diverging."""

import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vissl_lite.data.stream import Batch
from vissl_lite.errors import DivergedError
from vissl_lite.training.schedule import Schedule

log = logging.getLogger(__name__)

# Weight of a new value in the running mean of the loss, and the number of values after which the
# mean is used.
SMOOTHING, MIN_VALUES = 0.2, 10

# First fraction of the run in which nothing is checked: a loss may rise while a queue fills.
SETTLING_FRACTION = 0.2

# A loss above this multiple of the chance loss counts as no better than chance.
CHANCE_FACTOR = 0.97

# Fraction of the run for which the loss must be too high before it counts as diverged.
DIVERGENCE_FRACTION = 0.05


class LossGuard(Callback):
    """Stop a run whose loss is not finite, and warn about a loss that does not fall.

    The loss is checked whenever metrics are logged (reading it waits for the GPU) and before each
    checkpoint, so that the last checkpoint never holds weights that are not finite.

    Args:
        schedule: Schedule of the run.
        log_every: Optimizer steps between two checks.
        title: Name of the training in warnings.
        chance_loss: Loss of a random guess; None if it is not known.
    """

    def __init__(
        self, schedule: Schedule, log_every: int, title: str, chance_loss: float | None = None
    ) -> None:
        self.schedule, self.log_every, self.title = schedule, log_every, title
        self.chance_loss = chance_loss
        self._loss: Tensor | None = None  # Of the last batch.
        self._running = 0.0
        self._seen = 0
        self._highest = 0.0  # Largest running mean while it settled.
        self._high_since: float | None = None  # Fraction of the run.
        self._warned: list[str] = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._loss = outputs["loss"]
        if self.schedule.batches % (self.log_every * self.schedule.accumulate) == 0:
            # Lightning divides the loss by the number of accumulated batches.
            self._add(self._finite_loss(trainer) * self.schedule.accumulate)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._finite_loss(trainer)
        fine = [p.isfinite().all() for p in module.parameters() if p.is_floating_point()]
        if fine and not torch.stack(fine).all():
            raise self._not_finite("weights are no longer finite numbers")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._finite_loss(trainer)

    def _finite_loss(self, trainer: pl.Trainer) -> float:
        if self._loss is None:
            return 0.0
        # All processes have to stop together, or the others would wait forever.
        several = trainer.world_size > 1
        loss = float(trainer.strategy.reduce(self._loss.clone()) if several else self._loss)
        if not math.isfinite(loss):
            raise self._not_finite(f"loss is {loss}, which is not finite")
        return loss

    def _not_finite(self, what: str) -> DivergedError:
        return DivergedError(
            f"{self.title} has diverged: after step {self.schedule.steps} the {what}; start again "
            f"with a lower --lr (it was {self.schedule.lr:.2g}), a longer --warmup, or "
            f"--precision 32-true"
        )

    def _add(self, loss: float) -> None:
        self._seen += 1
        # A plain mean at first, then an exponential moving average.
        self._running += (loss - self._running) * max(SMOOTHING, 1 / self._seen)
        if self._seen == 1:
            self._highest = loss
        if self.schedule.fraction <= max(SETTLING_FRACTION, self.schedule.warmup_end):
            self._highest = max(self._highest, self._running)
        elif self._seen >= MIN_VALUES:
            self._compare_with_chance()
            self._check_divergence()

    def _compare_with_chance(self) -> None:
        chance = self.chance_loss
        if chance is None or "chance" in self._warned:
            return
        if self._running > CHANCE_FACTOR * chance:
            self._warned.append("chance")
            log.warning(
                "%(title)s does no better than chance: its loss is %(loss).2f after "
                "%(percent).0f %% of the run, where a random guess gives %(chance).2f. Try a lower "
                "--lr, a longer --warmup, views that differ less (--pretext.color) or a larger "
                "--batch_size, and check that the images are not nearly identical.",
                {
                    "title": self.title,
                    "loss": self._running,
                    "percent": 100 * self.schedule.fraction,
                    "chance": chance,
                },
                extra={"code": "loss.chance"},
            )

    def _check_divergence(self) -> None:
        if self._running <= self._highest + max(abs(self._highest) / 2, 0.5):
            self._high_since = None
            return
        if self._high_since is None:
            self._high_since = self.schedule.fraction
        long = self.schedule.fraction - self._high_since >= DIVERGENCE_FRACTION
        if long and "diverged" not in self._warned:
            self._warned.append("diverged")
            log.warning(
                "The loss of %(title)s rises instead of falling: it is %(loss).3g, and was "
                "%(highest).3g at most while the training settled. The learning rate is too high "
                "for it: try a lower --lr (it is %(lr).2g) or a longer --warmup.",
                {
                    "title": self.title,
                    "loss": self._running,
                    "highest": self._highest,
                    "lr": self.schedule.lr,
                },
                extra={"code": "loss.rising"},
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "running": self._running,
            "seen": self._seen,
            "highest": self._highest,
            "high_since": self._high_since,
            "warned": list(self._warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._running, self._seen = state_dict["running"], state_dict["seen"]
        self._highest, self._high_since = state_dict["highest"], state_dict["high_since"]
        self._warned = list(state_dict["warned"])
