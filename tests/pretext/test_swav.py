import pytest
import torch
from torch import nn

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.modules.losses import swapped_prediction
from vissl_lite.pretext.swav import SwAV


def test_each_view_predicts_the_large_ones_but_itself() -> None:
    """Equation 6, term by term."""
    scores = [torch.randn(3, 5).double() for _ in range(4)]
    codes = [torch.rand(3, 5).softmax(dim=1).double() for _ in range(2)]
    terms = []
    for large in range(2):
        for view in range(4):
            if view != large:
                for n in range(3):
                    p = (scores[view][n] / 0.1).exp() / (scores[view][n] / 0.1).exp().sum()
                    terms.append(-(codes[large][n] * p.log()).sum())
    loss = swapped_prediction(scores, codes, 0.1)
    assert loss.item() == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)


def test_the_queue_takes_part_once_the_run_is_on_its_way() -> None:
    torch.manual_seed(0)
    task = SwAV(build_encoder("test_resnet", 32), queue_size=64, queue_start=0.5)
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    before = [queue.items.clone() for queue in task.queues]
    losses = {}
    for progress in (0.0, 0.9):
        for queue, items in zip(task.queues, before, strict=True):
            queue.items.copy_(items)
        task.progress = progress
        losses[progress] = float(task.loss(views))
    assert losses[0.0] != pytest.approx(losses[0.9], rel=1e-4)
    assert not any(
        torch.equal(queue.items, items) for queue, items in zip(task.queues, before, strict=True)
    )


@pytest.mark.parametrize(("progress", "trained"), [(0.0, False), (0.2, True)])
def test_the_prototypes_are_not_trained_at_first(progress: float, trained: bool) -> None:
    task = SwAV(build_encoder("test_resnet", 32), freeze_prototypes=0.1)
    task.progress = progress
    task.loss([torch.randn(8, 3, 32, 32) for _ in range(2)]).backward()
    task.on_after_backward()
    assert (task.prototypes.weight.grad is not None) == trained


def test_the_batch_norm_of_the_head_sees_all_crops_at_once() -> None:
    """As in the authors' code: ``forward_head`` gets the outputs for all crops."""
    task = SwAV(build_encoder("test_resnet", 32))
    sizes: list[int] = []
    assert isinstance(task.head[1], nn.BatchNorm1d)
    task.head[1].register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    task.loss([torch.randn(8, 3, side, side) for side in (32, 32, 16)])
    assert sizes == [24]


def test_without_a_queue() -> None:
    task = SwAV(build_encoder("test_resnet", 32), queue_size=0)
    assert task.queues == []
    task.progress = 1.0
    assert task.loss([torch.randn(8, 3, 32, 32) for _ in range(2)]).isfinite()
