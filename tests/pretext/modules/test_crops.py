import numpy as np
import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext import pretext_class
from vissl_lite.pretext.modules.crops import MultiCrop, default_local_crops, forward_multi_crop


def test_large_crops_of_the_encoders_size_then_small_ones() -> None:
    encoder = build_encoder("test_resnet", 64)
    views = MultiCrop(2, 3, 0.05, 0.3, 0.5, solarize=True).views(encoder, upright=True)
    image = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    sizes = [view.shape for view in views(image, 0, 0, 0)]
    assert sizes == [(64, 64, 3)] * 2 + [(24, 24, 3)] * 3


def test_small_crops_show_less_of_the_image_than_large_ones() -> None:
    encoder = build_encoder("test_resnet", 64)
    views = MultiCrop(2, 2, 0.05, 0.3, 0.0).views(encoder, upright=True)
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)
    image = np.stack(
        [ramp + 0 * ramp[:, None], ramp[:, None] + 0 * ramp, 0 * ramp + 0 * ramp[:, None]], 2
    )
    for index in range(30):
        shares = [
            np.ptp(view[..., 0].astype(float)) * np.ptp(view[..., 1].astype(float)) / 255**2
            for view in views(image, 0, 0, index)
            if np.ptp(view[..., 0]) != np.ptp(view[..., 2])  # not made gray
        ]
        large, small = shares[: len(shares) - 2], shares[len(shares) - 2 :]
        assert all(share > 0.2 for share in large)
        assert all(share < 0.4 for share in small) or len(shares) < 4


@pytest.mark.parametrize("name", ["simclr", "byol", "vicreg"])
def test_local_crops_are_optional_and_leave_the_views_as_they_are(name: str) -> None:
    encoder = build_encoder("test_resnet", 64)
    image = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    plain, more = (
        pretext_class(name)(encoder, local_crops=count).views()(image, 0, 0, 0) for count in (0, 3)
    )
    assert [view.shape[0] for view in plain] == [64, 64]
    assert [view.shape[0] for view in more] == [64, 64, 24, 24, 24]
    assert all(np.array_equal(one, other) for one, other in zip(plain, more[:2], strict=True))
    assert not np.array_equal(more[2], more[3])


@pytest.mark.parametrize("name", ["simclr", "byol", "vicreg"])
def test_each_local_crop_is_part_of_the_loss(name: str) -> None:
    task = pretext_class(name)(build_encoder("test_resnet", 64), local_crops=2)
    views = [torch.randn(4, 3, side, side, requires_grad=True) for side in (64, 64, 24, 24)]
    task.loss(views).backward()
    for view in views:
        assert view.grad is not None
        assert view.grad.abs().sum() > 0


@pytest.mark.slow
def test_a_backbone_of_one_size_says_how_to_do_without_small_crops() -> None:
    encoder = build_encoder("mixer_s32_224", 224)
    with pytest.raises(UserError, match=r"--pretext\.local_crops 0 does without"):
        MultiCrop(2, 2, 0.05, 0.3, 0.5).views(encoder, upright=True)


def test_by_size_runs_once_for_each_size_and_keeps_the_order() -> None:
    views = [torch.full((2, 1, side, side), float(n)) for n, side in enumerate([8, 8, 4, 4, 4])]
    passes = []

    def network(images: torch.Tensor) -> torch.Tensor:
        passes.append(len(images))
        return images.mean(dim=(1, 2, 3))

    outputs = forward_multi_crop(network, views)
    assert passes == [4, 6]
    assert [output.tolist() for output in outputs] == [[float(n)] * 2 for n in range(5)]


@pytest.mark.parametrize(("size", "number"), [(32, 0), (64, 6), (224, 6)])
def test_small_images_have_no_small_crops(size: int, number: int) -> None:
    assert default_local_crops(build_encoder("test_resnet", size)) == number
