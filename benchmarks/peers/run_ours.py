"""vissl_lite as its README runs it: the command ``vissl-lite pretrain``.

Given are the images, the pretext, the backbone, the size and the batch, and where speed is measured
that views have their full size and all of their patches; all else is the default, as are DINO's two
views of 224 pixels and six of 96.
(``precision`` is bf16 where the CPU has it.)
For --minutes, which count start-up and the report, too, ``--max_time`` is what these leave. At 32
pixels the recipe is configs/cifar10_minutes.yaml; larger images are trained on by the defaults,
progressive resizing among them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from work import Work

from vissl_lite import __version__
from vissl_lite.cli import main

BESIDE_TRAINING = 10.0  # seconds: 4.5 before the run begins, 4 after training, and half a step
RECIPE = Path(__file__).parents[2] / "configs/cifar10_minutes.yaml"


def about() -> dict[str, object]:
    return {"version": __version__, "precision": "auto", "workers": "auto"}


def train(work: Work) -> int:
    """Run the command; returns how many images it trained on."""
    options: list[object] = ["--data", work.data, "--out", work.out / "run", "--overwrite"]
    options += ["--pretext", work.pretext, "--seed", work.seed]
    if work.seconds is None or work.image_size > 32:
        options += ["--backbone", work.backbone, "--image_size", work.image_size]
        options += ["--batch_size", work.batch_size]
    else:
        options += ["--config", RECIPE]
    if work.seconds is None:
        options += ["--epochs", work.epochs, "--progressive_resizing", "false", "--token_drop", 0]
    else:
        options += ["--max_time", round(work.seconds - BESIDE_TRAINING)]
    sys.argv[1:] = ["pretrain", *map(str, options)]
    status = main()  # as the program
    if status:
        raise SystemExit(status)
    (work.out / "encoder").unlink(missing_ok=True)
    (work.out / "encoder").symlink_to(work.out / "run" / "encoder")
    results = json.loads((work.out / "run" / "results.json").read_text())
    return round(results["epochs"] * results["images"])
