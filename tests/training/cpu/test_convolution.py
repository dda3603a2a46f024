"""Convolutions as products of matrices: torch's results, and what is left to torch."""

import pytest
import torch
from torch import Tensor

from vissl_lite.training.cpu.convolution import convolution

# images' channels and side, results' channels, kernel, stride, padding: what ResNets have at 32 and
# at 224 pixels, and shapes that nobody has
FEW = [
    (16, 1, 24, 3, 1, 1),
    (16, 2, 24, 3, 1, 1),
    (16, 2, 24, 3, 2, 1),
    (16, 1, 24, 1, 2, 0),
    (16, 2, 24, 1, 2, 0),
    (16, 9, 24, 1, 1, 0),
    (16, 9, 24, 1, 2, 0),
    (16, 4, 24, 3, 1, 1),
    (16, 4, 24, 3, 2, 1),
    (16, 7, 24, 3, 1, 1),
    (16, 14, 24, 3, 2, 1),
    (3, 8, 16, 7, 2, 3),
    (16, 5, 24, 5, 1, 0),
    (16, 5, 24, 4, 3, 1),
    (16, 2, 24, 2, 2, 0),
    (16, 2, 24, 3, 1, 2),
    (16, 1, 24, 3, 1, 2),
    (16, 3, 24, (3, 1), (1, 2), (1, 0)),
]


def gradients(result: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, result.numel()).view_as(result)
    return [result, *torch.autograd.grad((result.float() * weights).sum(), inputs)]


@pytest.mark.parametrize(("channels", "side", "outputs", "kernel", "stride", "padding"), FEW)
def test_values_and_gradients_are_torchs(
    channels: int, side: int, outputs: int, kernel: int, stride: int, padding: int
) -> None:
    bias = side % 2 == 0
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    images = torch.randn(6, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, height, width) / (channels * height * width) ** 0.5
    inputs = [images, weight, *([torch.randn(outputs)] if bias else [])]
    inputs = [one.bfloat16().float().requires_grad_() for one in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        ours = convolution(*inputs, stride=stride, padding=padding)
    theirs = torch.conv2d(*inputs, stride=stride, padding=padding)
    assert ours is not None
    assert ours.dtype == torch.bfloat16
    assert ours.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        # float32's result, but for the rounding of what goes in and comes out
        off = one.float() - other
        assert off.norm() < 0.006 * other.norm()
        assert off.abs().max() < 0.01 * other.abs().max()


@pytest.mark.parametrize(
    ("side", "options"),
    [
        (8, {"padding": 1}),
        (4, {"padding": 1, "groups": 4}),
        (4, {"padding": 2, "dilation": 2}),
        (4, {"padding": "same"}),
    ],
)
def test_the_rest_is_torchs(side: int, options: dict[str, object]) -> None:
    weight = torch.randn(8, 8 // int(options.get("groups", 1)), 3, 3)  # type: ignore[call-overload]
    assert convolution(torch.randn(2, 8, side, side), weight, **options) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1)])
def test_no_image_at_all_is_left_to_torch(kernel: int, padding: int) -> None:
    images, weight = torch.randn(0, 4, 7, 7), torch.randn(2, 4, kernel, kernel)
    assert convolution(images, weight, None, 1, padding) is None


def test_an_image_smaller_than_the_kernel_is_torchs_error() -> None:
    assert convolution(torch.randn(2, 8, 2, 2), torch.randn(8, 8, 5, 5)) is None


def test_patches_are_not_kept_for_the_backward_pass() -> None:
    images = torch.randn(4, 8, 4, 4, requires_grad=True)
    weight = torch.randn(8, 8, 3, 3, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    ):
        convolution(images, weight, padding=1)
    assert sum(kept) == images.numel() + weight.numel()
