"""One clock for every tool: when each optimizer step of this process ended.

PyTorch calls a global hook after each step of any optimizer, so that nothing of the tools, neither
their loops nor their callbacks, has to be changed to be timed.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """What is timed: it begins after a warm-up and ends the run.

    Attributes:
        warmup_steps: the first steps that are left out, at least these,
        warmup_seconds: and those of at least this time since the first step: until the batches are
            used up that the data workers made before training slowed them.
        steps: timed steps, at least these,
        seconds: and those of at least this time.
    """

    warmup_steps: int
    warmup_seconds: float
    steps: int
    seconds: float


class Clock:
    """Watches a run, and ends the process when it has seen enough.

    Ending it at once, the same way for every tool, saves what they do after training (checkpoints,
    exports, reports), which is none of the work that is compared. A run of a fixed length would
    have to be of another length for each.

    Args:
        span: what is timed.
        file: where the result goes.
        batch_size: source images per step.
        about: what else the result has to say.
    """

    def __init__(self, span: Span, file: Path, batch_size: int, about: dict[str, object]) -> None:
        self.span, self.file, self.batch_size, self.about = span, file, batch_size, about
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.first: int | None = None  # the step after which the timing begins
        self.first_step_at = 0.0

    def start(self) -> None:
        """Watch from now on; the first import of PyTorch belongs to a run's start-up."""
        from torch.optim import optimizer

        optimizer.register_optimizer_step_post_hook(self.step_ended)

    def step_ended(self, *_: object) -> None:
        """Note that an optimizer step ended just now."""
        if not self.wall:
            self.first_step_at = time.time()
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        now, span = self.wall[-1], self.span
        if self.first is None:
            warm = now - self.wall[0] >= span.warmup_seconds
            if warm and len(self.wall) >= span.warmup_steps:
                self.first = len(self.wall) - 1
        elif (
            now - self.wall[self.first] >= span.seconds
            and len(self.wall) - 1 - self.first >= span.steps
        ):
            self.file.write_text(json.dumps(self.result(self.first)))
            os._exit(0)

    def result(self, first: int) -> dict[str, object]:
        """What the steps after the warm-up tell."""
        timed = self.wall[first:]
        seconds = timed[-1] - timed[0]
        steps = len(timed) - 1
        each = [after - before for before, after in pairwise(timed)]
        return {
            **self.about,
            "batch_size": self.batch_size,
            "images_per_second": round(steps * self.batch_size / seconds, 3),
            "median_step_seconds": round(statistics.median(each), 4),
            "steps": steps,
            "warmup_steps": first + 1,
            "seconds": round(seconds, 2),
            # of the training process, its workers aside
            "cores_used": round((self.cpu[-1] - self.cpu[first]) / seconds, 3),
            "first_step_at": self.first_step_at,
        }
