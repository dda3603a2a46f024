"""The base class of pretexts: training step, normalization, optimizer."""

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

# Kinds of backbones: a description and examples.
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
    """Description of a pretext, as ``vissl-lite list pretexts`` prints it.

    Attributes:
        name: Name of the pretext for ``--pretext``.
        family: Predictive, contrastive, clustering, non-contrastive, self-distilling or masked.
        views: Number of views per image.
        paper: Authors, year and arXiv number.
        use: When to use it, in one line.
        backbones: Kind of backbones that it works on; see ``KINDS``.
        negatives: Whether it compares the images of a batch with each other, so that gradient
            accumulation does not replace a larger batch.
        any_size: Whether views may be smaller than the image size of the encoder.
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
    """Pictures of what a pretext does with some images.

    Attributes:
        columns: Titles of the columns.
        rows: One row per image, with one picture per column.
    """

    columns: tuple[str, ...]
    rows: list[list[Picture]]


class PretextTask(pl.LightningModule, ABC):
    """A self-supervised task that trains an encoder.

    Each subclass is one file. Its hyperparameters are the arguments of ``__init__`` after
    ``encoder``, with the defaults of the paper. Random augmentations belong in ``views``, which
    runs in data workers; the random targets of the task belong in ``loss``. State that a resumed
    run needs (queues, centers, teachers) is held in buffers or modules.

    Args:
        encoder: Encoder to train.

    Attributes:
        info: Description of the pretext.
        optimizer_settings: Default optimizer for a batch of 256 images; the options of a run
            replace it.
        progress: Fraction of the run that is done, in [0, 1]; ``Schedule`` sets it before each
            step.

    Raises:
        UserError: The pretext does not work on this backbone.
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
        """Augmentations of an image, one sequence per view.

        Args:
            upright: Whether the images have an up; otherwise they are also flipped vertically.
        """

    @abstractmethod
    def loss(self, views: list[Tensor]) -> Tensor:
        """Compute the loss of a batch. Additional metrics are logged with ``measure``.

        Args:
            views: One normalized ``(B, C, H, W)`` tensor per view. Labels are never passed.

        Returns:
            A scalar.
        """

    def visualize(self, views: list[Tensor]) -> Visualization | None:
        """Pictures of the task's predictions for some images; None if there is nothing to show.

        ``visualization_of`` calls it in evaluation mode without gradients and restores the random
        state. It must log no metrics and change no buffers.

        Args:
            views: Views of a few images, as for ``loss``.
        """
        return None

    def chance_loss(self, images: int) -> float | None:
        """The loss of a random guess, to warn of a run that does no better; None if unknown.

        Args:
            images: Images per batch over all devices.
        """
        return None

    def after_step(self) -> None:
        """Called once after each optimizer step, for example to update a teacher."""

    def trained_encoder(self) -> Encoder:
        """The encoder that a run saves: the trained one, or a momentum teacher."""
        return self.encoder

    def unsharded(self) -> "PretextTask":
        """The task with all of its weights, in the main process. All processes have to call it.

        This is the task itself, or with ``--strategy fsdp`` a copy on the CPU.
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
        """Log a metric of this step. Outside of a training run, do nothing."""
        trainer = trainer_of(self)
        if trainer is None:
            return
        value = value.detach()
        written = (self.global_step + 1) % trainer.log_every_n_steps == 0
        if written and trainer.world_size > 1:  # The mean over all processes.
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
        # Views have few sizes, so the search for fast convolutions pays off; ``fit`` resets it.
        torch.backends.cudnn.benchmark = True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()  # Now, to free the memory before the next forward pass.
        self.after_step()


def check_backbone(info: PretextInfo, encoder: Encoder) -> None:
    """Raise a UserError, naming suitable backbones, if a pretext does not work on this one."""
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
