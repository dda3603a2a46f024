"""Reading of NPZ files that may be damaged or malicious."""

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from vissl_lite.errors import UserError

# What NumPy and zipfile raise on a file that is none of theirs, or damaged
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    RuntimeError,
    SyntaxError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    AssertionError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


def read_npz(file: Path, largest: int | None = None) -> dict[str, np.ndarray]:
    """Read all arrays of an NPZ file; nothing is unpickled.

    Args:
        file: File from ``numpy.savez`` or ``numpy.savez_compressed``.
        largest: Bytes that the arrays may take together; default those of the file, as of one that
            is not compressed.

    Raises:
        UserError: It is missing or damaged, holds pickled objects, or takes more than that.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    try:
        most = file.stat().st_size if largest is None else largest
        with zipfile.ZipFile(file) as archive:
            # zipfile reads no more of a member than this
            size = sum(member.file_size for member in archive.infolist())
        if size > most:
            raise ValueError(f"it would take {size} bytes, more than {most}")
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray) or array.size > array.nbytes:
                raise ValueError(f"{name} is not an array")
    except _UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise UserError(f"{file} is damaged: {reason}") from None
    return arrays
