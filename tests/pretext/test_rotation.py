import torch

from vissl_lite.pretext.rotation import all_rotations


def test_labels_count_quarter_turns() -> None:
    images = torch.randn(2, 3, 4, 4)
    turned, labels = all_rotations(images)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for index, label in enumerate(labels.tolist()):
        expected = images[index % 2]
        for _ in range(label):  # one quarter turn counter-clockwise: columns become rows
            expected = expected.transpose(1, 2).flip(1)
        torch.testing.assert_close(turned[index], expected)
