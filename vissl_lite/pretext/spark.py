"""SparK: masked modelling for convolutional networks, which see visible patches only.

Tian, Jiang, Diao, Lin, Wang & Yuan 2023, "Designing BERT for Convolutional Networks: Sparse and
Hierarchical Masked Modeling", arXiv 2301.03580.

A plain convolution wipes a mask out: layer by layer, features spread into the masked places. The
paper uses sparse convolutions, which compute at visible places only and take masked ones for
zeros (section 3.1). As in the authors' code, dense layers whose outputs are masked again do the
same.
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

MaskOf = Callable[[Tensor], Tensor]  # the mask at a feature map's resolution and of its type


def mask_at(visible: Tensor, height: int, width: int) -> Tensor:
    """A mask at another resolution: at a coarser one, a place is visible if any of its parts is.

    Args:
        visible: ``(B, 1, h, w)``, 1 where visible, else 0.
        height: of the feature map.
        width: of the feature map.

    Returns:
        ``(B, 1, height, width)``.
    """
    if height >= visible.shape[2]:
        return F.interpolate(visible, size=(height, width), mode="nearest")
    return F.adaptive_max_pool2d(visible, (height, width))


def visible_batch_norm(norm: _BatchNorm, features: Tensor, mask: Tensor) -> Tensor:
    """BatchNorm over the visible places; the masked ones become 0.

    Args:
        norm: whose parameters, running statistics and mode are used. A synchronized one takes the
            statistics of all processes together.
        features: ``(B, C, h, w)``.
        mask: ``(B, 1, h, w)``, 1 where visible, else 0.

    Returns:
        ``(B, C, h, w)``, of the type of the features; computed in float32.
    """
    values, mask = features.float(), mask.float()
    mean, variance = norm.running_mean, norm.running_var
    if norm.training or mean is None or variance is None:

        def over_places(summed: Tensor) -> Tensor:
            if isinstance(norm, nn.SyncBatchNorm | Synchronized):
                return gather(summed[None]).sum(dim=0)
            return summed

        count = over_places(mask.sum())
        mean = over_places((values * mask).sum(dim=(0, 2, 3))) / count
        spread = ((values - mean[:, None, None]) * mask).square()
        variance = over_places(spread.sum(dim=(0, 2, 3))) / count
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
    new = norm.momentum if norm.momentum is not None else 1 / int(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, new)
    norm.running_var.lerp_(variance * count / (count - 1).clamp(min=1), new)


def visible_group_norm(norm: nn.GroupNorm, features: Tensor, mask: Tensor) -> Tensor:
    """GroupNorm over each image's visible places; the masked ones become 0.

    Args:
        norm: whose parameters are used.
        features: ``(B, C, h, w)``.
        mask: ``(B, 1, h, w)``, 1 where visible, else 0; each image has a visible place.

    Returns:
        ``(B, C, h, w)``, of the type of the features; computed in float32.
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
    """Stands in for the ``forward`` of a norm, and of timm's norms with an activation."""
    over = visible_group_norm if isinstance(norm, nn.GroupNorm) else visible_batch_norm
    normed: Tensor = over(norm, features, mask_of(features))
    if hasattr(norm, "act"):  # timm's BatchNormAct2d, GroupNormAct
        normed = norm.act(norm.drop(normed))
    return normed


def _mask_output(module: nn.Module, _: Any, output: Tensor, batch: int, mask_of: MaskOf) -> Tensor:
    """Forward hook: masks an output again, unless it is no feature map of the images."""
    if output.ndim != 4 or len(output) != batch:
        return output
    # timm names the LayerNorms of (B, C, h, w) ...2d; others, and linear layers, take (B, h, w, C)
    last = isinstance(module, nn.LayerNorm) and "2d" not in type(module).__name__
    if last or isinstance(module, nn.Linear):
        return output * mask_of(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return output * mask_of(output)


def _visible_fraction(features: Tensor, mask_of: MaskOf) -> Tensor:
    return mask_of(features).mean(dim=(2, 3), keepdim=True)


def _divide_by_fraction(_: nn.Module, features: tuple[Tensor], mask_of: MaskOf) -> Tensor:
    """Forward pre-hook: the mean over all places becomes that over the visible ones."""
    return features[0] / _visible_fraction(features[0], mask_of)


def _multiply_by_fraction(_: nn.Module, __: Any, output: Tensor, mask_of: MaskOf) -> Tensor:
    """Forward hook: undoes ``_divide_by_fraction`` in what is gated."""
    return output * _visible_fraction(output, mask_of)


# Layers that spread features or make zeros something else, and those that gate channels by their
# mean over the image, x * g(mean(x)).
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm)
_MASKED = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.MaxPool2d, nn.AvgPool2d)
_GATES = (SEModule, EffectiveSEModule, EcaModule, SqueezeExcite)


@contextmanager
def sparse(model: nn.Module, visible: Tensor) -> Iterator[None]:
    """Within it, a convolutional network computes at visible places only.

    Outputs of convolutions, poolings, linear layers and LayerNorms are masked by hooks. BatchNorm
    and GroupNorm take their statistics, running ones included, from the visible places, by a
    ``forward`` that stands in for theirs; squeeze-and-excitation takes its mean from them. All of
    it is gone afterwards: the network is plain again.

    Args:
        model: a timm model.
        visible: ``(B, 1, g, g)``, 1 where the image is visible, else 0; each image has a visible
            place.
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
    """The deepest feature map of each resolution, of the four coarsest (section 3.2).

    Args:
        encoder: with a convolutional backbone.
        images: ``(B, C, S, S)``, normalized.

    Returns:
        ``(B, C_i, h_i, w_i)``, fine to coarse. The last one is that of ``encoder.pooled_and_map``
        where timm gives it, so that a final convolution or norm is trained too.
    """
    last, maps = encoder.model.forward_intermediates(images, output_fmt="NCHW")
    if last.ndim == 4 and last.shape[2:] == maps[-1].shape[2:]:
        maps = [*maps, last]
    deepest = {features.shape[2]: features for features in maps}
    return list(deepest.values())[-4:]


def choose_grid(size: int, sides: list[int]) -> int | None:
    """How many places along an edge the mask has.

    The paper masks at the resolution of the last stage: 7 x 7 places of 32 pixels at 224 (section
    3.1). On small images that would be a single place; so the mask has the resolution of the
    coarsest stage with at least 4 x 4 places that divides the image and all finer stages evenly.

    Args:
        size: side of the image in pixels.
        sides: sides of the feature maps.

    Returns:
        The number; None if no stage will do.
    """
    fits = [
        side
        for side in sides
        if side >= 4 and not any(finer % side for finer in (size, *sides) if finer >= side)
    ]
    return min(fits) if fits and size % max(sides) == 0 else None


class Decoder(nn.Module):
    """A light U-Net decoder that upsamples from the coarsest map to the finest (section 3.2).

    At each resolution, the masked places are filled with a learned token ("densified") before the
    map is added. The paper's decoder goes on to the full resolution; this one ends at the
    finest map, each of whose places predicts its pixels, which is faster.

    Args:
        channels: of the feature maps, fine to coarse.
        width: channels at the coarsest map; halved at each finer one, down to 32 at least.
        outputs: channels of the output.
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
        """Decode.

        Args:
            maps: ``(B, C_i, h_i, w_i)``, fine to coarse, 0 at masked places.
            visible: ``(B, 1, g, g)``, 1 where visible, else 0.

        Returns:
            ``(B, outputs, h_0, w_0)``.
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

    The mask has the resolution of the last stage, or of a finer one on small images, see
    ``choose_grid``. BatchNorm's running statistics are those of visible places. Layers after the
    last feature map (as in MobileNetV3's head) are not trained.

    Args:
        encoder: Encoder to train; a convolutional network.
        mask_ratio: share of the image that is masked (section 4.1).
        decoder_width: channels of the decoder at the coarsest map; default half of that map's, but
            at least 64 and at most 512 (the authors' code has 768 for a ResNet-50's 2048).
        min_crop_scale: Smallest fraction of the image area in a view; 0.67 as in the authors' code
            (pretrain/utils/imagenet.py).
    """

    info = PretextInfo(
        name="spark",
        family="masked",
        views="1",
        paper="Tian et al. 2023, arXiv 2301.03580",
        use="CNNs that will be fine-tuned, also for detection; wants long runs",
        backbones="CNN",
    )
    # The paper's LAMB is for batches of 4096 (appendix); at 64 to 256 AdamW learns faster.
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=0.05, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.6,
        decoder_width: int | None = None,
        min_crop_scale: float = 0.67,
    ) -> None:
        super().__init__(encoder)
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
        """The side of the mask, and feature maps that were found to be 0 wherever masked."""
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
        except RuntimeError:  # layers of attention, which reshape what would have to be masked
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
        # normalized patches, and the masked ones only (section 3.3)
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
        """Choose the masked places of each image: ``(B, M)`` indices below g * g."""
        return random_mask(len(images), self.grid**2, self.mask_ratio, images.device)[1]

    def encode(self, images: Tensor, visible: Tensor) -> list[Tensor]:
        """Feature maps of the visible places.

        Args:
            images: ``(B, C, S, S)``, normalized.
            visible: ``(B, 1, g, g)``, 1 where visible, else 0.

        Returns:
            ``(B, C_i, h_i, w_i)``, fine to coarse, 0 at masked places.
        """
        with sparse(self.encoder.model, visible):
            return pyramid(self.encoder, images * mask_at(visible, *images.shape[2:]))

    def predict(self, images: Tensor, masked: Tensor) -> Tensor:
        """Predict all pixels, the masked ones from the visible ones.

        Args:
            images: ``(B, C, S, S)``, normalized.
            masked: ``(B, M)`` indices of the masked places.

        Returns:
            ``(B, C, S, S)``.
        """
        mask = indices_to_mask(masked, self.grid**2)
        visible = (~mask).to(images.dtype).view(-1, 1, self.grid, self.grid)
        decoded = self.decoder(self.encode(images, visible), visible)
        return F.pixel_shuffle(decoded, self.stride)
