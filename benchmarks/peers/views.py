"""Views per second on one core from lightly's SimCLRTransform, decoding included.

One process and one thread take images from a LightlyDataset in random order, as a loader's worker
does: open the file, decode it, make both views as normalized tensors. At 32 pixels, on CIFAR files,
the transform has the settings of lightly's CIFAR example (no blur); at 224, on 640x480 JPEG files,
its defaults. Views per second are also given by processor time, which other work on the machine
disturbs less than the wall clock.

    python views.py

Prints one JSON line for each of the two.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from importlib.metadata import version

import torch
from lightly_simclr import blur_probability, make_dataset


def measure(folder: str, image_size: int, seconds: float, seed: int = 0) -> dict[str, object]:
    """Time the making of views for about the given seconds, after a short warm-up."""
    dataset = make_dataset(folder, image_size)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(64):
        dataset[rng.randrange(len(dataset))]
    images, wall, cpu = 0, 0.0, 0.0
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    while wall < seconds:
        dataset[rng.randrange(len(dataset))]
        images += 1
        wall = time.perf_counter() - wall_start
    cpu = time.process_time() - cpu_start
    return {
        "peer": "lightly",
        "version": version("lightly"),
        "image_size": image_size,
        "views_per_second": round(2 * images / wall, 2),
        "views_per_cpu_second": round(2 * images / cpu, 2),
        "images": images,
        "seconds": round(wall, 3),
        "gaussian_blur": blur_probability(image_size),
        "threads": torch.get_num_threads(),
        "data": folder,
        "pillow": version("pillow"),
        "torchvision": version("torchvision"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", required=True, help="files for 32 pixels")
    parser.add_argument("--large", required=True, help="files for 224 pixels")
    parser.add_argument("--seconds", type=float, default=15.0, help="timed, for each")
    args = parser.parse_args()

    torch.set_num_threads(1)
    rates = {}
    for name, folder, image_size in (("small", args.small, 32), ("large", args.large, 224)):
        measured = measure(folder, image_size, args.seconds)
        print(json.dumps(measured), flush=True)
        rates[name] = measured["views_per_cpu_second"]
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
