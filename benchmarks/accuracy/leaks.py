"""The leak guard on CIFAR-10: how many copies it finds, how many it invents, and what it costs.

    python -m benchmarks.accuracy.leaks --data DATA/cifar10

2,000 training images; a test part of 500 images of CIFAR's test set, which are new, and of 500 of
the training images: 200 files copied as they are, 100 encoded anew at JPEG quality 50, 100 flipped,
100 resized by 1.5. Then the time for all 10,000 test images against all 50,000 training images,
and how many of them are found: those are the near-duplicates of CIFAR-10 itself (Barz & Denzler
2020, ciFAIR).

Results: benchmarks/results/leaks.json.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import keep, load, markdown_table, provenance
from vissl_lite.data.fingerprints import find_matches, fingerprint, fingerprints_of
from vissl_lite.data.images import decode_image, find_images

TRAIN, NEW = 2000, 500
COUNTS = {"copied": 200, "jpeg_50": 100, "flipped": 100, "resized_1.5": 100}


def named(path: str) -> str:
    """Part, class and name."""
    return "/".join(Path(path).parts[-3:])


def alter(path: str, kind: str, to: Path) -> None:
    if kind == "copied":
        shutil.copy(path, to)
        return
    image = Image.open(path).convert("RGB")
    if kind == "flipped":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    elif kind == "resized_1.5":
        shape = (image.width * 3 // 2, image.height * 3 // 2)
        image = image.resize(shape, Image.Resampling.BICUBIC)
    image.save(to, quality=50 if kind == "jpeg_50" else 95)


def planted(train: list[str], test: list[str]) -> dict[str, Any]:
    """Recall of each kind of copy, and what is found among new images."""
    random = np.random.default_rng(0)
    bank = [train[i] for i in random.permutation(len(train))[:TRAIN]]
    new = [test[i] for i in random.permutation(len(test))[:NEW]]
    with tempfile.TemporaryDirectory() as made:
        origin = dict.fromkeys(new, ("new", ""))
        sources = iter(bank)
        for kind, count in COUNTS.items():
            for index in range(count):
                source, to = next(sources), Path(made) / f"{kind}-{index:03}.jpg"
                alter(source, kind, to)
                origin[str(to)] = (kind, source)
        matches = find_matches(fingerprints_of(list(origin)), fingerprints_of(bank))
    right: Counter[str] = Counter()
    as_exact: Counter[str] = Counter()
    least: dict[str, float] = {}
    invented, wrong_twins = [], 0
    for match in matches:
        kind, source = origin[match.path]
        if kind == "new":
            invented.append([match.similarity, named(match.path), named(match.twin)])
        right[kind] += 1
        as_exact[kind] += match.kind == "exact"
        least[kind] = min(match.similarity, least.get(kind, 1.0))
        wrong_twins += kind != "new" and match.twin != source
    return {
        "train_images": TRAIN,
        "kinds": {
            kind: {
                "images": count,
                "found": right[kind],
                "recall": right[kind] / count,
                "as_exact": as_exact[kind],
                "least_similarity": least.get(kind),
            }
            for kind, count in COUNTS.items()
        },
        "other_twins": wrong_twins,  # of several training images that look the same
        "new_images": NEW,
        "found_among_new": len(invented),
        "which": invented,
    }


def seconds(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it gives, and how long it takes by the clock and in processor time."""
    wall, busy = time.perf_counter(), time.process_time()
    result = work()
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - busy}
    return result, {name: round(value, 2) for name, value in spent.items()}


def whole(train: list[str], test: list[str]) -> dict[str, Any]:
    """The whole data set: time, and the near-duplicates that are in it."""
    evaluated, test_time = seconds(lambda: fingerprints_of(test))
    bank, train_time = seconds(lambda: fingerprints_of(train))
    matches, match_time = seconds(lambda: find_matches(evaluated, bank))
    some = [(Path(path).read_bytes(), path) for path in test[:5000]]
    images, decoding = seconds(lambda: [decode_image(data, path) for data, path in some])
    _, taking = seconds(
        lambda: [fingerprint(d, image) for (d, _), image in zip(some, images, strict=True)]
    )
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return {
        "images": len(test) + len(train),
        "cores": len(cores),
        "fingerprints": {k: round(test_time[k] + train_time[k], 2) for k in test_time},
        "matching": match_time,
        "decoding_us_an_image": round(1e6 * decoding["cpu_seconds"] / len(some), 1),
        "fingerprint_us_an_image": round(1e6 * taking["cpu_seconds"] / len(some), 1),
        "found": len(matches),
        "least_similar": sorted([m.similarity, named(m.path), named(m.twin)] for m in matches)[:10],
    }


def leaks_table() -> str:
    results = load("leaks")
    planted, whole = results["planted"], results["whole"]
    rows = [
        [kind.replace("_", " "), str(one["images"]), f"{one['recall']:.3f}",
         f"{one['least_similarity']:.3f}"]
        for kind, one in planted["kinds"].items()
    ]  # fmt: skip
    header = ["test images that are training images", "how many", "recall", "least similarity"]
    rest = (
        f"Found among {planted['new_images']} new images: {planted['found_among_new']}. "
        f"{whole['images']:,} images on {whole['cores']} core(s): "
        f"fingerprints {whole['fingerprints']['seconds']:.0f} s "
        f"({whole['fingerprints']['cpu_seconds']:.0f} s of CPU), matching 10,000 against 50,000 "
        f"{whole['matching']['seconds']:.0f} s ({whole['matching']['cpu_seconds']:.0f} s of CPU); "
        f"a fingerprint costs {whole['fingerprint_us_an_image']:.0f} microseconds beside "
        f"{whole['decoding_us_an_image']:.0f} of decoding."
    )
    command = "python -m benchmarks.accuracy.leaks --data DATA/cifar10"
    return markdown_table(header, rows) + "\n\n" + rest + "\n\n" + provenance(results, command)


TABLES = {"leaks": leaks_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    folder = parser.parse_args().data
    train, test = find_images([folder / "train"]), find_images([folder / "test"])
    results = {"planted": planted(train, test), "whole": whole(train, test)}
    print(results)
    keep("leaks", results)


if __name__ == "__main__":
    main()
