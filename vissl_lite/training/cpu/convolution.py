"""Convolutions of small maps on a CPU in bf16 as matrix products.

oneDNN, which computes torch's convolutions on CPUs, is made for large maps. What ResNets end with,
and all of what they do with images of 32 pixels, takes it 2 to 20 times as long as the product of
matrices that it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# Pixels of a result, up to which the gradient of the weights is a product: 7x7. Forward and
# backward of 512 channels to 512, for 64 images of 7x7 pixels on two cores with AMX: the weights'
# gradient 93 to 40 ms, the rest as fast. For 14x14 pixels it is slower.
FEW_PIXELS = 49

# Pixels of an image, up to which the result and the gradient of the images are, too: 2x2. For 512
# images of 256 channels: 27 to 6 ms, 27 to 7 ms, and the weights' gradient 63 to 8 ms.
TINY = 4

Pair = tuple[int, int]


def _pair(value: int | Sequence[int]) -> Pair:
    """A number for both directions, or one for each, as torch takes them."""
    if isinstance(value, int):
        return value, value
    down, along = value
    return down, along


def convolution(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: str | int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor | None:
    """``torch.conv2d`` in bf16 by matrix products; None if that is not faster.

    Args:
        images: ``(B, C, H, W)``, channels last in memory.
        weight: ``(C', C, h, w)``.
        bias: ``(C',)``.
        stride: Stride in pixels.
        padding: Pixels of zeros around the images.
        dilation: Must be 1.
        groups: Likewise.

    Returns:
        ``(B, C', H', W')`` bf16, channels last.
    """
    if groups != 1 or _pair(dilation) != (1, 1) or isinstance(padding, str) or images.ndim != 4:
        return None
    if images.shape[0] == 0:  # as of the mask head, where no object was found
        return None
    steps, around = _pair(stride), _pair(padding)
    sides = zip(images.shape[2:], weight.shape[2:], steps, around, strict=True)
    rows, columns = ((side + 2 * pad - kernel) // step + 1 for side, kernel, step, pad in sides)
    if weight.shape[2:] == (1, 1) and around == (0, 0):
        pixels = images[:, :, :: steps[0], :: steps[1]].permute(0, 2, 3, 1)
        # flat, or torch would multiply image by image
        products = F.linear(pixels.flatten(0, 2), weight.flatten(1), bias)
        return products.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)
    if rows == columns == 1:
        return _one_pixel(images, weight, bias, around)
    if min(rows, columns) > 0 and rows * columns <= FEW_PIXELS:
        result: Tensor = _FewPixels.apply(images.bfloat16(), weight.bfloat16(), steps, around)
        return result if bias is None else result + bias.bfloat16().view(1, -1, 1, 1)
    return None


def _one_pixel(images: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair) -> Tensor:
    """A result of one pixel: the product of the image with the part of the kernel inside it."""
    kernel = [
        slice(pad, min(size, side + pad))
        for pad, size, side in zip(padding, weight.shape[2:], images.shape[2:], strict=True)
    ]
    within = weight[:, :, kernel[0], kernel[1]].permute(0, 2, 3, 1)
    part = images[:, :, : within.shape[1], : within.shape[2]].permute(0, 2, 3, 1)
    return F.linear(part.flatten(1), within.flatten(1), bias)[:, :, None, None]


class _FewPixels(torch.autograd.Function):
    """Recompute the patches in the backward pass: they take nine times the memory of the images."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        result = torch.conv2d if images.shape[2] * images.shape[3] > TINY else _product
        return result(images, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = _of_images(gradient, images, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            sides: Pair = (weight.shape[2], weight.shape[3])
            patches = _patches(images, sides, ctx.stride, ctx.padding)
            pixels = gradient.permute(0, 2, 3, 1).flatten(0, 2)
            product = pixels.t() @ patches.flatten(0, 2)
            of_weight = product.view(len(weight), *sides, -1).permute(0, 3, 1, 2)
        return of_images, of_weight, None, None


def _of_images(
    gradient: Tensor, images: Tensor, weight: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    """Gradient of the images: a convolution of the result's gradient with the flipped kernels."""
    around = weight.shape[2] - 1 - padding[0], weight.shape[3] - 1 - padding[1]
    if stride == (1, 1) and min(around) >= 0 and images.shape[2] * images.shape[3] <= TINY:
        turned = weight.flip(2, 3).transpose(0, 1)
        return _product(gradient, turned, None, stride, around)
    result: Tensor = torch.ops.aten.convolution_backward(
        gradient,
        images,
        weight,
        None,
        stride,
        padding,
        (1, 1),
        False,
        (0, 0),
        1,
        (True, False, False),
    )[0]
    return result


def _product(images: Tensor, weight: Tensor, bias: None, stride: Pair, padding: Pair) -> Tensor:
    """``torch.conv2d`` as the matrix product of image patches and kernels."""
    patches = _patches(images, (weight.shape[2], weight.shape[3]), stride, padding)
    products = patches.flatten(0, 2) @ weight.permute(0, 2, 3, 1).flatten(1).t()
    return products.view(*patches.shape[:3], -1).permute(0, 3, 1, 2)


def _patches(images: Tensor, sides: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Image patches that the kernels are multiplied with, ``(B, H', W', h w C)``."""
    rows, columns = padding
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, columns, columns, rows, rows))
    windows = padded.unfold(1, sides[0], stride[0]).unfold(2, sides[1], stride[1])
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
