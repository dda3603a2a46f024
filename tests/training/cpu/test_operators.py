"""Faster operations: where they take the place of torch's, and what comes of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.training.cpu import operators
from vissl_lite.training.cpu.operators import fast_cpu_operators


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations of ours that gave a result."""
    made: list[str] = []

    def watched(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = plain(*args, **kwargs)
            if result is not None:
                made.append(name)
            return result

        return call

    faster = {func: watched(ours.__name__, ours) for func, ours in operators._FASTER.items()}
    monkeypatch.setattr(operators, "_FASTER", faster)
    return made


def gradient(encoder: Encoder, images: torch.Tensor) -> torch.Tensor:
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(images)
    features.float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "name"), [("test_vit", "attention"), ("resnet10t", "convolution")]
)
def test_a_network_in_bf16_uses_them_and_learns_the_same(
    backbone: str, name: str, calls: list[str]
) -> None:
    encoder = build_encoder(backbone, 32).to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    plain = gradient(encoder, images)
    assert not calls
    with fast_cpu_operators():
        fast = gradient(encoder, images)
    assert name in calls
    exact = gradient_in_float32(encoder, images)
    # as far from float32's as torch's own bf16
    assert (fast - exact).norm() < 1.3 * (plain - exact).norm()


def gradient_in_float32(encoder: Encoder, images: torch.Tensor) -> torch.Tensor:
    encoder.zero_grad()
    encoder(images).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


def test_in_float32_all_is_torchs(calls: list[str]) -> None:
    with fast_cpu_operators():
        build_encoder("test_vit", 32)(torch.randn(2, 3, 32, 32))
        build_encoder("test_resnet", 32)(torch.randn(2, 3, 32, 32))
        with torch.autocast("cpu", torch.float16):
            F.conv2d(torch.randn(2, 3, 2, 2), torch.randn(3, 3, 1, 1))
    assert not calls


def test_where_there_is_a_gpu_nothing_is_replaced(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with fast_cpu_operators(), torch.autocast("cpu", torch.bfloat16):
        F.conv2d(torch.randn(2, 3, 2, 2), torch.randn(3, 3, 1, 1))
    assert not calls
