"""One tool trains a detector for some minutes and writes what it finds in the test images.

    python detect_with.py TOOL --data YOLO --out SCRATCH --minutes 5 --seed 0

``YOLO`` holds ``images/{train,val,test}``, ``labels/{train,val,test}`` and ``data.yaml``. Writes
SCRATCH/found.json: for each test image its boxes in pixels, scores and classes. The minutes count
from the start of the training, imports excluded. Every tool has its own recipe, of which only the
length and the image size are given:

- ``ours``: ``vissl-lite finetune`` with its defaults, from ``--encoder``;
- ``torchvision``: ``references/detection`` of torchvision for ``fasterrcnn_resnet50_fpn``, with a
  ResNet-18 that is not trained, or an ImageNet-trained ``--encoder`` whose BatchNorms are frozen
  (SGD, learning rate 0.02 for 16 images, momentum 0.9, weight decay 1e-4, warm-up in the first
  epoch, a tenth of the rate after 16 and after 22 of 26 epochs, flips left and right);
- ``ultralytics``: ``YOLO("yolo11n.yaml").train(...)``, from nothing;
- ``lightly-train``: ``train_object_detection`` with ``picodet/s-416``, from nothing. It can be
  given steps but no time: the speed of twenty steps says how many.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDE = 320  # longer side of an image in pixels


def images_of(data: Path, part: str) -> list[Path]:
    return sorted((data / "images" / part).iterdir())


def ours(o: argparse.Namespace) -> dict[str, Any]:
    import vissl_lite
    from vissl_lite.transfer.detection.model import detect, load_detector

    vissl_lite.finetune(
        data=str(o.data), task="detection", encoder=o.encoder or "random:resnet18",
        image_size=SIDE, max_time=round(60 * o.minutes), upright=False, seed=o.seed,
        num_workers=0, out=str(o.out / "run"), overwrite=True,
    )  # fmt: skip
    model = load_detector(o.out / "run")
    images = images_of(o.data, "test")
    found, _ = detect(model, [str(image) for image in images])
    return {
        image.name: [one.boxes.tolist(), one.scores.tolist(), one.labels.tolist()]
        for image, one in zip(images, found, strict=True)
    }


def torchvision_reference(o: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(o.seed)
    if o.encoder:
        backbone, mean, std = timm_fpn(o.encoder)
    else:
        backbone = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=5,
            norm_layer=torch.nn.BatchNorm2d,
        )  # fmt: skip
        mean = std = None
    model = FasterRCNN(
        backbone, 4, min_size=SIDE * 3 // 4, max_size=SIDE, image_mean=mean, image_std=std
    )

    def read(image: Path) -> Any:
        return decode_image(str(image), ImageReadMode.RGB).float() / 255

    def target(image: Path, width: int, height: int) -> dict[str, Any]:
        file = o.data / "labels" / image.parent.name / f"{image.stem}.txt"
        rows = torch.tensor([[float(n) for n in line.split()] for line in file.open()])
        x, y, w, h = (rows[:, 1:] * torch.tensor([width, height, width, height])).unbind(1)
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)
        return {"boxes": boxes, "labels": rows[:, 0].long() + 1}

    batch, seconds = 8, 60 * o.minutes
    trained = [one for one in model.parameters() if one.requires_grad]
    rate = 0.02 * batch / 16
    optimizer = torch.optim.SGD(trained, rate, momentum=0.9, weight_decay=1e-4)
    names = images_of(o.data, "train")
    pairs = []
    for name in names:
        image = read(name)
        pairs.append((image, target(name, image.shape[2], image.shape[1])))
    warmup = len(pairs) // batch
    model.train()
    started, step = time.perf_counter(), 0
    order: list[int] = []
    while (share := (time.perf_counter() - started) / seconds) < 1:
        if len(order) < batch:
            order = torch.randperm(len(pairs)).tolist()
        chosen, order = order[:batch], order[batch:]
        factor = 0.1 ** ((share > 16 / 26) + (share > 22 / 26))
        factor *= min(1, 0.001 + (step + 1) / warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        inputs, targets = [], []
        for index in chosen:
            image, truth = pairs[index]
            boxes = truth["boxes"]
            if torch.rand(()) < 0.5:
                image, width = image.flip(-1), image.shape[-1]
                boxes = torch.stack(
                    [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
                )
            inputs.append(image)
            targets.append({"boxes": boxes, "labels": truth["labels"]})
        loss = sum(model(inputs, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    model.eval()
    found = {}
    with torch.inference_mode():
        for name in images_of(o.data, "test"):
            (one,) = model([read(name)])
            labels = (one["labels"] - 1).tolist()
            found[name.name] = [one["boxes"].tolist(), one["scores"].tolist(), labels]
    return found


def timm_fpn(folder: str) -> tuple[Any, list[float], list[float]]:
    """A feature pyramid on an encoder folder with frozen BatchNorms, and its mean and std."""
    import timm
    import torch
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
    from torchvision.ops.misc import FrozenBatchNorm2d

    class Pyramid(torch.nn.Module):
        out_channels = 256

        def __init__(self) -> None:
            super().__init__()
            self.body = timm.create_model(
                f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)
            )
            freeze(self.body)
            channels = self.body.feature_info.channels()
            self.fpn = FeaturePyramidNetwork(channels, 256, LastLevelMaxPool())

        def forward(self, images: Any) -> Any:
            return self.fpn({str(level): one for level, one in enumerate(self.body(images))})

    def freeze(module: torch.nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                fixed = FrozenBatchNorm2d(child.num_features, child.eps)
                fixed.load_state_dict(child.state_dict())
                after = [getattr(child, part, torch.nn.Identity()) for part in ("drop", "act")]
                setattr(module, name, torch.nn.Sequential(fixed, *after))
            else:
                freeze(child)

    pyramid = Pyramid()
    found = pyramid.body.pretrained_cfg
    return pyramid, list(found["mean"]), list(found["std"])


def ultralytics_yolo(o: argparse.Namespace) -> dict[str, Any]:
    from ultralytics import YOLO, settings

    settings.update({"sync": False})
    model = YOLO("yolo11n.yaml")
    model.train(
        data=str(o.data / "data.yaml"), imgsz=SIDE, time=o.minutes / 60, device="cpu", workers=0,
        seed=o.seed, project=str(o.out / "run"), exist_ok=True, val=False, plots=False,
        pretrained=False, verbose=False,
    )  # fmt: skip
    best = YOLO(str(o.out / "run" / "train" / "weights" / "last.pt"))
    found = {}
    for name in images_of(o.data, "test"):
        (one,) = best.predict(str(name), imgsz=SIDE, conf=0.001, max_det=100, verbose=False)
        boxes = one.boxes
        labels = boxes.cls.long().tolist()
        found[name.name] = [boxes.xyxy.tolist(), boxes.conf.tolist(), labels]
    return found


def lightly_train_picodet(o: argparse.Namespace) -> dict[str, Any]:
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"
    os.environ["LIGHTLY_TRAIN_CACHE_DIR"] = str(o.out / "cache")
    import lightly_train

    def train(out: Path, steps: int) -> float:
        started = time.perf_counter()
        lightly_train.train_object_detection(
            out=out, model="picodet/s-416", steps=steps, batch_size=8, overwrite=True,
            data={"path": str(o.data), "train": "images/train", "val": "images/val",
                  "names": {0: "Platelets", 1: "RBC", 2: "WBC"}},
            accelerator="cpu", num_workers=0, seed=o.seed, gradient_accumulation_steps=1,
            transform_args={"image_size": (SIDE, SIDE)},
            logger_args={"val_every_num_steps": 10**6},
        )  # fmt: skip
        return time.perf_counter() - started

    few, more = train(o.out / "few", 5), train(o.out / "more", 25)
    per_step = (more - few) / 20
    train(o.out / "run", max(1, math.floor(60 * o.minutes / per_step)))
    model = lightly_train.load_model(o.out / "run" / "exported_models" / "exported_last.pt")
    found = {}
    for name in images_of(o.data, "test"):
        one = model.predict(str(name), threshold=0.001)
        labels = one["labels"].tolist()
        found[name.name] = [one["bboxes"].tolist(), one["scores"].tolist(), labels]
    return found


TOOLS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "ours": ours,
    "torchvision": torchvision_reference,
    "ultralytics": ultralytics_yolo,
    "lightly-train": lightly_train_picodet,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--encoder")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "1"}
    o.data, o.out = o.data.resolve(), o.out.resolve()
    started = time.perf_counter()
    found = TOOLS[o.tool](o)
    taken = (time.perf_counter() - started) / 60
    (o.out / "found.json").write_text(json.dumps({"minutes": round(taken, 2), "found": found}))


if __name__ == "__main__":
    main()
