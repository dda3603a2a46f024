"""Which settings of fine-tuning help? Each is changed alone, at the same labels and steps.

    python -m benchmarks.accuracy.recipes SET --data IMAGES --encoder RUN --out OUT [--seeds 0 1 2]

``SET`` names the result, such as ``demo`` or ``ucmerced-5-ImageNet``; ``--shots``, ``--fraction``,
``--image_size``, ``--epochs`` and ``--upright`` describe it. Every model is trained on the training
and validation labels together for a fixed number of epochs, without a choice by held-out labels, so
that a row shows what a setting does. The figures are test accuracies of the trained weights and of
the linear probe at which the training starts, which is the same for all settings.

Results: benchmarks/results/recipes.json. Runs that are there are kept.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import keep, load, markdown_table, over_seeds, provenance
from vissl_lite.encoders.folder import encoder_for
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.classification.data import LabelledImages, load_labelled
from vissl_lite.transfer.classification.options import ClassifierSettings
from vissl_lite.transfer.classification.task import Classification
from vissl_lite.transfer.finetuning import finetune_optimizer

TASK = Classification()

# What every recipe but the changed setting has in common: the defaults of commit 315e4f7. What is
# better here is the default since, or chosen on held-out labels (frozen or trained BatchNorms).
BASELINE: dict[str, Any] = {"pretrained": True, "frozen_norm": True, "min_crop_scale": 0.35}

TRAINED_NORM: dict[str, Any] = {"min_crop_scale": 0.6, "frozen_norm": False}

# Name of a row, and what it changes: settings, or settings of the optimizer.
RECIPES: dict[str, dict[str, Any]] = {
    "the baseline": {},
    "learning rate 3e-4": {"lr": 3e-4},
    "learning rate 3e-3": {"lr": 3e-3},
    "BatchNorm trained": {"frozen_norm": False},
    "BatchNorm trained, learning rate 3e-3": {"frozen_norm": False, "lr": 3e-3},
    "layer decay 0.75": {"layer_decay": 0.75},
    "no color jitter": {"color": 0.0},
    "color jitter 0.25": {"color": 0.25},
    "smallest crop 0.6": {"min_crop_scale": 0.6},
    "smallest crop 0.6, color jitter 0.25": {"min_crop_scale": 0.6, "color": 0.25},
    "smallest crop 0.6, BatchNorm trained": TRAINED_NORM,
    "smallest crop 0.6, BatchNorm trained, learning rate 3e-3": {**TRAINED_NORM, "lr": 3e-3},
    "no label smoothing": {"label_smoothing": 0.0},
    "gradients not clipped": {"clip_norm": 0.0},
    "batch size 16": {"batch_size": 16},
    "batch size 16, learning rate 3e-4": {"batch_size": 16, "lr": 3e-4},
    "batch size 16, learning rate 3e-3": {"batch_size": 16, "lr": 3e-3},
    "batch size 16, BatchNorm trained": {"batch_size": 16, "frozen_norm": False},
    "smallest crop 0.6, BatchNorm trained, mixup 0.2": {**TRAINED_NORM, "mixup": 0.2},
    "smallest crop 0.6, BatchNorm trained, CutMix 1": {**TRAINED_NORM, "cutmix": 1.0},
    "smallest crop 0.6, BatchNorm trained, RandAugment 9": {**TRAINED_NORM, "rand_augment": 9.0},
    "smallest crop 0.6, BatchNorm trained, RandAugment 9, mixup 0.2": {
        **TRAINED_NORM,
        "rand_augment": 9.0,
        "mixup": 0.2,
    },
    "smallest crop 0.6, BatchNorm trained, moving average 0.99": {**TRAINED_NORM, "ema": 0.99},
    "random head": {"pretrained": False, "frozen_norm": True},
}
OF_OPTIMIZER = ("lr", "layer_decay", "clip_norm")


def train(
    data: LabelledImages, encoder: str, size: int, common: Mapping[str, Any], change: dict[str, Any]
) -> dict[str, float]:
    """Test accuracy before the first step (of the probe) and after the last one."""
    optimizer = replace(
        finetune_optimizer(untrained=False),
        **{name: value for name, value in change.items() if name in OF_OPTIMIZER},
    )
    settings = ClassifierSettings(
        optimizer=optimizer,
        **{
            **BASELINE,
            **common,
            **{name: value for name, value in change.items() if name not in OF_OPTIMIZER},
        },
    )
    torch.manual_seed(settings.seed)
    model = TASK.build(encoder_for(encoder, size), data, settings)
    before = TASK.validate(model, data, "test")["top1"]
    TASK.train(model, data, settings, Hardware(devices=1, num_workers=0))
    return {"before": before, "after": TASK.validate(model, data, "test")["top1"]}


def recipes_table() -> str:
    """A column for each set, a row for each recipe."""
    results = load("recipes")
    sets = [name for name in results if name != "made"]
    rows = []
    cells = []
    for name in sets:  # the probe depends on the labels alone
        probes = {
            seed: one["before"] for runs in results[name].values() for seed, one in runs.items()
        }
        cells.append(over_seeds(list(probes.values())))
    rows.append(["linear probe", *cells])
    for recipe in RECIPES:
        if not any(recipe in results[name] for name in sets):
            continue
        cells = []
        for name in sets:
            runs = results[name].get(recipe, {})
            cells.append(over_seeds([r["after"] for r in runs.values()]) if runs else "")
        rows.append([recipe, *cells])
    command = "python -m benchmarks.accuracy.recipes SET --data DATA --encoder RUN ..."
    return markdown_table(["fine-tuned with", *sets], rows) + "\n\n" + provenance(results, command)


TABLES = {"recipes": recipes_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set")
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shots", type=int)
    parser.add_argument("--fraction", type=float)
    parser.add_argument("--image_size", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--upright", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    file = given.out / f"{given.set}.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    given.out.mkdir(parents=True, exist_ok=True)
    whole = load_labelled(given.data, 0)
    for seed in given.seeds:
        data = whole.subsample(given.fraction, given.shots, seed).merged()
        common = {"epochs": given.epochs, "upright": given.upright, "seed": seed}
        for recipe in given.recipes:
            runs = found.setdefault(recipe, {})
            if str(seed) not in runs:
                change = RECIPES[recipe]
                runs[str(seed)] = train(data, given.encoder, given.image_size, common, change)
                print(given.set, seed, recipe, runs[str(seed)], flush=True)
                file.write_text(json.dumps(found))
    keep("recipes", {given.set: found})


if __name__ == "__main__":
    main()
