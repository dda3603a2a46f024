"""Schedule of a run whose length is not known in advance: it ends when it stops improving."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from vissl_lite.data.stream import Batch
from vissl_lite.optim import cosine_schedule
from vissl_lite.training.schedule import Schedule

log = logging.getLogger(__name__)

# The warm-up is a share of so many epochs, or of so many optimizer steps if those are more.
WARMUP_EPOCHS, WARMUP_STEPS = 10, 1000

# Batches between two evaluations, as a share of those done: the same number of evaluations falls
# into the last quarter of a short run and of a long one.
EVALUATION_SPACING = 0.05

# The run has stopped improving if, in this last share of it, no measure has risen by more than this
# share of its range so far. What lies further back than FORGOTTEN of the run is not compared: some
# measures start high and fall before they rise.
PATIENCE, MIN_GAIN, FORGOTTEN = 0.25, 0.02, 0.25

# Evaluations that have to lie in the last share of the run, and before it.
MIN_EVALUATIONS = 3

# Weight of a new value in the smoothed ones.
SMOOTHING = 1 / 3

# Length of the cool-down, as a share of what was done before it: a fifth of the whole run, about
# what Hägele et al. 2024 (arXiv 2405.18392) use for language models.
COOLDOWN = 0.25


@dataclass(frozen=True)
class Improvement:
    """Course of a measure until the end of a run that may have stopped improving.

    Attributes:
        best: Highest smoothed value before the last share of the run.
        best_batch: Number of batches done then.
        latest: Highest smoothed value in the last share.
        improved: Whether that is higher than ``best``, by more than noise.
    """

    best: float
    best_batch: int
    latest: float
    improved: bool


def improvement(batches: Sequence[int], scores: Sequence[float]) -> Improvement | None:
    """Whether a measure has improved in the last share of a run.

    Args:
        batches: Batches done before each evaluation, ascending.
        scores: Values of the measure, of which higher ones are better.

    Returns:
        None if there are too few evaluations to tell.
    """
    if not batches:
        return None
    smoothed = [scores[0]]
    for score in scores[1:]:
        smoothed.append(smoothed[-1] + SMOOTHING * (score - smoothed[-1]))
    values = list(zip(smoothed, batches, strict=False))
    done = batches[-1]
    late = [value for value, batch in values if batch > (1 - PATIENCE) * done]
    early = [(value, -b) for value, b in values if FORGOTTEN * done < b <= (1 - PATIENCE) * done]
    if min(len(late), len(early)) < MIN_EVALUATIONS:
        return None
    best, best_batch = max(early)  # of equal ones the first
    latest = max(late)
    gain = MIN_GAIN * (max(smoothed) - min(smoothed))
    return Improvement(best, -best_batch, latest, latest > best + gain)


class OpenSchedule(Schedule):
    """Schedule without a known end: warm-up, constant learning rate, cool-down.

    Warmup-stable-decay (Hu et al. 2024, arXiv 2404.06395). The cool-down begins when no measure of
    the online evaluation has improved for a share of the run, or so late that the run ends at its
    limit; in it, the learning rate falls to 0 along a cosine, and the run ends. As the measures are
    of the encoder, the time in which it is frozen at the start does not count.

    All decisions follow from the number of batches and the measures, so that a resumed run ends
    like one that was not interrupted. Before the cool-down ``fraction`` is that of the limit; in
    it, ``fraction`` rises to 1 along a parabola, so that schedules of pretexts and views, which
    follow it, end as in other runs: its last fifth (0.8 to 1) takes about half of the cool-down.

    Args:
        lr: Peak learning rate.
        warmup: Learning rate warm-up, as a share of 10 epochs (or 1000 optimizer steps, if those
            are more; of the limit if that is shorter).
        seed: Seed of the run.
        limit: Largest length of the run in batches.
        batches_per_epoch: Batches per epoch.
        measures: Names of the measures that decide.
        started: See ``Schedule``.
        accumulate: Batches per optimizer step.
        freeze_share: See ``Schedule``; of the limit.

    Attributes:
        total: Length of the run in batches: the limit until the cool-down begins.
        cooldown_start: Batches done before the cool-down; None before it begins.
        plateaued: Whether it began because no measure improved.
        frozen: Batches at the start in which the encoder is frozen.
        min_spacing: Batches between two evaluations at least, by what they cost.
    """

    def __init__(
        self,
        lr: float,
        warmup: float,
        seed: int,
        limit: int,
        batches_per_epoch: int,
        measures: Sequence[str],
        started: float | None = None,
        accumulate: int = 1,
        freeze_share: float = 0.0,
    ) -> None:
        super().__init__(lr, warmup, seed, limit, None, started, accumulate, freeze_share)
        rising = max(WARMUP_EPOCHS * batches_per_epoch, WARMUP_STEPS * accumulate)
        trained = (1 - freeze_share) * limit
        self.warmup *= min(rising, trained) / trained
        if not freeze_share:
            self.head_warmup = self.warmup
        self.limit, self.batches_per_epoch = limit, batches_per_epoch
        self.cooldown_start: int | None = None
        self.plateaued = False
        self.frozen = math.ceil(freeze_share * limit)
        self.min_spacing = 1
        self._next_evaluation = max(1, self.frozen)
        self._evaluated: list[int] = []
        self._scores: dict[str, list[float]] = {name: [] for name in measures}

    @property
    def open_ended(self) -> bool:
        """See ``Schedule``. Once the cool-down has begun, the end is known."""
        return self.cooldown_start is None

    def fraction_at(self, batch: int) -> float:
        """See ``Schedule``."""
        if self.cooldown_start is None or batch <= self.cooldown_start:
            return batch / self.limit
        begun = self.cooldown_start / self.limit
        return 1 - (1 - begun) * (1 - self._cooled(batch)) ** 2

    def factor_at(self, fraction: float, warmup: float) -> float:
        """See ``Schedule``."""
        risen = fraction / warmup if fraction < warmup else 1.0
        return risen * cosine_schedule(1.0, 0.0, self._cooled(self.batches))

    def _cooled(self, batch: int) -> float:
        """Fraction of the cool-down that is done, in [0, 1]."""
        if self.cooldown_start is None:
            return 0.0
        assert self.total is not None
        length = max(1, self.total - self.cooldown_start)
        return min(1.0, max(0.0, (batch - self.cooldown_start) / length))

    @property
    def evaluation_due(self) -> bool:
        """Whether the encoder should be evaluated after the last batch."""
        return self.batches >= self._next_evaluation

    def evaluated(self, scores: Mapping[str, float] | None) -> None:
        """Take the values of an evaluation, and begin the cool-down if nothing improves.

        Args:
            scores: Value of each measure, higher is better; None if the evaluation failed.
        """
        trained = self.batches - self.frozen  # since the encoder is trained
        spacing = max(self.min_spacing, math.ceil(EVALUATION_SPACING * trained))
        self._next_evaluation = self.frozen if trained < 0 else self.batches + spacing
        # A failed one, or one of an encoder whose features are not finite, says nothing.
        if scores is None or not all(math.isfinite(score) for score in scores.values()):
            return
        if self.cooldown_start is not None or trained < 0:
            return
        self._evaluated.append(trained)
        for name, values in self._scores.items():
            values.append(scores[name])
        if trained < 2 * (self.warmup_end * self.limit - self.frozen):
            return
        courses = {n: improvement(self._evaluated, values) for n, values in self._scores.items()}
        known = {name: one for name, one in courses.items() if one is not None}
        if known and not any(one.improved for one in known.values()):
            self.plateaued = True
            self._begin_cooldown()
            self._log_cooldown(
                "; ".join(
                    f"{name} was {one.best:.3f} in epoch "
                    f"{self._epoch(self.frozen + one.best_batch)} and is {one.latest:.3f} at most "
                    f"since epoch {self._epoch(self.frozen + (1 - PATIENCE) * trained)}"
                    for name, one in known.items()
                )
            )

    def _begin_cooldown(self) -> None:
        end = math.ceil((1 + COOLDOWN) * self.batches / self.accumulate) * self.accumulate
        self.cooldown_start, self.total = self.batches, min(end, self.limit)

    def _log_cooldown(self, why: str) -> None:
        assert self.total is not None
        log.info(
            "The cool-down begins in epoch %s: %s. The learning rate falls to 0 until epoch %s, in "
            "which the run ends.",
            self._epoch(self.batches),
            why,
            self._epoch(self.total),
        )

    def _epoch(self, batch: float) -> str:
        return f"{batch / self.batches_per_epoch:.1f}"

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if self.cooldown_start is None:
            log.info(
                "The length of the run is open: it ends when %s %s stopped improving, after %s "
                "epochs at most. The learning rate rises until epoch %s and is constant then.",
                " and ".join(self._scores),
                "has" if len(self._scores) == 1 else "have",
                self._epoch(self.limit),
                self._epoch(self.warmup_end * self.limit),
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self.cooldown_start is None and (1 + COOLDOWN) * self.batches >= self.limit:
            self._begin_cooldown()
            self._log_cooldown(f"the limit of {self._epoch(self.limit)} epochs is near")
        super().on_train_batch_start(trainer, module, batch, batch_idx)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if self.batches == self.total:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_end(trainer, module)
        if self.plateaued and self.batches == self.total:
            log.info(
                "The run ended by itself after %s epochs, %s of them cool-down: %s stopped "
                "improving.",
                self._epoch(self.batches),
                self._epoch(self.batches - (self.cooldown_start or 0)),
                " and ".join(self._scores),
            )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "cooldown": [self.cooldown_start or 0, self.total or 0],
            "plateaued": self.plateaued,
            "min_spacing": self.min_spacing,
            "next_evaluation": self._next_evaluation,
            "evaluated": list(self._evaluated),
            "scores": {name: list(values) for name, values in self._scores.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        start, self.total = state_dict["cooldown"]
        self.cooldown_start, self.plateaued = start or None, state_dict["plateaued"]
        self.min_spacing = state_dict["min_spacing"]
        self._next_evaluation = state_dict["next_evaluation"]
        self._evaluated = list(state_dict["evaluated"])
        self._scores = {name: list(state_dict["scores"][name]) for name in self._scores}
