"""Base class of all pretext tasks: training step, normalization, optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from timm.models import Eva, VisionTransformer
from torch import Tensor
from torch.optim import Optimizer

from vissl_lite.data.stream import Batch, Source
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import OptimizerSettings, build_optimizer, clip_gradients
from vissl_lite.plots import Picture
from vissl_lite.pretext.modules.ema import ema_update, make_teacher, momentum_after
from vissl_lite.training.processes import trainer_of
from vissl_lite.training.sharding import UnshardedCopy, is_sharded, shard_module

Backbones = Literal["any", "ViT", "any ViT", "CNN", "patches"]

# Description and examples of each kind of backbone.
BACKBONE_KINDS: dict[Backbones, tuple[str, str]] = {
    "any": ("any backbone", "resnet18, vit_tiny_patch16_224"),
    "ViT": ("a plain ViT", "vit_tiny_patch16_224, vit_small_patch16_224, vit_tiny_patch4_32"),
    "any ViT": (
        "a ViT",
        "vit_tiny_patch16_224, vit_small_patch16_dinov3, vit_tiny_patch4_32",
    ),
    "CNN": ("a convolutional backbone", "resnet18, resnet50, convnext_atto, resnet10t_slim"),
    "patches": (
        "a ViT or a Swin Transformer",
        "vit_tiny_patch16_224, swin_tiny_patch4_window7_224, vit_tiny_patch4_32",
    ),
}


@dataclass(frozen=True)
class PretextInfo:
    """Description of a pretext, as shown by ``vissl-lite list pretexts``.

    Attributes:
        name: Name, as given to ``--pretext``.
        family: Predictive, contrastive, clustering, non-contrastive, self-distilling, masked or
            distilling.
        views: Number of views per image, as text.
        paper: Authors, year and arXiv number.
        use: When to use it, in one line.
        backbones: Kind of backbones that it supports; see ``BACKBONE_KINDS``.
        batch_loss: What the loss does with the images of a batch together, so that gradient
            accumulation is not equivalent to a larger batch: compare them with one another
            (``negatives``) or use their statistics, as of their features' correlations or of
            balanced assignments; None if it is the mean over the images.
        any_size: Whether views may be smaller than the encoder's image size.
        token_drop: Default of ``--token_drop`` where it measured better than all patches, else 0;
            None if a ViT has to see all, as the loss uses more than pooled features of whole views.
        fixed_positions: Whether a ViT with random weights gets fixed sine-cosine position
            embeddings; see ``fix_positions``.
        compiles: Whether ``--compile`` has an effect: not where a CNN is run stage by stage.
        train: Default of ``--train`` from pre-trained weights.
        encoders: Hyperparameters that name an encoder to learn from, as ``--encoder`` does. They
            are required.
        short_run: Hyperparameters with None as default, and values that measured better in minutes
            on a CPU from random weights; see ``short_run_defaults``.
        long_run_lr: Factor on the default learning rate in long runs; see ``long_share``.
        momentum: Default momentum of the teacher in short runs, in long runs, and the largest batch
            that the latter is for, of pretexts where it depends on the length; see
            ``long_run_defaults``.
        orientation: Whether the network predicts how an image is turned.
    """

    name: str
    family: str
    views: str
    paper: str
    use: str
    backbones: Backbones = "any"
    batch_loss: Literal["negatives", "statistics"] | None = None
    any_size: bool = False
    token_drop: float | None = None
    fixed_positions: bool = False
    compiles: bool = True
    train: str = "all"
    encoders: tuple[str, ...] = ()
    short_run: Mapping[str, float] = field(default_factory=dict)
    long_run_lr: float = 1.0
    momentum: tuple[float, float, int] | None = None
    orientation: bool = False

    def default_momentum(self, given: float | None) -> float:
        """A hyperparameter ``momentum``, or without one the default of short runs."""
        if given is not None:
            return given
        assert self.momentum is not None
        return self.momentum[0]


@dataclass(frozen=True)
class Visualization:
    """Predictions of a pretext on a few images, as a table of pictures.

    Attributes:
        columns: Column titles.
        rows: One row per image, with one picture per column.
    """

    columns: tuple[str, ...]
    rows: list[list[Picture]]


class PretextTask(pl.LightningModule, ABC):
    """Base class of self-supervised tasks that train an encoder.

    Each subclass has a module of its own. Its hyperparameters are the arguments of ``__init__``
    after ``encoder``. Their defaults suit runs of minutes to hours; the docstrings say where those
    of the paper differ, and ``configs/imagenet`` has these. Random augmentations belong in
    ``views``, which runs in the data workers; random labels of the task belong in ``loss``. State
    that must survive a resumed run (queues, centers, teachers) is a buffer or a module.

    Args:
        encoder: Encoder to train.

    Attributes:
        info: Description of the pretext.
        optimizer_settings: Default optimizer settings for a batch of 256 images; replaced by the
            options of a run.
        progress: Completed fraction of the run, in [0, 1]; ``Schedule`` sets it before every step.
        reads_files: Whether ``prepare`` reads the images, which have to be files then, not shards.

    Raises:
        UserError: If the pretext does not support this backbone.
    """

    info: PretextInfo
    optimizer_settings = OptimizerSettings()
    reads_files = False

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        check_backbone(self.info, encoder)
        self.encoder = encoder
        self.average: Encoder | None = None
        self.average_momentum = 0.0
        self.progress = 0.0
        self._unsharded = UnshardedCopy()

    @abstractmethod
    def views(self, upright: bool = True) -> Views:
        """Return the augmentations that create the views of an image.

        Args:
            upright: Whether the images have a natural orientation.
        """

    @abstractmethod
    def loss(self, views: list[Tensor]) -> Tensor:
        """Compute the loss of a batch; log further metrics with ``measure``.

        Args:
            views: One normalized ``(B, C, H, W)`` tensor per view. Labels are never passed.

        Returns:
            Scalar loss.
        """

    def prepare(self, images: Source, run: Path) -> None:
        """Run once before the training, for example to build layers whose size depends on the
        number of images, or to compute what never changes.

        Args:
            images: Training images; the numbers in a batch are theirs.
            run: Run folder, which may hold what an interrupted run has prepared.
        """

    def visualize(self, views: list[Tensor]) -> Visualization | None:
        """Visualize predictions on a few images; None if the task has nothing to show.

        Called by ``visualization_of`` in evaluation mode and without gradients; the random state
        is restored afterwards. It must not log metrics or change buffers.

        Args:
            views: Views of a few images, as for ``loss``.
        """
        return None

    def chance_loss(self, images: int) -> float | None:
        """Return the loss at chance level, or None if unknown.

        Used to warn about a run that does not improve on it.

        Args:
            images: Number of images in a batch, over all devices.
        """
        return None

    def after_step(self) -> None:
        """Run after every optimizer step, for example to update a momentum teacher."""

    def trained_encoder(self) -> Encoder:
        """Return the encoder that a run saves: the moving average if there is one.

        Methods with a momentum teacher may return that.
        """
        return self.encoder if self.average is None else self.average

    def average_encoder(self, momentum: float) -> None:
        """Keep an exponential moving average of the encoder, which a run then saves.

        To be called before the training.

        Args:
            momentum: Momentum, in [0, 1).

        Raises:
            UserError: The task saves a momentum teacher.
        """
        if type(self).trained_encoder is not PretextTask.trained_encoder:
            raise UserError(
                f"--ema {momentum}: a run of {self.info.name} saves its momentum teacher, which is "
                f"a moving average already: leave --ema out"
            )
        self.average, self.average_momentum = make_teacher(self.encoder), momentum

    def update_average(self) -> None:
        """Update the moving average of the encoder, if there is one."""
        if self.average is not None:
            momentum = min(self.average_momentum, self.largest_momentum)
            ema_update(self.average, self.encoder, momentum, norms=True)

    def unsharded(self) -> "PretextTask":
        """Return the task with its full weights in the main process; all processes must call it.

        Returns the task itself, or with ``--strategy fsdp`` a copy on the CPU.
        """
        return self._unsharded.of(self)

    def configure_model(self) -> None:
        if self.device_mesh is not None and not is_sharded(self):
            self._unsharded.keep(self)
            shard_module(self, self.device_mesh)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss([self.encoder.normalize(view) for view in batch.views])
        self.measure("loss", loss)
        return loss

    @property
    def largest_momentum(self) -> float:
        """Largest momentum of teachers and averages in this step, see ``momentum_after``.

        1 outside a training run.
        """
        return 1.0 if trainer_of(self) is None else momentum_after(self.global_step)

    @property
    def batches_per_step(self) -> int:
        """Number of batches of an optimizer step; 1 outside a training run."""
        trainer = trainer_of(self)
        return 1 if trainer is None else int(trainer.accumulate_grad_batches)

    def measure(self, name: str, value: Tensor) -> None:
        """Log a metric of this step; do nothing outside a training run, as in a notebook."""
        trainer = trainer_of(self)
        if trainer is None:
            return
        value = value.detach()
        is_logged = (self.global_step + 1) % trainer.log_every_n_steps == 0
        if is_logged and trainer.world_size > 1:  # Averaging at every step would be slow.
            value = trainer.strategy.reduce(value.float().clone(), reduce_op="mean")
        self.log(name, value)

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(
            self,
            self.optimizer_settings,
            self.encoder.model,
            full_rate=self.encoder.adapted_inputs,
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.optimizer_settings.clip_norm:
            trainer = trainer_of(self)
            scaler = None if trainer is None else getattr(trainer.precision_plugin, "scaler", None)
            clip_gradients(self, self.optimizer_settings.clip_norm, optimizer, scaler)

    def on_fit_start(self) -> None:
        # Views have few distinct sizes, so autotuning pays off; ``fit`` restores the setting.
        torch.backends.cudnn.benchmark = True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()  # Free the memory before the next forward pass.
        self.after_step()
        self.update_average()


def check_backbone(info: PretextInfo, encoder: Encoder) -> None:
    """Raise a UserError that names suitable backbones if a pretext does not support this one."""
    model = encoder.model
    fits = {
        "any": True,
        "ViT": isinstance(model, VisionTransformer),
        "any ViT": isinstance(model, VisionTransformer | Eva),
        "CNN": not hasattr(model, "patch_embed") and hasattr(model, "forward_intermediates"),
        "patches": hasattr(model, "patch_embed") and encoder.patch_size is not None,
    }
    if not fits[info.backbones]:
        kind, examples = BACKBONE_KINDS[info.backbones]
        raise UserError(
            f"the pretext {info.name} needs {kind}, which {encoder.backbone} is not: "
            f"try one of {examples}"
        )
