"""What `vissl-lite compare` says of our encoders: CIFAR-10, UC Merced, and stage by stage.

    python benchmarks/compare.py cifar10 --data DATA/cifar10 --arm "SimCLR, 70 CPU minutes=RUN" ...
    python benchmarks/compare.py ucmerced --data DATA/ucmerced --arm "ImageNet=FOLDER" ...
    python benchmarks/compare.py layers --data DATA/cifar10 --arm rotation=RUN --arm simclr=RUN ...

``--arm NAME=ENCODER`` names what the tables call it; the baseline is ``--baseline NAME=ENCODER``.
Each job compares at least three seeds of labels; all that is chosen is chosen on validation images.
``layers`` judges every stage by a linear probe and draws accuracy over depth.

Results: benchmarks/results/compare.json, and pictures beside it.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, keep, where_and_when
from matplotlib.figure import Figure

JOBS: dict[str, list[object]] = {
    "cifar10": ["--fractions", 0.001, 0.01, 0.1, 1, "--image_size", 32],
    "cifar10-finetune": ["--fractions", 0.001, 0.01, "--image_size", 32, "--protocols", "finetune"],
    "ucmerced": ["--shots", 1, 5, 10, 40, "--image_size", 96],
    "layers": ["--fractions", 0.2, "--image_size", 32, "--layers", "--protocols", "linear"],
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


def plot_layers(results: dict[str, Any], file: Path) -> None:
    """Accuracy of a linear probe over the stages of each arm."""
    stages = results["protocols"]["linear"]["layers"]
    (amount,) = results["labels"]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for arm, by_stage in stages.items():
        values = [one[amount] for one in by_stage.values()]
        style = "--" if arm == results["baseline"] else "-"
        axes.plot(range(len(values)), values, style, marker="o", label=arm)
        best = int(np.argmax(values))
        axes.plot(best, values[best], "o", markersize=11, fillstyle="none",
                  color=axes.lines[-1].get_color())  # fmt: skip
    axes.set_xticks(range(len(by_stage)), list(by_stage))
    axes.set_ylabel(f"linear accuracy, {results['labels'][amount]:,} labels")
    axes.set_xlabel("stage, from the pixels up; circled: the best")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


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
    if given.job == "layers":
        plot_layers(results, RESULTS / "layers.png")
    else:
        shutil.copy(given.out / "compare.png", RESULTS / f"compare-{given.job}.png")


if __name__ == "__main__":
    main()
