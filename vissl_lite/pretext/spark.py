"""SparK: masked image modeling for convolutional networks that process visible patches only.

Tian, Jiang, Diao, Lin, Wang & Yuan 2023, "Designing BERT for Convolutional Networks: Sparse and
Hierarchical Masked Modeling", arXiv 2301.03580.

With plain convolutions, features spread into masked locations layer by layer. The paper uses sparse
convolutions, which compute visible locations only and treat masked ones as zeros (section 3.1). As
in the authors' code, dense layers whose outputs are masked again are equivalent.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers import EcaModule, EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import BACKBONE_KINDS, PretextInfo, PretextTask, Visualization
from vissl_lite.pretext.modules.crops import cropped_views
from vissl_lite.pretext.modules.drop_path import add_drop_path
from vissl_lite.pretext.modules.masking import (
    check_ratio,
    denormalized_patches,
    gather_tokens,
    indices_to_mask,
    normalized_patches,
    patchify,
    random_mask,
    unpatchify,
)
from vissl_lite.pretext.modules.visualization import reconstruction
from vissl_lite.training.processes import gather
from vissl_lite.training.sync_batchnorm import Synchronized

MaskOf = Callable[[Tensor], Tensor]  # Feature map to mask of the same resolution and dtype.


def mask_at(visible: Tensor, height: int, width: int) -> Tensor:
    """Resize a mask; at a coarser resolution, a location is visible if any part of it is.

    Args:
        visible: ``(B, 1, h, w)``, 1 where visible, else 0.
        height: Height of the feature map.
        width: Width of the feature map.

    Returns:
        ``(B, 1, height, width)`` mask.
    """
    if height >= visible.shape[2]:
        return F.interpolate(visible, size=(height, width), mode="nearest")
    return F.adaptive_max_pool2d(visible, (height, width))


def visible_batch_norm(norm: _BatchNorm, features: Tensor, mask: Tensor) -> Tensor:
    """Apply BatchNorm to the visible locations; masked ones become 0.

    Args:
        norm: Layer whose parameters, running statistics and mode are used. Synchronized layers use
            the statistics of all processes together.
        features: ``(B, C, h, w)`` features.
        mask: ``(B, 1, h, w)``, 1 where visible, else 0.

    Returns:
        ``(B, C, h, w)`` in the dtype of the features; computed in float32.
    """
    values, mask = features.float(), mask.float()
    mean, variance = norm.running_mean, norm.running_var
    if norm.training or mean is None or variance is None:

        def sum_processes(local: Tensor) -> Tensor:
            if isinstance(norm, nn.SyncBatchNorm | Synchronized):
                return gather(local[None]).sum(dim=0)
            return local

        count = sum_processes(mask.sum())
        mean = sum_processes((values * mask).sum(dim=(0, 2, 3))) / count
        spread = ((values - mean[:, None, None]) * mask).square()
        variance = sum_processes(spread.sum(dim=(0, 2, 3))) / count
        if norm.training and norm.running_mean is not None:
            _update_running(norm, mean.detach(), variance.detach(), count)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    normed = (values - mean[:, None, None]) * scale[:, None, None]
    if norm.bias is not None:
        normed = normed + norm.bias[:, None, None]
    return (normed * mask).to(features.dtype)


@torch.no_grad()
def _update_running(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    weight = norm.momentum if norm.momentum is not None else 1 / int(norm.num_batches_tracked)
    variance = variance * count / (count - 1).clamp(min=1)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), weight)


def visible_group_norm(norm: nn.GroupNorm, features: Tensor, mask: Tensor) -> Tensor:
    """Apply GroupNorm to the visible locations of each image; masked ones become 0.

    Args:
        norm: Layer whose parameters are used.
        features: ``(B, C, h, w)`` features.
        mask: ``(B, 1, h, w)``, 1 where visible, else 0; each image has a visible location.

    Returns:
        ``(B, C, h, w)`` in the dtype of the features; computed in float32.
    """
    values = features.float().unflatten(1, (norm.num_groups, -1))
    mask = mask.float()[:, None]
    count = mask.sum(dim=(3, 4), keepdim=True) * values.shape[2]
    mean = (values * mask).sum(dim=(2, 3, 4), keepdim=True) / count
    spread = ((values - mean) * mask).square()
    variance = spread.sum(dim=(2, 3, 4), keepdim=True) / count
    normed = ((values - mean) * (variance + norm.eps).rsqrt()).flatten(1, 2)
    if norm.affine:
        normed = normed * norm.weight[:, None, None] + norm.bias[:, None, None]
    return (normed * mask[:, 0]).to(features.dtype)


def _norm_forward(norm: Any, mask_of: MaskOf, features: Tensor) -> Tensor:
    """Replace the ``forward`` of a norm, or of a timm norm with activation."""
    over = visible_group_norm if isinstance(norm, nn.GroupNorm) else visible_batch_norm
    normed: Tensor = over(norm, features, mask_of(features))
    if hasattr(norm, "act"):  # timm's BatchNormAct2d, GroupNormAct
        normed = norm.act(norm.drop(normed))
    return normed


def _mask_output(module: nn.Module, _: Any, output: Tensor, batch: int, mask_of: MaskOf) -> Tensor:
    """Forward hook that masks the output again if it is a feature map of the images."""
    if output.ndim != 4 or len(output) != batch:
        return output
    # In timm, LayerNorms of (B, C, h, w) end in 2d; others, and linear layers, take (B, h, w, C).
    last = isinstance(module, nn.LayerNorm) and "2d" not in type(module).__name__
    if last or isinstance(module, nn.Linear):
        return output * mask_of(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return output * mask_of(output)


def _visible_fraction(features: Tensor, mask_of: MaskOf) -> Tensor:
    return mask_of(features).mean(dim=(2, 3), keepdim=True)


def _divide_by_fraction(_: nn.Module, features: tuple[Tensor], mask_of: MaskOf) -> Tensor:
    """Forward pre-hook that turns the mean over all locations into that over visible ones."""
    return features[0] / _visible_fraction(features[0], mask_of)


def _multiply_by_fraction(_: nn.Module, __: Any, output: Tensor, mask_of: MaskOf) -> Tensor:
    """Forward hook that undoes ``_divide_by_fraction`` in the gated features."""
    return output * _visible_fraction(output, mask_of)


# Layers that normalize, layers that spread features or map zeros to other values, and layers that
# gate channels by their mean over the image, x * g(mean(x)).
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm)
_MASKED = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.MaxPool2d, nn.AvgPool2d)
_GATES = (SEModule, EffectiveSEModule, EcaModule, SqueezeExcite)


@contextmanager
def sparse(model: nn.Module, visible: Tensor) -> Iterator[None]:
    """Context manager in which a convolutional network computes visible locations only.

    Hooks mask the outputs of convolutions, poolings, linear layers and LayerNorms. The ``forward``
    of BatchNorm and GroupNorm is replaced to use statistics, including running ones, of visible
    locations; squeeze-and-excitation uses their mean. All changes are undone on exit.

    Args:
        model: Timm model.
        visible: ``(B, 1, g, g)``, 1 where the image is visible, else 0; each image has a visible
            location.
    """
    masks: dict[Any, Tensor] = {}

    def mask_of(features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        key = (height, width, features.dtype)
        if key not in masks:
            masks[key] = mask_at(visible, height, width).to(features.dtype)
        return masks[key]

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _NORMS):
                module.forward = partial(_norm_forward, module, mask_of)  # type: ignore[method-assign]
                stack.callback(delattr, module, "forward")
            elif isinstance(module, _GATES):
                before = partial(_divide_by_fraction, mask_of=mask_of)
                after = partial(_multiply_by_fraction, mask_of=mask_of)
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after).remove)
            elif isinstance(module, _MASKED):
                hook = partial(_mask_output, batch=len(visible), mask_of=mask_of)
                stack.callback(module.register_forward_hook(hook).remove)
        yield


def pyramid(encoder: Encoder, images: Tensor) -> list[Tensor]:
    """Compute the deepest feature map of each of the four coarsest resolutions (section 3.2).

    Args:
        encoder: Encoder with a convolutional backbone.
        images: ``(B, C, S, S)`` normalized images.

    Returns:
        ``(B, C_i, h_i, w_i)`` feature maps, fine to coarse. If timm returns it, the last one is
        that of ``encoder.pooled_and_map``, so that a final convolution or norm is trained too.
    """
    last, maps = encoder.model.forward_intermediates(images, output_fmt="NCHW")
    if last.ndim == 4 and last.shape[2:] == maps[-1].shape[2:]:
        maps = [*maps, last]
    deepest = {features.shape[2]: features for features in maps}
    return list(deepest.values())[-4:]


def choose_grid(size: int, sides: list[int]) -> int | None:
    """Choose the number of locations of the mask along an edge.

    The paper masks at the resolution of the last stage: 7 x 7 locations of 32 pixels at 224
    (section 3.1), which would be a single location on small images. Here the mask has the
    resolution of the coarsest stage with at least 4 x 4 locations that divides the image and all
    finer stages evenly.

    Args:
        size: Side of the image in pixels.
        sides: Sides of the feature maps.

    Returns:
        Side of the mask; None if no stage is suitable.
    """
    fits = [
        side
        for side in sides
        if side >= 4 and not any(finer % side for finer in (size, *sides) if finer >= side)
    ]
    return min(fits) if fits and size % max(sides) == 0 else None


class Decoder(nn.Module):
    """Light U-Net decoder that upsamples from the coarsest map to the finest (section 3.2).

    At each resolution, masked locations are filled with a learned token ("densified") before the
    map is added. The decoder of the paper upsamples to the full resolution, by transposed
    convolutions; this one repeats locations, and ends at the finest map, where each location
    predicts its pixels, which is faster. Before densifying, maps of all backbones are normalized by
    BatchNorm; the authors' code has LayerNorm for ConvNeXt.

    Args:
        channels: Number of channels of the feature maps, fine to coarse.
        width: Number of channels at the coarsest map; halved at each finer one, at least 32.
        outputs: Number of output channels.
    """

    def __init__(self, channels: list[int], width: int, outputs: int) -> None:
        super().__init__()
        widths = [max(32, width // 2**level) for level in range(len(channels))]
        coarse_first = channels[::-1]
        self.norms = nn.ModuleList(nn.BatchNorm2d(count) for count in coarse_first)
        self.mask_tokens = nn.ParameterList(torch.empty(n).normal_(std=0.02) for n in coarse_first)
        self.projections = nn.ModuleList(
            nn.Conv2d(before, after, 1 if level == 0 else 3, padding=0 if level == 0 else 1)
            for level, (before, after) in enumerate(zip(coarse_first, widths, strict=True))
        )
        self.blocks = nn.ModuleList(
            _block(before, after)
            for before, after in zip(widths, [*widths[1:], widths[-1]], strict=True)
        )
        self.head = nn.Conv2d(widths[-1], outputs, 1)

    def forward(self, maps: list[Tensor], visible: Tensor) -> Tensor:
        """Decode feature maps.

        Args:
            maps: ``(B, C_i, h_i, w_i)`` feature maps, fine to coarse, 0 at masked locations.
            visible: ``(B, 1, g, g)``, 1 where visible, else 0.

        Returns:
            ``(B, outputs, h_0, w_0)`` output map.
        """
        decoded: Tensor | None = None
        layers = zip(self.norms, self.mask_tokens, self.projections, self.blocks, strict=True)
        for features, (norm, token, project, block) in zip(maps[::-1], layers, strict=True):
            mask = mask_at(visible, *features.shape[2:])
            assert isinstance(norm, _BatchNorm)
            normed = visible_batch_norm(norm, features, mask)
            dense = torch.where(mask > 0, normed, token[:, None, None].to(normed.dtype))
            level = project(dense)
            if decoded is not None:
                level = level + F.interpolate(decoded, size=level.shape[2:], mode="nearest")
            decoded = block(level)
        predicted: Tensor = self.head(decoded)
        return predicted


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU6(inplace=True),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
    )


class SparK(PretextTask):
    """SparK.

    The mask has the resolution of the last stage, or on small images of a finer one with at least
    4 x 4 locations. Running statistics of BatchNorm are those of visible locations. Layers after
    the last feature map (as in the head of MobileNetV3) are not trained.

    Args:
        encoder: Encoder to train; a convolutional network.
        mask_ratio: Fraction of the image to mask (section 4.1).
        decoder_width: Number of channels of the decoder at the coarsest map; default half of the
            channels of that map, at least 64 and at most 512 (the authors' code uses 768 for 2048
            of ResNet-50).
        min_crop_scale: Smallest fraction of the image area in a view; 0.67 as in the authors' code
            (pretrain/utils/imagenet.py).
        drop_path: Rate of stochastic depth; default timm's, 0 for nearly all networks. The authors'
            code uses 0.05 for ResNet-50 and up to 0.4 for larger ConvNeXts
            (pretrain/models/__init__.py), for 1600 epochs of ImageNet.
    """

    info = PretextInfo(
        name="spark",
        family="masked",
        views="1",
        paper="Tian et al. 2023, arXiv 2301.03580",
        use="CNNs that will be fine-tuned, also for detection; needs long runs",
        backbones="CNN",
        compiles=False,
    )
    # The paper trains with LAMB on batches of 4096 (appendix); at 64 to 256 AdamW learns faster.
    # Clipping and rising weight decay are those of the authors' code.
    optimizer_settings = OptimizerSettings(
        "adamw", lr=2e-3, weight_decay=0.04, scaling="sqrt", clip_norm=5.0, weight_decay_end=0.2
    )

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.6,
        decoder_width: int | None = None,
        min_crop_scale: float = 0.67,
        drop_path: float | None = None,
    ) -> None:
        super().__init__(encoder)
        encoder.freeze_after_map()
        add_drop_path(encoder, drop_path)
        check_ratio(mask_ratio)
        check_sizes(decoder_width=decoder_width)
        self.grid, maps = self._check_masking()
        channels = [features.shape[1] for features in maps]
        self.stride = encoder.image_size // maps[0].shape[2]
        self.decoder = Decoder(
            channels,
            decoder_width or min(max(channels[-1] // 2, 64), 512),
            outputs=self.stride**2 * len(encoder.mean),
        )
        self.mask_ratio, self.min_crop_scale = mask_ratio, min_crop_scale

    def _check_masking(self) -> tuple[int, list[Tensor]]:
        """Check that the encoder can be masked; return the side of the mask and feature maps."""
        encoder, size = self.encoder, self.encoder.image_size
        white = torch.ones(2, len(encoder.mean), size, size)
        white = white.to(next(encoder.parameters()).device)
        was_training = encoder.training
        encoder.eval()
        try:
            with torch.no_grad():
                sides = [features.shape[2] for features in pyramid(encoder, white)]
                chosen = choose_grid(size, sides)
                if chosen is None:
                    near = max(32, encoder.fitting_size(size))
                    raise UserError(
                        f"the pretext spark can't mask images of {size} pixels for "
                        f"{encoder.backbone}, whose feature maps have sides of {sides}: try {near}"
                    )
                grid = chosen
                visible = torch.zeros(2, 1, grid, grid, device=white.device)
                visible[..., 0, 0] = 1
                maps = self.encode(white, visible)
                hidden = all(
                    (features * (1 - mask_at(visible, *features.shape[2:])) == 0).all()
                    for features in maps
                )
        except RuntimeError:  # Attention layers reshape feature maps, which prevents masking.
            hidden = False
        finally:
            encoder.train(was_training)
        if not hidden:
            raise UserError(
                f"the pretext spark can't hide patches from {encoder.backbone}, which has layers "
                f"beside convolutions: try one of {BACKBONE_KINDS['CNN'][1]}"
            )
        return grid, maps

    def views(self, upright: bool = True) -> Views:
        return cropped_views(self.encoder.image_size, self.min_crop_scale, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        images, unit = views[0], self.encoder.image_size // self.grid
        masked = self.draw_mask(images)
        predicted = patchify(self.predict(images, masked).float(), unit)
        # Normalized patches, masked ones only (section 3.3).
        return F.mse_loss(
            gather_tokens(predicted, masked),
            gather_tokens(normalized_patches(images, unit), masked),
        )

    def visualize(self, views: list[Tensor]) -> Visualization:
        images, unit = views[0], self.encoder.image_size // self.grid
        masked = self.draw_mask(images)
        predicted = patchify(self.predict(images, masked).float(), unit)
        return reconstruction(
            self.encoder,
            images,
            indices_to_mask(masked, self.grid**2).view(-1, 1, self.grid, self.grid),
            unpatchify(denormalized_patches(predicted, images, unit), unit),
            "reconstructed, mean and\ncontrast of patches given",
        )

    def draw_mask(self, images: Tensor) -> Tensor:
        """Draw the masked locations of each image: ``(B, M)`` indices below g * g."""
        return random_mask(len(images), self.grid**2, self.mask_ratio, images.device)[1]

    def encode(self, images: Tensor, visible: Tensor) -> list[Tensor]:
        """Compute feature maps of the visible locations.

        Args:
            images: ``(B, C, S, S)`` normalized images.
            visible: ``(B, 1, g, g)``, 1 where visible, else 0.

        Returns:
            ``(B, C_i, h_i, w_i)`` feature maps, fine to coarse, 0 at masked locations.
        """
        with sparse(self.encoder.model, visible):
            return pyramid(self.encoder, images * mask_at(visible, *images.shape[2:]))

    def predict(self, images: Tensor, masked: Tensor) -> Tensor:
        """Predict all pixels from the visible ones.

        Args:
            images: ``(B, C, S, S)`` normalized images.
            masked: ``(B, M)`` indices of the masked locations.

        Returns:
            ``(B, C, S, S)`` predictions.
        """
        mask = indices_to_mask(masked, self.grid**2)
        visible = (~mask).to(images.dtype).view(-1, 1, self.grid, self.grid)
        decoded = self.decoder(self.encode(images, visible), visible)
        return F.pixel_shuffle(decoded, self.stride)
