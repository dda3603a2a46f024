"""Masks of confident pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vissl_lite.errors import UserError
from vissl_lite.transfer.confidence import Cutoff
from vissl_lite.transfer.segmentation.data import LabelledMasks
from vissl_lite.transfer.segmentation.pseudo_labels import confident_mask, read_pseudo_labels
from vissl_lite.transfer.sources.reading_log import ReadingLog


def test_uncertain_pixels_are_ignored() -> None:
    first = np.array([[0.99, 0.6], [0.5, 0.05]], np.float32)
    probabilities = np.stack([first, 1 - first])
    cutoff = Cutoff(0.9, 1.0, 0, 0, 1.0, 1.0)
    assert confident_mask(probabilities, cutoff).tolist() == [[0, 255], [255, 1]]
    raised = Cutoff(0.9, 1.0, 0, 0, 1.0, 1.0, {1: 0.96})
    assert confident_mask(probabilities, raised).tolist() == [[0, 255], [255, 255]]
    # at temperature 2 odds become their square roots: 99 becomes 9.9, 19 becomes 4.4
    cutoff = Cutoff(0.9, 2.0, 0, 0, 1.0, 1.0)
    assert confident_mask(probabilities, cutoff).tolist() == [[0, 255], [255, 255]]


def test_masks_are_read_with_the_classes_of_the_data(tmp_path: Path) -> None:
    data = LabelledMasks(["sky", "road", "car"], [], [], [], ReadingLog("data"))
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    mask = np.array([[0, 1, 1, 255], [0, 0, 1, 255]], np.uint8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    (tmp_path / "pseudo_labels.csv").write_text("path,mask\na.png,mask.png\n")
    (found,) = read_pseudo_labels(tmp_path, data).train
    assert found.classes == (0, 1)
    assert found.mask.read().tolist() == [[1, 0, 0, 255], [1, 1, 0, 255]]
    (tmp_path / "classes.txt").write_text("road\n")
    with pytest.raises(UserError, match="has the value 1, no class"):
        read_pseudo_labels(tmp_path, data)
    (tmp_path / "classes.txt").write_text("road\nsea\n")
    with pytest.raises(UserError, match="the data have no class 'sea'"):
        read_pseudo_labels(tmp_path, data)
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    Image.new("RGB", (5, 2)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="another size"):
        read_pseudo_labels(tmp_path, data)
