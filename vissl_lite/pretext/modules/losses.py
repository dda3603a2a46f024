"""Losses as pure functions of embeddings; batch statistics are those of all processes together.

Only ``koleo`` compares the embeddings of one process, as its authors do.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.training.processes import gather, world

# Size of a chunk of similarities; larger ones do not make matrix products faster. The full matrix
# of 1024 images in each of 64 processes would take 1 GB, and autograd would keep several copies.
CHUNK_BYTES = 2**26


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of the similarities of each query to all keys, computed in chunks of rows.

    The forward pass computes the gradient too, while a chunk is in memory: no matrix of queries by
    keys is stored or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, target: Tensor, excluded: Tensor | None
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        query_gradient = torch.empty_like(query) if needs_gradient else None
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
            scores.sub_(norm).exp_()  # Softmax probabilities.
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


def nt_xent(
    z1: Tensor, z2: Tensor, temperature: float, local_crops: Sequence[Tensor] = ()
) -> Tensor:
    """Normalized temperature-scaled cross-entropy (SimCLR, Chen et al. 2020, eq. 1).

    The positive of an embedding is the other view of its image; all other embeddings of both views
    and of all processes are negatives. The mean of the losses of all processes is the loss of the
    joined batch, and so is its gradient. Memory is linear in the batch size, time quadratic.

    A local crop takes the place of each view in turn: its positive is the other view, its
    negatives are those of the view (multi-crop; SwAV, Caron et al. 2020, section 3.2). Local crops
    are not negatives themselves.

    Args:
        z1: ``(B, D)`` embeddings of the first views; need not be normalized.
        z2: ``(B, D)`` embeddings of the second views.
        temperature: Softmax temperature, above 0.
        local_crops: ``(B, D)`` embeddings of each local crop.

    Returns:
        Scalar, the mean over the 2 B pairs of views of this process and the 2 B pairs of each local
        crop. Computed in float32.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2, *local = (F.normalize(z.float(), dim=1) for z in (z1, z2, *local_crops))
        rank, size = len(z1) * world()[0], len(z1)
        others = torch.cat([gather(z1), gather(z2)])
        total = len(others) // 2
        own = torch.arange(size, device=z1.device) + rank
        itself = torch.cat([own, own + total])
        partner = torch.cat([own + total, own])
        queries = [z1, z2, *(z for z in local for _ in range(2))]
        times = 1 + len(local)
        loss: Tensor = _ChunkedCrossEntropy.apply(
            torch.cat(queries) / temperature, others, partner.repeat(times), itself.repeat(times)
        )
        return loss


def contrast(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """InfoNCE with the other keys of the batch as negatives (van den Oord 2018).

    Equation 1 of MoCo v3 (Chen et al. 2021) without its factor of 2 T, and equation 3 of NNCLR
    (Dwibedi et al. 2021). Keys of other processes are negatives too.

    Args:
        query: ``(B, D)`` queries; need not be normalized.
        key: ``(B, D)`` keys; need not be normalized, may require a gradient.
        temperature: Softmax temperature, above 0.

    Returns:
        Scalar, the mean over the queries of this process. Computed in float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = F.normalize(query.float(), dim=1), F.normalize(key.float(), dim=1)
        own = torch.arange(len(query), device=query.device) + world()[0] * len(query)
        loss: Tensor = _ChunkedCrossEntropy.apply(query / temperature, gather(key), own, None)
        return loss


def info_nce(
    query: Tensor, key: Tensor, images: Tensor, queue: Tensor, temperature: float
) -> Tensor:
    """InfoNCE with negatives from a queue (MoCo, He et al. 2020, eq. 1) and from the batch.

    Args:
        query: ``(B P, D)`` queries, P of each image in turn; need not be normalized.
        key: ``(B P, D)`` keys; need not be normalized, not detached here.
        images: ``(B, D)`` a key of each image, a negative for the queries of the other images, over
            all processes; need not be normalized.
        queue: ``(Q, D)`` normalized negatives of earlier batches.
        temperature: Softmax temperature, above 0.

    Returns:
        Scalar, the mean over the queries. Computed in float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = F.normalize(query.float(), dim=1), F.normalize(key.float(), dim=1)
        positive = (query * key).sum(dim=1, keepdim=True)
        everywhere = gather(F.normalize(images.float(), dim=1))
        numbers = world()[0] * len(images) + torch.arange(len(images), device=query.device)
        own = numbers[:, None] == torch.arange(len(everywhere), device=query.device)
        own = own.repeat_interleave(len(query) // len(images), dim=0)
        others = (query @ everywhere.T).masked_fill(own, -torch.inf)
        similarity = torch.cat([positive, others, query @ queue.float().T], dim=1) / temperature
        return F.cross_entropy(similarity, similarity.new_zeros(len(query), dtype=torch.long))


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Negative cosine similarity (SimSiam, Chen & He 2021, eq. 1); BYOL's loss is 2 + 2 times it.

    Args:
        prediction: ``(B, D)`` predictions.
        target: ``(B, D)`` targets; detached.

    Returns:
        Scalar in [-1, 1], the mean over the batch. Computed in float32.
    """
    return -F.cosine_similarity(prediction.float(), target.detach().float(), dim=1).mean()


def swapped_cosine(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Negative cosine similarity of each global crop's target to the predictions of other views.

    Args:
        predictions: ``(B, D)`` predictions from each view, global crops first.
        targets: ``(B, D)`` targets of each global crop; detached.

    Returns:
        Scalar in [-1, 1], the mean over pairs of views. Computed in float32.
    """
    terms = [
        negative_cosine(prediction, target)
        for global_view, target in enumerate(targets)
        for view, prediction in enumerate(predictions)
        if view != global_view
    ]
    return torch.stack(terms).mean()


def barlow_twins(z1: Tensor, z2: Tensor, lambd: float) -> Tensor:
    """Distance of the cross-correlation of two views to the identity (Zbontar et al. 2021, eq. 1).

    The correlations are those of the batch joined over processes.

    Args:
        z1: ``(B, D)`` embeddings of the first views, B * processes at least 2.
        z2: ``(B, D)`` embeddings of the second views.
        lambd: Weight of the off-diagonal terms.

    Returns:
        Scalar, the sum over D^2 entries. Computed in float32.
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
    z1: Tensor,
    z2: Tensor,
    sim_weight: float,
    std_weight: float,
    cov_weight: float,
    local_crops: Sequence[Tensor] = (),
) -> Tensor:
    """Variance-invariance-covariance loss (VICReg, Bardes et al. 2022, eq. 1 to 6).

    Variances and covariances are those of the batch joined over processes. The distance is the mean
    over pairs of a view, or local crop, and another view; variance and covariance are means over
    views and local crops, the covariance times two as in the paper's sum over two views.

    Args:
        z1: ``(B, D)`` embeddings of the first views, B * processes at least 2.
        z2: ``(B, D)`` embeddings of the second views.
        sim_weight: Lambda, weight of the squared distance between views.
        std_weight: Mu, weight of the hinge loss on the standard deviation of each dimension, with
            target 1.
        cov_weight: Nu, weight of the squared covariances between dimensions.
        local_crops: ``(B, D)`` embeddings of each local crop.

    Returns:
        Scalar loss. Computed in float32.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z = [gather(one.float()) for one in (z1, z2, *local_crops)]
        pairs = [(view, other) for other in (0, 1) for view in range(len(z)) if view != other]
        similarity = torch.stack([F.mse_loss(z[view], z[other]) for view, other in pairs]).mean()
        spread = torch.stack([_variance_hinge(one) for one in z]).mean()  # As in the authors' code.
        covariance = 2 * torch.stack([_covariance(one) for one in z]).mean()
        return sim_weight * similarity + std_weight * spread + cov_weight * covariance


def _variance_hinge(z: Tensor) -> Tensor:
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def _covariance(z: Tensor) -> Tensor:
    centered = z - z.mean(dim=0)
    covariance = (
        centered.T @ centered / (len(z) - 1)
    )  # Like z.T.cov(), which synchronizes with a GPU.
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


def random_directions(size: int, count: int, like: Tensor) -> Tensor:
    """Draw uniform random unit vectors, ``(size, count)`` float32, on the device of a tensor."""
    return F.normalize(torch.randn(size, count, device=like.device, dtype=torch.float32), dim=0)


def sigreg(z: Tensor, directions: Tensor, points: int = 17, limit: float = 5.0) -> Tensor:
    """Sketched isotropic Gaussian regularization (LeJEPA, Balestriero & LeCun 2025, algorithm 1).

    Along each direction, the empirical characteristic function of the embeddings is compared with
    that of the standard normal distribution (Epps & Pulley 1983), on the batch joined over
    processes. Each process may use different directions.

    Args:
        z: ``(B, D)`` embeddings.
        directions: ``(D, S)`` unit vectors.
        points: Number of points of the trapezoidal quadrature.
        limit: The integral runs from ``-limit`` to ``limit``.

    Returns:
        Scalar, the mean over directions of the test statistic. Computed in float32.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = gather(z.float())
        # The integrand is even: integrate from 0 and double.
        t = torch.linspace(0, limit, points, device=z.device, dtype=z.dtype)
        normal = torch.exp(-t.square() / 2)
        angles = (z @ directions).unsqueeze(2) * t
        error = (angles.cos().mean(dim=0) - normal).square() + angles.sin().mean(dim=0).square()
        return 2 * len(z) * torch.trapezoid(error * normal, t, dim=1).mean()


def visreg(z: Tensor, directions: Tensor) -> Tensor:
    """Regularize scale, shape and center of embeddings (VISReg, Wu et al. 2026, section 3).

    The scale term is the squared distance of each dimension's standard deviation to 1; the shape
    term is the sliced 2-Wasserstein distance of the standardized embeddings to a Gaussian. Computed
    on the batch joined over processes; each process may use different directions.

    Args:
        z: ``(B, D)`` embeddings.
        directions: ``(D, S)`` unit vectors.

    Returns:
        Scalar, the sum of the three terms. Computed in float32.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = gather(z.float())
        center = z.mean(dim=0)
        std = (z.var(dim=0, correction=0) + 1e-12).sqrt()
        standard = (z - center) / std.detach().clamp_min(1e-6)
        ranks = torch.arange(1, len(z) + 1, device=z.device, dtype=z.dtype) / (len(z) + 1)
        quantiles = torch.special.ndtri(ranks)
        shape = ((standard @ directions).sort(dim=0).values - quantiles[:, None]).square().mean()
        return (std - 1).square().mean() + shape + center.square().mean()


@torch.no_grad()
def sinkhorn(
    scores: Tensor, epsilon: float, iterations: int, earlier: Tensor | None = None
) -> Tensor:
    """Balanced soft assignments to prototypes (SwAV, Caron et al. 2020, eq. 3 to 5).

    The assignments are balanced over the batches of all processes together, which may differ in
    size.

    Args:
        scores: ``(B, K)`` similarities to prototypes, in [-1, 1].
        epsilon: Smoothness of the assignments, above 0.
        iterations: Number of normalizations of columns and rows.
        earlier: ``(Q, K)`` similarities of earlier embeddings, equal in all processes, that are
            assigned along with the batch (section 3.1).

    Returns:
        ``(B, K)`` float32, each row a distribution; without gradient.
    """
    with torch.autocast(scores.device.type, enabled=False):
        size, processes = len(scores), world()[1]
        codes = scores.float()
        if earlier is not None:
            codes = torch.cat([codes, earlier.float()])
        highest_of_row = codes.amax(dim=1, keepdim=True)
        highest = highest_of_row.max()
        if processes > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        # The sizes of rows are kept apart: a row far below the highest score would underflow to
        # zeros, whose sum nothing can be divided by.
        codes = ((codes - highest_of_row) / epsilon).exp()
        sizes = ((highest_of_row - highest) / epsilon).exp()
        for _ in range(iterations):
            # Each process keeps its own rows: only the sums of columns are communicated.
            weighted = sizes * codes
            columns = weighted[:size].sum(dim=0)
            if processes > 1:
                dist.all_reduce(columns)
            columns += weighted[size:].sum(dim=0)  # Equal in all processes.
            # Avoid a division by zero for prototypes whose column underflows.
            codes = codes / (columns.clamp_min(1e-30) * codes.shape[1])
            codes = codes / codes.sum(dim=1, keepdim=True)
            sizes = torch.ones_like(sizes)
        return codes[:size]


def cross_entropy(targets: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between target distributions and scores (DINO, Caron et al. 2021, eq. 2).

    Args:
        targets: ``(B, K)``, each row a distribution.
        scores: ``(B, K)`` scores.
        temperature: Softmax temperature of the scores, above 0.

    Returns:
        ``(B,)`` cross-entropies. Computed in float32.
    """
    return -(targets * F.log_softmax(scores.float() / temperature, dim=1)).sum(dim=1)


def swapped_prediction(
    scores: Sequence[Tensor], codes: Sequence[Tensor], temperature: float
) -> Tensor:
    """Predict the codes of each global crop from all other views (SwAV, eq. 6; DINO, eq. 3).

    Args:
        scores: ``(B, K)`` similarities to the prototypes for each view, global crops first.
        codes: ``(B, K)`` target distributions for each global crop: assignments to clusters, or
            the outputs of a teacher.
        temperature: Softmax temperature of the scores, above 0.

    Returns:
        Scalar, the mean over pairs of views. Computed in float32.
    """
    terms = [
        cross_entropy(code, score, temperature).mean()
        for global_view, code in enumerate(codes)
        for view, score in enumerate(scores)
        if view != global_view
    ]
    return torch.stack(terms).mean()


def patch_loss(targets: Tensor, scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Cross-entropy on masked patches: a mean over those of an image, then over all images.

    iBOT (Zhou et al. 2022), arXiv 2111.07832, equation 2; images without a mask count as 0, as in
    the authors' code and in DINOv2's.

    Args:
        targets: ``(M, K)`` target distributions of the masked patches, image by image.
        scores: ``(M, K)`` scores of the student for these patches.
        mask: ``(B, N)`` bool, true for the M masked patches; on the CPU, so that no GPU is waited
            for, or with the scores.
        temperature: Softmax temperature of the scores, above 0.

    Returns:
        Scalar, computed in float32.
    """
    weights = (1 / mask.sum(dim=1).clamp_min(1))[:, None].expand_as(mask)[mask]
    losses = cross_entropy(targets, scores, temperature)
    return (weights.to(losses.device) * losses).sum() / len(mask)


def koleo(z: Tensor) -> Tensor:
    """KoLeo regularizer (Sablayrolles et al. 2019; DINOv2, Oquab et al. 2023, section 4).

    Spreads embeddings evenly.

    Args:
        z: ``(B, D)`` embeddings of this process.

    Returns:
        Negative mean log distance to the nearest neighbor; 0 for a single embedding. Computed in
        float32.
    """
    if len(z) < 2:
        return 0 * z.float().sum()
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.float(), dim=1)
        similarity = (z @ z.T).detach().fill_diagonal_(-2)
        nearest = similarity.argmax(dim=1)
        return -(F.pairwise_distance(z, z[nearest], eps=1e-8) + 1e-8).log().mean()


class Center(nn.Module):
    """Running mean of a teacher's outputs, so that no single output dominates (DINO, eq. 4).

    It is a module, so that checkpoints contain it. The mean is over all processes.

    Args:
        size: Number of outputs of the teacher.
        momentum: Momentum of the mean.
    """

    def __init__(self, size: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(size))

    def targets(self, outputs: Tensor, temperature: float) -> Tensor:
        """Center and sharpen teacher outputs: ``(B, size)`` float32 target distributions.

        Args:
            outputs: ``(B, size)`` outputs of the teacher.
            temperature: Softmax temperature; below that of the student, to sharpen the targets.
        """
        return F.softmax((outputs.float() - self.mean) / temperature, dim=1)

    @torch.no_grad()
    def update(self, outputs: Tensor, batches_per_step: int = 1) -> None:
        """Update the mean with the outputs of a batch.

        Args:
            outputs: ``(B, size)`` outputs of the teacher.
            batches_per_step: Number of batches that have the momentum of one together.
        """
        batch_mean = gather(outputs.float()).mean(dim=0)
        momentum = self.momentum ** (1 / batches_per_step)
        self.mean = torch.lerp(batch_mean, self.mean.float(), momentum).to(self.mean.dtype)
