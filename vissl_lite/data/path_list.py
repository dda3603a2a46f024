"""A list of many paths in little memory, shared by processes."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from operator import index as as_index
from typing import overload

import numpy as np
import torch

# Paths that iterating unpacks at a time.
_STRETCH = 4096


class PathList(Sequence[str]):
    """A sequence of paths that is held as two tensors.

    A list of a million paths is a million objects. Each has a count of references that changes when
    it is looked up, so that after a while every forked data worker has copies of nearly all the
    memory that they lie in (PyTorch issue 13246). Here a look-up changes nothing but the string
    that it returns; and tensors that go to a worker which is started anew are put into shared
    memory by PyTorch.

    Any text comes back as it went in, the names that are not UTF-8 included, for which Python has
    lone surrogates (PEP 383).

    Args:
        paths: Read once; it may be a generator.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        text, ends = bytearray(), array("q", [0])
        for path in paths:
            text += path.encode("utf-8", "surrogatepass")
            ends.append(len(text))
        # copies: a growing array has more room than it needs
        self._text = torch.from_numpy(np.array(text, np.uint8))
        self._ends = torch.from_numpy(np.array(ends, np.int64))

    @classmethod
    def of(cls, paths: Iterable[str]) -> "PathList":
        """Pack paths, unless they are packed already."""
        return paths if isinstance(paths, PathList) else cls(paths)

    @property
    def nbytes(self) -> int:
        """Memory of the paths in bytes: their text and eight bytes each."""
        return self._text.nbytes + self._ends.nbytes

    def __len__(self) -> int:
        return self._ends.shape[0] - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = as_index(index)  # NumPy's integers, too
        count = len(self)
        if not -count <= at < count:
            raise IndexError(f"path {at} of {count}")
        at %= count
        # no view is kept: a tensor's memory moves when PyTorch shares it
        text, ends = self._text.numpy(), self._ends.numpy()
        return text[ends[at] : ends[at + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _STRETCH):
            ends = self._ends[first : first + _STRETCH + 1].tolist()
            text = self._text.numpy()[ends[0] : ends[-1]].tobytes()
            for begin, end in pairwise(ends):
                piece = text[begin - ends[0] : end - ends[0]]
                yield piece.decode("utf-8", "surrogatepass")

    def digest(self) -> str:
        """A digest of all paths in their order, 32 hexadecimal digits."""
        digest = blake2b(self._ends.numpy().tobytes(), digest_size=16)
        digest.update(self._text.numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"PathList of {len(self)} paths"
