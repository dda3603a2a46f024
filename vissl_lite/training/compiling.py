"""Training of encoders through ``torch.compile``."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError


def check_compiler() -> None:
    """Raise a UserError if there is no compiler: Triton for a GPU, C++ for a CPU."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise UserError("--compile needs Triton on a GPU: pip install triton, or leave it out")
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"--compile needs a C++ compiler, and there is no {compiler}: install one (on Debian "
            f"and Ubuntu: apt install g++), name it in CXX, or leave --compile out"
        )


@contextmanager
def compiled(module: nn.Module) -> Iterator[None]:
    """Compile the encoders in a module, including teachers, for training mode.

    Of a transformer each block is compiled for itself, which is quicker than the whole, as they
    are alike, and also serves pretexts that give it some patches only. Of other backbones it is
    all that comes before the pooling. Names of weights stay as they are. In evaluation mode nothing
    is compiled: there are few passes, at other sizes.

    Args:
        module: Such as a pretext task.
    """
    owners: list[tuple[nn.Module, str]] = []
    for encoder in [one for one in module.modules() if isinstance(one, Encoder)]:
        blocks = getattr(encoder.model, "blocks", None)
        if encoder.patch_size is not None and blocks is not None:
            owners += [(block, "forward") for block in blocks]
        else:
            owners.append((encoder.model, "forward_features"))
    try:
        for owner, name in owners:
            setattr(owner, name, _compiled_in_training(owner, getattr(owner, name)))
        # A program for each size of views and number of patches: more than the default of 8.
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
    finally:
        for owner, name in owners:
            owner.__dict__.pop(name, None)


def _compiled_in_training(owner: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    # a view's size is one of few: a program for each, none for all of them
    fast = torch.compile(plain, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return fast(*args, **kwargs) if owner.training else plain(*args, **kwargs)

    return forward
