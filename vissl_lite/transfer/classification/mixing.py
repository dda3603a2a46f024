"""Mixing of training images and their labels: mixup and CutMix."""

import torch
from torch import Tensor


def mix(images: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with another one of it.

    Mixup (Zhang et al. 2018) adds two images, CutMix (Yun et al. 2019) puts a rectangle of one into
    the other; targets are added in the same ratio. If both are wanted, half of the batches have
    each, as in DeiT (Touvron et al. 2021).

    Args:
        images: ``(B, C, H, W)`` normalized images.
        targets: ``(B, K)`` probabilities of the classes.
        mixup: Parameter alpha of mixup: the ratio is drawn from Beta(alpha, alpha); 0 for none.
        cutmix: Parameter alpha of CutMix; 0 for none.
    """
    if not (mixup or cutmix) or len(images) < 2:
        return images, targets
    cut = cutmix > 0 and (not mixup or bool(torch.rand(()) < 0.5))
    alpha = cutmix if cut else mixup
    ratio = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(images)).to(images.device)
    if not cut:
        mixed = ratio * images + (1 - ratio) * images[order]
        return mixed, ratio * targets + (1 - ratio) * targets[order]
    height, width = images.shape[-2:]
    side = (1 - ratio) ** 0.5
    y, x = (int(torch.randint(length, ())) for length in (height, width))
    top, bottom = (round(min(max(y + s * side * height / 2, 0), height)) for s in (-1, 1))
    left, right = (round(min(max(x + s * side * width / 2, 0), width)) for s in (-1, 1))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[order][..., top:bottom, left:right]
    ratio = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, ratio * targets + (1 - ratio) * targets[order]
