"""Queue of embeddings of earlier batches."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.training.processes import gather, world

DEFAULT_SIZE = 4096

# Age of the oldest negatives, as a share of the number of steps that the teacher averages over.
FRESH = 0.25


def suitable_size(images: int) -> int:
    """Number of negatives for a set of images: 4096, but at most a quarter of the images.

    A queue as long as the training set holds earlier embeddings of each image, which are no
    negatives of it. Of images in random order, a quarter as many do so for 3 % of the images:
    (1/4)^2 / 2. (MoCo's queue, He et al. 2020, is a twentieth of ImageNet.)
    """
    return min(DEFAULT_SIZE, max(1, images // 4))


class Queue(nn.Module):
    """Queue of the latest normalized embeddings (MoCo, He et al. 2020).

    Initialized with random embeddings. It is a module, so that checkpoints contain it. The
    embeddings of all processes are appended in the order of ranks, so that it is equal in all.

    Args:
        size: Number of embeddings in the queue.
        dimensions: Number of dimensions of an embedding.

    Attributes:
        items: ``(size, dimensions)`` embeddings, without gradient.
    """

    def __init__(self, size: int, dimensions: int) -> None:
        super().__init__()
        self.items: Tensor
        self.position: Tensor
        self.register_buffer("items", F.normalize(torch.randn(size, dimensions), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, embeddings: Tensor) -> None:
        """Replace the oldest embeddings.

        Args:
            embeddings: ``(B, dimensions)`` embeddings; need not be normalized.
        """
        new = gather(F.normalize(embeddings.detach().float(), dim=1))[-len(self.items) :]
        new = new.to(self.items.dtype)  # not float32 with --precision bf16-true
        slots = (self.position + torch.arange(len(new), device=new.device)) % len(self.items)
        # Out of place: autograd may need the old tensor.
        self.items = self.items.index_copy(0, slots, new)
        self.position = (self.position + len(new)) % len(self.items)

    def latest(self, count: int) -> Tensor:
        """The latest embeddings, latest first: ``(min(count, size), dimensions)``."""
        back = torch.arange(1, min(count, len(self.items)) + 1, device=self.items.device)
        return self.items[(self.position - back) % len(self.items)]

    def fresh(self, batch: int, momentum: float) -> Tensor:
        """The embeddings of a momentum teacher that has changed little since.

        Those of the last 1 / (4 (1 - m)) batches, a quarter of the steps that the teacher averages
        over, and at least those of one batch. Older keys would be told from the positive, which is
        of the present step, by their age.

        Args:
            batch: Number of images of an optimizer step on each device.
            momentum: Momentum m of the teacher in the present step, in [0, 1].
        """
        steps = max(1.0, FRESH / max(1 - momentum, 1e-9))
        return self.latest(round(steps * batch * world()[1]))
