"""Heads on the encoder, which are used in pre-training only."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import check_sizes


class ProjectionHead(nn.Sequential):
    """A multi-layer perceptron with BatchNorm and ReLU between its layers.

    Args:
        sizes: Input features, hidden features, output features.
        last_norm: Whether to end with a BatchNorm.
    """

    def __init__(self, *sizes: int, last_norm: bool = False) -> None:
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(sizes)):
            last = index == len(sizes) - 2
            layers.append(nn.Linear(before, after, bias=last and not last_norm))
            if not last:
                layers += [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
            elif last_norm:
                layers.append(nn.BatchNorm1d(after))
        super().__init__(*layers)


class PrototypeHead(nn.Module):
    """DINO's head: an MLP, an L2-normalized bottleneck, similarities to normalized prototypes.

    Caron et al. 2021, appendix C.

    Args:
        features: In.
        hidden: Hidden of the MLP's two hidden layers.
        bottleneck: Bottleneck of its output.
        prototypes: Out.
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


class Decoder(nn.Module):
    """Turns an encoder's last feature map into a map of a quarter of the image's resolution.

    Convolutions of 3x3 between doublings. The pooled features are added to the map everywhere: each
    place then knows of the whole image, which in Pathak et al. 2016 (section 3.1) a channel-wise
    fully-connected layer does, and what is trained includes all layers up to the pooled features.

    Args:
        encoder: Encoder whose features are decoded.
        outputs: Channels of the result.
        width: Channels in between.
    """

    STRIDE = 4

    def __init__(self, encoder: Encoder, outputs: int, width: int) -> None:
        super().__init__()
        check_sizes(decoder_width=width)
        self.project = nn.Conv2d(encoder.map_features, width, 1)
        self.context = nn.Linear(encoder.num_features, width)
        ratio = encoder.image_size / self.STRIDE / encoder.map_side()
        layers: list[nn.Module] = []
        for step in range(1 + max(0, round(math.log2(ratio)))):
            if step > 0:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Conv2d(width, outputs, 1)

    @classmethod
    def size(cls, images: Tensor) -> int:
        """Side of the map that stands for square ``(B, C, S, S)`` images."""
        return -(-images.shape[-1] // cls.STRIDE)

    def forward(self, pooled: Tensor, last: Tensor, size: int) -> Tensor:
        """Decode.

        Args:
            pooled: ``(B, D)``.
            last: ``(B, D', h, w)``.
            size: Side of the result.

        Returns:
            ``(B, outputs, size, size)``.
        """
        x = self.layers(self.project(last) + self.context(pooled)[:, :, None, None])
        if x.shape[-1] != size:  # the map's size is not a power of two of it
            x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        return self.last(x)
