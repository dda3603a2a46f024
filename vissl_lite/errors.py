"""What a user did wrong, said in one line."""

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: the message says what was given and what would work.

    The command line prints it as one line and exits with status 2; from Python it is raised.
    """


class MachineError(UserError):
    """Something that the machine refused, such as a full disk: what, and how to go on.

    The command line prints it as one line and exits with status 1.
    """


class Terminated(SystemExit):
    """The process was told to stop by a signal; it exits with status 128 + the signal's number.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}"


class WeightsUnavailableError(UserError):
    """Weights that exist, but can't be had here and now, as without a network."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Words for an error about an unknown name: the closest known names, or all if there are few.

    Args:
        name: what was given.
        known: the names that would work.

    Returns:
        A phrase such as ``did you mean resnet18 or resnet18d?``.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if len(known) <= 12:
        return f"there are {', '.join(known)}"
    return f"none of the {len(known)} known names is close to it"


def check_count(name: str, value: int | None) -> None:
    """Raise a UserError for an option that is given and below 1."""
    if value is not None and value < 1:
        raise UserError(f"--{name} {value} must be at least 1")


def check_positive(name: str, value: float | None) -> None:
    """Raise a UserError for an option that is given and not above 0."""
    if value is not None and value <= 0:
        raise UserError(f"--{name} {value} must be above 0")


def check_share(name: str, value: float) -> None:
    """Raise a UserError for an option that is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"--{name} {value} must be in [0, 1]")


def check_seed(value: int) -> None:
    """Raise a UserError for a negative seed."""
    if value < 0:
        raise UserError(f"--seed {value} must not be negative")
