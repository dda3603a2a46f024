"""A queue of embeddings from earlier batches."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.training.processes import gather


class Queue(nn.Module):
    """The latest embeddings, normalized; random ones until it is full (MoCo, He et al. 2020).

    A module, so that a checkpoint holds it. All processes' embeddings go in, in the order of ranks,
    so that it is the same everywhere.

    Args:
        size: Number of entries.
        dimensions: Dimensions of an embedding.

    Attributes:
        items: ``(size, dimensions)``, without gradient.
    """

    def __init__(self, size: int, dimensions: int) -> None:
        super().__init__()
        self.items: Tensor
        self.position: Tensor
        self.register_buffer("items", F.normalize(torch.randn(size, dimensions), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, embeddings: Tensor) -> None:
        """Replace the oldest.

        Args:
            embeddings: ``(B, dimensions)``; need not be normalized.
        """
        new = gather(F.normalize(embeddings.detach().float(), dim=1))[-len(self.items) :]
        places = (self.position + torch.arange(len(new), device=new.device)) % len(self.items)
        self.items = self.items.index_copy(0, places, new)  # the old one may be part of a graph
        self.position = (self.position + len(new)) % len(self.items)
