"""How many labels the encoders of a comparison get."""

from collections.abc import Sequence
from dataclasses import dataclass

from vissl_lite.errors import UserError, check_count
from vissl_lite.transfer.base import DatasetT

FRACTIONS = (0.01, 0.05, 0.1, 1.0)


@dataclass(frozen=True)
class Amount:
    """An amount of labels, as a share of all or as a number per class.

    Attributes:
        name: such as ``1%`` or ``10 per class``.
        fraction: share of the training and validation labels, or
        shots: training labels per class, and as many validation labels.
    """

    name: str
    fraction: float | None = None
    shots: int | None = None

    def of(self, data: DatasetT, seed: int) -> DatasetT:
        """So many of a data set's labels; smaller amounts of one seed are parts of larger ones.

        Args:
            data: a labelled data set of any task.
            seed: which ones.
        """
        return data.subsample(self.fraction, self.shots, seed)


def make_amounts(fractions: Sequence[float] | None, shots: Sequence[int] | None) -> list[Amount]:
    """The amounts that were asked for, smallest first.

    Args:
        fractions: shares in (0, 1]; default 1, 5, 10 and 100 % if there are no shots.
        shots: labels per class, instead.

    Raises:
        UserError: both are given, or one is out of range.
    """
    if fractions and shots:
        raise UserError("give --fractions or --shots, not both")
    if shots:
        check_count("shots", min(shots))
        return [Amount(f"{count} per class", shots=count) for count in sorted(set(shots))]
    shares = sorted(set(fractions or FRACTIONS))
    for share in shares:
        if not 0 < share <= 1:
            raise UserError(f"--fractions {share} is not a share: it must be above 0 and at most 1")
    return [Amount(f"{100 * share:g}%", fraction=share) for share in shares]
