"""Attention among few tokens: torch's results, where it is used, and what it keeps."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.training.cpu.attention import FEW_TOKENS, attend, attention


def tokens(count: int, seed: int, width: int = 8) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, count, width, generator=random, requires_grad=True)


def results(compute: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    output = compute(*inputs)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.mark.parametrize("scale", [8**-0.5, 1.5])
def test_values_and_gradients_are_torchs(scale: float) -> None:
    inputs = tokens(5, 0), tokens(7, 1), tokens(7, 2)
    ours = results(lambda *qkv: attend(*qkv, scale), *inputs)
    theirs = results(lambda *qkv: F.scaled_dot_product_attention(*qkv, scale=scale), *inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_no_weights_are_kept_for_the_backward_pass() -> None:
    inputs = tokens(64, 0), tokens(64, 1), tokens(64, 2)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    ):
        attend(*inputs, 1.0)
    assert sum(kept) == sum(tensor.numel() for tensor in inputs)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (FEW_TOKENS + 1, {}),
        (4, {"is_causal": True}),
        (4, {"dropout_p": 0.5}),
        (4, {"attn_mask": torch.zeros(4, 4)}),
    ],
)
def test_the_rest_is_torchs(count: int, options: dict[str, object]) -> None:
    qkv = [tokens(count, 0).detach() for _ in range(3)]
    assert attention(*qkv, **options) is None  # type: ignore[arg-type]


def test_in_place_of_torchs_it_computes_in_bf16() -> None:
    qkv = [tokens(4, seed).detach() for seed in range(3)]
    ours = attention(*qkv, dropout_p=0.0)
    assert ours is not None
    assert ours.dtype == torch.bfloat16
    theirs = F.scaled_dot_product_attention(*qkv)
    torch.testing.assert_close(ours.float(), theirs, atol=0.02, rtol=0.02)
