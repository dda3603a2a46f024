import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.optim import OptimizerSettings, set_lr
from vissl_lite.pretext.barlow_twins import BarlowTwins


def test_biases_and_norms_have_a_rate_of_their_own_which_lars_does_not_adapt() -> None:
    """Zbontar et al. 2021, section 2.2, with the numbers of the paper."""
    task = BarlowTwins(build_encoder("test_resnet", 32), projection_size=8)
    task.optimizer_settings = OptimizerSettings("lars", lr=0.2, weight_decay=1.5e-6)
    optimizer = task.configure_optimizers()
    set_lr(optimizer, 0.2)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter in task.parameters():
        expected = 0.2 if parameter.ndim > 1 else 0.0048
        assert rate[id(parameter)] == pytest.approx(expected)

    task.optimizer_settings = OptimizerSettings("adamw", lr=0.2, weight_decay=1.5e-6)
    assert {group["lr_scale"] for group in task.configure_optimizers().param_groups} == {1.0}

    norm = task.encoder.model.bn1.weight
    before = norm.detach().clone()
    for parameter in task.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(norm.detach(), before - 0.0048)
