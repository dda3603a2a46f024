from collections.abc import Callable

import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.mae import MAE
from vissl_lite.pretext.modules.masking import (
    encode_visible,
    gather_tokens,
    normalized_patches,
    random_mask,
)

Check = Callable[[PretextTask], None]


def mae(backbone: str = "test_vit", size: int = 64, **arguments: float) -> MAE:
    torch.manual_seed(0)
    return MAE(build_encoder(backbone, size), **arguments)


def predict(
    task: MAE, images: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    return task.forward_decoder(*task.forward_encoder(images, visible), visible, masked)


def literal_loss(
    task: MAE, images: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor
) -> float:
    """The squared error averaged over masked patches only, pixel by pixel (section 3)."""
    predicted = predict(task, images, visible, masked).detach().double()
    targets = task.targets(images).double()
    total, count = 0.0, 0
    for image in range(len(images)):
        for index, place in enumerate(masked[image].tolist()):
            for value, target in zip(predicted[image, index], targets[image, place], strict=True):
                total += float((value - target) ** 2)
                count += 1
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [True, False])
def test_loss_equals_the_literal_one(normalize: bool) -> None:
    task, images = mae(normalize_pixels=normalize), torch.randn(3, 3, 64, 64)
    torch.manual_seed(5)
    ours = task.loss([images])
    torch.manual_seed(5)
    visible, masked = random_mask(3, 16, 0.75, images.device)
    assert ours.item() == pytest.approx(literal_loss(task, images, visible, masked), rel=1e-5)


def test_targets_are_normalized_patches_unless_told_otherwise() -> None:
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(mae().targets(images), normalized_patches(images, 16))
    raw = mae(normalize_pixels=False).targets(images)
    assert torch.equal(raw[0, 1, :3], images[0, :, 0, 16])


@pytest.mark.slow
def test_masked_pixels_do_not_reach_encoder_and_prediction() -> None:
    task, images = mae(), torch.randn(2, 3, 64, 64)
    shown = [0, 6, 9, 15]
    visible = torch.tensor([shown] * 2)
    masked = torch.tensor([[place for place in range(16) if place not in shown]] * 2)
    latent = encode_visible(task.encoder, images, visible)
    predicted = predict(task, images, visible, masked)
    changed = torch.randn(2, 3, 64, 64)
    for place in shown:
        row, column = 16 * (place // 4), 16 * (place % 4)
        square = (..., slice(row, row + 16), slice(column, column + 16))
        changed[square] = images[square]
    for one, other in zip(encode_visible(task.encoder, changed, visible), latent, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(predict(task, changed, visible, masked), predicted)
    other = predict(task, torch.randn(2, 3, 64, 64), visible, masked)
    assert not torch.allclose(other, predicted)


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 16), (0.5, 32)])
def test_blocks_of_the_encoder_see_visible_patches_only(ratio: float, visible: int) -> None:
    task = mae("vit_slim_patch4_32", 32, mask_ratio=ratio)
    seen = []
    for block in task.encoder.model.blocks:
        block.register_forward_hook(lambda _, tokens, __: seen.append(tokens[0].shape))
    task.loss([torch.randn(2, 3, 32, 32)])
    assert seen == [(2, visible + 1, 128)] * 6  # and the class token


def test_a_grid_of_two_by_two_keeps_one_patch_visible() -> None:
    task = mae(size=32, mask_ratio=0.99)
    loss = task.loss([torch.randn(2, 3, 32, 32)])
    loss.backward()
    assert loss.isfinite()
    assert task.encoder.model.cls_token.grad.abs().sum() > 0


@pytest.mark.slow
def test_decoder_is_scaled_to_the_encoder() -> None:
    small = mae("vit_slim_patch4_32", 32).decoder
    assert (small.embed.out_features, len(small.blocks)) == (96, 2)
    large = mae("vit_small_patch16_224", 64).decoder
    assert (large.embed.out_features, len(large.blocks)) == (256, 8)
    own = mae(decoder_width=64, decoder_depth=3).decoder
    assert (own.embed.out_features, len(own.blocks)) == (64, 3)


def test_convolutional_backbones_are_refused() -> None:
    with pytest.raises(UserError, match="needs a plain ViT"):
        mae("test_resnet")


@pytest.mark.parametrize("normalize", [True, False])
def test_a_perfect_prediction_gives_the_image_back(
    normalize: bool, gives_the_image_back: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = mae(normalize_pixels=normalize)

    seen: list[torch.Tensor] = []
    encode = task.forward_encoder

    def forward_encoder(images: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(images)
        return encode(images, visible)

    def forward_decoder(*given: torch.Tensor) -> torch.Tensor:
        return gather_tokens(task.targets(seen[-1]), given[-1])

    monkeypatch.setattr(task, "forward_encoder", forward_encoder)
    monkeypatch.setattr(task, "forward_decoder", forward_decoder)
    gives_the_image_back(task)
