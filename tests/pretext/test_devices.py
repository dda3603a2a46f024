"""Losses and gradients on another device. On a machine with a GPU: ``pytest -m gpu``."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from tests.pretext.test_contract import FIRST, make_batch, make_task
from vissl_lite.data.stream import Batch
from vissl_lite.pretext.base import PretextTask

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    ],
)


def step(task: PretextTask, batch: Batch, device: str, seed: int) -> tuple[float, float]:
    """Loss of a step, and norm of the encoder's gradient."""
    torch.manual_seed(seed)
    task = copy.deepcopy(task).to(device)
    loss = task.training_step(move_data_to_device(batch, torch.device(device)), 0)
    loss.backward()
    norms = [p.grad.norm() for p in task.encoder.parameters() if p.grad is not None]
    return float(loss), float(torch.stack(norms).norm())


@pytest.fixture
def exact() -> Iterator[None]:
    """Convolutions in float32, whose factors a GPU rounds to TF32 otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(("name", "backbone"), FIRST)
def test_a_step_is_that_of_the_cpu(name: str, backbone: str, device: str, photos: Path) -> None:
    """The same loss and gradient where nothing is drawn in the loss, and finite ones elsewhere.

    On the CPU it shows that the step is repeated exactly from the same seed.
    """
    task = make_task(name, backbone)
    batch = make_batch(task, photos)
    first, other = (step(task, batch, "cpu", seed) for seed in (0, 1))
    found = step(task, batch, device, 0)
    assert all(map(torch.isfinite, torch.tensor(found)))
    if device == "cpu" or first == other:
        assert found == pytest.approx(first, rel=1e-3)
