"""Every pretext for the same minutes on CIFAR-10: does the encoder beat an untrained one?

Each pretext trains on one core for the same wall-clock time, by configs/cifar10_minutes.yaml; as
many run side by side as ``--jobs`` says. ViT pretexts train ``vit_slim_patch4_32``, all others
``resnet18``. Then a probe evaluates the encoder: kNN (k = 200, T = 0.1) and linear, at every
stage, fitted to a fifth of the training labels (the penalty is chosen on some of these), on the
test split. Encoders are those of the last step. Seeds and pretexts that are given are added to
what was measured before.

    python -m benchmarks.accuracy.pretexts --data DATA/cifar10 --out RUNS

Results: benchmarks/results/pretexts.json, by backbone, and layers.png: the stages of some encoders.
"""

import argparse
import os
import statistics
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import (
    RESULTS,
    ROOT,
    keep,
    load,
    markdown_table,
    mean_and_spread,
    provenance,
    results_of,
    vissl_lite,
    where_and_when,
)
from vissl_lite.pretext import PRETEXTS
from vissl_lite.run import read_config

COMMAND = "python -m benchmarks.accuracy.pretexts --data DATA/cifar10 --out RUNS"
IN_PICTURE = ("rotation", "jigsaw", "colorization", "simclr", "untrained resnet18")
BACKBONES = ("resnet18", "vit_slim_patch4_32")
UNTRAINED = tuple(f"untrained {backbone}" for backbone in BACKBONES)
RECIPE = ROOT / "configs" / "cifar10_minutes.yaml"
FRACTION = 0.2  # of the training labels, for the probe
one_at_a_time = threading.Lock()  # results go into one file


def backbone_of(name: str) -> str:
    if name in UNTRAINED:
        return name.split()[1]
    convolutional = PRETEXTS[name].info.backbones in ("any", "CNN")
    return BACKBONES[0] if convolutional else BACKBONES[1]


def train(name: str, seed: int, core: int, data: Path, out: Path, minutes: float) -> None:
    if name in UNTRAINED:
        return
    settings: list[object] = ["--config", RECIPE, "--pretext", name, "--seed", seed]
    settings += ["--backbone", backbone_of(name)]
    where = ["--data", data / "train", "--out", out / f"{name}-{seed}"]
    vissl_lite(core, "pretrain", *settings, *where, "--max_time", round(60 * minutes))


def evaluate(name: str, seed: int, core: int, data: Path, out: Path) -> None:
    trained, run = out / f"{name}-{seed}", out / f"probe-{name.replace(' ', '-')}-{seed}"
    encoder = f"random:{backbone_of(name)}" if name in UNTRAINED else str(trained)
    vissl_lite(
        core, "probe", "--encoder", encoder, "--data", data, "--out", run, "--layers",
        "--k", 200, "--temperature", 0.1, "--image_size", 32, "--fraction", FRACTION,
        "--seed", seed,
    )  # fmt: skip
    scores = results_of(run)
    figures = {
        "knn": scores["knn"],
        "linear": scores["linear"],
        "layers": {
            layer: {"knn": each["knn"], "linear": each["linear"]}
            for layer, each in scores["layers"].items()
        },
    }
    if name not in UNTRAINED:
        ended = results_of(trained)
        images = ended["steps"] * read_config(trained)["batch_size"]
        figures |= {
            "seconds": ended["seconds"],
            "images_per_second": images / ended["seconds"],
            "collapsed": ended["collapsed"],
        }
    with one_at_a_time:
        before = results_for(backbone_of(name))
        seeds = before.get(name, {}) | {str(seed): figures}
        keep("pretexts", {backbone_of(name): {**before, name: seeds, "made": where_and_when()}})


def results_for(backbone: str) -> dict[str, Any]:
    """Figures of the encoders with a backbone, by name and seed."""
    there = (RESULTS / "pretexts.json").exists()
    found: dict[str, Any] = load("pretexts").get(backbone, {}) if there else {}
    return found


def stages(runs: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Mean linear accuracy of each stage over some runs, from the pixels up."""
    runs = list(runs)
    return {
        stage: statistics.mean(run["layers"][stage]["linear"] for run in runs)
        for stage in runs[0]["layers"]
    }


def pretexts_table(backbone: str) -> str:
    results = results_for(backbone)
    untrained = f"untrained {backbone}"
    baseline = statistics.mean(run["linear"] for run in results[untrained].values())
    rows = []
    for name in [untrained, *PRETEXTS]:
        if name not in results:
            continue
        runs = list(results[name].values())
        linear = [run["linear"] for run in runs]
        at_stage = stages(runs)
        best = max(at_stage, key=lambda stage: at_stage[stage])
        best_knn = statistics.mean(run["layers"][best]["knn"] for run in runs)
        rate = gain = ""
        if name in PRETEXTS:
            rate = f"{statistics.mean(run['images_per_second'] for run in runs):.0f}"
            gain = f"{statistics.mean(linear) - baseline:+.3f}"
        accuracies = [mean_and_spread([run[kind] for run in runs]) for kind in ("knn", "linear")]
        of_best = f"{best_knn:.3f} / {at_stage[best]:.3f} ({best})"
        label = f"`{name}`" if name in PRETEXTS else "untrained"
        rows.append([label, rate, *accuracies, gain, of_best, str(len(runs))])
    figures = ["images/s", "kNN", "linear", "gain", "best stage: kNN / linear"]
    header = [f"`{backbone}`", *figures, "seeds"]
    return markdown_table(header, rows) + "\n\n" + provenance(results, COMMAND)


def plot_layers() -> None:
    """Accuracy of a linear probe over the stages of ``IN_PICTURE``."""
    results = results_for("resnet18")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name in IN_PICTURE:
        at_stage = stages(results[name].values())
        values = list(at_stage.values())
        axes.plot(values, "-" if name in PRETEXTS else "--", marker="o", label=name)
        best = int(np.argmax(values))
        axes.plot(best, values[best], "o", markersize=11, fillstyle="none",
                  color=axes.lines[-1].get_color())  # fmt: skip
    axes.set_xticks(range(len(at_stage)), list(at_stage))
    axes.set_ylabel("linear accuracy, 10,000 labels")
    axes.set_xlabel("stage, from the pixels up; circled: the best")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "layers.png", dpi=110)


def layers_table() -> str:
    picture = "![accuracy over the stages of five encoders](results/layers.png)"
    return picture + "\n\n" + provenance(results_for("resnet18"), COMMAND)


TABLES = {
    **{f"pretexts_{name}": partial(pretexts_table, name) for name in BACKBONES},
    "layers": layers_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1.5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    alone = [name for name, made in PRETEXTS.items() if not made.info.encoders]
    parser.add_argument("--arms", nargs="+", default=[*UNTRAINED, *alone])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    waiting: Queue[tuple[int, str]] = Queue()
    for seed in options.seeds:
        for name in options.arms:
            waiting.put((seed, name))

    def work(core: int) -> None:
        while True:
            try:
                seed, name = waiting.get_nowait()
            except Empty:
                return
            print(seed, name, flush=True)
            train(name, seed, core, options.data, options.out, options.minutes)
            evaluate(name, seed, core, options.data, options.out)

    cores = sorted(os.sched_getaffinity(0))[: options.jobs]
    workers = [threading.Thread(target=work, args=(core,)) for core in cores]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if all(name in results_for("resnet18") for name in IN_PICTURE):
        plot_layers()


if __name__ == "__main__":
    main()
