"""The segmenter: an encoder, a pyramid and a head; its loss; how it runs over whole images.

(segmentation_models_pytorch builds timm encoders of its own, with names of its own: ours do not fit
in as they are.)
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.data.views import LARGE
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.inference import check_outputs, inference_mode
from vissl_lite.transfer.finetuning import load_with_head, save_with_head
from vissl_lite.transfer.pyramid import Pyramid, PyramidModel, group_norm
from vissl_lite.transfer.segmentation.data import IGNORE

CHANNELS = 128  # of the pyramid and the head; the paper's head has as many

WINDOWS = 16  # that go through the model at a time

# How many times as long as the side of a window an image gets by being enlarged, at most.
STRIP = 64


class PyramidHead(nn.Module):
    """The semantic head of Kirillov et al. 2019 (Panoptic Feature Pyramid Networks), section 3.

    Each map goes through 3x3 convolutions with GroupNorm and ReLU, each of which is followed by
    doubling its size until that is the finest map's; the sum goes through a 1x1 convolution.

    Args:
        channels: of the maps, a multiple of 8.
        strides: of the maps, fine to coarse.
        classes: number of classes K.
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
        """``(B, channels, h_i, w_i)`` maps, fine to coarse, to ``(B, K, h_0, w_0)`` logits."""
        height, width = maps[0].shape[-2:]
        total = torch.zeros((), device=maps[0].device)
        for blocks, level in zip(self.levels, maps, strict=True):
            assert isinstance(blocks, nn.ModuleList)
            for left, block in zip(reversed(range(len(blocks))), blocks, strict=True):
                level = block(level)
                size = (math.ceil(height / 2**left), math.ceil(width / 2**left))
                if level.shape[-2:] != size:
                    level = F.interpolate(level, size, mode="bilinear")
            total = total + level
        logits: Tensor = self.classify(total)
        return logits


class Segmenter(PyramidModel):
    """An encoder, a feature pyramid and a head that gives every pixel a class.

    Args:
        encoder: becomes a part of it.
        classes: K names.
        channels: of the pyramid and the head, a multiple of 8.
    """

    encoder: Encoder

    def __init__(self, encoder: Encoder, classes: Sequence[str], channels: int = CHANNELS) -> None:
        super().__init__()
        self.classes, self.channels = list(classes), channels
        self.encoder = encoder
        self.pyramid = Pyramid(encoder, channels, finest=4)
        self.head = PyramidHead(channels, self.pyramid.strides, len(self.classes))
        self._step = math.lcm(encoder.patch_size or 1, self.pyramid.strides[0])

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every pixel.

        Args:
            images: ``(B, C, H, W)``, normalized. Sides that whole patches do not fill are padded
                with the mean color.

        Returns:
            ``(B, K, H, W)`` float32.
        """
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self._step, 0, -height % self._step))
        logits = self.head(self.pyramid(self.encoder.stages(padded))).float()
        logits = F.interpolate(logits, padded.shape[-2:], mode="bilinear")
        return logits[..., :height, :width]


def dice_loss(logits: Tensor, target: Tensor, ignore: int = IGNORE) -> Tensor:
    """One minus the soft Dice coefficient of Milletari et al. 2016 (V-Net, section 3).

    For each class over the pixels of the whole batch, then the mean over the classes that occur in
    the batch: ``1 - 2 sum(p g) / (sum(p^2) + sum(g^2))``. Zero where every pixel is ignored.

    Args:
        logits: ``(B, K, H, W)``.
        target: ``(B, H, W)`` integers, class indices or ``ignore``.
        ignore: the value of pixels that do not count.
    """
    classes = logits.shape[1]
    valid = target != ignore
    labels = torch.where(valid, target, 0).long()
    shares = logits.softmax(dim=1) * valid[:, None]
    right = shares.gather(1, labels[:, None])[:, 0]
    # sums by class without the one-hot target, which is as large as the logits
    zeros = torch.zeros(classes, dtype=logits.dtype, device=logits.device)
    overlap = zeros.index_add(0, labels.flatten(), right.flatten())
    truth = zeros.index_add(0, labels.flatten(), valid.flatten().to(logits.dtype))
    dice = 2 * overlap / (shares.square().sum(dim=(0, 2, 3)) + truth).clamp_min(1e-6)
    counted = (truth > 0).to(logits.dtype)
    return ((1 - dice) * counted).sum() / counted.sum().clamp_min(1e-6)


def segmentation_loss(
    logits: Tensor, target: Tensor, weights: Tensor | None = None, ignore: int = IGNORE
) -> Tensor:
    """Cross-entropy plus Dice: the one trains every pixel, the other small classes too.

    Args:
        logits: ``(B, K, H, W)``.
        target: ``(B, H, W)`` integers, class indices or ``ignore``.
        weights: ``(K,)`` of the classes: cross-entropy is the weighted mean over pixels. Dice
            counts all classes alike anyway.
        ignore: the value of pixels that do not count.

    Returns:
        A number; zero where every pixel is ignored.
    """
    labels = target.long()
    valid = labels != ignore
    weight = valid if weights is None else valid * weights[torch.where(valid, labels, 0)]
    summed = F.cross_entropy(logits, labels, weights, ignore_index=ignore, reduction="sum")
    # torch's own mean of no pixels is not a number
    entropy = summed / weight.sum().clamp_min(1e-6)
    return entropy + dice_loss(logits, target, ignore)


def window_starts(length: int, size: int) -> list[int]:
    """Where windows begin that cover a side evenly and overlap by half or more.

    Args:
        length: of the side in pixels, at least ``size``.
        size: of a window.
    """
    count = 1 + math.ceil(2 * (length - size) / size)
    return [round(start) for start in np.linspace(0, length - size, count).tolist()]


def at_own_scale(image: np.ndarray, size: int) -> bool:
    """Whether an image is so large that it is not resized, but cut into windows as it is."""
    return min(image.shape[:2]) > LARGE * size


def _fit(image: np.ndarray, size: int) -> np.ndarray:
    """The image with a shorter side of ``size``; a large one as it is."""
    if at_own_scale(image, size):
        return image
    # a line of pixels is not enlarged to billions, but grows in one direction more
    scale = min(size / min(image.shape[:2]), STRIP * size / max(image.shape[:2]))
    height, width = (max(size, round(side * scale)) for side in image.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=way))


def segment_all(
    segmenter: Segmenter, images: Sequence[np.ndarray], device: torch.device
) -> list[Tensor]:
    """See ``segment``: for each image ``(K, h, w)`` probabilities, still as small as it went in.

    Args:
        segmenter: ``inference_mode`` on the device.
        images: ``(H, W, C)`` uint8, of any sizes.
        device: where the results are too.

    Raises:
        UserError: the outputs are no finite numbers.
    """
    size = segmenter.encoder.image_size
    fitted = [_fit(image, size) for image in images]
    places = [
        (number, top, left)
        for number, image in enumerate(fitted)
        for top in window_starts(image.shape[0], size)
        for left in window_starts(image.shape[1], size)
    ]
    bell = torch.sin(math.pi * (torch.arange(size, device=device) + 0.5) / size).square()
    weight = bell[:, None] * bell
    sums: dict[int, Tensor] = {}
    for start in range(0, len(places), WINDOWS):
        some = places[start : start + WINDOWS]
        tiles = np.stack([fitted[n][y : y + size, x : x + size] for n, y, x in some])
        batch = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2)
        shares = segmenter(segmenter.encoder.normalize(batch)).softmax(dim=1)
        check_outputs([shares], f"a window in one of {len(images)} images")
        for (n, y, x), share in zip(some, shares, strict=True):
            if n not in sums:
                sums[n] = share.new_zeros(share.shape[0], *fitted[n].shape[:2])
            sums[n][:, y : y + size, x : x + size] += share * weight
    # the probabilities of a pixel sum to one: so the weights need no count of their own
    return [sums[n] / sums[n].sum(dim=0) for n in range(len(images))]


def enlarge(shares: Tensor, height: int, width: int) -> Tensor:
    """``(K, h, w)`` probabilities to ``(K, height, width)``, or shrunk to that."""
    return F.interpolate(shares[None], (height, width), mode="bilinear")[0]


def segment(segmenter: Segmenter, image: np.ndarray) -> np.ndarray:
    """Probabilities of the classes for every pixel of an image of any size.

    The scale is that of the training views: an image whose shorter side is at most ``LARGE`` times
    ``size`` is resized to it, a larger one keeps its own scale. Windows of ``size`` by ``size``
    that overlap by half cover the image; what they say is averaged with the weight sin^2, which
    falls to almost nothing at a window's border, where it knows least.

    Args:
        segmenter: put on the accelerator if there is one, and back afterwards.
        image: ``(H, W, C)`` uint8.

    Returns:
        ``(K, H, W)`` float32; they sum to one over the classes.
    """
    with inference_mode(segmenter) as device:
        shares = segment_all(segmenter, [image], device)[0]
        return enlarge(shares, *image.shape[:2]).cpu().numpy()


def save_segmenter(segmenter: Segmenter, folder: Path, about: dict[str, Any]) -> None:
    """Write a model folder: ``encoder/`` in timm's format, and the head.

    Args:
        segmenter: what to save.
        folder: where; made if missing.
        about: how it was trained.
    """
    head = {"task": "segmentation", "classes": segmenter.classes, "channels": segmenter.channels}
    save_with_head(segmenter, segmenter.encoder, folder, {**about, **head})


def load_segmenter(folder: Path) -> Segmenter:
    """Load what ``save_segmenter`` wrote.

    Args:
        folder: a run of ``finetune``, or the ``model`` folder in it.

    Raises:
        UserError: there is no segmenter, or it is damaged.
    """

    def build(encoder: Encoder, about: dict[str, Any]) -> Segmenter:
        channels = about["channels"]
        if type(channels) is not int or channels < 8 or channels % 8:
            raise ValueError("channels is no positive multiple of 8")
        return Segmenter(encoder, about["classes"], channels)

    return load_with_head(folder, "segmentation", build)[0]
