import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vissl_lite.data.turns import turns_for
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.transfer.segmentation.model import (
    Segmenter,
    dice_loss,
    keeps_own_scale,
    segment,
    segmentation_loss,
    window_starts,
)
from vissl_lite.transfer.segmentation.task import Segmentation

IGNORE_INDEX = 255

# The model


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_efficientnet"])
@pytest.mark.parametrize("shape", [(48, 48), (50, 75)])
def test_every_pixel_gets_its_logits(backbone: str, shape: tuple[int, int]) -> None:
    segmenter = Segmenter(
        build_encoder(backbone, 48), classes=["a", "b", "c", "d", "e"], channels=16
    ).eval()
    images = torch.randn(2, 3, *shape)
    with torch.no_grad():
        logits = segmenter(images)
        single = segmenter(images[1:])
    assert logits.shape == (2, 5, *shape)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(single, logits[1:], atol=1e-4, rtol=1e-3)


def test_logits_are_aligned_with_their_pixels() -> None:
    """A change in one corner of the image changes the logits mainly there."""
    segmenter = Segmenter(
        build_encoder("test_resnet", 64), classes=["a", "b", "c"], channels=16
    ).eval()
    images = torch.randn(1, 3, 64, 96)
    for rows, columns in itertools.product((slice(0, 16), slice(48, 64)), repeat=2):
        changed = images.clone()
        changed[..., rows, columns] += 3
        with torch.no_grad():
            change = (segmenter(changed) - segmenter(images)).abs().mean(dim=(0, 1))
        inside = change[rows, columns].mean()
        assert inside > 3 * (change.sum() - change[rows, columns].sum()) / (64 * 96 - 256)


def test_every_parameter_gets_a_gradient() -> None:
    segmenter = Segmenter(build_encoder("test_resnet", 48), classes=["a", "b", "c"], channels=16)
    segmenter(torch.randn(2, 3, 48, 48)).square().sum().backward()
    assert [name for name, p in segmenter.named_parameters() if p.grad is None] == []


# Losses against literal versions of their definitions


def batch(seed: int, ignored: float) -> tuple[Tensor, Tensor]:
    """Logits of four classes and a target, in which the last class does not occur."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 3, 5, generator=random, dtype=torch.float64)
    target = torch.randint(0, 3, (2, 3, 5), generator=random)
    target[torch.rand(2, 3, 5, generator=random) < ignored] = IGNORE_INDEX
    return logits, target.to(torch.uint8)


def pixels(logits: Tensor, target: Tensor) -> list[tuple[list[float], int]]:
    """Probabilities and true class of each pixel that is not ignored."""
    found = []
    for b, y, x in np.ndindex(*target.shape):
        if target[b, y, x] != IGNORE_INDEX:
            e = [math.exp(float(value)) for value in logits[b, :, y, x]]
            found.append(([value / sum(e) for value in e], int(target[b, y, x])))
    return found


def slow_dice(logits: Tensor, target: Tensor) -> float:
    counted = pixels(logits, target)
    losses, total = 0.0, 0.0
    for k in range(logits.shape[1]):
        truth = [float(true == k) for _, true in counted]
        if sum(truth):
            overlap = sum(p[k] * g for (p, _), g in zip(counted, truth, strict=True))
            size = sum(p[k] ** 2 for p, _ in counted) + sum(g**2 for g in truth)
            losses += 1 - 2 * overlap / size
            total += 1
    return losses / total


def slow_entropy(logits: Tensor, target: Tensor, weights: list[float]) -> float:
    counted = pixels(logits, target)
    total = sum(weights[true] for _, true in counted)
    return sum(-weights[true] * math.log(p[true]) for p, true in counted) / total


@pytest.mark.parametrize("weights", [None, [0.5, 3.0, 1.0, 2.0]])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_losses_equal_their_definitions(ignored: float, weights: list[float] | None) -> None:
    logits, target = batch(0, ignored)
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    dice = slow_dice(logits, target)
    entropy = slow_entropy(logits, target, weights or [1.0] * 4)
    assert float(dice_loss(logits, target)) == pytest.approx(dice, abs=1e-9)
    both = float(segmentation_loss(logits, target, given))
    assert both == pytest.approx(dice + entropy, abs=1e-9)


@pytest.mark.slow
def test_the_gradient_of_the_loss() -> None:
    logits, target = batch(1, 0.3)
    logits.requires_grad_(True)
    weights = torch.tensor([0.5, 3.0, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, target, weights), (logits,))


def test_a_batch_of_ignored_pixels_has_zero_loss_and_gradient() -> None:
    logits, target = batch(2, 1.0)
    for weights in (None, torch.ones(4, dtype=torch.float64)):
        given = logits.clone().requires_grad_(True)
        loss = segmentation_loss(given, target, weights)
        loss.backward()
        assert loss.item() == 0
        assert given.grad is not None
        assert torch.equal(given.grad, torch.zeros_like(given))


def test_a_perfect_prediction_has_zero_loss() -> None:
    _, target = batch(3, 0.3)
    classes = torch.where(target == IGNORE_INDEX, 0, target).long()
    logits = 50.0 * nn.functional.one_hot(classes, 4).permute(0, 3, 1, 2)
    assert float(segmentation_loss(logits, target)) < 1e-6


# Whole images


def normalize(images: Tensor) -> Tensor:
    """Normalize with a mean of 0.5 and a standard deviation of 0.25."""
    return images / 255 * 4 - 2


class Pixelwise(nn.Module):
    """Classify each pixel by its color only, into three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))
        self.shapes: list[torch.Size] = []
        self.encoder = SimpleNamespace(normalize=normalize, image_size=32)

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(images.shape)
        return images * self.factor


class ByPosition(Pixelwise):
    """Classify each pixel by its position in the window: border or center."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 2, *images.shape[-2:])
        logits[:, 0] = 9
        logits[:, :, 8:-8, 8:-8] = logits[:, :, 8:-8, 8:-8].flip(1)
        return logits


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("shape", [(32, 32), (32, 33), (150, 32), (32, 48), (70, 50), (49, 90)])
def test_windows_agree_with_the_whole_image(shape: tuple[int, int]) -> None:
    model, image = Pixelwise(), picture(*shape)
    probabilities = segment(model, image)  # type: ignore[arg-type]
    whole = normalize(torch.from_numpy(image).permute(2, 0, 1)[None]) * 3
    np.testing.assert_allclose(probabilities, whole.softmax(dim=1)[0], atol=1e-5)
    assert probabilities.dtype == np.float32
    assert all(shape[1:] == (3, 32, 32) for shape in model.shapes)
    assert all(len(images) <= 16 for images in model.shapes)


@pytest.mark.parametrize("shape", [(200, 100), (20, 30), (64, 64)])
def test_predictions_have_the_size_of_the_image(shape: tuple[int, int]) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    image[: shape[0] // 2, :, 0] = 255  # class 0 in the upper half
    image[shape[0] // 2 :, :, 1] = 255  # class 1 in the lower half
    probabilities = segment(Pixelwise(), image)  # type: ignore[arg-type]
    assert probabilities.shape == (3, *shape)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    truth = (np.arange(shape[0]) >= shape[0] // 2)[:, None]
    assert (probabilities.argmax(axis=0) == truth).mean() > 0.97


def test_large_images_keep_their_own_scale() -> None:
    stripes = np.zeros((60, 60, 3), np.uint8)
    stripes[::2, :, 0] = 255
    stripes[1::2, :, 1] = 255
    probabilities = segment(Pixelwise(), stripes)  # type: ignore[arg-type]
    assert (probabilities.argmax(axis=0) == (np.arange(60) % 2)[:, None]).all()
    shrunk = segment(Pixelwise(), stripes[:48, :48])  # type: ignore[arg-type]
    assert not (shrunk.argmax(axis=0) == (np.arange(48) % 2)[:, None]).all()


def test_an_exported_segmenter_says_which_images_keep_their_own_scale(tmp_path: Path) -> None:
    segmenter = Segmenter(build_encoder("test_resnet", 33), ["a", "b"])
    made = Segmentation().export_model(segmenter, tmp_path)
    words = made.preparation.format(size=made.image_size[0])
    assert words == "the shorter side resized to 33 pixels if it has 49 at most"
    for side in (49, 50):
        assert keeps_own_scale(np.zeros((side, 90, 3), np.uint8), 33) == (side > 49)


def test_the_border_of_a_window_has_little_weight() -> None:
    probabilities = segment(ByPosition(), picture(32, 96))  # type: ignore[arg-type]
    assert (
        probabilities[1, 8:-8, 8:-8] > 0.52
    ).all()  # an unweighted mean would be 0.5 where two windows overlap
    assert (probabilities[0, :8] > 0.99).all()


@pytest.mark.parametrize("shape", [(32, 32), (49, 90), (20, 31)])
def test_a_model_that_turns_with_the_image_gives_the_same_with_turns(
    shape: tuple[int, int],
) -> None:
    model, image = Pixelwise(), picture(*shape)
    turned = segment(model, image, turns_for(upright=False))  # type: ignore[arg-type]
    np.testing.assert_allclose(turned, segment(model, image), atol=1e-2)  # type: ignore[arg-type]
    assert turned.shape == (3, *shape)


class LeftRight(Pixelwise):
    """Classify the left half of a window as 1, the right half as 0."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 2, *images.shape[-2:])
        logits[:, 1, :, : images.shape[-1] // 2] = 2
        return logits


def test_probabilities_of_turns_are_averaged() -> None:
    image = picture(32, 32)
    left = math.exp(2) / (1 + math.exp(2))
    (_, one) = segment(LeftRight(), image)  # type: ignore[arg-type]
    np.testing.assert_allclose(one[:, [0, -1]], np.full((32, 2), [left, 0.5]), atol=1e-6)
    (_, both) = segment(LeftRight(), image, turns_for(upright=True))  # type: ignore[arg-type]
    np.testing.assert_allclose(both, (left + 0.5) / 2, atol=1e-6)


@pytest.mark.parametrize("length", [32, 33, 40, 48, 49, 64, 100, 1000])
def test_windows_cover_a_side_and_overlap_by_half(length: int) -> None:
    starts = window_starts(length, 32)
    assert starts[0] == 0
    assert starts[-1] == length - 32
    assert all(0 < b - a <= 16 for a, b in itertools.pairwise(starts))
    assert len(starts) <= 1 + math.ceil((length - 32) / 16)


def test_segmenting_restores_training_mode() -> None:
    model = Pixelwise().train()
    segment(model, picture(32, 40))  # type: ignore[arg-type]
    assert model.training
