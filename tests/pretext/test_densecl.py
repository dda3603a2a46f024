import logging

import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.densecl import DenseCL, correspondence


def test_correspondence_is_the_most_similar_place() -> None:
    map1 = torch.randn(2, 5, 6)
    order = torch.randperm(6)
    assert torch.equal(correspondence(map1, 3 * map1[:, :, order])[0], order.argsort())


@pytest.mark.slow
def test_equal_maps_give_the_dense_loss_its_own_place() -> None:
    """With a teacher that is the student and equal views, every place's key is its own."""
    torch.manual_seed(0)
    task = DenseCL(build_encoder("vit_slim_patch4_32", 32), dense_weight=1.0)
    view = torch.randn(2, 3, 32, 32)
    _, feature_map = task.encoder.pooled_and_map(view)
    places = correspondence(feature_map.flatten(2), feature_map.flatten(2))
    assert torch.equal(places, torch.arange(64).expand(2, -1))


@pytest.mark.slow
def test_a_map_of_one_place_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    task = DenseCL(build_encoder("resnet18", 32))
    views = [torch.randn(4, 3, 32, 32)] * 2
    with caplog.at_level(logging.WARNING):
        task.loss(views)
        task.loss(views)
    assert len(caplog.records) == 1
    assert "has a single location" in caplog.text


def test_a_backbone_of_several_maps_is_refused_before_the_training() -> None:
    with pytest.raises(UserError, match="crossvit_9_240 has several feature maps"):
        DenseCL(build_encoder("crossvit_9_240"))


@pytest.mark.slow
def test_the_weight_mixes_both_losses() -> None:
    losses = []
    for weight in (0.0, 0.25, 1.0):
        torch.manual_seed(0)
        task = DenseCL(build_encoder("test_vit", 64), dense_weight=weight)
        torch.manual_seed(1)
        losses.append(float(task.loss([torch.randn(4, 3, 64, 64) for _ in range(2)])))
    assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-5)
