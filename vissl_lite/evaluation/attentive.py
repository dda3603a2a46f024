"""The attentive probe: a classifier on the tokens of a frozen encoder, pooled by attention.

Efficient probing (Psomas et al. 2025, "Attention, Please! Revisiting Attentive Probing for Masked
Image Modeling", arXiv 2506.10178). An encoder that is trained by masking spreads what it knows over
the patches, so that their mean and the class token understate it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.data.free_memory import free_memory
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.inference import check_outputs, run_in_batches
from vissl_lite.optim import cosine_with_warmup
from vissl_lite.transfer.classification.linear_head import Fold

# Queries, each of which pools a part of the features. The authors' code has 32, for the 1,000
# classes of ImageNet.
QUERIES = 8

# Candidates for the L2 penalty, from strong to weak: lambda in mean(loss) + lambda / 2 * |w|^2.
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)

# Penalty where no image can be held out.
DEFAULT_PENALTY = 0.3

# The training of one probe, by Adam: twenty epochs, but at least 100 and at most 1,000 steps.
EPOCHS, MIN_STEPS, MAX_STEPS = 20, 100, 1000
BATCH_SIZE, LR, WARMUP = 256, 1e-2, 0.1

# Share of the free memory that tokens may take; the encoder and copies of batches take some, too.
MEMORY_SHARE = 0.7

# The largest float16; tokens are kept in this type.
MAX_FLOAT16 = 65504.0


class AttentiveHead(nn.Module):
    """Attention pooling with several queries, and a linear classifier.

    Query q_m attends to all tokens x_t with weights softmax_t(q_m . x_t) and pools them to
    z_m. The values are the m-th part of the features of (I + W) z_m; the parts of all queries
    are joined again to D features and classified linearly.

    It differs from the paper in its start and its scale. With zero queries, W and weights, at which
    the training starts and towards which the penalty pulls, it is a linear classifier of the mean
    of the tokens; the paper draws them at random. Features are standardized by the training images,
    as for the linear probe, in place of a BatchNorm before the classifier.

    Args:
        center: ``(D,)`` mean of all tokens.
        token_scale: ``(D,)`` standard deviation of the tokens, for the attention.
        pooled_scale: ``(D,)`` standard deviation of the mean of an image's tokens, for the values.
        classes: Number of classes K.
    """

    def __init__(
        self, center: Tensor, token_scale: Tensor, pooled_scale: Tensor, classes: int
    ) -> None:
        super().__init__()
        features = len(center)
        queries = math.gcd(features, QUERIES)
        self.queries = nn.Parameter(torch.zeros(queries, features))
        self.mixing = nn.Parameter(torch.zeros(features, features))
        self.weight = nn.Parameter(torch.zeros(classes, features))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.center: Tensor
        self.token_scale: Tensor
        self.pooled_scale: Tensor
        self.register_buffer("center", center)
        self.register_buffer("token_scale", token_scale)
        self.register_buffer("pooled_scale", pooled_scale)

    def attention(self, tokens: Tensor) -> Tensor:
        """``(B, Q, T)`` weights of the tokens ``(B, T, D)``, which sum to one for each query."""
        # the center of the tokens would add the same to all of an image, which softmax ignores
        return (tokens @ (self.queries / self.token_scale).T).softmax(dim=1).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, K)`` logits of tokens ``(B, T, D)``."""
        pooled = (self.attention(tokens) @ tokens - self.center) / self.pooled_scale
        count, features = self.queries.shape
        size = features // count
        kept = pooled.unflatten(2, (count, size)).diagonal(dim1=1, dim2=2).transpose(1, 2)
        mixed = torch.einsum("bqd,qgd->bqg", pooled, self.mixing.view(count, size, features))
        return F.linear((kept + mixed).flatten(1), self.weight, self.bias)

    def loss(self, tokens: Tensor, labels: Tensor, penalty: float) -> Tensor:
        """Mean cross-entropy plus penalty / 2 times the squares of all weights but the bias.

        Args:
            tokens: ``(B, T, D)``.
            labels: ``(B,)`` class indices.
            penalty: Strength of the penalty.
        """
        squares = [one.square().sum() for one in (self.queries, self.mixing, self.weight)]
        return F.cross_entropy(self(tokens), labels) + penalty / 2 * torch.stack(squares).sum()


@dataclass(frozen=True)
class AttentiveProbe:
    """A fitted attentive probe.

    Attributes:
        head: Classifier of tokens, on the CPU.
        penalty: Penalty that it is fitted with.
        accuracy: Share of the held-out images that are classified correctly with it; None where no
            image was held out.
    """

    head: AttentiveHead
    penalty: float
    accuracy: float | None


class _HeldOut(NamedTuple):
    """Scores on held-out images: sum of the losses, and number of correct classifications."""

    loss: float
    right: int


def fit_attentive(
    tokens: Tensor,
    labels: np.ndarray,
    classes: int,
    folds: Sequence[Fold],
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> AttentiveProbe:
    """Choose the penalty on held-out images, then fit the probe to all images.

    Args:
        tokens: ``(N, T, D)`` of any floating-point type; batches are converted to float32.
        labels: ``(N,)`` class indices.
        classes: Number of classes K.
        folds: Indices of images to fit to and of images to score on; the penalty with the smallest
            loss over the images to score on is taken. With none it is ``DEFAULT_PENALTY``.
        seed: Seed of the order of the images.
        progress: Called after each fit; there are ``number_of_fits``.

    Raises:
        UserError: All images are of one class.
    """
    if len(np.unique(labels)) < 2:
        raise UserError(
            "the training images that can be read are of one class only: an attentive probe needs "
            "two or more"
        )
    target = torch.from_numpy(labels).long()
    found = {penalty: _HeldOut(0.0, 0) for penalty in PENALTIES}
    for inside, outside in folds:
        for penalty in PENALTIES:
            head = _fit(tokens, target, torch.from_numpy(inside), classes, penalty, seed)
            logits = _logits(head, tokens, torch.from_numpy(outside))
            truth = target[torch.from_numpy(outside)]
            loss, right = found[penalty]
            found[penalty] = _HeldOut(
                loss + float(F.cross_entropy(logits, truth, reduction="sum")),
                right + int((logits.argmax(dim=1) == truth).sum()),
            )
            if progress is not None:
                progress()
    best = min(PENALTIES, key=lambda penalty: found[penalty].loss) if folds else DEFAULT_PENALTY
    held_out = sum(len(outside) for _, outside in folds)
    head = _fit(tokens, target, torch.arange(len(labels)), classes, best, seed)
    if progress is not None:
        progress()
    return AttentiveProbe(head.cpu(), best, found[best].right / held_out if folds else None)


def number_of_fits(folds: Sequence[Fold]) -> int:
    """How many times ``fit_attentive`` trains a probe."""
    return len(folds) * len(PENALTIES) + 1


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _fit(
    tokens: Tensor, labels: Tensor, indices: Tensor, classes: int, penalty: float, seed: int
) -> AttentiveHead:
    """Train a probe on some of the images."""
    device = _device()
    head = AttentiveHead(*_statistics(tokens, indices), classes).to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=LR, betas=(0.9, 0.99))
    random = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    steps = min(MAX_STEPS, max(MIN_STEPS, math.ceil(EPOCHS * len(indices) / BATCH_SIZE)))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * cosine_with_warmup((step + 0.5) / steps, WARMUP)
        if len(waiting) < min(BATCH_SIZE, len(indices)):
            waiting = torch.cat([waiting, indices[torch.randperm(len(indices), generator=random)]])
        batch, waiting = waiting[:BATCH_SIZE], waiting[BATCH_SIZE:]
        loss = head.loss(tokens[batch].to(device).float(), labels[batch].to(device), penalty)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.requires_grad_(False)


def _statistics(tokens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Center and scales of tokens for ``AttentiveHead``.

    A scale is at least the mean one: a feature that hardly varies would otherwise outweigh the
    others in the few images in which it does.
    """
    means, squares = [], torch.zeros(tokens.shape[2], dtype=torch.float64)
    for some in indices.split(BATCH_SIZE):
        batch = tokens[some].float()
        means.append(batch.mean(dim=1))
        squares += batch.square().mean(dim=1).sum(dim=0)
    pooled = torch.cat(means).double()
    center = pooled.mean(dim=0)
    scales = [
        (squares / len(indices) - center.square()).clamp_min(0).sqrt(),
        pooled.std(dim=0, unbiased=False),
    ]
    token_scale, pooled_scale = (one.clamp_min(one.mean() + 1e-6).float() for one in scales)
    return center.float(), token_scale, pooled_scale


def _logits(head: AttentiveHead, tokens: Tensor, indices: Tensor) -> Tensor:
    """``(N, K)`` logits of some of the images, on the CPU."""
    device = head.bias.device
    return torch.cat(
        [head(tokens[some].to(device).float()).cpu() for some in indices.split(BATCH_SIZE)]
    )


def token_bytes(encoder: Encoder, images: int) -> int:
    """Bytes of the tokens of so many images, as ``extract_tokens`` keeps them."""
    count, features = encoder.token_shape()
    return 2 * images * count * features


def check_memory(encoder: Encoder, images: int) -> None:
    """Raise a UserError if the tokens of the training images do not fit into memory.

    Args:
        encoder: Frozen encoder.
        images: Number of images to fit to.
    """
    needed, free = token_bytes(encoder, images), free_memory()
    if free is not None and needed > MEMORY_SHARE * free:
        raise UserError(
            f"--attentive keeps the tokens of {images} training images in memory, "
            f"{needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that are free: give --fraction, "
            f"--shots or a smaller --image_size"
        )


def extract_tokens(
    encoder: Encoder, paths: Sequence[str], progress: Callable[[int], None] | None = None
) -> tuple[Tensor, np.ndarray]:
    """Tokens of images, in memory; see ``Encoder.tokens``.

    Args:
        encoder: Frozen encoder.
        paths: Image files.
        progress: Called with the number of images done since the last call.

    Returns:
        ``(N, T, D)`` float16 on the CPU, and ``(M,)`` bool: which images could be read; tokens are
        of those only.

    Raises:
        UserError: None of the images can be read, or the tokens are not finite numbers.
    """
    tokens = torch.empty(len(paths), *encoder.token_shape(), dtype=torch.float16)
    done = 0

    def keep(some: Tensor) -> None:
        nonlocal done
        tokens[done : done + len(some)] = some
        done += len(some)

    good = _for_tokens(encoder, paths, keep, progress)
    return tokens[:done], good


def predict_attentive(
    probe: AttentiveProbe,
    encoder: Encoder,
    paths: Sequence[str],
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Classify images, without keeping their tokens.

    Args:
        probe: Fitted probe.
        encoder: Frozen encoder that it is fitted to.
        paths: Image files.
        progress: Called with the number of images done since the last call.

    Returns:
        ``(N,)`` class indices of the readable images, and ``(M,)`` bool: which images these are.

    Raises:
        UserError: None of the images can be read, or the tokens are not finite numbers.
    """
    found: list[Tensor] = []

    def classify(some: Tensor) -> None:
        with torch.autocast("cpu", enabled=False):  # as in the training of the probe
            found.append(probe.head(some.float()).argmax(dim=1))

    good = _for_tokens(encoder, paths, classify, progress)
    return torch.cat(found).numpy(), good


def _for_tokens(
    encoder: Encoder,
    paths: Sequence[str],
    use: Callable[[Tensor], None],
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    """Call a function with the tokens of one batch after another, as float16.

    Returns:
        ``(M,)`` bool: which images could be read.
    """

    def on_batch(some: list[str], outputs: list[Tensor]) -> None:
        check_outputs(outputs, f"some of the {len(paths)} images")
        use(outputs[0].clamp(-MAX_FLOAT16, MAX_FLOAT16).half())

    return run_in_batches(
        encoder,
        lambda images: [encoder.tokens(images)],
        encoder,
        paths,
        on_batch,
        progress,
    )
