"""Attention among few tokens: torch's results, where it is used, and what it keeps."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.encoder import build_encoder
from vissl_lite.training import attention
from vissl_lite.training.attention import FEW_TOKENS, attend, quick_attention


def tokens(count: int, seed: int, width: int = 8) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, count, width, generator=random, requires_grad=True)


def results(compute: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    output = compute(*inputs)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.mark.parametrize("scale", [8**-0.5, 1.5])
def test_values_and_gradients_are_torchs(scale: float) -> None:
    inputs = tokens(5, 0), tokens(7, 1), tokens(7, 2)
    ours = results(lambda *qkv: attend(*qkv, scale), *inputs)
    theirs = results(lambda *qkv: F.scaled_dot_product_attention(*qkv, scale=scale), *inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_no_weights_are_kept_for_the_backward_pass() -> None:
    inputs = tokens(64, 0), tokens(64, 1), tokens(64, 2)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    ):
        attend(*inputs, 1.0)
    assert sum(kept) == sum(tensor.numel() for tensor in inputs)


def test_a_transformer_in_bf16_uses_it_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ours = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a: (calls.append(a[0].dtype), ours(*a))[1])
    encoder = build_encoder("test_vit", 32)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        plain = encoder(images)
        with quick_attention(encoder):
            quick = encoder(images)
    assert calls
    assert set(calls) == {torch.bfloat16}
    torch.testing.assert_close(plain, quick, atol=0.05, rtol=0.05)
    assert (plain - quick).abs().mean() < 0.01
    with quick_attention(encoder):
        calls.clear()
        encoder(images)  # in float32 torch's own is faster
    assert not calls


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (FEW_TOKENS + 1, {}),
        (4, {"is_causal": True}),
        (4, {"dropout_p": 0.5}),
        (4, {"attn_mask": torch.zeros(4, 4)}),
    ],
)
def test_the_rest_is_torchs(
    count: int, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attend", lambda *_: pytest.fail("not for this"))
    encoder = build_encoder("test_vit", 32)
    qkv = [tokens(count, 0).detach() for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16), quick_attention(encoder):
        assert F.scaled_dot_product_attention(*qkv, **options).shape == qkv[0].shape  # type: ignore[arg-type]


def test_nothing_is_replaced_where_nothing_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_Replaced", lambda: pytest.fail("not for this"))
    with quick_attention(build_encoder("test_resnet", 32)):
        pass
