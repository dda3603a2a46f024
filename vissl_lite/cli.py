"""The console command ``vissl-lite``: verbs to functions, nothing else.

jsonargparse makes each verb's options from its function: the signature is the schema, the
docstring the help, and ``--config FILE`` the same in YAML.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from vissl_lite import __version__
from vissl_lite.errors import UserError, brief, check_arguments, did_you_mean

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
        The exit status: 0, or 2 for a mistake of the user's, 130 when interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
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
    except UserError as error:
        print(f"vissl-lite: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vissl-lite: interrupted", file=sys.stderr)
        return 130
    return 0


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
    if options.get("resume") and _is_run(options["out"]):
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
    if function.__name__ in ("list_", "report"):  # whose parameters may stand without their names
        for name in parameters:
            if words and not words[0].startswith("-"):
                rewritten += [f"--{name}", words.pop(0)]
    while words:
        option = words.pop(0)
        values = []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        name = option.removeprefix("--")
        kind = parameters[name].annotation if name in parameters else None
        single = name in parameters and not _takes_list(kind)
        if option == "--config" and values:
            configs += [_read_config(value) for value in values]
        elif single and len(values) > 1:
            raise UserError(f"{option} takes one value, not {brief(' '.join(values))}")
        elif single and option in rewritten:
            raise UserError(f"{option} is given twice")
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
    if at.get("--resume") == "true" and "--out" in at:
        if _is_run(at["--out"]):
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


def _is_run(out: str) -> bool:
    return os.path.isfile(os.path.join(out, "config.yaml"))


def _read_config(file: str | Path, name: str | None = None) -> dict[str, Any]:
    from vissl_lite.data.yaml_file import read_yaml

    name = f"--config {brief(file)}" if name is None else name
    content = read_yaml(Path(file), name)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{name} holds no options: expected a mapping from their names")
    return content


def _parse_value(text: str) -> Any:
    """A value as jsonargparse has it parsed where its option takes more than text."""
    from vissl_lite.data.yaml_file import parse_yaml

    value = parse_yaml(text, "the value")
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
    choices = re.search(r"typing\.Literal\[(.*?)\]", message)
    if wrong and value and choices:
        names = choices[1].replace("'", "").split(", ")
        return f"--{wrong[1]} {value[1]} is none of {', '.join(names)}"
    expected = re.findall(r"Expected an? <class '(\w+)'>", message)
    if wrong and value and expected:
        kinds = " or ".join(dict.fromkeys(kind for kind in expected if kind != "NoneType"))
        return f"--{wrong[1]} {value[1]} is not of the type {kinds}"
    missing = re.search(r"following arguments are required: (.*)", message)
    if missing:
        return f"--{missing[1].replace(', ', ', --')} must be given"
    return " ".join(message.split())
