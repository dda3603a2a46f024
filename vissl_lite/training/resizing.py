"""Progressive resizing: views that start small and grow during training."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vissl_lite.data.stream import Batch
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.training.schedule import Schedule

# The side that views begin with, as a share of their own; when it begins to rise, and when it is
# whole, as shares of the run (the defaults of Composer's ProgressiveResizing, MosaicML 2022, after
# Howard 2018, "Training Imagenet in 3 hours for USD 25").
INITIAL_SIDE, GROWTH_START, GROWTH_END = 0.5, 0.5, 0.8
# Few sizes: compilers and cuDNN look for the best kernels for each of them anew.
NUM_SIZES = 4

# Sides of the views, relative to their full side, by the number of their resolution: the full side
# is the first, as it is where views have one size.
SHARES = (1.0, *(INITIAL_SIDE + (1 - INITIAL_SIDE) * step / NUM_SIZES for step in range(NUM_SIZES)))


def resolution_at(progress: float) -> int:
    """Number of the resolution of the views at a fraction of the run.

    Args:
        progress: Share of the run that is done, in [0, 1].
    """
    risen = min(1.0, max(0.0, (progress - GROWTH_START) / (GROWTH_END - GROWTH_START)))
    return 0 if risen == 1 else 1 + int(risen * NUM_SIZES)


def resolution_of(batch: int, schedule: Schedule) -> int:
    """Number of the resolution of the views of a batch.

    With a time budget it follows the time at which the batch is expected when it is sent to a data
    worker.

    Args:
        batch: Number of the batch.
        schedule: Schedule of the run.
    """
    if batch == 0 and schedule.tries_memory:
        return 0
    return resolution_at(schedule.fraction_at(batch))


def shrink(views: Tensor, side: int) -> Tensor:
    """Downscale views by averaging pixels.

    Args:
        views: ``(B, C, S, S)`` uint8 or uint16.
        side: Side in pixels; smaller views are left as they are.

    Returns:
        ``(B, C, s, s)`` of the same type.
    """
    if views.shape[-1] <= side:
        return views
    if (
        views.device.type == "cpu" and views.dtype == torch.uint8
    ):  # bytes are fast there, and on other devices not to be had
        return F.interpolate(views, size=(side, side), mode="bilinear", antialias=True)
    small = F.interpolate(views.float(), size=(side, side), mode="bilinear", antialias=True)
    return small.round().to(views.dtype)


class ProgressiveResizing(Callback):
    """Log the side of the views as ``view_size``, and downscale those that were not drawn smaller.

    Data workers draw views at their resolution (``Views.resized``). Those that do not begin with a
    random crop come in full size, and are downscaled on the device.

    Args:
        schedule: Schedule of the run.
        encoder: Encoder that the views are for.
        sides: Full side of each view in pixels.
    """

    def __init__(self, schedule: Schedule, encoder: Encoder, sides: Sequence[int]) -> None:
        self.schedule, self.encoder, self.sides = schedule, encoder, sides

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        share = SHARES[resolution_of(self.schedule.batches, self.schedule)]
        if share < 1:  # a full side need not be one that is chosen for smaller views
            batch.views[:] = [
                shrink(view, min(side, self.encoder.fitting_size(side * share)))
                for view, side in zip(batch.views, self.sides, strict=True)
            ]
        module.log("view_size", float(batch.views[0].shape[-1]))
