"""What a user did wrong, said in one line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: the message says what was given and what would work.

    The command line prints it as one line and exits with status 2; from Python it is raised.
    """


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
