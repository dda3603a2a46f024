"""The folder of a run: whose it is, which of its files per run wrote, and who may write to it.

``run.json`` is written first and marks a folder as a run. A folder without it is never written
over, and of a folder with it only files that a run writes are removed.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path

from vissl_lite.data.atomic_file import check_place
from vissl_lite.errors import Terminated, UserError
from vissl_lite.run_record import (
    RUN,
    RunFile,
    RunRecord,
    Status,
    device_name,
    environment,
    read_record,
)

try:
    import fcntl
except ImportError:  # Windows: there, nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

LOCK, CONFIG = ".lock", "config.yaml"

# What a run writes, relative to its folder. ``*`` stands for a name, ``**`` for folders.
_TRAINING = (
    "checkpoints/last.ckpt",
    "encoder/config.json",
    "encoder/model.safetensors",
    "cache.bin",
    "fingerprints.npz",
    "fingerprints/*.bin",
    "fingerprints/*.names",
    "sample/*",
    "metrics.csv",
    "model/config.json",
    "model/model.safetensors",
    "model/head.json",
    "model/head.safetensors",
    "model/encoder/config.json",
    "model/encoder/model.safetensors",
    "tensorboard/events.out.*",
    "tensorboard/hparams.yaml",
    "wandb/**/*",
    "mlruns/**/*",
)
_RESULTS = (
    RUN,
    LOCK,
    CONFIG,
    "log.txt",
    "results.json",
    "report.html",
    "map.npz",
    "leaks.csv",
    "split.csv",
    "classes.txt",
    "split/*.json",
    "runs.csv",
    "runs/*/*.json",
    "runs/*/*.csv",
    "predictions.csv",
    "predictions.json",
    "masks.csv",
    "masks/**/*.png",
    "pictures/**/*.png",
    *(
        f"{name}.png"
        for name in (
            "compare",
            "confusion",
            "curves",
            "neighbors",
            "per_class",
            "pretext",
            "test",
            "views",
        )
    ),
)
_SAMPLE = (
    "README.md",
    "classes.txt",
    "sample.json",
    "unlabelled/*.jpg",
    "annotations/*.json",
    "labelled/*/*/*.jpg",
    "masks/*/*/*.png",
)
OWNED = (
    *_RESULTS,
    *_TRAINING,
    *(f"{part}/{name}" for part in ("pretrain", "compare") for name in (*_RESULTS, *_TRAINING)),
    *(f"data/{name}" for name in _SAMPLE),  # these are of demo
)

# What a process that ended at once may leave before there is a run.
_BEFORE_A_RUN = frozenset({LOCK, f"{RUN}.part"})

_held: set[str] = set()  # folders that this process writes to


def check_folder(
    out: Path,
    inputs: Sequence[tuple[str, str]] = (),
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
) -> bool:
    """Refuse a folder that a run must not be written to. Nothing is changed yet.

    Args:
        out: the folder.
        inputs: options and what they name, which the run reads: ``("data", "photos")``.
        resume: whether to continue what is there.
        overwrite: whether to replace it.
        command: the one that writes, if it can continue a run.

    Returns:
        Whether there is a run to continue; else a new one begins.

    Raises:
        UserError: the folder holds other files or a run that is neither to be continued nor to be
            replaced, another process writes to it, an input lies in it or it in an input, or it
            can't be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: --out must name a folder")
    check_place(out)
    check_apart(out, inputs)
    try:
        names = set(os.listdir(out)) if out.is_dir() else set()
    except OSError as error:
        raise UserError(f"{out} can't be read: {error.strerror}") from None
    record = read_record(out)
    if record is None:
        if names - _BEFORE_A_RUN:
            advice = "" if not overwrite else ", and --overwrite replaces runs of vissl-lite alone"
            raise UserError(f"{out} holds other files{advice}: give a new folder with --out")
        return False
    if is_locked(out):
        raise UserError(f"another process is writing to {out}: wait for it, or give another --out")
    if resume and command is not None and record.command != command:
        raise UserError(
            f"{out} holds a run of {record.command}, which {command} can't resume: "
            f"give another --out"
        )
    if resume:
        return (out / CONFIG).is_file()  # a run that was killed before that has done nothing yet
    if not overwrite:
        again = f"{out} holds another run: give a new folder, or --overwrite"
        if record.status != "finished" and record.command == command:
            again = (
                f"{out} holds a run that has not finished: --resume continues it, --overwrite "
                f"replaces it"
            )
        raise UserError(again)
    return False


def check_apart(out: Path, inputs: Sequence[tuple[str, str]]) -> None:
    """Raise a UserError if a folder to be written lies in what is read, or the other way round.

    Args:
        out: the folder to be written.
        inputs: options and the files or folders that they name; what does not exist, such as URLs
            and names of backbones, is passed over. Of a text file of paths, the paths count too.
    """
    own = os.path.realpath(out)
    for option, given in inputs:
        if not given or not os.path.exists(given):
            continue
        there = os.path.realpath(given)
        if there == own or Path(there).is_relative_to(own):
            raise UserError(
                f"--{option} {given} lies in --out {out}, which is to be written: give "
                f"another --out"
            )
        if os.path.isdir(there) and Path(own).is_relative_to(there):
            raise UserError(
                f"--out {out} lies in --{option} {given}, which is to be read: give an "
                f"--out outside it"
            )
        listed = _first_inside(there, own) if there.endswith(".txt") else None
        if listed is not None:
            raise UserError(
                f"--{option} {given} names {listed}, which lies in --out {out}: give another --out"
            )


def _first_inside(file: str, folder: str) -> str | None:
    """The first path in a text file that lies in a folder."""
    if not os.path.isfile(file):
        return None
    start, beside = os.path.join(folder, ""), os.path.dirname(file)
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            path = line.strip()
            whole = os.path.normpath(os.path.join(beside, path))
            if path and not path.startswith("#") and whole.startswith(start):
                return path
    return None


@contextmanager
def written_by(command: str, out: Path, resume: bool = False) -> Iterator[RunFile]:
    """Make a folder per run, or keep it one, and write down how the run ends.

    Args:
        command: who writes it.
        out: checked by ``check_folder``; it is used as it is if it exists.
        resume: keep what is there; else what an earlier run wrote is removed.

    Yields:
        Its ``run.json``.

    Raises:
        UserError: another process writes to it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        before = read_record(out) if resume else None
        if not resume:
            remove_run(out)
        now = datetime.now().astimezone().isoformat("T", "seconds")
        record = RunRecord(command, started=now, environment=environment())
        if before is not None:
            record = replace(
                record,
                started=before.started or now,
                seconds=before.seconds,
                warnings=before.warnings,
            )
        run = RunFile(out, record)
        run.write()

        def end(status: Status, reason: str | None = None) -> None:
            run.record.environment["device"] = device_name()
            # of a full disk, the error that ends the run tells already
            with nullcontext() if status == "finished" else suppress(OSError):
                run.write(status, reason)

        try:
            yield run
        except (KeyboardInterrupt, Terminated) as error:
            end("stopped", str(error) or "interrupted (Ctrl-C)")
            raise
        except BaseException as error:
            end("failed", " ".join(str(error).split()) or type(error).__name__)
            raise
        end("finished")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder; the system frees it when a process ends.

    Args:
        folder: it exists; gets the file ``.lock``, which stays: it means nothing by itself.

    Raises:
        UserError: another process has locked it, or this one.
    """
    real = os.path.realpath(folder)
    refusal = UserError(
        f"another process is writing to {folder}: wait for it, or give another --out"
    )
    if real in _held:
        raise refusal
    # A lock of POSIX's kind (lockf): data workers, which are forks of this process, do not keep it.
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held.add(real)
    try:
        if fcntl is not None:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise refusal from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        _held.discard(real)
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process, perhaps this one, is writing to a folder.

    Args:
        folder: a run.
    """
    if os.path.realpath(folder) in _held:
        return True
    try:  # for reading alone, so that runs of others and on read-only disks can be asked too
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)


def remove_run(folder: Path) -> None:
    """Remove the files that a run writes; folders that are then empty go with them.

    Other files, links to folders, and the folder itself stay.

    Args:
        folder: a run, locked.
    """
    files = [name for name in _files_of_run(folder) if name not in (LOCK, RUN)]
    for name in [*files, RUN]:  # as long as there is anything left of it, it is a run
        with suppress(FileNotFoundError):
            os.unlink(folder / name)
    inside = {parent for name in files for parent in Path(name).parents} - {Path()}
    for emptied in sorted(inside, key=lambda one: len(one.parts), reverse=True):
        with suppress(OSError):  # not empty, or a link
            os.rmdir(folder / emptied)


def _files_of_run(folder: Path) -> list[str]:
    """The files in a folder that a run writes, relative to it."""
    exact = [name for name in OWNED if "*" not in name]
    # through a link to a folder too, such as of checkpoints on a larger disk
    found = [n for name in exact for n in (name, f"{name}.part") if os.path.lexists(folder / n)]
    for root, _, names in os.walk(folder):
        base = os.path.relpath(root, folder)
        paths = (name if base == "." else f"{base}/{name}" for name in names)
        found += [path for path in paths if _owned().fullmatch(path)]
    return list(dict.fromkeys(found))


@cache
def _owned() -> "re.Pattern[str]":
    """What matches the path of a file that a run writes."""
    pieces = {"**/": "(?:[^/]+/)*", "*": "[^/]*"}
    patterns = (
        "".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*)", name))
        for name in OWNED
    )
    return re.compile(f"(?:{'|'.join(patterns)})(?:\\.part)?", re.DOTALL)
