"""Finished runs of a comparison, one file each, from which an interrupted comparison resumes."""

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

MAX_FILE_BYTES = 64 * 2**20  # a file holds one bit, or one number, per test image


@dataclass(frozen=True)
class Cell:
    """One run of the comparison.

    Attributes:
        encoder: Encoder, as given by the user.
        protocol: Protocol by which it is evaluated.
        amount: Name of the amount of labels, such as ``1%``.
        seed: Seed of the draw of labels.
    """

    encoder: str
    protocol: str
    amount: str
    seed: int


class Store:
    """Store the score of each finished cell in a file.

    Args:
        folder: Folder of the files; created when the first score is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        """Path of a cell's file, without suffix; also the folder of its training curves."""
        # The digest separates encoders whose names differ only in characters replaced below.
        digest = hashlib.blake2b(os.fsencode(cell.encoder), digest_size=3).hexdigest()
        encoder = re.sub(r"[^\w.-]+", "-", cell.encoder).strip("-.")[-60:]
        amount = re.sub(r"[^\w.]+", "-", cell.amount).strip("-")
        return self.folder / f"{encoder}-{digest}" / f"{cell.protocol}-{amount}-seed{cell.seed}"

    def _file(self, cell: Cell) -> Path:
        folder = self.path(cell)
        return folder.with_name(f"{folder.name}.json")  # with_suffix would cut 0.5-seed0

    def save(self, cell: Cell, score: Score, inputs: dict[str, Any]) -> None:
        """Save the score of a finished cell.

        Args:
            cell: Finished cell.
            score: Its score.
            inputs: Inputs of the cell, which ``load`` compares.
        """
        file = self._file(cell)
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
            "about": inputs,
        }
        per_image = score.per_image
        if per_image is not None and per_image.dtype == bool:
            content["test_images"] = len(per_image)
            content["right"] = np.packbits(per_image).tobytes().hex()
        elif per_image is not None:
            content["pseudo_values"] = per_image.tolist()
        write_atomically(file, json.dumps(content) + "\n")

    def load(self, cell: Cell, inputs: dict[str, Any]) -> Score | None:
        """Load the score of a cell that was finished earlier with the same inputs.

        Args:
            cell: Cell to look up.
            inputs: Inputs of the cell, such as digests of weights and labels.

        Returns:
            The score; None if it is missing or damaged (a warning is logged), or if the inputs
            have changed.
        """
        file = self._file(cell)
        try:
            content = read_json(file, MAX_FILE_BYTES)
            if content["about"] != inputs or content["arm"] != cell.encoder:
                return None
            per_image = None
            if "right" in content:
                per_image = _unpack_bits(content["right"], content["test_images"])
            elif "pseudo_values" in content:
                per_image = _check_list(content["pseudo_values"])
            metrics = [_check_numbers(content[name]) for name in ("metrics", "chosen", "layers")]
            (value,) = _check_numbers({"value": content["value"]}).values()
        except (UserError, ValueError, LookupError, TypeError) as error:
            if file.exists():
                reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
                log.warning(
                    "damaged, will be run again: %(file)s (%(why)s)",
                    {"file": file, "why": reason},
                    extra={"code": "result.damaged"},
                )
            return None
        return Score(value, metrics[0], metrics[1], per_image, metrics[2])


def _check_numbers(found: Any) -> dict[str, float]:
    """Return a mapping from names to numbers; raise a TypeError for anything else."""
    if not isinstance(found, dict):
        raise TypeError("metrics are missing")
    for value in found.values():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{str(value)[:60]!r} is not a number")
    return found


def _check_list(found: Any) -> np.ndarray:
    """Return numbers as an array; raise a TypeError or ValueError for anything else."""
    if not isinstance(found, list) or any(type(value) not in (int, float) for value in found):
        raise TypeError("pseudo_values are no list of numbers")
    try:
        values = np.array(found, np.float64)
    except OverflowError:
        values = np.array([np.inf])
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("pseudo_values are not finite numbers")
    return values


def _unpack_bits(text: Any, count: Any) -> np.ndarray:
    """Decode ``(count,)`` bool from hexadecimal text; a ValueError or TypeError if invalid."""
    bits = np.frombuffer(bytes.fromhex(text), np.uint8)
    if type(count) is not int or not 0 < count <= 8 * len(bits) < count + 8:
        raise ValueError(f"{len(bits)} bytes for {str(count)[:60]!r} test images")
    return np.unpackbits(bits, count=count).astype(bool)


def digest_weights(model: nn.Module) -> str:
    """Short digest of all parameters and buffers of a model, to detect changes."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_names(names: Sequence[str]) -> str:
    """Short digest of an ordered list of names, to detect changes of a data set."""
    return hashlib.blake2b(os.fsencode("\n".join(names)), digest_size=8).hexdigest()
