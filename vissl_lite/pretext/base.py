"""What every pretext task has in common: the training step, normalizing, the optimizer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.optim import Optimizer

from vissl_lite.data.stream import Batch
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import OptimizerSettings, build_optimizer, clip_gradients
from vissl_lite.plots import Picture
from vissl_lite.training.processes import trainer_of
from vissl_lite.training.sharding import UnshardedCopy, is_sharded, shard

Backbones = Literal["any", "ViT", "CNN", "patches"]

# What the kinds of backbones are, and some of each.
KINDS: dict[Backbones, tuple[str, str]] = {
    "any": ("any backbone", "resnet18, vit_tiny_patch16_224"),
    "ViT": ("a plain ViT", "vit_tiny_patch16_224, vit_small_patch16_224, vit_tiny_patch4_32"),
    "CNN": ("a convolutional backbone", "resnet18, resnet50, convnext_atto, resnet10t_slim"),
    "patches": (
        "a ViT or a Swin Transformer",
        "vit_tiny_patch16_224, swin_tiny_patch4_window7_224, vit_tiny_patch4_32",
    ),
}


@dataclass(frozen=True)
class PretextInfo:
    """What ``vissl-lite list pretexts`` says of a pretext.

    Attributes:
        name: as in ``--pretext``.
        family: predictive, contrastive, clustering, non-contrastive, self-distilling or masked.
        views: how many of an image it takes.
        paper: authors, year, where to find it.
        use: one line: when to use it.
        backbones: which ones it works on; see ``KINDS``.
        negatives: whether it compares the images of a batch with one another, so that gradient
            accumulation can't stand for a larger batch.
        any_size: whether its views may be smaller than the images that the encoder is made for.
    """

    name: str
    family: str
    views: str
    paper: str
    use: str
    backbones: Backbones = "any"
    negatives: bool = False
    any_size: bool = False


@dataclass(frozen=True)
class Visualization:
    """What a pretext does with some images, to look at.

    Attributes:
        columns: their titles.
        rows: one for each image, with a picture for each column.
    """

    columns: tuple[str, ...]
    rows: list[list[Picture]]


class PretextTask(pl.LightningModule, ABC):
    """A self-supervised task that trains an encoder.

    A subclass is one file: hyperparameters are the arguments of its ``__init__`` after
    ``encoder``, with the paper's defaults. Randomness that makes pixels belongs into ``views``,
    which data workers run; randomness that makes the task's own labels belongs into ``loss``.
    What has to survive a resumed run (queues, centers, teachers) is a buffer or a module.

    Args:
        encoder: what is trained.

    Attributes:
        info: what the pretext is.
        optimizer_settings: the pretext's own defaults, for a batch of 256 images; a run replaces
            them by what its options say.
        progress: share of the run that is done, in [0, 1]; ``Schedule`` sets it before every step.

    Raises:
        UserError: the pretext does not work on this backbone.
    """

    info: PretextInfo
    optimizer_settings = OptimizerSettings()

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        check_backbone(self.info, encoder)
        self.encoder = encoder
        self.progress = 0.0
        self._unsharded = UnshardedCopy()

    @abstractmethod
    def views(self, upright: bool = True) -> Views:
        """The augmentations that make the views of an image."""

    @abstractmethod
    def loss(self, views: list[Tensor]) -> Tensor:
        """The loss of a batch; metrics of the task's own go to ``measure``.

        Args:
            views: one normalized ``(B, C, H, W)`` tensor for each view. Labels never arrive here.

        Returns:
            A scalar.
        """

    def visualize(self, views: list[Tensor]) -> Visualization | None:
        """What the task makes of some images; None where only their neighbors could tell.

        For ``visualization_of``, which calls it in evaluation mode and without gradient, and
        puts the random state back. It measures nothing and leaves all buffers as they are.

        Args:
            views: as for ``loss``, of a few images.
        """
        return None

    def chance_loss(self, images: int) -> float | None:
        """The loss of guessing where it is known, to warn of a run that does no better.

        Args:
            images: in a batch, over all devices.
        """
        return None

    def after_step(self) -> None:
        """Called once after every optimizer step: where a momentum teacher follows."""

    def trained_encoder(self) -> Encoder:
        """What the training is for. A method with a momentum teacher may give that."""
        return self.encoder

    def unsharded(self) -> "PretextTask":
        """The task with all of its weights, in the main process. All processes have to call it.

        It is the task itself, but under ``--strategy fsdp``: there, a copy on the CPU.
        """
        return self._unsharded.of(self)

    def configure_model(self) -> None:
        if self.device_mesh is not None and not is_sharded(self):
            self._unsharded.keep(self)
            shard(self, self.device_mesh)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss([self.encoder.normalize(view) for view in batch.views])
        self.measure("loss", loss)
        return loss

    def measure(self, name: str, value: Tensor) -> None:
        """Log a metric of this step; outside a training run, as in a notebook, do nothing."""
        trainer = trainer_of(self)
        if trainer is None:
            return
        value = value.detach()
        written = (self.global_step + 1) % trainer.log_every_n_steps == 0
        if written and trainer.world_size > 1:  # of all processes, and not at other steps
            value = trainer.strategy.reduce(value.float().clone(), reduce_op="mean")
        self.log(name, value)

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(self, self.optimizer_settings)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.optimizer_settings.clip_norm:
            trainer = trainer_of(self)
            scaler = None if trainer is None else getattr(trainer.precision_plugin, "scaler", None)
            clip_gradients(self, self.optimizer_settings.clip_norm, optimizer, scaler)

    def on_fit_start(self) -> None:
        # views are of few sizes: worth a search for the fastest convolutions; ``fit`` undoes it
        torch.backends.cudnn.benchmark = True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()  # now, and not after the next forward pass, which needs the memory
        self.after_step()


def check_backbone(info: PretextInfo, encoder: Encoder) -> None:
    """Raise a UserError, naming backbones that would do, if a pretext can't work on this one."""
    model = encoder.model
    fits = {
        "any": True,
        "ViT": isinstance(model, VisionTransformer),
        "CNN": not hasattr(model, "patch_embed") and hasattr(model, "forward_intermediates"),
        "patches": hasattr(model, "patch_embed") and encoder.patch_size is not None,
    }
    if not fits[info.backbones]:
        kind, examples = KINDS[info.backbones]
        raise UserError(
            f"the pretext {info.name} needs {kind}, which {encoder.backbone} is not: "
            f"try one of {examples}"
        )
