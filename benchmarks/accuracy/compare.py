"""What `vissl-lite compare` says of our encoders: CIFAR-10 and UC Merced.

    python -m benchmarks.accuracy.compare cifar10 --data DATA/cifar10 \
        --arm "SimCLR, 70 CPU minutes=RUN" --out OUT
    python -m benchmarks.accuracy.compare ucmerced --data DATA/ucmerced \
        --arm "ImageNet=FOLDER" --out OUT

``--arm NAME=ENCODER`` names what the tables call it; the baseline is ``--baseline NAME=ENCODER``.
Each job compares at least three seeds of labels; all that is chosen is chosen on validation images.

Results: benchmarks/results/compare.json, and pictures beside it.
"""

import argparse
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import (
    RESULTS,
    keep,
    load,
    markdown_table,
    plus_minus,
    provenance,
    where_and_when,
)
from vissl_lite.comparison.statistics import Difference

JOBS: dict[str, list[object]] = {
    "cifar10": ["--fractions", 0.001, 0.01, 0.1, 1, "--image_size", 32],
    "ucmerced": ["--shots", 1, 5, 10, 40, "--image_size", 96],
}


def named(words: str) -> tuple[str, str]:
    name, _, source = words.partition("=")
    if not source:
        raise argparse.ArgumentTypeError(f"{words} is not NAME=ENCODER")
    return name, source


def rename(value: Any, names: dict[str, str]) -> Any:
    """The same with arms called by their names in the tables, in keys and sentences."""
    if isinstance(value, dict):
        return {rename(key, names): rename(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [rename(item, names) for item in value]
    if isinstance(value, str):
        for source, name in sorted(names.items(), key=lambda pair: -len(pair[0])):
            value = value.replace(source, name)
    return value


def comparison_tables(job: str) -> str:
    """A table per protocol, with the difference from the baseline; then the verdicts."""
    results = load("compare")[job]
    parts = []
    for protocol, found in results["protocols"].items():
        rows = []
        for arm, by_amount in found["arms"].items():
            rows.append([arm, *(plus_minus(one) for one in by_amount.values())])
            if arm != results["baseline"]:
                gains = [found["differences"][arm][amount] for amount in by_amount]
                cells = [f"{g['mean']:+.3f} ({Difference(**g).interval})" for g in gains]
                rows.append(["difference, 95 %", *cells])
        labels = [f"{count:,} labels ({amount})" for amount, count in results["labels"].items()]
        parts.append(markdown_table([f"{protocol}, test {found['metric']}", *labels], rows))
    parts += [f"> {sentence}" for sentence in results["sentences"]]
    return "\n\n".join([*parts, provenance(results, command_of(job))])


def command_of(job: str) -> str:
    baseline = " --baseline untrained=random:resnet10t" if job == "cifar10" else ""
    words = f"--data DATA/{job} --arm NAME=RUN{baseline} --out OUT"
    return f"python -m benchmarks.accuracy.compare {job} {words}"


TABLES = {
    "compare_cifar10": partial(comparison_tables, "cifar10"),
    "compare_ucmerced": partial(comparison_tables, "ucmerced"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--arm", type=named, action="append", required=True)
    parser.add_argument("--baseline", type=named, default=("untrained", "random:resnet18"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    arms = dict([*given.arm, given.baseline])
    command = [
        sys.executable, "-m", "vissl_lite", "compare", "--encoder", *arms.values(),
        "--baseline", given.baseline[1], "--data", given.data, "--out", given.out,
        *JOBS[given.job], *(["--resume"] if (given.out / "config.yaml").exists() else []),
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True)
    results = json.loads((given.out / "results.json").read_text())
    results = rename(results, {source: name for name, source in arms.items()})
    kept = ("protocols", "labels", "seeds", "baseline", "sentences", "leaks", "test_images")
    found = {name: results[name] for name in kept if name in results}
    keep("compare", {given.job: {**found, "made": where_and_when()}})
    shutil.copy(given.out / "compare.png", RESULTS / f"compare-{given.job}.png")


if __name__ == "__main__":
    main()
