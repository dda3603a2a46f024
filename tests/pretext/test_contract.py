"""What every pretext must hold, over all that are listed."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from vissl_lite.data.images import find_images
from vissl_lite.data.stream import Batch, Key, ViewDataset, collate
from vissl_lite.encoder import build_encoder, save_encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import build_optimizer
from vissl_lite.pretext import PRETEXTS, PretextTask, pretext_class

BACKBONES = ["test_resnet", "test_vit"]
every_pretext = pytest.mark.parametrize("name", PRETEXTS)
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def task_and_batch(name: str, backbone: str, photos: Path) -> tuple[PretextTask, Batch]:
    torch.manual_seed(0)
    task = pretext_class(name)(build_encoder(backbone, 32))
    dataset = ViewDataset(find_images([photos]), task.views(), seed=0)
    keys: list[Key] = [(0, index) for index in range(12)]
    return task, collate([dataset[key] for key in keys])


@every_pretext
@every_backbone
def test_loss_is_finite_and_its_gradient_reaches_the_encoder(
    name: str, backbone: str, photos: Path
) -> None:
    task, batch = task_and_batch(name, backbone, photos)
    loss = task.training_step(batch, 0)
    loss.backward()
    assert loss.shape == ()
    assert loss.isfinite()
    gradients = [p.grad for p in task.encoder.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients if g is not None)


@every_pretext
@every_backbone
def test_loss_falls_when_a_batch_is_repeated(name: str, backbone: str, photos: Path) -> None:
    task, batch = task_and_batch(name, backbone, photos)
    optimizer = build_optimizer(task, task.optimizer_settings)
    losses = []
    for _ in range(15):
        torch.manual_seed(1)  # the same labels where a loss draws them
        loss = task.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.9 * losses[0]


@every_pretext
@every_backbone
def test_bf16_agrees_with_float32(name: str, backbone: str, photos: Path) -> None:
    task, batch = task_and_batch(name, backbone, photos)
    exact = task.training_step(batch, 0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = task.training_step(batch, 0)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)


@every_pretext
@every_backbone
def test_encoder_folder_loads_in_plain_timm_with_equal_outputs(
    name: str, backbone: str, photos: Path, tmp_path: Path
) -> None:
    task, batch = task_and_batch(name, backbone, photos)
    save_encoder(task.trained_encoder(), tmp_path, {"pretext": name})
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = task.normalize(batch.views[0])
    with torch.no_grad():
        ours = task.trained_encoder().eval()(images)
        torch.testing.assert_close(plain(images), ours)


@every_pretext
def test_views_are_uint8_squares_of_the_encoders_size(name: str, photos: Path) -> None:
    task, batch = task_and_batch(name, "test_resnet", photos)
    assert len(batch.views) == len(task.views())
    for view in batch.views:
        assert view.dtype == torch.uint8
        assert view.shape == (12, 3, 32, 32)
        assert view.is_contiguous(memory_format=torch.channels_last)


@every_pretext
def test_hyperparameters_are_documented_typed_and_have_defaults(name: str) -> None:
    made = pretext_class(name)
    for parameter in list(inspect.signature(made).parameters.values())[1:]:
        assert parameter.default is not inspect.Parameter.empty
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"{parameter.name}:" in (made.__doc__ or "")


def test_unknown_name_gives_the_close_ones() -> None:
    with pytest.raises(UserError, match="did you mean rotation"):
        pretext_class("rotations")
