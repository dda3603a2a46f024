"""Which boxes become labels."""

import numpy as np
import pytest
import torch

from vissl_lite.transfer.confidence import Cutoff, HeldOut
from vissl_lite.transfer.detection.model import Detections
from vissl_lite.transfer.detection.pseudo_labels import confident_boxes, measure_confidence


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.95, 0.9, 0.2], [True, True, False]),  # 0.2 is not shown to anyone
        ([0.95, 0.6], None),  # 0.6 may be an object that would be trained to be background
        ([0.3, 0.2], None),  # no box at all
        ([], None),
    ],
)
def test_images_with_an_uncertain_box_are_left_out(
    scores: list[float], expected: list[bool] | None
) -> None:
    boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (len(scores), 1))
    found = Detections(boxes, np.array(scores), np.zeros(len(scores), np.int64))
    sure = confident_boxes(found, Cutoff(0.9, 1.0, 0, 0, 1.0, 1.0), 0.5)
    assert (None if sure is None else sure.tolist()) == expected


def test_boxes_of_a_class_that_needs_more_confidence_are_uncertain() -> None:
    boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (2, 1))
    cutoff = Cutoff(0.9, 1.0, 0, 0, 1.0, 1.0, {1: 0.96})
    for label, expected in ((0, [True, True]), (1, None)):
        found = Detections(boxes, np.array([0.97, 0.95]), np.array([0, label]))
        sure = confident_boxes(found, cutoff, 0.5)
        assert (None if sure is None else sure.tolist()) == expected


def test_precision_is_that_of_boxes_and_certainty_that_of_images() -> None:
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.3, 1.0], [0.9, 1.0]])  # and classes
    right = torch.tensor([True, True, False, False])
    found = measure_confidence(HeldOut(scores, right, np.array(["a", "a", "a", "b"])))
    at = found.at(0.5)
    assert (at.predictions, at.images) == (3, 2)
    assert at.precision == pytest.approx(2 / 3)
