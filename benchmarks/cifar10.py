"""Pre-training on CIFAR-10 for equal minutes: ours against lightly's SimCLR, then few labels.

Each arm trains for the same wall-clock time, one after the other on the same machine. Then every
encoder is judged by the same probe: kNN (k = 200, T = 0.1) and linear, at every stage, on the test
split; the linear probe's penalty is chosen on training images. Last-epoch encoders throughout.

    python benchmarks/cifar10.py --data DATA/cifar10 --out RUNS --peer_python PEERS/bin/python

Results: benchmarks/results/cifar10.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from common import keep, last_json_line

from vissl_lite.cli import main as vissl_lite
from vissl_lite.run import read_config

HERE = Path(__file__).parent
OURS = {"simclr": "simclr.yaml", "rotation": "rotation.yaml", "simclr-small": "simclr-small.yaml"}
SEEDS = 3


def command(verb: str, *arguments: object) -> None:
    status = vissl_lite([verb, *map(str, arguments), "--overwrite"])
    if status:
        raise SystemExit(status)


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def judge(name: str, encoder: str, data: Path, out: Path) -> dict:
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


def few_labels(name: str, encoder: str, data: Path, out: Path) -> dict:
    """Linear and fine-tuned accuracy with 1 % of the labels, three seeds: other labels each."""
    linear, tuned = [], []
    for seed in range(SEEDS):
        run = out / f"few-{name}-{seed}"
        few = ["--encoder", encoder, "--data", data, "--fraction", 0.01, "--seed", seed]
        command("probe", *few, "--image_size", 32, "--out", f"{run}-linear")
        linear.append(results_of(Path(f"{run}-linear"))["linear"])
        command("finetune", *few, "--image_size", 32, "--epochs", 30, "--out", run)
        tuned.append(results_of(run)["test"]["top1"])
    return {
        measure: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1)), "runs": v}
        for measure, v in (("linear", linear), ("finetuned", tuned))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--peer_python", help="interpreter of the environment with lightly")
    parser.add_argument("--arms", nargs="+", default=["lightly", *OURS, "untrained", "few"])
    options = parser.parse_args()
    data, out = options.data, options.out
    for arm in options.arms:
        if arm == "lightly":
            if options.peer_python is None:
                continue
            script = [
                options.peer_python,
                str(HERE / "peers" / "lightly_simclr.py"),
                "--torchvision_init",
            ]
            where = ["--data", str(data / "train"), "--out", str(out / "lightly")]
            peer = last_json_line([*script, *where, "--minutes", str(options.minutes)])
            scores = judge("lightly", str(out / "lightly" / "encoder"), data, out)
            keep("cifar10", {"lightly": {**peer, **scores}})
        elif arm == "untrained":
            keep("cifar10", {"untrained": judge(arm, "random:resnet18", data, out)})
        elif arm == "few":
            scratch = few_labels("untrained", "random:resnet18", data, out)
            keep("cifar10", {"few_labels": {"untrained": scratch}})
            trained = few_labels("simclr", str(out / "simclr"), data, out)
            keep("cifar10", {"few_labels": {"untrained": scratch, "simclr": trained}})
        else:
            config = HERE.parent / "configs" / "cifar10" / OURS[arm]
            seconds = round(options.minutes * 60)
            command(
                "pretrain", "--config", config, "--data", data / "train", "--out", out / arm,
                "--max_time", seconds,
            )  # fmt: skip
            run = results_of(out / arm)
            size = read_config(out / arm)["batch_size"]
            speed = run["steps"] * size / run["seconds"]
            scores = judge(arm, str(out / arm), data, out)
            row = {"images_per_second": speed, "epochs": run["epochs"], **scores}
            keep("cifar10", {arm: {**row, "seconds": run["seconds"]}})


if __name__ == "__main__":
    main()
