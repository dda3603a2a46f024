"""Attention in training on this CPU: torch's own against ours, which trains transformers in bf16.

    python benchmarks/attention.py

Forward and backward of the attention alone, and a step of a ViT-S, in milliseconds; the two
take turns, medians over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import timm
import torch
import torch.nn.functional as F  # noqa: N812
from common import keep
from torch import Tensor

from vissl_lite.training.attention import attend
from vissl_lite.training.quick import quick_operations

# Images, heads and tokens: views of 224 and of 96 pixels, what MAE keeps of one, and larger ones;
# always as much work in the linear layers beside it.
SHAPES = ((32, 6, 197), (170, 6, 37), (126, 6, 50), (11, 6, 577), (6, 6, 1025))
WIDTH = 64


def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value, WIDTH**-0.5)


def alone(compute: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Milliseconds of a forward and a backward pass."""
    start = time.perf_counter()
    output = compute(*inputs)
    torch.autograd.grad(output, inputs, torch.ones_like(output))
    return 1000 * (time.perf_counter() - start)


def step(model: torch.nn.Module, images: Tensor, quick: bool) -> float:
    """Milliseconds of a forward and a backward pass of a network."""
    start = time.perf_counter()
    with quick_operations() if quick else nullcontext():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).float().square().mean()
        model.zero_grad()
        loss.backward()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    results: dict[str, dict[str, dict[str, float]]] = {"attention": {}, "step": {}}
    for dtype in (torch.bfloat16, torch.float32):
        for images, heads, tokens in SHAPES:
            shape = (images, heads, tokens, WIDTH)
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            pairs = [(alone(torchs, inputs), alone(ours, inputs)) for _ in range(rounds + 1)][1:]
            name = f"{images} images of {tokens} tokens, {str(dtype).split('.')[1]}"
            results["attention"][name] = middle(pairs)
    for size, images in ((224, 16), (96, 64)):
        model = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=size)
        batch = torch.randn(images, 3, size, size)
        pairs = [(step(model, batch, False), step(model, batch, True)) for _ in range(rounds + 1)]
        results["step"][f"{images} images of {size} pixels"] = middle(pairs[1:])
    keep("attention", results)


def middle(pairs: list[tuple[float, float]]) -> dict[str, float]:
    torchs, ours = (statistics.median(each) for each in zip(*pairs, strict=True))
    return {"torch": torchs, "ours": ours}


if __name__ == "__main__":
    main()
