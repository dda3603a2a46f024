"""Environment variables that other libraries read when they are imported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def default_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within a block, unless it is set already."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
