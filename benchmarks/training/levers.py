"""Accuracy against time: what makes a short pre-training reach an accuracy sooner?

SimCLR on UC Merced's training images without their labels, for several times (``--max_time``), with
some settings changed (``ARMS``); each encoder is evaluated by ``probe`` on the test images. Time is
that of the processor over the whole command, start, workers, pictures and report included; with a
GPU, it is that of the clock.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.training.levers \
        --data DATA/ucmerced --out RUNS [--backbone vit_tiny_patch16_224]

``--arms`` and ``--seeds`` pick some, for a core each; finished runs are kept. Results:
benchmarks/results/levers.json (levers_gpu.json on a GPU) and levers-BACKBONE.png, a table and a
picture for each backbone.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import (
    HAS_GPU,
    RESULTS,
    keep,
    load,
    markdown_table,
    provenance,
    where_and_when,
)
from vissl_lite.data.images import find_images

SMALL = ["--progressive_resizing", "true", "--token_drop", 0]
LARGE = ["--progressive_resizing", "false", "--token_drop", 0]

# Name of a row, and options of pretrain
ARMS: dict[str, list[object]] = {
    "one size": LARGE,
    "progressive resizing": SMALL,
    "one size, two local crops": [*LARGE, "--pretext.local_crops", 2],
    "progressive resizing, two local crops": [*SMALL, "--pretext.local_crops", 2],
    "progressive resizing, batch of 128": [*SMALL, "--batch_size", 128],
    "progressive resizing, rotation first": SMALL,
}
OF_TRANSFORMERS: dict[str, list[object]] = {
    "one size, half of the patches": [*LARGE[:2], "--token_drop", 0.5],
    "progressive resizing, half of the patches": [*SMALL[:2], "--token_drop", 0.5],
}
ROTATION = "rotation first"  # a quarter of the time with the cheapest pretext, then SimCLR
ON_CPU = {"resnet10t": 96, "vit_tiny_patch16_224": 96}  # and the image size
ON_GPU = {"resnet50": 224, "vit_small_patch16_224": 224}
BACKBONES = ON_CPU | ON_GPU
NAME, UNIT = ("levers_gpu", "minutes") if HAS_GPU else ("levers", "minutes of one core")


def arms_of(backbone: str) -> dict[str, list[object]]:
    return ARMS | OF_TRANSFORMERS if backbone.startswith("vit") else ARMS


def command(*words: object) -> float:
    """Run a command; the seconds that it took: of processors, or with a GPU, of the clock."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "vissl_lite", *map(str, words)], check=True)
    after = os.times()
    if HAS_GPU:
        return after.elapsed - before.elapsed
    return sum(getattr(after, n) - getattr(before, n) for n in ("children_user", "children_system"))


def run(arm: str, minutes: float, seed: int, o: argparse.Namespace) -> None:
    """Train and evaluate one encoder, if that has not been done yet."""
    folder = o.out / f"{o.backbone}-{arm.replace(', ', '-').replace(' ', '_')}-{minutes:g}-{seed}"
    done = folder / "figures.json"
    if done.exists():
        return
    common = [
        "pretrain", "--data", o.data / "train", "--overwrite", "true",
        "--image_size", BACKBONES[o.backbone], "--batch_size", 64, "--seed", seed,
        "--upright", "false", *arms_of(o.backbone)[arm],
    ]  # fmt: skip
    spent = 0.0
    given = 60 * minutes
    start: list[object] = ["--backbone", o.backbone]
    if arm.endswith(ROTATION):
        first = folder / "rotation"
        spent += command(*common, "--out", first, *start, "--pretext", "rotation",
                         "--max_time", round(given / 4))  # fmt: skip
        given *= 3 / 4
        # as from random weights, as the others of these short runs: the weights are not yet good
        start = ["--encoder", first, "--freeze_share", 0, "--lr", 1e-3, "--layer_decay", 1]
    start += ["--pretext.color", 0.25]  # the default of short runs, if there is no GPU
    spent += command(*common, "--out", folder / "run", *start, "--max_time", round(given))
    command("probe", "--encoder", folder / "run", "--data", o.data, "--out", folder / "probe",
            "--leaks", "warn", "--overwrite", "true")  # fmt: skip
    scores = json.loads((folder / "probe" / "results.json").read_text())
    figures = {name: scores[name] for name in ("knn", "linear")} | {"minutes": spent / 60}
    done.write_text(json.dumps({"arm": arm, "given": minutes, "seed": seed, **figures}))


def collect(o: argparse.Namespace) -> None:
    """Write down all finished runs of a backbone and their plot."""
    files = sorted(o.out.glob(f"{o.backbone}-*/figures.json"))
    runs = [json.loads(file.read_text()) for file in files]
    rows: list[dict[str, Any]] = []
    for arm in arms_of(o.backbone):
        for given in sorted({r["given"] for r in runs if r["arm"] == arm}):
            same = [r for r in runs if (r["arm"], r["given"]) == (arm, given)]
            means = {name: mean(r[name] for r in same) for name in ("minutes", "knn", "linear")}
            rows.append({"arm": arm, "given": given, "seeds": len(same), **means})
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), ("knn", "linear"), strict=True):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            mine = [row for row in rows if row["arm"] == arm]
            dots = [r for r in runs if r["arm"] == arm]
            line = axes.plot([r["minutes"] for r in mine], [r[measure] for r in mine], label=arm)
            axes.plot([r["minutes"] for r in dots], [r[measure] for r in dots], ".",
                      color=line[0].get_color())  # fmt: skip
        axes.set_xlabel(UNIT)
        axes.set_title(f"{measure} accuracy")
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(RESULTS / f"levers-{o.backbone}.png", dpi=100)
    images = len(find_images([o.data / "train"]))
    found = {"rows": rows, "runs": runs, "images": images, "made": where_and_when()}
    keep(NAME, {o.backbone: found})
    for row in rows:
        print(row)


def minutes_to(target: float, rows: list[dict[str, Any]], measure: str) -> str:
    """Minutes at which an arm reaches an accuracy, interpolated between its runs.

    Args:
        target: Accuracy to reach.
        rows: Rows of the arm.
        measure: ``knn`` or ``linear``.
    """
    points = sorted((row["minutes"], row[measure]) for row in rows)
    if points[0][1] >= target:
        return f"at most {points[0][0]:.1f}"
    for (before, low), (after, high) in pairwise(points):
        if high >= target:
            share = (target - low) / (high - low)
            return f"{before * (after / before) ** share:.1f}"
    return "not reached"


def levers_table(name: str, backbone: str) -> str:
    if not (RESULTS / f"{name}.json").exists() or backbone not in load(name):
        return "Not measured yet; see [gpu/README.md](gpu/README.md)."
    results = load(name)[backbone]
    arms = {
        row["arm"]: [r for r in results["rows"] if r["arm"] == row["arm"]]
        for row in results["rows"]
    }
    baseline = arms.get("one size", [])
    targets = {m: max(row[m] for row in baseline) for m in ("knn", "linear") if baseline}
    reached = [
        [arm, *(minutes_to(target, runs, m) for m, target in targets.items())]
        for arm, runs in arms.items()
    ]
    rows = [
        [row["arm"], str(row["seeds"]), f"{row['minutes']:.1f}",
         f"{row['knn']:.3f}", f"{row['linear']:.3f}"]
        for row in results["rows"]
    ]  # fmt: skip
    header = [
        "",
        "seeds",
        "minutes of one core" if name == "levers" else "minutes",
        "kNN",
        "linear",
    ]
    command = (
        f"python -m benchmarks.training.levers --data DATA/ucmerced --out RUNS "
        f"--backbone {backbone}"
    )
    picture = f"![accuracy against minutes](results/levers-{backbone}.png)"
    to = [f"minutes to {target:.3f} {m.replace('knn', 'kNN')}" for m, target in targets.items()]
    parts = [markdown_table(header, rows), picture]
    if targets:
        parts.insert(1, markdown_table(["", *to], reached))
    return "\n\n".join([*parts, provenance(results, command)])


TABLES = {
    f"{name}_{backbone}": partial(levers_table, name, backbone)
    for name, backbones in (("levers", ON_CPU), ("levers_gpu", ON_GPU))
    for backbone in backbones
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="with train/ and test/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS | OF_TRANSFORMERS))
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet10t")
    parser.add_argument("--collect", action="store_true", help="only write down what is there")
    o = parser.parse_args()
    for seed in o.seeds:
        for minutes in o.minutes:
            for arm in () if o.collect else o.arms or arms_of(o.backbone):
                run(arm, minutes, seed, o)
    collect(o)


if __name__ == "__main__":
    main()
