"""The options of a command: a dataclass that is its parameters, its command line and its config."""

import ast
import functools
import inspect
import os
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
    check_argument,
    did_you_mean,
    kinds_of,
    takes_any,
)
from vissl_lite.session import session

# A file or folder, or a result that stands for one, such as ``PretrainResult``; and several.
StrPath = str | os.PathLike[str]
Paths = StrPath | Sequence[StrPath]


class OptionRow(NamedTuple):
    """An option as the help and the documentation show it.

    Attributes:
        name: As on the command line, without ``--``.
        values: What follows it, as ``EPOCHS``, ``DATA ...`` or ``{warn,stop}``; empty for a flag.
        default: As text; None if there is none, or ``help`` says what happens.
        required: Whether it has to be given.
        help: A paragraph.
    """

    name: str
    values: str
    default: str | None
    required: bool
    help: str


class Options:
    """Base of the options of a command. A subclass is a frozen dataclass with a field per option.

    The string below a field is its help. Making one checks all values: each has to be of its
    annotated type, numbers have to be finite, text and lists not empty. A subclass adds checks of
    its own in ``__post_init__``, after ``super().__post_init__()``.

    Values are kept as plain data: a path as text, a tuple as a list, a number of NumPy as one of
    Python. A field of a path is annotated ``StrPath``, one of several paths ``Paths``.

    Attributes:
        given: The values that were given, by name; the other fields have their defaults.
        free_to_change: Options that may differ when a run is resumed: they say how to run, not
            what.

    Raises:
        UserError: A value cannot be right.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    free_to_change: ClassVar[frozenset[str]] = frozenset(
        {"out", "resume", "overwrite", "num_workers", "devices", "num_nodes", "strategy", "compile"}
    )
    given: Mapping[str, Any]

    if not TYPE_CHECKING:  # type checkers take the parameters from the dataclass's __init__

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
        """Set a field, while the dataclass, which is frozen, is being made."""
        object.__setattr__(self, name, value)

    @classmethod
    def merged(cls, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The values of configuration files and of the command line as one; the last one counts.

        Args:
            layers: Values by name. Text that stands for a number, a list and so on becomes that.

        Raises:
            UserError: An option is not known.
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
        """What the help says of the options: the required ones first, inherited ones last.

        Args:
            layers: What is given beside ``--help``, as ``merged`` takes it.
        """
        kinds, docs = option_types(cls), option_docs(cls)
        rows = [
            option_row(field.name, kinds[field.name], field.default, docs.get(field.name, ""))
            for field in fields(cls)
        ]
        own = inspect.get_annotations(cls)
        return sorted(rows, key=lambda row: (not row.required, row.name not in own))

    def as_config(self) -> dict[str, Any]:
        """All options as plain data, for config.yaml, which repeats the run."""
        names = (field.name for field in fields(self))
        return {n: getattr(self, n) for n in names if n not in ("resume", "overwrite")}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values; what was ``given`` stays what it was."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        options = type(self)(**{**values, **changes})
        options._set("given", self.given)
        return options

    def resumed(self, config: Mapping[str, Any]) -> Self:
        """The options to resume a run with: its own, and of the given ones those free to change.

        Args:
            config: The options of the run.

        Raises:
            UserError: Given options contradict those of the run; all are named. Or the run has an
                option that is not known.
        """
        known = {field.name for field in fields(self)}
        unknown = [name for name in config if name not in known]
        if unknown:
            raise UserError(
                f"the run {self.given.get('out')} has an unknown option {unknown[0]}: "
                f"another version of vissl-lite has written it"
            )
        own = flatten(config)
        contradictions = []
        for name, value in flatten(self.given).items():
            if f"{name}.name" in own:  # a name alone stands for what has that name
                name = f"{name}.name"
            if name.partition(".")[0] in self.free_to_change or name not in own:
                continue
            if _listed(value) != _listed(own[name]):
                contradictions.append(f"--{name} {value} (the run has {own[name]})")
        if contradictions:
            raise UserError(
                f"these options contradict the run {self.given.get('out')}: "
                f"{', '.join(contradictions)}"
            )
        free = {n: getattr(self, n) for n in self.free_to_change.intersection(self.given)}
        return self.replace(**{**config, **free})


P = ParamSpec("P")
OptionsT = TypeVar("OptionsT", bound=Options)
R = TypeVar("R")


def command(options: Callable[P, OptionsT]) -> Callable[[Callable[[OptionsT], R]], Callable[P, R]]:
    """Decorate a function of one ``Options`` object: it then takes the options as keywords.

    It runs in a ``session``, which says what it changes in the process while it runs.

    The docstring of the function gets a section on its arguments, from the options. The attribute
    ``options`` of the function is the class.

    Args:
        options: The class of its options.
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
            "__doc__": _documented(inspect.getdoc(function) or "", option_docs(options)),
        }
        for name, value in attributes.items():
            setattr(run, name, value)
        return run

    return decorate


def options_of(function: Callable[..., object]) -> type[Options]:
    """The class of a command's options."""
    options: type[Options] = function.options  # type: ignore[attr-defined]
    return options


def option_row(name: str, kind: Any, default: object, text: str) -> OptionRow:
    """What is shown of an option.

    Args:
        name: Its name.
        kind: Its annotated type.
        default: ``MISSING`` if it has to be given.
        text: Its help.
    """
    kinds = [one for one in kinds_of(kind) if one is not NoneType]
    single = [get_args(one)[0] if get_origin(one) in LISTS else one for one in kinds]
    choices = [str(word) for one in single if get_origin(one) is Literal for word in get_args(one)]
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
    """The annotated types of options, by name, inherited ones first."""
    hints = get_type_hints(options)
    return {field.name: hints[field.name] for field in fields(options)}


def required(options: type[Options]) -> list[str]:
    """The names of the options that have no default."""
    return [
        field.name
        for field in fields(options)
        if field.default is MISSING and field.default_factory is MISSING
    ]


def option_docs(options: type) -> dict[str, str]:
    """The help of options: the strings that stand below the fields of a class and of its bases.

    Returns:
        By name, each as one paragraph. Fields without a string are left out.
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


def _documented(text: str, docs: Mapping[str, str]) -> str:
    """A docstring with a section ``Args``, before those on what comes back."""
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
    """A value as plain data: paths as text, tuples as lists, numbers of NumPy as Python's."""
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
    """The value of an option for one or several paths, as a list."""
    if isinstance(paths, str | os.PathLike):
        return [os.fspath(paths)]
    return [os.fspath(path) for path in paths]


def parse_value(name: str, value: Any, kind: Any) -> Any:
    """A value in which text that stands for a number, a list and so on has become that.

    What stands for nothing of the kind stays as it is: it is refused when the options are made.

    Args:
        name: The option.
        value: A word of the command line, several of them, or what a YAML file holds.
        kind: The type that the option is annotated with.

    Raises:
        UserError: The option takes text as well, and the value is not YAML.
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
            return float(parsed)  # 1e-3, which YAML 1.1 takes for text
    if isinstance(parsed, list | dict):
        return parse_value(name, parsed, kind)
    # where text is taken as well, 1:00:00 is text, not YAML's 3600
    is_text = parsed is None or isinstance(parsed, str) or (takes_text and str(parsed) != value)
    return value if is_text else parsed


def _from_yaml(name: str, text: str, strict: bool) -> Any:
    from vissl_lite.data.yaml_file import parse_yaml  # nobody who asks for help waits for it

    try:
        return parse_yaml(text, f"--{name} {brief(text)}")
    except UserError:
        if strict:
            raise
        return text


def unknown_option(name: str, known: Iterable[str]) -> UserError:
    """The error for an option that is not known."""
    close = did_you_mean(f"--{name}", [f"--{one}" for one in known])
    return UserError(f"unknown option --{brief(name)}: {close}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
