"""User-facing errors, and checks of options that several commands share."""

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

# Bounds that allow any useful value and reject typing errors such as 1e9.
LARGEST_IMAGE = 4096  # Side in pixels.
LARGEST_SEED = 2**32 - 1  # Limit of scikit-learn and UMAP.
LARGEST_LAYER = 2**15  # Number of features.
LARGEST_QUEUE = 2**20  # Number of embeddings or prototypes.
LARGEST_DEPTH = 64  # Number of layers, or of crops per image.
LARGEST_HYPERPARAMETER = 10**6

# Origins of the types of options that take several values, and of those that take a mapping.
LISTS, MAPPINGS = (list, Sequence), (dict, Mapping)

# Limits of Linux and macOS for one path component and for a whole path without its final NUL.
_NAME_BYTES, _PATH_BYTES = 255, 4095


def one_line(text: object) -> str:
    """Join the lines of a text and escape control characters."""
    joined = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", str(text)).strip()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", joined)


def brief(value: object) -> str:
    """Format a value for a message: as one line, with the middle of very long text left out."""
    try:
        text = one_line(value)
    except ValueError:  # Python does not print integers of more than 4300 digits.
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else "a value"
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-40:]} ({len(text)} characters)"


class UserError(Exception):
    """A mistake of the user. The message states what was given and what would work.

    The command line prints it and exits with status 2; Python functions raise it. Its text is
    always one line.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class MachineError(UserError):
    """A failure of the machine, such as a full disk. The message states how to continue.

    The command line prints it as one line and exits with status 1.
    """


class DivergedError(UserError):
    """The loss or the outputs of a model are no longer finite numbers."""


class OutOfMemoryError(UserError):
    """A batch does not fit into the memory of the one device that trains."""


class Terminated(SystemExit):
    """The process was stopped by a signal; the exit status is 128 plus the signal number.

    Args:
        number: Signal number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}"


class WeightsUnavailableError(UserError):
    """Pre-trained weights exist but cannot be loaded, for example without a network."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest known names in place of an unknown one: the closest, or all if there are few.

    Args:
        name: The unknown name.
        known: All valid names.

    Returns:
        A phrase such as ``did you mean resnet18 or resnet18d?``.
    """
    known = sorted(known)
    lower = {one.lower(): one for one in known}
    close = []
    if len(name) < 1000:
        close = [lower[one] for one in difflib.get_close_matches(name.lower(), lower, n=3)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    if len(known) <= 12:
        return f"there are {', '.join(known)}"
    return f"none of the {len(known)} known names is close to it"


def canonical_name(name: str, known: Iterable[str]) -> str:
    """Return the known name that equals a name except for its case, or the name if there is none.

    Args:
        name: A given name.
        known: All valid names, which differ in more than their case.
    """
    return {one.lower(): one for one in known}.get(name.lower(), name)


def check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], prefix: str = ""
) -> None:
    """Check the arguments of a command or a pretext against the annotations of its signature.

    Each argument must be of its annotated type, so only options that may be None accept null.
    Numbers must be finite and fit into 64 bits, text and lists must not be empty, and the text of
    options for paths must be valid as a path.

    Args:
        function: A function with annotated parameters, or a class, whose ``__init__`` is used.
        arguments: Values by name. Names that are not parameters are ignored.
        prefix: Prefix of option names in messages, after the ``--``.

    Raises:
        UserError: If an argument is invalid.
    """
    for name, kind in annotations(function).items():
        if name in arguments:
            check_argument(prefix + name, arguments[name], kind)


def annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of the parameters of a function, or of a class's ``__init__``, by name."""
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    return {name: kind for name, kind in hints.items() if name != "return"}


def check_argument(name: str, value: object, kind: Any) -> None:
    """Check one argument; see ``check_arguments``.

    Args:
        name: Option name in messages, without the ``--``.
        value: The given value.
        kind: Annotated type of the parameter.
    """
    if not _matches(value, kind):
        raise UserError(f"--{name} {brief(value)} is {_mismatch(kind)}")
    _check_content(f"--{name}", value, admits_path(kind))


def kinds_of(kind: Any) -> tuple[Any, ...]:
    """Return the types that an annotation allows: the members of a union, else the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def takes_any(kind: Any, origins: Sequence[Any]) -> bool:
    """Whether an annotation allows one of several generic types, such as ``LISTS``."""
    return any(get_origin(one) in origins for one in kinds_of(kind))


def admits_path(kind: Any) -> bool:
    """Whether an annotation allows a path, or several."""
    return _is_path(kind) or any(map(admits_path, get_args(kind)))


def _is_path(kind: Any) -> bool:
    return kind is Path or get_origin(kind) is os.PathLike


def _matches(value: object, kind: Any) -> bool:
    """Whether a value is of an annotated type; True for types that no option uses."""
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
        # YAML reads a key that looks like a number as one.
        return isinstance(value, Mapping) and all(
            isinstance(key, str | int | float) and _matches(one, parts[1])
            for key, one in value.items()
        )
    if kind in (int, float):  # NumPy numbers are accepted; True and False are not.
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind is str or _is_path(kind):
        return isinstance(value, str | os.PathLike)
    return isinstance(value, kind) if kind in (bool, NoneType) else True


def _mismatch(kind: Any) -> str:
    """Describe a mismatch: ``none of warn, stop`` or ``not of the type int or str``."""
    # Paths are given as text, and a single value is accepted for a list of one.
    parts = [part for part in kinds_of(kind) if part is not NoneType and not _is_path(part)]
    inner = [get_args(part)[0] if get_origin(part) in LISTS else part for part in parts]
    if len(set(inner)) == 1 and get_origin(inner[0]) is Literal:  # One choice, or several.
        parts = inner[:1]
    choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    if choices and len(parts) == 1:
        return f"none of {', '.join(map(str, choices))}"
    if [get_origin(part) for part in parts] == [tuple]:
        each = [_type_name(part) for part in get_args(parts[0])]
        return f"not {len(each)} values of the type {each[0]}"
    return f"not of the type {' or '.join(map(_type_name, parts))}"


def _type_name(kind: Any) -> str:
    """Return the name of a type for messages, such as ``list[str]``."""
    if get_origin(kind) in LISTS:
        inner = [_type_name(part) for part in kinds_of(get_args(kind)[0]) if not _is_path(part)]
        return f"list[{' or '.join(inner)}]"
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    return str(kind) if get_origin(kind) is not None else kind.__name__


def _check_content(name: str, value: object, is_path: bool) -> None:
    if isinstance(value, list | tuple | Mapping):
        if not value:
            raise UserError(f"{name} must not be empty: give a value, or leave it out")
        for one in [*value, *(value.values() if isinstance(value, Mapping) else ())]:
            _check_content(name, one, is_path)
    elif isinstance(value, str | os.PathLike):
        _check_text(name, os.fspath(value), is_path)
    elif isinstance(value, Integral):
        if abs(int(value)) >= 2**63:
            raise UserError(f"{name} {brief(value)} is too large a number")
    elif isinstance(value, Real) and not math.isfinite(value):
        raise UserError(f"{name} {value} must be a finite number")


def _check_text(name: str, text: str, is_path: bool) -> None:
    if not text.strip():
        raise UserError(f"{name} must not be empty: give a value, or leave it out")
    if "\0" in text:
        raise UserError(f"{name} {brief(text)} contains a NUL byte, which names cannot have")
    if "://" in text or text.startswith("pipe:"):  # URLs and commands may have long parts.
        return
    encoded = text.encode("utf-8", "surrogatepass")
    longest = max(map(len, encoded.split(b"/")))
    if is_path and (longest > _NAME_BYTES or len(encoded) > _PATH_BYTES):
        raise UserError(
            f"{name} {brief(text)} is too long: a path has at most {_PATH_BYTES} bytes, and "
            f"{_NAME_BYTES} in each of its parts"
        )
    if len(encoded) > _PATH_BYTES:  # no other option needs more, and messages repeat their values
        raise UserError(f"{name} {brief(text)} is too long: give at most {_PATH_BYTES} bytes")


# More are meant by nobody, and their products with numbers of images would not be 64-bit numbers.
MOST_EPOCHS = 10**9


def check_count(name: str, value: int | None, most: int | None = None) -> None:
    """Raise a UserError if an option is given and below 1 or above ``most``."""
    if value is not None and value < 1:
        raise UserError(f"--{name} {value} must be at least 1")
    if value is not None and most is not None and value > most:
        raise UserError(f"--{name} {brief(value)} must be at most {most}")


def check_sizes(most: int = LARGEST_LAYER, /, **sizes: int | None) -> None:
    """Raise a UserError if a size hyperparameter of a pretext is below 1 or above ``most``.

    Args:
        most: Largest allowed size.
        sizes: Sizes by hyperparameter name. None means that the size is not given.
    """
    for name, value in sizes.items():
        check_count(f"pretext.{name}", value, most)


def check_hyperparameters(pretext: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Check hyperparameters of a pretext against its signature; see ``check_arguments``.

    Numbers must also be between 0 and a million. Each pretext checks its narrower ranges itself.

    Args:
        pretext: Pretext class.
        given: Hyperparameters by name.

    Raises:
        UserError: If a hyperparameter is invalid.
    """
    check_arguments(pretext, given, "pretext.")
    for name, value in given.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, int | float) and not 0 <= one <= LARGEST_HYPERPARAMETER:
                raise UserError(
                    f"--pretext.{name} {brief(value)} must be from 0 to {LARGEST_HYPERPARAMETER}"
                )


def check_image_size(value: int | None) -> None:
    """Raise a UserError if an image size in pixels is given and too small or too large."""
    if value is not None and not 8 <= value <= LARGEST_IMAGE:
        raise UserError(f"--image_size {brief(value)} must be from 8 to {LARGEST_IMAGE} pixels")


def check_positive(name: str, value: float | None, most: float = math.inf) -> None:
    """Raise a UserError if an option is given and not above 0 or above ``most``."""
    if value is not None and not value > 0:
        raise UserError(f"--{name} {value} must be above 0")
    _check_most(name, value, most)


def check_not_negative(name: str, value: float | None, most: float = math.inf) -> None:
    """Raise a UserError if an option is given and below 0 or above ``most``."""
    if value is not None and not value >= 0:
        raise UserError(f"--{name} {value} must not be negative")
    _check_most(name, value, most)


def _check_most(name: str, value: float | None, most: float) -> None:
    if value is not None and value > most:
        raise UserError(f"--{name} {brief(value)} must be at most {most:g}")


def check_share(name: str, value: float | None) -> None:
    """Raise a UserError if an option is given and not in [0, 1]."""
    if value is not None and not 0 <= value <= 1:
        raise UserError(f"--{name} {value} must be in [0, 1]")


def check_positive_share(name: str, value: float | None) -> None:
    """Raise a UserError if an option is given and not in (0, 1]."""
    if value is not None and not 0 < value <= 1:
        raise UserError(f"--{name} {value} is not a share: it must be above 0 and at most 1")


def check_warmup(name: str, value: float | None) -> None:
    """Raise a UserError if an option is given and not in [0, 1)."""
    if value is not None and not 0 <= value < 1:
        raise UserError(f"--{name} {value} is not a share: it must be in [0, 1)")


def check_seed(value: int, more: int = 0) -> None:
    """Raise a UserError if a seed, or the last of several consecutive ones, is out of range.

    Args:
        value: First seed, at least 0.
        more: Number of further seeds, so that ``value + more`` is at most 2**32 - 1.
    """
    if value < 0:
        raise UserError(f"--seed {value} must not be negative")
    if value + more > LARGEST_SEED:
        raise UserError(f"--seed {brief(value)} must be at most {LARGEST_SEED - more}")
