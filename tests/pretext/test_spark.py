import copy
from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext import spark as module_under_test
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.modules.masking import (
    indices_to_mask,
    normalized_patches,
    patchify,
    random_mask,
    unpatchify,
)
from vissl_lite.pretext.spark import (
    SparK,
    choose_grid,
    mask_at,
    pyramid,
    sparse,
    visible_batch_norm,
    visible_group_norm,
)

Check = Callable[[PretextTask], None]
BACKBONES = ["test_resnet", "convnext_atto", "mobilenetv3_small_050", "test_efficientnet_gn"]


def spark(backbone: str = "test_resnet", size: int = 64, **arguments: float) -> SparK:
    torch.manual_seed(0)
    return SparK(build_encoder(backbone, size), **arguments)


def some_visible(task: SparK, batch: int) -> torch.Tensor:
    masked = random_mask(batch, task.grid**2, 0.6, torch.device("cpu"))[1]
    mask = indices_to_mask(masked, task.grid**2)
    return (~mask).float().view(batch, 1, task.grid, task.grid)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_masked_pixels_change_nothing_at_any_stage(backbone: str, training: bool) -> None:
    task = spark(backbone)
    task.train(training)
    images, visible = torch.randn(2, 3, 64, 64), some_visible(task, 2)
    shown = mask_at(visible, 64, 64)
    with torch.no_grad():
        maps = task.encode(images, visible)
        changed = task.encode(images * shown + torch.randn(2, 3, 64, 64) * (1 - shown), visible)
    assert len(maps) == 4
    for one, other in zip(maps, changed, strict=True):
        assert torch.equal(one, other)
        hidden = 1 - mask_at(visible, *one.shape[2:])
        assert (one * hidden == 0).all()
        assert (one * (1 - hidden)).abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["test_resnet", "convnext_atto"])
def test_a_masked_half_is_as_if_it_were_no_part_of_the_image(backbone: str) -> None:
    """What sparse convolution means (section 3.1): empty places are those outside the image."""
    task = spark(backbone).eval()
    images = torch.randn(2, 3, 64, 64)
    visible = torch.ones(2, 1, 4, 4)
    visible[..., 2:] = 0
    with torch.no_grad():
        left = pyramid(task.encoder, images[..., :32])
        for whole, half in zip(task.encode(images, visible), left, strict=True):
            torch.testing.assert_close(whole[..., : half.shape[3]], half, atol=1e-5, rtol=1e-4)


def test_without_masking_again_features_would_spread() -> None:
    task = spark().eval()
    images, visible = torch.randn(2, 3, 64, 64), some_visible(task, 2)
    with torch.no_grad():
        dense = pyramid(task.encoder, images * mask_at(visible, 64, 64))
        maps = task.encode(images, visible)
    for one, other in zip(dense[:3], maps[:3], strict=True):
        hidden = 1 - mask_at(visible, *one.shape[2:])
        assert (one * hidden).abs().sum() > 0
        assert not torch.allclose(one * (1 - hidden), other, atol=1e-3)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_equals_torchs_over_the_visible_places(
    momentum: float | None, affine: bool
) -> None:
    torch.manual_seed(1)
    ours = nn.BatchNorm2d(5, momentum=momentum, affine=affine)
    if affine:
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
    plain = nn.BatchNorm1d(5, momentum=momentum, affine=affine)
    plain.load_state_dict(ours.state_dict())
    for _ in range(3):  # running statistics add up
        features = (torch.randn(3, 5, 4, 4) * 2 + 1).requires_grad_()
        mask = (torch.rand(3, 1, 4, 4) > 0.6).float()
        places = [
            (image, row, column)
            for image in range(3)
            for row in range(4)
            for column in range(4)
            if mask[image, 0, row, column]
        ]
        listed = torch.stack([features[image, :, row, column] for image, row, column in places])
        expected = torch.zeros(3, 5, 4, 4)
        for place, values in zip(places, plain(listed), strict=True):
            expected[place[0], :, place[1], place[2]] = values
        normed = visible_batch_norm(ours, features, mask)
        torch.testing.assert_close(normed, expected, atol=1e-5, rtol=1e-5)
        weights = torch.randn(3, 5, 4, 4)
        torch.testing.assert_close(
            torch.autograd.grad((normed * weights).sum(), features)[0],
            torch.autograd.grad((expected * weights).sum(), features)[0],
            atol=1e-5,
            rtol=1e-4,
        )
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    ours.eval()
    features = torch.randn(2, 5, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    before = copy.deepcopy(ours.state_dict())
    torch.testing.assert_close(visible_batch_norm(ours, features, mask), ours(features) * mask)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in before.items())


def test_batch_norm_takes_statistics_of_all_processes_if_it_is_synchronized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module_under_test, "gather", lambda one: torch.cat([one, 3 * one]))
    features, mask = torch.randn(2, 5, 4, 4), torch.ones(2, 1, 4, 4)
    alone, together = nn.BatchNorm2d(5), nn.SyncBatchNorm(5)
    visible_batch_norm(alone, features, mask)
    visible_batch_norm(together, features, mask)
    torch.testing.assert_close(together.running_mean, alone.running_mean)
    # the same variance from four times as many places: n / (n - 1) is smaller
    ratio = (together.running_var - 0.9) / (alone.running_var - 0.9)
    torch.testing.assert_close(
        ratio, torch.full((5,), (128 / 127) / (32 / 31)), atol=1e-4, rtol=1e-4
    )


def test_group_norm_equals_the_literal_one() -> None:
    norm = nn.GroupNorm(2, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    features = torch.randn(3, 6, 4, 4) * 2 + 1
    mask = (torch.rand(3, 1, 4, 4) > 0.5).float()
    mask[:, :, 0, 0] = 1
    ours = visible_group_norm(norm, features, mask)
    for image in range(3):
        seen = mask[image, 0] > 0
        for channel in range(6):
            first = 3 * (channel // 3)
            values = features[image, first : first + 3][:, seen].double()
            spread = (values.var(unbiased=False) + norm.eps).sqrt()
            normed = (features[image, channel].double() - values.mean()) / spread
            expected = (normed * norm.weight[channel] + norm.bias[channel]) * seen
            torch.testing.assert_close(ours[image, channel], expected.float(), atol=1e-5, rtol=1e-4)


def test_norms_with_an_activation_keep_it() -> None:
    norm = BatchNormAct2d(5, act_layer=nn.ReLU)
    features, visible = torch.randn(2, 5, 4, 4), torch.ones(2, 1, 4, 4)
    expected = copy.deepcopy(norm)(features)
    with sparse(norm, visible):
        torch.testing.assert_close(norm(features), expected, atol=1e-5, rtol=1e-5)


def test_squeeze_and_excitation_takes_its_mean_from_visible_places() -> None:
    gate = SqueezeExcite(6)
    visible = torch.zeros(2, 1, 4, 4)
    visible[0, :, :2] = 1
    visible[1, :, 3, 1:] = 1
    features = torch.randn(2, 6, 4, 4) * visible
    with sparse(gate, visible):
        ours = gate(features)
    for image in range(2):
        seen = visible[image, 0] > 0
        alone = features[image][:, seen][None, :, None]  # the visible places as a whole image
        torch.testing.assert_close(ours[image][:, seen], gate(alone)[0, :, 0])


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_encoder_is_plain_afterwards(backbone: str) -> None:
    task = spark(backbone).eval()
    model, images = task.encoder.model, torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        task.encode(images, some_visible(task, 2))
        assert torch.equal(model(images), before)

    def fail() -> None:
        with sparse(model, some_visible(task, 2)):
            assert any(module._forward_hooks for module in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__


@pytest.mark.slow
def test_loss_equals_the_literal_one() -> None:
    """The squared error of masked patches, normalized one by one (section 3.3)."""
    task, images = spark().eval(), torch.randn(3, 3, 64, 64)
    torch.manual_seed(5)
    ours = task.loss([images])
    torch.manual_seed(5)
    masked = random_mask(3, 16, 0.6, images.device)[1]
    predicted = patchify(task.predict(images, masked).detach(), 16).double()
    targets = normalized_patches(images, 16).double()
    patches = []
    for image in range(3):
        for place in masked[image].tolist():
            error = predicted[image, place] - targets[image, place]
            patches.append(float((error**2).sum()) / (16 * 16 * 3))
    assert len(patches) == 3 * 10
    assert ours.item() == pytest.approx(sum(patches) / len(patches), rel=1e-5)


def test_masked_places_of_each_map_are_filled_with_its_token() -> None:
    task = spark()
    visible = torch.zeros(2, 1, 4, 4)
    visible[..., :2, :2] = 1
    seen: list[torch.Tensor] = []
    for project in task.decoder.projections:
        project.register_forward_pre_hook(lambda _, features: seen.append(features[0]))
    task.decoder(task.encode(torch.randn(2, 3, 64, 64), visible), visible)
    assert [dense.shape[2] for dense in seen] == [2, 4, 8, 16]
    for dense, token in zip(seen, task.decoder.mask_tokens, strict=True):
        hidden = dense[:, :, dense.shape[2] // 2 :]
        assert torch.equal(hidden, token[:, None, None].expand_as(hidden))
        assert not torch.equal(dense[0, :, 0, 0], token)


def test_running_statistics_come_from_the_visible_places() -> None:
    task = spark()
    norm = task.encoder.model.bn1
    images, visible = torch.randn(2, 3, 64, 64), some_visible(task, 2)
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, features: seen.append(features[0].detach()))
    task.encode(images, visible)
    mask = mask_at(visible, *seen[0].shape[2:])[:, 0] > 0
    mean = seen[0].permute(0, 2, 3, 1)[mask].mean(dim=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean, atol=1e-6, rtol=1e-4)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("size", "sides", "grid"),
    [
        (224, [56, 28, 14, 7], 7),  # the paper's
        (64, [16, 8, 4, 2], 4),
        (32, [8, 4, 2, 1], 4),
        (32, [32, 16, 8, 4], 4),
        (40, [10, 5, 3, 2], 5),
        (56, [14, 7, 4, 2], 7),  # 4 x 4 places would not divide 14 or 7
        (50, [13, 7, 4, 2], None),
        (24, [3, 2, 1], None),
    ],
)
def test_mask_has_the_resolution_of_the_coarsest_stage_that_suits(
    size: int, sides: list[int], grid: int | None
) -> None:
    assert choose_grid(size, sides) == grid


def test_a_coarser_place_is_visible_if_any_of_its_parts_is() -> None:
    visible = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    visible = visible.float()[None, None]
    assert mask_at(visible, 2, 2).tolist() == [[[[0, 1], [1, 0]]]]
    assert mask_at(visible, 1, 1).item() == 1
    finer = mask_at(visible, 8, 8)[0, 0]
    assert all(
        finer[row, column] == visible[0, 0, row // 2, column // 2]
        for row in range(8)
        for column in range(8)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "size"),
    [("resnet18", 32), ("resnet10t_slim", 64), ("test_resnet", 40), ("mobilenetv3_small_050", 32)],
)
def test_small_images_of_many_networks(backbone: str, size: int) -> None:
    task = spark(backbone, size)
    assert task.grid >= 4
    loss = task.loss([torch.randn(2, 3, size, size)])
    loss.backward()
    assert loss.isfinite()
    untrained = [n for n, p in task.named_parameters() if p.grad is None and "conv_head" not in n]
    assert not untrained


def test_sizes_that_cannot_be_masked_are_refused() -> None:
    with pytest.raises(UserError, match="try 48"):
        spark(size=50)


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [("test_vit", "a convolutional backbone"), ("test_maxvit", "can't hide")],
)
def test_networks_that_cannot_be_masked_are_refused(backbone: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        spark(backbone)


def test_a_perfect_prediction_gives_the_image_back(
    gives_the_image_back: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = spark()
    unit = task.encoder.image_size // task.grid

    def predict(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return unpatchify(normalized_patches(images, unit), unit)

    monkeypatch.setattr(task, "predict", predict)
    gives_the_image_back(task)
