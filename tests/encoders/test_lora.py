"""Low-rank adapters beside the weights of attention layers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.encoders.lora import adapters, add_adapters, merge_adapters
from vissl_lite.errors import UserError

# A layer of queries, keys and values that is called; one whose weight is read; one layer for each.
NARROW = {"num_classes": 0, "img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
MODELS = ["test_vit", "beit_base_patch16_224", "eva02_tiny_patch14_224"]


def made(name: str = "test_vit") -> Encoder:
    args: dict[str, Any] = {} if name == "test_vit" else NARROW
    if "eva" in name:
        args = args | {"img_size": 28}
    model = timm.create_model(name, **{"num_classes": 0, **args})
    return Encoder(model, {}, args.get("img_size", 160)).eval()


def images(encoder: Encoder) -> Tensor:
    return torch.randn(2, 3, encoder.image_size, encoder.image_size)


def trained(encoder: Encoder) -> Encoder:
    """The encoder after a training of its adapters."""
    for _, adapter in adapters(encoder.model):
        nn.init.normal_(adapter.b, std=0.2)
    return encoder


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_same_until_the_adapters_are_trained(name: str) -> None:
    encoder = made(name)
    batch = images(encoder)
    with torch.no_grad():
        before = encoder(batch)
        add_adapters(encoder, 4)
        assert torch.equal(encoder(batch), before)
        for _, adapter in adapters(encoder.model):
            plain = encoder(batch)
            nn.init.normal_(adapter.b, std=0.2)
            assert not torch.allclose(encoder(batch), plain)  # each of them is used


def test_adapters_are_the_product_of_two_factors_beside_a_weight() -> None:
    encoder = made()
    attention = [block.attn for block in encoder.model.blocks]
    layers = [layer for one in attention for layer in (one.qkv, one.proj)]
    weights = [layer.weight.detach().clone() for layer in layers]
    add_adapters(encoder, 4)
    trained(encoder)
    assert len(list(adapters(encoder.model))) == len(layers) == 12
    features = torch.randn(5, 64)
    for layer, weight in zip(layers, weights, strict=True):
        update = layer.parametrizations.weight[0]
        assert update.a.shape == (4, 64)
        assert update.b.shape == (len(weight), 4)
        expected = features @ weight.T + features @ update.a.T @ update.b.T + layer.bias
        torch.testing.assert_close(layer(features), expected)


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_give_the_same_features(name: str) -> None:
    encoder, names = made(name), list(made(name).state_dict())
    add_adapters(encoder, 4)
    merged = merge_adapters(trained(encoder))
    assert list(merged.state_dict()) == names
    assert not any(adapters(merged.model))
    assert any(adapters(encoder.model))
    batch = images(encoder)
    with torch.no_grad():
        torch.testing.assert_close(merged(batch), encoder(batch), atol=1e-5, rtol=1e-5)
    assert merge_adapters(merged) is merged


def test_a_copy_that_is_merged_leaves_the_others_as_they_are() -> None:
    """A copy of a parametrized layer shares its class with it."""
    encoder = made()
    add_adapters(encoder, 4)
    teacher = copy.deepcopy(encoder)
    trained(encoder)
    merge_adapters(teacher)
    batch = images(encoder)
    with torch.no_grad():
        assert not torch.allclose(encoder(batch), teacher(batch))
        assert torch.equal(merge_adapters(teacher)(batch), teacher(batch))


def test_the_folder_of_merged_weights_is_plain_timm(tmp_path: Path) -> None:
    encoder = build_encoder("test_vit", 32).eval()
    add_adapters(encoder, 4)
    save_encoder(merge_adapters(trained(encoder)), tmp_path, {})
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    batch = images(encoder)
    with torch.no_grad():
        torch.testing.assert_close(plain(batch), encoder(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "rank", "message"),
    [
        ("test_resnet", 4, "lora:4: test_resnet has no attention layers .* --train blocks:1"),
        ("test_vit", 64, "have 64 features, and the rank must be lower: try lora:16"),
    ],
)
def test_what_can_not_be_adapted(backbone: str, rank: int, message: str) -> None:
    encoder = build_encoder(backbone, 32)
    with pytest.raises(UserError, match=message):
        add_adapters(encoder, rank)
    assert list(encoder.state_dict()) == list(build_encoder(backbone, 32).state_dict())
