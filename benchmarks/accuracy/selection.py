"""Does choosing the images to label pay? `vissl-lite compare --selection`, against random images.

    python -m benchmarks.accuracy.selection JOB --data DATA/SET --encoder RUN --out OUT

``JOB`` names the set and where the encoder is from: ``cifar10-ours``, ``ucmerced-ours`` and
``ucmerced-ImageNet``, which are judged by linear probes, and ``ucmerced-ImageNet-finetuned``, with
a fixed learning rate and number of epochs. The budgets are 1, 5, 10 and 50 (UC Merced: 30;
fine-tuned: 1 and 5) times the number of classes; no method knows how many images of each class
there are. Each of five seeds has 80 % of the training images to choose from.

Results: benchmarks/results/selection.json. A comparison that was interrupted goes on.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks.common import keep, load, markdown_table, plus_minus, provenance, where_and_when
from vissl_lite.comparison.simulation import Selector
from vissl_lite.comparison.statistics import Difference

ALL = ["--selection", *get_args(Selector), "--protocols", "linear"]
UCMERCED = ["--image_size", 64, "--upright", "false"]
JOBS: dict[str, list[object]] = {
    "cifar10-ours": [*ALL, "--budgets", 10, 50, 100, 500, "--image_size", 32],
    "ucmerced-ours": [*ALL, "--budgets", 21, 105, 210, 630, *UCMERCED],
    "ucmerced-ImageNet": [*ALL, "--budgets", 21, 105, 210, 630, *UCMERCED],
    "ucmerced-ImageNet-finetuned": [
        "--selection", "random", "herding", "typiclust", "--budgets", 21, 105, *UCMERCED,
        "--protocols", "finetune", "--lr", 0.001, "--epochs", 20,
    ],
}  # fmt: skip


def table(job: str) -> str:
    """For each protocol the accuracy of each method and its difference from random images."""
    found = load("selection")[job]
    parts = []
    for protocol, one in found["protocols"].items():
        rows = []
        for method, by_amount in one["arms"].items():
            rows.append([f"`{method}`", *(plus_minus(cell) for cell in by_amount.values())])
            if method != found["baseline"]:
                gains = [one["differences"][method][amount] for amount in by_amount]
                cells = [f"{g['mean']:+.3f} ({Difference(**g).interval})" for g in gains]
                rows.append(["difference, 95 %", *cells])
        amounts = [f"{name}" for name in found["labels"]]
        parts.append(markdown_table([f"{protocol}, test {one['metric']}", *amounts], rows))
    parts += [f"> {sentence}" for sentence in found["sentences"]]
    name = job.split("-")[0]
    command = f"python -m benchmarks.accuracy.selection {job} --data DATA/{name} --encoder RUN ..."
    return "\n\n".join([*parts, provenance(found, command)])


TABLES = {f"selection_{job.replace('-', '_')}": partial(table, job) for job in JOBS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    command = [
        sys.executable, "-m", "vissl_lite", "compare", *JOBS[given.job],
        "--encoder", given.encoder, "--data", given.data, "--out", given.out,
        "--seeds", given.seeds, *(["--resume"] if (given.out / "config.yaml").exists() else []),
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True)
    results: dict[str, Any] = json.loads((given.out / "results.json").read_text())
    kept = ("protocols", "labels", "seeds", "baseline", "sentences", "test_images")
    found = {name: results[name] for name in kept if name in results}
    keep("selection", {given.job: {**found, "made": where_and_when()}})


if __name__ == "__main__":
    main()
