"""What a comparison is about, before anything is trained."""

from pathlib import Path

import pytest
import torch

from vissl_lite.comparison.options import CompareOptions
from vissl_lite.comparison.plan import Plan
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.sample.dataset import make_sample_data


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
