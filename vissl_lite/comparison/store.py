"""The runs of a comparison on the disk, one file each: an interrupted one goes on from them."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vissl_lite.comparison.protocols import Score
from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.json_file import read_json
from vissl_lite.encoders.encoder import first_line
from vissl_lite.errors import UserError

log = logging.getLogger(__name__)

LARGEST = 64 * 2**20  # bytes of a file; a bit for each test image


@dataclass(frozen=True)
class Cell:
    """One run of the comparison.

    Attributes:
        encoder: the encoder, as it was given.
        protocol: how it is judged.
        amount: of labels, by name, such as ``1%``.
        seed: which labels these are.
    """

    encoder: str
    protocol: str
    amount: str
    seed: int


class Store:
    """Keeps the score of each finished cell.

    Args:
        folder: made when the first is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, cell: Cell) -> Path:
        """The cell's file, without suffix: also where the curves of its trainings are."""
        # two encoders may differ in what a file name can't hold
        digest = hashlib.blake2b(os.fsencode(cell.encoder), digest_size=3).hexdigest()
        encoder = re.sub(r"[^\w.-]+", "-", cell.encoder).strip("-.")[-60:]
        amount = re.sub(r"[^\w.]+", "-", cell.amount).strip("-")
        return self.folder / f"{encoder}-{digest}" / f"{cell.protocol}-{amount}-seed{cell.seed}"

    def keep(self, cell: Cell, score: Score, about: dict[str, Any]) -> None:
        """Write a finished cell.

        Args:
            cell: which.
            score: what it gave.
            about: what must be the same for it to count: see ``load``.
        """
        file = self.place(cell).with_suffix(".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "arm": cell.encoder,
            "protocol": cell.protocol,
            "amount": cell.amount,
            "seed": cell.seed,
            "value": score.value,
            "metrics": score.metrics,
            "chosen": score.chosen,
            "layers": score.layers,
            "about": about,
        }
        if score.right is not None:
            content["test_images"] = len(score.right)
            content["right"] = np.packbits(score.right).tobytes().hex()
        write_atomically(file, json.dumps(content) + "\n")

    def load(self, cell: Cell, about: dict[str, Any]) -> Score | None:
        """The score of a cell that was finished earlier, with the same weights and labels.

        Args:
            cell: which.
            about: from ``about_run``.

        Returns:
            None if it is missing or damaged (which is said), or if the encoder or the data have
            changed since.
        """
        file = self.place(cell).with_suffix(".json")
        try:
            content = read_json(file, LARGEST)
            if content["about"] != about or content["arm"] != cell.encoder:
                return None
            right = None
            if "right" in content:
                right = _unpacked(content["right"], content["test_images"])
            figures = [_figures(content[name]) for name in ("metrics", "chosen", "layers")]
            (value,) = _figures({"value": content["value"]}).values()
        except (UserError, ValueError, LookupError, TypeError) as error:
            if file.exists():
                reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
                log.warning(
                    "damaged, and so done again: %(file)s (%(why)s)",
                    {"file": file, "why": reason},
                    extra={"code": "result.damaged"},
                )
            return None
        return Score(value, figures[0], figures[1], right, figures[2])


def _figures(found: Any) -> dict[str, float]:
    """Numbers by name; a TypeError for anything else."""
    if not isinstance(found, dict):
        raise TypeError("figures are missing")
    for value in found.values():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{str(value)[:60]!r} is no number")
    return found


def _unpacked(text: Any, count: Any) -> np.ndarray:
    """``(count,)`` bool from the hexadecimal digits of their bits; or a ValueError, TypeError."""
    bits = np.frombuffer(bytes.fromhex(text), np.uint8)
    if type(count) is not int or not 0 < count <= 8 * len(bits) < count + 8:
        raise ValueError(f"{len(bits)} bytes for {str(count)[:60]!r} test images")
    return np.unpackbits(bits, count=count).astype(bool)


def digest_weights(model: nn.Module) -> str:
    """A short digest of all parameters and buffers: whether an encoder is still the same."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_words(words: Sequence[str]) -> str:
    """A short digest of names in their order: whether the images of a part are still the same."""
    return hashlib.blake2b(os.fsencode("\n".join(words)), digest_size=8).hexdigest()
