"""Heads: what sits on the encoder while it is trained, and is thrown away after."""

from itertools import pairwise

from torch import nn


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
