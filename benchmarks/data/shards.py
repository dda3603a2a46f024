"""Images per second of the training stream alone: from files, from shards, from shards over HTTP.

    python -m benchmarks.data.shards --small DATA/cifar10/train --large DATA/bccd/JPEGImages

SimCLR's two views, one data worker, nobody trains. The server is Python's, on this machine, so it
takes time from the worker. Results: benchmarks/results/shards.json.
"""

import argparse
import resource
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, keep, load, markdown_table, provenance
from vissl_lite.commands.shard import shard
from vissl_lite.data.images import find_images
from vissl_lite.data.shards.index import find_shards
from vissl_lite.data.shards.stream import ShardSource
from vissl_lite.data.stream import Source, ViewDataset
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.simclr import SimCLR

BATCH, SHARDS, REPEATS = 64, 8, 3


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and does not say so."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


def measure(source: Source, images: int) -> dict[str, float]:
    """A second, by the clock; milliseconds of CPU an image, of the worker and what it starts."""
    epochs = max(1, images // len(source))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    batches = iter(source.loader(BATCH, epochs, 0, 0, 1, workers=1, pin_memory=False))
    next(batches)  # by then the worker has started
    start = time.perf_counter()
    seen = sum(len(batch.indices) for batch in batches)
    seconds = time.perf_counter() - start
    del batches
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"images_per_second": seen / seconds, "cpu_ms": 1000 * cpu / (seen + BATCH)}


def compare(photos: Path, size: int, images: int) -> dict[str, Any]:
    """Each in turn, several times: the best rate of each, as other work takes from all."""
    paths = find_images([photos])[:images]
    views = SimCLR(build_encoder("test_resnet", size)).views()
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "list.txt")
        listed.write_text("".join(f"{Path(path).absolute()}\n" for path in paths))
        out = Path(folder, "shards")
        shard(data=str(listed), out=str(out), images_per_shard=-(-len(paths) // SHARDS))
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(out)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/train-{{000000..{SHARDS - 1:06}}}.tar"
        sources: dict[str, Source] = {"files": ViewDataset(paths, views, 0)}
        for name, place in (("shards", str(out)), ("shards over HTTP", url)):
            found = find_shards([place])
            assert found is not None
            sources[name] = ShardSource(found, views, 0)
        rounds = [{n: measure(s, images) for n, s in sources.items()} for _ in range(REPEATS)]
        server.shutdown()
    return {
        name: {
            "images_per_second": max(one[name]["images_per_second"] for one in rounds),
            "cpu_ms": min(one[name]["cpu_ms"] for one in rounds),
        }
        for name in sources
    }


def shards_table() -> str:
    if not (RESULTS / "shards.json").exists():
        return "Not measured yet."
    results = load("shards")
    rows = [
        [name, *(f"{results[size][name][figure]:,.{digits}f}" for size in ("32", "224")
                 for figure, digits in (("images_per_second", 0), ("cpu_ms", 2)))]
        for name in results["224"]
    ]  # fmt: skip
    header = ["one data worker", "32 px, CIFAR files: images/s", "CPU ms per image",
              "224 px, 640x480 JPEGs: images/s", "CPU ms per image"]  # fmt: skip
    command = (
        "python -m benchmarks.data.shards --small DATA/cifar10/train --large DATA/bccd/JPEGImages"
    )
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {"shards": shards_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--large", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "32": compare(options.small, 32, 8000),
        "224": compare(options.large, 224, 2000),
    }
    print(results)
    keep("shards", results)


if __name__ == "__main__":
    main()
