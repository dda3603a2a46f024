"""Photographs of 12 and 48 megapixels: reduced decoding and ``--cache`` against plain decoding.

    export OMP_NUM_THREADS=1
    taskset -c 0 python -m benchmarks.data.photographs speed --data DATA/bccd/JPEGImages
    taskset -c 0 python -m benchmarks.data.photographs cache --data DATA/bccd/JPEGImages
    taskset -c 0 python -m benchmarks.data.photographs accuracy --data DATA/ucmerced

``speed`` makes SimCLR's two views at 224 pixels of photographs in three ways, in turn: decoded
whole, reduced as far as any crop that might be drawn allows, and as far as the drawn crops allow.
``cache`` takes the time of epochs with and without a cache. ``accuracy`` trains short runs from
whole and from reduced images and evaluates them by kNN. The large photographs are small ones,
enlarged, with the noise of a sensor. All times are the processor's.

Results: benchmarks/results/photographs.json.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from statistics import mean, median
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from benchmarks.common import RESULTS, keep, load, markdown_table, over_seeds, provenance
from vissl_lite.commands.pretrain import pretrain
from vissl_lite.commands.probe import probe
from vissl_lite.data.cache import plan_cache
from vissl_lite.data.formats import decode_reduced
from vissl_lite.data.images import decode_image, find_images
from vissl_lite.data.stream import ViewDataset
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.simclr import SimCLR

# width, height, and how many photographs are made
SIZES = {"640x480": (640, 480, 24), "12 MP": (4000, 3000, 8), "48 MP": (8000, 6000, 4)}
NOISE = 6.0  # standard deviation, of 256 steps: 12 megapixels then take 2 to 4 MB, as a phone's
WAYS = ("Pillow", "whole", "any crop", "drawn crops")


def enlarged(source: str, width: int, height: int, seed: int, file: Path) -> str:
    """A photograph made larger, with noise, as a JPEG."""
    image = cv2.resize(
        decode_image(Path(source).read_bytes(), source),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )
    noise = np.random.default_rng(seed).standard_normal((height, width, 1), np.float32)
    noisy = np.clip(image + NOISE * noise, 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(file, quality=90)
    return str(file)


def photographs(data: Path, name: str, folder: Path) -> list[str]:
    """The files of one size; those of 640x480 are the photographs themselves, if they have it."""
    width, height, count = SIZES[name]
    sources = find_images([data])
    chosen = sources[:: max(1, len(sources) // count)][:count]
    if name == "640x480" and decode_image(Path(chosen[0]).read_bytes(), chosen[0]).shape[:2] == (
        height,
        width,
    ):
        return chosen
    return [
        enlarged(source, width, height, number, folder / f"{name[:2]}-{number}.jpg")
        for number, source in enumerate(chosen)
    ]


def simclr_views(size: int = 224) -> Views:
    return SimCLR(build_encoder("test_resnet", size)).views()


def views_in(way: str, views: Views, path: str, epoch: int, index: int) -> None:
    """Make the views of one photograph, as an epoch that is not the first does."""
    key = 0, epoch, index
    data = Path(path).read_bytes()
    if way == "Pillow":
        views(np.asarray(Image.open(BytesIO(data)).convert("RGB")), *key)
    elif way == "whole":
        views(decode_image(data, path), *key)
    elif way == "any crop":
        views(decode_image(data, path, views.shortest), *key)
    else:
        image, whole = decode_reduced(data, path, lambda h, w: views.times(h, w, *key))
        views(image, *key, whole)


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Views per second: the median over rounds in which all ways take turns."""
    views, results = simclr_views(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SIZES:
            paths = photographs(options.data, name, Path(folder))
            spent: dict[str, list[float]] = {way: [] for way in WAYS}
            for epoch in range(1, options.rounds + 1):
                for way in WAYS:

                    def work(way: str = way, paths: list[str] = paths, epoch: int = epoch) -> None:
                        for index, path in enumerate(paths):
                            views_in(way, views, path, epoch, index)

                    spent[way].append(seconds_of(work) / len(paths))
            results[name] = {
                "megabytes": mean(Path(path).stat().st_size for path in paths) / 1e6,
                "views_per_second": {way: len(views) / median(spent[way]) for way in WAYS},
            }
            print(name, results[name], flush=True)
    return results


def cache(options: argparse.Namespace) -> dict[str, Any]:
    """Views per second in the first epoch and in later ones, with and without a cache."""
    views, results = simclr_views(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("640x480", "12 MP"):
            paths = photographs(options.data, name, Path(folder))
            plain = ViewDataset(paths, views, 0)
            plans: list[Any] = []
            seconds = seconds_of(
                lambda paths=paths, plans=plans: plans.append(
                    plan_cache(paths, views.shortest, Path(folder), shareable=options.in_memory)
                )
            )
            kept = ViewDataset(paths, views, 0, plans[0].open(Path(folder)))

            def epoch(dataset: ViewDataset, number: int) -> None:
                for index in range(len(dataset)):
                    dataset[number, index]

            first = seconds_of(lambda kept=kept, epoch=epoch: epoch(kept, 0))
            spent: dict[str, list[float]] = {"decoding": [], "cache": []}
            for number in range(1, options.rounds + 1):
                for way, dataset in (("decoding", plain), ("cache", kept)):
                    spent[way].append(seconds_of(lambda d=dataset, e=epoch, n=number: e(d, n)))
            count = len(paths) * len(views)
            results[name] = {
                "where": "memory" if plans[0].in_memory else "file",
                "megabytes_an_image": plans[0].total / len(paths) / 1e6,
                "header_us_an_image": 1e6 * seconds / len(paths),
                "first_epoch": count / first,
                **{way: count / median(times) for way, times in spent.items()},
            }
            print(name, results[name], flush=True)
    return results


@contextmanager
def decoded_whole(whole: bool) -> Iterator[None]:
    """Within this, nothing is decoded at a reduced size."""
    times = Views.times
    if whole:
        Views.times = lambda *_: 1  # type: ignore[method-assign]
    try:
        yield
    finally:
        Views.times = times  # type: ignore[method-assign]


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    """kNN accuracy after the same number of epochs, from whole and from reduced images."""
    given = {"epochs": options.epochs, "side": options.side}
    sources = find_images([options.data / "train"])[:: options.every]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "large").mkdir()
        for number, source in enumerate(sources):
            enlarged(source, options.side, options.side, number, folder / f"large/{number:05}.jpg")
        arms: dict[str, dict[str, list[float]]] = {}
        for seed in range(options.seeds):
            for arm in ("whole", "reduced"):
                out = folder / f"{arm}-{seed}"
                with decoded_whole(arm == "whole"):
                    seconds = seconds_of(
                        lambda out=out, seed=seed: pretrain(
                            data=str(folder / "large"), out=str(out), backbone="resnet10t",
                            image_size=64, batch_size=64, epochs=options.epochs, upright=False,
                            logger="none", num_workers=0, seed=seed,
                            progressive_resizing=False,
                        )
                    )  # fmt: skip
                evaluated = probe(encoder=str(out), data=str(options.data), out=f"{out}-probe")
                figures = arms.setdefault(arm, {"knn": [], "linear": [], "seconds": []})
                figures["knn"].append(evaluated.knn)
                figures["linear"].append(evaluated.linear)
                figures["seconds"].append(seconds)
                print(arm, seed, evaluated.knn, evaluated.linear, seconds, flush=True)
    return {**given, "images": len(sources), "arms": arms}


def photographs_table() -> str:
    """Views per second by way of decoding and with a cache; accuracy of short runs."""
    if not (RESULTS / "photographs.json").exists():
        return "Not measured yet."
    results = load("photographs")
    parts = []
    if "speed" in results:
        rows = []
        for name, one in results["speed"].items():
            rates = one["views_per_second"]
            cells = [f"{rate:,.1f}" for rate in rates.values()]
            times = f"{rates['drawn crops'] / rates['whole']:.1f} / "
            times += f"{rates['drawn crops'] / rates['Pillow']:.1f}"
            rows.append([f"{name}, {one['megabytes']:.2f} MB", *cells, times])
        header = ["views/s", "whole, by Pillow", "whole, by OpenCV", "as any crop allows",
                  "as the drawn crops allow", "times OpenCV / Pillow"]  # fmt: skip
        parts.append(markdown_table(header, rows))
    if "cache" in results:
        rows = [
            [name, one["where"], f"{one['megabytes_an_image']:.2f}", f"{one['decoding']:,.0f}",
             f"{one['first_epoch']:,.0f}", f"{one['cache']:,.0f}",
             f"{one['cache'] / one['decoding']:.1f}"]
            for name, one in results["cache"].items()
        ]  # fmt: skip
        header = ["views/s", "kept in", "MB per image", "no cache", "cache, first epoch",
                  "cache, later epochs", "later: times no cache"]  # fmt: skip
        parts.append(markdown_table(header, rows))
    if "accuracy" in results:
        one = results["accuracy"]
        rows = [
            [arm, over_seeds(runs["knn"]), over_seeds(runs["linear"]),
             f"{mean(runs['seconds']) / 60:.1f}"]
            for arm, runs in one["arms"].items()
        ]  # fmt: skip
        parts.append(markdown_table(["images decoded", "kNN", "linear", "CPU minutes"], rows))
        parts.append(
            f"{one['images']} images of {one['side']} x {one['side']} pixels, "
            f"{one['epochs']} epochs of SimCLR, `resnet10t` at 64 pixels."
        )
    command = "python -m benchmarks.data.photographs speed|cache|accuracy --data DATA"
    return "\n\n".join([*parts, provenance(results, command)])


TABLES = {"photographs": photographs_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, rounds in (("speed", 9), ("cache", 5)):
        one = verbs.add_parser(verb)
        one.add_argument("--data", type=Path, required=True, help="photographs to enlarge")
        one.add_argument("--rounds", type=int, default=rounds)
    one.add_argument("--file", dest="in_memory", action="store_false", help="cache in a file")
    one = verbs.add_parser("accuracy")
    one.add_argument("--data", type=Path, required=True, help="UC Merced, with train and test")
    one.add_argument("--every", type=int, default=2, help="train on every n-th image")
    one.add_argument("--side", type=int, default=1024, help="of the enlarged images, in pixels")
    one.add_argument("--epochs", type=int, default=20)
    one.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    logging.getLogger("vissl_lite").setLevel(logging.INFO)
    work = {"speed": speed, "cache": cache, "accuracy": accuracy}[options.verb]
    keep("photographs", {options.verb: work(options)})


if __name__ == "__main__":
    main()
