"""Does pre-training help on small labelled sets? Detection, segmentation, classification.

    python -m benchmarks.accuracy.domains --data FOLDER --out DOMAINS
    python -m benchmarks.accuracy.transfer pretrain SET --data FOLDER --domains DOMAINS --out OUT
    python -m benchmarks.accuracy.transfer SET --data FOLDER --domains DOMAINS --out OUT --seeds 2

``SET`` is ``bccd`` (detection), ``water`` (segmentation) or ``ucmerced`` (classification). Four
arms each: an untrained ResNet-18, one pre-trained by us on the training images, an ImageNet-trained
``tf_efficientnet_lite0``, and that one further pre-trained by us. All arms of a set get the same
images, seeds and epochs; what is chosen is chosen on labels that are held out, and then all labels
are trained on. Runs that are there are kept.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vissl_lite
from benchmarks.common import keep, load, markdown_table, over_seeds, provenance

CONTRAST = {"name": "simclr", "temperature": 0.2, "min_crop_scale": 0.25}
COLOR = {"name": "colorization"}

# Pre-training of each set: images, pretext, side, batch, minutes from nothing and from ImageNet
PRETRAIN: dict[str, tuple[str, dict[str, Any], int, int, float, float]] = {
    "bccd": ("bccd-crops", COLOR, 96, 32, 11, 9),
    "ucmerced": ("ucmerced/train", CONTRAST, 96, 64, 16, 10),
    "water": ("water-crops", CONTRAST, 64, 64, 4, 4),
}


def pretrain(name: str, given: argparse.Namespace) -> None:
    images, pretext, size, batch, *minutes = PRETRAIN[name]
    place = given.domains / images if (given.domains / images).exists() else given.data / images
    starts = (
        ("resnet18", "random:resnet18", 1e-3),
        ("lite0", str(given.domains / "lite0"), 3e-4),
    )
    for (start, encoder, lr), time_budget in zip(starts, minutes, strict=True):
        out = given.out / f"{name}-{start}"
        if not (out / "encoder" / "config.json").exists():
            vissl_lite.pretrain(
                data=str(place), out=str(out), pretext=pretext, encoder=encoder,
                image_size=size, batch_size=batch, lr=lr, weight_decay=1e-4, upright=False,
                max_time=round(60 * time_budget), num_workers=0, overwrite=True,
            )  # fmt: skip


def arms(name: str, given: argparse.Namespace) -> dict[str, str]:
    return {
        "untrained": "random:resnet18",
        "ours": str(given.out / f"{name}-resnet18"),
        "ImageNet": str(given.domains / "lite0"),
        "ImageNet, then ours": str(given.out / f"{name}-lite0"),
    }


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


def detection(given: argparse.Namespace, arm: str, encoder: str, seed: int) -> dict[str, Any]:
    return once(
        given.out / "bccd" / f"{arm}-{seed}",
        {
            "data": str(given.data / "bccd"), "task": "detection", "encoder": encoder,
            "image_size": 320, "epochs": given.epochs or 6, "batch_size": 8, "upright": False,
            "seed": seed, "detector": given.detector,
        },
    )  # fmt: skip


def segmentation(given: argparse.Namespace, arm: str, encoder: str, seed: int) -> dict[str, Any]:
    return once(
        given.out / "water" / f"{arm}-{seed}",
        {
            "data": str(given.domains / "water-rgb"), "task": "segmentation", "encoder": encoder,
            "image_size": 128, "epochs": given.epochs or 40, "batch_size": 6, "upright": False,
            "seed": seed,
        },
    )  # fmt: skip


SHOTS = {1: 40, 5: 20, 10: 15, 40: 6}  # labels per class, epochs


def classification(given: argparse.Namespace, arm: str, encoder: str, seed: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for shots, epochs in SHOTS.items():
        some = {"shots": shots} if shots < 40 else {}
        data = str(given.data / "ucmerced")
        run = given.out / "ucmerced" / f"{arm}-{shots}-{seed}"
        tuned = once(
            run,
            {
                "data": data, "encoder": encoder, "image_size": 64, "epochs": epochs, **some,
                "upright": False, "seed": seed,
            },
        )  # fmt: skip
        probed = run.with_name(f"{run.name}-probe")
        if not (probed / "results.json").exists():
            vissl_lite.probe(encoder=encoder, data=data, out=str(probed), image_size=64, seed=seed,
                             overwrite=True, **some)  # fmt: skip
        probes = json.loads((probed / "results.json").read_text())
        made[str(shots)] = {**tuned, "kNN": probes["knn"], "linear": probes["linear"]}
    return made


SETS = {"bccd": detection, "water": segmentation, "ucmerced": classification}

ARMS = {
    "untrained": "`resnet18`, untrained",
    "ours": "`resnet18`, pre-trained by us",
    "ImageNet": "`tf_efficientnet_lite0`, ImageNet",
    "ImageNet, then ours": "the same, further pre-trained by us",
}


def dense_table(name: str, measures: dict[str, str]) -> str:
    """A row for each arm: figures over seeds, and the CPU minutes of a run."""
    results = load("transfer")
    rows = []
    for arm, label in ARMS.items():
        runs = list(results[name][arm].values())
        minutes = statistics.mean(run["cpu_minutes"] for run in runs)
        figures = [over_seeds([run["test"][measure] for run in runs]) for measure in measures]
        rows.append([label, *figures, str(len(runs)), f"{minutes:.1f}"])
    header = ["encoder", *measures.values(), "seeds", "CPU minutes a run"]
    command = (
        f"python -m benchmarks.accuracy.transfer {name} --data DATA --domains DOMAINS --out RUNS"
    )
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


def bccd_table() -> str:
    return dense_table("bccd", {"map_50": "test mAP50", "map": "test mAP"})


def detectors_table() -> str:
    """The same encoder, seed and about the same CPU minutes."""
    results = load("transfer")
    rows = []
    for detector in ("faster_rcnn", "fcos"):
        key = "bccd" if detector == "faster_rcnn" else f"bccd-{detector}"
        run = results[key]["ImageNet"]["0"]
        figures = [f"{run['test'][measure]:.3f}" for measure in ("map_50", "map")]
        rows.append([f"`{detector}`", *figures, f"{run['cpu_minutes']:.1f}"])
    command = (
        "python -m benchmarks.accuracy.transfer bccd --detector fcos --arms ImageNet --epochs 8 ..."
    )
    header = ["detector", "test mAP50", "test mAP", "CPU minutes"]
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


def water_table() -> str:
    return dense_table("water", {"miou": "test mIoU", "dice": "test Dice"})


def ucmerced_table() -> str:
    results = load("ucmerced")
    rows = []
    for arm, label in ARMS.items():
        if arm not in results:
            continue
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
        "python -m benchmarks.accuracy.transfer ucmerced --data DATA --domains DOMAINS --out RUNS"
    )
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {
    "bccd": bccd_table,
    "detectors": detectors_table,
    "water": water_table,
    "ucmerced": ucmerced_table,
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
        os.sched_setaffinity(0, {given.core})
        torch.set_num_threads(1)
    name = given.what[-1]
    if given.what[0] == "pretrain":
        pretrain(name, given)
        raise SystemExit
    results: dict[str, dict[str, Any]] = {}
    for seed in given.seeds:
        for arm, encoder in arms(name, given).items():
            if given.arms and arm not in given.arms:
                continue
            last = f"{arm}-{seed}" if name != "ucmerced" else f"{arm}-{max(SHOTS)}-{seed}-probe"
            if given.collect and not (given.out / name / last / "results.json").exists():
                continue
            results.setdefault(arm, {})[str(seed)] = SETS[name](given, arm, encoder, seed)
            print(name, arm, seed, json.dumps(results[arm][str(seed)]), flush=True)
    if given.detector != "faster_rcnn":
        keep("transfer", {f"{name}-{given.detector}": results})
    elif name == "ucmerced":
        keep("ucmerced", results)
    elif not given.arms:
        keep("transfer", {name: results})
    for arm, runs in results.items():
        if name != "ucmerced":
            figures = {k: [run["test"][k] for run in runs.values()] for k in runs["0"]["test"]}
            print(arm, {k: f"{np.mean(v):.3f} ± {np.std(v):.3f}" for k, v in figures.items()})
