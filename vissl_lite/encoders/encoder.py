"""Encoder: a timm backbone with weights, the output of pre-training and input of evaluation."""

import logging
import math
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.encoders import backbones as _registers_small_image_resnets  # noqa: F401
from vissl_lite.errors import UserError, WeightsUnavailableError, did_you_mean

log = logging.getLogger(__name__)

# Scale of the last BatchNorm of a residual branch, see ``open_residual_branches``.
BRANCH_SCALE = 0.5


class Encoder(nn.Module):
    """A timm model without a classifier, together with its input normalization.

    Args:
        model: The timm model, created with ``num_classes=0``.
        model_args: Arguments besides the name that ``timm.create_model`` needs to rebuild it.
        image_size: Side of the input images in pixels.
        reader: How its images are read.
        adapted_inputs: Names of parameters with adapted input channels, see the attribute; default
            none.

    Attributes:
        model: The timm model. ``model.state_dict()`` uses timm's names, as on disk.
        num_features: D, the length of a pooled feature vector.
        backbone: Name of the architecture.
        mean, std: Mean and standard deviation per channel, for values in [0, 1].
        scale, shift: ``(1, C, 1, 1)`` buffers: normalized = raw * scale + shift; see ``normalize``.
        adapted_inputs: Names of the parameters of the model whose input channels were adapted to
            the bands of the images, so that some of their filters are not those of the weights that
            were loaded, but means or repetitions of them: bands with the same filter are told apart
            only once it is trained. Empty for a single band, which gets the sum of the filters, as
            a gray image does. Not saved with the encoder, as training has changed them by then.
    """

    def __init__(
        self,
        model: nn.Module,
        model_args: dict[str, Any],
        image_size: int,
        reader: ImageReader = PHOTOGRAPHS,
        adapted_inputs: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.reader = reader
        self.adapted_inputs = frozenset(adapted_inputs)
        self.model_args = model_args
        self.image_size = image_size
        timm_model: Any = model
        self.num_features = int(getattr(model, "head_hidden_size", timm_model.num_features))
        config = timm_model.pretrained_cfg
        self.backbone: str = config["architecture"]
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        self.scale: Tensor
        self.shift: Tensor
        scale = 1 / (reader.max_value * torch.tensor(self.std))
        shift = -torch.tensor(self.mean) / torch.tensor(self.std)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)

    @property
    def patch_size(self) -> int | None:
        """Patch size of a transformer in pixels; None for a convolutional backbone."""
        return _patch_side(self.model)

    def fitting_size(self, size: float) -> int:
        """Round a size to the nearest multiple of the patch size; for a CNN, to a multiple of 8.

        Args:
            size: Side of the images in pixels.
        """
        step = self.patch_size or 8
        return max(2 * step if self.patch_size is None else step, round(size / step) * step)

    def check_image_size(self, size: int) -> None:
        """Raise a UserError if the backbone does not support images of this size.

        Args:
            size: Side of the images in pixels.
        """
        try:
            with self._dry_run(size, size) as blank:
                self(blank)
        except (AssertionError, RuntimeError, ValueError) as error:
            fits = self.fitting_size(size)
            advice = "" if self.patch_size is None or fits == size else f"; {fits} pixels fit"
            raise UserError(
                f"{self.backbone} can't be built for {size} pixels: {first_line(error)}{advice}"
            ) from None

    @contextmanager
    def _dry_run(self, height: int, width: int) -> Iterator[Tensor]:
        """Yield a blank image, in evaluation mode so that running statistics do not change."""
        device, was_training = next(self.parameters()).device, self.training
        self.eval()
        try:
            # Overrides a default device that the caller may have set
            with torch.no_grad(), device:
                yield torch.zeros(1, len(self.mean), height, width, device=device)
        finally:
            self.train(was_training)

    def use_image_size(self, size: int) -> None:
        """Change the size of the input images.

        Args:
            size: Side of the images in pixels.

        Raises:
            UserError: If the backbone does not support the size.
        """
        self.check_image_size(size)
        self.image_size = size

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize a batch of raw images for the backbone.

        Args:
            images: ``(B, C, H, W)`` images from ``reader``, uint8 or uint16, on the encoder's
                device.

        Returns:
            ``(B, C, H, W)`` images in the encoder's floating-point type and the memory format of
            ``images``.
        """
        kind = self.scale.dtype
        exact = torch.float32 if images.dtype == torch.uint16 else kind  # float16 ends at 65504
        shift, scale = self.shift.to(exact), self.scale.to(exact)
        return torch.addcmul(shift, images.to(exact), scale).to(kind)

    def denormalize(self, images: Tensor) -> Tensor:
        """Turn normalized images into pictures.

        Args:
            images: ``(B, C, H, W)`` normalized images. NaN is replaced by 0.

        Returns:
            ``(B, 3, H, W)`` uint8 images; of bands those that ``ImageReader.picture`` shows.
        """
        values = (images.float() - self.shift) / self.scale
        values = values.nan_to_num(0.0) * (255 / self.reader.max_value)
        shown = self.reader.picture_bands()
        return values[:, shown].clamp(0, 255).round().to(torch.uint8).expand(-1, 3, -1, -1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute pooled features.

        Args:
            images: ``(B, C, H, W)`` normalized images.

        Returns:
            ``(B, D)`` features.
        """
        with _exact_if_tiny(images):
            features: Tensor = self.model(images)
        return features

    def pooled_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute pooled features and the last feature map in one forward pass.

        Args:
            images: ``(B, C, H, W)`` normalized images.

        Returns:
            ``(B, D)`` features and a ``(B, D', h, w)`` map; D' is ``map_features``.

        Raises:
            UserError: The backbone has no single map, such as CrossViT.
        """
        with _exact_if_tiny(images):
            last = self.model.forward_features(images)
            return self.model.forward_head(last, pre_logits=True), self._as_map(last, images)

    def tokens(self, images: Tensor) -> Tensor:
        """Compute the tokens of the last layer.

        Args:
            images: ``(B, C, H, W)`` normalized images.

        Returns:
            ``(B, T, D')`` tokens of a transformer, class and register tokens first; for other
            backbones the positions of the last feature map. D' is ``map_features``.

        Raises:
            UserError: The backbone has no single map, such as CrossViT.
        """
        with _exact_if_tiny(images):
            last: Any = self.model.forward_features(images)
        if isinstance(last, Tensor) and last.ndim == 3:
            return last
        return self._as_map(last, images).flatten(2).transpose(1, 2)

    def token_shape(self) -> tuple[int, int]:
        """Number and length of the tokens at ``image_size``, measured by a dry run."""
        with self._dry_run(self.image_size, self.image_size) as blank:
            _, count, features = self.tokens(blank).shape
        return count, features

    @property
    def map_features(self) -> int:
        """Channels of the last feature map; ``num_features`` except for a few mobile backbones."""
        return int(self.model.num_features)

    def map_side(self) -> int:
        """Side of the last feature map at ``image_size``, measured by a dry run."""
        with self._dry_run(self.image_size, self.image_size) as blank:
            return int(self.pooled_and_map(blank)[1].shape[-1])

    def freeze_after_map(self) -> None:
        """Freeze what follows the last feature map, for a pretext that is not trained on it.

        On several devices, weights that no gradient reaches would stop the training.
        """
        trained = [one for one in self.model.parameters() if one.requires_grad]
        with self._dry_run(self.image_size, self.image_size) as blank, torch.enable_grad():
            total = self.model.forward_features(blank).sum()
            reached = torch.autograd.grad(total, trained, allow_unused=True)
        for parameter, gradient in zip(trained, reached, strict=True):
            parameter.requires_grad_(gradient is not None)

    def _as_map(self, last: Tensor, images: Tensor) -> Tensor:
        if not isinstance(last, Tensor):
            raise UserError(f"{self.backbone} has several feature maps, and one is needed")
        if last.ndim == 3:  # Patch tokens follow class and register tokens
            patch, count = self.patch_size or 1, last.shape[1]
            rows, columns = images.shape[2] // patch, images.shape[3] // patch
            prefix = getattr(self.model, "num_prefix_tokens", None)
            if prefix is None:  # VOLO and CoaT have a class token and do not say so
                is_grid = rows * columns <= count
                prefix = count - (rows * columns if is_grid else math.isqrt(count) ** 2)
            last = last[:, prefix:]
            if rows * columns != last.shape[1]:
                rows = math.isqrt(last.shape[1])
            return last.transpose(1, 2).unflatten(2, (rows, -1))
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return last.permute(0, 3, 1, 2)
        return last

    def stage_names(self) -> list[str]:
        """Names in timm of the modules whose outputs ``stages`` returns, fine to coarse."""
        info = self.model.feature_info
        modules = [
            str(stage["module"]) for stage in (info if isinstance(info, list) else info.info)
        ]
        return [modules[i] for i in self._stage_indices(len(modules))]

    def stages(self, images: Tensor) -> list[Tensor]:
        """Compute the feature map of each stage; for a ViT, of four evenly spaced blocks.

        Args:
            images: ``(B, C, H, W)`` normalized images.

        Returns:
            A ``(B, C_i, H_i, W_i)`` map for each stage, fine to coarse.

        Raises:
            UserError: If timm has no intermediate features for this backbone.
        """
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(f"timm gives no intermediate features of {self.backbone}")
        with _exact_if_tiny(images):
            maps: list[Tensor] = self.model.forward_intermediates(
                images, output_fmt="NCHW", intermediates_only=True
            )
        return [maps[i] for i in self._stage_indices(len(maps))]

    def stage_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """Channels, height and width of the map of each stage, measured by a dry run.

        Args:
            height: Height of the images in pixels.
            width: Width of the images in pixels.

        Raises:
            AssertionError, RuntimeError, ValueError: If the backbone does not support this size.
        """
        with self._dry_run(height, width) as blank:
            maps = self.stages(blank)
        return [(m.shape[1], m.shape[2], m.shape[3]) for m in maps]

    def _stage_indices(self, count: int) -> list[int]:
        # Pyramids have four to six stages; more means a stack of equal blocks.
        if count <= 6 and not hasattr(self.model, "blocks"):
            return list(range(count))
        if count <= 5:  # EfficientNet-like pyramids keep their stages in `blocks`
            return list(range(count))
        return [round(count * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]


def _exact_if_tiny(images: Tensor) -> AbstractContextManager[Any]:
    """Disable bf16 autocast on the CPU for images below 32 pixels.

    For a bf16 input of one pixel, as in the last stage of a ResNet at 16 pixels, oneDNN leaves
    parts of the gradient of a strided convolution uninitialized, some of them NaN (torch 2.15).
    """
    if images.device.type == "cpu" and images.shape[-1] < 32:
        return torch.autocast("cpu", enabled=False)
    return nullcontext()


def build_encoder(
    backbone: str,
    image_size: int | None = None,
    pretrained: bool = False,
    reader: ImageReader = PHOTOGRAPHS,
) -> Encoder:
    """Create an encoder.

    Args:
        backbone: Name of a timm architecture, with or without a tag (``resnet18.a1_in1k``).
        image_size: Side of the images in pixels; default: that of the backbone. Backbones whose
            weights depend on the size are built for it.
        pretrained: Load timm's weights from the hub or its cache instead of random ones. To other
            numbers of channels than three timm adapts the first convolution, which then is in
            ``Encoder.adapted_inputs`` unless there is a single channel.
        reader: How the images are read; the backbone gets as many channels.

    Raises:
        UserError: If the name is unknown, or the backbone does not support the size.
        WeightsUnavailableError: If the weights are neither cached nor downloadable.
    """
    name = backbone.split(".")[0]
    if not timm.is_model(name):
        raise UserError(f"unknown backbone {backbone}: {did_you_mean(name, timm.list_models())}")
    size_args: dict[str, Any] = {}
    if image_size is not None:
        size_args = {"img_size": image_size, "dynamic_img_size": True}
    model, model_args = None, size_args
    channels = {} if reader.channels == 3 else {"in_chans": reader.channels}
    # Some backbones accept no img_size, others img_size but no dynamic_img_size.
    for model_args in (size_args, {"img_size": image_size} if size_args else {}, {}):
        try:
            model = _create(backbone, pretrained, {**channels, **model_args})
            break
        except TypeError as error:
            if "img_size" not in str(error) or not model_args:
                raise
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f"{backbone} can't be built for {image_size} pixels: {error}") from None
    assert model is not None
    config: Any = model.pretrained_cfg  # until ``use_reader``, with the channels of timm's weights
    is_adapted = pretrained and reader.channels not in (1, config["input_size"][0])
    adapted = first_weights(model) if is_adapted else ()
    use_reader(model, reader)
    size, args = int(config["input_size"][-1]), {**channels, **model_args}
    encoder = Encoder(model, args, size, reader, adapted)
    if image_size is not None:
        encoder.use_image_size(image_size)
    return encoder


def patch_multiple(backbone: str, size: int) -> int:
    """Round a size to the nearest multiple of the patch size of a backbone.

    Args:
        backbone: Name of a timm architecture, with or without a tag; an unknown one has no patches.
        size: Side of the images in pixels, returned as it is for a backbone without patches.
    """
    name = backbone.split(".")[0]
    if not timm.is_model(name):
        return size
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    side = _patch_side(model)
    return size if side is None else max(1, round(size / side)) * side


def _patch_side(model: nn.Module) -> int | None:
    """Side of the patches that a model divides images into; None if it does not or they overlap."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "patch_size", None)
    if size is None:
        return None
    side = size if isinstance(size, int) else int(size[0])  # an int in XCiT
    convolution = getattr(embed, "proj", None)
    overlaps = isinstance(convolution, nn.Conv2d) and convolution.stride[0] != side  # in PVT v2
    return None if overlaps else side


def use_reader(model: nn.Module, reader: ImageReader) -> None:
    """Record the channels, means and standard deviations of bands in the config of a timm model.

    Args:
        model: The timm model.
        reader: How its images are read; photographs leave the config as it is.
    """
    if reader.bands is not None:
        timm_model: Any = model
        config = dict(timm_model.pretrained_cfg)
        size = (reader.channels, *config["input_size"][1:])
        timm_model.pretrained_cfg = {
            **config, "input_size": size, "mean": reader.mean, "std": reader.std
        }  # fmt: skip


def first_weights(model: nn.Module) -> list[str]:
    """Names of the weights that see the images: of the first convolution, or of several.

    Empty if timm does not say which they are.
    """
    timm_model: Any = model
    first = timm_model.pretrained_cfg.get("first_conv")
    names = [first] if isinstance(first, str) else list(first or ())
    return [f"{name}.weight" for name in names]


def open_residual_branches(encoder: Encoder) -> None:
    """Let the residual branches of a network with random weights count from the first step on.

    timm starts the last BatchNorm of each branch of ResNets and their relatives at a scale of zero,
    so that blocks are the identity at first, for large batches (Goyal et al. 2017, arXiv
    1706.02677, section 5.1); torchvision starts them at one. In short runs branches that start at
    zero have no time to grow. Linear accuracy after two minutes of ``simclr`` with scales of 0,
    0.2, 0.5 and 1: CIFAR-10 0.334, 0.409, 0.430 and 0.393; UC Merced 0.395, 0.481, 0.488 and 0.467
    (``resnet18``, one slow core, one seed). The other pretexts that were measured gain with 0.5 as
    well, but for ``byol`` on UC Merced (benchmarks/README.md, settings of short runs). Untrained
    networks gain most: on UC Merced 0.417 instead of 0.305, and trained from scratch with five
    labels per class 0.460 instead of 0.350. So ``random:NAME`` starts like this as well.

    Args:
        encoder: Changed in place.
    """
    for module in encoder.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.any():
            nn.init.constant_(module.weight, BRANCH_SCALE)


def untrained_copy(encoder: Encoder) -> Encoder:
    """An encoder of the same architecture, image size and bands with random weights."""
    model: Any = timm.create_model(encoder.backbone, num_classes=0, **encoder.model_args)
    use_reader(model, encoder.reader)
    return Encoder(model, encoder.model_args, encoder.image_size, encoder.reader)


def adapt_encoder(encoder: Encoder, reader: ImageReader, role: str = "encoder") -> Encoder:
    """A copy of an encoder for images with other bands.

    The first convolution gets as many input channels. A band that the encoder knows by name keeps
    its weights, another one gets their mean over the bands; all are scaled by the ratio of the
    numbers of bands, so that the sum over bands has the same size as before. Statistics of the
    normalization are those of the reader. If several bands do not all keep weights of their names,
    the first convolution is one of ``Encoder.adapted_inputs``.

    Args:
        encoder: Left as it is.
        reader: How the images are read.
        role: What the log calls it.

    Raises:
        UserError: The first convolution of the backbone is not known.
    """
    before, old = encoder.reader, encoder.model
    args = {name: value for name, value in encoder.model_args.items() if name != "in_chans"}
    if reader.channels != 3:
        args["in_chans"] = reader.channels
    model: Any = timm.create_model(encoder.backbone, num_classes=0, **args)
    state = old.state_dict()
    places = band_places(before)
    names_after = band_names(reader)
    shared = sum(name in places for name in names_after)
    reordered = shared > 0 and names_after != band_names(before)
    adapted = encoder.adapted_inputs
    if reader.channels != before.channels or reordered:
        names = first_weights(model)
        if not names or any(name not in state for name in names):
            raise UserError(
                f"{encoder.backbone} can't be adapted from {before.channels} to {reader.channels} "
                f"bands: timm does not say which its first convolution is"
            )
        for name in names:
            state[name] = _adapt_weight(state[name], places, reader)
        if reader.channels == 1:
            adapted = frozenset()
        elif shared < reader.channels:
            adapted |= set(names)
    use_reader(model, reader)
    if reader.bands is None:
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": _MEAN, "std": _STD}
    model.load_state_dict(state)
    log.info(
        "The %s for %d bands is adapted to %d: %s",
        role,
        before.channels,
        reader.channels,
        "its weights are the same, the normalization is another"
        if reader.channels == before.channels and not reordered
        else f"{shared} keep the weights of their names, {reader.channels - shared} get the mean",
    )
    return Encoder(model, args, encoder.image_size, reader, adapted)


# Mean and standard deviation of photographs (ImageNet), where the bands of an encoder had others.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def band_names(reader: ImageReader) -> tuple[str, ...]:
    """Names of the bands, those of photographs included; empty if they are not known."""
    return ("red", "green", "blue") if reader.bands is None else reader.names


def band_places(reader: ImageReader) -> dict[str, int]:
    """Positions of the bands that have names of their own."""
    names = band_names(reader)
    return {name: n for n, name in enumerate(names) if name and names.count(name) == 1}


def _adapt_weight(weight: Tensor, places: dict[str, int], after: ImageReader) -> Tensor:
    """``(O, C, h, w)`` weights of the first convolution for other bands; see ``adapt_encoder``."""
    mean = weight.mean(dim=1)
    bands = [
        weight[:, places[name]] if name in places else mean
        for name in band_names(after) or ("",) * after.channels
    ]
    return torch.stack(bands, dim=1) * (weight.shape[1] / after.channels)


def first_line(error: Exception) -> str:
    """First line of the message of an error, or the name of its class if it has none."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _create(backbone: str, pretrained: bool, model_args: dict[str, Any]) -> nn.Module:
    def create() -> nn.Module:
        return timm.create_model(backbone, pretrained=pretrained, num_classes=0, **model_args)

    if not pretrained:
        return create()
    import huggingface_hub.constants as hub

    # Without a network the client of the hub retries for a minute, so use the cache alone. timm
    # passes no local_files_only to the hub, hence the constant.
    was_offline, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE or not _online()
    try:
        return create()
    except (TypeError, AssertionError, ValueError):
        raise
    except RuntimeError as error:
        if "pretrained" in str(error).lower():
            raise UserError(f"timm has no pre-trained weights for {backbone}") from None
        raise
    except Exception as error:  # The client of the hub passes on errors of its HTTP library
        reason = first_line(error).split(". ")[0]
        raise WeightsUnavailableError(
            f"the pre-trained weights of {backbone} can't be downloaded and are not in the cache "
            f"({reason}): {_by_hand(backbone)}; or give a run, an encoder folder, or "
            f"random:{backbone.split('.')[0]} for random weights"
        ) from None
    finally:
        hub.HF_HUB_OFFLINE = was_offline


def _by_hand(backbone: str) -> str:
    """What to do with pre-trained weights that are downloaded on another machine."""
    config: Any = timm.get_pretrained_cfg(backbone)
    if config.hf_hub_id:
        return (
            f"put config.json and model.safetensors of https://huggingface.co/{config.hf_hub_id} "
            f"into a folder and give that folder"
        )
    return f"put {config.url} into {torch.hub.get_dir()}/checkpoints"


def _online() -> bool:
    """Whether the host of the hub is reachable; always True behind a proxy."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=5).close()
    except OSError:
        return False
    return True
