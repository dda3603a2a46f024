"""Views a second a core, decoding included, of SimCLR's two views with their deterministic streams.

    python benchmarks/views.py --small DATA/cifar10/train --large DATA/bccd/JPEGImages

Results: benchmarks/results/views.json.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import cv2
import torch
from common import keep

from vissl_lite.data.images import find_images
from vissl_lite.data.stream import ViewDataset, collate
from vissl_lite.encoder import build_encoder
from vissl_lite.pretext.simclr import SimCLR


def views_a_second(folder: Path, size: int, seconds: float) -> float:
    """The median over five stretches, on one thread, batches of 32 collated.

    By the processor's clock: what other work takes from the core does not count.
    """
    paths = find_images([folder])
    task = SimCLR(build_encoder("test_resnet", size))
    dataset = ViewDataset(paths, task.views(), seed=0)
    rates, index = [], 0
    for _ in range(5):
        start, views = time.process_time(), 0
        while time.process_time() - start < seconds / 5:
            keys = [(0, (index + i) * 7919 % len(paths)) for i in range(32)]
            views += 32 * len(collate([dataset[key] for key in keys]).views)
            index += 32
        rates.append(views / (time.process_time() - start))
    return sorted(rates)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--large", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--peer_python", help="interpreter of the environment with lightly")
    options = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    results = {
        "vissl_lite": {
            "views_32": views_a_second(options.small, 32, options.seconds),
            "views_224": views_a_second(options.large, 224, options.seconds),
        }
    }
    if options.peer_python:
        script = [options.peer_python, str(Path(__file__).parent / "peers" / "views.py")]
        folders = ["--small", str(options.small), "--large", str(options.large)]
        command = [*script, *folders, "--seconds", str(options.seconds)]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        small, large = (json.loads(line) for line in printed.strip().splitlines()[-2:])
        results["lightly"] = {
            "views_32": small["views_per_cpu_second"],
            "views_224": large["views_per_cpu_second"],
        }
    print(results)
    keep("views", results)


if __name__ == "__main__":
    main()
