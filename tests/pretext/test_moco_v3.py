import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.moco_v3 import MoCoV3


def test_the_patch_projection_of_a_vit_stays_as_it_is() -> None:
    task = MoCoV3(build_encoder("test_vit", 32))
    task.loss([torch.randn(4, 3, 32, 32)] * 2).backward()
    frozen = {n for n, p in task.encoder.model.named_parameters() if p.grad is None}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_a_cnn_is_trained_as_a_whole() -> None:
    task = MoCoV3(build_encoder("test_resnet", 32))
    assert all(p.requires_grad for p in task.encoder.parameters())
