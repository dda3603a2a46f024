"""Watching an encoder while it trains: measures with and without labels, collapse."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vissl_lite.data.labelled import LabelledImages, Part
from vissl_lite.data.stream import Batch, ViewDataset, collate
from vissl_lite.data.views import Views, crop_decode_size, distorted_crop
from vissl_lite.encoder import Encoder, Normalize
from vissl_lite.errors import MachineError, UserError
from vissl_lite.evaluation.features import extract
from vissl_lite.evaluation.knn import knn_predict
from vissl_lite.evaluation.linear import linear_probe
from vissl_lite.evaluation.measures import alignment, effective_rank, feature_std, uniformity
from vissl_lite.inference import evaluating
from vissl_lite.training.pace import Pace
from vissl_lite.training.stream import StreamData

log = logging.getLogger(__name__)

# Share of the training time that watching may take, looks at the start and at the end included, and
# into how many looks that is to be cut: the first one may cost twice, see ``Watch._plan``.
TIME_SHARE, LOOKS = 0.02, 8

# Looks between the first and the last at most: more make no better curve.
MANY = 100

# Training images that are watched, labelled ones that are learnt from, and validation images that
# are judged, at least and at most. The least still shows a trend; fewer would show noise.
LEAST, MOST = (64, 200, 100), (256, 5000, 1000)

# Labelled images to learn from, for each class at least.
LEAST_OF_CLASS = 5

# Images whose views are made and passed through the encoder together: few, for the memory's sake.
AT_ONCE = 32

# Smallest share of the image's area in the two views that alignment compares: SimCLR's here.
SMALLEST_CROP = 0.2

# Below these the features tell no images apart. An untrained ResNet-18 has a deviation of about
# 0.2 and a rank in the tens; a collapsed one has a deviation of 0.
COLLAPSED_STD, COLLAPSED_RANK = 0.02, 1.05


# What a look gives, the last two where there are labels.
MEASURES = ("feature_std", "effective_rank", "alignment", "uniformity", "knn", "linear")


class Watch(Callback):
    """Logs what ``evaluation/measures.py`` has, and ``knn`` and ``linear`` where labels are.

    Looks at the start, at the end, and between as often as its share of the time allows. Where a
    look would cost too much of it, it sees fewer images. The look at the untrained encoder is made
    after the first step, which puts its weights back for it: so a step that fails does so at once.

    Alignment is that of two crops as SimCLR makes them, whatever the pretext: so it can be compared
    across pretexts.

    Args:
        paths: the training images.
        labelled: training images are learnt from, validation images are judged; test images stay
            unseen.
        data: the training stream.
        pace: the run's.
        seed: chooses the images.
        upright: whether the images have an up.
        stop_on_collapse: end the run at the first look after the warm-up that shows a collapse.

    Attributes:
        last: the values of the last look, by name.
        collapsed: whether they showed a collapse.
        stopped: whether that ended the run.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labelled: LabelledImages | None,
        data: StreamData,
        pace: Pace,
        seed: int,
        upright: bool = True,
        stop_on_collapse: bool = False,
    ) -> None:
        random = np.random.default_rng(seed)
        chosen = random.permutation(len(paths))[: MOST[0]]
        self.paths = [paths[i] for i in chosen]
        self.bank = self.queries = Part([], np.empty(0, np.int64))
        self._classes = 0
        if labelled is not None:
            self.bank = _some(labelled.train, MOST[1], random)
            self.queries = _some(labelled.val, MOST[2], random)
            self._classes = len(labelled.classes)
        self.data, self.pace, self.seed = data, pace, seed
        self.upright, self.stop_on_collapse = upright, stop_on_collapse
        self.last: dict[str, float] = {}
        self.collapsed = self.stopped = False
        # The encoder's weights, from the start to the look after the first step.
        self._untrained: dict[str, Tensor] | None = None
        self._sizes: tuple[int, ...] = ()  # of LEAST and MOST; none before the first look
        self._forward = 0.0  # seconds an image through the encoder
        self._looked_at = -1  # number of batches at the last look
        self._looked_after = 0.0  # share of the run at the last look
        # Seconds: in all, in the first look, in the last one.
        self._spent = self._first = self._cost = 0.0

    @property
    def share(self) -> float:
        """What watching has cost so far, as a share of the time."""
        return self._spent / max(self.pace.elapsed(), 1e-9)

    @property
    def looked(self) -> bool:
        """Whether there was a look, in this process or, as only one of several does, in another."""
        return self._looked_at >= 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.pace.batches == 0:
            self._untrained = _weights(module.trained_encoder())  # type: ignore[operator]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if self._untrained is not None:
            encoder: Encoder = module.trained_encoder()  # type: ignore[operator]
            trained = _weights(encoder)
            encoder.load_state_dict(self._untrained)
            self.look(trainer, module)
            encoder.load_state_dict(trained)
            self._untrained = None
            return
        seldom = self.pace.batches % max(1, self.data.batches_per_epoch // 20)
        if seldom or trainer.should_stop or self.pace.batches == self.pace.total:
            return
        due = self._due()
        if trainer.world_size > 1:
            due = trainer.strategy.broadcast(due)
        if not due:
            return
        self.look(trainer, module)
        if self.stop_on_collapse and self.collapsed and self.pace.fraction >= self.pace.warmup:
            log.warning("The run ends here, as --on_collapse stop asks for.",
                        extra={"code": "training.ended"})  # fmt: skip
            self.stopped = trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._looked_at != self.pace.batches:
            self.look(trainer, module)
        log.info("watching took %.1f %% of the time", 100 * self.share)

    def _due(self) -> bool:
        """Whether what the first and the last look leave has gathered enough for another one."""
        if self.pace.fraction < self._looked_after + 1 / MANY:
            return False
        whole = self.pace.seconds or self.pace.elapsed() / self.pace.fraction
        between = TIME_SHARE * whole - self._first - self._cost
        return self._spent - self._first + self._cost <= between * self.pace.fraction

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compute and log everything now."""
        started = time.monotonic()
        whole: pl.LightningModule = module.whole()  # type: ignore[operator]
        encoder: Encoder = whole.trained_encoder()  # type: ignore[operator]
        first = not self._sizes
        self._looked_at = self.pace.batches if self._untrained is None else 0
        self._looked_after = self.pace.fraction
        if trainer.is_global_zero:
            if whole is not module:  # a copy of a network in parts, which waits on the CPU
                encoder.to(next(module.parameters()).device)
            try:
                if first:
                    self._plan(encoder)
                else:
                    self._measure(encoder)
                for logger in trainer.loggers:
                    logger.log_metrics(self.last, step=max(0, self.pace.steps - 1))
                self._judge()
            except UserError as error:  # the images have gone: what was learnt is still there
                if first or isinstance(error, MachineError):
                    raise
                log.warning("no look at the encoder: %(why)s", {"why": error},
                            extra={"code": "evaluation.failed"})  # fmt: skip
            if whole is not module:
                encoder.cpu()
        else:
            self._sizes = LEAST  # of no use here, but it says that the first look is done
        trainer.strategy.barrier()
        seconds = time.monotonic() - started
        self._spent += seconds
        if first:
            self._first = seconds
        else:
            self._cost = seconds
        if trainer.world_size > 1:
            told = trainer.strategy.broadcast((self.collapsed, self._cost))
            self.collapsed, self._cost = told
        self.pace.reserve = self._cost  # the last look belongs into a time budget too

    def _plan(self, encoder: Encoder) -> None:
        """The first look: with as few images as make sense, then with as many as it may take."""
        bank = max(LEAST[1], LEAST_OF_CLASS * self._classes)
        least = (LEAST[0], min(bank, MOST[1]), LEAST[2])
        self._sizes = least
        self._features_of_views(encoder, least[0])  # the first pass is slower than those to come
        started = time.monotonic()
        self._measure(encoder)
        self._cost = time.monotonic() - started
        whole = self.pace.seconds
        if whole is None:
            # No step has been made: one costs three passes through the encoder at least.
            assert self.pace.total is not None
            whole = 3 * self._forward * self.data.batch_size * self.pace.total
        factor = TIME_SHARE * whole / LOOKS / self._cost
        if factor > 1:
            self._sizes = tuple(
                min(high, int(factor * low)) for low, high in zip(least, MOST, strict=True)
            )
            started = time.monotonic()
            self._measure(encoder)
            self._cost = time.monotonic() - started
        watched, bank, queries = self._sizes
        seen = f"{min(watched, len(self.paths))} images"
        if len(self.queries):
            seen += (
                f", {min(bank, len(self.bank))} labelled to learn from, "
                f"{min(queries, len(self.queries))} to judge"
            )
        log.info("a look at the encoder takes %.2f s: %s", self._cost, seen)
        if factor < 1:
            log.info(
                "that is much for a run as short as this: looks are few, and see few images, to "
                "stay near %.0f %% of the time",
                100 * TIME_SHARE,
            )

    def _measure(self, encoder: Encoder) -> None:
        watched, bank, queries = self._sizes
        features, good = extract(encoder, self.paths[:watched])
        self.paths = _without(self.paths, good)
        one, other = self._features_of_views(encoder, watched)
        self.last = {
            "feature_std": feature_std(features["last"]),
            "effective_rank": effective_rank(features["last"]),
            "alignment": alignment(one, other),
            "uniformity": uniformity(features["last"]),
        }
        if len(self.queries):
            self.last |= self._accuracies(encoder, bank, queries)

    def _features_of_views(self, encoder: Encoder, count: int) -> list[np.ndarray]:
        """Features of two views of each watched image, ``(N, D)`` each; always the same views."""
        paths = self.paths[:count]
        size = encoder.image_size
        crop = distorted_crop(size, SMALLEST_CROP, upright=self.upright)
        views = Views([crop, crop], crop_decode_size(size, SMALLEST_CROP))
        images = ViewDataset(paths, views, self.seed)
        normalize = Normalize(encoder.mean, encoder.std)
        features: list[list[Tensor]] = [[], []]
        self._forward = 0.0
        with evaluating(encoder, normalize) as device:
            for start in range(0, len(paths), AT_ONCE):
                some = range(start, min(start + AT_ONCE, len(paths)))
                batch = collate([images[0, index] for index in some]).views
                started = time.monotonic()
                for view, found in zip(batch, features, strict=True):
                    view = view.to(device, memory_format=torch.channels_last)
                    found.append(encoder(normalize(view)).float().cpu())
                self._forward += (time.monotonic() - started) / (2 * len(paths))
        return [torch.cat(parts).numpy() for parts in features]

    def _accuracies(self, encoder: Encoder, bank: int, queries: int) -> dict[str, float]:
        """Of kNN and a linear probe on validation images, fitted to training images alone."""
        near, good = extract(encoder, self.bank.paths[:bank])
        self.bank = Part(_without(self.bank.paths, good), _kept(self.bank.labels, good))
        asked, good = extract(encoder, self.queries.paths[:queries])
        self.queries = Part(_without(self.queries.paths, good), _kept(self.queries.labels, good))
        learnt = near["last"], self.bank.labels[: len(near["last"])]
        truth = self.queries.labels[: len(asked["last"])]
        accuracies = {"knn": float((knn_predict(*learnt, asked["last"]) == truth).mean())}
        # A fit to features that are no numbers, or to one class, would fail.
        finite = np.isfinite(near["last"]).all() and np.isfinite(asked["last"]).all()
        if finite and len(np.unique(learnt[1])) > 1:
            none = np.empty((0, 1), np.float32), np.empty(0, np.int64)
            predicted = linear_probe(learnt, none, asked["last"]).test_predictions
            accuracies["linear"] = float((predicted == truth).mean())
        return accuracies

    def _judge(self) -> None:
        std, rank = self.last["feature_std"], self.last["effective_rank"]
        diverged = not np.isfinite(std)
        bad = self._looked_at > 0 and (diverged or std < COLLAPSED_STD or rank < COLLAPSED_RANK)
        if bad and not self.collapsed and diverged:
            log.warning(
                "The training has diverged: the features are no longer finite numbers. Try a lower "
                "--lr or a longer --warmup.",
                extra={"code": "features.diverged"},
            )
        elif bad and not self.collapsed:
            log.warning(
                "The encoder has collapsed: it gives nearly the same features for all images "
                "(feature_std %(feature_std).3f, effective_rank %(effective_rank).1f). Try a lower "
                "--lr, a longer --warmup, a larger --batch_size, or another pretext.",
                {"feature_std": std, "effective_rank": rank},
                extra={"code": "features.collapsed"},
            )
        self.collapsed = bad

    def state_dict(self) -> dict[str, Any]:
        return {
            "sizes": list(self._sizes),
            "seconds": [self._spent, self._first, self._cost],
            "collapsed": self.collapsed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sizes = tuple(state_dict["sizes"])
        self._spent, self._first, self._cost = state_dict["seconds"]
        self.collapsed = state_dict["collapsed"]
        self.pace.reserve = self._cost


def _weights(encoder: Encoder) -> dict[str, Tensor]:
    """A copy of an encoder's state."""
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def _some(part: Part, most: int, random: np.random.Generator) -> Part:
    """Images of a part in an order by chance, so that its first ones are a fair choice too."""
    order = random.permutation(len(part))[:most]
    return Part([part.paths[i] for i in order], part.labels[order])


def _kept(values: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Values without those of images that could not be read; ``good`` is of the first ones."""
    return np.concatenate([values[: len(good)][good], values[len(good) :]])


def _without(paths: list[str], good: np.ndarray) -> list[str]:
    return [path for i, path in enumerate(paths) if i >= len(good) or good[i]]
