"""Images that are not photographs: do more bands, more masks and pre-training help?

    python -m benchmarks.accuracy.bands water --data DATA/water12 --out OUT --seeds 0 1 2 3 4
    python -m benchmarks.accuracy.bands hippocampus --data DATA/hippocampus --out OUT
    python -m benchmarks.accuracy.bands pretrain SET --data DATA/... --out OUT

``water``: segmentation of water in scenes of 12 bands, with all of them and with bands 3, 2 and 1
(blue, green, red). ``hippocampus``: segmentation of two structures in MR volumes, slice by slice,
with the masks of 5, 20 and 100 % of the volumes. Parts are divided by scene and by volume. Each arm
gets the same images, seeds and steps; models are trained on training and validation masks, nothing
is chosen by test images. Runs that are there are kept.

Results: benchmarks/results/bands.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import vissl_lite
from benchmarks.accuracy.transfer import CONTRAST, once
from benchmarks.common import keep, load, markdown_table, over_seeds, provenance

# Options of fine-tuning, the arms of a set (name: options), and the minutes of pre-training.
SETS: dict[str, dict[str, Any]] = {
    "water": {
        "common": {"image_size": 128, "epochs": 40, "batch_size": 6},
        "arms": {
            "bands 3, 2, 1": {"bands": "3,2,1"},
            "all 12 bands": {},
            "all 12 bands, pre-trained": {"encoder": "water"},
        },
        "measures": {"miou": "test mIoU", "dice": "test Dice"},
        "pretrain": {"image_size": 64, "batch_size": 24, "max_time": 300},
    },
    "hippocampus": {
        "common": {"image_size": 48, "batch_size": 16},
        "arms": {
            f"{share:.0%} of the masks{words}": {"fraction": share, **encoder}
            for share in (0.05, 0.2, 1.0)
            for words, encoder in (("", {}), (", pre-trained", {"encoder": "hippocampus"}))
        },
        "measures": {"dice": "test Dice of slices", "volume_dice": "Dice of volumes"},
        "pretrain": {"image_size": 32, "batch_size": 64, "max_time": 600},
    },
}


def pretrain(name: str, given: argparse.Namespace) -> None:
    """Pre-train on the images of a set, without masks."""
    vissl_lite.pretrain(
        data=str(given.data / "images"), out=str(given.out / name), pretext=CONTRAST,
        backbone=given.backbone, lr=1e-3, weight_decay=1e-4, upright=False, num_workers=0,
        overwrite=True, **SETS[name]["pretrain"],
    )  # fmt: skip


def run(name: str, arm: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One fine-tuning: test metrics, also by structure, and the CPU minutes that it took."""
    options = {**SETS[name]["common"], **SETS[name]["arms"][arm]}
    encoder = options.pop("encoder", None)
    encoder = f"random:{given.backbone}" if encoder is None else str(given.out / encoder)
    out = given.out / f"{name}-runs" / f"{arm.replace(' ', '_')}-{seed}"
    figures = once(
        out,
        {
            "data": str(given.data), "task": "segmentation", "encoder": encoder, "upright": False,
            "seed": seed, **options,
        },
    )  # fmt: skip
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
    command = f"python -m benchmarks.accuracy.bands {name} --data DATA --out OUT"
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {f"bands_{name}": (lambda name=name: table(name)) for name in SETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*SETS, "pretrain"])
    parser.add_argument("set", nargs="?", choices=list(SETS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+")
    given = parser.parse_args()
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
