"""Watching an encoder while it trains: spread of its features, kNN on labelled images, collapse."""

import logging
import time
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback

from vissl_lite.data.labelled import LabelledImages, Part
from vissl_lite.data.stream import Batch
from vissl_lite.evaluation.features import extract
from vissl_lite.evaluation.knn import knn_predict
from vissl_lite.training.pace import Pace
from vissl_lite.training.stream import StreamData

log = logging.getLogger(__name__)

# Images whose features are watched, and labelled ones at most: enough to see a trend.
WATCHED, BANK, QUERIES = 256, 5000, 1000

# Share of the training time that watching may take, beside a look at the start and at the end.
TIME_SHARE = 0.03

# Below these the features tell no images apart. An untrained ResNet-18 has a deviation of about
# 0.2 and a rank in the tens; a collapsed one has a deviation of 0.
COLLAPSED_STD, COLLAPSED_RANK = 0.02, 1.05


def feature_std(features: np.ndarray) -> float:
    """Spread of features on the unit sphere, as SimSiam watches it (Chen & He 2021, section 4.1).

    Args:
        features: ``(N, D)``.

    Returns:
        The standard deviation of the normalised features, averaged over dimensions and scaled by
        the square root of D: 0 if all are equal, 1 if they are spread evenly.
    """
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(norms, 1e-12)
    return float(unit.std(axis=0).mean() * np.sqrt(features.shape[1]))


def effective_rank(features: np.ndarray) -> float:
    """RankMe (Garrido et al. 2023, eq. 1): how many directions the features use.

    Args:
        features: ``(N, D)``.

    Returns:
        The exponential of the entropy of the normalised singular values, between 1 and min(N, D).
        Not a number if a feature is none.
    """
    if not np.isfinite(features).all():
        return float("nan")
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / max(values.sum(), 1e-300) + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


class Watch(Callback):
    """Logs ``feature_std`` and ``effective_rank`` of training images, and ``knn`` where labels are.

    Looks at the start, at the end, and between epochs as often as its share of the time allows.

    Args:
        paths: the training images.
        labelled: for kNN: training images vote on validation images; test images stay unseen.
        data: the training stream.
        pace: the run's.
        seed: chooses the images.

    Attributes:
        last: the values of the last look, by name.
        collapsed: whether they showed a collapse.
    """

    def __init__(
        self,
        paths: list[str],
        labelled: LabelledImages | None,
        data: StreamData,
        pace: Pace,
        seed: int,
    ) -> None:
        random = np.random.default_rng(seed)
        chosen = random.permutation(len(paths))[:WATCHED]
        self.paths = [paths[i] for i in np.sort(chosen)]
        self.bank = self.queries = Part([], np.empty(0, np.int64))
        if labelled is not None:
            self.bank = _some(labelled.train, BANK, random)
            self.queries = _some(labelled.val, QUERIES, random)
        self.data, self.pace = data, pace
        self.last: dict[str, float] = {}
        self.collapsed = False
        self._spent = self._longest = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.pace.batches == 0:
            self.look(trainer, module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if self.pace.batches % self.data.batches_per_epoch or trainer.should_stop:
            return
        due = self._spent + self._longest < TIME_SHARE * self.pace.elapsed()
        if trainer.world_size > 1:
            due = trainer.strategy.broadcast(due)
        if due:
            self.look(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.look(trainer, module)

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compute and log everything now."""
        started = time.monotonic()
        if trainer.is_global_zero:
            encoder = module.trained_encoder()  # type: ignore[operator]
            features = extract(encoder, self.paths)[0]["last"]
            self.last = {
                "feature_std": feature_std(features),
                "effective_rank": effective_rank(features),
            }
            if len(self.queries):
                self.last["knn"] = self._knn(encoder)
            for logger in trainer.loggers:
                logger.log_metrics(self.last, step=max(0, self.pace.steps - 1))
            self._judge()
        trainer.strategy.barrier()
        seconds = time.monotonic() - started
        self._spent += seconds
        self._longest = max(self._longest, seconds)
        self.pace.reserve = self._longest  # the last look belongs into a time budget too

    def _knn(self, encoder: Any) -> float:
        bank, good = extract(encoder, self.bank.paths)
        queries, fine = extract(encoder, self.queries.paths)
        predicted = knn_predict(bank["last"], self.bank.labels[good], queries["last"])
        return float((predicted == self.queries.labels[fine]).mean())

    def _judge(self) -> None:
        std, rank = self.last["feature_std"], self.last["effective_rank"]
        diverged = not np.isfinite(std)
        bad = diverged or std < COLLAPSED_STD or rank < COLLAPSED_RANK
        if diverged and self.pace.batches > 0:
            log.warning(
                "The training has diverged: the features are no longer finite numbers. Try a lower "
                "--lr or a longer --warmup."
            )
        elif bad and self.pace.batches > 0 and not self.collapsed:
            log.warning(
                "The encoder has collapsed: it gives nearly the same features for all images "
                "(feature_std %.3f, effective_rank %.1f). Try a lower --lr, a longer --warmup, a "
                "larger --batch_size, or another pretext.",
                std,
                rank,
            )
        self.collapsed = bad and self.pace.batches > 0


def _some(part: Part, most: int, random: np.random.Generator) -> Part:
    return part.take(random.permutation(len(part))[:most])
