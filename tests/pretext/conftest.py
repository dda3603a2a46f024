"""What tests of several pretexts ask."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vissl_lite.pretext.base import PretextTask


@pytest.fixture
def gives_the_image_back() -> Callable[[PretextTask], None]:
    """Checks what a masked pretext shows if all that it predicts is right."""

    def check(task: PretextTask) -> None:
        size = task.encoder.image_size
        images = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
        shown = task.visualize([task.encoder.normalize(images)])
        assert shown is not None
        mean = (255 * torch.tensor(task.encoder.mean)).round().byte().numpy()
        for row, image in zip(shown.rows, images.permute(0, 2, 3, 1).numpy(), strict=True):
            masked, filled, truth = (picture.image.astype(int) for picture in row)
            assert np.array_equal(truth, image)
            assert np.abs(filled - image).max() <= 1
            hidden = (np.abs(masked - mean) <= 1).all(axis=2)
            assert 0.1 < hidden.mean() < 0.9
            assert np.array_equal(masked[~hidden], truth[~hidden])

    return check
