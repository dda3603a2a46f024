"""What a checkpoint may hold."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vissl_lite.optim import OptimizerSettings, build_optimizer
from vissl_lite.training.checkpoints import _check_optimizer


@pytest.mark.parametrize("name", ["adamw", "momentum", "lars", "novograd", "adafactor"])
def test_the_state_of_an_optimizer_is_that_of_its_weights(name: str) -> None:
    """novograd keeps a number for each weight, adafactor rows and columns."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    module: Any = SimpleNamespace(
        configure_optimizers=lambda: build_optimizer(model, OptimizerSettings(name, lr=0.1))
    )
    optimizer = module.configure_optimizers()
    model(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    _check_optimizer(state, module)
    state["param_groups"][0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="optimizer"):
        _check_optimizer(state, module)
