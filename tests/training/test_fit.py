from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vissl_lite.data.images import find_images
from vissl_lite.data.stream import Batch, ViewDataset
from vissl_lite.data.views import Views, flip, random_crop
from vissl_lite.leakage.callback import FingerprintCallback
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.training.fit import TrainingFiles, fit
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: tensors made of values, and values taken from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.count += function.overloadpacket.__name__ in ("lift_fresh", "_local_scalar_dense")
        return function(*args, **(kwargs or {}))


class Small(pl.LightningModule):
    """Notes how often something was read in each step; its hooks come after those of callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)
        self.reads: list[int] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.mode = Reads()
        self.mode.__enter__()

    def on_train_batch_end(self, *_: object) -> None:
        self.mode.__exit__(None, None, None)
        self.reads.append(self.mode.count)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.layer(batch.views[0].float()).square().mean()
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.slow
def test_values_are_read_only_at_steps_that_are_logged(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(1e-9, 0.1, 0, 12)
    views = Views([[random_crop(16, 0.3), flip()]], shortest=16)
    data = StreamData(ViewDataset(find_images([photos]), views, 0), 2, 1, schedule, workers=0)
    data.batches_per_epoch = 20  # a row every fourth step
    metrics = MetricsFile(tmp_path / "metrics.csv")
    to_cpu = []
    whole = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda self: to_cpu.append(schedule.batches) or whole(self)
    )
    module = Small()
    keep = FingerprintCallback(tmp_path, data, schedule)
    fit(module, data, schedule, Hardware(devices=1), [keep], TrainingFiles(metrics))
    assert [batch for batch in to_cpu if 0 < batch < 12] == []
    quiet = [count for step, count in enumerate(module.reads, 1) if step % 4 and step > 1]
    assert quiet == [0] * 8
    assert metrics.series("epoch")[1] == pytest.approx([0.2, 0.4, 0.6])
