import itertools

import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.training.resizing import share_of_side, shrink


def test_views_are_small_for_half_of_the_run_and_whole_in_the_last_fifth() -> None:
    shares = [share_of_side(progress / 1000) for progress in range(1001)]
    assert set(shares[:500]) == {0.5}
    assert set(shares[800:]) == {1.0}
    assert all(a <= b for a, b in itertools.pairwise(shares))
    assert sorted(set(shares)) == [0.5, 0.625, 0.75, 0.875, 1.0]
    area = sum(share**2 for share in shares) / len(shares)
    assert area == pytest.approx(0.5, abs=0.03)  # what the help promises


@pytest.mark.parametrize(("backbone", "expected"), [("test_resnet", 48), ("test_vit", 48)])
def test_a_pixel_is_the_mean_of_those_it_stands_for(backbone: str, expected: int) -> None:
    encoder = build_encoder(backbone, 96)
    views = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    views = views.contiguous(memory_format=torch.channels_last)
    small = shrink(views, 0.5, encoder)
    assert small.shape == (2, 3, expected, expected)
    assert small.dtype == torch.uint8
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert small.float().mean() == pytest.approx(float(views.float().mean()), abs=1)
    block = torch.full((1, 3, 96, 96), 10, dtype=torch.uint8)
    block[..., 48:] = 200
    half = shrink(block, 0.5, encoder)[0, 0, 24]
    assert half[:22].eq(10).all()
    assert half[26:].eq(200).all()
    assert shrink(views, 1.0, encoder) is views
