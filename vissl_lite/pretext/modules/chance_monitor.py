"""Does a predictive task have a signal? Warns when its labels can't be told, or all too easily."""

import logging

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Share of the run after which guessing is suspicious, and before which perfection is. (Blood cells
# under a microscope are turned back right after a sixth of it: the light falls from one side.)
WARM, EARLY = 0.2, 0.35

# Accuracy, as a multiple of that of guessing, below which a task has hardly a signal.
HARDLY = 1.3

# Weight of a new batch in the running accuracy, and how often that is looked at.
NEW, EVERY = 0.1, 10


class Signal(nn.Module):
    """Watches the accuracy of a task with a known chance level, and warns once.

    A task at chance after the warm-up teaches nothing (rotation under a microscope); one solved at
    once teaches a shortcut (borders, watermarks, time stamps; Doersch et al. 2015, section 3.1,
    call them trivial solutions). Its state is saved with the module, so that a resumed run goes on.

    Args:
        task: the pretext's name, for the warning.
        chance: accuracy of guessing.
    """

    def __init__(self, task: str, chance: float) -> None:
        super().__init__()
        self.task, self.chance = task, chance
        self._seen = 0
        self.accuracy: Tensor
        self.warned: Tensor
        self.register_buffer("accuracy", torch.tensor(chance))
        self.register_buffer("warned", torch.tensor(False))

    def watch(self, accuracy: Tensor, progress: float) -> None:
        """Take a batch's accuracy.

        Args:
            accuracy: a scalar.
            progress: share of the run that is done.
        """
        self.accuracy.lerp_(accuracy.detach().float(), NEW)
        self._seen += 1
        # comparing waits for a GPU: seldom
        if self._seen % EVERY or self.warned:
            return
        if progress >= WARM and self.accuracy < HARDLY * self.chance:
            log.warning(
                "%(task)s has hardly a signal on these images: it is right in %(percent).0f %% of "
                "all cases, where guessing gives %(chance).0f %%. Images without an up or without "
                "parts can't be learned from in this way; try another pretext, such as simclr.",
                {
                    "task": self.task,
                    "percent": 100 * float(self.accuracy),
                    "chance": 100 * self.chance,
                },
                extra={"code": "pretext.no_signal"},
            )
            self.warned.fill_(True)
        elif progress <= EARLY and self.accuracy > 0.97:
            log.warning(
                "%(task)s is solved early (%(percent).0f %% right after %(progress).0f %% of the "
                "run): a shortcut such as borders, watermarks, time stamps or light from one side "
                "may give it away, and then the encoder learns that instead. Crop it away or try "
                "another pretext.",
                {
                    "task": self.task,
                    "percent": 100 * float(self.accuracy),
                    "progress": 100 * progress,
                },
                extra={"code": "pretext.shortcut"},
            )
            self.warned.fill_(True)
