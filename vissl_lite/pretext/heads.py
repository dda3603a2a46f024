"""Heads: what sits on the encoder while it is trained, and is thrown away after."""

from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def mlp(*sizes: int, last_norm: bool = False) -> nn.Sequential:
    """A multi-layer perceptron with BatchNorm and ReLU between its layers.

    Args:
        sizes: features in, hidden features, features out.
        last_norm: end with a BatchNorm.
    """
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(sizes)):
        last = index == len(sizes) - 2
        layers.append(nn.Linear(before, after, bias=last and not last_norm))
        if not last:
            layers += [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(after))
    return nn.Sequential(*layers)


class PrototypeHead(nn.Module):
    """DINO's head: an MLP, an L2-normalised bottleneck, similarities to normalised prototypes.

    Caron et al. 2021, appendix C.

    Args:
        features: in.
        hidden: of the MLP's two hidden layers.
        bottleneck: of its output.
        prototypes: out.
        norm: BatchNorm in the MLP.
    """

    def __init__(
        self, features: int, hidden: int, bottleneck: int, prototypes: int, norm: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (features, hidden):
            layers.append(nn.Linear(before, hidden, bias=not norm))
            layers += [nn.BatchNorm1d(hidden), nn.GELU()] if norm else [nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """``(N, features)`` to ``(N, prototypes)`` float32 cosines."""
        z = F.normalize(self.layers(features).float(), dim=1)
        with torch.autocast(z.device.type, enabled=False):
            return z @ F.normalize(self.prototypes.weight.float(), dim=1).T

    def freeze_last(self) -> None:
        """Forget the prototypes' gradient, so that the coming step leaves them as they are."""
        self.prototypes.weight.grad = None
