"""A feature pyramid over the stages of an encoder, for detectors and segmenters."""

import logging
from collections import OrderedDict
from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.transfer.finetuning import SettingsT, TransferModelT, TransferModule

log = logging.getLogger(__name__)

# Images of a batch from which its statistics suffice for BatchNorm.
MIN_NORM_BATCH = 8

MAX_FIGURE_SIDE = 1024  # longer side in pixels of an image in a figure of predictions


class Pyramid(nn.Module):
    """Maps of equal depth at several strides.

    For a convolutional or hierarchical encoder the feature pyramid network of Lin et al. 2017; for
    a plain ViT, whose stages all have one stride, the simple feature pyramid of its last map (Li et
    al. 2022, ViTDet, section 3). GroupNorm stands where batches of two would upset BatchNorm.

    Args:
        encoder: Encoder whose ``stages`` are the input.
        channels: Channels of each map that goes out, a multiple of 8.
        finest: Smallest stride in pixels that is wanted. Maps that are finer are left out, but for
            the two coarsest, which always stay.

    Attributes:
        channels: Channels of the maps.
        strides: Strides of the maps that go out, fine to coarse.
    """

    def __init__(self, encoder: Encoder, channels: int, finest: int = 4) -> None:
        super().__init__()
        self.channels = channels
        depths, strides = _stages(encoder)
        self.plain, self.strides = _is_plain(strides), _offered(strides, finest)
        if self.plain:
            self.levels = nn.ModuleList(
                _simple_level(depths[-1], channels, strides[-1], wanted) for wanted in self.strides
            )
        else:
            last = {stride: index for index, stride in enumerate(strides)}
            self.chosen = [last[stride] for stride in self.strides]
            self.fpn = FeaturePyramidNetwork(
                [depths[index] for index in self.chosen], channels, norm_layer=group_norm
            )

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        """The maps of a pyramid.

        Args:
            stages: Stages of the encoder, ``(B, C_i, H_i, W_i)``, fine to coarse.

        Returns:
            ``(B, channels, H / stride, W / stride)`` for each of the strides.
        """
        if self.plain:
            return [level(stages[-1]) for level in self.levels]
        chosen = OrderedDict((str(index), stages[index]) for index in self.chosen)
        return list(self.fpn(chosen).values())


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of groups of at least four channels, 32 groups at most (Wu & He 2018)."""
    return nn.GroupNorm(min(32, channels // 4), channels)


def pyramid_strides(encoder: Encoder, finest: int = 4) -> list[int]:
    """Strides of the maps of a ``Pyramid`` over an encoder, fine to coarse.

    Args:
        encoder: Encoder whose ``stages`` are the input of the pyramid.
        finest: As for ``Pyramid``.
    """
    return _offered(_stages(encoder)[1], finest)


def _stages(encoder: Encoder) -> tuple[list[int], list[int]]:
    """Channels and strides of the stages of an encoder."""
    before, stride = encoder.image_size, 1
    depths, strides = [], []
    for depth, _, width in encoder.stage_shapes(before, before):
        # Step by step: halving 300 five times, rounded up, leaves 10, a thirtieth and not a 32nd
        stride *= max(1, round(before / width))
        before = width
        depths.append(depth)
        strides.append(stride)
    return depths, strides


def _is_plain(strides: list[int]) -> bool:
    """Whether all stages have one stride, as in a plain ViT."""
    return len(set(strides)) == 1 and len(strides) > 1


def _offered(strides: list[int], finest: int) -> list[int]:
    """Strides of the maps of a pyramid over stages of these strides."""
    if _is_plain(strides):
        stride = strides[-1]
        offered = [stride * scale // 4 for scale in (1, 2, 4, 8) if stride * scale >= 4]
    else:
        offered = sorted(set(strides))
    coarse = [stride for stride in offered if stride >= finest]
    return coarse if len(coarse) >= 2 else offered[-2:]


def _simple_level(depth: int, channels: int, stride: int, wanted: int) -> nn.Sequential:
    """One level of ViTDet's pyramid: the map enlarged or shrunk, then two convolutions."""
    steps: list[nn.Module] = []
    while wanted < stride:
        steps += [nn.ConvTranspose2d(depth, depth // 2, 2, stride=2)]
        depth, stride = depth // 2, stride // 2
        if wanted < stride:
            steps += [nn.GroupNorm(1, depth), nn.GELU()]
    if wanted > stride:
        steps.append(nn.MaxPool2d(2))
    for size, before in ((1, depth), (3, channels)):
        convolution = nn.Conv2d(before, channels, size, padding=size // 2, bias=False)
        steps += [convolution, group_norm(channels)]
    return nn.Sequential(*steps)


class PyramidTraining(TransferModule[TransferModelT, SettingsT]):
    """Lightning module of a model with a pyramid over its encoder.

    Args:
        model: A detector or segmenter.
        settings: Settings of the training.
        batch_size: Images per batch, over all devices.
    """

    def __init__(self, model: TransferModelT, settings: SettingsT, batch_size: int) -> None:
        super().__init__(model, settings, few=batch_size < MIN_NORM_BATCH)


def report_use(encoder: Encoder, source: str) -> None:
    """Log how many of an encoder's tensors a pyramid's gradient reaches.

    Args:
        encoder: Encoder of the model.
        source: Source of its weights.

    Raises:
        UserError: The gradient reaches none of them, so that the encoder would not be trained.
    """
    used = _used_tensors(encoder, list)
    unused = [name for name, reached in used.items() if not reached]
    if len(unused) == len(used):
        raise UserError(f"none of the {len(used)} tensors of {source} would be used")
    log.info(
        "%d of the %d tensors of %s are used%s",
        len(used) - len(unused),
        len(used),
        source,
        f"; not used: {', '.join(unused)}" if unused else "",
    )


def freeze_unused(encoder: Encoder, pyramid: Pyramid) -> None:
    """Freeze the tensors of an encoder that the gradient of a pyramid does not reach.

    On several devices, weights that no gradient reaches would stop the training.

    Args:
        encoder: Encoder of the model.
        pyramid: Pyramid over its stages.
    """
    for name, reached in _used_tensors(encoder, pyramid).items():
        encoder.model.get_parameter(name).requires_grad_(reached)


def _used_tensors(
    encoder: Encoder, maps_of: Callable[[list[Tensor]], list[Tensor]]
) -> dict[str, bool]:
    """Whether the gradient of maps reaches each tensor of an encoder that is not frozen.

    Args:
        encoder: Encoder of the model.
        maps_of: Makes the maps of the stages of the encoder.
    """
    size = encoder.image_size
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    images = torch.zeros(1, len(encoder.mean), size, size, device=device)
    named = [(name, p) for name, p in encoder.model.named_parameters() if p.requires_grad]
    total = sum(one.sum() for one in maps_of(encoder.stages(images)))
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    encoder.train(was_training)
    return {name: grad is not None for (name, _), grad in zip(named, gradients, strict=True)}


def shrunk(image: np.ndarray) -> np.ndarray:
    """Downscale an image to the size of a figure, to save memory.

    Args:
        image: ``(H, W, C)`` uint8.
    """
    factor = max(image.shape[:2]) / MAX_FIGURE_SIDE
    if factor <= 1:
        return image
    height, width = (max(1, round(side / factor)) for side in image.shape[:2])
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))
