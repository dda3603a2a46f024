"""What a user did wrong, said in one line; and checks of options that several commands share."""

import difflib
import inspect
import math
import os
import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Bounds that leave room for anything useful and keep slips such as 1e9 out.
LARGEST_IMAGE = 4096  # side in pixels
LARGEST_SEED = 2**32 - 1  # what scikit-learn and UMAP take
LARGEST_LAYER = 2**15  # features
LARGEST_QUEUE = 2**20  # embeddings, or prototypes
LARGEST_DEPTH = 64  # layers, and crops of an image
LARGEST_NUMBER = 10**6  # of a hyperparameter

# Types of options that take several values, and values by name.
LISTS, MAPPINGS = (list, Sequence), (dict, Mapping)

# What Linux and macOS allow for a name in a path and, less the end of the string, for all of it.
_NAME_BYTES, _PATH_BYTES = 255, 4095


def one_line(text: object) -> str:
    """Text as one line: what it spreads over several is joined, control characters are escaped."""
    joined = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", str(text)).strip()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda sign: f"\\x{ord(sign[0]):02x}", joined)


def brief(value: object) -> str:
    """A value for a message: in one line, and with the middle left out where it is very long."""
    try:
        text = one_line(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else "a value"
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-40:]} ({len(text)} characters)"


class UserError(Exception):
    """A mistake that the user can mend: the message says what was given and what would work.

    The command line prints it as one line and exits with status 2; from Python it is raised. As
    text it is always one line.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


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
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6) if len(name) < 1000 else []
    if close:
        return f"did you mean {' or '.join(close)}?"
    if len(known) <= 12:
        return f"there are {', '.join(known)}"
    return f"none of the {len(known)} known names is close to it"


def check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], prefix: str = ""
) -> None:
    """Check the arguments of a command or a pretext by what the signature says of them.

    Each must be of its annotated type, so that null is for options that may be None alone; numbers
    must be finite and fit into 64 bits, text and lists must not be empty, and text must be able to
    name a file. A new option is covered by being one.

    Args:
        function: has annotated parameters. For a class, it is ``__init__``.
        arguments: by name; those that are no parameters are left alone.
        prefix: of the names in messages, after the ``--``.

    Raises:
        UserError: an argument can't be right, whatever it means.
    """
    for name, kind in annotations(function).items():
        if name in arguments:
            check_argument(prefix + name, arguments[name], kind)


def annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's parameters, or of those of a class's ``__init__``, by name."""
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    return {name: kind for name, kind in hints.items() if name != "return"}


def check_argument(name: str, value: object, kind: Any) -> None:
    """Check one argument; see ``check_arguments``.

    Args:
        name: in messages, after the ``--``.
        value: what was given.
        kind: the type that the parameter is annotated with.
    """
    if not _matches(value, kind):
        raise UserError(f"--{name} {brief(value)} is {_no_match(kind)}")
    _check_sane(f"--{name}", value)


def kinds_of(kind: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: the members of a union, else itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def takes_any(kind: Any, origins: Sequence[Any]) -> bool:
    """Whether an annotation allows a value of one of some generic types, such as ``LISTS``."""
    return any(get_origin(one) in origins for one in kinds_of(kind))


def _is_path(kind: Any) -> bool:
    return kind is Path or get_origin(kind) is os.PathLike


def _matches(value: object, kind: Any) -> bool:
    """Whether a value is of an annotated type; of a type that no option has, always."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_matches(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in LISTS:
        return isinstance(value, list | tuple) and all(_matches(one, parts[0]) for one in value)
    if origin is tuple:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(parts)
            and all(map(_matches, value, parts))
        )
    if origin in MAPPINGS:
        # a name may look like a number, and YAML then reads one
        return isinstance(value, Mapping) and all(
            isinstance(key, str | int | float) and _matches(one, parts[1])
            for key, one in value.items()
        )
    if kind in (int, float):  # NumPy's numbers count; True and False do not
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind is str or _is_path(kind):
        return isinstance(value, str | os.PathLike)
    return isinstance(value, kind) if kind in (bool, NoneType) else True


def _no_match(kind: Any) -> str:
    """Words for what a value is not: ``none of warn, stop``, ``not of the type int or str``."""
    # a path is text, and one value may stand for a list of one
    parts = [part for part in kinds_of(kind) if part is not NoneType and not _is_path(part)]
    inner = [get_args(part)[0] if get_origin(part) in LISTS else part for part in parts]
    if len(set(inner)) == 1 and get_origin(inner[0]) is Literal:  # one of them, or several
        parts = inner[:1]
    choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    if choices and len(parts) == 1:
        return f"none of {', '.join(map(str, choices))}"
    return f"not of the type {' or '.join(map(_type_name, parts))}"


def _type_name(kind: Any) -> str:
    """A type in words, as ``list[str]``."""
    if get_origin(kind) in LISTS:
        inner = [_type_name(part) for part in kinds_of(get_args(kind)[0]) if not _is_path(part)]
        return f"list[{' or '.join(inner)}]"
    return str(kind) if get_origin(kind) is not None else kind.__name__


def _check_sane(name: str, value: object) -> None:
    if isinstance(value, list | tuple | Mapping):
        if not value:
            raise UserError(f"{name} must not be empty: give a value, or leave it out")
        for one in [*value, *(value.values() if isinstance(value, Mapping) else ())]:
            _check_sane(name, one)
    elif isinstance(value, str | os.PathLike):
        _check_text(name, os.fspath(value))
    elif isinstance(value, Integral):
        if abs(int(value)) >= 2**63:
            raise UserError(f"{name} {brief(value)} is too large a number")
    elif isinstance(value, Real) and not math.isfinite(value):
        raise UserError(f"{name} {value} must be a finite number")


def _check_text(name: str, text: str) -> None:
    if not text.strip():
        raise UserError(f"{name} must not be empty: give a value, or leave it out")
    if "\0" in text:
        raise UserError(f"{name} {brief(text)} holds a NUL byte, which no name has")
    if "://" in text or text.startswith("pipe:"):  # a URL or a command may have long parts
        return
    encoded = text.encode("utf-8", "surrogatepass")
    longest = max(map(len, encoded.split(b"/")))
    if longest > _NAME_BYTES or len(encoded) > _PATH_BYTES:
        raise UserError(
            f"{name} {brief(text)} is too long: a path has at most {_PATH_BYTES} bytes, and "
            f"{_NAME_BYTES} in each of its parts"
        )


def check_count(name: str, value: int | None, most: int | None = None) -> None:
    """Raise a UserError for an option that is given and below 1, or above ``most``."""
    if value is not None and value < 1:
        raise UserError(f"--{name} {value} must be at least 1")
    if value is not None and most is not None and value > most:
        raise UserError(f"--{name} {brief(value)} must be at most {most}")


def check_sizes(most: int = LARGEST_LAYER, /, **sizes: int | None) -> None:
    """Raise a UserError for a size among a pretext's hyperparameters that can't be built.

    Args:
        most: the largest size.
        sizes: by the name of the hyperparameter; those that are None are not given.
    """
    for name, value in sizes.items():
        check_count(f"pretext.{name}", value, most)


def check_hyperparameters(pretext: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise a UserError for a hyperparameter that no pretext can have; see ``check_arguments``.

    Beside its type, a number must not be negative and not above a million; a pretext itself checks
    what its own ones mean.

    Args:
        pretext: the class.
        given: hyperparameters by name.
    """
    check_arguments(pretext, given, "pretext.")
    for name, value in given.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, int | float) and not 0 <= one <= LARGEST_NUMBER:
                raise UserError(
                    f"--pretext.{name} {brief(value)} must be from 0 to {LARGEST_NUMBER}"
                )


def check_image_size(value: int | None) -> None:
    """Raise a UserError for a side in pixels that is given and too small or too large to train."""
    if value is not None and not 8 <= value <= LARGEST_IMAGE:
        raise UserError(f"--image_size {brief(value)} must be from 8 to {LARGEST_IMAGE} pixels")


def check_positive(name: str, value: float | None, most: float = math.inf) -> None:
    """Raise a UserError for an option that is given and not above 0, or above ``most``."""
    if value is not None and not value > 0:
        raise UserError(f"--{name} {value} must be above 0")
    _check_most(name, value, most)


def check_not_negative(name: str, value: float | None, most: float = math.inf) -> None:
    """Raise a UserError for an option that is given and below 0, or above ``most``."""
    if value is not None and not value >= 0:
        raise UserError(f"--{name} {value} must not be negative")
    _check_most(name, value, most)


def _check_most(name: str, value: float | None, most: float) -> None:
    if value is not None and value > most:
        raise UserError(f"--{name} {brief(value)} must be at most {most:g}")


def check_share(name: str, value: float | None) -> None:
    """Raise a UserError for an option that is given and not in [0, 1]."""
    if value is not None and not 0 <= value <= 1:
        raise UserError(f"--{name} {value} must be in [0, 1]")


def check_positive_share(name: str, value: float | None) -> None:
    """Raise a UserError for an option that is given and not in (0, 1]."""
    if value is not None and not 0 < value <= 1:
        raise UserError(f"--{name} {value} is not a share: it must be above 0 and at most 1")


def check_warmup(name: str, value: float | None) -> None:
    """Raise a UserError for an option that is given and not in [0, 1)."""
    if value is not None and not 0 <= value < 1:
        raise UserError(f"--{name} {value} is not a share: it must be in [0, 1)")


def check_seed(value: int, more: int = 0) -> None:
    """Raise a UserError for a seed that is negative or, with those after it, above 2**32 - 1.

    Args:
        value: the seed.
        more: how many follow it.
    """
    if value < 0:
        raise UserError(f"--seed {value} must not be negative")
    if value + more > LARGEST_SEED:
        raise UserError(f"--seed {brief(value)} must be at most {LARGEST_SEED - more}")
