"""What every pretext task has in common: the training step, normalising, the optimizer."""

from abc import ABC, abstractmethod

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from vissl_lite.data.stream import Batch
from vissl_lite.data.views import Views
from vissl_lite.encoder import Encoder, Normalize
from vissl_lite.optim import OptimizerSettings, build_optimizer


class PretextTask(pl.LightningModule, ABC):
    """A self-supervised task that trains an encoder.

    A subclass is one file: hyperparameters are the arguments of its ``__init__`` after
    ``encoder``, with the paper's defaults. Randomness that makes pixels belongs into ``views``,
    which data workers run; randomness that makes the task's own labels belongs into ``loss``.

    Args:
        encoder: what is trained.

    Attributes:
        optimizer_settings: the pretext's own defaults, for a batch of 256 images; a run replaces
            them by what its options say.
    """

    optimizer_settings = OptimizerSettings()

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalize = Normalize(encoder.mean, encoder.std)

    @abstractmethod
    def views(self) -> Views:
        """The augmentations that make the views of an image."""

    @abstractmethod
    def loss(self, views: list[Tensor]) -> Tensor:
        """The loss of a batch; metrics of the task's own go to ``measure``.

        Args:
            views: one normalised ``(B, C, H, W)`` tensor for each view. Labels never arrive here.

        Returns:
            A scalar.
        """

    def trained_encoder(self) -> Encoder:
        """What the training is for. A method with a momentum teacher may give that."""
        return self.encoder

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss([self.normalize(view) for view in batch.views])
        self.measure("loss", loss)
        return loss

    def measure(self, name: str, value: Tensor) -> None:
        """Log a metric of this step; outside a training run, as in a notebook, do nothing."""
        if self._trainer is not None:
            self.log(name, value.detach())

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(self, self.optimizer_settings)
