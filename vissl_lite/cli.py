"""The console command ``vissl-lite``: verbs to functions, nothing else.

jsonargparse makes each verb's options from its function: the signature is the schema, the
docstring the help, and ``--config FILE`` the same in YAML.
"""

import importlib
import inspect
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from vissl_lite import __version__
from vissl_lite.errors import (
    MachineError,
    Terminated,
    UserError,
    annotations,
    brief,
    check_argument,
    check_arguments,
    did_you_mean,
    kinds_of,
)
from vissl_lite.faults import machine_error

# jsonargparse's name for how values are parsed: here, by ``_parse_value``.
_MODE = "vissl_lite"

VERBS = {
    "demo": "the whole story on sample data, in minutes",
    "pretrain": "train an encoder on unlabelled images",
    "probe": "judge a frozen encoder by kNN and a linear classifier",
    "finetune": "train a classifier on labelled images, from an encoder or from nothing",
    "predict": "classify a folder of images with a fine-tuned model",
    "compare": "did pre-training help? encoders on the same few labels, with intervals",
    "report": "make the page of a run again: report RUN",
    "runs": "the runs below a folder: runs [FOLDER] [--sort FIGURE]",
    "embed": "write the features of images as a Parquet or NPZ file",
    "explore": "a map of a folder of images, as one HTML file",
    "export": "write an encoder or a model as an ONNX file or a timm folder",
    "shard": "write images as tar files, to stream them from a disk or a URL",
    "list": "what there is: list pretexts, list backbones [PATTERN]",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: without the program's name; default those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake of the user's, 1 for a fault of the machine, 130
        when interrupted, 143 when stopped by SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _ended_by_sigterm():
        return _main(given)


def _main(given: list[str]) -> int:
    try:
        if not given or given[0] in ("-h", "--help"):
            print(_overview())
            return 0
        if given[0] == "--version":
            print(f"vissl-lite {__version__}")
            return 0
        if given[0] not in VERBS:
            raise UserError(f"unknown command {brief(given[0])}: {did_you_mean(given[0], VERBS)}")
        _run(given[0], given[1:])
    except MachineError as error:
        return _say(str(error), 1)
    except UserError as error:
        return _say(str(error), 2)
    except KeyboardInterrupt as stop:
        return _say("interrupted", 130, stop)
    except Terminated as stop:
        return _say(str(stop), int(stop.code or 0), stop)
    except Exception as error:
        fault = machine_error(error)
        if fault is None:
            raise
        return _say(str(fault), 1)
    return 0


def _say(words: str, status: int, stop: BaseException | None = None) -> int:
    """Print why a command ended, and what of it is kept; gives back the exit status."""
    kept = getattr(stop, "__notes__", [])[-1:]  # the last one is of the outermost run
    with suppress(OSError):  # a terminal that is closed
        print("; ".join([f"vissl-lite: {words}", *kept]), file=sys.stderr)
    return status


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within it, SIGTERM is an exception, so that what is half-written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: Any) -> None:
        raise Terminated(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _overview() -> str:
    verbs = "\n".join(f"  {verb:9} {what}" for verb, what in VERBS.items())
    return (
        "usage: vissl-lite VERB [--config FILE] [--option value ...]\n\n"
        "Self-supervised vision pre-training: train an encoder on unlabelled images,\n"
        "judge it, fine-tune it on a few labels.\n\n"
        f"{verbs}\n\n"
        "vissl-lite VERB --help lists a verb's options."
    )


def _run(verb: str, given: list[str]) -> None:
    name = "list_" if verb == "list" else verb  # not to hide Python's own
    function = getattr(importlib.import_module(f"vissl_lite.commands.{verb}"), name)
    given, pretext = _prepare(function, given)
    parser = make_parser(verb, function, pretext)
    options = parser.parse_args(given).as_dict()
    options.pop("config", None)
    check_arguments(function, options)
    if options.get("resume") and _is_run_of(verb, options["out"]):
        # The run's own options were read first: any that differs now was given to contradict them.
        from vissl_lite.run import resumed_config

        resumed_config(Path(options["out"]), options, defaults={})
    function(**options)


def make_parser(verb: str, function: Callable[..., Any], pretext: str = "simclr") -> Any:
    """The parser of a verb.

    Args:
        verb: its name.
        function: what it calls.
        pretext: whose hyperparameters become options, where the function takes a pretext.
    """
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        """Says a mistake in one line, with the closest option where one is unknown."""

        def error(self, message: str, *_: Any) -> NoReturn:
            known = [name for action in self._actions for name in action.option_strings]
            known = [name for name in known if name.startswith("--") and not name.endswith("+")]
            raise UserError(_one_line(message, known))

    jsonargparse.set_loader(_MODE, _parse_value, exceptions=(UserError,))
    parser = Parser(
        prog=f"vissl-lite {verb}", description=VERBS[verb], allow_abbrev=False, parser_mode=_MODE,
        print_config=None,
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="YAML file of options")
    skip: set[str | int] = set()
    if "pretext" in inspect.signature(function).parameters:
        skip.add("pretext")
    parser.add_function_arguments(function, skip=skip)
    if skip:
        from vissl_lite.pretext import PRETEXTS, pretext_class

        made = pretext_class(pretext)
        parser.add_argument(
            "--pretext.name", default=pretext, help=f"or --pretext: one of {', '.join(PRETEXTS)}"
        )
        parser.add_class_arguments(made, "pretext", skip={"encoder"})
    return parser


def _prepare(function: Callable[..., Any], given: list[str]) -> tuple[list[str], str]:
    """Rewrite arguments for jsonargparse: ``--flag`` alone, ``--data A B``, ``--pretext NAME``.

    Configuration files come first, so that options on the command line win; to resume, the run's
    own comes before them.

    Returns:
        The arguments, and the pretext that they name.
    """
    import yaml

    parameters = inspect.signature(function).parameters
    configs: list[dict[str, Any]] = []
    rewritten: list[str] = []
    lists: dict[str, list[str]] = {}  # given as --data A B, or as --data A --data B
    words = [part for word in given for part in _split_option(word)]
    if function.__name__ in (
        "list_",
        "report",
        "runs",
    ):  # whose parameters may stand without their names
        for name in parameters:
            if words and not words[0].startswith("-"):
                rewritten += [f"--{name}", words.pop(0)]
    while words:
        option = words.pop(0)
        values = []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        name = option.removeprefix("--")
        if name.endswith("+"):  # which means something to jsonargparse
            raise UserError(f"unknown option {brief(option)}: {did_you_mean(name, parameters)}")
        kind = parameters[name].annotation if name in parameters else None
        single = name in parameters and not _takes_list(kind)
        if option == "--config" and values:
            configs += [_read_config(value) for value in values]
        elif single and len(values) > 1:
            raise UserError(f"{option} takes one value, not {brief(' '.join(values))}")
        elif option == "--pretext":
            rewritten += ["--pretext.name", *values]
        elif kind is bool and not values:
            rewritten += [option, "true"]
        elif values and _takes_list(kind) and not values[0].startswith("["):  # a YAML list
            lists.setdefault(option, []).extend(values)
        else:
            rewritten += [option, *values]
    for option, values in lists.items():
        if len(values) == 1:
            rewritten += [option, *values]
            continue
        kind = parameters[option.removeprefix("--")].annotation
        items = [_number(value) if _takes_numbers(kind) else value for value in values]
        rewritten += [option, yaml.safe_dump(items, default_flow_style=True, width=1 << 30)]
    at = {rewritten[i]: rewritten[i + 1] for i in range(len(rewritten) - 1)}
    resume = at.get("--resume") == "true" and "--out" in at
    if resume and _is_run_of(function.__name__, at["--out"]):
        run = Path(at["--out"]) / "config.yaml"
        configs.insert(0, _read_config(run, str(run)))
    pretext = at.get("--pretext.name")
    for config in reversed(configs):  # the last one to name a pretext wins
        if "pretext" not in config:
            continue
        named = config["pretext"]
        named = {"name": named} if isinstance(named, str) else named
        if not isinstance(named, dict) or not isinstance(named.get("name", ""), str):
            raise UserError(f"pretext: {brief(named)} is neither a name nor a mapping with one")
        pretext = pretext or named.get("name")
        if named.get("name", pretext) != pretext:
            named = {"name": named["name"]}  # another pretext's hyperparameters do not count
        config["pretext"] = named
    kinds = annotations(function)
    if "pretext" in kinds:
        from vissl_lite.pretext import pretext_class

        hyperparameters = annotations(pretext_class(pretext or "simclr"))
        kinds |= {f"pretext.{name}": kind for name, kind in hyperparameters.items()}
    for option, value in pairwise(rewritten):
        name = option.removeprefix("--")
        if option.startswith("--") and name in kinds:
            check_argument(name, _typed(value, kinds[name]), kinds[name])
    configs = [_typed_config(config, kinds) for config in configs]
    front = [f"--config={yaml.safe_dump(config, sort_keys=False)}" for config in configs]
    return front + rewritten, pretext or "simclr"


def _split_option(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--") else [word]


def _takes_list(kind: Any) -> bool:
    return get_origin(kind) is list or any(get_origin(part) is list for part in get_args(kind))


def _takes_numbers(kind: Any) -> bool:
    return kind in (int, float) or any(_takes_numbers(part) for part in get_args(kind))


def _number(text: str) -> float | str:
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text  # for the parser to complain of


def _typed_config(
    config: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Options of a file, checked as far as they are known, in the types that they should have."""
    typed = {}
    for name, value in config.items():
        kind = kinds.get(prefix + name)
        if name.endswith("+") or name.startswith("__"):  # which mean something to jsonargparse
            raise UserError(f"unknown option --{brief(name)}: {did_you_mean(name, kinds)}")
        if prefix + name == "pretext" and isinstance(value, dict):
            value = _typed_config(value, kinds, "pretext.")
        elif kind is not None:
            value = _typed(value, kind)
            check_argument(prefix + name, value, kind)
        typed[name] = value
    return typed


def _typed(value: Any, kind: Any) -> Any:
    """A value in which text that stands for a number, a list and so on has become that.

    What then is of the right type holds no text that jsonargparse would still parse as YAML.
    """
    kinds = kinds_of(kind)
    if isinstance(value, str):
        plain = {int, float, bool}.intersection(kinds)
        listed = value.startswith("[") and _takes_list(kind)
        choice = any(get_origin(one) is Literal and value in get_args(one) for one in kinds)
        if choice or (str in kinds and not plain and not listed):
            return value
        try:
            parsed = _parse_value(value)
        except UserError:
            if str in kinds and plain:
                raise
            return value
        if float in kinds and isinstance(parsed, str):
            parsed = _number(parsed)  # 1e-3, which YAML 1.1 takes for text
        if isinstance(parsed, str) or (str in kinds and not isinstance(parsed, list)):
            return value
        return _typed(parsed, kind)
    inner = [part for one in kinds for part in get_args(one) if get_origin(one) is not Literal]
    if isinstance(value, list) and inner:
        return [_typed(one, inner[0]) for one in value]
    if isinstance(value, dict) and inner:
        return {key: _typed(one, inner[-1]) for key, one in value.items()}
    return value


def _is_run_of(command: str, out: str) -> bool:
    """Whether a folder holds a run of a command that has written down its options."""
    from vissl_lite.run_folder import CONFIG
    from vissl_lite.run_record import read_record

    record = read_record(Path(out))
    return record is not None and record.command == command and (Path(out) / CONFIG).is_file()


def _read_config(file: str | Path, name: str | None = None) -> dict[str, Any]:
    from vissl_lite.data.yaml_file import read_yaml

    name = f"--config {brief(file)}" if name is None else name
    content = read_yaml(Path(file), name)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{name} holds no options: expected a mapping from their names")
    if "config" in content:
        raise UserError(f"{name} names another file: give each of them with --config")
    return content


def _parse_value(text: str) -> Any:
    """A value as jsonargparse has it parsed where its option takes more than text."""
    from vissl_lite.data.yaml_file import parse_yaml

    value = parse_yaml(text, f"the value {brief(text)}")
    if isinstance(value, dict) and all(inner is None for inner in value.values()):
        return text  # braces in a name, as in {a,b}.tar
    return value


def _one_line(message: str, known: Sequence[str]) -> str:
    """jsonargparse's message as one line that says what was given and what would work."""
    grouped = re.search(r"Group '(\w+)' does not accept option '([\w.]+)'", message)
    unknown = re.search(r"[Uu]nrecognized arguments: *(--[\w.]+)", message)
    unknown = unknown or re.search(r"Option '([\w.]+)' is not accepted", message)
    name = f"{grouped[1]}.{grouped[2]}" if grouped else unknown[1] if unknown else None
    if name is not None:
        name = f"--{name.removeprefix('--')}"
        return f"unknown option {name}: {did_you_mean(name, known)}"
    wrong = re.search(r'Parser key "([\w.]+)":', message)
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    given = brief(value[1]) if value else ""
    choices = re.search(r"typing\.Literal\[(.*?)\]", message)
    if wrong and value and choices:
        names = choices[1].replace("'", "").split(", ")
        return f"--{wrong[1]} {given} is none of {', '.join(names)}"
    expected = re.findall(r"Expected an? <class '(\w+)'>", message)
    if wrong and value and expected:
        kinds = " or ".join(dict.fromkeys(kind for kind in expected if kind != "NoneType"))
        return f"--{wrong[1]} {given} is not of the type {kinds}"
    missing = re.search(r"following arguments are required: (.*)", message)
    if missing:
        return f"--{missing[1].replace(', ', ', --')} must be given"
    bare = re.search(r"argument (--[\w.]+).*: expected one argument", message)
    if bare:
        return f"{bare[1]} needs a value"
    stray = re.search(r"[Uu]nrecognized arguments: (.*)", message)
    if stray:
        return f"{brief(stray[1])} belongs to no option: options begin with --"
    return brief(message)
