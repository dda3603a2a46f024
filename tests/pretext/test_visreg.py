import numpy as np
import pytest
import torch

from vissl_lite.data.view_steps import Solarize
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext import pretext_class
from vissl_lite.pretext.lejepa import LeJEPA
from vissl_lite.pretext.visreg import VISReg


def test_the_head_has_gelus() -> None:
    head = VISReg(build_encoder("test_resnet", 32), hidden_size=8).head
    kinds = [type(layer) for layer in head]
    assert kinds.count(torch.nn.GELU) == 2
    assert torch.nn.ReLU not in kinds


@pytest.mark.parametrize("name", ["lejepa", "visreg"])
def test_each_crop_may_be_solarized(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[int] = []
    monkeypatch.setattr(Solarize, "__call__", lambda step, image, rng: applied.append(1) or image)
    image = np.zeros((80, 80, 3), dtype=np.uint8)
    task = pretext_class(name)(build_encoder("test_resnet", 64), local_crops=3)
    views = task.views()(image, 0, 0, 0)
    assert len(views) == len(applied) == 5


def test_the_weight_decay_of_lejepa_is_smaller_for_cnns() -> None:
    decay = [
        LeJEPA(build_encoder(name, 32)).optimizer_settings.weight_decay
        for name in ("test_vit", "test_resnet")
    ]
    assert decay == [5e-2, 5e-4]


def test_the_regularization_of_lejepa_weighs_less_without_local_crops() -> None:
    small, large = (build_encoder("test_resnet", size) for size in (32, 64))
    assert [LeJEPA(one).lambd for one in (small, large)] == [0.02, 0.05]
    assert LeJEPA(small, local_crops=2).lambd == 0.05
    assert LeJEPA(large, local_crops=0).lambd == 0.02
    assert LeJEPA(large, local_crops=0, lambd=0.3).lambd == 0.3
