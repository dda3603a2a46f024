import pytest
import timm
import torch

import vissl_lite.encoders.backbones  # noqa: F401  # registers them

NAMES = ["resnet18_cifar", "resnet34_cifar", "resnet50_cifar"]
every_name = pytest.mark.parametrize("name", NAMES)


@every_name
def test_timm_makes_it_by_name(name: str) -> None:
    assert timm.is_model(name)
    model = timm.create_model(name, num_classes=10)
    assert model.pretrained_cfg["architecture"] == name
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


def test_the_first_stage_keeps_the_resolution_and_the_last_reduces_it_eight_times() -> None:
    model = timm.create_model("resnet18_cifar", num_classes=0).eval()
    sides = {}
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        hook = lambda _, __, out, name=name: sides.update({name: tuple(out.shape[-2:])})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    assert sides == {
        "conv1": (32, 32), "maxpool": (32, 32), "layer1": (32, 32), "layer2": (16, 16),
        "layer3": (8, 8), "layer4": (4, 4),
    }  # fmt: skip


@every_name
def test_feature_info_is_true_to_the_shapes(name: str) -> None:
    model = timm.create_model(name, features_only=True).eval()
    maps = model(torch.zeros(1, 3, 32, 32))
    assert [32 // m.shape[-1] for m in maps] == model.feature_info.reduction() == [1, 1, 2, 4, 8]
    assert [m.shape[1] for m in maps] == model.feature_info.channels()


@pytest.mark.parametrize(("name", "millions"), list(zip(NAMES, (11.2, 21.3, 23.5), strict=True)))
def test_it_is_as_large_as_its_docstring_says(name: str, millions: float) -> None:
    model = timm.create_model(name, num_classes=0)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert round(size / 1e6, 1) == millions
    assert f"{millions} million" in (timm.model_entrypoint(name).__doc__ or "")


@pytest.mark.slow
def test_it_differs_from_timms_resnet_in_the_stem_alone() -> None:
    small = timm.create_model("resnet18_cifar").state_dict()
    plain = timm.create_model("resnet18").state_dict()
    assert list(small) == list(plain)
    assert [k for k in small if small[k].shape != plain[k].shape] == ["conv1.weight"]


def test_other_numbers_of_channels_work() -> None:
    model = timm.create_model("resnet18_cifar", in_chans=1, num_classes=3)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


def test_the_slim_one_is_half_as_wide_and_configured(caplog: pytest.LogCaptureFixture) -> None:
    slim, full = (timm.create_model(n, num_classes=0) for n in ("resnet10t_slim", "resnet10t"))
    assert not caplog.records  # timm warns of a model without configuration
    assert slim.num_features * 2 == full.num_features == 512
    assert slim.feature_info[-1]["num_chs"] == 256
