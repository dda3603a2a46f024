"""How time and memory of choosing images to label grow with the number of images.

    taskset -c 1 python -m benchmarks.data.selection_growth

Each point is a process of its own, on one thread: synthetic features (clusters of unequal size), a
budget of 50, nothing labelled. Time is the CPU time of the process, without making the features;
memory is its largest resident size, features, torch and the package included. Besides the methods
there is what every run of ``select`` does: the coverage for its report, and looking for
near-duplicates of 50 labelled and 50 chosen images. Reading images and computing their features
is not included. Results, which are added to those that are there (--counts measures some sizes):
benchmarks/results/selection_growth.json.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    RESULTS,
    keep,
    last_json_line,
    load,
    markdown_table,
    provenance,
)

COUNTS = (10**4, 10**5, 10**6)
FEATURES, CLUSTERS, BUDGET = 256, 200, 50
METHODS = ("herding", "typiclust", "probcover", "k_center", "margin", "dropquery", "random")
COVERAGE, DUPLICATES = "coverage for the report", "near-duplicates"
RUN = "python -m benchmarks.data.selection_growth"


def make_features(count: int) -> np.ndarray:
    """``(N, D)`` float32, mean cosine similarity about 0.6 within a cluster and 0 between two.

    Args:
        count: Number of images. Cluster k has a share that falls as 1 / (k + 10).
    """
    random = np.random.default_rng(0)
    centers = random.standard_normal((CLUSTERS, FEATURES), np.float32)
    shares = 1 / (np.arange(CLUSTERS) + 10)
    of = random.choice(CLUSTERS, count, p=shares / shares.sum())
    features = np.empty((count, FEATURES), np.float32)
    for start in range(0, count, 10_000):  # nothing else of this size in memory
        some = slice(start, start + 10_000)
        noise = random.standard_normal(features[some].shape, np.float32)
        features[some] = centers[of[some]] + 0.8 * noise
    return features


def find_duplicates(count: int) -> float:
    """Seconds to look for images that show the same as 50 labelled and 50 chosen ones."""
    from vissl_lite.data.fingerprints import EXACT_BYTES, LOOK_BYTES, Fingerprints
    from vissl_lite.selection import METHODS, Candidates

    random = np.random.default_rng(0)
    looks = np.rint(random.standard_normal((count, LOOK_BYTES), np.float32) * 127 / LOOK_BYTES**0.5)
    exact = random.integers(0, 256, (count, EXACT_BYTES), np.uint8)
    prints = Fingerprints(exact, looks.astype(np.int8), [f"{index}.jpg" for index in range(count)])
    start = time.process_time()
    candidates = Candidates(count, np.arange(BUDGET), prints)
    METHODS["random"](np.empty((count, 0)), BUDGET, candidates=candidates)
    return time.process_time() - start


def measure(name: str, count: int) -> dict[str, float]:
    """Seconds and MB of one method for so many images."""
    import torch

    from vissl_lite.selection import METHODS
    from vissl_lite.selection.estimate import estimate_coverage

    torch.set_num_threads(1)
    if name == DUPLICATES:
        seconds = find_duplicates(count)
    else:
        features = make_features(count)
        uncertainty = np.random.default_rng(1).random(count) if name == "margin" else None
        nothing, chosen = np.empty(0, np.int64), np.arange(BUDGET)
        METHODS["random"](features[:100], 5)  # what is imported at first use
        start = time.process_time()
        if name == COVERAGE:
            estimate_coverage(features, nothing, chosen, np.ones(count, bool))
        else:
            METHODS[name](features, BUDGET, uncertainty=uncertainty)
        seconds = time.process_time() - start
    status = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return {"seconds": seconds, "mb": int(lines["VmHWM"].split()[0]) / 1024}


def selection_growth_table() -> str:
    if not (RESULTS / "selection_growth.json").exists():
        return "Not measured yet."
    results = load("selection_growth")
    rows = []
    for name in (*METHODS, COVERAGE, DUPLICATES):
        found = [results["rows"].get(f"{name} {count}") for count in COUNTS]
        seconds = ["not run" if one is None else f"{one['seconds']:.1f}" for one in found]
        memory = ["not run" if one is None else f"{one['mb'] / 1024:.2f}" for one in found]
        rows.append([f"`{name}`" if name in METHODS else name, *seconds, *memory])
    header = [""]
    for unit in ("s", "GiB"):
        header += [f"{count:,} images, {unit}" for count in COUNTS]
    return markdown_table(header, rows) + "\n\n" + provenance(results, RUN)


TABLES = {"selection_growth": selection_growth_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, count = options.measure
        print(json.dumps(measure(name, int(count))))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: dict[str, Any] = {}
    if (RESULTS / "selection_growth.json").exists():
        rows = load("selection_growth")["rows"]
    for count in options.counts:
        for name in (*METHODS, COVERAGE, DUPLICATES):
            command = [sys.executable, "-m", "benchmarks.data.selection_growth"]
            rows[f"{name} {count}"] = last_json_line([*command, "--measure", name, str(count)])
            keep("selection_growth", {"rows": rows})
            print(name, count, rows[f"{name} {count}"], flush=True)


if __name__ == "__main__":
    main()
