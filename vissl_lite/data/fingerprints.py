"""Fingerprints that recognize an image after re-encoding, resizing, flips and quarter turns.

A fingerprint has two halves. The exact one is a hash of the file's bytes. The look is a description
of the picture by its lowest frequencies (the discrete cosine transform of perceptual hashes such as
Zauner 2010, section 3.2.1, here with its numbers and not their signs alone), so that looks can be
compared by cosine. A flip changes the signs of some frequencies and a turn their order: one look
of a picture stands for all eight positions.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.data.images import BROKEN_IMAGE, decode_image, read_content
from vissl_lite.data.npz_file import read_npz
from vissl_lite.data.reading import Broken, reason, report_skipped
from vissl_lite.errors import UserError

EXACT_BYTES = 16

# The side that pictures are shrunk to: what is left of an image of 32 pixels at half its size.
_SIDE = 16

# Frequencies (u, v) with u + v below these, of brightness and of each of two color differences.
# JPEG at quality 50 leaves few of the higher ones of an image of 32 pixels.
_BRIGHTNESS, _COLOR = 12, 3

# Looks at least as similar as this are taken for the same picture. Encoding at quality 50 and
# resizing by 1.5 or 0.5 leave 0.98 and more on CIFAR-10. Of its 10,000 test images against 50,000
# training images in all positions 136 are above 0.94; of the 78 least similar pairs one is clearly
# of two pictures, the others are the near-duplicates that the data set is known for (Barz & Denzler
# 2020, ciFAIR).
MIN_SIMILARITY = 0.94

# Below this contrast (of a gray picture, a standard deviation of about 2 of 256 steps) a look
# fades, so that pictures of one color resemble nothing.
_FAINT = 0.2

_FULL = 127  # length of a look of 8-bit integers


def _frequencies() -> np.ndarray:
    """``(D, 3)`` channel, u and v of each coefficient."""
    limits = (_BRIGHTNESS, _COLOR, _COLOR)
    return np.array(
        [
            (channel, u, v)
            for channel, limit in enumerate(limits)
            for u in range(limit)
            for v in range(limit - u)
            if u or v  # brightness and color of the whole: too much alike in too many pictures
        ]
    )


def _projection() -> np.ndarray:
    """``(16 * 16 * 3, D)`` projection from the pixels of a thumbnail to its coefficients.

    In natural images the amplitude of a frequency f falls as 1 / f (Field 1987): multiplied by f,
    all numbers of a look count alike. Color differences are about half as large.
    """
    steps = np.arange(_SIDE)
    waves = np.sqrt(2 / _SIDE) * np.cos(np.pi * (2 * steps + 1) * steps[:, None] / (2 * _SIDE))
    waves[0] /= np.sqrt(2)
    gray = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as JPEG has it
    channels = np.stack([gray, 2 * ([0, 0, 1] - gray), 2 * ([1, 0, 0] - gray)])
    columns = [
        np.hypot(u, v) * waves[u][:, None, None] * waves[v][:, None] * channels[channel]
        for channel, u, v in FREQUENCIES
    ]
    return (np.stack([column.ravel() for column in columns], axis=1) / 255).astype(np.float32)


FREQUENCIES = _frequencies()
LOOK_BYTES = len(FREQUENCIES)
_PROJECTION = _projection()

# ``(D, 4)`` signs: as it is, flipped from left to right, from top to bottom, and both.
_FLIPS = np.stack(
    [
        (-1.0) ** (down * FREQUENCIES[:, 1] + side * FREQUENCIES[:, 2])
        for down in (0, 1)
        for side in (0, 1)
    ],
    axis=1,
).astype(np.float32)

# The order of a look whose picture is transposed; with the flips, that makes all quarter turns.
_TRANSPOSED = np.array([FREQUENCIES.tolist().index([c, v, u]) for c, u, v in FREQUENCIES])


def fingerprint(data: bytes, image: np.ndarray) -> np.ndarray:
    """The fingerprint of an image file.

    Args:
        data: The file's bytes.
        image: ``(H, W, 3)`` uint8, decoded from them, be it at a reduced size.

    Returns:
        ``(16 + D,)`` uint8: the hash, then the look as bytes.
    """
    exact = np.frombuffer(blake2b(data, digest_size=EXACT_BYTES).digest(), np.uint8)
    small = cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    look = small.reshape(-1).astype(np.float32) @ _PROJECTION
    look *= _FULL / max(float(np.sqrt(look @ look)), _FAINT)
    return np.concatenate([exact, np.rint(look).astype(np.int8).view(np.uint8)])


@dataclass(frozen=True)
class Fingerprints:
    """The fingerprints of many image files.

    Attributes:
        exact: ``(N, 16)`` uint8, hashes of the files' bytes.
        looks: ``(N, D)`` int8, see the module.
        paths: N files.
    """

    exact: np.ndarray
    looks: np.ndarray
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def of(cls, records: np.ndarray, paths: Sequence[str]) -> "Fingerprints":
        """Build from the results of ``fingerprint``.

        Args:
            records: ``(N, 16 + D)`` uint8; may be empty.
            paths: N files.
        """
        looks = np.ascontiguousarray(records[:, EXACT_BYTES:]).view(np.int8)
        return cls(np.ascontiguousarray(records[:, :EXACT_BYTES]), looks, list(paths))

    def take(self, indices: np.ndarray) -> "Fingerprints":
        """The fingerprints of some of the files."""
        return Fingerprints(
            self.exact[indices], self.looks[indices], [self.paths[int(i)] for i in indices]
        )

    def join(self, others: "Fingerprints") -> "Fingerprints":
        """Add other fingerprints, except of files with equal bytes."""
        known = {row.tobytes() for row in self.exact}
        new = [i for i, row in enumerate(others.exact) if row.tobytes() not in known]
        return self.append(others.take(np.array(new, np.int64)))

    def append(self, others: "Fingerprints") -> "Fingerprints":
        """Add all other fingerprints."""
        return Fingerprints(
            np.concatenate([self.exact, others.exact]),
            np.concatenate([self.looks, others.looks]),
            [*self.paths, *others.paths],
        )

    def save(self, file: Path) -> None:
        """Write an ``.npz`` file atomically."""
        # one text: an array of text takes the longest path's room for each
        paths = "\0".join(self.paths).encode("utf-8", "surrogateescape")
        text = np.frombuffer(paths, np.uint8)
        with atomic_write(file) as part, part.open("wb") as out:
            np.savez(out, exact=self.exact, looks=self.looks, paths=text)

    @classmethod
    def load(cls, file: Path) -> "Fingerprints":
        """Read a file written by ``save``; nothing is unpickled.

        Raises:
            UserError: The file is damaged.
        """
        content = read_npz(file)
        try:
            exact, looks = content["exact"], content["looks"]
            text = content["paths"].tobytes().decode("utf-8", "surrogateescape")
        except KeyError as error:
            raise UserError(f"{file} is damaged: {error} is missing") from None
        paths = text.split("\0") if text else []
        if (
            exact.dtype != np.uint8
            or looks.dtype != np.int8
            or exact.shape != (len(paths), EXACT_BYTES)
            or looks.shape != (len(paths), LOOK_BYTES)
        ):
            raise UserError(f"{file} is damaged: it holds no fingerprints of {len(paths)} images")
        return cls(exact, looks, paths)


def fingerprints_of(
    paths: Sequence[str], progress: Callable[[int], None] | None = None
) -> Fingerprints:
    """Fingerprints of image files; unreadable files are left out and logged.

    Args:
        paths: Image files.
        progress: Called with the number of images done since the last call.
    """
    found, broken = read_fingerprints(paths, progress)
    report_skipped(broken)
    return found


def read_fingerprints(
    paths: Sequence[str], progress: Callable[[int], None] | None = None
) -> tuple[Fingerprints, list[Broken]]:
    """Like ``fingerprints_of``, but return the unreadable files instead of logging them."""
    records: list[np.ndarray] = []
    readable: list[str] = []
    broken: list[Broken] = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for path, record in zip(paths, threads.map(_fingerprint_of, paths), strict=True):
            if isinstance(record, str):
                broken.append(Broken(path, record))
            else:
                records.append(record)
                readable.append(path)
            if progress is not None:
                progress(1)
    empty = np.empty((0, EXACT_BYTES + LOOK_BYTES), np.uint8)
    return Fingerprints.of(np.stack(records) if records else empty, readable), broken


def _fingerprint_of(path: str) -> np.ndarray | str:
    """The fingerprint of a file, or the reason why it cannot be read."""
    try:
        data = read_content(path)
        return fingerprint(data, decode_image(data, path, 2 * _SIDE))
    except BROKEN_IMAGE as error:
        return reason(error, path)


class Match(NamedTuple):
    """An image and its duplicate.

    Attributes:
        path: The query file.
        twin: The file that it was found to be.
        kind: A copy of the file, or the same picture to all appearance.
        similarity: Cosine of the looks; 1 for a copy.
    """

    path: str
    twin: str
    kind: Literal["exact", "similar"]
    similarity: float


def find_matches(queries: Fingerprints, bank: Fingerprints) -> list[Match]:
    """Find the query images in a bank, also if they are flipped or turned by quarters.

    Args:
        queries: Images to look for.
        bank: Images to look among.

    Returns:
        At most one match for each query, the best: an exact one before a similar one.
    """
    copies = {row.tobytes(): index for index, row in enumerate(bank.exact)}
    twins = [copies.get(row.tobytes()) for row in queries.exact]
    others = np.array([i for i, twin in enumerate(twins) if twin is None], np.int64)
    similarity, nearest = _nearest(queries.looks[others], bank.looks)
    similar = dict(zip(others.tolist(), zip(similarity, nearest, strict=True), strict=True))
    matches = []
    for index, (path, twin) in enumerate(zip(queries.paths, twins, strict=True)):
        if twin is not None:
            matches.append(Match(path, bank.paths[twin], "exact", 1.0))
        elif similar[index][0] >= MIN_SIMILARITY:
            value, at = similar[index]
            matches.append(Match(path, bank.paths[at], "similar", round(min(1.0, value), 4)))
    return matches


def similar_to(prints: Fingerprints, index: int) -> np.ndarray:
    """All images that show the same picture as one of them, also flipped or turned by quarters.

    Args:
        prints: Images.
        index: One of them.

    Returns:
        ``(M,)`` indices, that of the image itself included.
    """
    look = prints.looks[index].astype(np.float32)
    positions = np.concatenate([_FLIPS * one[:, None] for one in (look, look[_TRANSPOSED])], axis=1)
    best = np.concatenate(
        [
            (prints.looks[start : start + 8192].astype(np.float32) @ positions).max(axis=1)
            for start in range(0, len(prints), 8192)
        ]
    )
    copies = (prints.exact == prints.exact[index]).all(axis=1)
    return np.flatnonzero(copies | (best >= MIN_SIMILARITY * _FULL**2))


def repeats(prints: Fingerprints) -> set[str]:
    """Files that show the same picture as one before them, also flipped or turned by quarters.

    Args:
        prints: Images. The first one of a picture is not a repeat.
    """
    first, found = prints.take(np.empty(0, np.int64)), set[str]()
    for start in range(0, len(prints), 256):
        block = prints.take(np.arange(start, min(start + 256, len(prints))))
        known = {match.path for match in find_matches(block, first)}
        new = np.array([path not in known for path in block.paths])
        for index in range(len(block)):
            if new[index]:
                same = similar_to(block, index)
                new[same[same > index]] = False
        found |= {path for path, kept in zip(block.paths, new, strict=True) if not kept}
        first = first.append(block.take(np.flatnonzero(new)))
    return found


def _nearest(queries: np.ndarray, bank: np.ndarray) -> tuple[list[float], list[int]]:
    """The most similar image in any orientation, if its similarity is at least ``MIN_SIMILARITY``.

    With all signs taken off, the product of two looks is an upper bound for all four flips. It is
    too small for nearly all pairs, which saves three products of four.

    Args:
        queries: ``(N, D)`` int8.
        bank: ``(M, D)`` int8.

    Returns:
        N similarities, 0 where there is none, and N indices into the bank.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flips = torch.from_numpy(_FLIPS).to(device)
    looks = torch.from_numpy(queries).to(device).float()
    best = torch.zeros(len(queries), device=device)
    nearest = torch.zeros(len(queries), dtype=torch.long, device=device)
    for start in range(0, len(bank), 8192):
        keys = torch.from_numpy(bank[start : start + 8192]).to(device).float()
        bare = keys.abs().T.contiguous()
        for first in range(0, len(looks), 256):
            some = looks[first : first + 256]
            for position in (some, some[:, _TRANSPOSED]):
                possible = position.abs() @ bare >= MIN_SIMILARITY * _FULL**2
                for pairs in possible.nonzero().split(65536):
                    _keep_best(position, keys, flips, pairs, best[first:], nearest[first:], start)
    return best.tolist(), nearest.tolist()


def _keep_best(
    looks: Tensor,
    keys: Tensor,
    flips: Tensor,
    pairs: Tensor,
    best: Tensor,
    nearest: Tensor,
    start: int,
) -> None:
    """Compare pairs exactly and update ``best`` and ``nearest``."""
    one, other = pairs.unbind(dim=1)
    values = ((looks[one] * keys[other]) @ flips).amax(dim=1) / _FULL**2
    better = (values >= MIN_SIMILARITY) & (values > best[one])
    one, other, values = one[better], other[better], values[better]
    best.scatter_reduce_(0, one, values, "amax")
    winners = values == best[one]
    nearest[one[winners]] = start + other[winners]
