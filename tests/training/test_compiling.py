import pytest
import torch
from torch import Tensor, nn

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.moco import MoCo
from vissl_lite.training import compiling
from vissl_lite.training.compiling import check_compiler, compiled
from vissl_lite.training.freezing import train_only
from vissl_lite.training.hardware import Hardware


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_encoders_are_compiled_in_training_and_as_before_afterwards(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compile_nothing(plain, **options):
        def fast(images: Tensor) -> Tensor:
            calls.append(images.shape)
            return plain(images)

        return fast

    monkeypatch.setattr(torch, "compile", compile_nothing)
    task = MoCo(build_encoder(backbone, 32))
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    names = list(task.state_dict())
    with compiled(task):
        task.loss(views)
        both = len(calls)
        blocks = len(task.encoder.model.blocks) if backbone == "test_vit" else 1
        assert both == 2 * blocks  # the teacher too
        task.eval()
        task.encoder(views[0])
        assert len(calls) == both
        assert list(task.state_dict()) == names
    task.train()
    task.loss(views)
    assert len(calls) == both
    assert all("forward" not in module.__dict__ for module in task.modules())


@pytest.mark.slow
def test_low_rank_adapters_are_trained_through_the_compiler() -> None:
    """With the eager backend: what is tested is that the parametrized weights can be traced."""
    encoder = build_encoder("test_vit", 32)
    train_only(encoder, "lora:4")
    block, tokens = encoder.model.blocks[0], torch.randn(2, 5, 64)
    fast = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(tokens), block(tokens))
    update = block.attn.qkv.parametrizations.weight[0]
    gradients = []
    for forward in (block, fast):
        update.b.grad = None
        forward(tokens).square().sum().backward()
        gradients.append(update.b.grad)
    torch.testing.assert_close(*gradients)


def test_without_a_compiler_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and there is no no-such-comp"):
        Hardware(compile=True).check()
    Hardware().check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs Triton"):
        check_compiler()


def test_a_module_without_encoders_is_left_alone() -> None:
    module = nn.Linear(2, 2)
    with compiled(module):
        assert "forward" not in module.__dict__
