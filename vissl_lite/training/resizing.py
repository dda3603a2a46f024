"""Progressive resizing: views that start small and grow during training."""

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


def share_of_side(progress: float) -> float:
    """Side of the views at a fraction of the run, relative to their full side.

    Args:
        progress: Share of the run that is done, in [0, 1].
    """
    risen = min(1.0, max(0.0, (progress - GROWTH_START) / (GROWTH_END - GROWTH_START)))
    if risen == 1:
        return 1.0
    return INITIAL_SIDE + (1 - INITIAL_SIDE) * int(risen * NUM_SIZES) / NUM_SIZES


def shrink(views: Tensor, share: float, encoder: Encoder) -> Tensor:
    """Downscale views by averaging pixels.

    They are shrunk on the device: how far the run is by then, no data worker can know.

    Args:
        views: ``(B, C, S, S)`` uint8 or uint16.
        share: Fraction of the side, in (0, 1].
        encoder: Gives the nearest size that it can take.

    Returns:
        ``(B, C, s, s)`` of the same type.
    """
    size = min(encoder.fitting_size(views.shape[-1] * share), views.shape[-1])
    if size == views.shape[-1]:
        return views
    if (
        views.device.type == "cpu" and views.dtype == torch.uint8
    ):  # bytes are fast there, and on other devices not to be had
        return F.interpolate(views, size=(size, size), mode="bilinear", antialias=True)
    small = F.interpolate(views.float(), size=(size, size), mode="bilinear", antialias=True)
    return small.round().to(views.dtype)


class ProgressiveResizing(Callback):
    """Downscale the views of each batch on the device and log their side as ``view_size``.

    Args:
        schedule: Schedule of the run.
        encoder: Encoder that the views are for.
    """

    def __init__(self, schedule: Schedule, encoder: Encoder) -> None:
        self.schedule, self.encoder = schedule, encoder

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        # the first step is a whole one: a batch too large for the memory shows at once
        share = share_of_side(self.schedule.fraction) if trainer.global_step else 1.0
        batch.views[:] = [shrink(view, share, self.encoder) for view in batch.views]
        module.log("view_size", float(batch.views[0].shape[-1]))
