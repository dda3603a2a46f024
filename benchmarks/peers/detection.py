"""BCCD, blood cells: detectors of four tools, each with its own recipe, for equal minutes.

    python -m benchmarks.peers.detection --data DATA/bccd --domains DOMAINS --ours RUN --out OUT \
        --peer_python PEERS/bin/python --ultralytics_python ULTRALYTICS/bin/python --minutes 5

``DOMAINS`` is what ``benchmarks.accuracy.domains`` lays out, ``RUN`` a pre-training by us on crops
of the training images (``benchmarks.accuracy.transfer pretrain bccd``). The tools take turns, each
for the same wall-clock minutes (``detect_with.py`` says how each is run). What they find in the
test images is scored by the same code (torchmetrics). Runs that are there are kept.

``ultralytics`` needs an environment of its own: ``pip install ultralytics``, with the versions of
torch and torchvision of ``requirements.txt``.

Results: benchmarks/results/peers_detection.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torchmetrics.detection import MeanAveragePrecision

from benchmarks.common import ROOT, keep, load, markdown_table, over_seeds, provenance

CLASSES = ("Platelets", "RBC", "WBC")

# Name of a row: tool, and the encoder that it starts from.
ARMS = {
    "vissl_lite, Faster R-CNN, `resnet18`, untrained": ("ours", None),
    "vissl_lite, Faster R-CNN, `resnet18`, pre-trained by us": ("ours", "ours"),
    "torchvision, Faster R-CNN, `resnet18`, untrained": ("torchvision", None),
    "ultralytics, `yolo11n`, untrained": ("ultralytics", None),
    "lightly-train, `picodet/s`, untrained": ("lightly-train", None),
    "vissl_lite, Faster R-CNN, `tf_efficientnet_lite0`, ImageNet": ("ours", "ImageNet"),
    "torchvision, Faster R-CNN, `tf_efficientnet_lite0`, ImageNet": ("torchvision", "ImageNet"),
}


def lay_out(bccd: Path, out: Path) -> None:
    """Write BCCD as a YOLO data set, without the two boxes that have no area."""
    if (out / "data.yaml").exists():
        return
    for part in ("train", "val", "test"):
        for kind in ("images", "labels"):
            (out / kind / part).mkdir(parents=True, exist_ok=True)
        for name in (bccd / "ImageSets" / "Main" / f"{part}.txt").read_text().split():
            image = bccd / "JPEGImages" / f"{name}.jpg"
            (out / "images" / part / image.name).symlink_to(image.resolve())
            lines = []
            for x1, y1, x2, y2, label in boxes_of(bccd / "Annotations" / f"{name}.xml"):
                width, height = Image.open(image).size
                x, w = (x1 + x2) / 2 / width, (x2 - x1) / width
                y, h = (y1 + y2) / 2 / height, (y2 - y1) / height
                lines.append(f"{label} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n")
            (out / "labels" / part / f"{name}.txt").write_text("".join(lines))
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(CLASSES))
    parts = "".join(f"{part}: images/{part}\n" for part in ("train", "val", "test"))
    (out / "data.yaml").write_text(f"path: {out.resolve()}\n{parts}names:\n{names}")


def boxes_of(annotation: Path) -> list[tuple[float, float, float, float, int]]:
    """Boxes x1, y1, x2, y2 and classes of a Pascal VOC file."""
    found = []
    for one in ElementTree.parse(annotation).iter("object"):
        x1, y1, x2, y2 = (
            float(one.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")
        )
        if x2 > x1 and y2 > y1:
            found.append((x1, y1, x2, y2, CLASSES.index(one.findtext("name", ""))))
    return found


def score(bccd: Path, found: dict[str, Any]) -> dict[str, float]:
    """Mean average precision on the test images, as COCO computes it."""
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    for name, (boxes, scores, labels) in found.items():
        truth = np.array(boxes_of(bccd / "Annotations" / f"{Path(name).stem}.xml"))
        metric.update(
            [
                {
                    "boxes": torch.tensor(boxes).reshape(-1, 4),
                    "scores": torch.tensor(scores),
                    "labels": torch.tensor(labels, dtype=torch.long),
                }
            ],
            [
                {
                    "boxes": torch.from_numpy(truth[:, :4]).float(),
                    "labels": torch.from_numpy(truth[:, 4]).long(),
                }
            ],
        )
    values = metric.compute()
    return {"map": float(values["map"]), "map_50": float(values["map_50"])}


def run(arm: str, seed: int, o: argparse.Namespace) -> dict[str, float]:
    tool, start = ARMS[arm]
    out = o.out / f"{tool}-{start or 'untrained'}-{seed}"
    file = out / "found.json"
    if not file.exists():
        python = {"ours": sys.executable, "ultralytics": o.ultralytics_python}
        words = [python.get(tool, o.peer_python), ROOT / "benchmarks" / "peers" / "detect_with.py"]
        words += [tool, "--data", o.out / "bccd-yolo", "--out", out]
        words += ["--minutes", o.minutes, "--seed", seed]
        if start:
            encoder = {"ours": o.ours, "ImageNet": o.domains / "lite0"}[start]
            if tool != "ours" and (encoder / "encoder").exists():
                encoder = encoder / "encoder"
            words += ["--encoder", encoder.resolve()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([str(word) for word in words], check=True, env=environment)
    found = json.loads(file.read_text())
    return {**score(o.data, found["found"]), "minutes": found["minutes"]}


def peers_detection_table() -> str:
    results = load("peers_detection")
    rows = []
    for arm in ARMS:
        if arm in results["arms"]:
            runs = list(results["arms"][arm].values())
            figures = [over_seeds([one[name] for one in runs]) for name in ("map_50", "map")]
            rows.append([arm, *figures, str(len(runs))])
    command = (
        "python -m benchmarks.peers.detection --data DATA/bccd --domains DOMAINS --ours RUN --out "
        f"OUT --peer_python PYTHON --ultralytics_python PYTHON --minutes {results['minutes']:g}"
    )
    header = ["tool", "test mAP50", "test mAP", "seeds"]
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {"peers_detection": peers_detection_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--domains", type=Path, required=True)
    parser.add_argument("--ours", type=Path, required=True, help="a run of pretrain")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer_python", required=True)
    parser.add_argument("--ultralytics_python", required=True)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    o = parser.parse_args()
    lay_out(o.data, o.out / "bccd-yolo")
    found: dict[str, dict[str, Any]] = {}
    for seed in o.seeds:
        for arm in o.arms:
            found.setdefault(arm, {})[str(seed)] = run(arm, seed, o)
            print(arm, seed, found[arm][str(seed)], flush=True)
    keep("peers_detection", {"arms": found, "minutes": o.minutes})


if __name__ == "__main__":
    main()
