"""stable-pretraining as its README and the recipes in its source distribution run it.

SimCLR: the README's "30-second tour" (spt.Module with forward.simclr, NTXEntLoss(0.5), bf16-mixed,
spt.Manager) with the views, the projector and LARS of benchmarks/imagenet100/simclr-resnet50.py, at
32 pixels those of benchmarks/cifar10/simclr-resnet18.py. DINO: methods.dino.DINO with a forward
function for named views and AdamW, as in benchmarks/imagenet10/dino-vit-small.py (65536
prototypes), with the views of benchmarks/imagenet100/dino-resnet18.py (two of 224 pixels and six of
96; blurred by PIL, which is the faster of the recipes' blurs) and for ResNets its 4096 prototypes.
(Its forward.dino does not work in release 0.1.8: it passes interpolate_pos_encoding to the
backbone, which neither timm's nor torchvision's take.) Precision: the tour's bf16-mixed (the
recipes' "16-mixed" is the same on a CPU, where Lightning replaces it by bf16-mixed), but float32 on
processors that multiply float32 matrices faster, such as Intel's with AVX512-BF16 and without AMX.

What differs: backbones are timm's without a changed stem (spt.backbone.from_timm), at 32 pixels
too, as for all tools; images are read from files by torchvision's ImageFolder and not from
Parquet; a worker a core and not eight; no probes on labels and no validation while it trains, which
none of the others has; no W&B. Its output stands in the scratch folder.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import version
from timeit import Timer
from types import MethodType
from typing import Any

from work import Work


@cache
def precision() -> str:
    """bf16, unless this CPU multiplies float32 matrices faster."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed"
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        factor = torch.ones(512, 512, dtype=dtype)
        product = Timer(lambda factor=factor: factor @ factor)
        product.timeit(1)
        seconds[dtype] = min(product.repeat(7, 1))
    return "bf16-mixed" if seconds[torch.bfloat16] < seconds[torch.float32] else "32-true"


def about() -> dict[str, object]:
    return {
        "version": version("stable-pretraining"),
        "precision": precision(),
        "workers": "one a core",
    }


def train(work: Work) -> int:
    """Run it; with a time limit, save SimCLR's encoder. Returns how many images it trained on."""
    os.environ["SPT_CACHE_DIR"] = str(work.out / "spt")
    import lightning as pl
    import stable_pretraining as spt
    import torch
    from timm_folder import save_encoder
    from torchvision.datasets import ImageFolder

    pl.seed_everything(work.seed)
    dataset = spt.data.FromTorchDataset(
        ImageFolder(str(work.data)), names=["image", "label"], transform=transform(work)
    )
    loader = torch.utils.data.DataLoader(
        dataset=dataset,
        batch_size=work.batch_size,
        num_workers=work.workers,
        drop_last=True,
        persistent_workers=True,
        shuffle=True,
    )
    module = simclr(work) if work.pretext == "simclr" else dino(work)
    callbacks = []
    if work.pretext == "dino":
        callbacks.append(
            spt.callbacks.TeacherStudentCallback(update_frequency=1, update_after_backward=True)
        )
    limits: dict[str, Any] = {"max_epochs": work.epochs}
    if work.steps is not None:
        limits["max_steps"] = work.steps
    if work.seconds is not None:
        limits["max_time"] = {"seconds": work.seconds}
    trainer = pl.Trainer(
        **limits,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        precision=precision(),
        logger=pl.pytorch.loggers.CSVLogger(save_dir=str(work.out / "logs")),
        enable_checkpointing=False,
    )
    spt.Manager(trainer=trainer, module=module, data=spt.data.DataModule(train=loader))()
    if work.pretext == "simclr":
        stats = spt.data.static.CIFAR10 if work.image_size <= 32 else spt.data.static.ImageNet
        where = work.out / "encoder"
        save_encoder(module.backbone.cpu(), where, work.image_size, stats["mean"], stats["std"])
    return work.batch_size * int(trainer.global_step)


def view(
    size: int, scale: tuple[float, float], blur: float, solarize: float, stats: dict[str, Any]
) -> Any:
    """One view of the recipes."""
    from stable_pretraining.data import transforms

    steps = [
        transforms.RGB(),
        transforms.RandomResizedCrop((size, size), scale=scale),
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
    ]
    if blur:
        steps.append(transforms.PILGaussianBlur(p=blur))
    if solarize:
        steps.append(transforms.RandomSolarize(threshold=0.5, p=solarize))
    steps += [transforms.RandomHorizontalFlip(p=0.5), transforms.ToImage(**stats)]
    return transforms.Compose(*steps)


def transform(work: Work) -> Any:
    """All views of an image."""
    import stable_pretraining as spt

    size, stats = work.image_size, spt.data.static.ImageNet
    if work.pretext == "simclr" and size <= 32:
        one = view(size, (0.08, 1.0), 0.0, 0.0, spt.data.static.CIFAR10)
        return spt.data.transforms.MultiViewTransform([one, one])
    smallest = 0.08 if work.pretext == "simclr" else 0.4
    large = [
        view(size, (smallest, 1.0), 1.0, 0.0, stats),
        view(size, (smallest, 1.0), 0.1, 0.2, stats),
    ]
    if work.pretext == "simclr":
        return spt.data.transforms.MultiViewTransform(large)
    named = {f"global_{number}": one for number, one in enumerate(large, 1)}
    for number in range(1, 7):
        named[f"local_{number}"] = view(96, (0.05, 0.4), 0.5, 0.0, stats)
    return spt.data.transforms.MultiViewTransform(named)


def lars(rate: float, decay: float, **more: Any) -> dict[str, Any]:
    """The optimizer of the recipes."""
    return {
        "optimizer": {"type": "LARS", "lr": rate, "weight_decay": decay, **more},
        "scheduler": {"type": "LinearWarmupCosineAnnealing"},
        "interval": "epoch",
    }


def simclr(work: Work) -> Any:
    """SimCLR's module."""
    import stable_pretraining as spt
    from stable_pretraining import forward
    from torch import nn

    backbone = spt.backbone.from_timm(work.backbone, num_classes=0)
    width = backbone.num_features
    if work.image_size <= 32:
        projector = nn.Sequential(
            nn.Linear(width, 2048), nn.BatchNorm1d(2048), nn.ReLU(inplace=True),
            nn.Linear(2048, 2048), nn.BatchNorm1d(2048), nn.ReLU(inplace=True),
            nn.Linear(2048, 256),
        )  # fmt: skip
        optimizer = lars(5, 1e-6)
    else:
        projector = nn.Sequential(
            nn.Linear(width, 2048, bias=False),
            nn.BatchNorm1d(2048),
            nn.ReLU(inplace=True),
            nn.Linear(2048, 128, bias=False),
            spt.backbone.BatchNorm1dNoBias(128),
        )
        rate = 0.3 * work.batch_size / 256
        optimizer = lars(rate, 1e-4, clip_lr=True, eta=0.02, exclude_bias_n_norm=True)
    return spt.Module(
        backbone=backbone,
        projector=projector,
        forward=forward.simclr,
        simclr_loss=spt.losses.NTXEntLoss(temperature=0.5),
        optim=optimizer,
    )


def dino(work: Work) -> Any:
    """DINO's module."""
    from stable_pretraining.methods.dino import DINO

    vit = work.backbone.startswith("vit")
    module = DINO(
        encoder_name=work.backbone,
        encoder_kwargs={"dynamic_img_size": True} if vit else None,
        n_prototypes=65536 if vit else 4096,
        warmup_epochs_temperature_teacher=10,
    )

    def forward(self: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
        large, small = (
            [batch[name]["image"] for name in batch if name.startswith(kind)]
            for kind in ("global", "local")
        )
        output = DINO.forward(self, global_views=large, local_views=small)
        self.log(f"{stage}/loss", output.loss, on_step=True, on_epoch=True, sync_dist=True)
        return {"loss": output.loss, "embedding": output.embedding}

    module.forward = MethodType(forward, module)
    module.optim = {
        "optimizer": {"type": "AdamW", "lr": 5e-4, "weight_decay": 0.05, "betas": (0.9, 0.95)},
        "scheduler": {"type": "LinearWarmupCosineAnnealing"},
        "interval": "epoch",
    }
    return module
