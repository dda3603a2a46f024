"""Open a run folder, and read and write its options, results and log."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.json_file import read_json
from vissl_lite.data.yaml_file import read_yaml
from vissl_lite.errors import MachineError, Terminated, UserError
from vissl_lite.faults import machine_error
from vissl_lite.log import ConsoleHandler, logged_to, logged_to_run
from vissl_lite.run_folder import RUN_CONFIG, check_folder, written_by
from vissl_lite.run_record import read_record

log = logging.getLogger("vissl_lite")
console = Console(stderr=True)

RESULTS, METRICS, LOG = "results.json", "metrics.csv", "log.txt"
CHECKPOINTS, CHECKPOINT = "checkpoints", "last.ckpt"
MAP = "map.npz"

LARGEST_RESULTS = 64 * 2**20  # Maximum size of results.json in bytes.


def is_main_process() -> bool:
    """Whether this process writes files; with several processes, only rank 0 does."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return os.environ[name] == "0"
    return True


def check_out(
    out: Path,
    inputs: Sequence[tuple[str, str | Sequence[str] | None]] = (),
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
) -> bool:
    """Check that a run may be written to a folder; see ``check_folder``.

    Args:
        out: Folder to write to.
        inputs: Pairs of an option and the path or paths that it names; None is skipped.
        resume: Whether to continue an existing run.
        overwrite: Whether to replace an existing run.
        command: Name of the command, if it can resume runs.

    Returns:
        True if there is a run to continue, False if a new one begins.

    Raises:
        UserError: If the folder must not be written to. Nothing is changed.
    """
    if not is_main_process():
        return resume and (out / RUN_CONFIG).is_file()
    named = [
        (option, one)
        for option, given in inputs
        for one in ([given] if isinstance(given, str) else given or ())
    ]
    return check_folder(out, named, resume, overwrite, command)


@contextmanager
def open_run(
    out: Path, command: str, config: Mapping[str, Any], resume: bool = False
) -> Iterator[Path]:
    """Create the folder of a run, or replace an older run, write ``config.yaml``, start the log.

    Args:
        out: Folder of the run, checked by ``check_out`` before.
        command: Name of the command that writes the run.
        config: Options that reproduce the run.
        resume: Whether to keep existing files and append to them.

    Yields:
        The folder.

    Raises:
        UserError: If another process writes to the folder.
        MachineError: If the machine fails, for example because a disk is full.
    """
    if not is_main_process():
        yield out
        return
    try:
        with written_by(command, out, resume) as run, logged_to_run(run, console):
            if not resume:
                write_config(out, config)
            record = run.record
            used = {"vissl-lite": record.version, **record.environment}
            log.debug("%s", ", ".join(f"{name} {value}" for name, value in used.items()))
            yield out
    except (KeyboardInterrupt, Terminated) as error:
        error.add_note(_how_to_continue(command, out))
        raise
    except Exception as error:
        fault = None if _is_user_mistake(error) else machine_error(error, out)
        if fault is None:
            raise
        raise MachineError(f"{fault}; {_how_to_continue(command, out)}") from error


def is_finished(out: Path) -> bool:
    """Whether a run has finished and its results exist."""
    record = read_record(out)
    return record is not None and record.status == "finished" and (out / RESULTS).is_file()


def say_finished(out: Path) -> None:
    """Print that there is nothing to resume."""
    words = f"Nothing is left to resume: the run {out} is finished"
    console.print(words, highlight=False, markup=False, soft_wrap=True)


def _is_user_mistake(error: Exception) -> bool:
    return isinstance(error, UserError) and not isinstance(error, MachineError)


def _how_to_continue(command: str, run: Path) -> str:
    """Describe what is kept of a run that ended early, and how to continue it."""
    if command in ("pretrain", "finetune"):
        if next((run / CHECKPOINTS).rglob(CHECKPOINT), None) is not None:
            return (
                f"the training up to its last checkpoint is kept in {run}: the same command "
                f"with --resume continues it"
            )
        return (
            f"no checkpoint of {run} was written yet: the same command with --resume starts "
            f"it again"
        )
    if command == "compare":
        return (
            f"what has finished is kept in {run}: the same command with --resume continues "
            f"from there"
        )
    return f"{run} is not finished: the same command with --overwrite starts again"


@contextmanager
def show_warnings_early() -> Iterator[None]:
    """Print warnings immediately although no run is open yet; its log gets them later."""
    if not is_main_process():
        yield
        return
    handler = ConsoleHandler(console, logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def logged_to_console() -> Iterator[None]:
    """Log to the console only, for commands that write a single file instead of a run."""
    with logged_to(ConsoleHandler(console, logging.INFO)):
        yield


def beside(run: Path, suffix: str) -> Path:
    """Suggest a folder for a follow-up run, such as ``runs/a-probe`` for ``runs/a``."""
    named = run if run.name else run.absolute()  # Path(".") has no name.
    return named.with_name(f"{named.name}-{suffix}")


def write_config(out: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.yaml``, the options that reproduce the run, plain data."""
    write_atomically(out / RUN_CONFIG, yaml.safe_dump(dict(config), sort_keys=False))


def read_config(out: Path) -> dict[str, Any]:
    """Read ``config.yaml``, the options of a run.

    Raises:
        UserError: If the file is missing or damaged.
    """
    file = out / RUN_CONFIG
    if not file.is_file():
        raise UserError(f"{out} holds no run to resume ({RUN_CONFIG} is missing)")
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds no parameters")
    return {str(name): value for name, value in content.items()}


def write_results(run: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``."""
    write_atomically(run / RESULTS, json.dumps(results, indent=2) + "\n")


def read_results(run: Path, *needed: str) -> dict[str, Any]:
    """Read ``results.json``.

    Args:
        run: Run folder.
        needed: Keys that the file must contain.

    Raises:
        UserError: If the file is missing or damaged.
    """
    found = read_json(run / RESULTS, LARGEST_RESULTS)
    if not isinstance(found, dict) or any(name not in found for name in needed):
        raise UserError(f"{run / RESULTS} is damaged: it does not hold {', '.join(needed)}")
    return found


def logged_warnings(run: Path) -> list[str]:
    """Return the warnings of a run, including those before a resume; each message once."""
    record = read_record(run)
    return [] if record is None else [one.message for one in record.warnings]
