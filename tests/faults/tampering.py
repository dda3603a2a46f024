"""Damage for files: values of wrong kinds at every place, bytes flipped and cut off."""

import copy
import json
import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vissl_lite.errors import UserError

# What is put in every place: all types, and numbers that are too large, negative or none at all.
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 7, 10**6, 10**9, 10**18, 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf, "",
    "text", "../../x", "\u202e\n\r\x00", [], {}, [[]], [None], [math.nan] * 3, [0.0] * 3,
    [1e-30] * 3, [10**6] * 3, ["x"] * 3, [[1, 2], [3]], {"a": {"b": [1]}},
)  # fmt: skip

# Whole files of JSON or YAML.
TEXTS: tuple[bytes, ...] = (
    b"", b"\x00", b"\xff\xfe\xff", b"null", b"3", b'"text"', b"[]", b"{}", b"[{}]", b"NaN", b"{",
    b"[" * 100_000, b'{"a":' * 100_000, b"1" * 400, b"1" * 5000, b'{"a": 1, "a": 2}',
    b'{"a": "\\ud800"}', "{}".encode("utf-16"), b"\x89PNG\r\n\x1a\n", b"a: &a [*a, *a]",
    b"- " * 50_000, b"{" * 50_000,
)  # fmt: skip

# A value may take so much time of the processor in seconds, and so much memory in bytes.
SECONDS, MEMORY = 5.0, 2**30


def places(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value of nested mappings and lists, the first 12 of each."""
    inside: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        inside = list(content.items())
    elif isinstance(content, list):
        inside = list(enumerate(content))
    for key, value in inside[:12]:
        yield (*above, key)
        yield from places(value, (*above, key))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place; the ``DELETED`` one is left out."""
    found = copy.deepcopy(content)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    if value is DELETED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return found


DELETED = object()


def tampered(content: Any) -> Iterator[tuple[str, Any]]:
    """Copies of nested content, each changed at one place: what was done, and the copy."""
    for place in places(content):
        yield f"{place} deleted", changed(content, place, DELETED)
        for value in VALUES:
            yield f"{place} {value!r:.40}", changed(content, place, value)


def damaged(content: bytes, seed: int = 0, flips: int = 24) -> Iterator[tuple[str, bytes]]:
    """Copies of a file, each cut off or with some bytes changed."""
    size, rng = len(content), np.random.default_rng(seed)
    cuts = {0, 1, 4, 7, 8, 9, size // 3, size // 2, size - 100, size - 22, size - 1}
    for length in sorted(cut for cut in cuts if 0 <= cut < size):
        yield f"cut to {length}", content[:length]
    for number in range(flips):
        # half of them in the first kilobyte, where headers are, and some at the end
        most = (min(size, 1024), size)[number % 2]
        at = size - 1 - int(rng.integers(min(size, 512))) if number % 6 == 5 else None
        at = int(rng.integers(most)) if at is None else at
        found = bytearray(content)
        found[at] ^= int(rng.integers(1, 256))
        yield f"byte {at} flipped", bytes(found)
    yield "zeros", bytes(size)
    yield "more behind it", content + bytes(100)
    yield "twice", content + content


class Tried:
    """Tries loading again and again; what comes out has to be a UserError of one line, or fine.

    Args:
        load: loads, and uses what was loaded.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load
        self.counts: Counter[str] = Counter()

    def __call__(self, what: str) -> bool:
        """Whether it was loaded.

        Args:
            what: the damage, to be named where it does harm.
        """
        outcome, message = "loaded", ""
        started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            self.load()
        except UserError as error:
            outcome, message = "refused", str(error)
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        assert len(message.splitlines()) == (outcome == "refused"), f"{what}: {message}"
        assert len(message) < 1000, what
        spent = time.process_time() - started
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
        assert spent < SECONDS, f"{what} took {spent:.1f} seconds"
        assert grown < MEMORY, f"{what} took {grown} bytes"
        self.counts[outcome] += 1
        return outcome == "loaded"

    def sweep_json(self, file: Path, stride: int = 1) -> None:
        """Try a JSON file with every damage, or every so many, and put it back."""
        whole = file.read_bytes()
        for what, content in islice(tampered(json.loads(whole)), 0, None, stride):
            file.write_text(json.dumps(content))
            self(f"{file.name}: {what}")
        for text in TEXTS:
            file.write_bytes(text)
            assert not self(f"{file.name}: {text[:40]!r}"), text[:40]
        file.write_bytes(whole)
        assert self("as it was")

    def sweep_bytes(self, file: Path, flips: int = 24) -> None:
        """Try a file cut off and with changed bytes, and put it back."""
        whole = file.read_bytes()
        for what, content in damaged(whole, flips=flips):
            file.write_bytes(content)
            self(f"{file.name}: {what}")
        file.write_bytes(whole)
        assert self("as it was")
