"""Operations of networks in training on this CPU: torch's own against ours, in bf16.

    python -m benchmarks.training.operations

Forward and backward of attentions and convolutions alone, and of whole networks, in milliseconds;
the two take turns, medians over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.common import keep, load, markdown_table, provenance
from vissl_lite.training.cpu.attention import attend
from vissl_lite.training.cpu.convolution import convolution
from vissl_lite.training.cpu.operators import fast_cpu_operators

# Images, heads and tokens: views of 224 and of 96 pixels, what MAE keeps of one, and larger ones;
# always as much work in the linear layers beside it.
ATTENTIONS = ((32, 6, 197), (170, 6, 37), (126, 6, 50), (11, 6, 577), (6, 6, 1025))
WIDTH = 64

# Images, channels before and after, side, kernel, stride: a ResNet-18's at 32 pixels and at 224,
# and of a ResNet-50's at 224 those that look at one pixel.
CONVOLUTIONS = (
    (512, 64, 128, 8, 3, 2), (512, 128, 128, 4, 3, 1), (512, 128, 256, 4, 3, 2),
    (512, 256, 256, 2, 3, 1), (512, 256, 512, 2, 3, 2), (512, 512, 512, 1, 3, 1),
    (64, 256, 512, 14, 3, 2), (64, 512, 512, 7, 3, 1),
    (32, 256, 64, 56, 1, 1), (32, 128, 512, 28, 1, 1), (32, 1024, 256, 14, 1, 1),
    (32, 1024, 2048, 14, 1, 2), (32, 2048, 512, 7, 1, 1),
)  # fmt: skip

NETWORKS = (
    ("resnet18", 32, 256),
    ("resnet18", 224, 32),
    ("resnet50", 224, 16),
    ("vit_small_patch16_224", 224, 16),
    ("vit_small_patch16_224", 96, 64),
)


def pass_through(compute: Callable[..., Tensor | None], inputs: list[Tensor]) -> float:
    """Milliseconds of a forward and a backward pass."""
    start = time.perf_counter()
    output = compute(*inputs)
    assert output is not None
    torch.autograd.grad(output, inputs, torch.ones_like(output))
    return 1000 * (time.perf_counter() - start)


def step(model: torch.nn.Module, images: Tensor, quick: bool) -> float:
    """Milliseconds of a forward and a backward pass of a network."""
    start = time.perf_counter()
    with fast_cpu_operators() if quick else nullcontext(), torch.autocast("cpu", torch.bfloat16):
        loss = model(images).float().square().mean()
    model.zero_grad()
    loss.backward()
    return 1000 * (time.perf_counter() - start)


def middle(rounds: int, torchs: Callable[[], float], ours: Callable[[], float]) -> dict[str, float]:
    """Medians of both, taking turns; the first round is left out."""
    pairs = [(torchs(), ours()) for _ in range(rounds + 1)][1:]
    both = [statistics.median(each) for each in zip(*pairs, strict=True)]
    return dict(zip(("torch", "ours"), both, strict=True))


def attentions(rounds: int) -> dict[str, dict[str, float]]:
    results = {}
    ours = partial(attend, scale=WIDTH**-0.5)
    for images, heads, tokens in ATTENTIONS:
        shape = (images, heads, tokens, WIDTH)
        inputs = [torch.randn(shape).bfloat16().requires_grad_() for _ in range(3)]
        results[f"{images} images of {tokens} tokens"] = middle(
            rounds,
            lambda inputs=inputs: pass_through(F.scaled_dot_product_attention, inputs),
            lambda inputs=inputs: pass_through(ours, inputs),
        )
    return results


def convolutions(rounds: int) -> dict[str, dict[str, float]]:
    results = {}
    for images, before, after, side, kernel, stride in CONVOLUTIONS:
        shapes = (images, before, side, side), (after, before, kernel, kernel)
        inputs = [
            torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)
            for shape in shapes
        ]
        for one in inputs:
            one.requires_grad_()
        options = {"stride": stride, "padding": kernel // 2}
        name = f"{images} images of {side}x{side}, {before} to {after} channels, "
        results[name + f"{kernel}x{kernel} / {stride}"] = middle(
            rounds,
            lambda i=inputs, o=options: pass_through(partial(torch.conv2d, **o), i),
            lambda i=inputs, o=options: pass_through(partial(convolution, **o), i),
        )
    return results


def networks(rounds: int) -> dict[str, dict[str, float]]:
    results = {}
    for name, size, images in NETWORKS:
        sized = {"img_size": size} if name.startswith("vit") else {}
        model = timm.create_model(name, num_classes=0, **sized).to(
            memory_format=torch.channels_last
        )
        batch = torch.randn(2 * images, 3, size, size).contiguous(memory_format=torch.channels_last)
        results[f"{name}, {2 * images} views of {size} pixels"] = middle(
            rounds,
            lambda model=model, batch=batch: step(model, batch, False),
            lambda model=model, batch=batch: step(model, batch, True),
        )
    return results


def operations_table() -> str:
    results = load("operations")
    rows = [
        [f"{kind}: {name}", f"{one['torch']:,.1f}", f"{one['ours']:,.1f}",
         f"{one['torch'] / one['ours']:.2f}"]
        for kind in ("attention", "convolution", "network")
        for name, one in results[kind].items()
    ]  # fmt: skip
    header = ["forward and backward, ms", "torch's", "ours", "times as fast"]
    return (
        markdown_table(header, rows)
        + "\n\n"
        + provenance(results, "python -m benchmarks.training.operations")
    )


TABLES = {"operations": operations_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for name, measure in (
        ("attention", attentions),
        ("convolution", convolutions),
        ("network", networks),
    ):
        measured = measure(rounds)
        keep("operations", {name: measured})
        for what, one in measured.items():
            print(f"{what:64} {one['torch']:8.1f} {one['ours']:8.1f}", flush=True)


if __name__ == "__main__":
    main()
