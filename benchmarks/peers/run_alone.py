"""The limit: our training step alone, again and again on one batch that was made once.

The same network, pretext, precision and optimizer as a run's; no files, no data workers, no
Lightning, no logging.
"""

from __future__ import annotations

import torch
from work import Work

from vissl_lite import __version__
from vissl_lite.data.images import find_images
from vissl_lite.data.stream import ViewDataset, collate
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.optim import build_optimizer
from vissl_lite.pretext import pretext_class
from vissl_lite.training.cpu.operators import fast_cpu_operators
from vissl_lite.training.hardware import choose_precision


def about() -> dict[str, object]:
    return {"version": __version__, "precision": "auto", "workers": 0}


def train(work: Work) -> int:
    """Take steps without end."""
    task = pretext_class(work.pretext)(build_encoder(work.backbone, work.image_size))
    task.to(memory_format=torch.channels_last)
    task.train()
    dataset = ViewDataset(find_images([work.data]), task.views(), 0)
    batch = collate([dataset[(0, index)] for index in range(work.batch_size)])
    optimizer = build_optimizer(task, task.optimizer_settings)
    bf16 = choose_precision("auto", task) == "bf16-mixed"
    with fast_cpu_operators():
        while True:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = task.loss([task.encoder.normalize(view) for view in batch.views])
            optimizer.zero_grad()
            loss.backward()
            task.on_after_backward()
            task.on_before_optimizer_step(optimizer)
            optimizer.step()
            task.after_step()
