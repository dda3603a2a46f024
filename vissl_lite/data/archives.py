"""Unpacking of archives of images, which may be damaged or malicious, beside the archive."""

import json
import logging
import os
import posixpath
import secrets
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from lzma import LZMAError
from pathlib import Path
from typing import IO

from vissl_lite.data.json_file import read_json
from vissl_lite.errors import MachineError, UserError, brief
from vissl_lite.faults import machine_error

log = logging.getLogger(__name__)

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

# File in an unpacked folder that identifies the files it came from.
MARKER = ".unpacked.json"
MAX_MARKER_BYTES = 2**24

# Number of bytes that must stay free on the disk.
RESERVE = 2**28

# Number of bytes that are copied at once.
CHUNK = 2**20

# What ``zipfile``, ``tarfile`` and the decompressors raise on damaged archives, beside an OSError
# without a number.
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    LZMAError,
    EOFError,
    ValueError,  # A member's name that no path can have; bz2.
    OverflowError,
    LookupError,
)


def is_archive(path: Path) -> bool:
    """Whether a path is a file whose name ends with one of ``SUFFIXES``."""
    return bool(_stem(path)) and path.is_file()


def _stem(path: Path) -> str:
    """The file name without the suffix of an archive; empty if it has none."""
    endings = [one for one in SUFFIXES if path.name.lower().endswith(one)]
    return path.name[: -len(max(endings, key=len))] if endings else ""


def unpack(archive: Path) -> Path:
    """Unpack an archive into a folder beside it: ``birds.zip`` into ``birds``.

    The folder appears only once it is complete. A folder that was unpacked from the same archive
    earlier, as its size and modification time say, is used again.

    Args:
        archive: File for which ``is_archive`` is true.

    Returns:
        The folder.

    Raises:
        UserError: The folder exists and is not from this archive, or cannot be created; the
            archive is damaged or encrypted; or a member is a device or leads out of the folder.
        MachineError: There is too little space on the disk.
    """
    folder = archive.with_name(_stem(archive))
    return unpack_beside(archive, [archive], folder, partial(_extract, archive))


def unpack_beside(
    source: Path, files: Sequence[Path], folder: Path, extract: Callable[[Path], None]
) -> Path:
    """Unpack files into a folder; see ``unpack``.

    Args:
        source: File or folder that was given, for messages.
        files: Files whose content is unpacked.
        folder: Folder to create.
        extract: Function that writes the content into an empty folder.

    Returns:
        The folder.

    Raises:
        UserError: The folder exists and is not from these files, or cannot be created; or
            ``extract`` fails.
        MachineError: There is too little space on the disk.
    """
    stats = {file.name: file.stat() for file in files}
    marker = {"files": {name: [one.st_size, one.st_mtime_ns] for name, one in stats.items()}}
    if os.path.lexists(folder):
        _check_earlier(folder, source, marker)
        return folder
    log.info("Unpacking %s into %s", source, folder)
    # Some characters suffice to recognize what a killed process leaves.
    part = folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir()
    except OSError as error:
        raise UserError(
            f"{source} can't be unpacked into {folder}: {error.strerror}: unpack it elsewhere, "
            f"and give the folder"
        ) from None
    try:
        extract(part)
        (part / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
        try:
            part.rename(folder)
        except OSError:
            if not os.path.lexists(folder):
                raise
            _check_earlier(folder, source, marker)  # Another process was faster.
    except OSError as error:
        raise machine_error(error) or UserError(
            f"{source} can't be unpacked: {brief(error)}"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _check_earlier(folder: Path, source: Path, marker: Mapping[str, object]) -> None:
    """Raise a UserError unless a folder was unpacked from these files."""
    try:
        earlier = read_json(folder / MARKER, MAX_MARKER_BYTES)
    except UserError:
        earlier = None
    if earlier != marker:
        raise UserError(
            f"{source} can't be unpacked: {folder} exists, and does not come from it: "
            f"give {folder} itself, or rename it"
        )
    log.info("%s is unpacked already: using %s", source, folder)


def _extract(archive: Path, folder: Path) -> None:
    try:
        if archive.name.lower().endswith(".zip"):
            _extract_zip(archive, folder)
        else:
            _extract_tar(archive, folder)
    except NotImplementedError as error:  # Deflate64, for example.
        raise UserError(
            f"{archive} can't be unpacked here ({brief(error)}): unpack it with another program, "
            f"and give the folder"
        ) from None
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        refused = getattr(error, "tarinfo", None)  # Of a tarfile.FilterError.
        if refused is not None:
            raise _unsafe(archive, refused.name, "is a device or leads out of the folder") from None
        raise UserError(
            f"{archive} is damaged ({brief(error) or type(error).__name__}): download it again, "
            f"or give a folder"
        ) from None


def _unsafe(archive: Path, member: str, why: str) -> UserError:
    return UserError(
        f"{archive} is not unpacked, because its member {brief(member)} {why}: give an archive of "
        f"plain files"
    )


def _extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        if any(one.flag_bits & 1 for one in members):
            raise UserError(
                f"{archive} is encrypted: unpack it with its password, and give the folder"
            )
        _check_space(archive, folder, sum(one.file_size for one in members))
        for one in members:
            name = _inside(archive, one.filename)
            if name == MARKER:
                continue
            if one.is_dir():
                (folder / name).mkdir(parents=True, exist_ok=True)
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with file.open(one) as source, (folder / name).open("wb") as target:
                _copy(source, target, archive, folder)


def _inside(archive: Path, name: str) -> str:
    """Normalize the name of a member, as tarfile's filter does: absolute names become relative."""
    name = posixpath.normpath(name.lstrip("/"))
    if ".." in name.split("/") or os.path.isabs(name) or os.path.splitdrive(name)[0]:
        raise _unsafe(archive, name, "leads out of the folder")
    return name


def _copy(source: IO[bytes], target: IO[bytes], archive: Path, folder: Path) -> None:
    while chunk := source.read(CHUNK):
        target.write(chunk)
        if len(chunk) == CHUNK:  # Small files were counted before.
            _check_space(archive, folder, 0)


def _extract_tar(archive: Path, folder: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            f"{archive} is not unpacked, as only Python 3.11.4 and newer can do it safely: unpack "
            f"it, and give the folder"
        )
    _check_space(archive, folder, archive.stat().st_size)  # The least that it can hold.
    links: set[str] = set()
    with tarfile.open(archive) as file:
        for one in file:
            name = posixpath.normpath(one.name.lstrip("/"))
            if name == MARKER:
                continue
            # The filter follows links that were unpacked before, which very long paths could
            # mislead (CVE-2025-4517).
            targets = [posixpath.normpath(one.linkname)] if one.islnk() else []
            if any(part in links for path in (name, *targets) for part in _parts(path)):
                raise _unsafe(archive, name, "is behind a link")
            if one.issym():
                links.add(name.casefold())
            _check_space(archive, folder, one.size)
            file.extract(one, folder, filter="data")
        _check_end(file)


def _parts(path: str) -> Iterator[str]:
    """A path and all folders on it, in lower case, as some file systems do not know cases."""
    path = path.casefold()
    while path and path not in (".", "/"):
        yield path
        path = posixpath.dirname(path)


def _check_end(file: tarfile.TarFile) -> None:
    """Raise a TarError unless a block of zeros ends a tar; ``tarfile`` stops at any other one."""
    assert file.fileobj is not None
    file.fileobj.seek(file.offset)
    block = file.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise tarfile.ReadError("it is cut short" if not any(block) else "a header is broken")


def _check_space(archive: Path, folder: Path, wanted: int) -> None:
    """Raise a MachineError if so many bytes do not fit on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if wanted + RESERVE > free:
        raise MachineError(
            f"{archive} can't be unpacked: {wanted / 1e9:.1f} GB are to be written, and "
            f"{free / 1e9:.1f} GB are free on that disk: free some space, or unpack it on another "
            f"disk, and give the folder"
        )
