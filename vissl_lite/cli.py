"""The console command ``vissl-lite``: maps subcommands to functions.

The options of a command are the fields of its dataclass (see ``options``); ``--config FILE`` reads
them from YAML. All words between one ``--option`` and the next are its values, so ``--data A B``
works, and negative numbers need no special form. ``--image-size`` is read as ``--image_size``.
"""

import gc
import importlib
import inspect
import os
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from vissl_lite import __version__
from vissl_lite.errors import (
    LISTS,
    MAPPINGS,
    MachineError,
    Terminated,
    UserError,
    brief,
    did_you_mean,
    takes_any,
)
from vissl_lite.faults import machine_error
from vissl_lite.options import (
    OptionRow,
    Options,
    option_types,
    options_of,
    required,
    unknown_option,
)
from vissl_lite.slurm import requeue, under_slurm

COMMANDS = {
    "demo": "run the whole workflow on sample data, in minutes",
    "pretrain": "train an encoder on unlabelled images with one of many methods: --pretext NAME",
    "check": "show what is read of labelled images: parts, classes, what is left out",
    "probe": "evaluate a frozen encoder with kNN and a linear classifier",
    "finetune": "train a model on labels: --task classification, detection or segmentation",
    "predict": "classify, detect or segment in a folder of images with a fine-tuned model",
    "pseudo-label": "write confident predictions as labels, for finetune --pseudo_labels",
    "compare": "did pre-training help? compare encoders on the same few labels, with intervals",
    "report": "write the report of a run again: report RUN",
    "runs": "list the runs below a folder: runs [FOLDER] [--sort METRIC]",
    "embed": "write the features of images as a Parquet or NPZ file",
    "explore": "write a map of a folder of images as one HTML file",
    "select": "choose which images of a folder to label, and write a page to label them in",
    "export": "write an encoder or a model as an ONNX file or a timm folder",
    "shard": "write images as tar files, to stream them from a disk or a URL",
    "list": "list pretexts or backbones: list pretexts, list backbones [PATTERN]",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command-line words without the program name. Default: ``sys.argv[1:]``.

    Returns:
        The exit status: 0 on success, 1 for a machine error, 2 for a user error, 130 when
        interrupted, 143 when stopped by SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _signals_raise():
        return _main(given, is_program=arguments is None)


def _main(given: list[str], is_program: bool) -> int:
    try:
        if not given or given[0] in ("-h", "--help"):
            print(_overview())
            return 0
        if given[0] == "--version":
            print(f"vissl-lite {__version__}")
            return 0
        if given[0] not in COMMANDS:
            raise UserError(
                f"unknown command {brief(given[0])}: {did_you_mean(given[0], COMMANDS)}"
            )
        function = find_command(given[0])
        if is_program:
            # Modules stay until the end. Collecting garbage would write to each of their objects,
            # and so copy the memory that data workers share with this process (over 100 MB).
            gc.freeze()
        try:
            _run(given[0], function, given[1:])
        finally:
            if is_program:
                gc.unfreeze()  # else bindings report at exit that objects of theirs have leaked
    except MachineError as error:
        return _print_error(str(error), 1)
    except UserError as error:
        return _print_error(str(error), 2)
    except KeyboardInterrupt as stop:
        return _print_error("interrupted", 130, stop)
    except Terminated as stop:
        return _print_error(str(stop), int(stop.code or 0), stop)
    except Exception as error:
        fault = machine_error(error)
        if fault is None:
            raise
        return _print_error(str(fault), 1)
    return 0


def _print_error(message: str, status: int, stop: BaseException | None = None) -> int:
    """Print why a command ended and what is kept of its run, and return the exit status."""
    kept = getattr(stop, "__notes__", [])[-1:]  # The last note comes from the outermost run.
    with suppress(OSError):  # The terminal may be closed.
        print("; ".join([f"vissl-lite: {message}", *kept]), file=sys.stderr)
    return status


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that half-written files are removed.

    Under SLURM also SIGUSR1, which puts the job into the queue again: its time can be up before and
    after a training, too, which handles the signals itself (``Checkpoints``).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    owner = os.getpid()

    def terminate(number: int, _: Any) -> None:
        if number == signal.SIGUSR1 and os.getpid() != owner:  # a data worker
            return
        # launchers below SLURM have processes of their own, which inherit SLURM's number
        places = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
        if number == signal.SIGUSR1 and all(place == "0" for place in places):
            requeue()
        raise Terminated(number)

    numbers = [signal.SIGTERM, *([signal.SIGUSR1] if under_slurm() else [])]
    previous = {number: signal.signal(number, terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _overview() -> str:
    commands = "\n".join(f"  {name:12} {text}" for name, text in COMMANDS.items())
    return (
        "usage: vissl-lite COMMAND [--config FILE] [--option value ...]\n\n"
        "Self-supervised vision pre-training: train an encoder on unlabelled images,\n"
        "evaluate it, fine-tune it on a few labels.\n\n"
        f"{commands}\n\n"
        "vissl-lite COMMAND --help lists the options of a command."
    )


def find_command(name: str) -> Callable[..., Any]:
    """Import and return the function of a command."""
    name = name.replace("-", "_")
    module = importlib.import_module(f"vissl_lite.commands.{name}")
    function: Callable[..., Any] = getattr(module, "list_" if name == "list" else name)
    return function


def _run(command: str, function: Callable[..., Any], words: Sequence[str]) -> None:
    options = options_of(function)
    if "--help" in words or "-h" in words:
        words = [word for word in words if word not in ("--help", "-h")]
        print(_help(command, function, parse_words(options, words)))
        return
    layers = parse_words(options, words)
    values = options.merged(layers)
    if values.get("resume") is True and _is_run_of(command, values.get("out")):
        # Required options, and mappings of which only a part is given, come from the run's config.
        saved = _read_config(Path(values["out"]) / "config.yaml")
        needed = {n: v for n, v in saved.items() if n in required(options) or isinstance(v, dict)}
        values = options.merged([needed, *layers])
    missing = [f"--{name}" for name in required(options) if name not in values]
    if missing:
        raise UserError(f"{', '.join(missing)} must be given")
    function(**values)


def parse_words(options: type[Options], words: Sequence[str]) -> list[dict[str, Any]]:
    """Group the words of a command line by option.

    Args:
        options: Options class of the command. Fields that are not ``kw_only`` are also accepted as
            positional arguments.
        words: Words after the name of the command.

    Returns:
        The options of each ``--config`` file and, last, those of the command line as text.

    Raises:
        UserError: If an option is unknown or has too few or too many values.
    """
    kinds: dict[str, Any] = {"config": list[str], **option_types(options)}
    words, named = list(words), list[tuple[str, list[str]]]()
    for field in fields(options):
        if words and not words[0].startswith("-") and not field.kw_only:
            named.append((field.name, [words.pop(0)]))
    if words and not words[0].startswith("--"):
        raise UserError(f"{brief(words[0])} belongs to no option: options begin with --")
    for word in words:
        if not word.startswith("--"):
            named[-1][1].append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        outer, dot, inner = name.partition(".")
        outer = outer.replace("-", "_")  # The part after the dot may be a class name.
        name = f"{outer}{dot}{inner}"
        if outer not in kinds or (dot and not takes_any(kinds[outer], MAPPINGS)):
            raise unknown_option(name, kinds)
        named.append((name, [value] if equals else []))
    given: dict[str, Any] = {}
    for name, values in named:
        if kinds.get(name) is bool and not values:
            values = ["true"]
        if not values:
            raise UserError(f"--{name} needs a value")
        if name in kinds and takes_any(kinds[name], (*LISTS, tuple)):  # Also --data A --data B.
            values = [*given.get(name, []), *values]
        elif name in kinds and len(values) > 1:
            raise UserError(f"--{name} takes one value, not {brief(' '.join(values))}")
        given[name] = values
    files = given.pop("config", [])
    configs = [_read_config(Path(file), f"--config {brief(file)}") for file in files]
    return [*configs, _nested(given)]


def _nested(given: Mapping[str, list[str]]) -> dict[str, Any]:
    """Turn dotted names such as ``pretext.temperature`` into nested mappings."""
    nested: dict[str, Any] = {}
    for name, values in given.items():
        value = values[0] if len(values) == 1 else values
        outer, dot, inner = name.partition(".")
        if dot:
            nested[outer] = {**_as_mapping(nested.get(outer, {})), inner: value}
        elif isinstance(nested.get(outer), dict):
            nested[outer] = {**nested[outer], **_as_mapping(value)}
        else:
            nested[outer] = value
    return nested


def _as_mapping(value: Any) -> dict[str, Any]:
    """Expand a name to a mapping: ``--pretext dino`` is short for ``--pretext.name dino``."""
    return value if isinstance(value, dict) else {"name": value}


def _is_run_of(command: str, out: object) -> bool:
    """Whether a folder holds a run of this command with a ``config.yaml``."""
    from vissl_lite.run_folder import RUN_CONFIG
    from vissl_lite.run_record import read_record

    record = read_record(Path(out)) if isinstance(out, str) else None
    return (
        record is not None and record.command == command and (Path(str(out)) / RUN_CONFIG).is_file()
    )


def _read_config(file: Path, name: str | None = None) -> dict[str, Any]:
    from vissl_lite.data.yaml_file import read_yaml

    name = str(file) if name is None else name
    content = read_yaml(file, name)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{name} holds no options: expected a mapping from option names to values")
    if "config" in content:
        raise UserError(f"{name} names another config file: give each file with --config")
    return content


def _help(command: str, function: Callable[..., Any], layers: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of ``vissl-lite COMMAND --help``."""
    width = min(100, shutil.get_terminal_size().columns)
    rows = options_of(function).rows(layers)
    positional = [one.name for one in fields(options_of(function)) if not one.kw_only]
    words = [
        row.name.upper() if row.name in positional else f"--{row.name} {row.values}"
        for row in rows
        if row.required
    ]
    words += [
        f"[{row.name.upper()}]" for row in rows if row.name in positional and not row.required
    ]
    usage = " ".join([f"usage: vissl-lite {command}", *words, "[--option value ...]"])
    about = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    paragraphs = [usage, *about.split("\n\n")]
    lines = ["\n\n".join(textwrap.fill(one, width) for one in paragraphs), "", "options:"]
    epilog = options_of(function).epilog(layers)
    rows.append(
        OptionRow(
            "config",
            "FILE ...",
            None,
            False,
            "YAML files with options. Options on the command line take precedence.",
        )
    )
    for row in rows:
        default = "" if row.default is None else f" (default {row.default})"
        lines.append(f"  --{row.name} {row.values}".rstrip())
        indent = " " * 6
        lines.append(
            textwrap.fill(
                row.help + default, width, initial_indent=indent, subsequent_indent=indent
            )
        )
    return "\n".join([*lines, *(["", textwrap.fill(epilog, width)] if epilog else [])])
