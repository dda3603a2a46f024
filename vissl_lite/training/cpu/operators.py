"""Replacement of operations of torch that are slow on a CPU in bf16."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from vissl_lite.training.cpu.attention import attention
from vissl_lite.training.cpu.convolution import convolution

# What networks call, and what takes its place: it gives None where torch's own is as fast.
_FASTER: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention,
    torch.conv2d: convolution,
}


@contextmanager
def fast_cpu_operators() -> Iterator[None]:
    """Use faster attention and convolutions for networks in bf16 on a CPU.

    Under autocast alone, which is how they train and are judged: in float32 torch's own are as
    fast.
    """
    if torch.cuda.is_available():
        yield
        return
    with _FastOperators():
        yield


class _FastOperators(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        faster = _FASTER.get(func)
        if (
            faster is not None
            and args  # else all is given by name, which no network does
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and args[0].device.type == "cpu"
        ):
            result = faster(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)
