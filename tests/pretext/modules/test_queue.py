import pytest
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


def test_the_latest_come_first_also_across_the_end_of_the_buffer() -> None:
    queue = Queue(5, 3)
    batches = torch.randn(3, 2, 3)
    for batch in batches:
        queue.push(batch)
    expected = normalize(batches.flatten(0, 1), dim=1).flip(0)
    torch.testing.assert_close(queue.latest(3), expected[:3])
    torch.testing.assert_close(queue.latest(9), expected[:5])


@pytest.mark.parametrize(
    ("momentum", "expected"), [(0.0, 4), (0.7, 4), (0.9, 10), (0.95, 20), (0.999, 64), (1.0, 64)]
)
def test_the_faster_a_teacher_changes_the_fewer_of_its_embeddings_are_fresh(
    momentum: float, expected: int
) -> None:
    assert len(Queue(64, 3).fresh(4, momentum)) == expected
