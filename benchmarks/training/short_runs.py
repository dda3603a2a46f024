"""Which settings are best for a pre-training of a few minutes? Each is changed alone.

    python -m benchmarks.training.short_runs SET --data DATA/SET --out RUNS --core 0 --minutes 2 8

The settings are searched on ``cifar10``: 32 pixels, each encoder evaluated on training images that
the probe holds out, never on the test images. What is better there is confirmed on ``ucmerced`` (64
or 96 pixels, test images), which the search does not see. Sets that end with ``_color`` are the
same ones, for arms that were measured beside each other on another machine, as is
``cifar10_temperature``; ``ucmerced_resizing`` has views that grow to 96 pixels. Every run has the
same wall-clock time on one core, the start of the command included, and ``resnet18``, or a ViT in
the sets that end with ``_vit``, with the defaults of ``pretrain`` but for what the arm changes and,
in ``simclr``, the color distortion of ``COLOR``.

Some arms need ``--before``, a checkout of an earlier commit: those with a momentum from the start
26f006b, since when the momentum of teachers is smaller in the first steps; those with branches from
zero 7623125, and from one 31d4d44 (sets that end with ``_branches``), since when residual branches
of ResNets start at half of their scale, in SimCLR first. Arms of ``distillation`` need
``--teacher``, the folder ``lite0`` of ``benchmarks.accuracy.domains``. For
``cifar10_distillation``, ``--data`` is a folder with the first 500 training images of each class in
train/. ``--arms`` picks some; runs that are there are kept.

Results: benchmarks/results/short_runs.json.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import (
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

# In names of arms that need --before: teachers without a small momentum at first, and another scale
# of the residual branches of ResNets at first.
FROM_THE_START, BRANCHES = "from the start", "branches from"

CIFAR10: list[object] = ["--image_size", 32, "--fraction", 0.2]
WHOLE: list[object] = ["--token_drop", 0]
ROTATABLE: list[object] = ["--upright", "false", "--image_size"]

# Options of pretrain and of probe for each set
SETS: dict[str, tuple[list[object], list[object]]] = {
    "cifar10": (["--backbone", "resnet18", "--image_size", 32], CIFAR10),
    "ucmerced": (["--backbone", "resnet18", *ROTATABLE, 64], ["--image_size", 64]),
    "cifar10_vit": (["--backbone", "vit_slim_patch4_32", *WHOLE, "--image_size", 32], CIFAR10),
    "ucmerced_vit": (
        ["--backbone", "vit_tiny_patch16_224", *WHOLE, *ROTATABLE, 96],
        ["--image_size", 96],
    ),
}

_OPTIONS, _PROBE = SETS["ucmerced"]
SETS["ucmerced_distillation"] = ([*_OPTIONS, "--batch_size", 64], _PROBE)
SETS["cifar10_distillation"] = (
    [*SETS["cifar10"][0], "--batch_size", 64, "--pretext.teacher_size", 64],
    ["--image_size", 32],
)
SETS["cifar10_temperature"] = SETS["cifar10"]
SETS["ucmerced_resizing"] = (
    ["--backbone", "resnet18", *ROTATABLE, 96, "--batch_size", 64],
    ["--image_size", 96],
)
for kind in ("color", "branches"):
    SETS |= {f"{name}_{kind}": SETS[name] for name in ("cifar10", "ucmerced")}

# Of SimCLR in arms that do not change it, by set: its default when they were measured.
COLOR = {"cifar10": 0.5, "ucmerced": 1}

HALF: list[object] = ["--token_drop", 0.5]
MOMENTUM: list[object] = ["--pretext.momentum"]
SEES_VIEWS: list[object] = ["--pretext.teacher_size", 64]
FIXED: list[object] = ["--pretext.fixed_views", "true"]

# Of distillation in arms that do not change it: its defaults when they were measured.
DISTILLATION = {"--lr": 0.003, "--pretext.min_crop_scale": 0.2, "--pretext.color": 0.5}

# Name of an arm: a pretext and what is changed.
ARMS: dict[str, list[object]] = {
    "simclr": [],
    "simclr, lr 0.0005": ["--lr", 0.0005],
    "simclr, lr 0.0002": ["--lr", 0.0002],
    "simclr, lr 0.0005, color 0.25": ["--lr", 0.0005, "--pretext.color", 0.25],
    "simclr, color 0.1": ["--pretext.color", 0.1],
    "simclr, color 0.25": ["--pretext.color", 0.25],
    f"simclr, color 0.25, {BRANCHES} zero": ["--pretext.color", 0.25],
    f"simclr, color 0.25, {BRANCHES} one": ["--pretext.color", 0.25],
    "simclr, color 0.25, smallest crop 0.4": [
        *["--pretext.color", 0.25, "--pretext.min_crop_scale", 0.4]
    ],
    "simclr, color 0.25, lr 0.003, smallest crop 0.4": [
        *["--pretext.color", 0.25, "--lr", 0.003, "--pretext.min_crop_scale", 0.4]
    ],
    "simclr, color 0.5": ["--pretext.color", 0.5],
    "simclr, color 1": ["--pretext.color", 1],
    "simclr, lr 0.003": ["--lr", 0.003],
    "simclr, lr 0.006": ["--lr", 0.006],
    "simclr, half of the patches": HALF,
    "simclr, color 0.25, half of the patches": ["--pretext.color", 0.25, *HALF],
    "simclr, gradients clipped to 1": ["--clip_norm", 1],
    "simclr, batch size 64": ["--batch_size", 64],
    "simclr, batch size 256": ["--batch_size", 256],
    "simclr, temperature 0.07": ["--pretext.temperature", 0.07],
    "simclr, temperature 0.2": ["--pretext.temperature", 0.2],
    "simclr, warm-up 0.02": ["--warmup", 0.02],
    "simclr, warm-up 0.3": ["--warmup", 0.3],
    "simclr, smallest crop 0.08": ["--pretext.min_crop_scale", 0.08],
    "simclr, smallest crop 0.4": ["--pretext.min_crop_scale", 0.4],
    "simclr, smallest crop 0.6": ["--pretext.min_crop_scale", 0.6],
    "simclr, lr 0.003, smallest crop 0.4": ["--lr", 0.003, "--pretext.min_crop_scale", 0.4],
    "simclr, average 0.99": ["--ema", 0.99],
    "simclr, two local crops": ["--pretext.local_crops", 2],
    "simclr, progressive resizing": ["--progressive_resizing", "true"],
    "byol": [],
    f"byol, {BRANCHES} one": [],
    "byol, momentum 0.9 from the start": [*MOMENTUM, 0.9],
    "byol, momentum 0.95 from the start": [*MOMENTUM, 0.95],
    "byol, momentum 0.99 from the start": [*MOMENTUM, 0.99],
    "byol, momentum 0.996 from the start": [*MOMENTUM, 0.996],
    "moco": [],
    "moco, momentum 0.95 from the start, queue 512": [*MOMENTUM, 0.95, "--pretext.queue_size", 512],
    "moco, momentum 0.99 from the start, queue 512": [*MOMENTUM, 0.99, "--pretext.queue_size", 512],
    "moco, momentum 0.99 from the start": [*MOMENTUM, 0.99],
    "moco_v3": [],
    "moco_v3, momentum 0.95 from the start": [*MOMENTUM, 0.95],
    "dino, momentum 0.95": [*MOMENTUM, 0.95],
    "dino": [],
    "lejepa": [],
    "lejepa, lambda 0.05": ["--pretext.lambd", 0.05],
    "lejepa, lambda 0.1": ["--pretext.lambd", 0.1],
    "distillation": SEES_VIEWS,
    "distillation, mixup": [*SEES_VIEWS, "--pretext.mixup", "true"],
    "distillation, temperature 0.04": [*SEES_VIEWS, "--pretext.temperature", 0.04],
    "distillation, lr 0.001": [*SEES_VIEWS, "--lr", 0.001],
    "distillation, fixed views": FIXED,
    "distillation, fixed views, one size": [*FIXED, "--progressive_resizing", "false"],
    "distillation, fixed views, temperature 0.04": [*FIXED, "--pretext.temperature", 0.04],
    "distillation, fixed views, temperature 0.2": [*FIXED, "--pretext.temperature", 0.2],
    "distillation, fixed views, lr 0.001": [*FIXED, "--lr", 0.001],
    "distillation, fixed views, lr 0.006": [*FIXED, "--lr", 0.006],
    "distillation, fixed views, color 0.25": [*FIXED, "--pretext.color", 0.25],
    "distillation, fixed views, smallest crop 0.4": [*FIXED, "--pretext.min_crop_scale", 0.4],
    "distillation, fixed views, smallest crop 0.4, color 0.25": [
        *[*FIXED, "--pretext.min_crop_scale", 0.4, "--pretext.color", 0.25]
    ],
    "distillation, fixed views, smallest crop 0.6, color 0.1": [
        *[*FIXED, "--pretext.min_crop_scale", 0.6, "--pretext.color", 0.1]
    ],
    "distillation, fixed views, smallest crop 0.6, color 0.1, lr 0.001": [
        *[*FIXED, "--pretext.min_crop_scale", 0.6, "--pretext.color", 0.1, "--lr", 0.001]
    ],
    "distillation, fixed views, smallest crop 0.4, color 0.25, temperature 0.04": [
        *[*FIXED, "--pretext.min_crop_scale", 0.4],
        *["--pretext.color", 0.25, "--pretext.temperature", 0.04],
    ],
}
# Without ``--arms`` the last ones are left out.
DEFAULT_ARMS = list(ARMS)
for pretext in ("byol", "moco", "vicreg", "barlow_twins", "dino", "nnclr", "swav", "simsiam"):
    ARMS |= {pretext: [], f"{pretext}, color 0.25": ["--pretext.color", 0.25]}
for pretext in ("dino", "moco_v3", "rotation"):
    ARMS |= {pretext: [], f"{pretext}, half of the patches": HALF}
FROM_ZERO = "moco vicreg barlow_twins nnclr visreg byol simsiam dino rotation".split()
ARMS |= {f"{pretext}, {BRANCHES} zero": [] for pretext in FROM_ZERO}
ARMS |= {pretext: [] for pretext in FROM_ZERO if pretext not in ARMS}
for end in ("", f", {BRANCHES} zero"):
    ARMS[f"distillation, fixed views, batch size 64{end}"] = [*FIXED, "--batch_size", 64]
for pretext in ("moco", "densecl", "moco_v3"):
    ARMS |= {pretext: [], f"{pretext}, temperature 0.1": ["--pretext.temperature", 0.1]}
for pretext in ("moco", "densecl"):
    ARMS[f"{pretext}, one size"] = ["--progressive_resizing", "false"]
CROPS: list[object] = ["--pretext.local_crops", 2]
ARMS["byol, two local crops"] = CROPS
ARMS["vicreg, color 0.25, two local crops"] = ["--pretext.color", 0.25, *CROPS]


def once(name: str, arm: str, minutes: float, seed: int, o: argparse.Namespace) -> dict[str, float]:
    """Accuracy of kNN and of a linear probe, and images per second, of one encoder."""
    out: Path = o.out / f"{name}-{arm.replace(', ', '-').replace(' ', '_')}-{minutes:g}-{seed}"
    of_training, of_probe = SETS[name]
    if not (out / "probe" / "results.json").exists():
        words = ["pretrain", "--data", o.data / "train", "--out", out / "run", "--seed", seed]
        words += ["--pretext", arm.split(",")[0], "--num_workers", 0]
        words += ["--max_time", round(60 * minutes), *of_training, *ARMS[arm]]
        if arm.startswith("simclr") and "--pretext.color" not in ARMS[arm]:
            words += ["--pretext.color", COLOR[name.split("_")[0]]]
        if arm.startswith("distillation"):
            words += ["--pretext.teacher", o.teacher]
            for option, value in DISTILLATION.items():
                words += [] if option in ARMS[arm] else [option, value]
        vissl_lite(o.core, *words, code=o.before if needs_before(arm) else ROOT)
        data = o.data / "train" if name.startswith("cifar10") else o.data
        words = ["probe", "--encoder", out / "run", "--data", data, "--out", out / "probe"]
        vissl_lite(o.core, *words, "--leaks", "warn", *of_probe)
    scores, trained = results_of(out / "probe"), results_of(out / "run")
    speed = trained["epochs"] * trained["images"] / trained["seconds"]
    return {"knn": scores["knn"], "linear": scores["linear"], "images_per_second": speed}


def needs_before(arm: str) -> bool:
    """Whether an arm is a run of an earlier commit."""
    return FROM_THE_START in arm or BRANCHES in arm


def short_runs_table(name: str) -> str:
    found = load("short_runs")[name]
    lengths = sorted({minutes for runs in found["arms"].values() for minutes in runs}, key=float)
    rows = []
    for arm in ARMS:
        if arm not in found["arms"]:
            continue
        cells = []
        for minutes in lengths:
            runs = list(found["arms"][arm].get(minutes, {}).values())
            cells += [
                mean_and_spread([one[kind] for one in runs]) if runs else ""
                for kind in ("knn", "linear")
            ]
        pretext = arm.split(",")[0]
        seeds = str(max(len(runs) for runs in found["arms"][arm].values()))
        rows.append([f"`{pretext}`{arm.removeprefix(pretext)}", *cells, seeds])
    header = [f"{minutes} min, {kind}" for minutes in lengths for kind in ("kNN", "linear")]
    header = ["", *header, "seeds"]
    data = f"DATA/{name.split('_')[0]}"
    words = f"python -m benchmarks.training.short_runs {name} --data {data} --out RUNS ..."
    return markdown_table(header, rows) + "\n\n" + provenance(found, words)


TABLES = {f"short_runs_{name}": partial(short_runs_table, name) for name in SETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data", type=Path, required=True, help="with train/ and test/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--teacher", type=Path, help="an encoder folder, for distillation")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2, 8])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=DEFAULT_ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--core", type=int, default=0, help="use this one core")
    o = parser.parse_args()
    for seed in o.seeds:
        for minutes in o.minutes:
            for arm in o.arms:
                if needs_before(arm) and not o.before:
                    continue
                if arm.startswith("distillation") and not o.teacher:
                    continue
                figures = once(o.set, arm, minutes, seed, o)
                print(o.set, arm, minutes, seed, json.dumps(figures), flush=True)
                record(o.set, arm, minutes, seed, figures)


def record(name: str, arm: str, minutes: float, seed: int, figures: dict[str, float]) -> None:
    """Write down the figures of one run beside those of others."""
    try:
        found = load("short_runs").get(name, {})
    except FileNotFoundError:
        found = {}
    arms: dict[str, Any] = found.get("arms", {})
    arms.setdefault(arm, {}).setdefault(f"{minutes:g}", {})[str(seed)] = figures
    keep("short_runs", {name: {"arms": arms, "made": where_and_when()}})


if __name__ == "__main__":
    main()
