"""Losses as pure functions of embeddings; where they look at the whole batch, of all processes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.training.processes import gather, world

# Of similarities that are there at a time. With more, matrix products become no faster. The whole
# matrix of 1024 images in each of 64 processes would be 1 GB, and autograd would keep several.
CHUNK_BYTES = 2**26


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each query's similarities to all keys, some rows at a time.

    The gradient is made along with the loss, while the rows are there: nothing that is as large as
    queries times keys is kept, or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, target: Tensor, excluded: Tensor | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        query_gradient = torch.empty_like(query) if wanted else None
        key_gradient = torch.zeros_like(key) if ctx.needs_input_grad[1] else None
        total = query.new_zeros(())
        rows = max(1, CHUNK_BYTES // (4 * len(key)))
        for start in range(0, len(query), rows):
            part = slice(start, start + rows)
            scores = query[part] @ key.T
            if excluded is not None:
                scores.scatter_(1, excluded[part, None], float("-inf"))
            norm = scores.logsumexp(dim=1, keepdim=True)
            total += (norm - scores.gather(1, target[part, None])).sum()
            if query_gradient is None:
                continue
            scores.sub_(norm).exp_()  # now the probabilities
            scores.scatter_add_(1, target[part, None], -torch.ones_like(norm))
            query_gradient[part] = scores @ key
            if key_gradient is not None:
                key_gradient.addmm_(scores.T, query[part])
        ctx.save_for_backward(query_gradient, key_gradient)
        return total / len(query)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query_gradient, key_gradient = ctx.saved_tensors
        share = gradient / len(query_gradient)
        return (
            share * query_gradient,
            None if key_gradient is None else share * key_gradient,
            None,
            None,
        )


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalized temperature-scaled cross-entropy (SimCLR, Chen et al. 2020, eq. 1).

    Every embedding has to find the other view of its image among all other embeddings of both
    views, those of other processes included. The mean of the processes' losses is the loss of the
    joined batch, and so is its gradient. Memory grows with the batch alone, time with its square.

    Args:
        z1: ``(B, D)`` embeddings of the first views; need not be normalized.
        z2: ``(B, D)`` of the second views.
        temperature: above 0.

    Returns:
        A scalar, the mean over this process's 2 B embeddings. Computed in float32.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        rank, size = len(z1) * world()[0], len(z1)
        others = torch.cat([gather(z1), gather(z2)])
        total = len(others) // 2
        own = torch.arange(size, device=z1.device) + rank
        itself = torch.cat([own, own + total])
        partner = torch.cat([own + total, own])
        loss: Tensor = _ChunkedCrossEntropy.apply(
            torch.cat([z1, z2]) / temperature, others, partner, itself
        )
        return loss


def contrast(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Every query has to find its key among the keys of the batch (InfoNCE, van den Oord 2018).

    Equation 1 of MoCo v3 (Chen et al. 2021) without its factor of 2 T, and equation 3 of NNCLR
    (Dwibedi et al. 2021). Keys of other processes are negatives too.

    Args:
        query: ``(B, D)``; need not be normalized.
        key: ``(B, D)``, likewise; may have a gradient.
        temperature: above 0.

    Returns:
        A scalar, the mean over this process's queries. Computed in float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = F.normalize(query.float(), dim=1), F.normalize(key.float(), dim=1)
        own = torch.arange(len(query), device=query.device) + world()[0] * len(query)
        loss: Tensor = _ChunkedCrossEntropy.apply(query / temperature, gather(key), own, None)
        return loss


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Every query has to find its key beside a queue of negatives (MoCo, He et al. 2020, eq. 1).

    Args:
        query: ``(B, D)``; need not be normalized.
        key: ``(B, D)``, likewise; its gradient is up to the caller.
        queue: ``(Q, D)``, normalized.
        temperature: above 0.

    Returns:
        A scalar, the mean over the queries. Computed in float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = F.normalize(query.float(), dim=1), F.normalize(key.float(), dim=1)
        positive = (query * key).sum(dim=1, keepdim=True)
        similarity = torch.cat([positive, query @ queue.T], dim=1) / temperature
        return F.cross_entropy(similarity, similarity.new_zeros(len(query), dtype=torch.long))


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Negative cosine similarity (SimSiam, Chen & He 2021, eq. 1); BYOL's loss is 2 + 2 times it.

    Args:
        prediction: ``(B, D)``.
        target: ``(B, D)``; no gradient flows into it.

    Returns:
        A scalar in [-1, 1], the mean over the batch. Computed in float32.
    """
    return -F.cosine_similarity(prediction.float(), target.detach().float(), dim=1).mean()


def barlow_twins(z1: Tensor, z2: Tensor, lambd: float) -> Tensor:
    """Cross-correlation of two views' embeddings against the identity (Zbontar et al. 2021, eq. 1).

    The correlations are those of the batch joined over processes.

    Args:
        z1: ``(B, D)`` embeddings of the first views, B * processes at least 2.
        z2: ``(B, D)`` of the second views.
        lambd: weight of the off-diagonal terms.

    Returns:
        A scalar, a sum over D^2 entries. Computed in float32.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = gather(z1.float()), gather(z2.float())
        z1 = F.batch_norm(z1, None, None, training=True)
        z2 = F.batch_norm(z2, None, None, training=True)
        correlation = z1.T @ z2 / len(z1)
        diagonal = torch.diagonal(correlation)
        redundancy = correlation.square().sum() - diagonal.square().sum()
        return (diagonal - 1).square().sum() + lambd * redundancy


def vicreg(
    z1: Tensor, z2: Tensor, sim_weight: float, std_weight: float, cov_weight: float
) -> Tensor:
    """Variance, invariance, covariance (VICReg, Bardes et al. 2022, eq. 1 to 6).

    Variances and covariances are those of the batch joined over processes.

    Args:
        z1: ``(B, D)`` embeddings of the first views, B * processes at least 2.
        z2: ``(B, D)`` of the second views.
        sim_weight: lambda, of the squared distance between views.
        std_weight: mu, of the hinge that keeps each dimension's standard deviation at 1.
        cov_weight: nu, of the squared covariances between dimensions.

    Returns:
        A scalar. Computed in float32.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = gather(z1.float()), gather(z2.float())
        similarity = F.mse_loss(z1, z2)
        spread = (_variance_hinge(z1) + _variance_hinge(z2)) / 2  # as the authors' code has it
        covariance = _covariance(z1) + _covariance(z2)
        return sim_weight * similarity + std_weight * spread + cov_weight * covariance


def _variance_hinge(z: Tensor) -> Tensor:
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def _covariance(z: Tensor) -> Tensor:
    centered = z - z.mean(dim=0)
    covariance = centered.T @ centered / (len(z) - 1)  # as z.T.cov(), which waits for a GPU
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


def random_directions(size: int, count: int, like: Tensor) -> Tensor:
    """Unit vectors drawn evenly, ``(size, count)`` float32, on the device of a tensor."""
    return F.normalize(torch.randn(size, count, device=like.device), dim=0)


def sigreg(z: Tensor, directions: Tensor, points: int = 17, reach: float = 5.0) -> Tensor:
    """Sketched isotropic Gaussian regularization (LeJEPA, Balestriero & LeCun 2025, algorithm 1).

    Along each direction the embeddings' characteristic function is compared with that of the
    standard normal distribution (Epps & Pulley 1983), over the batch joined over processes. Each
    process may bring directions of its own.

    Args:
        z: ``(B, D)`` embeddings.
        directions: ``(D, S)`` unit vectors.
        points: of the trapezoidal quadrature.
        reach: the integral runs from minus this to this.

    Returns:
        A scalar, the mean over directions of the test statistic. Computed in float32.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = gather(z.float())
        # the integrand is even: integrate from 0, twice
        t = torch.linspace(0, reach, points, device=z.device)
        normal = torch.exp(-t.square() / 2)
        angles = (z @ directions).unsqueeze(2) * t
        error = (angles.cos().mean(dim=0) - normal).square() + angles.sin().mean(dim=0).square()
        return 2 * len(z) * torch.trapezoid(error * normal, t, dim=1).mean()


def visreg(z: Tensor, directions: Tensor) -> Tensor:
    """Scale, shape and center of the embeddings' distribution (VISReg, Wu et al. 2026, section 3).

    The scale term pulls each dimension's standard deviation to 1, however far it is; the shape term
    is the sliced 2-Wasserstein distance of the standardized embeddings to a Gaussian. Over the
    batch joined over processes; each process may bring directions of its own.

    Args:
        z: ``(B, D)`` embeddings.
        directions: ``(D, S)`` unit vectors.

    Returns:
        A scalar, the sum of the three terms. Computed in float32.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = gather(z.float())
        center = z.mean(dim=0)
        std = (z.var(dim=0, correction=0) + 1e-12).sqrt()
        standard = (z - center) / std.detach().clamp_min(1e-6)
        ranks = torch.arange(1, len(z) + 1, device=z.device) / (len(z) + 1)
        quantiles = torch.special.ndtri(ranks)
        shape = ((standard @ directions).sort(dim=0).values - quantiles[:, None]).square().mean()
        return (std - 1).square().mean() + shape + center.square().mean()


@torch.no_grad()
def sinkhorn(
    scores: Tensor, epsilon: float, iterations: int, earlier: Tensor | None = None
) -> Tensor:
    """Soft assignments that use all prototypes equally (SwAV, Caron et al. 2020, eq. 3 to 5).

    Args:
        scores: ``(B, K)`` similarities to prototypes, in [-1, 1]; joined over processes.
        epsilon: smoothness, above 0.
        iterations: of normalizing rows and columns.
        earlier: ``(Q, K)`` similarities of earlier embeddings, the same in all processes, that are
            assigned along with the batch (section 3.1).

    Returns:
        ``(B, K)`` float32, each row a distribution; without gradient.
    """
    with torch.autocast(scores.device.type, enabled=False):
        size, processes = len(scores), world()[1]
        codes = scores.float()
        if earlier is not None:
            codes = torch.cat([codes, earlier.float()])
        rows = processes * size + len(codes) - size
        highest = codes.max()
        if processes > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        codes = ((codes - highest) / epsilon).exp()
        for _ in range(iterations):
            # each process keeps its own rows: only the sums of columns travel
            columns = codes[:size].sum(dim=0)
            if processes > 1:
                dist.all_reduce(columns)
            columns += codes[size:].sum(dim=0)  # the same everywhere
            # a prototype that underflows gets nothing, rather than an infinite share
            codes = codes / (columns.clamp_min(1e-30) * codes.shape[1])
            codes = codes / (codes.sum(dim=1, keepdim=True) * rows)
        return rows * codes[:size]


def cross_entropy(targets: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of distributions with scores (DINO, Caron et al. 2021, eq. 2).

    Args:
        targets: ``(B, K)``, each row a distribution.
        scores: ``(B, K)``.
        temperature: of the scores, above 0.

    Returns:
        ``(B,)``. Computed in float32.
    """
    return -(targets * F.log_softmax(scores.float() / temperature, dim=1)).sum(dim=1)


def swapped_prediction(
    scores: Sequence[Tensor], codes: Sequence[Tensor], temperature: float
) -> Tensor:
    """Every view predicts the codes of the large views but its own (SwAV, eq. 6; DINO, eq. 3).

    Args:
        scores: ``(B, K)`` similarities to the prototypes, of each view, the large ones first.
        codes: ``(B, K)`` distributions of each large view: assignments, or what a teacher says.
        temperature: above 0.

    Returns:
        A scalar, the mean over pairs of views. Computed in float32.
    """
    terms = [
        cross_entropy(code, score, temperature).mean()
        for large, code in enumerate(codes)
        for view, score in enumerate(scores)
        if view != large
    ]
    return torch.stack(terms).mean()


def koleo(z: Tensor) -> Tensor:
    """Spreads embeddings evenly (Sablayrolles et al. 2019; DINOv2, Oquab et al. 2023, section 4).

    Args:
        z: ``(B, D)``, of this process alone; B at least 2.

    Returns:
        Minus the mean logarithm of the distance to the nearest neighbor. Computed in float32.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.float(), dim=1)
        similarity = (z @ z.T).detach().fill_diagonal_(-2)
        nearest = similarity.argmax(dim=1)
        return -(F.pairwise_distance(z, z[nearest], eps=1e-8) + 1e-8).log().mean()


class Center(nn.Module):
    """The running mean of a teacher's outputs, which keeps one from winning always (DINO, eq. 4).

    A module, so that a checkpoint holds it. The mean is over all processes.

    Args:
        size: of an output.
        momentum: of the mean.
    """

    def __init__(self, size: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(size))

    def targets(self, outputs: Tensor, temperature: float) -> Tensor:
        """Distributions for a student to predict: ``(B, size)``, float32.

        Args:
            outputs: ``(B, size)`` of the teacher.
            temperature: below the student's, which sharpens them.
        """
        return F.softmax((outputs.float() - self.mean) / temperature, dim=1)

    @torch.no_grad()
    def update(self, outputs: Tensor) -> None:
        """Take in a batch's outputs, ``(B, size)``."""
        batch_mean = gather(outputs.float()).mean(dim=0)
        self.mean = torch.lerp(batch_mean, self.mean, self.momentum)
