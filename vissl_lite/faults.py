"""Detect machine errors, such as a full disk, and describe them in one sentence."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vissl_lite.errors import MachineError

_OUT_OF_MEMORY = (
    "there is too little memory: give a smaller --batch_size or --image_size, fewer --num_workers, "
    "or close other programs"
)

# By errno. Libraries that are not written in Python report only the text of the error.
_SYSTEM_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "a file grew beyond the limit on file sizes: raise it (ulimit -f)",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n), or give fewer "
    "--num_workers",
    errno.ENFILE: "the machine has too many open files: close other programs",
    errno.EROFS: "the disk can only be read: give an --out on another one",
    errno.EIO: "the disk does not work (input/output error)",
    errno.ESTALE: "the network file system has lost the file",
    errno.ENOMEM: _OUT_OF_MEMORY,
}

# Messages of torch, oneDNN and C++ when an allocation fails.
_ALLOCATION_FAILED = re.compile(
    "can't allocate memory|std::bad_alloc|out of memory|could not create a (?:primitive|memory)$",
    re.MULTILINE,
)

# Messages of other libraries, and their explanations.
_LIBRARY_ERRORS = (
    (
        r"shared memory",
        "/dev/shm is full: enlarge it (docker run --shm-size), or give --num_workers 0",
    ),
    (_ALLOCATION_FAILED, _OUT_OF_MEMORY),
    (
        r"PytorchStreamWriter failed|file write failed|unexpected pos",
        "a file can't be written: the disk is full, or the file would grow beyond the limit on "
        "file sizes (ulimit -f)",
    ),
    (r"received \d+ items of ancdata", _SYSTEM_ERRORS[errno.EMFILE]),
)

_WORKER_DIED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) "
    r"(?:is killed by signal: (?P<signal>[\w ]+)|exited unexpectedly)"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an allocation failed, on a CPU or a GPU."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return _ALLOCATION_FAILED.search(str(error)) is not None


def machine_error(error: BaseException, written: Path | None = None) -> MachineError | None:
    """Find the machine error behind an exception.

    Args:
        error: The exception; its causes and contexts are searched too.
        written: Folder that was being written. Any ``OSError`` about a file in it counts.

    Returns:
        The error with a one-sentence message, or None if the machine is not the cause.
    """
    if isinstance(error, MachineError):
        return error
    for one in _causes(error):
        text = str(one)
        file = one.filename if isinstance(one, OSError) else None
        where = f"{file}: " if isinstance(file, str) else ""
        worker = _WORKER_DIED.search(text)
        if worker is not None:
            return worker_ended(f" by the signal {worker['signal']}" if worker["signal"] else "")
        if isinstance(one, MemoryError):
            return MachineError(_OUT_OF_MEMORY)
        if isinstance(one, OSError) and one.errno in _SYSTEM_ERRORS:
            return MachineError(f"{where}{_SYSTEM_ERRORS[one.errno]}")
        for pattern, explanation in _LIBRARY_ERRORS:
            if re.search(pattern, text):
                return MachineError(explanation)
        for number, explanation in _SYSTEM_ERRORS.items():
            if not isinstance(one, OSError) and os.strerror(number) in text:
                return MachineError(explanation)
        if written is not None and isinstance(file, str) and Path(file).is_relative_to(written):
            return MachineError(f"{where}can't be written: {one.strerror}")  # type: ignore[attr-defined]
    return None


def worker_ended(how: str = "") -> MachineError:
    """The error for a data worker that has ended before its work was done."""
    return MachineError(
        f"a data worker was ended{how}, as systems do when memory runs out: give fewer "
        f"--num_workers (0 for none), or a smaller --batch_size"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the chain of causes of an error, the root cause first."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    yield from reversed(chain)
