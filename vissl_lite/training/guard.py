"""Watching the loss: no longer a number, no better than guessing, diverging."""

import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vissl_lite.data.stream import Batch
from vissl_lite.errors import UserError
from vissl_lite.training.schedule import Schedule

log = logging.getLogger(__name__)

# Weight of a new value in the running loss, and how many values it takes to mean something.
NEW, ENOUGH = 0.2, 10

# Share of the run, beside the warm-up, in which the loss may do what it likes: queues fill.
SETTLING = 0.2

# As a multiple of the loss of guessing, from where a loss is as good as that.
NEAR = 0.97

# Share of the run for which a loss has to be too high to be called diverged.
LONG = 0.05


class LossGuard(Callback):
    """Says what is wrong with a loss, and ends a run whose loss is no longer a number.

    It looks at the loss as often as metrics are logged, as each look waits for a GPU, and before a
    checkpoint is written: so the last checkpoint is always a good one.

    Args:
        pace: the run's.
        log_every: optimizer steps between looks.
        title: of the training, for warnings.
        chance_loss: the loss of guessing, where it is known.
    """

    def __init__(
        self, pace: Schedule, log_every: int, title: str, chance_loss: float | None = None
    ) -> None:
        self.pace, self.log_every, self.title = pace, log_every, title
        self.chance_loss = chance_loss
        self._loss: Tensor | None = None  # of the last batch
        self._running = 0.0
        self._seen = 0
        self._highest = 0.0  # running loss while it settled
        self._high_since: float | None = None  # share of the run
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
        if self.pace.batches % (self.log_every * self.pace.accumulate) == 0:
            # Lightning divides it, for the gradients to add up
            self._take(self._finite_loss(trainer) * self.pace.accumulate)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._finite_loss(trainer)
        fine = [p.isfinite().all() for p in module.parameters() if p.is_floating_point()]
        if fine and not torch.stack(fine).all():
            raise self._not_a_number("weights are no longer finite numbers")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._finite_loss(trainer)

    def _finite_loss(self, trainer: pl.Trainer) -> float:
        if self._loss is None:
            return 0.0
        # All processes have to stop together, or those left would wait for the others.
        several = trainer.world_size > 1
        loss = float(trainer.strategy.reduce(self._loss.clone()) if several else self._loss)
        if not math.isfinite(loss):
            raise self._not_a_number(f"loss is {loss}, no finite number")
        return loss

    def _not_a_number(self, what: str) -> UserError:
        return UserError(
            f"{self.title} has diverged: after step {self.pace.steps} the {what}; start again with "
            f"a lower --lr (it was {self.pace.lr:.2g}), a longer --warmup, or --precision 32-true"
        )

    def _take(self, loss: float) -> None:
        self._seen += 1
        # the first values count equally, then ever older ones less
        self._running += (loss - self._running) * max(NEW, 1 / self._seen)
        if self._seen == 1:
            self._highest = loss
        if self.pace.fraction <= max(SETTLING, self.pace.warmup):
            self._highest = max(self._highest, self._running)
        elif self._seen >= ENOUGH:
            self._compare_with_guessing()
            self._look_for_divergence()

    def _compare_with_guessing(self) -> None:
        chance = self.chance_loss
        if chance is None or "chance" in self._warned:
            return
        if self._running > NEAR * chance:
            self._warned.append("chance")
            log.warning(
                "%(title)s does no better than guessing: its loss is %(loss).2f after "
                "%(percent).0f %% of the run, where guessing gives %(chance).2f. Try a lower --lr, "
                "a longer --warmup or a larger --batch_size, and look whether the images are all "
                "but the same.",
                {
                    "title": self.title,
                    "loss": self._running,
                    "percent": 100 * self.pace.fraction,
                    "chance": chance,
                },
                extra={"code": "loss.chance"},
            )

    def _look_for_divergence(self) -> None:
        if self._running <= self._highest + max(abs(self._highest) / 2, 0.5):
            self._high_since = None
            return
        if self._high_since is None:
            self._high_since = self.pace.fraction
        long = self.pace.fraction - self._high_since >= LONG
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
                    "lr": self.pace.lr,
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
