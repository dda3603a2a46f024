from typing import Any

import pytest
import timm
import torch
from torch import nn

from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.optim import build_optimizer
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.dinov2 import DINOv2, draw_masks
from vissl_lite.pretext.ibot import IBOT

SMALL = {"prototypes": 16, "hidden_size": 32, "bottleneck_size": 8}


def tiny(backbone: str) -> Encoder:
    """Images of 4 x 4 patches; two narrow blocks of timm's model."""
    size = 4 * (14 if "patch14" in backbone else 16)
    arguments = {"img_size": size, "embed_dim": 32, "depth": 2, "num_heads": 2}
    arguments["dynamic_img_size"] = True
    return Encoder(timm.create_model(backbone, num_classes=0, **arguments), arguments, size)


def test_half_of_the_images_are_masked_and_their_shares_are_spread_evenly() -> None:
    for _ in range(20):
        shares = draw_masks(16, 14, 14).flatten(1).float().mean(dim=1).sort().values
        assert (shares[:8] == 0).all()
        # Eight parts of the range; a mask may have fewer patches where no block fits any more.
        parts = 0.1 + 0.05 * torch.arange(9)
        assert (shares[8:] < parts[1:] + 0.01).all()
        assert (shares[8:] > parts[:-1] - 0.05).all()


def test_masks_are_of_random_images() -> None:
    masked = torch.stack([draw_masks(6, 8, 8).flatten(1).any(dim=1) for _ in range(60)])
    assert masked.any(dim=0).all()
    assert (~masked).any(dim=0).all()


@pytest.mark.slow
@pytest.mark.parametrize("pretext", [DINOv2, IBOT])
@pytest.mark.parametrize("backbone", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_class_and_register_tokens_are_not_patches(
    pretext: type[PretextTask], backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With registers, and with rotary positions: what is masked is hidden, and predicted."""
    torch.manual_seed(0)
    task: Any = pretext(tiny(backbone), **SMALL, drop_path=0.0)
    size = task.encoder.image_size
    mask = torch.zeros(4, 4, 4, dtype=torch.bool)
    mask[:2, 1:3, 1:4] = True
    monkeypatch.setattr(f"{pretext.__module__}.draw_masks", lambda *_: mask)
    heads = (
        [task.patch_head, task.teacher_patch_head]
        if pretext is DINOv2
        else [task.head, task.teacher_head]
    )
    seen: dict[nn.Module, torch.Tensor] = {}
    for module in (task.encoder.model.blocks[0], task.teacher_encoder.model.blocks[0], *heads):
        module.register_forward_pre_hook(lambda one, x: seen.update({one: x[0].detach()}))
    views = [torch.randn(2, 3, size, size) for _ in range(2)]
    task.loss(views).backward()
    before = dict(seen)

    first = task.encoder.model.blocks[0]
    assert task.encoder.model.num_prefix_tokens == 5
    assert seen[first].shape[1] == 5 + 16
    with torch.no_grad():
        patches = task.teacher_encoder.tokens(torch.cat(views))[:, 5:]
    torch.testing.assert_close(seen[heads[1]], patches[mask.flatten(1)])
    assert seen[heads[0]].shape == seen[heads[1]].shape

    gradients = {name: p.grad for name, p in task.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert gradients["encoder.model.reg_token"].abs().sum() > 0
    assert gradients["mask_token"].abs().sum() > 0

    patch = size // 4
    views[0][:, :, patch : 3 * patch, patch:] += 1.0  # what is masked in the first crops
    task.loss(views)
    assert torch.equal(before[first], seen[first])
    teacher = task.teacher_encoder.model.blocks[0]
    assert not torch.equal(before[teacher], seen[teacher])


@pytest.mark.slow
def test_the_heads_are_not_tied() -> None:
    torch.manual_seed(0)
    task = DINOv2(build_encoder("test_vit", 32), **SMALL, patch_weight=0.0)
    task.loss([torch.randn(4, 3, 32, 32) for _ in range(2)]).backward()
    assert sum(p.grad.abs().sum() for p in task.head.parameters()) > 0
    assert sum(p.grad.abs().sum() for p in task.patch_head.parameters()) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("progress", "moves"), [(0.0, False), (0.5, True)])
def test_the_last_layers_stay_at_first(progress: float, moves: bool) -> None:
    torch.manual_seed(0)
    task = DINOv2(build_encoder("test_vit", 32), **SMALL, freeze_last_layer=0.1)
    task.progress = progress
    optimizer = build_optimizer(task, task.optimizer_settings)
    last = [task.head.prototypes.weight, task.patch_head.prototypes.weight]
    before = [weight.clone() for weight in last]
    task.loss([torch.randn(4, 3, 32, 32) for _ in range(2)]).backward()
    task.on_after_backward()
    optimizer.step()
    for weight, old in zip(last, before, strict=True):
        assert torch.equal(weight, old) != moves
