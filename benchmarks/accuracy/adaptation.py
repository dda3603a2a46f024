"""Does further pre-training of ImageNet weights help, and which weights should be trained?

    python -m benchmarks.accuracy.adaptation SET --data FOLDER --domains DOMAINS --out OUT --core 0

``SET`` is ``ucmerced`` (classification, 64 pixels), ``water`` (segmentation, 128 pixels) or
``bccd`` (detection, 320 pixels); ``FOLDER`` and ``DOMAINS`` are those of
``benchmarks.accuracy.transfer``. The ImageNet-trained ``tf_efficientnet_lite0`` is trained further
on the training images without labels, for the same wall-clock minutes on one core, with the
defaults of ``pretrain --encoder``; an arm says the pretext and ``--train``. Then it is evaluated,
as is the encoder as it was: by kNN and linear probe (``ucmerced``), and fine-tuned (all sets). Runs
that are there are kept.

Results: benchmarks/results/adaptation.json.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import vissl_lite
from benchmarks.common import (
    keep,
    load,
    markdown_table,
    over_seeds,
    provenance,
    results_of,
    use_core,
    where_and_when,
)

# Name of a row, and options of pretrain; without any: the encoder as it was.
ARMS: dict[str, dict[str, Any]] = {
    "as it was": {},
    "simclr, all": {"pretext": "simclr", "train": "all"},
    "simclr, blocks:2": {"pretext": "simclr", "train": "blocks:2"},
    "simclr, norms": {"pretext": "simclr", "train": "norms"},
    "simclr, all, average 0.99": {"pretext": "simclr", "train": "all", "ema": 0.99},
    "diet, blocks:2": {"pretext": "diet", "train": "blocks:2"},
}


@dataclass(frozen=True)
class Job:
    """A data set.

    Attributes:
        images: Unlabelled images, in the folder of the data or that of the domains.
        labelled: Labelled images, in one of the same folders.
        size: Side of the views of pre-training in pixels.
        minutes: Minutes of pre-training.
        finetune: Options of ``finetune``.
        shots: Labels per class of probes and fine-tuned classifiers.
        metrics: Test metrics of ``finetune`` that are kept.
    """

    images: str
    labelled: str
    size: int
    minutes: float
    finetune: dict[str, Any]
    shots: tuple[int, ...]
    metrics: tuple[str, ...]


JOBS = {
    "ucmerced": Job(
        "ucmerced/train", "ucmerced", 64, 5, {"image_size": 64, "epochs": 20}, (5, 10), ("top1",)
    ),
    "water": Job(
        "water-crops", "water-rgb", 64, 4,
        {"task": "segmentation", "image_size": 128, "epochs": 40, "batch_size": 6}, (), ("miou",),
    ),
    "bccd": Job(
        "bccd-crops", "bccd", 96, 8,
        {"task": "detection", "image_size": 320, "epochs": 12, "batch_size": 8}, (),
        ("map_50", "map"),
    ),
}  # fmt: skip


def found_in(place: str, given: argparse.Namespace) -> str:
    """A folder of the data, or of the domains."""
    return str(given.domains / place if (given.domains / place).exists() else given.data / place)


def evaluate(job: Job, encoder: str, seed: int, out: Path, given: Any) -> dict[str, float]:
    """Figures of an encoder: by name and labels per class, such as ``linear, 5 per class``."""
    figures: dict[str, float] = {}
    common = {
        "data": found_in(job.labelled, given), "encoder": encoder, "seed": seed,
        "leaks": "warn", "overwrite": True,
    }  # fmt: skip
    for shots in job.shots or (None,):
        labels = f", {shots} per class" if shots else ""
        if shots:
            probed = out / f"probe-{shots}"
            if not (probed / "results.json").exists():
                size = job.finetune["image_size"]
                vissl_lite.probe(out=str(probed), image_size=size, shots=shots, **common)
            scores = results_of(probed)
            figures |= {f"kNN{labels}": scores["knn"], f"linear{labels}": scores["linear"]}
        tuned = out / f"finetune-{shots or 'all'}"
        if not (tuned / "results.json").exists():
            vissl_lite.finetune(
                out=str(tuned), shots=shots, upright=False, num_workers=0, **common, **job.finetune
            )
        test = results_of(tuned)["test"]
        figures |= {f"fine-tuned {metric}{labels}": test[metric] for metric in job.metrics}
    return figures


def once(name: str, arm: str, seed: int, given: argparse.Namespace) -> dict[str, float]:
    job, start = JOBS[name], str(given.domains / "lite0")
    out: Path = given.out / f"{name}-{arm.replace(', ', '-').replace(' ', '_')}-{seed}"
    encoder = start
    if ARMS[arm]:
        encoder = str(out / "pretrained")
        if not (out / "pretrained" / "results.json").exists():
            vissl_lite.pretrain(
                data=found_in(job.images, given), out=encoder, encoder=start, image_size=job.size,
                batch_size=64, max_time=round(60 * job.minutes), upright=False, seed=seed,
                num_workers=0, overwrite=True, **ARMS[arm],
            )  # fmt: skip
    return evaluate(job, encoder, seed, out, given)


def table(name: str) -> str:
    found = load("adaptation")[name]
    header: list[str] = []
    rows = []
    for arm, runs in found["arms"].items():
        seeds = list(runs.values())
        header = ["pre-training", *seeds[0], "seeds"]
        cells = [over_seeds([one[figure] for one in seeds]) for figure in seeds[0]]
        rows.append([arm, *cells, str(len(seeds))])
    command = f"python -m benchmarks.accuracy.adaptation {name} --data DATA --domains DOMAINS ..."
    return markdown_table(header, rows) + "\n\n" + provenance(found, command)


TABLES = {f"adaptation_{name}": partial(table, name) for name in JOBS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=JOBS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--domains", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--core", type=int, default=0, help="use this one core")
    given = parser.parse_args()
    use_core(given.core)
    arms: dict[str, dict[str, Any]] = {}
    for seed in given.seeds:
        for arm in given.arms:
            figures = once(given.set, arm, seed, given)
            arms.setdefault(arm, {})[str(seed)] = figures
            print(given.set, arm, seed, json.dumps(figures), flush=True)
    keep("adaptation", {given.set: {"arms": arms, "made": where_and_when()}})
    for arm, runs in arms.items():
        means = {
            figure: statistics.mean(one[figure] for one in runs.values())
            for figure in next(iter(runs.values()))
        }
        print(arm, {figure: f"{mean:.3f}" for figure, mean in means.items()})


if __name__ == "__main__":
    main()
