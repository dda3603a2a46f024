"""Reading of YAML files that may be damaged or malicious."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from vissl_lite.data.text_file import read_text
from vissl_lite.errors import UserError, brief

# Size in bytes of the largest text that is read, how many values it may hold, and how deep.
MAX_YAML_BYTES, MAX_VALUES, MAX_DEPTH = 2**25, 10**6, 32

# Digits of the longest integer: all of 64 bits. Longer ones overflow whatever takes them.
_DIGITS = 20

_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))


def read_yaml(file: Path, name: str | None = None) -> Any:
    """Read a YAML file.

    Args:
        file: File in UTF-8, with or without a byte order mark.
        name: Name of the file in errors; default its path.

    Returns:
        What it holds: mappings, lists, text, numbers (which may be NaN or infinite), true, false
        and None. A date is text.

    Raises:
        UserError: There is no such file, it is larger than 32 MiB, or it is no YAML. Refused, too,
            is what plain data have no need of: aliases, which can stand for more than any memory
            holds, other tags than ``!!str``, ``!!seq`` and ``!!map``, a key given twice, an
            integer of more than 20 digits, more than a million values, nesting deeper than 32.
    """
    return parse_yaml(read_text(file, MAX_YAML_BYTES, name), str(file) if name is None else name)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML; see ``read_yaml``.

    Args:
        text: One document.
        name: Name of the file or option, for errors.

    Raises:
        UserError: Likewise.
    """
    if len(text) > MAX_YAML_BYTES:
        raise UserError(
            f"{name} is not YAML that can be read: it has more than {MAX_YAML_BYTES} bytes"
        )
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML that can be read: {_reason(error)}") from None
    except UnicodeEncodeError:
        raise UserError(f"{name} is not YAML that can be read: it is not in UTF-8") from None


def _reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark = error.problem_mark
    return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"


def _refused(event: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


# libyaml's where PyYAML has it, which is twenty times as fast
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_events(text: str) -> None:
    """Refuse documents that would become too large, before building objects."""
    depth = values = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise _refused(event, f"write out what the alias *{brief(event.anchor)} stands for")
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _TAGS and tag != "!":
            raise _refused(event, f"the tag {brief(tag)} is not for plain data: leave it out")
        values += isinstance(event, yaml.ScalarEvent)
        if values > MAX_VALUES:
            raise _refused(event, f"it holds more than {MAX_VALUES} values")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _refused(event, f"it is nested deeper than {MAX_DEPTH}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Loader(_SafeLoader):
    """PyYAML's safe loader, with dates and << as text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in keys:
                    raise _refused(key_node, f"the key {brief(key)} is given twice")
                keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > _DIGITS:
            raise _refused(node, f"the number {brief(node.value)} has too many digits")
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_TEXT = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge")
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _TEXT]
    for first, pairs in _SafeLoader.yaml_implicit_resolvers.items()
}
