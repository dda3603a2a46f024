"""Attributes of the acquisition that predict labels."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vissl_lite.transfer.classification.data import load_labelled
from vissl_lite.transfer.shortcuts import find_shortcuts, warn_of_shortcuts


@pytest.mark.parametrize("count", [20, 60, 200, 1000])
def test_random_attributes_are_no_shortcuts(count: int) -> None:
    random = np.random.default_rng(count)
    for _ in range(20 if count < 1000 else 5):
        groups = random.integers(count // 4, size=count)
        classes = int(random.integers(2, 5))
        of_image = random.integers(classes, size=count)
        of_group = random.integers(classes, size=count // 4)[groups]
        values = {
            "maker": random.integers(3, size=count),
            "size": random.integers(count // 2, size=count),
            "scanner": random.integers(5, size=count // 4)[groups],
        }
        attributes = [{name: str(some[i]) for name, some in values.items()} for i in range(count)]
        assert find_shortcuts(attributes, of_image) == []
        assert find_shortcuts(attributes, of_group, groups) == []


def test_an_attribute_that_differs_by_class_is_found() -> None:
    labels = np.repeat([0, 1, 2], [40, 20, 20])
    attributes = [{"size": "big" if label else "small", "maker": "A"} for label in labels]
    (found,) = find_shortcuts(attributes, labels)
    assert (found.attribute, found.majority) == ("size", 0.5)
    assert found.accuracy == pytest.approx(0.75, abs=0.03)


def test_images_of_a_few_groups_are_no_proof() -> None:
    """Two patients of each class with one camera each: held-out patients are not predicted."""
    labels, groups = np.repeat([0, 1, 0, 1], 50), np.repeat([0, 1, 2, 3], 50)
    cameras = [{"camera": str(group)} for group in groups]
    assert find_shortcuts(cameras, labels)[0].accuracy == 1
    assert find_shortcuts(cameras, labels, groups) == []
    one_camera_per_class = [{"camera": str(label)} for label in labels]
    assert find_shortcuts(one_camera_per_class, labels, groups) == []  # four trials


def test_a_value_that_is_missing_is_a_value_and_one_image_is_too_few() -> None:
    labels = np.arange(30) % 2
    attributes = [{"maker": "A"} if label else {} for label in labels]
    assert find_shortcuts(attributes, labels)[0].accuracy == 1
    assert find_shortcuts([{}], np.array([0])) == []


def test_images_whose_size_differs_by_class_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("vissl_lite")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    for part, count in (("train", 16), ("test", 1)):
        for name, size in (("a", 8), ("b", 9)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.zeros((size - i % 3, 8), np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    warn_of_shortcuts(load_labelled(tmp_path, complete=False))
    assert caplog.messages == []  # sizes overlap
    for path in (tmp_path / "train" / "b").iterdir():
        Image.new("L", (16, 16)).save(path)
    warn_of_shortcuts(load_labelled(tmp_path, complete=False))
    assert caplog.messages == [
        "The image size alone predicts the class of 100 % of the training images; the largest "
        "class has 50 %. A model may learn how the images were made instead of what they show."
    ]
    assert getattr(caplog.records[0], "code", "") == "data.shortcut"
