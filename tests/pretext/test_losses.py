"""Losses against slow literal versions of their papers' equations, in one process and in two."""

import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vissl_lite.pretext.losses import gather, nt_xent


def literal_nt_xent(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> torch.Tensor:
    """SimCLR, eq. 1, and the mean over all positive pairs in both orders, term by term."""
    z = torch.cat([z1, z2]).double()
    count = len(z1)

    def similarity(i: int, j: int) -> torch.Tensor:
        return z[i] @ z[j] / (z[i].norm() * z[j].norm())

    total = torch.zeros((), dtype=torch.float64)
    for i in range(2 * count):
        j = (i + count) % (2 * count)
        below = sum((similarity(i, k) / temperature).exp() for k in range(2 * count) if k != i)
        total = total - ((similarity(i, j) / temperature).exp() / below).log()
    return total / (2 * count)


def embeddings(count: int, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(count)
    z1 = torch.randn(count, size, generator=random)
    return z1, z1 + 0.5 * torch.randn(count, size, generator=random)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_nt_xent_equals_the_paper(count: int, temperature: float) -> None:
    z1, z2 = embeddings(count)
    ours = nt_xent(z1, z2, temperature)
    assert ours.item() == pytest.approx(literal_nt_xent(z1, z2, temperature).item(), abs=1e-5)


def test_nt_xent_has_the_gradient_of_the_paper() -> None:
    z1, z2 = (z.requires_grad_() for z in embeddings(6))
    ours = torch.autograd.grad(nt_xent(z1, z2, 0.2), [z1, z2])
    paper = torch.autograd.grad(literal_nt_xent(z1, z2, 0.2), [z1, z2])
    for one, other in zip(ours, paper, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_nt_xent_of_equal_embeddings_is_that_of_guessing() -> None:
    z = torch.ones(8, 3)
    assert nt_xent(z, z, 0.3).item() == pytest.approx(math.log(15), abs=1e-5)


def test_nt_xent_ignores_length_and_order_of_views() -> None:
    z1, z2 = embeddings(9)
    loss = nt_xent(z1, z2, 0.5)
    torch.testing.assert_close(nt_xent(3 * z1, 0.1 * z2, 0.5), loss)
    torch.testing.assert_close(nt_xent(z2, z1, 0.5), loss)


def test_nt_xent_is_computed_in_float32_under_autocast() -> None:
    z1, z2 = embeddings(16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z1, z2, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(z1, z2, 0.1))


def test_gather_in_one_process_is_the_tensor_itself() -> None:
    tensor = torch.randn(3, 2)
    assert gather(tensor) is tensor


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _one_rank(rank: int, port: int, results: dict) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    z1, z2 = embeddings(8)
    weight = torch.eye(5).requires_grad_()  # a layer that both ranks share
    own = slice(rank * 4, rank * 4 + 4)
    loss = nt_xent(z1[own] @ weight, z2[own] @ weight, 0.2)
    loss.backward()
    # what DistributedDataParallel does with gradients
    dist.all_reduce(weight.grad)
    results[rank] = (loss.item(), weight.grad / 2)
    dist.destroy_process_group()


def test_nt_xent_over_two_processes_equals_one_process_on_the_joined_batch() -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_one_rank, args=(free_port(), results), nprocs=2)
        (loss0, gradient), (loss1, gradient1) = results[0], results[1]
    z1, z2 = embeddings(8)
    weight = torch.eye(5).requires_grad_()
    whole = nt_xent(z1 @ weight, z2 @ weight, 0.2)
    whole.backward()
    assert (loss0 + loss1) / 2 == pytest.approx(whole.item(), abs=1e-6)
    torch.testing.assert_close(gradient, weight.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient1, gradient)
