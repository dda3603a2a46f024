import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vissl_lite.data.turns import UNTURNED, Turn, turns_for
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.transfer.classification.model import Classifier
from vissl_lite.transfer.classification.task import Classification
from vissl_lite.transfer.prediction import Predictions


class ByCorner(Classifier):
    """Classify by the red and green of the whole image, or of its upper left corner."""

    def __init__(self, corner: bool, multi_label: bool = False) -> None:
        super().__init__(build_encoder("test_resnet", 32), ["red", "green"], multi_label)
        self.seen = slice(0, 16 if corner else 32)

    def forward(self, images: Tensor) -> Tensor:
        colors = self.encoder.denormalize(images).float()[:, :2, self.seen, self.seen] / 100
        return colors.mean(dim=(2, 3))


def predicted(model: Classifier, path: Path, turns: tuple[Turn, ...]) -> dict[str, str]:
    (path.parent / "run").mkdir(exist_ok=True)
    todo = Predictions([str(path)], path.parent / "run", 0, lambda _: None, turns)
    file, _ = Classification().predict(model, todo)
    with file.open(newline="") as opened:
        (row,) = csv.DictReader(opened)
    return row


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image that is red at the upper left, green at the upper right, and black below."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16, :16, 0], pixels[:16, 16:, 1] = 100, 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_classifier_that_no_turn_changes_gives_the_same_with_turns(image: Path) -> None:
    model = ByCorner(corner=False)
    assert predicted(model, image, turns_for(False)) == predicted(model, image, UNTURNED)


@pytest.mark.parametrize("upright", [True, False])
def test_probabilities_of_turns_are_averaged(image: Path, upright: bool) -> None:
    model = ByCorner(corner=True)
    corners = torch.tensor([[1.0, 0], [0, 2], [0, 0], [0, 0]])[: 2 if upright else 4]
    mean = corners.softmax(dim=1).mean(dim=0)
    row = predicted(model, image, turns_for(upright))
    assert row["class"] == "green"
    assert float(row["probability"]) == pytest.approx(float(mean[1]), abs=2e-4)


def test_several_labels_are_averaged_one_by_one(image: Path) -> None:
    row = predicted(ByCorner(corner=True, multi_label=True), image, turns_for(True))
    wanted = torch.tensor([[1.0, 0], [0, 2]]).sigmoid().mean(dim=0)
    assert [float(row[name]) for name in ("red", "green")] == pytest.approx(
        wanted.tolist(), abs=2e-4
    )
