"""Views a second a core, decoding included, of SimCLR's two views with their deterministic streams.

    git worktree add BEFORE 1f3ff4a
    taskset -c 0 python -m benchmarks.data.views --small DATA/cifar10/train \
        --large DATA/bccd/JPEGImages --before BEFORE --peer_python PEERS/bin/python

In the first epoch, in which fingerprints of the images are taken too, and in later ones; with an
older checkout beside it. All take turns, on one thread, by the processor's clock: what other work
takes from the core does not count. Medians over the rounds.

Results: benchmarks/results/views.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROUNDS, SECONDS = 5, 3.0


def views_a_second(folder: Path, size: int, epoch: int, seconds: float) -> float:
    """The median over three stretches, batches of 32 collated."""
    from vissl_lite.data.images import find_images
    from vissl_lite.data.stream import ViewDataset, collate
    from vissl_lite.encoders.encoder import build_encoder
    from vissl_lite.pretext.simclr import SimCLR

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
    sizes = ((options.small, 32), (options.large, 224))
    rates = {
        f"views_{size}": views_a_second(folder, size, options.epoch, options.seconds)
        for folder, size in sizes
    }
    print(json.dumps(rates))


def views_table() -> str:
    from benchmarks.common import load, markdown_table, provenance

    results = load("views")
    rows = [
        [name, f"{r['views_32']:,.0f}", f"{r['views_224']:,.0f}"]
        for name, r in results["arms"].items()
    ]
    command = (
        "python -m benchmarks.data.views --small DATA/cifar10/train --large DATA/bccd/JPEGImages "
        "--before BEFORE --peer_python PYTHON"
    )
    header = ["", "32 px, CIFAR files", "224 px, 640x480 JPEGs"]
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {"views": views_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--large", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--before", type=Path, help="a checkout of an older commit")
    parser.add_argument("--peer_python", help="interpreter of the environment with lightly")
    parser.add_argument("--epoch", type=int, help="measure this alone, once")
    options = parser.parse_args()
    if options.epoch is not None:
        return once(options)

    from benchmarks.common import keep, last_json_line

    folders = ["--small", str(options.small), "--large", str(options.large)]
    folders += ["--seconds", str(options.seconds)]
    itself = [sys.executable, str(Path(__file__))]
    here = Path(__file__).parents[2]
    arms = {
        "vissl_lite, first epoch": (here, [*itself, "--epoch", "0"]),
        "vissl_lite, later epochs": (here, [*itself, "--epoch", "1"]),
    }
    if options.before:
        head = ["git", "-C", str(options.before), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
        arms[f"vissl_lite at {commit}"] = (options.before, [*itself, "--epoch", "1"])
    if options.peer_python:
        script = str(here / "benchmarks" / "peers" / "views.py")
        arms["lightly"] = (here, [options.peer_python, script])
    measured: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for name, (checkout, command) in arms.items():
            os.environ["PYTHONPATH"] = str(checkout)
            found = last_json_line([*command, *folders])
            measured.setdefault(name, []).append(found)
            print(name, found, flush=True)
    results = {
        name: {each: median(one[each] for one in rounds) for each in ("views_32", "views_224")}
        for name, rounds in measured.items()
    }
    keep("views", {"arms": results})


if __name__ == "__main__":
    main()
