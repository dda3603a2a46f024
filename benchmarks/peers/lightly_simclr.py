"""Train lightly's own SimCLR for a fixed time and save its encoder as a timm folder.

What runs is lightly's PyTorch example, examples/pytorch/simclr.py of github.com/lightly-ai/lightly
(docs.lightly.ai/examples/simclr.html), with its settings: SimCLRTransform(input_size=32,
gaussian_blur=0.0), batches of 256 (shuffled, the last short one dropped), NTXentLoss(),
SimCLRProjectionHead(512, 512, 128), the two views through the model one after the other, fp32.
The optimizer is that of lightly's CIFAR-10 benchmark (SGD, lr 0.06 for 128 images, momentum 0.9,
weight decay 5e-4, cosine), with its weaker color jitter; --recipe example has the example's own
(plain SGD, lr 0.06, no schedule), with which eight minutes do not get far.

What differs from the example: it stops by the clock and not after 10 epochs, reads JPEG files
through LightlyDataset (the example's own commented-out line) with two workers and not eight, and
the encoder is timm's resnet18 and not torchvision's. The two networks are the same, but timm starts
the last batch norm of each block at zero; --torchvision_init starts them at one, as in the example.

    python lightly_simclr.py --data DATA/cifar10/train --out RUN --minutes 8

Writes OUT/encoder, for timm.create_model("local-dir:OUT/encoder", pretrained=True), and
OUT/result.json, which it also prints as one JSON line, the last on stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from timm_folder import save_encoder
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of images, or of folders of images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", choices=("benchmark", "example"), default="benchmark")
    parser.add_argument("--torchvision_init", action="store_true", help="as in the example")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    jitter = 0.5 if args.recipe == "benchmark" else 1.0
    loader = make_loader(args.data, args.image_size, args.batch_size, args.num_workers, jitter)
    if not len(loader):
        parser.error(f"{args.data} holds fewer images than one batch of {args.batch_size}")
    model = SimCLR(torchvision_init=args.torchvision_init).to(device())

    losses: list[Tensor] = []
    seconds = 0.0
    start, cpu_start = time.perf_counter(), time.process_time()  # before the workers start
    for loss in train(model, loader, args.recipe, 60 * args.minutes):
        losses.append(loss)
        seconds = time.perf_counter() - start
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}  {seconds:.0f} s  loss {loss.item():.4f}", flush=True)
        if seconds >= 60 * args.minutes:
            break

    cpu_seconds = time.process_time() - cpu_start

    mean, std = IMAGENET_NORMALIZE["mean"], IMAGENET_NORMALIZE["std"]
    save_encoder(model.encoder.cpu(), args.out / "encoder", args.image_size, mean, std)
    images = len(losses) * args.batch_size
    tail = torch.stack(losses[-50:])
    result = {
        "peer": "lightly",
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 2),
        "steps": len(losses),
        "epochs": round(len(losses) / len(loader), 3),
        # What the training process got of the machine, its workers aside: about 1.5 of two cores
        # at 32 pixels where nothing else runs. Less means that other work slowed the run.
        "cores_used": round(cpu_seconds / seconds, 3),
        "mean_loss_last_50_steps": round(tail.mean().item(), 4),
        "settings": {
            **{key: value for key, value in vars(args).items() if key not in ("data", "out")},
            "optimizer": "SGD",
            "temperature": 0.5,
            "projection_head": [512, 512, 128],
            "gaussian_blur": blur_probability(args.image_size),
            "precision": "fp32",
            "threads": torch.get_num_threads(),
        },
        "versions": {name: version(name) for name in ("lightly", "torch", "torchvision", "timm")},
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
