"""Images that are not photographs: do more bands, more masks and pre-training help?

    python -m benchmarks.accuracy.bands lay_out SET --data DATA --out OUT
    python -m benchmarks.accuracy.bands pretrain SET --out OUT
    python -m benchmarks.accuracy.bands SET --out OUT --seeds 0 1 2

``water``: segmentation of water in scenes of 12 bands, with all of them and with bands 3, 2 and 1
(blue, green, red). ``hippocampus``: segmentation of two structures in MR volumes, slice by slice,
with the masks of 5, 20 and 100 % of the training volumes. ``mr``: which of four sequences a slice
of a brain is from, tested on a patient that was not trained on, and on images at random of the same
patients. ``DATA`` holds ``water12``, ``hippocampus`` and ``mr``.

``lay_out`` divides the images once, by scene, volume or patient; encoders are pre-trained on the
training part alone. Each arm gets the same images, seeds and steps, and is trained on training and
validation labels; nothing is chosen by test images. Of ``mr``, a seed is the patient to test on.
Runs that are there are kept.

Results: benchmarks/results/bands.json.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import vissl_lite
from benchmarks.accuracy.transfer import CONTRAST, once
from benchmarks.common import keep, load, markdown_table, over_seeds, provenance

# Options of fine-tuning, the arms of a set (name: options), and the minutes of pre-training. All
# arms of a set are trained for as many steps.
SETS: dict[str, dict[str, Any]] = {
    "water": {
        "common": {
            "task": "segmentation",
            "image_size": 128,
            "epochs": 30,
            "batch_size": 6,
            "upright": False,
        },
        "arms": {
            "bands 3, 2, 1": {"bands": "3,2,1"},
            "all 12 bands": {},
            "all 12 bands, pre-trained": {"encoder": "water"},
        },
        "measures": {"miou": "test mIoU", "dice": "test Dice"},
        "pretrain": {"image_size": 64, "batch_size": 24, "max_time": 300, "upright": False},
    },
    "hippocampus": {
        # the structures are told apart by which is in front: slices must not be turned around
        "common": {"task": "segmentation", "image_size": 48, "batch_size": 8},
        "arms": {
            f"{share:.0%} of the masks{words}": {"fraction": share, "epochs": epochs, **encoder}
            for share, epochs in ((0.05, 20), (0.2, 5), (1.0, 1))
            for words, encoder in (("", {}), (", pre-trained", {"encoder": "hippocampus"}))
        },
        "measures": {"dice": "test Dice of slices", "volume_dice": "Dice of volumes"},
        "pretrain": {"image_size": 32, "batch_size": 64, "max_time": 300},
    },
    "mr": {
        "common": {"task": "classification", "image_size": 96, "epochs": 20, "batch_size": 8},
        "arms": {
            "tested on another patient": {"table": "patient"},
            "tested on other images of the same patients": {"table": "image"},
        },
        "measures": {"top1": "test accuracy"},
    },
}

SEQUENCES = ("T1post", "T1prereg", "FLAIRreg", "T2reg")  # in the names of folders of series
TEST = {"water": 20, "hippocampus": 60}  # scenes, volumes


def lay_out(name: str, data: Path, out: Path) -> None:
    """Divide the images of a set into a training and a test part, the same for all seeds."""
    if name == "mr":
        lay_out_tables(data / "mr", out / "mr-data")
        return
    source = data / ("water12" if name == "water" else name)
    files = sorted(
        file for file in (source / "images").iterdir() if find_label(source, file) is not None
    )
    order = np.random.default_rng(0).permutation(len(files))
    for rank, index in enumerate(order.tolist()):
        part = "test" if rank < TEST[name] else "train"
        for kind, file in (("images", files[index]), ("labels", find_label(source, files[index]))):
            place = out / f"{name}-data" / kind / part
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)


def find_label(source: Path, image: Path) -> Path | None:
    """The mask of an image: the file of the same name up to the first dot."""
    found = list((source / "labels").glob(f"{image.name.split('.')[0]}.*"))
    return found[0] if found else None


def lay_out_tables(source: Path, out: Path) -> None:
    """Tables of slices and sequences: each patient once as the test part, and images at random."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for file in sorted(source.glob("*/*/*.dcm")):
        found = [one for one in SEQUENCES if f"-{one}-" in str(file.parent)]
        if found:  # a fourth sequence of one patient is a difference of two others
            rows.append((file, found[0], file.parent.parent.name))
    patients = sorted({patient for _, _, patient in rows})
    for seed, patient in enumerate(patients):
        is_test = np.array([one == patient for _, _, one in rows])
        tests = {"patient": is_test, "image": np.random.default_rng(seed).permutation(is_test)}
        for kind, test in tests.items():
            with (out / f"{kind}-{seed}.csv").open("w", newline="") as table:
                writer = csv.writer(table)
                writer.writerow(["path", "label", "split"])
                for (file, sequence, _), tested in zip(rows, test, strict=True):
                    writer.writerow([file.resolve(), sequence, "test" if tested else "train"])


def pretrain(name: str, given: argparse.Namespace) -> None:
    """Pre-train on the training images of a set, without masks."""
    vissl_lite.pretrain(
        data=str(given.out / f"{name}-data" / "images" / "train"), out=str(given.out / name),
        pretext=CONTRAST, backbone=given.backbone, lr=1e-3, weight_decay=1e-4,
        num_workers=0, overwrite=True, **SETS[name]["pretrain"],
    )  # fmt: skip


def run(name: str, arm: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One fine-tuning: test metrics, also by structure, and the CPU minutes that it took."""
    options = {**SETS[name]["common"], **SETS[name]["arms"][arm]}
    encoder = options.pop("encoder", None)
    encoder = f"random:{given.backbone}" if encoder is None else str(given.out / encoder)
    out = given.out / f"{name}-runs" / f"{arm.replace(' ', '_')}-{seed}"
    data = given.out / f"{name}-data"
    if kind := options.pop("table", None):
        data = data / f"{kind}-{seed}.csv"
        if kind == "image":
            options["group_by"] = "(.+)"  # each image by itself
    figures = once(out, {"data": str(data), "encoder": encoder, "seed": seed, **options})
    found = json.loads((out / "results.json").read_text())
    return {**figures, "per_class": found["per_class"]}


def table(name: str) -> str:
    """A row for each arm: figures over seeds."""
    results = load("bands")
    rows = []
    for arm in SETS[name]["arms"]:
        runs = list(results[name].get(arm, {}).values())
        if not runs:
            continue
        cells = [
            over_seeds([run["test"][measure] for run in runs]) for measure in SETS[name]["measures"]
        ]
        minutes = sum(run["cpu_minutes"] for run in runs) / len(runs)
        rows.append([arm, *cells, str(len(runs)), f"{minutes:.1f}"])
    header = ["", *SETS[name]["measures"].values(), "seeds", "CPU minutes per run"]
    command = f"python -m benchmarks.accuracy.bands {name} --out OUT"
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {f"bands_{name}": (lambda name=name: table(name)) for name in SETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*SETS, "lay_out", "pretrain"])
    parser.add_argument("set", nargs="?", choices=list(SETS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet10t_slim")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+")
    given = parser.parse_args()
    if given.what == "lay_out":
        lay_out(given.set, given.data, given.out)
        return
    if given.what == "pretrain":
        pretrain(given.set, given)
        return
    name = given.what
    file = given.out / f"{name}.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for seed in given.seeds:
        for arm in given.arms or SETS[name]["arms"]:
            found.setdefault(arm, {})[str(seed)] = run(name, arm, seed, given)
            print(name, arm, seed, found[arm][str(seed)]["test"], flush=True)
            file.write_text(json.dumps(found))
    keep("bands", {name: found})


if __name__ == "__main__":
    main()
