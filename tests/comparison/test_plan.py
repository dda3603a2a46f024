"""What a comparison is about, before anything is trained."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vissl_lite.comparison.options import CompareOptions
from vissl_lite.comparison.plan import Plan
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.errors import UserError
from vissl_lite.sample.dataset import make_sample_data
from vissl_lite.transfer.classification.data import LabelledImages, Part
from vissl_lite.transfer.detection.data import BoxedImage, LabelledBoxes
from vissl_lite.transfer.sources.reading_log import ReadingLog


@pytest.mark.parametrize(
    ("pretrained", "image_size", "expected"),
    [(True, None, 40), (True, 56, 56), (False, None, 64)],
)
def test_an_untrained_encoder_gets_images_of_the_size_of_the_pretrained_one(
    pretrained: bool, image_size: int | None, expected: int, tmp_path: Path
) -> None:
    """Without a pre-trained one, the size of the images, rounded."""
    counts = {"unlabelled": 1, "train": 20, "val": 10, "test": 10}
    make_sample_data(tmp_path / "data", **counts, size=48, processes=1)
    torch.manual_seed(0)
    save_encoder(build_encoder("test_resnet", 40), tmp_path / "encoder", {})
    first = str(tmp_path / "encoder") if pretrained else "random:test_vit"
    plan = Plan(
        CompareOptions(
            encoder=[first, "random:test_resnet"], data=tmp_path / "data" / "labelled",
            out=tmp_path / "run", image_size=image_size,
        )
    )  # fmt: skip
    data = plan.load_data()
    assert plan.load("random:test_resnet", 0, data).image_size == expected
    assert plan.load(first, 0, data).image_size == expected


def test_a_chosen_size_fits_the_patches_of_each_encoder(tmp_path: Path) -> None:
    counts = {"unlabelled": 1, "train": 20, "val": 10, "test": 10}
    make_sample_data(tmp_path / "data", **counts, size=48, processes=1)
    save_encoder(build_encoder("test_resnet", 40), tmp_path / "encoder", {})
    vit = "random:vit_small_patch14_dinov2"
    for first, size in ((str(tmp_path / "encoder"), 42), ("random:test_resnet", 70)):
        plan = Plan(
            CompareOptions(
                encoder=[first, vit], data=tmp_path / "data" / "labelled", out=tmp_path / "run"
            )
        )
        assert plan.load(vit, 0, plan.load_data()).image_size == size


def test_labels_of_whole_groups_are_counted_over_all_seeds() -> None:
    sizes = [1, 2, 4, 8, 16, 32]  # images of each patient
    paths = [f"p{patient}/{i}.png" for patient, size in enumerate(sizes) for i in range(size)]
    reading = ReadingLog("data", groups={path: path.split("/")[0] for path in paths})
    train, none = Part(paths, np.zeros(len(paths), np.int64)), Part([], np.empty(0, np.int64))
    data = LabelledImages(["a"], train, none, none, reading=reading)
    options = CompareOptions(
        encoder=["random:a", "random:b"], data="data", out="run", fractions=[0.01, 1.0], seeds=6
    )
    drawn = [len(data.subsample(0.01, None, seed).train) for seed in range(6)]
    assert len(set(drawn)) > 1
    _, labels = Plan(options).choose_amounts(data)
    assert labels == {"1%": (round(np.mean(drawn)), 0), "100%": (63, 0)}


def test_amounts_that_a_seed_can_not_draw_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """One image in eight has boxes, so that a seed may draw background alone."""
    train = []
    for i in range(64):
        count = int(i % 8 == 0)
        boxes, labels = np.full((count, 4), [0.0, 0, 4, 4]), np.zeros(count, np.int64)
        train.append(BoxedImage(f"{i}.png", (8, 8), boxes, labels, np.zeros(count, bool)))
    data = LabelledBoxes(["a"], train, [], train[:8], reading=ReadingLog("data"))
    options = CompareOptions(
        encoder=["random:a", "random:b"], data="data", out="run", task="detection", seeds=6,
        fractions=[0.02, 0.9],
    )  # fmt: skip
    amounts, _ = Plan(options).choose_amounts(data)
    assert [amount.name for amount in amounts] == ["90%"]
    assert "left out: 2%: with seed 0, --fraction 0.02 has no boxes" in caplog.text
    with pytest.raises(UserError, match="no boxes"):
        Plan(options.replace(fractions=[0.02])).choose_amounts(data)
