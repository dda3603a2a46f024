"""Pictures of predictions: images of bands are as bright as the model gets them."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vissl_lite.data.image_reader import ImageReader
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.plots import Picture
from vissl_lite.transfer.classification import task as classification
from vissl_lite.transfer.classification.data import Part
from vissl_lite.transfer.classification.model import Classifier
from vissl_lite.transfer.detection import task as detection
from vissl_lite.transfer.detection.data import BoxedImage
from vissl_lite.transfer.detection.model import Detections, Detector
from vissl_lite.transfer.prediction import Predictions
from vissl_lite.transfer.segmentation import task as segmentation
from vissl_lite.transfer.segmentation.model import Segmenter

CLASSES = ["a", "b"]
READER = ImageReader(bands=(0,), low=(0.0,), high=(60_000.0,), mean=(0.5,), std=(0.2,))
TASKS = ["classification", "detection", "segmentation"]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """A dark and a bright image of 16 bits, which differ in nothing else."""
    noise = np.random.default_rng(0).integers(0, 1000, (64, 64), np.uint16)
    files = [str(tmp_path / f"{name}.tif") for name in ("a-dark", "b-bright")]
    for file, offset in zip(files, (0, 50_000), strict=True):
        Image.fromarray(noise + np.uint16(offset)).save(file)
    return files


def of_task(name: str) -> tuple[Any, Any]:
    """A task and a model that knows nothing."""
    encoder = build_encoder("test_resnet", 64, reader=READER)
    if name == "classification":
        return classification.Classification(), Classifier(encoder, CLASSES)
    if name == "detection":
        detector = Detector(encoder, CLASSES, "fcos", (64, 64))
        detector.threshold = 2.0  # so that no box is drawn
        return detection.Detection(), detector
    return segmentation.Segmentation(), Segmenter(encoder, classes=CLASSES, channels=16)


@pytest.mark.parametrize("name", TASKS)
def test_predictions_are_drawn_into_images_on_one_scale(
    name: str, paths: list[str], tmp_path: Path
) -> None:
    task, model = of_task(name)
    (tmp_path / "run").mkdir()
    task.predict(model, Predictions(paths, tmp_path / "run", 2, lambda _: None))
    dark, bright = (
        np.asarray(Image.open(file)).mean()
        for file in sorted((tmp_path / "run" / "pictures").iterdir())
    )
    assert bright > dark + 50


@pytest.mark.parametrize("name", TASKS)
def test_test_images_are_on_one_scale(
    name: str, paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model = of_task(name)
    module = {
        "classification": classification, "detection": detection, "segmentation": segmentation
    }[name]  # fmt: skip
    shown: list[Picture] = []

    def keep(rows: Sequence[Sequence[Picture]], *_: object, **__: object) -> None:
        shown.extend(picture for row in rows for picture in row)

    monkeypatch.setattr(module, "plot_grid", keep)
    monkeypatch.setattr(module, "plot_per_class", lambda *_: None)
    monkeypatch.setattr(segmentation, "plot_confusion", lambda *_: None)
    test: Any = Part(paths, np.zeros(2, np.int64))
    if name == "segmentation":
        mask = SimpleNamespace(read=lambda: np.zeros((64, 64), np.uint8))
        test = [SimpleNamespace(path=path, mask=mask) for path in paths]
    none = np.zeros(0)
    boxes, labels = none.reshape(0, 4), none.astype(int)
    truth = [BoxedImage(path, (64, 64), boxes, labels, none.astype(bool)) for path in paths]
    scores = SimpleNamespace(
        confusion=None, per_class={}, images=truth, found=[Detections(boxes, none, labels)] * 2
    )
    data = SimpleNamespace(classes=CLASSES, test=test, multi_label=False)
    task.visualize(model, data, scores, tmp_path)
    half = len(shown) // 2
    dark, bright = (
        np.mean([one.image.mean() for one in part]) for part in (shown[:half], shown[half:])
    )
    assert bright > dark + 50
