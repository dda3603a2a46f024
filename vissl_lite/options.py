"""The options of a command: a dataclass that is its parameters, its command line and its config."""

import ast
import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Self, TypeVar, get_type_hints

from vissl_lite.errors import UserError, check_argument

# A file or folder, or a result that stands for one, such as ``PretrainResult``; and several.
StrPath = str | os.PathLike[str]
Paths = StrPath | Sequence[StrPath]


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
            raise UserError(f"the run {self.given.get('out')} has an unknown option {unknown[0]}: "
                            f"another version of vissl-lite has written it")  # fmt: skip
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
        free = {n: getattr(self, n) for n in known & self.free_to_change}
        return self.replace(**{**config, **free})


P = ParamSpec("P")
OptionsT = TypeVar("OptionsT", bound=Options)
R = TypeVar("R")


def command(options: Callable[P, OptionsT]) -> Callable[[Callable[[OptionsT], R]], Callable[P, R]]:
    """Decorate a function of one ``Options`` object: it then takes the options as keywords.

    The docstring of the function gets a section on its arguments, from the options. The attribute
    ``options`` of the function is the class.

    Args:
        options: The class of its options.
    """

    def decorate(function: Callable[[OptionsT], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
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
        lines += textwrap.wrap(f"{name}: {doc}", 100, initial_indent=" " * 4,
                               subsequent_indent=" " * 8)  # fmt: skip
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
