"""Ownership of a run folder: which files belong to a run, its lock, and safe overwriting.

``run.json`` is written first and marks a folder as a run. A folder without it is never
overwritten; in a folder with it, only files that a run writes are removed.
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
except ImportError:  # Windows, where run folders are not locked.
    fcntl = None  # type: ignore[assignment]

LOCK, RUN_CONFIG = ".lock", "config.yaml"

# Files that a run writes, relative to its folder. ``*`` matches a name, ``**`` any folders.
_TRAINING = (
    "checkpoints/last.ckpt",  # listed, so that it is found behind a link
    "checkpoints/**/last.ckpt",
    "encoder/config.json",
    "encoder/model.safetensors",
    "cache.bin",
    "teacher.safetensors",
    "fingerprints.npz",
    "fingerprints/*.bin",
    "fingerprints/*.names",
    "sample/*",
    "sample.part/*",
    "metrics.csv",
    "lr-*.csv",
    "refit.csv",
    "model/config.json",
    "model/model.safetensors",
    "model/confidence.json",
    "model/trained_on.txt",
    "model/fingerprints.npz",
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
    RUN_CONFIG,
    "log.txt",
    "results.json",
    "report.html",
    "label.html",
    "map.npz",
    "leaks.csv",
    "split.csv",
    "split_masks/*.png",
    "classes.txt",
    "split/*.json",
    "runs.csv",
    "runs/*/*.json",
    "runs/**/*.csv",
    "predictions.csv",
    "predictions.json",
    "predictions.jsonl",
    "selected.csv",
    "to_label.csv",
    "to_label.json",
    "pseudo_labels.csv",
    "pseudo_labels.json",
    "unlabelled.txt",
    "trained_on.txt",
    "rounds/*/*.csv",
    "rounds/*/classes.txt",
    "rounds/*/pseudo_labels.json",
    "rounds/*/masks/**/*.png",
    "rounds/*/checkpoints/**/last.ckpt",
    "masks.csv",
    "masks/**/*.png",
    "masks/**/*.nii.gz",
    "masks/**/*.tif",
    "pictures/**/*.png",
    *(
        f"{name}.png"
        for name in (
            "compare",
            "confusion",
            "curves",
            "labels",
            "neighbors",
            "per_class",
            "pretext",
            "selected",
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
    "unlabelled/*.npy",
    "annotations/*.json",
    "labelled/*/*/*.jpg",
    "labelled/*/*/*.npy",
    "masks/*/*/*.png",
)
OWNED = (
    *_RESULTS,
    *_TRAINING,
    *(f"{part}/{name}" for part in ("pretrain", "compare") for name in (*_RESULTS, *_TRAINING)),
    *(f"data/{name}" for name in _SAMPLE),  # Written by demo.
)

# Files that a process may leave if it is killed before it has written run.json.
_LEFTOVERS = frozenset({LOCK, f"{RUN}.part"})

_locked_here: set[str] = set()  # Folders that this process has locked.


def check_folder(
    out: Path,
    inputs: Sequence[tuple[str, str]] = (),
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
) -> bool:
    """Check that a run may be written to a folder, without changing anything.

    Args:
        out: Folder to write to.
        inputs: Pairs of an option and a path that the run reads, such as ``("data", "photos")``.
        resume: Whether to continue an existing run.
        overwrite: Whether to replace an existing run.
        command: Name of the command, if it can resume runs.

    Returns:
        True if there is a run to continue, False if a new one begins.

    Raises:
        UserError: If the folder holds other files, or a run that is neither resumed nor
            overwritten, if another process writes to it, if an input lies inside it or it lies
            inside an input, or if it is not writable.
    """
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it: give one of them")
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
        if names - _LEFTOVERS:
            advice = "" if not overwrite else ", and --overwrite replaces runs of vissl-lite only"
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
        return (out / RUN_CONFIG).is_file()  # A run that was killed earlier has not done any work.
    if not overwrite:
        message = f"{out} holds another run: give a new folder, or --overwrite"
        if record.status != "finished" and record.command == command:
            message = (
                f"{out} holds a run that has not finished: --resume continues it, --overwrite "
                f"replaces it"
            )
        raise UserError(message)
    return False


def check_apart(out: Path, inputs: Sequence[tuple[str, str]]) -> None:
    """Raise a UserError if the output folder lies inside an input, or an input inside it.

    Args:
        out: Folder to write to.
        inputs: Pairs of an option and the file or folder that it names. Values that do not exist
            as files, such as URLs and backbone names, are skipped. The paths in a text file of
            paths are checked too.
    """
    target = os.path.realpath(out)
    for option, given in inputs:
        if not given or not os.path.exists(given):
            continue
        source = os.path.realpath(given)
        if source == target or Path(source).is_relative_to(target):
            raise UserError(
                f"--{option} {given} lies in --out {out}, which is to be written: give "
                f"another --out"
            )
        if os.path.isdir(source) and Path(target).is_relative_to(source):
            raise UserError(
                f"--out {out} lies in --{option} {given}, which is to be read: give an "
                f"--out outside it"
            )
        listed = _first_inside(source, target) if source.endswith(".txt") else None
        if listed is not None:
            raise UserError(
                f"--{option} {given} names {listed}, which lies in --out {out}: give another --out"
            )


def _first_inside(file: str, folder: str) -> str | None:
    """Return the first path in a text file that lies inside a folder."""
    if not os.path.isfile(file):
        return None
    start, beside = os.path.join(folder, ""), os.path.dirname(file)
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            path = line.strip()
            full = os.path.normpath(os.path.join(beside, path))
            if path and not path.startswith("#") and full.startswith(start):
                return path
    return None


@contextmanager
def written_by(command: str, out: Path, resume: bool = False) -> Iterator[RunFile]:
    """Create or continue a run folder, lock it, and record in ``run.json`` how the run ends.

    Args:
        command: Name of the command that writes the run.
        out: Folder of the run, checked by ``check_folder`` before. An existing one is reused.
        resume: Whether to keep the files of an earlier run; otherwise they are removed.

    Yields:
        The open ``run.json``.

    Raises:
        UserError: If another process writes to the folder.
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
            # A full disk is reported by the error that ends the run.
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
    """Lock a folder against other writers. The system releases the lock when the process ends.

    Args:
        folder: Existing folder. The file ``.lock`` is created in it and is not removed; its
            presence alone does not mean that the folder is locked.

    Raises:
        UserError: If this or another process has locked the folder.
    """
    real = os.path.realpath(folder)
    refusal = UserError(
        f"another process is writing to {folder}: wait for it, or give another --out"
    )
    if real in _locked_here:
        raise refusal
    # Data workers, which are forks of this process, do not inherit a POSIX lock (lockf).
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _locked_here.add(real)
    try:
        if fcntl is not None:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise refusal from None
            except OSError:  # The file system does not support locks.
                pass
        yield
    finally:
        _locked_here.discard(real)
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether this or another process is writing to a run folder.

    Args:
        folder: Run folder.
    """
    if os.path.realpath(folder) in _locked_here:
        return True
    try:  # Read-only, so that it works for runs of other users and on read-only disks.
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # The file system does not support locks.
        return False
    finally:
        os.close(descriptor)


def remove_run(folder: Path) -> None:
    """Remove the files that a run writes, and folders that are empty afterwards.

    Other files, links to folders, and the folder itself are kept.

    Args:
        folder: Run folder, locked.
    """
    files = [name for name in _files_of_run(folder) if name not in (LOCK, RUN)]
    for name in [*files, RUN]:  # run.json is removed last, so the folder stays a run until then.
        with suppress(FileNotFoundError):
            os.unlink(folder / name)
    inside = {parent for name in files for parent in Path(name).parents} - {Path()}
    for emptied in sorted(inside, key=lambda one: len(one.parts), reverse=True):
        with suppress(OSError):  # The folder is not empty, or is a link.
            os.rmdir(folder / emptied)


def _files_of_run(folder: Path) -> list[str]:
    """List the files in a folder that belong to a run, relative to the folder."""
    exact = [name for name in OWNED if "*" not in name]
    # Also through links to folders, such as checkpoints on a larger disk.
    found = [n for name in exact for n in (name, f"{name}.part") if os.path.lexists(folder / n)]
    for root, _, names in os.walk(folder):
        base = os.path.relpath(root, folder)
        paths = (name if base == "." else f"{base}/{name}" for name in names)
        found += [path for path in paths if _owned_pattern().fullmatch(path)]
    return list(dict.fromkeys(found))


@cache
def _owned_pattern() -> "re.Pattern[str]":
    """Compile ``OWNED`` to a regular expression for paths relative to the run folder."""
    pieces = {"**/": "(?:[^/]+/)*", "*": "[^/]*"}
    patterns = (
        "".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*)", name))
        for name in OWNED
    )
    return re.compile(f"(?:{'|'.join(patterns)})(?:\\.part)?", re.DOTALL)
