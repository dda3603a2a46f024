import torch
from torch.nn.functional import normalize

from vissl_lite.pretext.modules.queue import Queue


def test_holds_the_latest_normalized_and_replaces_the_oldest() -> None:
    queue = Queue(5, 3)
    batches = torch.randn(3, 2, 3)
    for batch in batches:
        queue.push(batch)
    latest = normalize(batches.flatten(0, 1)[-5:], dim=1)
    found = (queue.items @ latest.T > 1 - 1e-6).any(dim=0)
    assert found.all()
    assert queue.position == 1


def test_a_batch_larger_than_the_queue_leaves_its_last_ones() -> None:
    queue = Queue(4, 3)
    batch = torch.randn(9, 3)
    queue.push(batch)
    order = normalize(batch[-4:], dim=1)
    assert sorted(queue.items[:, 0].tolist()) == sorted(order[:, 0].tolist())


def test_pushing_keeps_a_graph_that_used_it_intact_and_takes_no_gradient() -> None:
    queue = Queue(4, 3)
    query, key = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    loss = (query @ queue.items.T).square().sum()
    queue.push(key)
    loss.backward()
    assert query.grad is not None
    assert not queue.items.requires_grad
