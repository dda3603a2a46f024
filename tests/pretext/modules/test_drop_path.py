import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.encoders.folder import load_encoder, save_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext import pretext_class
from vissl_lite.pretext.modules.drop_path import add_drop_path


def rates(module: nn.Module) -> dict[str, float]:
    return {n: one.drop_prob for n, one in module.named_modules() if isinstance(one, DropPath)}


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_rates_are_those_of_timm(backbone: str) -> None:
    encoder = build_encoder(backbone, 32)
    add_drop_path(encoder, 0.2)
    assert rates(encoder.model) == rates(timm.create_model(backbone, drop_path_rate=0.2))
    assert max(rates(encoder.model).values()) == pytest.approx(0.2)


def test_it_is_random_in_training_alone_and_not_saved(tmp_path: Path) -> None:
    plain = build_encoder("test_vit", 32)
    encoder = copy.deepcopy(plain)
    add_drop_path(encoder, 0.9)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(encoder.train()(images), encoder(images))
        torch.testing.assert_close(encoder.eval()(images), plain.eval()(images))
    save_encoder(encoder, tmp_path, {})
    assert not rates(load_encoder(tmp_path))


def test_by_default_transformers_have_a_tenth_and_others_none() -> None:
    vit, cnn = build_encoder("test_vit", 32), build_encoder("test_resnet", 32)
    for encoder in (vit, cnn):
        add_drop_path(encoder, None)
    assert max(rates(vit).values()) == pytest.approx(0.1)
    assert not rates(cnn)


@pytest.mark.parametrize(
    ("name", "backbone"), [("dino", "test_vit"), ("lejepa", "test_vit"), ("spark", "test_resnet")]
)
def test_pretexts_train_with_the_rate_that_is_given(name: str, backbone: str) -> None:
    task = pretext_class(name)(build_encoder(backbone, 32), drop_path=0.3).train()
    assert max(rates(task.encoder).values()) == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_a_teacher_has_none(name: str) -> None:
    task = pretext_class(name)(build_encoder("test_vit", 32), drop_path=0.3)
    assert max(rates(task.encoder).values()) == pytest.approx(0.3)
    assert not rates(task.teacher_encoder)


def test_zero_also_takes_away_what_a_backbone_has_by_default() -> None:
    encoder = build_encoder("test_vit", 32)
    add_drop_path(encoder, 0.3)
    add_drop_path(encoder, 0)
    assert set(rates(encoder.model).values()) == {0.0}


def test_a_rate_among_the_arguments_of_the_model_is_replaced() -> None:
    model = timm.create_model("test_vit", num_classes=0, img_size=32, drop_path_rate=0.5)
    encoder = Encoder(model, {"img_size": 32, "drop_path_rate": 0.5}, 32)
    add_drop_path(encoder, 0.2)
    assert max(rates(encoder.model).values()) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("backbone", "rate", "message"),
    [
        ("dla46_c", 0.1, "timm has no stochastic depth for dla46_c"),
        ("test_vit", 1.5, r"--pretext.drop_path 1.5 must be in \[0, 1\]"),
    ],
)
def test_mistakes(backbone: str, rate: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_drop_path(build_encoder(backbone, 32), rate)
