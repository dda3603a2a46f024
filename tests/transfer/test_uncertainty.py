"""How uncertain models are of images, by task."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import blobs
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.transfer.classification.model import margin_uncertainty
from vissl_lite.transfer.detection import task as detection
from vissl_lite.transfer.detection.model import Detections
from vissl_lite.transfer.segmentation.model import Segmenter, segment
from vissl_lite.transfer.tasks import TASKS


def test_of_classes_it_is_the_margin() -> None:
    found = torch.tensor([[0.7, 0.1, 0.2], [0.5, 0.5, 0.0]])
    assert margin_uncertainty(found, False).tolist() == pytest.approx([0.5, 1.0])
    several = torch.tensor([[0.5, 1.0], [0.9, 0.2]])
    assert margin_uncertainty(several, True).tolist() == pytest.approx([0.5, 0.3])


def test_of_boxes_it_is_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*scores: float) -> Detections:
        count = len(scores)
        boxes = np.zeros((count, 4), np.float32)
        return Detections(boxes, np.array(scores), np.zeros(count, np.int64))

    good = np.array([True, False, True])

    def detect(model: Any, paths: list[str], use: Any, advance: Any) -> np.ndarray:
        use(paths[:1], [found(0.5, 0.9)], [(8, 8)])
        use(paths[1:], [found()], [(8, 8)])
        return good

    monkeypatch.setattr(detection, "detect_in_batches", detect)
    uncertainty, read = TASKS["detection"].uncertainty(
        None, 1.0, ["a", "b", "c"], lambda done: None
    )
    assert uncertainty.tolist() == pytest.approx([1.2, 0.0])
    assert read is good


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_of_pixels_it_is_the_mean_margin(temperature: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Segmenter(build_encoder("test_resnet", 32), ["background", "a", "b"], 8)
    paths = [str(tmp_path / name) for name in ("0.png", "broken.png", "1.png")]
    blobs(0, 32, 32).save(paths[0])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    blobs(1, 32, 48).save(paths[2])
    task = TASKS["segmentation"]
    uncertainty, read = task.uncertainty(model, temperature, paths, lambda done: None)
    assert read.tolist() == [True, False, True]
    for index, path in enumerate((paths[0], paths[2])):
        powers = segment(model, model.encoder.reader.read(path)) ** (1 / temperature)
        ordered = np.sort(powers / powers.sum(axis=0), axis=0)
        expected = 1 - (ordered[-1] - ordered[-2]).mean()
        assert uncertainty[index] == pytest.approx(expected, abs=1e-4)
