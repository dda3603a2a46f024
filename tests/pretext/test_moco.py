from pathlib import Path
from typing import Any

import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.densecl import DenseCL
from vissl_lite.pretext.moco import MoCo
from vissl_lite.pretext.modules.queue import Queue


@pytest.mark.parametrize("kind", [MoCo, DenseCL])
def test_keys_do_not_depend_on_the_other_images_of_a_batch(kind: type[PretextTask]) -> None:
    """Otherwise BatchNorm would tell the key of this batch from those of the queue."""
    torch.manual_seed(0)
    task = kind(build_encoder("test_resnet", 32))
    views = [torch.randn(6, 3, 32, 32) for _ in range(2)]
    task.train()
    task.loss(views)
    task.after_step()
    teacher = task.get_submodule("teacher_encoder")
    alone, together = teacher(views[1][:3]), teacher(views[1])[:3]
    torch.testing.assert_close(alone, together)
    student = task.encoder(views[1][:3]), task.encoder(views[1])[:3]
    assert not torch.allclose(*student, atol=1e-3)


def test_the_teacher_follows_the_statistics_of_the_student() -> None:
    task = MoCo(build_encoder("test_resnet", 32), momentum=0.5)
    task.train()
    for _ in range(12):
        task.loss([torch.randn(6, 3, 32, 32) + 1 for _ in range(2)])
        task.after_step()
    names = [name for name, _ in task.encoder.named_buffers() if name.endswith("running_mean")]
    for name in names:
        own, followed = task.teacher_encoder.get_buffer(name), task.encoder.get_buffer(name)
        assert own.abs().sum() > 0
        assert (own - followed).norm() < 0.5 * followed.norm()


@pytest.mark.parametrize("kind", [MoCo, DenseCL])
@pytest.mark.parametrize(
    ("images", "given", "expected"),
    [(840, {}, 210), (50_000, {}, 4096), (40, {"queue_size": 64}, 64)],
)
def test_a_queue_holds_at_most_a_quarter_of_the_images(
    kind: Any, images: int, given: dict[str, int], expected: int, tmp_path: Path
) -> None:
    task = kind(build_encoder("test_resnet", 32), **given)
    task.prepare(range(images), tmp_path)
    queues = [one for one in task.modules() if isinstance(one, Queue)]
    assert {tuple(one.items.shape) for one in queues} == {(expected, 128)}
    assert "queue.items" in task.state_dict()
