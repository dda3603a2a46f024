"""Masks, what they hide, and the loss against a literal loop."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.inpainting import Inpainting, masked_l2, random_blocks

Check = Callable[[PretextTask], None]
CPU = torch.device("cpu")


def made(backbone: str = "test_resnet", size: int = 32, **options: object) -> Inpainting:
    torch.manual_seed(0)
    return Inpainting(build_encoder(backbone, size), **options)  # type: ignore[arg-type]


# Masks


@pytest.mark.parametrize(("share", "size"), [(0.02, 96), (0.25, 32), (0.5, 50), (0.7, 96)])
def test_the_masked_share_is_what_was_asked_for(share: float, size: int) -> None:
    torch.manual_seed(0)
    mask = random_blocks(64, size, share, CPU)
    assert mask.shape == (64, 1, size, size)
    assert mask.dtype == torch.bool
    shares = mask.float().mean(dim=(1, 2, 3))
    assert shares.mean().item() == pytest.approx(share, abs=0.02)
    assert (shares - share).abs().max() < 0.12
    assert shares.min() > 0


def test_masks_are_blocks_anywhere_and_of_each_image_its_own() -> None:
    torch.manual_seed(0)
    mask = random_blocks(400, 32, 0.25, CPU)[:, 0]
    assert len(mask.flatten(1).unique(dim=0)) == 400
    frequency = mask.float().mean(dim=0)
    for border in (frequency[0], frequency[-1], frequency[:, 0], frequency[:, -1]):
        assert border.mean() > 0.02
    assert frequency.max() < 0.5
    # blocks: a masked pixel has masked neighbors, along rows and along columns
    for along in (mask, mask.transpose(1, 2)):
        padded = torch.nn.functional.pad(along, (1, 1))
        alone = along & ~padded[:, :, :-2] & ~padded[:, :, 2:]
        assert alone.float().sum() / along.sum() < 0.01
    # several: none of them reaches half of what is masked
    widest = mask.any(dim=1).float().sum(dim=1)
    assert widest.mean() > 16


# The loss


def test_loss_equals_equation_1_over_the_masked_values() -> None:
    prediction, images = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    mask = torch.rand(2, 1, 5, 4) < 0.4
    total, count = 0.0, 0
    for image in range(2):
        for row in range(5):
            for column in range(4):
                if mask[image, 0, row, column]:
                    for channel in range(3):
                        at = (image, channel, row, column)
                        total += (images[at].item() - prediction[at].item()) ** 2
                        count += 1
    assert masked_l2(prediction, images, mask).item() == pytest.approx(total / count, rel=1e-5)
    rounded = masked_l2(prediction.bfloat16(), images, mask)
    assert rounded.dtype == torch.float32


def test_unmasked_pixels_carry_no_loss_and_masked_ones_do() -> None:
    prediction, images = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8)
    mask = random_blocks(2, 8, 0.25, CPU)
    masked_l2(prediction, images, mask).backward()
    assert prediction.grad is not None
    everywhere = mask.expand_as(images)
    assert (prediction.grad[~everywhere] == 0).all()
    assert (prediction.grad[everywhere] != 0).all()
    changed = torch.where(everywhere, images, images + 5)
    torch.testing.assert_close(
        masked_l2(prediction, changed, mask), masked_l2(prediction, images, mask)
    )


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_masked_pixels_are_hidden_from_the_encoder(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = made(backbone)
    whole = task.encoder.pooled_and_map
    seen: list[Tensor] = []
    monkeypatch.setattr(task.encoder, "pooled_and_map", lambda x: seen.append(x) or whole(x))
    images = torch.randn(3, 3, 32, 32)
    torch.manual_seed(7)
    mask = random_blocks(3, 32, 0.25, CPU).expand_as(images)
    other = torch.where(mask, torch.randn_like(images), images)
    losses = []
    for batch in (images, other):
        torch.manual_seed(7)  # the same masks
        losses.append(task.loss([batch]).item())
    assert torch.equal(seen[0], seen[1])
    assert (seen[0][mask] == 0).all()
    assert torch.equal(seen[0][~mask], images[~mask])
    assert losses[0] != losses[1]  # but it is them that the loss asks for


@pytest.mark.parametrize(
    ("backbone", "size"),
    [("test_resnet", 32), ("test_resnet", 50), ("test_vit", 48), ("vit_slim_patch4_32", 32)],
)
def test_the_whole_image_is_filled_at_full_resolution(backbone: str, size: int) -> None:
    task = made(backbone, size)
    images = torch.randn(2, 3, size, size)
    filled = task.reconstruct(images, random_blocks(2, size, 0.25, CPU))
    assert filled.shape == images.shape


def test_each_place_of_the_decoder_fills_its_own_square(monkeypatch: pytest.MonkeyPatch) -> None:
    task = made()
    decoded = torch.arange(64.0).view(1, 1, 8, 8).expand(2, 48, 8, 8)
    monkeypatch.setattr(task.decoder, "forward", lambda *_: decoded)
    filled = task.reconstruct(
        torch.zeros(2, 3, 32, 32), torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    )
    for row in range(32):
        for column in range(32):
            assert (filled[0, :, row, column] == row // 4 * 8 + column // 4).all()


@pytest.mark.slow
def test_every_layer_of_the_encoder_is_trained() -> None:
    task = made()
    task.loss([torch.randn(4, 3, 32, 32)]).backward()
    assert all(p.grad is not None for p in task.parameters())


def test_errors_say_what_would_work() -> None:
    for share in (0.0, 0.9):
        with pytest.raises(UserError, match=r"must be in \[0.01, 0.7\]"):
            made(masked=share)
    with pytest.raises(UserError, match="decoder_width"):
        made(decoder_width=0)


def test_a_perfect_prediction_gives_the_image_back(
    gives_the_image_back: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = made()
    # and of what was not hidden, nonsense
    monkeypatch.setattr(task, "reconstruct", lambda images, mask: torch.where(mask, images, 9.0))
    gives_the_image_back(task)
