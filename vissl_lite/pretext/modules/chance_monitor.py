"""Warn about predictive tasks that are at chance level or solved suspiciously early."""

import logging

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Fraction of the run after which chance accuracy triggers a warning.
CHANCE_AFTER = 0.2

# Fraction of the run before which near-perfect accuracy triggers a warning. (Rotations of blood
# cells under a microscope are solved after a sixth of it, because the light comes from one side.)
SHORTCUT_BEFORE = 0.35

# A task is at chance level below this multiple of the chance accuracy.
MIN_CHANCE_RATIO = 1.3

# Accuracy above which a task counts as solved.
SOLVED_ACCURACY = 0.97

# Weight of a new batch in the running accuracy, and number of updates between two checks.
SMOOTHING, CHECK_INTERVAL = 0.1, 10


class ChanceMonitor(nn.Module):
    """Monitor the accuracy of a task with a known chance level, and warn once.

    A task that stays at chance level has no signal (rotation under a microscope); one that is
    solved early may rely on a shortcut (borders, watermarks, time stamps; the trivial solutions of
    Doersch et al. 2015, section 3.1). The state is part of the module, so that it is resumed.

    Args:
        task: Name of the pretext, for the warning.
        chance: Chance accuracy.
    """

    def __init__(self, task: str, chance: float) -> None:
        super().__init__()
        self.task, self.chance = task, chance
        self._num_updates = 0
        self.accuracy: Tensor
        self.warned: Tensor
        self.register_buffer("accuracy", torch.tensor(chance))
        self.register_buffer("warned", torch.tensor(False))

    def update(self, accuracy: Tensor, progress: float) -> None:
        """Update the running accuracy with that of a batch.

        Args:
            accuracy: Scalar accuracy of the batch.
            progress: Completed fraction of the run.
        """
        self.accuracy.lerp_(accuracy.detach().to(self.accuracy.dtype), SMOOTHING)
        self._num_updates += 1
        # Checks are rare because reading the accuracy synchronizes with the GPU.
        if self._num_updates % CHECK_INTERVAL or self.warned:
            return
        if progress >= CHANCE_AFTER and self.accuracy < MIN_CHANCE_RATIO * self.chance:
            log.warning(
                "%(task)s barely exceeds chance on these images: accuracy %(percent).0f %%, chance "
                "%(chance).0f %%. Images without a natural orientation or distinct parts may give "
                "this task no signal; try another pretext, such as simclr.",
                {
                    "task": self.task,
                    "percent": 100 * float(self.accuracy),
                    "chance": 100 * self.chance,
                },
                extra={"code": "pretext.no_signal"},
            )
            self.warned.fill_(True)
        elif progress <= SHORTCUT_BEFORE and self.accuracy > SOLVED_ACCURACY:
            log.warning(
                "%(task)s is solved early (accuracy %(percent).0f %% after %(progress).0f %% of "
                "the run): the encoder may have learned a shortcut, such as borders, watermarks, "
                "time stamps or light from one side. Crop it away or try another pretext.",
                {
                    "task": self.task,
                    "percent": 100 * float(self.accuracy),
                    "progress": 100 * progress,
                },
                extra={"code": "pretext.shortcut"},
            )
            self.warned.fill_(True)
