"""lightly-train as its documentation runs it: lightly_train.pretrain with its defaults.

(docs.lightly.ai/train/stable/pretrain_distill/: ``lightly_train.pretrain(out=..., data=...,
model=..., method=...)``.) Given are the model ("timm/..."), the method, the batch size, the size of
the views where it is not the default of 224, and accelerator="cpu" where there is no GPU. Its own
are the transforms (DINO's has two views of 224 pixels and six of 96), the loader (num_workers
"auto": the cores but one), callbacks, logging, optimizer and precision ("auto": fp32 on a CPU).

Events are off, and caches stand in the scratch folder. For --minutes, trainer_args end the run at
the time and give the schedule its length; its own export writes the encoder.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

from work import Work


def about() -> dict[str, object]:
    return {
        "version": version("lightly_train"),
        "precision": "auto (fp32 on a CPU)",
        "workers": "auto (cores - 1)",
    }


def train(work: Work) -> int:
    """Run it; with a time limit, export the encoder. Returns how many images it trained on."""
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"
    os.environ["LIGHTLY_TRAIN_CACHE_DIR"] = str(work.out / "cache")
    import lightly_train
    import torch

    optional: dict[str, Any] = {}
    if work.image_size != 224:
        optional["transform_args"] = {"image_size": (work.image_size, work.image_size)}
    limits: dict[str, Any] = {}
    if work.steps is not None:
        limits["max_steps"] = work.steps
    if work.seconds is not None:
        limits["max_time"] = {"seconds": work.seconds}
    lightly_train.pretrain(
        out=work.out / "run",
        data=work.data,
        model=f"timm/{work.backbone}",
        method=work.pretext,
        epochs=work.epochs,
        batch_size=work.batch_size,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        overwrite=True,
        seed=work.seed,
        trainer_args=limits,
        **optional,
    )
    return export(work)


def export(work: Work) -> int:
    """Write the encoder as a timm folder; returns how many images it was trained on."""
    import lightly_train
    import timm
    import torch
    from timm_folder import load_encoder, save_encoder

    checkpoint, weights = work.out / "run/checkpoints/last.ckpt", work.out / "encoder.pt"
    lightly_train.export(
        out=weights, checkpoint=checkpoint, format="torch_state_dict", overwrite=True
    )
    state = torch.load(weights, weights_only=True)
    encoder = timm.create_model(work.backbone, num_classes=0)
    load_encoder(encoder, state)
    # the normalization of its transforms' default
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    save_encoder(encoder, work.out / "encoder", work.image_size, mean, std)
    steps = int(torch.load(checkpoint, weights_only=False)["global_step"])
    return work.batch_size * steps
