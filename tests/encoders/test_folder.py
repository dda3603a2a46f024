"""State dict files, and folders of the hub, which are converted as timm converts its weights."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vissl_lite.data.image_reader import PHOTOGRAPHS
from vissl_lite.data.image_survey import ImageSet
from vissl_lite.encoders.encoder import Encoder, adapt_encoder, build_encoder
from vissl_lite.encoders.folder import (
    encoder_for,
    encoder_from_file,
    fitting_size,
    load_encoder,
    load_weights,
    save_encoder,
)
from vissl_lite.errors import UserError

# Small models of several architectures whose tensors depend on the image size
SMALL: dict[str, dict[str, int]] = {
    "test_coatnet": {},
    "beit_base_patch16_224": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "eva02_tiny_patch14_224": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24},
}
# Sizes in pixels of their weights and of their images, by patch
BEFORE, AFTER = {14: 112, 16: 128}, {14: 56, 16: 64}
every_model = pytest.mark.parametrize("name", SMALL)


def sizes(name: str) -> tuple[int, int]:
    patch = 14 if "patch14" in name else 16
    return BEFORE[patch], AFTER[patch]


def with_random_tables(model: Any, seed: int = 0) -> Any:
    """Fill all weights, as many tables of positions start with zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def as_timm_loads(file: Path, name: str, **arguments: Any) -> dict[str, Tensor]:
    """Weights of a file after timm has loaded them in place of those of the hub."""
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
        num_classes=0,
        **arguments,
    )
    return model.state_dict()


def assert_same(found: Any, expected: dict[str, Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, msg=key)


def six_bands(folder: Path) -> ImageSet:
    values = np.random.default_rng(0).random((16, 16, 6)).astype(np.float32) * 300
    np.save(folder / "six.npy", values)
    return ImageSet([f"{folder}/six.npy"])


@every_model
def test_tables_of_positions_in_a_file_are_resampled_as_by_timm(name: str, tmp_path: Path) -> None:
    (before, after), arguments = sizes(name), SMALL[name]
    plain = with_random_tables(timm.create_model(name, img_size=before, **arguments))
    torch.save(plain.state_dict(), tmp_path / "w.pt")
    model = timm.create_model(name, num_classes=0, img_size=after, **arguments)
    load_weights(Encoder(model, {}, after), tmp_path / "w.pt")
    assert_same(model, as_timm_loads(tmp_path / "w.pt", name, img_size=after, **arguments))


def test_weights_in_metas_format_of_dinov3_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"num_classes": 0, "img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_small_patch16_dinov3", **arguments)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    given = {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.zeros(4)}
    given["blocks.0.attn.qkv.bias"] = torch.zeros(96)  # which timm's model does not have
    for name, value in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        given[name] = value
    torch.save(given, tmp_path / "dinov3.pth")
    load_weights(Encoder(model, {}, 64), tmp_path / "dinov3.pth")
    assert_same(model, state)
    assert capsys.readouterr().out == ""


def test_a_file_of_photographs_is_adapted_to_bands_as_a_folder_is(tmp_path: Path) -> None:
    photographs, images = build_encoder("test_resnet", 32), six_bands(tmp_path)
    torch.save(photographs.model.state_dict(), tmp_path / "w.pt")
    encoder = encoder_from_file(tmp_path / "w.pt", "test_resnet", 32, images)
    assert encoder.reader == images.reader
    assert_same(encoder.model, adapt_encoder(photographs, images.reader).model.state_dict())
    save_encoder(encoder, tmp_path / "again", {})
    assert_same(load_encoder(tmp_path / "again").model, encoder.model.state_dict())


def test_a_file_of_as_many_bands_as_the_images_is_left_as_it_is(tmp_path: Path) -> None:
    images = six_bands(tmp_path)
    before = build_encoder("test_resnet", 32, reader=images.reader).model.state_dict()
    torch.save(before, tmp_path / "w.pt")
    assert_same(encoder_from_file(tmp_path / "w.pt", "test_resnet", 32, images).model, before)


@pytest.mark.parametrize("channels", [1, 5])
def test_a_file_of_other_bands_is_adapted_to_photographs(channels: int, tmp_path: Path) -> None:
    before = timm.create_model("test_resnet", in_chans=channels).state_dict()
    torch.save(before, tmp_path / "w.pt")
    encoder = encoder_from_file(tmp_path / "w.pt", "test_resnet", 32)
    expected = before["conv1.0.weight"].mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    found = encoder.model.state_dict()["conv1.0.weight"]
    torch.testing.assert_close(found, expected * channels / 3)
    assert (encoder.reader, len(encoder.mean)) == (PHOTOGRAPHS, 3)


def test_weights_that_do_not_fit_name_the_options_to_check(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"not those of test_resnet: .*--backbone.*--image_size"):
        encoder_from_file(tmp_path / "w.pt", "test_resnet", 32)


def test_large_patches_are_refused_before_they_are_resampled(tmp_path: Path) -> None:
    """Resampling patches of 1000 pixels to 16 takes gigabytes and hours."""
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(1, 1, 1000, 1000)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"1 of another shape, the first patch_embed.proj.weight"):
        encoder_from_file(tmp_path / "w.pt", "test_vit", 160)


# Folders of the hub


def hub_folder(folder: Path, name: str, size: int, **arguments: int) -> Path:
    arguments = {"img_size": size, **arguments}
    model = with_random_tables(timm.create_model(name, **arguments))
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return folder


@every_model
def test_folders_of_the_hub_are_built_for_a_size_as_by_timm(name: str, tmp_path: Path) -> None:
    before, after = sizes(name)
    folder = hub_folder(tmp_path / "hub", name, before, **SMALL[name])
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, before, before]
    (folder / "config.json").write_text(json.dumps(config))
    assert fitting_size(str(folder), after) == after
    encoder = encoder_for(str(folder), after)
    assert encoder.image_size == after
    weights = folder / "model.safetensors"
    assert_same(encoder.model, as_timm_loads(weights, name, img_size=after, **SMALL[name]))
    save_encoder(encoder, tmp_path / "ours", {})
    assert_same(load_encoder(tmp_path / "ours").model, encoder.model.state_dict())
    assert encoder_for(str(folder), None).image_size == before


def test_tensors_that_timm_no_longer_saves_are_left_out(tmp_path: Path) -> None:
    """Files of the hub hold indices of positions, which models compute since."""
    name = "beit_base_patch16_224"
    folder = hub_folder(tmp_path, name, 224, **SMALL[name])
    expected = load_encoder(folder).model.state_dict()
    state = load_file(folder / "model.safetensors")
    state["blocks.0.attn.relative_position_index"] = torch.zeros(197, 197, dtype=torch.int64)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(load_encoder(folder).model, expected)


def test_folders_of_the_hub_that_have_one_size_keep_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """timm does not resample the tables of LeViT, nor does it load them at another size."""
    timm.models.save_for_hf(timm.create_model("levit_128s"), tmp_path, safe_serialization=True)
    caplog.set_level(logging.INFO)
    assert fitting_size(str(tmp_path), 96) == 224
    assert "can't be built for 96 pixels" in caplog.text
    assert "used at its own size of 224 pixels" in caplog.text
    assert encoder_for(str(tmp_path), 224).image_size == 224
    with pytest.raises(UserError, match=r"can't be built for 96 pixels: .*give --image_size 224"):
        encoder_for(str(tmp_path), 96)


def test_sizes_that_are_no_multiple_of_the_patch_name_one_that_is(tmp_path: Path) -> None:
    name = "eva02_tiny_patch14_224"
    folder = hub_folder(tmp_path, name, 224, **SMALL[name])
    assert fitting_size(str(folder), 64) == 70
    with pytest.raises(UserError, match=r"can't be built for 64 pixels: .*; 70 pixels fit"):
        encoder_for(str(folder), 64)


def test_a_damaged_folder_of_the_hub_is_a_mistake_for_any_size(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path, "test_coatnet", 160)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "test_maxvit"}))
    for size in (64, None):
        with pytest.raises(UserError, match="not those of test_maxvit"):
            encoder_for(str(folder), size)
    with pytest.raises(UserError, match="not those of test_maxvit"):
        fitting_size(str(folder), 64)
