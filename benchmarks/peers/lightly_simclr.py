"""lightly's own SimCLR: data, model and loop, which run_lightly.py and views.py use.

What runs is lightly's PyTorch example, examples/pytorch/simclr.py of github.com/lightly-ai/lightly
(docs.lightly.ai/examples/simclr.html), with its settings: SimCLRTransform(input_size=32,
gaussian_blur=0.0), batches of 256 (shuffled, the last short one dropped), NTXentLoss(),
SimCLRProjectionHead(512, 512, 128), the two views through the model one after the other, fp32.
The optimizer is that of lightly's CIFAR-10 benchmark (SGD, lr 0.06 for 128 images, momentum 0.9,
weight decay 5e-4, cosine), with its weaker color jitter, where the recipe is ``benchmark``; that of
``example`` (plain SGD, lr 0.06, no schedule) does not get far in minutes.

What differs from the example: it reads JPEG files through LightlyDataset (the example's own
commented-out line), and the encoder is timm's resnet18 and not torchvision's. The two networks are
the same, but timm starts the last batch norm of each block at zero; ``torchvision_init`` starts
them at one, as in the example.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader

LEARNING_RATE = 0.06


def blur_probability(image_size: int) -> float:
    """The example turns the blur off at 32 pixels; larger images keep SimCLRTransform's default."""
    return 0.0 if image_size <= 32 else 0.5


def make_dataset(folder: str | Path, image_size: int, jitter: float = 1.0) -> LightlyDataset:
    """The images below a folder, each as two views."""
    transform = SimCLRTransform(
        image_size, cj_strength=jitter, gaussian_blur=blur_probability(image_size)
    )
    return LightlyDataset(str(folder), transform=transform)


def make_loader(
    folder: str | Path, image_size: int, batch_size: int, num_workers: int, jitter: float = 1.0
) -> DataLoader:
    """The example's loader; workers start anew each epoch, as they do there."""
    return DataLoader(
        make_dataset(folder, image_size, jitter),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
    )


def device() -> torch.device:
    """As the example chooses it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class SimCLR(nn.Module):
    """An encoder and lightly's projection head: for resnet18 of the example's sizes."""

    def __init__(self, backbone: str = "resnet18", torchvision_init: bool = False) -> None:
        super().__init__()
        optional = {"zero_init_last": False} if torchvision_init else {}
        self.encoder = timm.create_model(backbone, num_classes=0, **optional)
        width = self.encoder.num_features
        self.head = SimCLRProjectionHead(width, width, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Project a batch of views."""
        return self.head(self.encoder(x))


def train(
    model: SimCLR, loader: DataLoader, recipe: str = "example", seconds: float = 0.0
) -> Iterator[Tensor]:
    """Run the example's loop without end, yielding the loss after every optimizer step."""
    # The example has no learning rate schedule, no momentum and no weight decay: its optimizer is
    # `torch.optim.SGD(model.parameters(), lr=0.06)` and its loop steps no scheduler
    # (github.com/lightly-ai/lightly, examples/pytorch/simclr.py). lightly's CIFAR-10 benchmark
    # (docs, cifar10_benchmark.py) has lr 0.06 for 128 images, momentum, weight decay and a cosine.
    criterion = NTXentLoss()
    rate = LEARNING_RATE
    if recipe == "benchmark":
        rate *= (loader.batch_size or 128) / 128
        momentum, weight_decay = 0.9, 5e-4
    else:
        momentum, weight_decay = 0.0, 0.0
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay
    )
    model.train()
    place = next(model.parameters()).device
    start = time.perf_counter()
    while True:
        for (x0, x1), *_ in loader:
            if recipe == "benchmark":
                done = min(1.0, (time.perf_counter() - start) / seconds)
                for group in optimizer.param_groups:
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
            loss = criterion(model(x0.to(place)), model(x1.to(place)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()
