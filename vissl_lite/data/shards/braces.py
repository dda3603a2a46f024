"""Names with braces, as ``train-{000000..000099}.tar``: how many they are, before they are made."""

import re

from vissl_lite.errors import UserError

# Shards that one name may stand for.
MOST = 1_000_000

_DEPTH = 20
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")


def expand(pattern: str) -> list[str]:
    """The names that one with braces stands for, by WebDataset's rules.

    Several patterns are joined by ``::``; ``${NAME}`` is the environment's variable ``WDS_NAME``.

    Raises:
        UserError: The braces are not balanced, they stand for too many names, or a variable is not
            set.
    """
    from webdataset.shardlists import braceexpand, envsubst

    names: list[str] = []
    for part in pattern.split("::"):
        try:
            for _ in range(10):  # a variable may name another
                part = envsubst(part)
        except (AssertionError, KeyError):
            raise UserError(
                f"{part} can't be expanded: the environment must set WDS_NAME for each ${{NAME}}"
            ) from None
        count = len(names) + count_names(part)
        if count > MOST:
            number = f"{count:,}" if count < 10**15 else "far too many"
            raise UserError(f"{part} stands for {number} shards: at most {MOST:,} can be given")
        names += braceexpand.braceexpand(part)
    return names


def count_names(pattern: str, depth: int = 0) -> int:
    """How many names ``braceexpand`` makes of a pattern.

    Args:
        pattern: Pattern with braces.
        depth: Depth of the braces around it.

    Raises:
        UserError: The braces are not balanced, or too many are inside one another.
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
    """How many names the inside of braces makes."""
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
    """In the alphabet of ``braceexpand``, where small letters follow the capital ones."""
    return ord(letter) - ord("A") if letter.isupper() else ord(letter) - ord("a") + 26


def _significant(pattern: str) -> list[tuple[int, str]]:
    """Braces and commas with their places; a backslash takes the meaning from what follows."""
    found, at = [], 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 2
            continue
        if pattern[at] in "{},":
            found.append((at, pattern[at]))
        at += 1
    return found
