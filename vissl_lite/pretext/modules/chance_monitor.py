"""Warn if a predictive task is not solved better than by chance, or too easily."""

import logging

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Fraction of the run after which accuracy at chance is reported, and before which a solved task is.
# (Rotation of blood cells is solved after a sixth of the run: the light comes from one side.)
MIN_PROGRESS, MAX_SHORTCUT_PROGRESS = 0.2, 0.35

# Multiple of the chance accuracy up to which a task counts as not learned, and the accuracy from
# which it counts as solved.
CHANCE_FACTOR, SOLVED_ACCURACY = 1.3, 0.97

# Weight of a new batch in the running accuracy, and batches between two checks.
SMOOTHING, CHECK_EVERY = 0.1, 10


class ChanceMonitor(nn.Module):
    """Monitor the accuracy of a task with a known chance level, and warn once.

    A task that stays at chance teaches nothing (rotation of microscope images). One that is solved
    early has a shortcut (borders, watermarks, time stamps: the trivial solutions of Doersch
    et al. 2015, section 3.1). The state is saved with the module, so that a resumed run continues.

    Args:
        task: Name of the pretext in the warning.
        chance: Accuracy of a random guess.
    """

    def __init__(self, task: str, chance: float) -> None:
        super().__init__()
        self.task, self.chance = task, chance
        self._batches = 0
        self.accuracy: Tensor
        self.warned: Tensor
        self.register_buffer("accuracy", torch.tensor(chance))
        self.register_buffer("warned", torch.tensor(False))

    def update(self, accuracy: Tensor, progress: float) -> None:
        """Add the accuracy of a batch.

        Args:
            accuracy: Scalar accuracy of the batch, in [0, 1].
            progress: Fraction of the run that is done.
        """
        self.accuracy.lerp_(accuracy.detach().float(), SMOOTHING)
        self._batches += 1
        # A comparison waits for the GPU, so it is not made for every batch.
        if self._batches % CHECK_EVERY or self.warned:
            return
        if progress >= MIN_PROGRESS and self.accuracy < CHANCE_FACTOR * self.chance:
            log.warning(
                "%(task)s has hardly a signal on these images: its accuracy is %(percent).0f %%, "
                "and that of a random guess is %(chance).0f %%. Images that have no up or no parts "
                "do not suit it; try another pretext, such as simclr.",
                {
                    "task": self.task,
                    "percent": 100 * float(self.accuracy),
                    "chance": 100 * self.chance,
                },
                extra={"code": "pretext.no_signal"},
            )
            self.warned.fill_(True)
        elif progress <= MAX_SHORTCUT_PROGRESS and self.accuracy > SOLVED_ACCURACY:
            log.warning(
                "%(task)s is solved early (accuracy %(percent).0f %% after %(progress).0f %% of "
                "the run). The encoder may have learned a shortcut such as borders, watermarks, "
                "time stamps or light from one side. Crop it away or try another pretext.",
                {
                    "task": self.task,
                    "percent": 100 * float(self.accuracy),
                    "progress": 100 * progress,
                },
                extra={"code": "pretext.shortcut"},
            )
            self.warned.fill_(True)
