"""Unpacking of archives into a folder beside them."""

import json
import logging
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.json_file import read_json
from vissl_lite.errors import MachineError, UserError

log = logging.getLogger(__name__)

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

# Hidden file in an unpacked folder that says what it was unpacked from.
MARKER = ".unpacked.json"

# Limits of an archive: number of files, and share of the free disk space.
MAX_MEMBERS, MAX_DISK_SHARE = 20_000_000, 0.9

# What a damaged archive raises.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError)


def is_archive(file: Path) -> bool:
    """Whether the name of a file is that of an archive that ``unpack`` reads."""
    return file.name.lower().endswith(ARCHIVES)


def unpack(archive: Path) -> Path:
    """Unpack an archive into the folder beside it that has its name without the suffix.

    An archive that was unpacked before, and has the same size and modification time, is not
    unpacked again.

    Args:
        archive: A .zip file, or a .tar file, also compressed.

    Returns:
        The folder.

    Raises:
        UserError: The archive is damaged, encrypted or unsafe, or the folder holds something else.
        MachineError: The disk is too small, or the folder can't be written.
    """
    suffix = max((end for end in ARCHIVES if archive.name.lower().endswith(end)), key=len)
    folder = archive.with_name(archive.name[: -len(suffix)])
    extract = _extract_zip if suffix == ".zip" else _extract_tar
    return unpack_beside([archive], folder, lambda target: extract(archive, target))


def unpack_beside(sources: Sequence[Path], folder: Path, extract: Callable[[Path], None]) -> Path:
    """Extract files into a folder, unless it holds what was extracted from the same files before.

    Args:
        sources: Files that are extracted.
        folder: Folder to make; it appears when it is complete.
        extract: Function that writes the content into an empty folder.

    Returns:
        The folder.

    Raises:
        UserError: A source is damaged, or the folder holds something else.
        MachineError: The folder can't be written.
    """
    source = str(sources[0] if len(sources) == 1 else sources[0].parent)
    stats = [(file, file.stat()) for file in sources]
    origin = {file.name: [one.st_size, one.st_mtime_ns] for file, one in stats}
    if (folder / MARKER).is_file() and read_json(folder / MARKER) == origin:
        log.info("%s was unpacked to %s before: this is read", source, folder)
        return folder
    if folder.exists():
        raise UserError(
            f"{source} would be unpacked to {folder}, which exists and holds something else: give "
            f"that folder, or rename it"
        )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        temporary.mkdir()
        extract(temporary)
        write_atomically(temporary / MARKER, json.dumps(origin))
        temporary.rename(folder)
    except _DAMAGED as error:
        raise UserError(f"{source} can't be unpacked: {error}") from None
    except OSError as error:
        raise MachineError(
            f"{source} can't be unpacked to {folder}: {error.strerror or error}; unpack it "
            f"elsewhere and give the folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("%s is unpacked to %s", source, folder)
    return folder


def _check_size(size: int, count: int, target: Path) -> None:
    """Raise an error if the content of an archive doesn't fit the disk."""
    if count > MAX_MEMBERS:
        raise UserError(f"an archive with {count} files is not unpacked: {MAX_MEMBERS} are allowed")
    free = shutil.disk_usage(target).free
    if size > MAX_DISK_SHARE * free:
        raise MachineError(
            f"the archive holds {size / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB of the "
            f"disk are free: make room, or unpack what you need elsewhere and give the folder"
        )


def _extract_tar(archive: Path, target: Path) -> None:
    # The filter refuses members outside of the folder, links that lead out, and devices (PEP 706).
    with tarfile.open(archive) as opened:
        members = [one for one in opened if one.isfile()]
        _check_size(sum(one.size for one in members), len(members), target)
        for one in members:
            opened.extract(one, target, filter="data")


def _extract_zip(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = [one for one in opened.infolist() if not one.is_dir()]
        _check_size(sum(one.file_size for one in members), len(members), target)
        for one in members:
            path = PurePosixPath(one.filename.replace("\\", "/"))
            kind = stat.S_IFMT(one.external_attr >> 16)
            if path.is_absolute() or ".." in path.parts or kind not in (0, stat.S_IFREG):
                raise UserError(
                    f"{archive} has the member {one.filename}, which is not a file inside of it"
                )
            if one.flag_bits & 1:
                raise UserError(f"{archive} is encrypted: unpack it, and give the folder")
            file = target / path
            file.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(one) as content, file.open("xb") as out:
                _copy(content, out, one.file_size)


def _copy(content: IO[bytes], out: IO[bytes], size: int) -> None:
    """Copy no more than the size that the archive states."""
    shutil.copyfileobj(content, out)
    if out.tell() > size:
        raise UserError("an archive holds more than it states")
