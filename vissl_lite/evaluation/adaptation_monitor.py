"""Adaptation of pre-trained weights: is it likely to help, and has it?"""

import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from vissl_lite.encoders.encoder import Encoder, open_residual_branches, untrained_copy
from vissl_lite.evaluation.online import EncoderMetrics, OnlineEvaluation
from vissl_lite.training.freezing import ALL_PARTS
from vissl_lite.training.schedule import Schedule

log = logging.getLogger(__name__)


def describe_spread(before: dict[str, float], untrained: dict[str, float], images: int) -> str:
    """Log message about how well pre-trained weights tell the training images apart.

    Two measures without labels are compared with those of random weights: uniformity on the sphere
    (Wang & Isola 2020, arXiv 2005.10242, section 4.1) and the effective rank (RankMe, Garrido et
    al. 2023, arXiv 2210.02885). Neither knows whether images differ in what matters.

    Args:
        before: ``uniformity`` and ``effective_rank`` of the pre-trained weights.
        untrained: The same of random weights.
        images: Number of images that both were measured on.
    """
    more_uniform = before["uniformity"] < untrained["uniformity"]
    higher_rank = before["effective_rank"] > untrained["effective_rank"]
    if more_uniform and higher_rank:
        verdict = (
            "The pre-trained weights tell these images apart better than random ones, so they may "
            "serve without further training"
        )
    elif more_uniform or higher_rank:
        verdict = "The two measures disagree about the pre-trained weights"
    else:
        verdict = (
            "The pre-trained weights tell these images apart no better than random ones, so there "
            "is much to adapt"
        )
    return (
        f"Features of {images} training images: uniformity {before['uniformity']:.2f} (random "
        f"weights {untrained['uniformity']:.2f}, lower is more even), effective rank "
        f"{before['effective_rank']:.1f} (random weights {untrained['effective_rank']:.1f}). "
        f"{verdict}. This is a weak hint: only labels show whether adapting helps (--probe_data, "
        f"compare)"
    )


class AdaptationMonitor(Callback):
    """Measure pre-trained weights before a training, and warn if they have become worse by it.

    Args:
        compute: Computes the metrics.
        online: Online evaluation of the run; its callbacks must be called before those of this.
        schedule: Schedule of the run.
        encoder: Encoder to train.
        train: Parts of it that are trained; see ``train_only``.

    Attributes:
        before: Metrics of the encoder before the training, by name.
    """

    def __init__(
        self,
        compute: EncoderMetrics,
        online: OnlineEvaluation,
        schedule: Schedule,
        encoder: Encoder,
        train: str,
    ) -> None:
        self._compute, self._online, self._schedule = compute, online, schedule
        self._encoder, self._train = encoder, train
        self.before: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._schedule.batches or not trainer.is_global_zero:
            return
        self.before = self._online.metrics
        assert self._online.counts is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            untrained = untrained_copy(self._encoder)
            open_residual_branches(untrained)
        images = self._online.counts.unlabelled
        measured = self._compute.spread(untrained.to(module.device), images)
        log.info("%s", describe_spread(self.before, measured, images))

    def finish(self) -> None:
        """Compare the accuracies before and after the training; warn if that of kNN has fallen.

        A fall counts from one standard error of the accuracy on. Two right and two wrong images are
        added for it, so that it is not zero where all are right (Agresti & Coull 1998).
        """
        if "knn" not in self.before or "knn" not in self._online.metrics:
            return
        assert self._online.counts is not None
        images = self._online.counts.val
        before, after = self.before["knn"], self._online.metrics["knn"]
        log.info(
            "kNN accuracy on --probe_data: %.3f before the training, %.3f after", before, after
        )
        share = (before * images + 2) / (images + 4)
        if after < before - math.sqrt(share * (1 - share) / (images + 4)):
            fewer = "--train blocks:2, " if self._train == ALL_PARTS else ""
            log.warning(
                "The weights have become worse for --probe_data: the kNN accuracy on %(images)d "
                "images fell from %(before).3f to %(after).3f. The weights that the run began with "
                "may serve better; or try %(fewer)sa lower --lr or a shorter run.",
                {"images": images, "before": before, "after": after, "fewer": fewer},
                extra={"code": "features.forgotten"},
            )

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = {str(name): float(value) for name, value in state_dict["before"].items()}
