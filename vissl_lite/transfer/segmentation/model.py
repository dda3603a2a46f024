"""Segmentation model, its loss, and sliding-window inference.

segmentation_models_pytorch is not used because it builds timm encoders itself, under other
parameter names.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.data.images import resize
from vissl_lite.data.turns import UNTURNED, Turn
from vissl_lite.data.views import OWN_SCALE_RATIO
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.inference import check_outputs, inference_mode
from vissl_lite.transfer.finetuning import TransferModel, load_with_head, save_with_head
from vissl_lite.transfer.pyramid import Pyramid, group_norm
from vissl_lite.transfer.segmentation.mask_source import IGNORE_INDEX

PYRAMID_CHANNELS = 128  # of the pyramid and the head, as in the head of Kirillov et al. 2019

WINDOWS_PER_BATCH = 16

# Limits the longer side of an enlarged image to this multiple of the window size.
MAX_ENLARGED_SIDE = 64


class PyramidHead(nn.Module):
    """Semantic segmentation head of Panoptic FPN (Kirillov et al. 2019, section 3).

    Each map passes through blocks of a 3x3 convolution, GroupNorm, ReLU and 2x upsampling until it
    has the size of the finest map. A 1x1 convolution classifies the sum of the maps.

    Args:
        channels: Channels of the maps, a multiple of 8.
        strides: Strides of the maps, from fine to coarse.
        classes: Number of classes K.
    """

    def __init__(self, channels: int, strides: Sequence[int], classes: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    group_norm(channels),
                    nn.ReLU(),
                )
                for _ in range(max(1, round(math.log2(stride / strides[0]))))
            )
            for stride in strides
        )
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return logits ``(B, K, h_0, w_0)`` of maps ``(B, C, h_i, w_i)``, from fine to coarse."""
        height, width = maps[0].shape[-2:]
        total = torch.zeros((), device=maps[0].device)
        for blocks, level in zip(self.levels, maps, strict=True):
            assert isinstance(blocks, nn.ModuleList)
            for doublings, block in zip(reversed(range(len(blocks))), blocks, strict=True):
                level = block(level)
                size = (math.ceil(height / 2**doublings), math.ceil(width / 2**doublings))
                if level.shape[-2:] != size:
                    level = F.interpolate(level, size, mode="bilinear")
            total = total + level
        logits: Tensor = self.classify(total)
        return logits


class Segmenter(TransferModel):
    """Semantic segmentation model: an encoder, a feature pyramid and a head.

    Args:
        encoder: Encoder of the model. It is not copied.
        classes: Names of the K classes.
        channels: Channels of the pyramid and the head, a multiple of 8.
    """

    encoder: Encoder

    def __init__(
        self, encoder: Encoder, classes: Sequence[str], channels: int = PYRAMID_CHANNELS
    ) -> None:
        super().__init__()
        self.classes, self.channels = list(classes), channels
        self.encoder = encoder
        self.pyramid = Pyramid(encoder, channels, finest=4)
        self.head = PyramidHead(channels, self.pyramid.strides, len(self.classes))
        self._step = math.lcm(encoder.patch_size or 1, self.pyramid.strides[0])

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of every pixel.

        Args:
            images: Normalized images ``(B, C, H, W)``. Sides that are not multiples of the patch
                size are padded with the mean color.

        Returns:
            Logits ``(B, K, H, W)`` float32.
        """
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self._step, 0, -height % self._step))
        logits = self.head(self.pyramid(self.encoder.stages(padded))).float()
        logits = F.interpolate(logits, padded.shape[-2:], mode="bilinear")
        return logits[..., :height, :width]


def dice_loss(logits: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Soft Dice loss (V-Net, Milletari et al. 2016, section 3).

    Computes ``1 - 2 sum(p g) / (sum(p^2) + sum(g^2))`` for each class over all pixels of the batch,
    and averages over the classes that occur in the batch.

    Args:
        logits: Logits ``(B, K, H, W)``.
        target: Integers ``(B, H, W)``: class indices or ``ignore_index``.
        ignore_index: Value of pixels that do not count.

    Returns:
        Scalar loss; zero if every pixel is ignored.
    """
    classes = logits.shape[1]
    valid = target != ignore_index
    labels = torch.where(valid, target, 0).long()
    probabilities = logits.softmax(dim=1) * valid[:, None]
    true_probabilities = probabilities.gather(1, labels[:, None])[:, 0]
    # sum per class without a one-hot target, which would be as large as the logits
    zeros = torch.zeros(classes, dtype=logits.dtype, device=logits.device)
    overlap = zeros.index_add(0, labels.flatten(), true_probabilities.flatten())
    truth = zeros.index_add(0, labels.flatten(), valid.flatten().to(logits.dtype))
    dice = 2 * overlap / (probabilities.square().sum(dim=(0, 2, 3)) + truth).clamp_min(1e-6)
    counted = (truth > 0).to(logits.dtype)
    return ((1 - dice) * counted).sum() / counted.sum().clamp_min(1e-6)


def segmentation_loss(
    logits: Tensor, target: Tensor, weights: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Sum of cross-entropy and Dice loss. The Dice loss gives small classes equal weight.

    Args:
        logits: Logits ``(B, K, H, W)``.
        target: Integers ``(B, H, W)``: class indices or ``ignore_index``.
        weights: Class weights ``(K,)`` of the cross-entropy, which is the weighted mean over
            pixels. They do not affect the Dice loss.
        ignore_index: Value of pixels that do not count.

    Returns:
        Scalar loss; zero if every pixel is ignored.
    """
    labels = target.long()
    valid = labels != ignore_index
    weight = valid if weights is None else valid * weights[torch.where(valid, labels, 0)]
    summed = F.cross_entropy(logits, labels, weights, ignore_index=ignore_index, reduction="sum")
    # the mean reduction of torch is NaN if there are no pixels
    entropy = summed / weight.sum().clamp_min(1e-6)
    return entropy + dice_loss(logits, target, ignore_index)


def window_starts(length: int, size: int) -> list[int]:
    """Compute start positions of evenly spaced windows that overlap by at least half.

    Args:
        length: Length of the side to cover in pixels, at least ``size``.
        size: Side of a window in pixels.
    """
    count = 1 + math.ceil(2 * (length - size) / size)
    return [round(start) for start in np.linspace(0, length - size, count).tolist()]


def largest_resized(size: int) -> int:
    """Shorter side in pixels up to which images are resized to ``size``."""
    return int(OWN_SCALE_RATIO * size)


def keeps_own_scale(image: np.ndarray, size: int) -> bool:
    """Whether an image is too large to be resized, and is cut into windows at its own scale."""
    return min(image.shape[:2]) > largest_resized(size)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize an image to a shorter side of ``size``, unless it keeps its own scale."""
    if keeps_own_scale(image, size):
        return image
    # limit the longer side of thin images; their shorter side is stretched to ``size`` below
    scale = min(size / min(image.shape[:2]), MAX_ENLARGED_SIDE * size / max(image.shape[:2]))
    height, width = (max(size, round(side * scale)) for side in image.shape[:2])
    return resize(image, (height, width))


def segment_all(
    segmenter: Segmenter, images: Sequence[np.ndarray], device: torch.device
) -> list[Tensor]:
    """Compute class probabilities at the size that images are resized to; see ``segment``.

    Args:
        segmenter: Segmenter on the device, in ``inference_mode``.
        images: Images ``(H, W, C)`` of any sizes, read by the reader of the encoder.
        device: Device of the segmenter and of the results.

    Returns:
        Probabilities ``(K, h, w)`` of each image.

    Raises:
        UserError: If the outputs are not finite.
    """
    size = segmenter.encoder.image_size
    resized = [_resize(image, size) for image in images]
    windows = [
        (number, top, left)
        for number, image in enumerate(resized)
        for top in window_starts(image.shape[0], size)
        for left in window_starts(image.shape[1], size)
    ]
    profile = torch.sin(math.pi * (torch.arange(size, device=device) + 0.5) / size).square()
    weight = profile[:, None] * profile
    sums: dict[int, Tensor] = {}
    for start in range(0, len(windows), WINDOWS_PER_BATCH):
        batch_windows = windows[start : start + WINDOWS_PER_BATCH]
        tiles = np.stack([resized[n][y : y + size, x : x + size] for n, y, x in batch_windows])
        batch = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2)
        probabilities = segmenter(segmenter.encoder.normalize(batch)).softmax(dim=1)
        check_outputs([probabilities], f"a window in one of {len(images)} images")
        for (n, y, x), window in zip(batch_windows, probabilities, strict=True):
            if n not in sums:
                sums[n] = window.new_zeros(window.shape[0], *resized[n].shape[:2])
            sums[n][:, y : y + size, x : x + size] += window * weight
    # probabilities sum to one, so that the sum over classes is the total weight of a pixel
    return [sums[n].div_(sums[n].sum(dim=0)) for n in range(len(images))]


def resize_probabilities(probabilities: Tensor, height: int, width: int) -> Tensor:
    """Resize probabilities ``(K, h, w)`` to ``(K, height, width)``."""
    return F.interpolate(probabilities[None], (height, width), mode="bilinear")[0]


def segment(
    segmenter: Segmenter, image: np.ndarray, turns: Sequence[Turn] = UNTURNED
) -> np.ndarray:
    """Compute class probabilities for every pixel of an image of any size.

    The scale is that of the training views: an image whose shorter side is at most 1.5 times
    the encoder's image size is resized to that size, a larger one keeps its own scale. Square
    windows of the image size, which overlap by half, cover the image. Their probabilities are
    averaged with sin^2 weights, which are small at the border of a window, where predictions lack
    context.

    Args:
        segmenter: Segmenter. It is moved to the accelerator, if there is one, and back afterwards.
        image: Image ``(H, W, C)``, read by the reader of the encoder.
        turns: Flips and turns of the image; their probabilities are turned back and averaged.

    Returns:
        Probabilities ``(K, H, W)`` float32, which sum to one over the classes.
    """
    with inference_mode(segmenter) as device:
        total = torch.zeros((), device=device)
        for turn in turns:  # one at a time, as large images take much memory
            (probabilities,) = segment_all(segmenter, [turn.image(image)], device)
            total = total + turn.map_back(probabilities)
        return resize_probabilities(total / len(turns), *image.shape[:2]).cpu().numpy()


def save_segmenter(segmenter: Segmenter, folder: Path, about: dict[str, Any]) -> None:
    """Write a model folder: ``encoder/`` in timm's format, and the head.

    Args:
        segmenter: Trained segmenter.
        folder: Folder to write, created if missing.
        about: Additional entries of ``head.json``.
    """
    head = {"task": "segmentation", "classes": segmenter.classes, "channels": segmenter.channels}
    save_with_head(segmenter, segmenter.encoder, folder, {**about, **head})


def load_segmenter(folder: Path) -> Segmenter:
    """Load a segmenter written by ``save_segmenter``.

    Args:
        folder: Run folder of ``finetune``, or the ``model`` folder in it.

    Raises:
        UserError: If the folder holds no segmenter, or a damaged one.
    """

    def build(encoder: Encoder, about: dict[str, Any]) -> Segmenter:
        channels = about["channels"]
        if type(channels) is not int or channels < 8 or channels % 8:
            raise ValueError("channels is not a positive multiple of 8")
        return Segmenter(encoder, about["classes"], channels)

    return load_with_head(folder, "segmentation", build)[0]
