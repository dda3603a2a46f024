"""Options of a command: one dataclass defines its parameters, command line and configuration."""

import ast
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    ParamSpec,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from vissl_lite.errors import (
    LISTS,
    MAPPINGS,
    UserError,
    brief,
    canonical_name,
    check_argument,
    did_you_mean,
    kinds_of,
    takes_any,
)
from vissl_lite.session import session

# A file or folder, or a result object with a path, such as ``PretrainResult``.
StrPath = str | os.PathLike[str]
Paths = StrPath | Sequence[StrPath]

MAX_TRAINING_DAYS = 3650


class OptionRow(NamedTuple):
    """Description of an option for the help and the documentation.

    Attributes:
        name: Name on the command line, without ``--``.
        values: Placeholder, such as ``EPOCHS``, ``DATA ...``, ``{warn,stop}`` or
            ``{auto,TOKEN_DROP}``; empty for a flag.
        default: Default as text; None for required options, flags and options that may be None.
        required: Whether the option must be given.
        help: Help text, one paragraph.
    """

    name: str
    values: str
    default: str | None
    required: bool
    help: str


class Options:
    """Base class of the options of a command: a frozen dataclass with one field per option.

    The string below a field is its help. The constructor checks all values: each must be of its
    annotated type, numbers must be finite, text and lists must not be empty. Subclasses add their
    own checks in ``__post_init__``, after ``super().__post_init__()``.

    Values are stored as plain data: paths as text, tuples as lists, NumPy numbers as Python
    numbers. Annotate a path with ``StrPath`` and several paths with ``Paths``.

    Attributes:
        given: The values that were passed in, by name; other fields have their defaults.
        free_to_change: Options that may differ when a run is resumed: they determine how it runs,
            not what it trains.

    Raises:
        UserError: If a value is invalid.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    free_to_change: ClassVar[frozenset[str]] = frozenset(
        {"out", "resume", "overwrite", "num_workers", "devices", "num_nodes", "strategy", "compile"}
    )
    given: Mapping[str, Any]

    if not TYPE_CHECKING:  # Type checkers read the parameters from the dataclass's __init__.

        def __new__(cls, *args: Any, **kwargs: Any) -> Self:
            options = super().__new__(cls)
            positional = [field.name for field in fields(cls) if not field.kw_only]
            given = {**dict(zip(positional, args, strict=False)), **kwargs}
            object.__setattr__(options, "given", plain(given))
            return options

    def __post_init__(self) -> None:
        for name, kind in option_types(type(self)).items():
            self._set(name, plain(getattr(self, name)))
            check_argument(name, getattr(self, name), kind)

    def _set(self, name: str, value: object) -> None:
        """Set a field of the frozen dataclass during its construction."""
        object.__setattr__(self, name, value)

    @classmethod
    def merged(cls, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Merge the values of configuration files and the command line; later layers win.

        Args:
            layers: Values by option name. Text is parsed to the annotated type, see
                ``parse_value``.

        Raises:
            UserError: If an option is unknown.
        """
        kinds = option_types(cls)
        values: dict[str, Any] = {}
        for layer in layers:
            for name, value in layer.items():
                if name not in kinds:
                    raise unknown_option(name, kinds)
                values[name] = parse_value(name, value, kinds[name])
        return values

    @classmethod
    def rows(cls, layers: Sequence[Mapping[str, Any]] = ()) -> list[OptionRow]:
        """Describe the options for the help: required ones first, inherited ones last.

        Args:
            layers: Options that are given together with ``--help``, as for ``merged``.
        """
        kinds, docs = option_types(cls), option_docs(cls)
        rows = [
            option_row(field.name, kinds[field.name], field.default, docs.get(field.name, ""))
            for field in fields(cls)
        ]
        own = inspect.get_annotations(cls)
        return sorted(rows, key=lambda row: (not row.required, row.name not in own))

    @classmethod
    def epilog(cls, layers: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return a paragraph to print below the options in the help; default: none.

        Args:
            layers: Options that are given together with ``--help``, as for ``merged``.
        """
        return ""

    def as_config(self) -> dict[str, Any]:
        """Return all options as plain data, for ``config.yaml``, which reproduces the run."""
        names = (field.name for field in fields(self))
        return {n: getattr(self, n) for n in names if n not in ("resume", "overwrite", "dry_run")}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some values changed; ``given`` is kept."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        options = type(self)(**{**values, **changes})
        options._set("given", self.given)
        return options

    def resumed(self, config: Mapping[str, Any]) -> Self:
        """Return the options to resume a run with: those of the run, except ``free_to_change``.

        Args:
            config: The options of the run, from its ``config.yaml``.

        Raises:
            UserError: If given options contradict those of the run (the message names all of
                them), or if the run has an unknown option.
        """
        known = {field.name for field in fields(self)}
        unknown = [name for name in config if name not in known]
        if unknown:
            raise UserError(
                f"the run {self.given.get('out')} has an unknown option {unknown[0]}: "
                f"another version of vissl-lite has written it"
            )
        saved = flatten(config)
        own = flatten({name: getattr(self, name) for name in known.intersection(self.given)})
        contradictions = []
        for name, value in flatten(self.given).items():
            if f"{name}.name" in saved:  # A name alone is short for a mapping with this name.
                name = f"{name}.name"
            value = own.get(name, value)  # Such as the canonical form of a name.
            if name.partition(".")[0] in self.free_to_change or name not in saved:
                continue
            if _as_list(value) != _as_list(saved[name]):
                contradictions.append(f"--{name} {value} (the run has {saved[name]})")
        if contradictions:
            raise UserError(
                f"these options contradict the run {self.given.get('out')}: "
                f"{', '.join(contradictions)}"
            )
        changed = {n: getattr(self, n) for n in self.free_to_change.intersection(self.given)}
        return self.replace(**{**config, **changed})


P = ParamSpec("P")
OptionsT = TypeVar("OptionsT", bound=Options)
R = TypeVar("R")


def command(options: Callable[P, OptionsT]) -> Callable[[Callable[[OptionsT], R]], Callable[P, R]]:
    """Turn a function of one ``Options`` object into one that takes the options as keywords.

    The function runs inside a ``session``. Its docstring gets an ``Args`` section from the options,
    and its attribute ``options`` is the options class.

    Args:
        options: Options class of the command.
    """

    def decorate(function: Callable[[OptionsT], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with session():
                return function(options(*args, **kwargs))

        assert isinstance(options, type)
        result = get_type_hints(function).get("return", Any)
        signature = inspect.signature(options).replace(return_annotation=result)
        attributes: dict[str, Any] = {
            "options": options,
            "__signature__": signature,
            "__annotations__": {**option_types(options), "return": result},
            "__doc__": _add_args_section(inspect.getdoc(function) or "", option_docs(options)),
        }
        for name, value in attributes.items():
            setattr(run, name, value)
        return run

    return decorate


def options_of(function: Callable[..., object]) -> type[Options]:
    """Return the options class of a command."""
    options: type[Options] = function.options  # type: ignore[attr-defined]
    return options


def option_row(name: str, kind: Any, default: object, text: str) -> OptionRow:
    """Describe an option for the help.

    Args:
        name: Name of the option.
        kind: Annotated type of the option.
        default: Default value; ``MISSING`` if the option must be given.
        text: Help text.
    """
    kinds = [one for one in kinds_of(kind) if one is not NoneType]
    single = [get_args(one)[0] if get_origin(one) in LISTS else one for one in kinds]
    choices = [str(word) for one in single if get_origin(one) is Literal for word in get_args(one)]
    if choices and any(get_origin(one) is not Literal for one in single):
        choices.append(name.upper())  # Also accepts values that can't be listed.
    values = f"{{{','.join(dict.fromkeys(choices))}}}" if choices else name.upper()
    if takes_any(kind, LISTS):
        values += " ..."
    shown = default not in (MISSING, None) and kinds != [bool]
    return OptionRow(
        name,
        "" if kinds == [bool] else values,
        str(default) if shown else None,
        default is MISSING,
        text,
    )


def option_types(options: type[Options]) -> dict[str, Any]:
    """Return the annotated types of options by name, inherited ones first."""
    hints = get_type_hints(options)
    return {field.name: hints[field.name] for field in fields(options)}


def required(options: type[Options]) -> list[str]:
    """Return the names of the options that have no default."""
    return [
        field.name
        for field in fields(options)
        if field.default is MISSING and field.default_factory is MISSING
    ]


def option_docs(options: type) -> dict[str, str]:
    """Collect the help of options: the strings below the fields of a class and its bases.

    Returns:
        Help by option name, each as one paragraph. Fields without a string are left out.
    """
    docs: dict[str, str] = {}
    for one in reversed(options.__mro__):
        if "__dataclass_fields__" not in vars(one):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, below in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                docs[statement.target.id] = " ".join(below.value.value.split())
    return docs


def _add_args_section(text: str, docs: Mapping[str, str]) -> str:
    """Insert an ``Args`` section into a docstring, before ``Returns`` and ``Raises``."""
    lines = ["Args:"]
    for name, doc in docs.items():
        lines += textwrap.wrap(
            f"{name}: {doc}", 100, initial_indent=" " * 4, subsequent_indent=" " * 8
        )
    section = "\n".join(lines)
    starts = [text.find(f"\n\n{name}:\n") for name in ("Returns", "Raises")]
    at = min((start for start in starts if start >= 0), default=len(text))
    return f"{text[:at]}\n\n{section}{text[at:]}"


def plain(value: Any) -> Any:
    """Convert a value to plain data: paths to text, tuples to lists, NumPy to Python numbers."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    return value


def path_list(paths: Paths) -> list[str]:
    """Return the value of an option for one or several paths as a list."""
    if isinstance(paths, str | os.PathLike):
        return [os.fspath(paths)]
    return [os.fspath(path) for path in paths]


def parse_value(name: str, value: Any, kind: Any) -> Any:
    """Parse text to the annotated type of an option, such as a number or a list.

    Text that does not fit the type is returned unchanged; the ``Options`` constructor rejects it.

    Args:
        name: Name of the option.
        value: One or several words of the command line, or a value from a YAML file.
        kind: Annotated type of the option.

    Raises:
        UserError: If the option also accepts text and the value is not valid YAML.
    """
    kinds = kinds_of(kind)
    inner = [
        part
        for one in kinds
        if get_origin(one) in (*LISTS, *MAPPINGS, tuple)
        for part in get_args(one)
    ]
    if isinstance(value, list) and inner:
        return [parse_value(name, one, inner[0]) for one in value]
    if isinstance(value, dict) and inner:
        return {key: parse_value(name, one, inner[-1]) for key, one in value.items()}
    choices = [choice for one in kinds if get_origin(one) is Literal for choice in get_args(one)]
    if isinstance(value, str):
        value = canonical_name(value, choices)
    if not isinstance(value, str) or value in choices:
        return value
    if value == "null" and NoneType in kinds:
        return None
    takes_text = str in kinds
    takes_plain = not {int, float, bool}.isdisjoint(kinds)
    if takes_text and not takes_plain and not (takes_any(kind, LISTS) and value.startswith("[")):
        return value
    parsed = _from_yaml(name, value, strict=takes_text)
    if isinstance(parsed, str) and float in kinds:
        with suppress(ValueError):
            return float(parsed)  # YAML 1.1 reads 1e-3 as text.
    if isinstance(parsed, list | dict):
        return parse_value(name, parsed, kind)
    # If the option also accepts text, 1:00:00 stays text instead of YAML's 3600.
    is_text = parsed is None or isinstance(parsed, str) or (takes_text and str(parsed) != value)
    return value if is_text else parsed


def _from_yaml(name: str, text: str, strict: bool) -> Any:
    from vissl_lite.data.yaml_file import parse_yaml  # Deferred, so that --help is fast.

    try:
        return parse_yaml(text, f"--{name} {brief(text)}")
    except UserError:
        if strict:
            raise
        return text


def unknown_option(name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown option."""
    close = did_you_mean(f"--{name}", [f"--{one}" for one in known])
    return UserError(f"unknown option --{brief(name)}: {close}")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings, joining keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_time(text: str | int | None, accepted: str = "HH:MM:SS or seconds") -> float | None:
    """Convert ``HH:MM:SS``, ``MM:SS``, seconds, or ``D-HH:MM:SS`` with days to seconds.

    Args:
        text: Time; None for none.
        accepted: What the option takes, for the error.

    Raises:
        UserError: The text has another format, or the time is 0 or longer than ten years.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(?:(?:(?:(\d+)[-:])?(\d+):)?(\d+):)?(\d+)", str(text).strip())
    if match is None:
        raise UserError(f"--max_time {brief(text)} is not a time: give {accepted}")
    if len(match[0]) > 20:
        raise UserError(f"--max_time {brief(text)} is longer than {MAX_TRAINING_DAYS} days")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"--max_time {text} must be longer than 0 seconds")
    if total > MAX_TRAINING_DAYS * 24 * 60 * 60:
        raise UserError(f"--max_time {text} is longer than {MAX_TRAINING_DAYS} days")
    return float(total)
