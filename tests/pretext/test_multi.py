import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.modules.losses import nt_xent
from vissl_lite.pretext.multi import Multi
from vissl_lite.pretext.rotation import all_rotations


def test_views_are_not_turned_before_their_turn_is_to_be_predicted() -> None:
    task = Multi(build_encoder("test_resnet", 32), min_crop_scale=0.9, color=0.0)
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16] = 255
    for index in range(20):
        view = np.asarray(task.views(upright=False)(image, 0, 0, index)[0], np.float32)
        assert view[:8].mean() > 200 > 50 > view[24:].mean()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_is_simclrs_loss_plus_rotations(weight: float) -> None:
    torch.manual_seed(0)
    task = Multi(build_encoder("test_resnet", 32), rotation_weight=weight).eval()
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    z1, z2 = (task.contrast_head(task.encoder(view)) for view in views)
    turned, labels = all_rotations(views[0])
    rotation = F.cross_entropy(task.rotation_head(task.encoder(turned)), labels)
    expected = nt_xent(z1, z2, 0.1) + weight * rotation
    torch.testing.assert_close(task.loss(views), expected, atol=1e-4, rtol=1e-4)
