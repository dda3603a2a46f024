"""CIFAR-10, 200 epochs on one GPU: configs/cifar10.yaml beside lightly's table.

Every arm is a run of its own, kept in ``--out``: a call that is cut off is repeated as it stands,
and goes on where it was. Encoders are those of the last step; kNN with k = 200 and T = 0.1, and a
linear probe whose penalty is chosen on training images. Time to accuracy is that of kNN while it
trains (``--probe_data``).

    python -m benchmarks.gpu.cifar10 --data DATA/cifar10 --out RUNS --arms simclr byol

Without a GPU, to see that it works:

    python -m benchmarks.gpu.cifar10 --data DATA/cifar10 --out RUNS --epochs 1 --images 2000 \
        --batch_size 64 --backbone resnet18

Results: RUNS/gpu_cifar10.json; a complete table is kept in benchmarks/results/ with ``--keep``.
"""

import argparse
import csv
import json
from pathlib import Path

import torch

from benchmarks.common import RESULTS, ROOT, keep, load, markdown_table, provenance, where_and_when
from vissl_lite.cli import main as vissl_lite
from vissl_lite.data.images import find_images

ARMS = (
    "simclr", "byol", "simsiam", "barlow_twins", "moco", "dino", "swav", "vicreg", "lejepa",
)  # fmt: skip

# Accuracies whose time is noted.
LEVELS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)


def run(*arguments: object) -> None:
    status = vissl_lite([str(argument) for argument in arguments])
    if status:
        raise SystemExit(status)


def train(arm: str, options: argparse.Namespace, listed: Path) -> dict:
    out = options.out / arm
    if not (out / "results.json").exists():
        if (out / "config.yaml").exists():
            run("pretrain", "--out", out, "--resume")
        else:
            recipe = ROOT / "configs" / "cifar10.yaml"
            extra = ["--epochs", options.epochs, "--probe_data", options.data]
            if options.batch_size:
                extra += ["--batch_size", options.batch_size]
            if options.backbone:
                extra += ["--backbone", options.backbone]
            run(
                "pretrain",
                "--config",
                recipe,
                "--pretext",
                arm,
                "--data",
                listed,
                "--out",
                out,
                *extra,
            )
    return json.loads((out / "results.json").read_text())


def accuracy_over_time(run: Path) -> dict:
    """kNN on validation images against minutes of training, and when it first got how far.

    The figures of ``--probe_data``, on few images: a little below those of ``evaluate``.
    """
    with (run / "metrics.csv").open(newline="") as file:
        looks = [row for row in csv.DictReader(file) if row.get("knn")]
    curve = [(round(float(row["seconds"]) / 60, 2), float(row["knn"])) for row in looks]
    reached = {
        f"{level:.2f}": next((minutes for minutes, knn in curve if knn >= level), None)
        for level in LEVELS
    }
    return {"curve": curve, "minutes_to": reached}


def evaluate(arm: str, options: argparse.Namespace) -> dict:
    out = options.out / f"{arm}-probe"
    if not (out / "results.json").exists():
        few = ["--fraction", options.fraction] if options.fraction else []
        run(
            "probe", "--encoder", options.out / arm, "--data", options.data, "--out", out,
            "--k", 200, "--temperature", 0.1, "--overwrite", *few,
        )  # fmt: skip
    return json.loads((out / "results.json").read_text())


def gpu_cifar10_table() -> str:
    if not (RESULTS / "gpu_cifar10.json").exists():
        return "Not measured yet; see [gpu/README.md](gpu/README.md)."
    results = load("gpu_cifar10")
    rows = [
        [name, r["device"], f"{r['minutes']:.1f}", f"{r['images_per_second']:,.0f}",
         f"{r['knn']:.3f}", f"{r['linear']:.3f}",
         *("" if r["minutes_to"][level] is None else f"{r['minutes_to'][level]:.1f}"
           for level in ("0.70", "0.80"))]
        for name, r in results.items()
        if name != "made"
    ]  # fmt: skip
    header = ["pretext", "device", "minutes", "images/s", "kNN", "linear",
              "minutes to kNN 0.70", "to 0.80"]  # fmt: skip
    command = "python -m benchmarks.gpu.cifar10 --data DATA/cifar10 --out RUNS --keep"
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {"gpu_cifar10": gpu_cifar10_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--images", type=int, help="train on so many only, for a trial")
    parser.add_argument("--batch_size", type=int, help="instead of the recipe's, for a trial")
    parser.add_argument("--backbone", help="instead of the recipe's, for a trial")
    parser.add_argument("--fraction", type=float, help="of the labels to probe by, for a trial")
    parser.add_argument("--keep", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    listed = options.data / "train"
    if options.images:
        paths = find_images([str(listed)])
        step = max(1, len(paths) // options.images)
        listed = options.out / "images.txt"
        listed.write_text("".join(f"{Path(path).resolve()}\n" for path in paths[::step]))
    file = options.out / "gpu_cifar10.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for arm in options.arms:
        trained, scores = train(arm, options, listed), evaluate(arm, options)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        rows[arm] = {
            "device": device,
            "epochs": trained["epochs"],
            "minutes": trained["seconds"] / 60,
            "images_per_second": trained["images"] * trained["epochs"] / trained["seconds"],
            "knn": scores["knn"],
            "linear": scores["linear"],
            **accuracy_over_time(options.out / arm),
        }
        file.write_text(json.dumps({**rows, "made": where_and_when()}, indent=2) + "\n")
        print(arm, json.dumps(rows[arm]), flush=True)
    if options.keep:
        keep("gpu_cifar10", rows)


if __name__ == "__main__":
    main()
