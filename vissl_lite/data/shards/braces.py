"""Expand names with braces such as ``train-{000000..000099}.tar``, counting them first."""

import re

from vissl_lite.errors import UserError

# Maximum number of shards that a source may expand to
MAX_NAMES = 1_000_000

_DEPTH = 20
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")


def expand(pattern: str) -> list[str]:
    """Expand a name with braces by WebDataset's rules.

    ``::`` separates patterns; ``${NAME}`` is the environment variable ``WDS_NAME``.

    Raises:
        UserError: If the braces are not balanced, they expand to too many names, or a variable is
            not set.
    """
    from webdataset.shardlists import braceexpand, envsubst

    names: list[str] = []
    for part in pattern.split("::"):
        try:
            for _ in range(10):  # Variables may refer to others
                part = envsubst(part)
        except (AssertionError, KeyError):
            raise UserError(
                f"{part} can't be expanded: the environment must set WDS_NAME for each ${{NAME}}"
            ) from None
        count = len(names) + count_names(part)
        if count > MAX_NAMES:
            number = f"{count:,}" if count < 10**15 else "far too many"
            raise UserError(
                f"{part} stands for {number} shards: at most {MAX_NAMES:,} can be given"
            )
        names += braceexpand.braceexpand(part)
    return names


def count_names(pattern: str, depth: int = 0) -> int:
    """Number of names that ``braceexpand`` returns for a pattern.

    Args:
        pattern: Name with braces.
        depth: Nesting depth of the pattern.

    Raises:
        UserError: If the braces are not balanced or are nested too deeply.
    """
    if depth > _DEPTH:
        raise UserError(f"{pattern} has braces more than {_DEPTH} deep")
    count, level, start = 1, 0, 0
    for at, char in _significant(pattern):
        if char == "{":
            start = at + 1 if level == 0 else start
            level += 1
        elif char == "}":
            level -= 1
            if level == 0:
                count *= _count_choices(pattern[start:at], depth + 1)
        if level < 0:
            break
    if level:
        raise UserError(f"{pattern} has braces that are not balanced: each {{ needs its }}")
    return count


def _count_choices(expression: str, depth: int) -> int:
    """Number of names for the content of a pair of braces."""
    numbers, letters = _NUMBERS.fullmatch(expression), _LETTERS.fullmatch(expression)
    if numbers is not None:
        if max(len(part or "") for part in numbers.groups()) > 100:
            return 10**100
        first, last, step = (int(part or 0) for part in numbers.groups())
        return abs(last - first) // (step or 1) + 1
    if letters is not None:
        first, last = (_place(letters[1]), _place(letters[2]))
        return abs(last - first) // (int((letters[3] or "0")[:9]) or 1) + 1
    cuts, level = [-1], 0
    for at, char in _significant(expression):
        level += (char == "{") - (char == "}")
        if char == "," and level == 0:
            cuts.append(at)
    ends = [*cuts[1:], len(expression)]
    return sum(count_names(expression[a + 1 : b], depth) for a, b in zip(cuts, ends, strict=True))


def _place(letter: str) -> int:
    """Position in the alphabet of ``braceexpand``: uppercase, then lowercase letters."""
    return ord(letter) - ord("A") if letter.isupper() else ord(letter) - ord("a") + 26


def _significant(pattern: str) -> list[tuple[int, str]]:
    """Positions of braces and commas that are not escaped by a backslash."""
    found, at = [], 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 2
            continue
        if pattern[at] in "{},":
            found.append((at, pattern[at]))
        at += 1
    return found
