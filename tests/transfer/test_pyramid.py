import logging

import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.transfer.finetuning import TransferModel, TransferSettings, freeze_norms
from vissl_lite.transfer.pyramid import Pyramid, PyramidTraining, freeze_unused, report_use

BACKBONES = ("test_resnet", "test_vit", "test_convnext", "vit_slim_patch4_32")
PARTLY_USED = ("test_vit", "test_convnext", "test_efficientnet", "hrnet_w18_small")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("finest", [4, 8])
def test_maps_have_the_given_strides(backbone: str, finest: int) -> None:
    encoder = build_encoder(backbone, 64)
    pyramid = Pyramid(encoder, 32, finest)
    maps = pyramid(encoder.stages(torch.zeros(2, 3, 64, 96)))
    assert len(maps) == len(pyramid.strides) >= 2
    assert pyramid.strides == sorted(pyramid.strides)
    for level, stride in zip(maps, pyramid.strides, strict=True):
        assert level.shape == (2, 32, 64 // stride, 96 // stride)


def test_maps_finer_than_requested_are_left_out() -> None:
    encoder = build_encoder("test_resnet", 64)
    assert Pyramid(encoder, 32, finest=4).strides == [4, 8, 16, 32]
    assert Pyramid(encoder, 32, finest=8).strides == [8, 16, 32]


@pytest.mark.parametrize("size", [100, 300])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext"])
def test_strides_where_the_image_size_is_no_multiple_of_them(backbone: str, size: int) -> None:
    assert Pyramid(build_encoder(backbone, size), 32).strides == [4, 8, 16, 32]


def test_the_two_coarsest_maps_are_always_kept() -> None:
    encoder = build_encoder("vit_slim_patch4_32", 32)
    assert Pyramid(encoder, 32, finest=8).strides == [4, 8]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_gradient_reaches_the_first_layer(backbone: str) -> None:
    encoder = build_encoder(backbone, 64)
    pyramid = Pyramid(encoder, 32)
    total = sum(level.square().sum() for level in pyramid(encoder.stages(torch.rand(2, 3, 64, 64))))
    assert isinstance(total, torch.Tensor)
    total.backward()
    first = next(encoder.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert all(p.grad is not None for p in pyramid.parameters())


@pytest.mark.parametrize("backbone", ["test_resnet", *PARTLY_USED])
@pytest.mark.parametrize("finest", [4, 8])
def test_what_no_gradient_reaches_is_frozen(backbone: str, finest: int) -> None:
    encoder = build_encoder(backbone, 64)
    pyramid = Pyramid(encoder, 32, finest)
    freeze_unused(encoder, pyramid)
    maps = pyramid(encoder.stages(torch.rand(2, 3, 64, 64)))
    torch.stack([level.sum() for level in maps]).sum().backward()
    trained = [parameter.requires_grad for parameter in encoder.parameters()]
    assert trained == [parameter.grad is not None for parameter in encoder.parameters()]
    assert all(trained) == (backbone not in PARTLY_USED)


def test_frozen_norms_keep_their_statistics_and_their_parameters() -> None:
    encoder = build_encoder("test_resnet", 64)
    encoder.train()
    freeze_norms(encoder)
    norms = {name for name, m in encoder.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert norms
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder(torch.rand(4, 3, 64, 64)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad != (name.rpartition(".")[0] in norms), name
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("images", "asked", "pretrained", "frozen_norm", "frozen"),
    [
        (100, None, True, None, False),
        (5, None, True, None, True),  # the default batch is as small as the training part
        (100, 4, True, None, True),
        (5, None, False, None, False),
        (5, None, True, False, False),
        (100, None, False, True, False),  # it has nothing worth keeping
    ],
)
def test_norms_are_frozen_in_small_batches(
    images: int, asked: int | None, pretrained: bool, frozen_norm: bool | None, frozen: bool
) -> None:
    settings = TransferSettings(batch_size=asked, pretrained=pretrained, frozen_norm=frozen_norm)
    model = TransferModel()
    training = PyramidTraining(model, settings, settings.batch(images, usual=8))
    assert training.freezes_norms == frozen


def test_the_number_of_used_tensors_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("vissl_lite")
    propagate, logger.propagate = logger.propagate, True
    try:
        with caplog.at_level(logging.INFO):
            report_use(build_encoder("test_resnet", 64), "runs/a")
            report_use(build_encoder("test_vit", 64), "runs/b")
    finally:
        logger.propagate = propagate
    # newer versions of pytest capture a record twice if the logger did not propagate before
    resnet, vit = dict.fromkeys(words for words in caplog.messages if "tensors of" in words)
    total = len(list(build_encoder("test_resnet", 64).parameters()))
    assert resnet == f"{total} of the {total} tensors of runs/a are used"
    assert "not used: norm.weight, norm.bias" in vit
