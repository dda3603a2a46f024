"""Accuracy against time, with views of one size and with views that grow (progressive resizing).

SimCLR on UC Merced's training images without their labels, for several numbers of epochs, once with
``--progressive_resizing true`` and once without; each encoder is evaluated by ``probe`` on the test
images. Time is that of the processor over the whole command, start, workers, pictures and report
included, so that other work on the machine matters little.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.training.resizing \
        --data DATA/ucmerced --out RUNS

``--arms`` and ``--seeds`` pick some, for a core each; finished runs are kept. Results:
benchmarks/results/resizing.json and resizing.png.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import RESULTS, keep, load, markdown_table, provenance
from vissl_lite.data.images import find_images

ARMS = {"one size": "false", "progressive resizing": "true"}


def command(*words: object) -> float:
    """Run a verb; the seconds of processor time that it took, those of its workers included."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "vissl_lite", *map(str, words)], check=True)
    after = os.times()
    return sum(getattr(after, n) - getattr(before, n) for n in ("children_user", "children_system"))


def run(arm: str, epochs: int, seed: int, o: argparse.Namespace) -> None:
    """Train and evaluate one encoder, if that has not been done yet."""
    folder = o.out / f"{arm.replace(' ', '_')}-{epochs}-{seed}"
    done = folder / "figures.json"
    if done.exists():
        return
    seconds = command(
        "pretrain", "--data", o.data / "train", "--out", folder / "run", "--overwrite", "true",
        "--backbone", o.backbone, "--image_size", o.image_size, "--batch_size", 64,
        "--epochs", epochs, "--seed", seed, "--progressive_resizing", ARMS[arm],
        "--upright", "false",
    )  # fmt: skip
    command("probe", "--encoder", folder / "run", "--data", o.data, "--out", folder / "probe",
            "--leaks", "warn", "--overwrite", "true")  # fmt: skip
    scores = json.loads((folder / "probe" / "results.json").read_text())
    figures = {name: scores[name] for name in ("knn", "linear")} | {"minutes": seconds / 60}
    done.write_text(json.dumps({"arm": arm, "epochs": epochs, "seed": seed, **figures}))


def collect(o: argparse.Namespace) -> None:
    """Write down all finished runs and their plot."""
    runs = [json.loads(file.read_text()) for file in sorted(o.out.glob("*/figures.json"))]
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        for epochs in sorted({r["epochs"] for r in runs if r["arm"] == arm}):
            same = [r for r in runs if (r["arm"], r["epochs"]) == (arm, epochs)]
            means = {name: mean(r[name] for r in same) for name in ("minutes", "knn", "linear")}
            rows.append({"arm": arm, "epochs": epochs, "seeds": len(same), **means})
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), ("knn", "linear"), strict=True):
        for arm in ARMS:
            mine = [row for row in rows if row["arm"] == arm]
            dots = [r for r in runs if r["arm"] == arm]
            line = axes.plot([r["minutes"] for r in mine], [r[measure] for r in mine], label=arm)
            axes.plot([r["minutes"] for r in dots], [r[measure] for r in dots], ".",
                      color=line[0].get_color())  # fmt: skip
        axes.set_xlabel("minutes of one core")
        axes.set_title(f"{measure} accuracy")
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(RESULTS / "resizing.png", dpi=100)
    images = len(find_images([o.data / "train"]))
    keep("resizing", {"rows": rows, "runs": runs, "backbone": o.backbone,
                      "image_size": o.image_size, "images": images})  # fmt: skip
    for row in rows:
        print(row)


def resizing_table() -> str:
    results = load("resizing")
    rows = [
        [row["arm"], str(row["epochs"]), str(row["seeds"]), f"{row['minutes']:.1f}",
         f"{row['knn']:.3f}", f"{row['linear']:.3f}"]
        for row in results["rows"]
    ]  # fmt: skip
    header = ["views", "epochs", "seeds", "minutes of one core", "kNN", "linear"]
    command = "python -m benchmarks.training.resizing --data DATA/ucmerced --out RUNS"
    picture = "![accuracy against minutes, with and without](results/resizing.png)"
    return markdown_table(header, rows) + f"\n\n{picture}\n\n" + provenance(results, command)


TABLES = {"resizing": resizing_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="with train/ and test/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--epochs", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--backbone", default="resnet10t")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--collect", action="store_true", help="only write down what is there")
    o = parser.parse_args()
    for seed in o.seeds:
        for epochs in o.epochs:
            for arm in () if o.collect else o.arms:
                run(arm, epochs, seed, o)
    collect(o)


if __name__ == "__main__":
    main()
