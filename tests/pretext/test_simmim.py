import math
from collections.abc import Callable

import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.modules.masking import indices_to_mask, random_mask
from vissl_lite.pretext.simmim import (
    SimMIM,
    default_mask_unit,
    enlarge,
    masked_l1,
)

Check = Callable[[PretextTask], None]
HALF = torch.tensor([[[True, False], [False, True]]]).expand(2, -1, -1)


def simmim(backbone: str = "test_vit", size: int = 32, **arguments: float) -> SimMIM:
    torch.manual_seed(0)
    return SimMIM(build_encoder(backbone, size), **arguments)


@pytest.mark.slow
def test_loss_equals_the_papers_equation() -> None:
    """Section 3.4: the distance of masked pixels, divided by the number of their values."""
    task, images = simmim(), torch.randn(3, 3, 32, 32)
    torch.manual_seed(5)
    ours = task.loss([images])
    torch.manual_seed(5)
    mask = indices_to_mask(random_mask(3, 4, 0.6, images.device, math.ceil)[1], 4).view(3, 2, 2)
    predicted = task.predict(images, mask).detach().double()
    total, elements = 0.0, 0
    for image in range(3):
        for row in range(32):
            for column in range(32):
                if mask[image, row // 16, column // 16]:
                    for channel in range(3):
                        place = (image, channel, row, column)
                        total += abs(float(predicted[place] - images[place].double()))
                        elements += 1
    assert elements == 3 * 3 * 16 * 16 * 3  # three of four, as 2.4 is rounded up
    assert ours.item() == pytest.approx(total / elements, rel=1e-5)


def test_the_number_of_masked_squares_is_rounded_up() -> None:
    """As in the authors' code: ``np.ceil(self.token_count * self.mask_ratio)``."""
    task = simmim(size=112)  # 7 x 7 squares
    mask = task.draw_mask(torch.randn(2, 3, 112, 112))
    assert mask.flatten(1).sum(dim=1).tolist() == [30, 30]  # 29.4 of 49


def test_visible_pixels_do_not_count() -> None:
    images, mask = torch.randn(2, 3, 32, 32), enlarge(HALF, 16)
    wrong = images + 2.0 * mask[:, None] + 100.0 * ~mask[:, None]
    assert masked_l1(wrong, images, mask).item() == pytest.approx(2.0, rel=1e-5)


def test_masked_pixels_do_not_reach_the_prediction() -> None:
    task, images = simmim(), torch.randn(2, 3, 32, 32)
    predicted = task.predict(images, HALF)
    hidden = torch.where(enlarge(HALF, 16)[:, None], torch.randn(2, 3, 32, 32), images)
    assert torch.equal(task.predict(hidden, HALF), predicted)
    assert not torch.allclose(task.predict(torch.randn(2, 3, 32, 32), HALF), predicted)


def test_no_hook_is_left() -> None:
    task = simmim()
    task.loss([torch.randn(2, 3, 32, 32)])
    assert not any(module._forward_hooks for module in task.encoder.model.modules())


def test_mask_token_and_head_learn() -> None:
    task = simmim()
    task.loss([torch.randn(2, 3, 32, 32)]).backward()
    assert task.mask_token.grad.abs().sum() > 0
    assert task.head[0].weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_a_swin_transformer_is_masked_in_units_of_several_patches() -> None:
    task = simmim("swin_tiny_patch4_window7_224", 64).eval()  # no stochastic depth
    assert (task.patch, task.unit) == (4, 8)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert task.loss([images]).isfinite()
        mask = task.draw_mask(images)
        predicted = task.predict(images, mask)
        hidden = torch.where(enlarge(mask, 8)[:, None], torch.zeros(()), images)
        assert torch.equal(task.predict(hidden, mask), predicted)


@pytest.mark.parametrize(
    ("size", "patch", "unit"),
    [
        (192, 4, 32),  # the paper's
        (224, 16, 32),  # and its ViT's
        (192, 16, 32),
        (224, 4, 32),
        (64, 4, 8),
        (64, 16, 16),
        (32, 4, 4),
        (32, 16, 16),
        (196, 14, 28),
        (36, 12, 12),
    ],
)
def test_mask_unit_is_about_a_sixth_of_the_image(size: int, patch: int, unit: int) -> None:
    assert default_mask_unit(size, patch) == unit


@pytest.mark.slow
@pytest.mark.parametrize("unit", [0, 8, 24, 48, 64, -16])
def test_a_mask_unit_that_does_not_suit_is_the_users_mistake(unit: int) -> None:
    with pytest.raises(UserError, match="multiple of the patch"):
        simmim(size=64, mask_unit=unit)
    assert simmim(size=64, mask_unit=32).unit == 32


def test_convolutional_backbones_are_refused() -> None:
    with pytest.raises(UserError, match="a ViT or a Swin"):
        simmim("test_resnet")


def test_a_perfect_prediction_gives_the_image_back(
    gives_the_image_back: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = simmim()

    def predict(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.where(enlarge(mask, task.unit)[:, None], images, 9.0)  # elsewhere nonsense

    monkeypatch.setattr(task, "predict", predict)
    gives_the_image_back(task)
