"""What every pretext task has in common: the training step, normalising, the optimizer."""

import copy
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
from vissl_lite.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import OptimizerSettings, build_optimizer
from vissl_lite.pictures import Picture
from vissl_lite.pretext.parts.resizing import share_of_side, shrink
from vissl_lite.training.sharding import fill, is_sharded, shard

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
class About:
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
class Exhibit:
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
    What has to survive a resumed run (queues, centres, teachers) is a buffer or a module.

    Args:
        encoder: what is trained.

    Attributes:
        about: what the pretext is.
        optimizer_settings: the pretext's own defaults, for a batch of 256 images; a run replaces
            them by what its options say.
        upright: whether the images have an up; a run sets it.
        progressive_resizing: whether views begin small and grow; a run sets it.
        progress: share of the run that is done, in [0, 1]; a run sets it before every step.

    Raises:
        UserError: the pretext does not work on this backbone.
    """

    about: About
    optimizer_settings = OptimizerSettings()

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        check_backbone(self.about, encoder)
        self.encoder = encoder
        self.upright = True
        self.progressive_resizing = False
        self.progress = 0.0
        self._copy: list[PretextTask] = []  # see ``whole``

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

    def show(self, views: list[Tensor]) -> Exhibit | None:
        """What the task makes of some images; None where only their neighbours could tell.

        For ``parts.exhibit.exhibit``, which calls it in evaluation mode and without gradient, and
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

    def whole(self) -> "PretextTask":
        """The task with all of its weights, in the main process. All processes have to call it.

        It is the task itself, but under ``--strategy fsdp``: there, a copy on the CPU.
        """
        if not is_sharded(self):
            return self
        copied = self._copy[0] if self._copy else None
        fill(copied, self)
        return copied or self

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or is_sharded(self):  # each process keeps all of it, or has its share
            return
        self._device_mesh = None  # which can't be copied
        # in a list, or it would count as a part of the task
        self._copy = [copy.deepcopy(self)] if self.global_rank == 0 else []
        self._device_mesh = mesh
        shard(self, mesh)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss([self.encoder.normalize(view) for view in self._resized(batch.views)])
        self.measure("loss", loss)
        return loss

    def _resized(self, views: list[Tensor]) -> list[Tensor]:
        if not self.progressive_resizing:
            return views
        # the first step is a whole one: a batch too large for the memory shows at once
        share = share_of_side(self.progress) if self.global_step else 1.0
        views = [shrink(view, share, self.encoder) for view in views]
        self.measure("view_size", torch.tensor(float(views[0].shape[-1])))
        return views

    def measure(self, name: str, value: Tensor) -> None:
        """Log a metric of this step; outside a training run, as in a notebook, do nothing."""
        if self._trainer is None:
            return
        value = value.detach()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        written = (self.global_step + 1) % every == 0
        if written and self.trainer.world_size > 1:  # of all processes, and not at other steps
            value = self.trainer.strategy.reduce(value.float().clone(), reduce_op="mean")
        self.log(name, value)

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(self, self.optimizer_settings)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.optimizer_settings.clip_norm:
            self._unscale(optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.optimizer_settings.clip_norm)

    def _unscale(self, optimizer: Optimizer) -> None:
        # In float16 a fused optimizer takes the scale out of the gradients as it steps, and
        # Lightning leaves that to it: too late for what is clipped.
        plugin = None if self._trainer is None else self._trainer.precision_plugin
        scaler = getattr(plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)

    def on_fit_start(self) -> None:
        # views are of few sizes: worth a search for the fastest convolutions on a GPU
        torch.backends.cudnn.benchmark = True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()  # now, and not after the next forward pass, which needs the memory
        self.after_step()


def check_backbone(about: About, encoder: Encoder) -> None:
    """Raise a UserError, naming backbones that would do, if a pretext can't work on this one."""
    model = encoder.model
    fits = {
        "any": True,
        "ViT": isinstance(model, VisionTransformer),
        "CNN": not hasattr(model, "patch_embed") and hasattr(model, "forward_intermediates"),
        "patches": hasattr(model, "patch_embed") and encoder.patch_size is not None,
    }
    if not fits[about.backbones]:
        kind, examples = KINDS[about.backbones]
        raise UserError(
            f"the pretext {about.name} needs {kind}, which {encoder.backbone} is not: "
            f"try one of {examples}"
        )
