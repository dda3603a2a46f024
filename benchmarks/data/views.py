"""SimCLR's two views per image: views per second and core, decoding included.

    git worktree add BEFORE a055420  # any number of them
    taskset -c 0 python -m benchmarks.data.views --small DATA/cifar10/train \
        --large DATA/bccd/JPEGImages --before BEFORE --peer_python PEERS/bin/python

Measured in the first epoch, which also computes fingerprints of the images, in later epochs, and
for an older checkout and lightly. All take turns, on one thread, by the processor's clock, so that
other work on the core does not count. Medians over the rounds.

Since commit a055420 crops that shrink an image are antialiased; ``noise`` is the standard deviation
of the pixels of views of 1024-pixel PNGs of gray noise (40), and of the same image as evaluated.

Results: benchmarks/results/views.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROUNDS, SECONDS = 5, 3.0

# What is measured, and the heading of its column.
KINDS = {
    "small": "32 px, CIFAR files",
    "large": "224 px, 640x480 JPEGs",
    "png": "224 px, 1024x1024 PNGs",
}


def views_per_second(folder: Path, size: int, epoch: int, seconds: float) -> float:
    """The median over three measurements, of batches of 32 images."""
    from vissl_lite.data.images import find_images
    from vissl_lite.data.stream import ViewDataset, collate
    from vissl_lite.pretext.simclr import SimCLR

    try:
        from vissl_lite.encoders.encoder import build_encoder
    except ImportError:  # an older checkout
        from vissl_lite.encoder import build_encoder

    paths = find_images([folder])
    task = SimCLR(build_encoder("test_resnet", size))
    dataset = ViewDataset(paths, task.views(), seed=0)
    rates, index = [], 0
    for _ in range(3):
        start, views = time.process_time(), 0
        while time.process_time() - start < seconds / 3:
            keys = [(epoch, (index + i) * 7919 % len(paths)) for i in range(32)]
            views += 32 * len(collate([dataset[key] for key in keys]).views)
            index += 32
        rates.append(views / (time.process_time() - start))
    return median(rates)


def once(options: argparse.Namespace) -> None:
    """Measure the package that is found first, and print it."""
    import cv2
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    kinds = {"small": (options.small, 32), "large": (options.large, 224), "png": (options.png, 224)}
    rates = {
        name: views_per_second(folder, size, options.epoch, options.seconds)
        for name, (folder, size) in kinds.items()
    }
    print(json.dumps({**rates, "noise": noise_of_views(options.png / "noise")}))


def noise_of_views(folder: Path) -> float:
    """The standard deviation of the pixels of 224-pixel crops of the images of a folder."""
    from vissl_lite.data.images import find_images
    from vissl_lite.data.stream import ViewDataset
    from vissl_lite.data.views import Views, distorted_crop

    views = Views([distorted_crop(224, 1.0, 0.0, 0.0)], 224)
    dataset = ViewDataset(find_images([folder]), views, seed=0)
    return float(sum(dataset[1, i].views[0].std() for i in range(len(dataset.paths)))) / len(
        dataset.paths
    )


def write_pngs(large: Path, folder: Path) -> None:
    """Write 64 of the large images and 4 of gray noise as PNGs of 1024 x 1024 pixels."""
    import numpy as np
    from PIL import Image

    (folder / "noise").mkdir()
    for number, file in enumerate(sorted(large.glob("*.jpg"))[:64]):
        Image.open(file).convert("RGB").resize((1024, 1024)).save(folder / f"{number}.png")
    for seed in range(4):
        gray = 127 + 40 * np.random.default_rng(seed).standard_normal((1024, 1024, 1))
        gray = np.repeat(np.clip(gray, 0, 255).astype(np.uint8), 3, axis=2)
        Image.fromarray(gray).save(folder / "noise" / f"{seed}.png")


def views_table() -> str:
    from benchmarks.common import load, markdown_table, provenance

    results = load("views")
    rows = []
    for name, rates in results["measured"].items():
        cells = [f"{rates[kind]:,.0f}" if kind in rates else "" for kind in KINDS]
        rows.append([name, *cells, f"{rates['noise']:.1f}" if "noise" in rates else ""])
    command = (
        "python -m benchmarks.data.views --small DATA/cifar10/train --large DATA/bccd/JPEGImages "
        "--before BEFORE --peer_python PYTHON"
    )
    header = ["views per second", *KINDS.values(), "noise"]
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {"views": views_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--large", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--before", type=Path, nargs="+", default=[], help="checkouts of older commits"
    )
    parser.add_argument("--peer_python", help="interpreter of the environment with lightly")
    parser.add_argument("--png", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--epoch", type=int, help=argparse.SUPPRESS)  # measure this alone, once
    options = parser.parse_args()
    if options.epoch is not None:
        return once(options)

    from benchmarks.common import keep, last_json_line

    folders = ["--small", str(options.small), "--large", str(options.large)]
    folders += ["--seconds", str(options.seconds)]
    itself = [sys.executable, str(Path(__file__))]
    here = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as pngs:
        write_pngs(options.large, Path(pngs))
        commands = {
            "vissl_lite, first epoch": (here, [*itself, "--epoch", "0", "--png", pngs]),
            "vissl_lite, later epochs": (here, [*itself, "--epoch", "1", "--png", pngs]),
        }
        for checkout in options.before:
            head = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
            commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
            old = [*itself, "--epoch", "1", "--png", pngs]
            commands[f"vissl_lite at {commit}, later epochs"] = (checkout, old)
        if options.peer_python:
            script = str(here / "benchmarks" / "peers" / "views.py")
            commands["lightly"] = (here, [options.peer_python, script])
        rounds: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            for name, (checkout, command) in commands.items():
                os.environ["PYTHONPATH"] = str(checkout)
                rounds.setdefault(name, []).append(last_json_line([*command, *folders]))
                print(name, rounds[name][-1], flush=True)
    measured = {
        name: {each: median(one[each] for one in found) for each in found[0]}
        for name, found in rounds.items()
    }
    keep("views", {"measured": measured})


if __name__ == "__main__":
    main()
