"""A step never asks a GPU for a value: it would wait until all that was asked before is done."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import prepared, required
from vissl_lite.data.images import find_images
from vissl_lite.data.stream import Key, ViewDataset, collate
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext import PRETEXTS, pretext_class

# Operations whose result, or its shape, the CPU has to know before it can go on; ``lift_fresh``
# is what ``torch.tensor`` ends with, which copies to the device and waits for that.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh"}

# What asks all the same: colorization counts colors (bincount), and looks whether there are any.
# ibot, dinov2 and ijepa ask the CPU, where they draw masks; the first two count them there, too.
ON_CPU = {"index", "nonzero", "_local_scalar_dense", "lift_fresh"}
KNOWN = {
    "ibot": ON_CPU,
    "dinov2": ON_CPU,
    "colorization": {"_local_scalar_dense"},
    "ijepa": {"_local_scalar_dense"},
}


class Waits(TorchDispatchMode):
    """Names the operations that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function.overloadpacket.__name__
        by_mask = (
            name.startswith("index")
            and isinstance(args[1], list | tuple)
            and any(
                isinstance(place, torch.Tensor) and place.dtype == torch.bool for place in args[1]
            )
        )
        if name in WAITING or by_mask:
            self.names.add(name.strip("_") if by_mask else name)
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETEXTS)
def test_a_step_waits_for_nothing(name: str, photos: Path) -> None:
    kind = pretext_class(name).info.backbones
    backbone = "test_resnet" if kind in ("any", "CNN") else "test_vit"
    task = prepared(pretext_class(name)(build_encoder(backbone, 64), **required(name)))
    dataset = ViewDataset(find_images([photos]), task.views(), seed=0)
    keys: list[Key] = [(0, index) for index in range(8)]
    batch = collate([dataset[key] for key in keys])
    optimizer = task.configure_optimizers()
    for task.progress in (0.0, 0.5):
        with Waits() as waits:
            task.training_step(batch, 0).backward()
            task.on_after_backward()
            task.on_before_optimizer_step(optimizer)
            optimizer.step()
            task.after_step()
        assert waits.names <= KNOWN.get(name, set())
