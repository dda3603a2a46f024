import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.moco_v3 import MoCoV3


def test_the_patch_projection_of_a_vit_stays_as_it_is() -> None:
    task = MoCoV3(build_encoder("test_vit", 32))
    task.loss([torch.randn(4, 3, 32, 32)] * 2).backward()
    frozen = {n for n, p in task.encoder.model.named_parameters() if p.grad is None}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_a_patch_projection_that_is_adapted_to_other_bands_is_trained() -> None:
    encoder = build_encoder("test_vit", 32)
    encoder.adapted_inputs = frozenset({"patch_embed.proj.weight"})
    task = MoCoV3(encoder)
    assert task.encoder.model.patch_embed.proj.weight.requires_grad
    assert not task.teacher_encoder.model.patch_embed.proj.weight.requires_grad


def test_a_cnn_is_trained_as_a_whole() -> None:
    task = MoCoV3(build_encoder("test_resnet", 32))
    assert all(p.requires_grad for p in task.encoder.parameters())


def test_heads_are_those_of_the_authors_code_for_vits_and_for_resnets() -> None:
    def layers(head: torch.nn.Module) -> list[str]:
        return [
            "norm without weights"
            if isinstance(one, torch.nn.BatchNorm1d) and not one.affine
            else type(one).__name__
            for one in head.children()
        ]

    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    vit, cnn = (MoCoV3(build_encoder(name, 32)) for name in ("test_vit", "test_resnet"))
    assert layers(vit.projector) == [*hidden, *hidden, "Linear", "norm without weights"]
    assert layers(vit.predictor) == [*hidden, "Linear", "norm without weights"]
    assert layers(cnn.projector) == [*hidden, "Linear", "norm without weights"]
    assert layers(cnn.predictor) == [*hidden, "Linear"]
