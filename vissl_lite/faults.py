"""What a machine refuses, such as room on a full disk, in one sentence."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vissl_lite.errors import MachineError

_MEMORY = (
    "there is too little memory: give a smaller --batch_size or --image_size, fewer --num_workers, "
    "or close other programs"
)

# By the number of an OSError. Libraries that are not written in Python give its words alone.
_REFUSED = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "a file grew beyond the limit on file sizes: raise it (ulimit -f)",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n), or give fewer "
    "--num_workers",
    errno.ENFILE: "the machine has too many open files: close other programs",
    errno.EROFS: "the disk can only be read: give an --out on another one",
    errno.EIO: "the disk does not work (input/output error)",
    errno.ESTALE: "the network file system has lost the file",
    errno.ENOMEM: _MEMORY,
}

# What torch, oneDNN and C++ say where memory can't be had.
_NO_MEMORY = re.compile(
    "can't allocate memory|std::bad_alloc|out of memory|could not create a (?:primitive|memory)$",
    re.MULTILINE,
)

# What other libraries say, and what it means.
_SAID = (
    (
        r"shared memory",
        "/dev/shm is full: enlarge it (docker run --shm-size), or give --num_workers 0",
    ),
    (_NO_MEMORY, _MEMORY),
    (
        r"PytorchStreamWriter failed|file write failed|unexpected pos",
        "a file can't be written: the disk is full, or the file would grow beyond the limit on "
        "file sizes (ulimit -f)",
    ),
    (r"received \d+ items of ancdata", _REFUSED[errno.EMFILE]),
)

_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) "
    r"(?:is killed by signal: (?P<signal>[\w ]+)|exited unexpectedly)"
)


def says_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a CPU or a GPU."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return _NO_MEMORY.search(str(error)) is not None


def machine_error(error: BaseException, written: Path | None = None) -> MachineError | None:
    """The fault of the machine behind an error, in one sentence.

    Args:
        error: with what caused it.
        written: a folder that was being written: what goes wrong with a file in it is a fault, too.

    Returns:
        None where the error is none of the machine's.
    """
    if isinstance(error, MachineError):
        return error
    for one in _causes(error):
        text = str(one)
        file = one.filename if isinstance(one, OSError) else None
        where = f"{file}: " if isinstance(file, str) else ""
        worker = _WORKER.search(text)
        if worker is not None:
            how = f" by the signal {worker['signal']}" if worker["signal"] else ""
            return MachineError(
                f"a data worker was ended{how}, as systems do when memory runs out: give fewer "
                f"--num_workers (0 for none), or a smaller --batch_size"
            )
        if isinstance(one, MemoryError):
            return MachineError(_MEMORY)
        if isinstance(one, OSError) and one.errno in _REFUSED:
            return MachineError(f"{where}{_REFUSED[one.errno]}")
        for pattern, meaning in _SAID:
            if re.search(pattern, text):
                return MachineError(meaning)
        for number, meaning in _REFUSED.items():
            if not isinstance(one, OSError) and os.strerror(number) in text:
                return MachineError(meaning)
        if written is not None and isinstance(file, str) and Path(file).is_relative_to(written):
            return MachineError(f"{where}can't be written: {one.strerror}")  # type: ignore[attr-defined]
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it: what came first is closest to the fault."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    yield from reversed(chain)
