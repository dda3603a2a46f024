"""Every pretext for the same minutes on CIFAR-10: does the encoder beat an untrained one?

Each pretext trains on one core for the same wall-clock time, by configs/cifar10_minutes.yaml; as
many run side by side as ``--jobs`` says. ViT pretexts train ``vit_slim_patch4_32``, all others
``resnet18``. Then one probe evaluates all encoders: kNN (k = 200, T = 0.1) and linear, at every
stage, fitted to a fifth of the training labels (the penalty is chosen on some of these), on the
test split. Encoders are those of the last step.

    python -m benchmarks.accuracy.pretexts --data DATA/cifar10 --out RUNS

Results: benchmarks/results/pretexts.json, and layers.png: the stages of some encoders.
"""

import argparse
import json
import os
import threading
from pathlib import Path
from queue import Empty, Queue

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, ROOT, keep, load, markdown_table, provenance, vissl_lite
from vissl_lite.pretext import PRETEXTS
from vissl_lite.run import read_config

COMMAND = "python -m benchmarks.accuracy.pretexts --data DATA/cifar10 --out RUNS"
IN_PICTURE = ("rotation", "jigsaw", "colorization", "simclr", "untrained resnet18")
UNTRAINED = ("untrained resnet18", "untrained vit_slim_patch4_32")
RECIPE = ROOT / "configs" / "cifar10_minutes.yaml"
FRACTION = 0.2  # of the training labels, for the probe
one_at_a_time = threading.Lock()  # results go into one file


def backbone_of(name: str) -> str:
    if name in UNTRAINED:
        return name.split()[1]
    convolutional = PRETEXTS[name].info.backbones in ("any", "CNN")
    return "resnet18" if convolutional else "vit_slim_patch4_32"


def train(name: str, core: int, data: Path, out: Path, minutes: float) -> None:
    if name in UNTRAINED:
        return
    settings: list[object] = ["--config", RECIPE, "--pretext", name]
    settings += ["--backbone", backbone_of(name)]
    where = ["--data", data / "train", "--out", out / name]
    vissl_lite(core, "pretrain", *settings, *where, "--max_time", round(60 * minutes))


def evaluate(name: str, core: int, data: Path, out: Path) -> None:
    run = out / f"probe-{name.replace(' ', '-')}"
    encoder = f"random:{backbone_of(name)}" if name in UNTRAINED else str(out / name)
    vissl_lite(
        core, "probe", "--encoder", encoder, "--data", data, "--out", run, "--layers",
        "--k", 200, "--temperature", 0.1, "--image_size", 32, "--fraction", FRACTION,
    )  # fmt: skip
    scores = json.loads((run / "results.json").read_text())
    best = max(scores["layers"], key=lambda layer: scores["layers"][layer]["linear"])
    row = {
        "backbone": backbone_of(name),
        "knn": scores["knn"],
        "linear": scores["linear"],
        "best_layer": best,
        "best_layer_knn": scores["layers"][best]["knn"],
        "best_layer_linear": scores["layers"][best]["linear"],
        "layers": {layer: each["linear"] for layer, each in scores["layers"].items()},
    }
    if name not in UNTRAINED:
        trained = json.loads((out / name / "results.json").read_text())
        images = trained["steps"] * read_config(out / name)["batch_size"]
        row |= {
            "family": PRETEXTS[name].info.family,
            "seconds": trained["seconds"],
            "images_per_second": images / trained["seconds"],
            "collapsed": trained["collapsed"],
        }
    with one_at_a_time:
        keep("pretexts", {name: row})


def pretexts_table() -> str:
    results = load("pretexts")
    untrained = {r["backbone"]: r for name, r in results.items() if name.startswith("untrained")}
    rows = []
    for name in [*(n for n in results if n.startswith("untrained")), *PRETEXTS]:
        if name not in results:
            continue
        r = results[name]
        best = f"{r['best_layer_knn']:.3f} / {r['best_layer_linear']:.3f} ({r['best_layer']})"
        row = [f"`{name}`" if name in PRETEXTS else name.replace(" ", " `") + "`"]
        if name in PRETEXTS:
            gain = r["linear"] - untrained[r["backbone"]]["linear"]
            small = "ViT" if r["backbone"].startswith("vit") else ""
            row += [small, f"{r['images_per_second']:.0f}", f"{r['knn']:.3f}", f"{r['linear']:.3f}"]
            row.append(f"{gain:+.3f}")
        else:
            row += ["", "", f"{r['knn']:.3f}", f"{r['linear']:.3f}", ""]
        rows.append([*row, best])
    header = ["encoder", "", "images/s", "kNN", "linear", "gain", "best stage: kNN / linear"]
    return markdown_table(header, rows) + "\n\n" + provenance(results, COMMAND)


def plot_layers() -> None:
    """Accuracy of a linear probe over the stages of ``IN_PICTURE``."""
    results = load("pretexts")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name in IN_PICTURE:
        stages = results[name]["layers"]
        values = list(stages.values())
        axes.plot(values, "-" if name in PRETEXTS else "--", marker="o", label=name)
        best = int(np.argmax(values))
        axes.plot(best, values[best], "o", markersize=11, fillstyle="none",
                  color=axes.lines[-1].get_color())  # fmt: skip
    axes.set_xticks(range(len(stages)), list(stages))
    axes.set_ylabel("linear accuracy, 10,000 labels")
    axes.set_xlabel("stage, from the pixels up; circled: the best")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "layers.png", dpi=110)


def layers_table() -> str:
    picture = "![accuracy over the stages of five encoders](results/layers.png)"
    return picture + "\n\n" + provenance(load("pretexts"), COMMAND)


TABLES = {"pretexts": pretexts_table, "layers": layers_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    alone = [name for name, made in PRETEXTS.items() if not made.info.encoders]
    parser.add_argument("--arms", nargs="+", default=[*UNTRAINED, *alone])
    parser.add_argument("--steps", nargs="+", default=["train", "evaluate"])
    options = parser.parse_args()
    for step in options.steps:
        waiting: Queue[str] = Queue()
        for name in options.arms:
            waiting.put(name)

        def work(core: int, step: str = step, waiting: Queue[str] = waiting) -> None:
            while True:
                try:
                    name = waiting.get_nowait()
                except Empty:
                    return
                print(step, name, flush=True)
                if step == "train":
                    train(name, core, options.data, options.out, options.minutes)
                else:
                    evaluate(name, core, options.data, options.out)

        cores = sorted(os.sched_getaffinity(0))[: options.jobs]
        workers = [threading.Thread(target=work, args=(core,)) for core in cores]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if all(name in load("pretexts") for name in IN_PICTURE):
        plot_layers()


if __name__ == "__main__":
    main()
