"""Is learning from a teacher better than contrastive pre-training, for the same minutes?

    python -m benchmarks.accuracy.distillation SET --data DATA/SET --domains DOMAINS --out OUT \
        --core 0 [--peer_python PEERS/bin/python]

``SET`` is ``ucmerced`` (64 pixels) or ``cifar10`` (32). Students, ``resnet10t`` and ``resnet18``,
train on the training images without labels, each for the same wall-clock minutes on one core:

- ``simclr``: without a teacher;
- ``distillation``: with the ImageNet-trained ``tf_efficientnet_lite0`` of
  ``benchmarks.accuracy.domains``, which sees the student's views at 64 pixels;
- ``fixed views``: the teacher sees every image once, whole, at its own 224 pixels
  (``--pretext.fixed_views true``; the time for that counts, and the 50,000 images of CIFAR-10 take
  longer than five minutes, so ``--arms`` has to leave it out there);
- ``lightly-train``: its distillation from the same teacher, with its own recipe
  (``benchmarks/peers/distil_with_lightly_train.py``), if there is ``--peer_python``.

Then one probe evaluates the encoders of the last step: kNN and linear, on the test images. Runs
that are there are kept. Results: benchmarks/results/distillation.json.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ROOT,
    keep,
    load,
    markdown_table,
    over_seeds,
    provenance,
    results_of,
    where_and_when,
)

SIZES = {"ucmerced": 64, "cifar10": 32}
STUDENTS = ("resnet10t", "resnet18")
TEACHER_SIZE = 64
OF_TEACHER = ["--pretext", "distillation", "--pretext.teacher"]
ARMS = ("simclr", "distillation", "fixed views", "lightly-train")
BATCH = 64
FEW_EPOCHS = ["--pretext.min_crop_scale", 0.6, "--pretext.color", 0.1, "--lr", 0.001]


def run(words: list[object], core: int) -> None:
    subprocess.run(
        [str(word) for word in words],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )


def train(name: str, student: str, arm: str, seed: int, out: Path, given: Any) -> None:
    teacher = given.domains / "lite0"
    size = SIZES[name]
    if arm == "lightly-train":
        script = ROOT / "benchmarks" / "peers" / "distil_with_lightly_train.py"
        run(
            [
                given.peer_python, script, "--data", given.data / "train", "--out", out,
                "--teacher", teacher, "--student", student,
                "--image_size", size, "--batch_size", BATCH, "--minutes", given.minutes,
                "--seed", seed,
            ],
            given.core,
        )  # fmt: skip
        return
    pretexts: dict[str, list[object]] = {
        "simclr": ["--pretext", "simclr"],
        "distillation": [*OF_TEACHER, teacher, "--pretext.teacher_size", TEACHER_SIZE],
        "fixed views": [*OF_TEACHER, teacher, "--pretext.fixed_views", "true"],
    }
    if name == "cifar10":  # which is seen a few times: see short_runs cifar10_distillation
        pretexts["distillation"] += FEW_EPOCHS
    upright = "true" if name == "cifar10" else "false"
    run(
        [
            sys.executable, "-m", "vissl_lite", "pretrain", "--data", given.data / "train",
            "--out", out, "--backbone", student, "--image_size", size, "--batch_size", BATCH,
            "--max_time", round(60 * given.minutes), "--seed", seed, "--upright", upright,
            "--num_workers", 0, "--overwrite", *pretexts[arm],
        ],
        given.core,
    )  # fmt: skip


def once(name: str, student: str, arm: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """kNN and linear accuracy, and how many epochs there were, of one student."""
    out: Path = given.out / f"{name}-{student}-{arm.replace(' ', '_')}-{seed}"
    probed = out.with_name(f"{out.name}-probe")
    if not (probed / "results.json").exists():
        encoder: Path | str = out / "encoder"
        if arm == "untrained":
            encoder = f"random:{student}"
        else:
            train(name, student, arm, seed, out, given)
        run(
            [
                sys.executable, "-m", "vissl_lite", "probe", "--encoder", encoder,
                "--data", given.data, "--out", probed, "--image_size", SIZES[name],
                "--leaks", "warn", "--seed", seed, "--overwrite",
            ],
            given.core,
        )  # fmt: skip
    scores = results_of(probed)
    found = {"knn": scores["knn"], "linear": scores["linear"]}
    if (out / "results.json").exists():
        found["epochs"] = results_of(out)["epochs"]
    return found


def table(name: str) -> str:
    found = load("distillation")[name]
    rows = []
    for student, arms in found["students"].items():
        for arm, runs in arms.items():
            figures = [
                over_seeds([one[kind] for one in runs.values()]) for kind in ("knn", "linear")
            ]
            epochs = [one["epochs"] for one in runs.values() if "epochs" in one]
            seen = f"{sum(epochs) / len(epochs):.0f}" if epochs else ""
            rows.append([f"`{student}`", arm, *figures, seen, str(len(runs))])
    command = f"python -m benchmarks.accuracy.distillation {name} --data DATA/{name} ..."
    header = ["student", "", "kNN", "linear", "epochs", "seeds"]
    return markdown_table(header, rows) + "\n\n" + provenance(found, command)


TABLES = {f"distillation_{name}": partial(table, name) for name in SIZES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=SIZES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--domains", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer_python")
    parser.add_argument("--students", nargs="+", default=STUDENTS)
    parser.add_argument("--arms", nargs="+", default=("untrained", *ARMS))
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--core", type=int, default=0, help="use this one core")
    given = parser.parse_args()
    students: dict[str, Any] = {}
    for seed in given.seeds:
        for student in given.students:
            for arm in given.arms:
                if arm == "lightly-train" and not given.peer_python:
                    continue
                made = once(given.set, student, arm, seed, given)
                students.setdefault(student, {}).setdefault(arm, {})[str(seed)] = made
                print(given.set, student, arm, seed, json.dumps(made), flush=True)
    made_at = {"minutes": given.minutes, "made": where_and_when()}
    keep("distillation", {given.set: {"students": students, **made_at}})


if __name__ == "__main__":
    main()
