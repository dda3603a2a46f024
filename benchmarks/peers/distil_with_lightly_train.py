"""lightly-train distils a teacher into a student for some minutes; writes the student's encoder.

    python distil_with_lightly_train.py --data FOLDER --out SCRATCH --teacher ENCODER_FOLDER \
        --student resnet18 --image_size 64 --batch_size 64 --minutes 5 --seed 0

``lightly_train.pretrain(method="distillation")`` as its documentation runs it
(docs.lightly.ai/train/stable/pretrain_distill/methods/distillation.html), with its own transform,
losses, optimizer and learning rate. Given are the images, the student, the batch, the size of the
views, and a timm model with the weights and the normalization of ``ENCODER_FOLDER`` as teacher,
which sees the views in their size. The schedule has as many steps as fit into the minutes, start-up
included, as two short runs say, whose time does not count. Events are off.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

TRIALS = 10, 40  # steps


def pretrain(o: argparse.Namespace, out: Path, teacher: Any, steps: int) -> None:
    import lightly_train

    config = json.loads((o.teacher / "config.json").read_text())["pretrained_cfg"]
    lightly_train.pretrain(
        out=out,
        data=o.data,
        model=f"timm/{o.student}",
        method="distillation",
        method_args={"teacher": teacher},
        batch_size=o.batch_size,
        epochs=100_000,
        seed=o.seed,
        accelerator="cpu",
        num_workers=0,
        overwrite=True,
        transform_args={
            "image_size": (o.image_size, o.image_size),
            "normalize": {"mean": tuple(config["mean"]), "std": tuple(config["std"])},
        },
        trainer_args={"max_steps": steps},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--image_size", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"
    os.environ["LIGHTLY_TRAIN_CACHE_DIR"] = str(o.out / "cache")
    import lightly_train
    import timm
    import torch
    from timm_folder import load_encoder, save_encoder

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    teacher = timm.create_model(f"local-dir:{o.teacher}", pretrained=True)
    # Of an EfficientNet it takes a map without the last convolution, and fails as it expects the
    # width of that convolution's output, which it gets so.
    teacher.forward_intermediates = lambda images, **_: [teacher.forward_features(images)]
    pretrain(o, o.out / "trial", teacher, 1)  # what is imported and compiled but once
    taken = []
    for steps in TRIALS:
        started = time.perf_counter()
        pretrain(o, o.out / "trial", teacher, steps)
        taken.append(time.perf_counter() - started)
    of_a_step = (taken[1] - taken[0]) / (TRIALS[1] - TRIALS[0])
    beside = taken[0] - TRIALS[0] * of_a_step
    steps = max(1, int((60 * o.minutes - beside) / of_a_step))
    started = time.perf_counter()
    pretrain(o, o.out / "run", teacher, steps)
    minutes = (time.perf_counter() - started) / 60
    checkpoint, weights = o.out / "run/checkpoints/last.ckpt", o.out / "encoder.pt"
    lightly_train.export(
        out=weights, checkpoint=checkpoint, format="torch_state_dict", overwrite=True
    )
    state = torch.load(weights, weights_only=True)
    student = timm.create_model(o.student, num_classes=0)
    load_encoder(student, state)
    config = json.loads((o.teacher / "config.json").read_text())["pretrained_cfg"]
    save_encoder(student, o.out / "encoder", o.image_size, config["mean"], config["std"])
    images = len([file for file in o.data.rglob("*") if file.is_file()])
    made = {"minutes": minutes, "steps": steps, "epochs": steps * o.batch_size / images}
    (o.out / "results.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
