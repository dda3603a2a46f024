import numpy as np
import pytest
import torch
from torch import Tensor

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.rotation import all_rotations, visualize_rotations


def test_labels_count_quarter_turns() -> None:
    images = torch.randn(2, 3, 4, 4)
    turned, labels = all_rotations(images)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for index, label in enumerate(labels.tolist()):
        expected = images[index % 2]
        for _ in range(label):  # one quarter turn counter-clockwise: columns become rows
            expected = expected.transpose(1, 2).flip(1)
        torch.testing.assert_close(turned[index], expected)


@pytest.mark.parametrize("off", [0, 1])
def test_what_was_told_right_is_shown_upright_and_green(off: int) -> None:
    encoder = build_encoder("test_resnet", 32)
    upright = torch.randint(256, (8, 3, 6, 6), dtype=torch.uint8)
    images = encoder.normalize(upright)

    def classify(turned: Tensor) -> Tensor:
        everything = torch.stack([torch.rot90(images, k, dims=(2, 3)) for k in range(4)], dim=1)
        same = (everything == turned[:, None]).all(dim=(2, 3, 4))
        return same.float().roll(off, dims=1)

    shown = visualize_rotations(images, encoder, classify)
    told = {row[0].caption for row in shown.rows}
    assert len(told) > 1
    for row, image in zip(shown.rows, upright.permute(0, 2, 3, 1).numpy(), strict=True):
        quarters = int(row[0].caption.removeprefix("by ").removesuffix("°")) // 90
        assert np.array_equal(row[0].image, np.rot90(image, quarters))
        assert np.array_equal(row[1].image, np.rot90(image, -off))
        assert row[1].right == (off == 0)
        assert row[1].caption == f"by {(quarters + off) % 4 * 90}°"
