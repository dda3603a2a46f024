"""lightly's examples, examples/pytorch/simclr.py and dino.py of github.com/lightly-ai/lightly.

(docs.lightly.ai/self-supervised-learning/examples/simclr.html and dino.html.) Theirs are the loop,
one view after the other through the model, the transforms (SimCLRTransform; at 32 pixels without
blur; DINOTransform: two views of 224 pixels and six of 96), the heads' sizes, the losses, the
optimizers, fp32 and persistence of nothing: the loader's workers start anew each epoch.

What differs from the examples: the backbone is timm's; the loader has a worker a core and not
eight; at other widths than resnet18's 512 the head of SimCLR is as wide as the features. For
--minutes the optimizer and the colors are those of lightly's CIFAR-10 benchmark
(lightly_simclr.py), with which short runs get further than with the example's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import count

import lightly_simclr
import timm
import torch
from lightly.data import LightlyDataset
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.dino_transform import DINOTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from timm_folder import save_encoder
from torch import Tensor, nn
from torch.utils.data import DataLoader
from work import Work

PROTOTYPES, HIDDEN, BOTTLENECK, MOMENTUM = 2048, 512, 64, 0.99


def about() -> dict[str, object]:
    return {"version": version("lightly"), "precision": "fp32", "workers": "one a core"}


def train(work: Work) -> int:
    """Run an example until the time is over, and save SimCLR's encoder; returns images."""
    torch.manual_seed(work.seed)
    if work.pretext == "dino":
        return work.batch_size * steps(dino(work), work.seconds)
    timed = work.seconds is not None
    jitter = 0.5 if timed else 1.0
    loader = lightly_simclr.make_loader(
        work.data, work.image_size, work.batch_size, work.workers, jitter
    )
    resnet = work.backbone.startswith("resnet")
    model = lightly_simclr.SimCLR(work.backbone, torchvision_init=timed and resnet)
    model.to(lightly_simclr.device())
    recipe = "benchmark" if timed else "example"
    done = steps(lightly_simclr.train(model, loader, recipe, work.seconds or 0.0), work.seconds)
    mean, std = IMAGENET_NORMALIZE["mean"], IMAGENET_NORMALIZE["std"]
    save_encoder(model.encoder.cpu(), work.out / "encoder", work.image_size, mean, std)
    return work.batch_size * done


def steps(losses: Iterator[Tensor], seconds: float | None) -> int:
    """Take steps until the time is over, and count them."""
    start = time.perf_counter()
    for done, _ in enumerate(losses, 1):
        if seconds is not None and time.perf_counter() - start >= seconds:
            return done
    raise RuntimeError("the loops have no end")


class DINO(nn.Module):
    """Student and teacher with their heads."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        vit = backbone.startswith("vit")
        optional = {"dynamic_img_size": True} if vit else {}
        self.student = timm.create_model(backbone, num_classes=0, **optional)
        width = self.student.num_features
        self.teacher = copy.deepcopy(self.student)
        self.student_head, self.teacher_head = (
            DINOProjectionHead(width, HIDDEN, BOTTLENECK, PROTOTYPES, freeze_last_layer=freeze)
            for freeze in (1, -1)
        )
        deactivate_requires_grad(self.teacher)
        deactivate_requires_grad(self.teacher_head)


def dino(work: Work) -> Iterator[Tensor]:
    """The example's loop without end."""
    device = lightly_simclr.device()
    model = DINO(work.backbone).to(device)
    dataset = LightlyDataset(
        str(work.data), transform=DINOTransform(global_crop_size=work.image_size)
    )
    loader = DataLoader(
        dataset,
        batch_size=work.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=work.workers,
    )
    criterion = DINOLoss(output_dim=PROTOTYPES, warmup_teacher_temp_epochs=5).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    model.train()
    for epoch in count():
        for views, *_ in loader:
            views = [view.to(device) for view in views]
            update_momentum(model.student, model.teacher, m=MOMENTUM)
            update_momentum(model.student_head, model.teacher_head, m=MOMENTUM)
            teacher = [model.teacher_head(model.teacher(view)) for view in views[:2]]
            student = [model.student_head(model.student(view)) for view in views]
            loss = criterion(teacher, student, epoch=epoch)
            loss.backward()
            # the last layer stays as it is in the first epoch
            model.student_head.cancel_last_layer_gradients(current_epoch=epoch)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()
