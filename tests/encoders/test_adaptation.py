"""Encoders of images with other bands than those of photographs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.image_survey import ImageSet
from vissl_lite.encoders.encoder import Encoder, adapt_encoder, build_encoder
from vissl_lite.encoders.folder import load_encoder, save_encoder
from vissl_lite.errors import UserError


def reader(bands: int, **given: Any) -> ImageReader:
    return ImageReader(
        **{
            "bands": tuple(range(bands)),
            "low": (-50.0,) * bands,
            "high": (150.0,) * bands,
            "mean": (0.25,) * bands,
            "std": (0.125,) * bands,
            **given,
        }
    )


FIRST = "conv1.0"  # first convolution of test_resnet


def first_weight(encoder: Encoder) -> Tensor:
    return encoder.model.state_dict()[f"{FIRST}.weight"]


def test_normalization_of_bands() -> None:
    encoder = build_encoder("test_resnet", 32, reader=reader(5)).eval()
    raw = torch.full((1, 5, 32, 32), 0.5 * 65535).to(torch.uint16)
    assert torch.allclose(encoder.normalize(raw), torch.tensor(2.0), atol=1e-3)
    assert encoder(encoder.normalize(raw)).shape == (1, encoder.num_features)
    picture = encoder.denormalize(encoder.normalize(raw))
    assert picture.shape == (1, 3, 32, 32)
    assert picture.unique().tolist() == [127]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_folder_of_an_encoder_of_bands(tmp_path: Path, name: str) -> None:
    encoder = build_encoder(name, 64, reader=reader(4, names=("b2", "b3", "b4", "b8"))).eval()
    save_encoder(encoder, tmp_path / "e", {"pretext": "simclr"})
    loaded = load_encoder(tmp_path / "e").eval()
    assert loaded.reader == encoder.reader
    images = torch.randn(2, 4, 64, 64)
    assert (loaded(images) == encoder(images)).all()
    plain = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True, num_classes=0).eval()
    assert (plain(images) == encoder(images)).all()
    assert plain.pretrained_cfg["mean"] == [0.25] * 4


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_bright_pixels_of_16_bits_are_finite_in_half_precision(kind: torch.dtype) -> None:
    encoder = build_encoder("test_resnet", 32, reader=reader(1))
    images = torch.tensor([0, 1000, 65535], dtype=torch.uint16).expand(1, 1, 3, 3)
    expected = encoder.normalize(images)
    found = encoder.to(kind).normalize(images)
    assert found.dtype == kind
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.01)


def test_a_folder_whose_bands_contradict_is_damaged(tmp_path: Path) -> None:
    save_encoder(build_encoder("test_resnet", 32, reader=reader(2)), tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    config["vissl_lite"]["reader"]["low"] = [0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json is damaged: low is not a list of 2"):
        load_encoder(tmp_path)


def test_weights_are_adapted_by_name_or_by_their_mean() -> None:
    encoder = build_encoder("test_resnet", 32, reader=reader(3, names=("red", "green", "nir")))
    adapted = adapt_encoder(encoder, reader(4, names=("nir", "red", "swir", "blue")))
    old, new = (first_weight(one) for one in (encoder, adapted))
    literal = [old[:, 2], old[:, 0], old.mean(dim=1), old.mean(dim=1)]
    for band, weight in enumerate(literal):
        assert torch.allclose(new[:, band], weight * 3 / 4)
    before, after = (one.model.state_dict() for one in (encoder, adapted))
    others = [name for name in before if name != f"{FIRST}.weight"]
    assert others
    assert all(torch.equal(before[name], after[name]) for name in others)
    swapped = adapt_encoder(encoder, reader(3, names=("nir", "green", "red")))
    assert torch.equal(first_weight(swapped), old.flip(1))
    photographs = build_encoder("test_resnet", 32)
    bands = adapt_encoder(photographs, reader(4, names=("blue", "green", "red", "nir")))
    rgb = first_weight(photographs)
    for band, weight in enumerate((rgb[:, 2], rgb[:, 1], rgb[:, 0], rgb.mean(dim=1))):
        assert torch.allclose(first_weight(bands)[:, band], weight * 3 / 4)
    unnamed = adapt_encoder(encoder, reader(3, names=("a", "b", "c")))  # as of photographs
    assert torch.equal(first_weight(unnamed), old)
    one = adapt_encoder(build_encoder("test_vit", 32), reader(1))
    assert one.model(torch.zeros(1, 1, 32, 32)).shape == (1, one.num_features)
    assert one.mean == (0.25,)
    back = adapt_encoder(one, PHOTOGRAPHS)
    assert (back.reader, len(back.mean)) == (PHOTOGRAPHS, 3)


@pytest.mark.parametrize(
    ("before", "after", "is_adapted"),
    [
        ("", "a b c d", True),
        ("", "red green blue nir", True),
        ("red green nir", "red green swir", True),
        ("red green nir", "nir red", False),
        ("red green nir", "nir green red", False),
        ("", "blue green red", False),
        ("", "a b c", False),  # the filters of the file, in its order
        ("", "a", False),  # with the sum of the filters, as a gray image has
    ],
)
def test_filters_that_are_not_those_of_the_file_are_known(
    before: str, after: str, is_adapted: bool
) -> None:
    """Before there are photographs, where no names are given."""
    known = reader(3, names=tuple(before.split())) if before else PHOTOGRAPHS
    names = tuple(after.split())
    encoder = build_encoder("test_resnet", 32, reader=known)
    adapted = adapt_encoder(encoder, reader(len(names), names=names))
    assert adapted.adapted_inputs == ({f"{FIRST}.weight"} if is_adapted else set())
    again = adapt_encoder(adapted, adapted.reader)
    assert again.adapted_inputs == adapted.adapted_inputs


def test_bands_without_any_names_have_filters_that_are_not_those_of_the_file() -> None:
    adapted = adapt_encoder(build_encoder("test_vit", 32), reader(4))
    assert adapted.adapted_inputs == {"patch_embed.proj.weight"}
    assert adapt_encoder(adapted, reader(1)).adapted_inputs == set()


def test_a_single_band_is_seen_like_a_gray_image() -> None:
    """So its filters need no training."""
    encoder = build_encoder("test_vit", 32).eval()
    one = adapt_encoder(encoder, reader(1)).eval()
    images = torch.randn(2, 1, 32, 32)
    expected = encoder(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(one(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("bands", "is_adapted"), [(1, False), (2, True), (3, False), (5, True)])
def test_filters_that_timm_has_adapted_are_known(
    bands: int, is_adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = timm.create_model("test_vit").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: {**state})
    monkeypatch.setattr("vissl_lite.encoders.encoder._online", lambda: False)
    encoder = build_encoder("test_vit", 32, pretrained=True, reader=reader(bands))
    assert encoder.adapted_inputs == ({"patch_embed.proj.weight"} if is_adapted else set())
    weights = encoder.model.state_dict()
    assert torch.equal(weights["blocks.5.mlp.fc2.weight"], state["blocks.5.mlp.fc2.weight"])
    is_equal = torch.equal(weights["patch_embed.proj.weight"], state["patch_embed.proj.weight"])
    assert is_equal == (bands == 3)
    assert not build_encoder("test_vit", 32, reader=reader(bands)).adapted_inputs


def test_bands_without_a_name_of_their_own_get_the_mean() -> None:
    names = ("red", "", "", "ir", "ir")
    encoder = build_encoder("test_resnet", 32, reader=reader(5, names=names))
    adapted = adapt_encoder(encoder, reader(3, names=("red", "", "ir")))
    old, new = (first_weight(one) for one in (encoder, adapted))
    for band, weight in enumerate((old[:, 0], old.mean(dim=1), old.mean(dim=1))):
        assert torch.allclose(new[:, band], weight * 5 / 3)


def test_an_encoder_takes_the_reader_of_its_images(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((16, 16, 6)).astype(np.float32) * 300
    np.save(tmp_path / "a.npy", values)
    images = ImageSet([f"{tmp_path}/a.npy"])
    fresh = load_encoder("random:test_resnet", 32, images)
    assert fresh.reader.channels == 6
    save_encoder(fresh, tmp_path / "six", {})
    save_encoder(build_encoder("test_resnet", 32), tmp_path / "three", {})
    assert load_encoder(tmp_path / "six", None, images).reader == fresh.reader
    adapted = load_encoder(tmp_path / "three", None, images)
    assert adapted.reader == fresh.reader
    assert first_weight(adapted).shape[1] == 6
