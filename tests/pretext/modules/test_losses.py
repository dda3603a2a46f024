"""Losses against slow literal versions of their papers' equations, in one process and in two."""

import math
import os
import socket
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vissl_lite.pretext.modules import losses
from vissl_lite.pretext.modules.losses import (
    Center,
    barlow_twins,
    contrast,
    cross_entropy,
    info_nce,
    koleo,
    negative_cosine,
    nt_xent,
    patch_loss,
    random_directions,
    sigreg,
    sinkhorn,
    swapped_cosine,
    vicreg,
    visreg,
)
from vissl_lite.pretext.modules.queue import Queue
from vissl_lite.training.processes import gather


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


@pytest.mark.parametrize(("count", "temperature"), [(1, 0.5), (2, 0.1), (7, 0.1), (7, 1.0)])
def test_nt_xent_equals_the_paper(count: int, temperature: float) -> None:
    z1, z2 = embeddings(count)
    ours = nt_xent(z1, z2, temperature)
    assert ours.item() == pytest.approx(literal_nt_xent(z1, z2, temperature).item(), abs=1e-5)


def test_nt_xent_matches_a_local_crop_with_each_view() -> None:
    """A local crop in the place of a view, term by term; the mean is over all pairs."""
    z1, z2 = embeddings(5)
    crops = [torch.randn(5, 5, generator=torch.Generator().manual_seed(n)) for n in range(3)]

    def unit(row: torch.Tensor) -> torch.Tensor:
        return row.double() / row.double().norm()

    total = 10 * literal_nt_xent(z1, z2, 0.2)
    for crop in crops:
        for own, other in ((z1, z2), (z2, z1)):
            for i in range(5):
                keys = [other[i], *(z[j] for z in (own, other) for j in range(5) if j != i)]
                scores = torch.stack([unit(crop[i]) @ unit(key) / 0.2 for key in keys])
                total = total - scores.log_softmax(dim=0)[0]
    ours = nt_xent(z1, z2, 0.2, crops)
    assert ours.item() == pytest.approx(total.item() / 40, abs=1e-5)
    same = torch.ones(5, 3)  # no better than a guess among nine
    assert nt_xent(same, same, 0.2, [same]).item() == pytest.approx(math.log(9), abs=1e-5)


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


@pytest.mark.parametrize("loss", [nt_xent, contrast])
def test_rows_some_at_a_time_change_nothing(
    loss: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient of each embedding, with chunks that do not come out even."""
    z1, z2 = (z.requires_grad_() for z in embeddings(11))
    whole = loss(z1, z2, 0.2)
    expected = torch.autograd.grad(3 * whole, [z1, z2])
    for rows in (1, 4):
        monkeypatch.setattr(losses, "CHUNK_BYTES", rows * 4 * (22 if loss is nt_xent else 11))
        chunked = loss(z1, z2, 0.2)
        torch.testing.assert_close(chunked, whole)
        for one, other in zip(torch.autograd.grad(3 * chunked, [z1, z2]), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_contrast_has_the_gradient_of_the_paper_for_queries_alone_too() -> None:
    for fixed in (0, 1, 2):
        inputs = [z.requires_grad_(number != fixed) for number, z in enumerate(embeddings(6))]
        needed = [z for z in inputs if z.requires_grad]
        ours = torch.autograd.grad(contrast(*inputs, 0.2), needed)
        paper = torch.autograd.grad(literal_contrast(*inputs, 0.2), needed)
        for one, other in zip(ours, paper, strict=True):
            torch.testing.assert_close(one, other.float(), atol=1e-5, rtol=1e-4)


def literal_contrast(query: torch.Tensor, key: torch.Tensor, temperature: float) -> torch.Tensor:
    """MoCo v3, eq. 1 without 2 T; NNCLR, eq. 3."""
    q = [row / row.norm() for row in query.double()]
    k = [row / row.norm() for row in key.double()]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(q)):
        below = sum((q[i] @ k[j] / temperature).exp() for j in range(len(k)))
        total = total - ((q[i] @ k[i] / temperature).exp() / below).log()
    return total / len(q)


def test_contrast_equals_the_paper() -> None:
    z1, z2 = embeddings(7)
    ours, paper = contrast(z1, z2, 0.2), literal_contrast(z1, z2, 0.2)
    assert ours.item() == pytest.approx(paper.item(), abs=1e-5)
    assert contrast(z2, z1, 0.2).item() != pytest.approx(paper.item(), abs=1e-3)


def test_info_nce_is_of_the_positive_among_the_queue_and_the_other_images() -> None:
    """MoCo, eq. 1, for three images with two queries each."""
    z1, z2 = embeddings(6)
    images = torch.randn(3, 5)
    queue = torch.nn.functional.normalize(torch.randn(9, 5), dim=1)
    total = 0.0
    for number, (query, key) in enumerate(zip(z1.double(), z2.double(), strict=True)):
        query, key = query / query.norm(), key / key.norm()
        others = [one / one.norm() for i, one in enumerate(images.double()) if i != number // 2]
        positive = math.exp(query @ key / 0.1)
        negatives = sum(math.exp(query @ negative / 0.1) for negative in (*others, *queue.double()))
        total -= math.log(positive / (positive + negatives))
    assert info_nce(z1, z2, images, queue, 0.1).item() == pytest.approx(total / 6, rel=1e-5)


def test_negative_cosine_stops_the_gradient_at_the_target() -> None:
    p, z = (one.requires_grad_() for one in embeddings(4))
    loss = negative_cosine(p, z)
    literal = -sum(a @ b / (a.norm() * b.norm()) for a, b in zip(p, z, strict=True)) / 4
    assert loss.item() == pytest.approx(literal.item(), abs=1e-6)
    loss.backward()
    assert z.grad is None
    assert p.grad is not None


def test_byol_is_the_squared_distance_of_unit_vectors() -> None:
    """BYOL, eq. 2: || p - z ||^2 of unit vectors is 2 + 2 times the negative cosine."""
    p, z = embeddings(5)
    unit = torch.nn.functional.normalize
    distance = (unit(p, dim=1) - unit(z, dim=1)).square().sum(dim=1).mean()
    assert (2 + 2 * negative_cosine(p, z)).item() == pytest.approx(distance.item(), abs=1e-5)


def test_each_target_is_predicted_from_all_other_views() -> None:
    targets, predictions = embeddings(4), [*embeddings(4), *embeddings(4)]
    pairs = [(1, 0), (2, 0), (3, 0), (0, 1), (2, 1), (3, 1)]
    literal = sum(negative_cosine(predictions[v], targets[t]) for v, t in pairs) / 6
    assert swapped_cosine(predictions, targets).item() == pytest.approx(float(literal), abs=1e-6)


def test_barlow_twins_equals_the_paper() -> None:
    """Eq. 1 and 2; standardized as in the authors' code, a BatchNorm without parameters."""
    z1, z2 = embeddings(8)
    a, b = z1.double(), z2.double()
    a = (a - a.mean(0)) / (a.var(0, correction=0) + 1e-5).sqrt()
    b = (b - b.mean(0)) / (b.var(0, correction=0) + 1e-5).sqrt()
    total = 0.0
    for i in range(5):
        for j in range(5):
            correlation = sum(a[n, i] * b[n, j] for n in range(8)) / 8
            total += (1 - correlation) ** 2 if i == j else 0.01 * correlation**2
    assert barlow_twins(z1, z2, 0.01).item() == pytest.approx(float(total), rel=1e-4)


def literal_vicreg(*views: torch.Tensor) -> float:
    """The paper's for two views; further ones are local crops."""
    count, size = views[0].shape
    pairs = [(v, g) for g in (0, 1) for v in range(len(views)) if v != g]
    similarity = sum(
        (a - b).square().sum() / (count * size * len(pairs))
        for v, g in pairs
        for a, b in zip(views[v], views[g], strict=True)
    )
    terms = []
    for z in (view.double() for view in views):
        mean = z.mean(0)
        std = [
            math.sqrt(sum((z[n, j] - mean[j]) ** 2 for n in range(count)) / (count - 1) + 1e-4)
            for j in range(size)
        ]
        spread = sum(max(0.0, 1 - s) for s in std) / size
        covariance = 0.0
        for i in range(size):
            for j in range(size):
                if i != j:
                    c = sum((z[n, i] - mean[i]) * (z[n, j] - mean[j]) for n in range(count))
                    covariance += float(c / (count - 1)) ** 2 / size
        terms.append((spread, covariance))
    spread = sum(term[0] for term in terms) / len(views)
    covariance = 2 * sum(term[1] for term in terms) / len(views)
    return float(25 * similarity + 15 * spread + 2 * covariance)


def test_vicreg_equals_the_paper() -> None:
    z1, z2 = (0.6 * z for z in embeddings(7))  # below 1, where the hinge is at work
    assert vicreg(z1, z2, 25, 15, 2).item() == pytest.approx(literal_vicreg(z1, z2), rel=1e-4)
    crops = [0.3 * z for z in embeddings(7)]
    ours = vicreg(z1, z2, 25, 15, 2, crops)
    assert ours.item() == pytest.approx(literal_vicreg(z1, z2, *crops), rel=1e-4)


def test_sigreg_is_the_epps_pulley_statistic() -> None:
    """LeJEPA, algorithm 1: N times the weighted distance of characteristic functions."""
    z, directions = embeddings(6)[0], random_directions(5, 3, torch.zeros(1))
    total = 0.0
    grid = np.linspace(-5, 5, 33)
    for direction in directions.T.double():
        values = (z.double() @ direction).numpy()
        empirical = np.array([np.exp(1j * t * values).mean() for t in grid])
        normal = np.exp(-(grid**2) / 2)
        total += 6 * np.trapezoid(np.abs(empirical - normal) ** 2 * normal, grid)
    assert sigreg(z, directions).item() == pytest.approx(total / 3, rel=1e-4)


def test_sigreg_is_small_for_a_gaussian_and_large_for_a_collapse_or_two_clusters() -> None:
    random = torch.Generator().manual_seed(0)
    gaussian = torch.randn(512, 8, generator=random)
    clusters = 3.0 * torch.sign(gaussian)
    directions = random_directions(8, 64, gaussian)
    assert sigreg(gaussian, directions) < 2
    assert sigreg(torch.zeros(512, 8), directions) > 50
    assert sigreg(clusters, directions) > 10


def test_visreg_equals_the_paper() -> None:
    z, directions = 1.7 * embeddings(6)[0] + 0.3, random_directions(5, 3, torch.zeros(1))
    x = z.double()
    center = x.mean(0)
    std = ((x - center) ** 2).mean(0).sqrt()
    scale = ((std - 1) ** 2).mean()
    normal = NormalDist()
    quantiles = torch.tensor([normal.inv_cdf(i / 7) for i in range(1, 7)], dtype=torch.float64)
    shape = 0.0
    for direction in directions.T.double():
        projected = sorted(((row - center) / std) @ direction for row in x)
        shape += sum((p - q) ** 2 for p, q in zip(projected, quantiles, strict=True)) / 6 / 3
    total = scale + shape + (center**2).mean()
    assert visreg(z, directions).item() == pytest.approx(float(total), rel=1e-4)


def test_visreg_has_a_gradient_at_collapse_where_sigregs_vanishes() -> None:
    """What the method is for (section 3): embeddings shrunk to a point are pulled apart."""
    base = embeddings(32)[0]
    norms = {}
    for loss in (visreg, sigreg):
        z = (1e-3 * base).requires_grad_()
        loss(z, random_directions(5, 16, z)).backward()
        norms[loss.__name__] = float((z.grad - z.grad.mean(dim=0)).norm())
    assert norms["visreg"] > 10 * norms["sigreg"]


def literal_sinkhorn(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """SwAV, appendix A.1: rows and columns in turn, entry by entry."""
    rows, columns = scores.shape
    q = [[math.exp(scores[i, j].item() / epsilon) for j in range(columns)] for i in range(rows)]
    for _ in range(iterations):
        for j in range(columns):
            total = sum(q[i][j] for i in range(rows))
            for i in range(rows):
                q[i][j] /= total * columns
        for i in range(rows):
            total = sum(q[i])
            q[i] = [value / total / rows for value in q[i]]
    return torch.tensor(q) * rows


def test_sinkhorn_equals_the_paper_and_uses_prototypes_evenly() -> None:
    scores = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    torch.testing.assert_close(sinkhorn(scores, 0.2, 3), literal_sinkhorn(scores, 0.2, 3))
    codes = sinkhorn(scores, 0.2, 50)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(12))
    torch.testing.assert_close(codes.sum(dim=0), torch.full((4,), 3.0), atol=1e-2, rtol=1e-2)


def test_sinkhorn_with_earlier_scores_gives_the_batchs_share_of_the_joint_assignment() -> None:
    scores = torch.randn(10, 4).clamp(-1, 1)
    together = sinkhorn(scores, 0.1, 3)
    torch.testing.assert_close(sinkhorn(scores[:4], 0.1, 3, scores[4:]), together[:4])


def test_sinkhorn_stays_finite_where_every_image_likes_one_prototype() -> None:
    scores = torch.full((8, 16), -1.0)
    scores[:, 3] = 1.0
    codes = sinkhorn(scores, 0.01, 3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(8))


def test_sinkhorn_stays_finite_where_an_image_is_far_below_the_others() -> None:
    scores = torch.full((3, 4), -1.0)
    scores[0, 0], scores[1, 1] = 1.0, 0.95
    scores[2] = torch.tensor([-1.0, -0.98, -0.96, -0.94])
    torch.testing.assert_close(sinkhorn(scores, 0.05, 3), literal_sinkhorn(scores, 0.05, 3))
    torch.testing.assert_close(sinkhorn(scores, 0.005, 3).sum(dim=1), torch.ones(3))


def test_cross_entropy_and_center_equal_the_paper() -> None:
    """DINO, eq. 2 and 4, and algorithm 1."""
    teacher, student = torch.randn(4, 6), torch.randn(4, 6)
    center = Center(6, momentum=0.9)
    center.update(teacher)
    torch.testing.assert_close(center.mean, 0.1 * teacher.mean(dim=0))
    before = center.mean.clone()
    targets = center.targets(teacher, 0.04)
    parts = Center(6, momentum=0.9)
    for _ in range(4):
        parts.update(teacher, batches_per_step=4)
    torch.testing.assert_close(parts.mean, before)
    for n in range(4):
        p = ((teacher[n] - before) / 0.04).double()
        p = (p - p.max()).exp() / (p - p.max()).exp().sum()
        s = (student[n] / 0.1).double()
        q = (s - s.max()).exp() / (s - s.max()).exp().sum()
        expected = -(p * q.log()).sum()
        loss = cross_entropy(targets, student, 0.1)[n]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


def test_patch_loss_is_a_mean_over_patches_then_over_images() -> None:
    """iBOT, equation 2, loop by loop; an image without a mask counts as 0."""
    mask = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])
    targets, scores = torch.rand(4, 5).softmax(dim=1), torch.randn(4, 5)
    place, images = 0, []
    for row in mask:
        terms = []
        for masked in row:
            if masked:
                log = (scores[place] / 0.1).log_softmax(dim=0)
                terms.append(-(targets[place] * log).sum())
                place += 1
        images.append(torch.stack(terms).mean() if terms else torch.zeros(()))
    expected = torch.stack(images).mean()
    torch.testing.assert_close(patch_loss(targets, scores, mask, 0.1), expected)


def test_koleo_is_the_mean_log_distance_to_the_nearest() -> None:
    z = embeddings(6)[0]
    unit = z / z.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        total -= math.log(min((unit[i] - unit[j]).norm().item() for j in range(6) if j != i))
    assert koleo(z).item() == pytest.approx(total / 6, rel=1e-4)
    assert koleo(z[:1]).item() == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# Losses that look at the whole batch, as functions of two shared batches of embeddings.
DIRECTIONS = random_directions(5, 16, torch.zeros(1))
WHOLE_BATCH = {
    "nt_xent": lambda a, b: nt_xent(a, b, 0.2),
    "nt_xent with a local crop": lambda a, b: nt_xent(a, b, 0.2, [a - 2 * b]),
    "contrast": lambda a, b: contrast(a, b, 0.2),
    "barlow_twins": lambda a, b: barlow_twins(a, b, 0.01),
    "vicreg": lambda a, b: vicreg(a, b, 25, 25, 1),
    "vicreg with a local crop": lambda a, b: vicreg(a, b, 25, 25, 1, [a - 2 * b]),
    "sigreg": lambda a, b: sigreg(a, DIRECTIONS) + sigreg(b, DIRECTIONS),
    "visreg": lambda a, b: visreg(a, DIRECTIONS) + visreg(b, DIRECTIONS),
    "swav": lambda a, b: (
        cross_entropy(sinkhorn(a.clamp(-1, 1), 0.2, 3), b, 0.1).mean()
        + cross_entropy(sinkhorn(b.clamp(-1, 1), 0.2, 3), a, 0.1).mean()
    ),
}


# Similarities to prototypes, of which one process has more rows than the other.
SCORES = embeddings(8)[0].clamp(-1, 1)
UNEQUAL = (slice(0, 2), slice(2, 8))


def _loss_and_gradient(name: str, own: slice) -> tuple[float, torch.Tensor]:
    z1, z2 = embeddings(8)
    weight = torch.eye(5).requires_grad_()  # a layer that both ranks share
    loss = WHOLE_BATCH[name](z1[own] @ weight, z2[own] @ weight)
    loss.backward()
    return loss.item(), weight.grad


def _states(rank: int, count: int) -> dict[str, torch.Tensor]:
    """A queue and a center after two batches, of which each rank has a part."""
    torch.manual_seed(0)
    queue, center = Queue(10, 5), Center(5, 0.9)
    for batch in embeddings(8):
        own = batch[rank * count : (rank + 1) * count]
        queue.push(own)
        center.update(own)
    return {"queue": queue.items, "position": queue.position, "center": center.mean}


def _one_rank(rank: int, port: int, directions: torch.Tensor, results: dict) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    DIRECTIONS.copy_(directions)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name in WHOLE_BATCH:
        loss, gradient = _loss_and_gradient(name, slice(rank * 4, rank * 4 + 4))
        dist.all_reduce(gradient)  # what DistributedDataParallel does with gradients
        results[name, rank] = (loss, gradient / 2)
    results["states", rank] = _states(rank, 4)
    results["codes", rank] = sinkhorn(SCORES[UNEQUAL[rank]], 0.2, 3)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes() -> dict:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_one_rank, args=(free_port(), DIRECTIONS, results), nprocs=2)
        return dict(results)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE_BATCH)
def test_two_processes_equal_one_process_on_the_joined_batch(
    name: str, two_processes: dict
) -> None:
    (loss0, gradient0), (loss1, gradient1) = two_processes[name, 0], two_processes[name, 1]
    whole, gradient = _loss_and_gradient(name, slice(0, 8))
    assert (loss0 + loss1) / 2 == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(gradient0, gradient, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient1, gradient0)


@pytest.mark.slow
def test_queue_and_center_of_two_processes_are_those_of_one(two_processes: dict) -> None:
    whole = _states(0, 8)
    for rank in (0, 1):
        for name, value in two_processes["states", rank].items():
            torch.testing.assert_close(value, whole[name])


@pytest.mark.slow
def test_sinkhorn_balances_batches_of_unequal_size(two_processes: dict) -> None:
    """As those of masked patches are."""
    codes = torch.cat([two_processes["codes", rank] for rank in (0, 1)])
    torch.testing.assert_close(codes, literal_sinkhorn(SCORES, 0.2, 3))
