"""Heads that are trained on top of the encoder and discarded afterwards."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import check_sizes


class ProjectionHead(nn.Sequential):
    """Multi-layer perceptron with BatchNorm and ReLU or GELU between its linear layers.

    Args:
        sizes: Number of input features, of hidden features of each layer, of output features.
        last_norm: Append a BatchNorm to the last layer.
        last_affine: Whether that BatchNorm has weights and biases.
        gelu: Whether the activation is GELU.
    """

    def __init__(
        self, *sizes: int, last_norm: bool = False, last_affine: bool = True, gelu: bool = False
    ) -> None:
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(sizes)):
            last = index == len(sizes) - 2
            layers.append(nn.Linear(before, after, bias=last and not last_norm))
            if not last:
                layers += [nn.BatchNorm1d(after), nn.GELU() if gelu else nn.ReLU(inplace=True)]
            elif last_norm:
                layers.append(nn.BatchNorm1d(after, affine=last_affine))
        super().__init__(*layers)


class PrototypeHead(nn.Module):
    """DINO head: MLP, L2-normalized bottleneck, cosine similarities to the prototypes.

    Caron et al. 2021, appendix C.

    Args:
        features: Number of input features.
        hidden: Width of the two hidden layers of the MLP.
        bottleneck: Number of output features of the MLP.
        prototypes: Number of prototypes, the outputs of the head.
        norm: Whether the MLP uses BatchNorm.
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
        """Map ``(N, features)`` to ``(N, prototypes)`` float32 cosine similarities."""
        z = F.normalize(self.layers(features).float(), dim=1)
        with torch.autocast(z.device.type, enabled=False):
            return z @ F.normalize(self.prototypes.weight.float(), dim=1).T

    def freeze_last(self) -> None:
        """Discard the gradient of the prototypes, so that the next step does not update them."""
        self.prototypes.weight.grad = None


class MapDecoder(nn.Module):
    """Decode the last feature map of an encoder to a quarter of the image resolution.

    Alternates 3x3 convolutions and 2x upsampling. The pooled features are added at every location:
    this provides global context, as the channel-wise fully-connected layer of Pathak et al. 2016
    (section 3.1), and trains all layers of the encoder up to the pooled features.

    Args:
        encoder: Encoder whose features are decoded.
        outputs: Number of output channels.
        width: Number of hidden channels.
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
        """Side of the decoded map of square ``(B, C, S, S)`` images."""
        return -(-images.shape[-1] // cls.STRIDE)

    def forward(self, pooled: Tensor, last: Tensor, size: int) -> Tensor:
        """Decode the features.

        Args:
            pooled: ``(B, D)`` pooled features.
            last: ``(B, D', h, w)`` last feature map.
            size: Side of the result.

        Returns:
            ``(B, outputs, size, size)``.
        """
        x = self.layers(self.project(last) + self.context(pooled)[:, :, None, None])
        if x.shape[-1] != size:  # The ratio of the sides is not a power of two.
            x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        return self.last(x)
