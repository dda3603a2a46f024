"""Does pre-training help on small labelled sets? Detection, segmentation, classification.

    python -m benchmarks.accuracy.domains --data FOLDER --out DOMAINS
    python -m benchmarks.accuracy.transfer pretrain SET --data FOLDER --domains DOMAINS --out OUT
    python -m benchmarks.accuracy.transfer SET --data FOLDER --domains DOMAINS --out OUT --seeds 2

``SET`` is ``bccd`` (detection), ``water`` (segmentation), ``ucmerced`` or ``cifar10``
(classification). The arms: an untrained ResNet-18 (``cifar10``: ``resnet10t``), one pre-trained by
us on the training images (``bccd``: one with each of three pretexts), an ImageNet-trained
``tf_efficientnet_lite0`` (not for ``cifar10``), and that one further pre-trained by us (``water``
and ``ucmerced``). All arms of a set get the same images, seeds and epochs; what is
chosen is chosen on labels that are held out, and where these were taken out of the training images
all labels are then trained on. Runs that are there are kept.
"""

import argparse
import json
import shutil
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import vissl_lite
from benchmarks.common import (
    RESULTS,
    ROOT,
    keep,
    load,
    markdown_table,
    over_seeds,
    provenance,
    use_core,
)
from vissl_lite.metrics_file import read_metrics

CONTRAST = {"name": "simclr", "temperature": 0.2, "min_crop_scale": 0.25}

# Pre-training of each set: images, side, batch, minutes from nothing and from ImageNet weights
PRETRAIN: dict[str, tuple[str, int, int, float, float]] = {
    "bccd": ("bccd-crops", 96, 64, 8, 0),
    "ucmerced": ("ucmerced/train", 96, 64, 16, 10),
    "water": ("water-crops", 64, 64, 4, 4),
}
CELL_PRETEXTS: dict[str, dict[str, Any]] = {
    "SimCLR": CONTRAST,
    "DenseCL": {"name": "densecl", "min_crop_scale": 0.25, "momentum": 0.95, "queue_size": 2048},
    "SparK": {"name": "spark"},
}


def pretrain(name: str, given: argparse.Namespace) -> None:
    if name == "cifar10":  # about 70 minutes of one core
        vissl_lite.pretrain(
            config=str(ROOT / "configs" / "cifar10_minutes.yaml"), pretext="simclr",
            backbone="resnet10t", data=str(given.data / "cifar10" / "train"),
            out=str(given.out / "cifar10-resnet10t"), epochs=24, num_workers=0, overwrite=True,
        )  # fmt: skip
        return
    images, size, batch, minutes, more_minutes = PRETRAIN[name]
    place = given.domains / images if (given.domains / images).exists() else given.data / images
    pretexts = CELL_PRETEXTS if name == "bccd" else {"resnet18": CONTRAST}
    starts = [
        (start, pretext, "random:resnet18", 1e-3, minutes) for start, pretext in pretexts.items()
    ]
    if more_minutes:
        starts.append(("lite0", CONTRAST, str(given.domains / "lite0"), 3e-4, more_minutes))
    for start, pretext, encoder, lr, time_budget in starts:
        out = given.out / f"{name}-{start}"
        if not (out / "encoder" / "config.json").exists():
            vissl_lite.pretrain(
                data=str(place), out=str(out), pretext=pretext, encoder=encoder,
                image_size=size, batch_size=batch, lr=lr, weight_decay=1e-4, upright=False,
                max_time=round(60 * time_budget), num_workers=0, overwrite=True,
            )  # fmt: skip


def arms(name: str, given: argparse.Namespace) -> dict[str, str]:
    """Encoder of each arm of a set."""
    untrained, imagenet = "random:resnet18", str(given.domains / "lite0")
    if name == "bccd":
        ours = {pretext: str(given.out / f"bccd-{pretext}") for pretext in CELL_PRETEXTS}
        return {"untrained": untrained, **ours, "ImageNet": imagenet}
    if name == "cifar10":
        return {"untrained": "random:resnet10t", "ours": str(given.out / "cifar10-resnet10t")}
    return {
        "untrained": untrained,
        "ours": str(given.out / f"{name}-resnet18"),
        "ImageNet": imagenet,
        "ImageNet, then ours": str(given.out / f"{name}-lite0"),
    }


def file_of(name: str) -> str:
    """Name of the results of a set: ``cifar10.json`` holds those of pre-training for minutes."""
    return "cifar10_transfer" if name == "cifar10" else name


def once(out: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """One fine-tuning, or what is left of an earlier one; with the CPU minutes that it took."""
    file = out / "took.json"
    if not file.exists():
        shutil.rmtree(out, ignore_errors=True)
        torch.manual_seed(arguments["seed"])
        started = time.process_time()
        vissl_lite.finetune(out=str(out), num_workers=0, **arguments)
        file.write_text(json.dumps((time.process_time() - started) / 60))
    found = json.loads((out / "results.json").read_text())
    return {"test": found["test"], "cpu_minutes": json.loads(file.read_text())}


def curve_of(run: Path, name: str) -> list[list[float]]:
    """A validation metric over the training: shares of the steps, and values."""
    _, rows, _ = read_metrics(run / "metrics.csv")
    steps = max(row["step"] for row in rows) + 1
    return [[(row["step"] + 1) / steps, row[name]] for row in rows if name in row]


def detection(given: argparse.Namespace, arm: str, encoder: str, seed: int) -> dict[str, Any]:
    run = given.out / "bccd" / f"{arm}-{seed}"
    made = once(
        run,
        {
            "data": str(given.data / "bccd"), "task": "detection", "encoder": encoder,
            "image_size": 320, "epochs": given.epochs or 12, "batch_size": 8, "upright": False,
            "seed": seed, "detector": given.detector,
        },
    )  # fmt: skip
    return {**made, "curve": curve_of(run, "val_map_50")}


def segmentation(given: argparse.Namespace, arm: str, encoder: str, seed: int) -> dict[str, Any]:
    return once(
        given.out / "water" / f"{arm}-{seed}",
        {
            "data": str(given.domains / "water-rgb"), "task": "segmentation", "encoder": encoder,
            "image_size": 128, "epochs": given.epochs or 40, "batch_size": 6, "upright": False,
            "seed": seed,
        },
    )  # fmt: skip


# Labels per class, and epochs of fine-tuning with them
SHOTS = {"ucmerced": {1: 40, 5: 20, 10: 15, 40: 15}, "cifar10": {25: 80, 250: 30}}
SIZES = {"ucmerced": 64, "cifar10": 32}


def classification(
    name: str, given: argparse.Namespace, arm: str, encoder: str, seed: int
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for shots, epochs in SHOTS[name].items():
        some = {} if (name, shots) == ("ucmerced", 40) else {"shots": shots}  # 40 are all of them
        data = str(given.data / name)
        run = given.out / name / f"{arm}-{shots}-{seed}"
        tuned = once(
            run,
            {
                "data": data, "encoder": encoder, "image_size": SIZES[name], "epochs": epochs,
                **some, "upright": name == "cifar10", "seed": seed,
            },
        )  # fmt: skip
        probed = run.with_name(f"{run.name}-probe")
        if not (probed / "results.json").exists():
            vissl_lite.probe(encoder=encoder, data=data, out=str(probed), image_size=SIZES[name],
                             seed=seed, overwrite=True, **some)  # fmt: skip
        probes = json.loads((probed / "results.json").read_text())
        made[str(shots)] = {**tuned, "kNN": probes["knn"], "linear": probes["linear"]}
    return made


SETS = {
    "bccd": detection,
    "water": segmentation,
    "ucmerced": partial(classification, "ucmerced"),
    "cifar10": partial(classification, "cifar10"),
}

ARMS = {
    "untrained": "`resnet18`, untrained",
    "ours": "`resnet18`, pre-trained by us",
    **{name: f"`resnet18`, pre-trained by us with {name}" for name in CELL_PRETEXTS},
    "ImageNet": "`tf_efficientnet_lite0`, ImageNet",
    "ImageNet, then ours": "the same, further pre-trained by us",
}


def dense_table(name: str, measures: dict[str, str]) -> str:
    """A row for each arm: figures over seeds, and the CPU minutes of a run."""
    results = load(name)
    rows = []
    for arm, label in ARMS.items():
        if arm not in results:
            continue
        runs = list(results[arm].values())
        minutes = statistics.mean(run["cpu_minutes"] for run in runs)
        figures = [over_seeds([run["test"][measure] for run in runs]) for measure in measures]
        rows.append([label, *figures, str(len(runs)), f"{minutes:.1f}"])
    header = ["encoder", *measures.values(), "seeds", "CPU minutes per run"]
    command = (
        f"python -m benchmarks.accuracy.transfer {name} --data DATA --domains DOMAINS --out RUNS"
    )
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


def bccd_table() -> str:
    picture = "![validation mAP50 against CPU minutes](results/bccd.png)"
    table = dense_table("bccd", {"map_50": "test mAP50", "map": "test mAP"})
    if not (RESULTS / "bccd.png").exists():  # results without curves
        return table
    return table.replace("\n\n", f"\n\n{picture}\n\n", 1)


def plot_bccd(arms: dict[str, dict[str, Any]]) -> None:
    """Validation mAP50 over the CPU minutes of a training, mean over seeds."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="CPU minutes", ylabel="validation mAP50")
    for arm, runs in arms.items():
        curves = np.array([run["curve"] for run in runs.values()]).mean(axis=0)
        minutes = statistics.mean(run["cpu_minutes"] for run in runs.values())
        label = ARMS[arm].replace("`", "")
        axes.plot(curves[:, 0] * minutes, curves[:, 1], marker=".", label=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / "bccd.png", dpi=100)


def detectors_table() -> str:
    """The same encoder, seed and about the same CPU minutes."""
    rows = []
    for detector, name in (("faster_rcnn", "bccd"), ("fcos", "bccd_fcos")):
        results = load(name)
        run = results["ImageNet"]["0"]
        figures = [f"{run['test'][measure]:.3f}" for measure in ("map_50", "map")]
        rows.append([f"`{detector}`", *figures, f"{run['cpu_minutes']:.1f}"])
    command = "python -m benchmarks.accuracy.transfer bccd --detector fcos --arms ImageNet ..."
    header = ["detector", "test mAP50", "test mAP", "CPU minutes"]
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


def water_table() -> str:
    return dense_table("water", {"miou": "test mIoU", "dice": "test Dice"})


def classification_table(name: str) -> str:
    """For each arm the rows of kNN, linear and fine-tuned; a column for each number of labels."""
    results = load(file_of(name))
    rows = []
    for arm, label in ARMS.items():
        if arm not in results:
            continue
        if name == "cifar10":
            label = label.replace("resnet18", "resnet10t")
        runs = list(results[arm].values())
        for kind in ("kNN", "linear", "fine-tuned"):
            row = [label, kind]
            for shots in runs[0]:
                at = [run[shots] for run in runs if shots in run]
                tuned = kind == "fine-tuned"
                row.append(over_seeds([r["test"]["top1"] if tuned else r[kind] for r in at]))
            rows.append(row)
    header = ["encoder", "", *(f"{shots} per class" for shots in runs[0])]
    command = (
        f"python -m benchmarks.accuracy.transfer {name} --data DATA --domains DOMAINS --out RUNS"
    )
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {
    "bccd": bccd_table,
    "detectors": detectors_table,
    "water": water_table,
    "ucmerced": partial(classification_table, "ucmerced"),
    "cifar10_transfer": partial(classification_table, "cifar10"),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+", choices=[*SETS, "pretrain"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--domains", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="part of them; the table waits for all")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--collect", action="store_true", help="take the runs that are there")
    parser.add_argument("--detector", default="faster_rcnn")
    parser.add_argument("--core", type=int, help="use this one core")
    given = parser.parse_args()
    if given.core is not None:
        use_core(given.core)
    name = given.what[-1]
    if given.what[0] == "pretrain":
        pretrain(name, given)
        raise SystemExit
    results: dict[str, dict[str, Any]] = {}
    for seed in given.seeds:
        for arm, encoder in arms(name, given).items():
            if given.arms and arm not in given.arms:
                continue
            last = f"{arm}-{max(SHOTS[name])}-{seed}-probe" if name in SHOTS else f"{arm}-{seed}"
            if given.collect and not (given.out / name / last / "results.json").exists():
                continue
            results.setdefault(arm, {})[str(seed)] = SETS[name](given, arm, encoder, seed)
            print(name, arm, seed, json.dumps(results[arm][str(seed)]), flush=True)
    if given.detector != "faster_rcnn":
        keep(f"{name}_{given.detector}", results)
    elif name in SHOTS or not given.arms:
        keep(file_of(name), results)
        if name == "bccd":
            plot_bccd(results)
    for arm, runs in results.items():
        if name not in SHOTS:
            figures = {k: [run["test"][k] for run in runs.values()] for k in runs["0"]["test"]}
            print(arm, {k: f"{np.mean(v):.3f} ± {np.std(v):.3f}" for k, v in figures.items()})
