"""The loss of guessing is what a collapsed encoder gets."""

from pathlib import Path

import pytest

from tests.conftest import required
from vissl_lite.data.images import find_images
from vissl_lite.data.stream import ViewDataset, collate
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext import PRETEXTS, pretext_class


@pytest.mark.slow
def test_those_that_know_it() -> None:
    encoder = build_encoder("test_resnet", 32)
    made = {
        name: pretext_class(name) for name, one in PRETEXTS.items() if one.info.backbones == "any"
    }
    tasks = {name: one(encoder, **required(name)) for name, one in made.items()}
    known = {name for name, task in tasks.items() if task.chance_loss(8) is not None}
    assert known == {"simclr", "moco_v3", "nnclr"}


@pytest.mark.parametrize("name", ["simclr", "moco_v3", "nnclr"])
@pytest.mark.parametrize("images", [4, 12])
def test_a_collapsed_encoder_gets_it(name: str, images: int, photos: Path) -> None:
    encoder = build_encoder("test_resnet", 32)
    for parameter in encoder.parameters():
        parameter.data.zero_()
    task = pretext_class(name)(encoder)
    dataset = ViewDataset(find_images([photos]), task.views(), seed=0)
    batch = collate([dataset[0, index] for index in range(images)])
    assert task.training_step(batch, 0).item() == pytest.approx(task.chance_loss(images), rel=1e-3)
