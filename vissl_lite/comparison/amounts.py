"""Amounts of labels that the encoders of a comparison are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vissl_lite.errors import UserError, check_count
from vissl_lite.transfer.base import DatasetT

DEFAULT_FRACTIONS = (0.01, 0.05, 0.1, 1.0)


class LabelCount(NamedTuple):
    """Numbers of labels that are used for training and for validation.

    ``str`` gives them in words, ``21 training + 21 validation labels``; ``short`` is ``21 + 21``.
    """

    train: int
    val: int

    @property
    def total(self) -> int:
        """Number of labels that must be made by hand."""
        return self.train + self.val

    @property
    def short(self) -> str:
        """The numbers alone."""
        return f"{self.train} + {self.val}" if self.val else str(self.train)

    def __str__(self) -> str:
        if not self.val:
            return f"{self.train:,} labels"
        return f"{self.train:,} training + {self.val:,} validation labels"


@dataclass(frozen=True)
class Amount:
    """Amount of labels: either a fraction of all labels, or a number per class.

    Attributes:
        name: Name, such as ``1%`` or ``10 per class``.
        fraction: Fraction of the training and validation labels.
        shots: Number of training labels per class, and of validation labels per class.
    """

    name: str
    fraction: float | None = None
    shots: int | None = None

    def subsample(self, data: DatasetT, seed: int) -> DatasetT:
        """Draw this amount of labels. With the same seed, larger amounts include smaller ones.

        Args:
            data: Labelled data set of any task.
            seed: Seed of the draw.
        """
        return data.subsample(self.fraction, self.shots, seed)


def make_amounts(fractions: Sequence[float] | None, shots: Sequence[int] | None) -> list[Amount]:
    """Build the requested amounts, smallest first.

    Args:
        fractions: Fractions in (0, 1]; default 0.01, 0.05, 0.1 and 1 if there are no ``shots``.
        shots: Numbers of labels per class, instead of fractions.

    Raises:
        UserError: Both are given, or a value is out of range.
    """
    if fractions and shots:
        raise UserError("give --fractions or --shots, not both")
    if shots:
        check_count("shots", min(shots))
        return [Amount(f"{count} per class", shots=count) for count in sorted(set(shots))]
    chosen = sorted(set(fractions or DEFAULT_FRACTIONS))
    for fraction in chosen:
        if not 0 < fraction <= 1:
            raise UserError(f"--fractions {fraction} must be above 0 and at most 1")
    return [Amount(f"{100 * fraction:g}%", fraction=fraction) for fraction in chosen]
