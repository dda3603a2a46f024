"""What very many image files cost: seconds and memory to list them, to start, and in data workers.

    python -m benchmarks.data.listing --photos DATA/cifar10/train
    python -m benchmarks.data.listing --photos DATA/cifar10/train --before OLD_CHECKOUT

Makes folders of 1,000 hard links to 500 photographs in a temporary folder (which must be on their
disk) and removes them afterwards. Results: benchmarks/results/listing.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vissl_lite.data.images import find_images
from vissl_lite.data.stream import Item, KeyedDataset, StreamSampler, ViewDataset, stream
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.simclr import SimCLR

COUNTS, WORKERS = (10**4, 10**5, 10**6), 2


class LookUps(KeyedDataset):
    """Looks up an image's path and does no more with it: an epoch of a million takes seconds."""

    def item(self, epoch: int, index: int) -> Item:
        return Item([np.full((1, 1, 3), len(self.paths[index]) % 256, np.uint8)], index, [])


def memory(process: int | str = "self") -> dict[str, float]:
    """What a process holds, in MB: all of it, its share of it, and what is its own alone."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {
        name: int(size) for name, size, *_ in (line.replace(":", "").split() for line in lines)
    }
    own = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return {
        name: round(size / 1024, 1)
        for name, size in (("rss", sizes["Rss"]), ("pss", sizes["Pss"]), ("own", own))
    }


def measure(folder: Path) -> dict[str, Any]:
    """List a folder, start its training stream, then look every path up in the workers."""
    torch.set_num_threads(1)
    views = SimCLR(build_encoder("test_resnet", 32)).views()
    before = memory()["rss"]
    start = time.perf_counter()
    dataset = ViewDataset(find_images([folder]), views, seed=0)
    listing, listed = time.perf_counter() - start, memory()["rss"]
    start = time.perf_counter()
    images = len(dataset)
    batches = iter(stream(dataset, StreamSampler(images, 128, seed=0), WORKERS, pin_memory=False))
    next(batches)
    first_batch = time.perf_counter() - start
    del batches
    look_ups = LookUps(dataset.paths, seed=0)
    epoch = iter(stream(look_ups, StreamSampler(images, 1000, seed=0), WORKERS, pin_memory=False))
    next(epoch)
    own = [memory(worker.pid)["own"] for worker in active_children() if worker.pid]
    for _ in range(images // 1000):
        next(epoch)
    workers = [memory(worker.pid) for worker in active_children() if worker.pid]
    return {
        "images": images,
        "listing_seconds": round(listing, 3),
        "first_batch_seconds": round(first_batch, 3),
        "main_rss_mb": listed,
        "main_rss_mb_of_paths": round(listed - before, 1),
        "worker_own_mb_at_start": max(own),
        "worker_own_mb_after_epoch": max(worker["own"] for worker in workers),
        "worker_pss_mb_after_epoch": max(worker["pss"] for worker in workers),
    }


def link(photos: list[Path], folder: Path, count: int) -> None:
    """Folders of 1,000 hard links each."""
    for number in range(count):
        place = folder / f"{number // 1000:04}"
        if number % 1000 == 0:
            place.mkdir(parents=True)
        os.link(photos[number % len(photos)], f"{place}/photo-{number:07}.jpg")


def listing_table() -> str:
    from benchmarks.common import load, markdown_table, provenance

    results = load("listing")
    rows = [
        [f"{then['images']:,}", *(f"{one[name]:.{digits}f}" for name, digits in shown
                                  for one in (then, now))]
        for then, now in zip(results["before"], results["now"], strict=True)
        for shown in [[("listing_seconds", 2), ("first_batch_seconds", 2),
                       ("main_rss_mb_of_paths", 0), ("worker_own_mb_after_epoch", 0)]]
    ]  # fmt: skip
    header = ["images", "listing, s: before", "now", "first batch, s: before", "now",
              "paths in the main process, MB: before", "now",
              "a worker's own memory after an epoch, MB: before", "now"]  # fmt: skip
    command = "python -m benchmarks.data.listing --photos DATA/cifar10/train"
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {"listing": listing_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="a folder of photographs")
    parser.add_argument("--before", type=Path, help="measure an older checkout instead")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    from benchmarks.common import keep, last_json_line

    if options.before:
        os.environ["PYTHONPATH"] = str(options.before)
    photos = sorted(options.photos.rglob("*.jpg"))[:500]
    rows = []
    with tempfile.TemporaryDirectory() as made:
        for count in COUNTS:
            folder = Path(made) / str(count)
            link(photos, folder, count)
            rows.append(last_json_line([sys.executable, __file__, "--measure", str(folder)]))
            print(rows[-1])
    keep("listing", {"before" if options.before else "now": rows})


if __name__ == "__main__":
    main()
