"""Pre-training on CIFAR-10 for equal minutes: ours against lightly's SimCLR.

Each arm trains for the same wall-clock time, one after the other on the same machine. Then every
encoder is evaluated by the same probe: kNN (k = 200, T = 0.1) and linear, at every stage, on the
test split; the linear probe's penalty is chosen on training images. Last-epoch encoders throughout.

    python -m benchmarks.accuracy.cifar10 --data DATA/cifar10 --out RUNS \
        --peer_python PEERS/bin/python

Results: benchmarks/results/cifar10.json.
"""

import argparse
import json
from pathlib import Path

from benchmarks.common import (
    ROOT,
    keep,
    last_json_line,
    load,
    markdown_table,
    provenance,
    results_of,
)
from vissl_lite.cli import main as vissl_lite
from vissl_lite.run import read_config

RECIPE = ROOT / "configs" / "cifar10_minutes.yaml"
OURS = {
    "simclr": ["--pretext", "simclr"],
    "rotation": ["--pretext", "rotation"],
    "simclr-small": ["--pretext", "simclr", "--backbone", "resnet10t"],
}
SEEDS = 3


def command(verb: str, *arguments: object) -> None:
    status = vissl_lite([verb, *map(str, arguments), "--overwrite"])
    if status:
        raise SystemExit(status)


def evaluate(name: str, encoder: str, data: Path, out: Path) -> dict:
    """kNN and linear accuracy, at the last and at the best stage."""
    run = out / f"probe-{name}"
    options = ["--layers", "--k", 200, "--temperature", 0.1, "--image_size", 32]
    command("probe", "--encoder", encoder, "--data", data, "--out", run, *options)
    scores = results_of(run)
    best = max(scores["layers"], key=lambda layer: scores["layers"][layer]["linear"])
    return {
        "knn": scores["knn"],
        "linear": scores["linear"],
        "best_layer": best,
        "best_layer_knn": scores["layers"][best]["knn"],
        "best_layer_linear": scores["layers"][best]["linear"],
    }


def train_lightly(python: str, data: Path, out: Path, minutes: float) -> None:
    script = [
        python,
        str(ROOT / "benchmarks" / "peers" / "lightly_simclr.py"),
        "--torchvision_init",
    ]
    where = ["--data", str(data / "train"), "--out", str(out / "lightly")]
    last_json_line([*script, *where, "--minutes", str(minutes)])


def train(arm: str, data: Path, out: Path, minutes: float) -> None:
    where = ["--data", data / "train", "--out", out / arm]
    command("pretrain", "--config", RECIPE, *OURS[arm], *where, "--max_time", round(minutes * 60))


def cifar10_table() -> str:
    results = load("cifar10")
    names = {
        "untrained": "untrained `resnet18`",
        "lightly": "lightly's SimCLR, `resnet18`",
        "rotation": "rotation, `resnet18`",
        "simclr": "SimCLR, `resnet18`",
        "simclr-small": "SimCLR, `resnet10t`",
    }
    rows = []
    for arm, name in names.items():
        if arm not in results:
            continue
        r = results[arm]
        speed = f"{r['images_per_second']:.0f}" if "images_per_second" in r else ""
        best = f"{r['best_layer_knn']:.3f} / {r['best_layer_linear']:.3f} ({r['best_layer']})"
        minutes = f"{r['seconds'] / 60:.0f}" if "seconds" in r else ""
        rows.append([name, minutes, speed, f"{r['knn']:.3f}", f"{r['linear']:.3f}", best])
    header = ["encoder", "minutes", "images/s", "kNN", "linear", "best stage: kNN / linear"]
    command = (
        "python -m benchmarks.accuracy.cifar10 --data DATA/cifar10 --out RUNS --peer_python PYTHON"
    )
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {"cifar10": cifar10_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--peer_python", help="interpreter of the environment with lightly")
    parser.add_argument("--arms", nargs="+", default=["lightly", *OURS, "untrained"])
    parser.add_argument("--steps", nargs="+", default=["train", "evaluate"])
    options = parser.parse_args()
    data, out = options.data, options.out
    for arm in options.arms:
        if arm == "untrained":
            keep("cifar10", {"untrained": evaluate(arm, "random:resnet18", data, out)})
        elif arm == "lightly":
            if "train" in options.steps:
                train_lightly(options.peer_python, data, out, options.minutes)
            if "evaluate" in options.steps:
                peer = json.loads((out / "lightly" / "result.json").read_text())
                scores = evaluate("lightly", str(out / "lightly" / "encoder"), data, out)
                keep("cifar10", {"lightly": {**peer, **scores}})
        else:
            if "train" in options.steps:
                train(arm, data, out, options.minutes)
            if "evaluate" in options.steps:
                run = results_of(out / arm)
                speed = run["steps"] * read_config(out / arm)["batch_size"] / run["seconds"]
                scores = evaluate(arm, str(out / arm), data, out)
                row = {"seconds": run["seconds"], "epochs": run["epochs"], **scores}
                keep("cifar10", {arm: {"images_per_second": speed, **row}})


if __name__ == "__main__":
    main()
