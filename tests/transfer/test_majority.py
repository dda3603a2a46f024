"""The accuracy that needs no model, and models that are no better."""

import logging

import numpy as np
import pytest
import torch

from vissl_lite.evaluation.probe import LabelledFeatures, evaluate_features
from vissl_lite.transfer.classification.data import LabelledImages, Part
from vissl_lite.transfer.classification.metrics import score_one
from vissl_lite.transfer.sources.reading_log import ReadingLog


def part(labels: list[int] | list[list[int]]) -> Part:
    return Part([f"{i}.png" for i in range(len(labels))], np.array(labels, np.int64))


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([0, 0, 1], [0, 1, 1, 1], 0.25),  # not the most frequent test class
        ([1, 1, 2, 2], [0, 1, 2, 2], 0.375),  # the mean of two
        ([2, 2, 0], [0, 1], 0.0),
    ],
)
def test_majority(train: list[int], test: list[int], expected: float) -> None:
    data = LabelledImages(["a", "b", "c"], part(train), part([0]), part(test), ReadingLog("data"))
    assert data.majority() == expected


def test_several_labels_have_no_majority() -> None:
    several = part([[0, 1], [1, 1]])
    assert (
        LabelledImages(["a", "b"], several, several, several, ReadingLog("data")).majority() is None
    )


@pytest.mark.parametrize(("last", "warns"), [(0, True), (1, False)])
def test_one_class_for_all_images_is_a_warning(
    last: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, last]), 2).float()
    with caplog.at_level(logging.WARNING, "vissl_lite"):
        score_one(logits, torch.tensor([0, 1, 1]), ["a", "b"])
    codes = [getattr(one, "code", "") for one in caplog.records]
    assert codes == ["prediction.one_class"] * warns


def test_a_probe_tells_whether_it_predicts_one_class() -> None:
    def features(labels: list[int]) -> LabelledFeatures:
        values = np.array([[1.0, label] for label in labels], np.float32)
        return LabelledFeatures({"last": values}, np.array(labels))

    ones = LabelledFeatures({"last": np.ones((4, 2), np.float32)}, np.array([0, 0, 0, 1]))
    assert evaluate_features("knn", ones, ones).one_class == 0
    both = features([0, 1, 0, 1])
    assert evaluate_features("knn", both, both, k=1).one_class is None
