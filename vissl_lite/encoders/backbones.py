"""Backbones for small images and machines, as timm models: importing this module registers them.

timm's ResNets reduce the image 32 times, so that 32 pixels end as a single position. CIFAR tables
use a first convolution of 3x3 with stride 1 and no max-pooling, which reduces 8 times (SimCLR,
Chen et al. 2020, appendix B.9). Its ViTs cut patches of 16 pixels, four to such an image; patches
of 4 make 64. As registered models, their name and weights still describe the whole encoder, and
``timm.create_model`` builds them.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn


class SmallImageResNet(ResNet):
    """timm's ResNet with a first convolution of 3x3, stride 1, and no max-pooling."""

    def __init__(self, *args: Any, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, **kwargs)
        self.conv1 = nn.Conv2d(in_chans, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for stage in self.feature_info:
            stage["reduction"] = max(1, stage["reduction"] // 4)


_CONFIG = {
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "num_classes": 1000,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "conv1",
    "classifier": "fc",
    "url": "",
}
_SLIM = {**_CONFIG, "input_size": (3, 64, 64), "pool_size": (2, 2), "first_conv": "conv1.0"}
_VIT = {
    **{key: value for key, value in _CONFIG.items() if key != "pool_size"},
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs(
    {
        "resnet18_cifar": _CONFIG,
        "resnet34_cifar": _CONFIG,
        "resnet50_cifar": _CONFIG,
        "resnet10t_slim": _SLIM,
        "vit_tiny_patch4_32": _VIT,
        "vit_slim_patch4_32": _VIT,
    }
)


def _build(name: str, pretrained: bool, arguments: dict[str, Any]) -> ResNet:
    return build_model_with_cfg(SmallImageResNet, name, pretrained, **arguments)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 for images of about 32 to 64 pixels; 11.2 million parameters."""
    return _build(
        "resnet18_cifar", pretrained, {"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs}
    )


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-34 for images of about 32 to 64 pixels; 21.3 million parameters."""
    return _build(
        "resnet34_cifar", pretrained, {"block": BasicBlock, "layers": (3, 4, 6, 3), **kwargs}
    )


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 for images of about 32 to 64 pixels; 23.5 million parameters."""
    return _build(
        "resnet50_cifar", pretrained, {"block": Bottleneck, "layers": (3, 4, 6, 3), **kwargs}
    )


@register_model
def resnet10t_slim(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """timm's resnet10t at half its width, for minutes on a CPU; 1.3 million parameters."""
    arguments = {
        "block": BasicBlock,
        "layers": (1, 1, 1, 1),
        "channels": (32, 64, 128, 256),
        "stem_width": 32,
        "stem_type": "deep_tiered",
        "avg_down": True,
        **kwargs,
    }
    return build_model_with_cfg(ResNet, "resnet10t_slim", pretrained, **arguments)


def _build_vit(name: str, pretrained: bool, arguments: dict[str, Any]) -> VisionTransformer:
    return build_model_with_cfg(
        VisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **arguments,
    )


@register_model
def vit_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """timm's ViT-Tiny with patches of 4 pixels for images of 32; 5.4 million parameters."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _build_vit("vit_tiny_patch4_32", pretrained, {**sizes, **kwargs})


@register_model
def vit_slim_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Six layers of width 128, for minutes on a CPU; 1.2 million parameters."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
    return _build_vit("vit_slim_patch4_32", pretrained, {**sizes, **kwargs})
