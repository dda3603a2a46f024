"""Sequential reader of untrusted tar files.

Nothing is written to disk, so names, links and devices are harmless. Sizes in headers are not
trusted before the bytes have been read: Python's ``tarfile`` allocates the size that a header
states, and loops or recurses on some damaged ones (CVE-2024-6232, CVE-2025-8194).

The format: POSIX.1-2017, "pax", section "EXTENDED DESCRIPTION"; GNU tar's manual, "Basic Tar
Format", for long names, large numbers and sparse files.
"""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from typing import IO, Any

from vissl_lite.data.shards.download import Readable

# Maximum bytes of a file that is read: the largest 8-bit RGB image that Pillow decodes
MAX_IMAGE_BYTES = 512 << 20

# Maximum bytes of an extended header and of a name
_HEADER, _NAME = 1 << 20, 4096

# Limit of the compression ratio, applied beyond some bytes. Tars of images compress a few times at
# most; a higher ratio indicates a decompression bomb.
_GROWTH, _SMALL = 200, 64 << 20

# Exceptions raised for a damaged tar
BROKEN_TAR = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)

_BLOCK = 512
_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


class TarReader:
    """Iterate over the regular files in a tar.

    Call ``read`` or ``skip`` after ``next``. All three raise ``BROKEN_TAR``.

    Args:
        file: A tar file, optionally compressed by gzip, bzip2 or xz.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file: Readable = file
        self._size: int | None = None  # Set if the file is seekable
        self._at = self._left = self._padding = 0
        self._ahead = file.read(_BLOCK)
        self._sparse = False
        for magic, opened in _COMPRESSED.items():
            if self._ahead.startswith(magic):
                counted = _Counted(self._ahead, file)
                self._file, self._ahead = _Inflated(opened(counted), counted), b""
                return
        if file.seekable():
            self._seek, self._size = file.seek, os.fstat(file.fileno()).st_size

    def next(self) -> str | None:
        """Return the name of the next regular file; None at the end."""
        name: bytes | None = None
        size: int | None = None
        while True:
            self._advance(self._padding)
            self._padding = 0
            header = self._read(_BLOCK, "")
            if len(header) < _BLOCK:
                if header or not self._at:
                    raise ValueError(
                        self._not_a_tar(header)
                        if self._at == len(header)
                        else "it ends in the middle of a header"
                    )
                return None
            if header.count(0) == _BLOCK:
                return None
            if not _checksum_matches(header):
                raise ValueError(
                    self._not_a_tar(header)
                    if self._at == _BLOCK
                    else f"it is damaged at byte {self._at - _BLOCK}"
                )
            self._left, kind = _number(header[124:136]), header[156:157]
            if kind == b"L":
                name = self._header().split(b"\0")[0]
            elif kind in (b"x", b"X"):
                fields = _pax(self._header())
                name = fields.get(b"path", name)
                size = _decimal(fields[b"size"]) if b"size" in fields else size
            elif kind in (b"0", b"\0", b"7", b"S"):
                self._left = self._left if size is None else size
                self._sparse = kind == b"S"
                more = self._sparse and header[482]
                while more:
                    more = self._read_exactly(_BLOCK)[504]
                return _text(_name(header) if name is None else name)
            else:
                if kind in b"123456":  # Links, devices and folders have no data
                    self._left = 0
                self.skip()
                if kind not in (b"g", b"K"):
                    name = size = None

    def read(self) -> bytes:
        """Return the content of the file; empty if it is too large or sparse."""
        if self._left > MAX_IMAGE_BYTES or self._sparse:
            self.skip()
            return b""
        return self._content()

    def skip(self) -> None:
        """Skip the content of the file."""
        size, self._left = self._left, 0
        self._advance(size)
        self._padding = -size % _BLOCK

    def _header(self) -> bytes:
        if self._left > _HEADER:
            raise ValueError(f"it has a header of {self._left} bytes")
        return self._content()

    def _content(self) -> bytes:
        size, self._left = self._left, 0
        data = self._read_exactly(size)
        self._padding = -size % _BLOCK
        return data

    def _advance(self, size: int) -> None:
        if self._size is not None:
            if self._at + size > self._size:
                raise ValueError("it ends in the middle of a file")
            self._at += size
            self._seek(size, os.SEEK_CUR)
            return
        while size:
            size -= len(self._read_exactly(min(size, 1 << 20)))

    def _read_exactly(self, size: int) -> bytes:
        if size <= 1 << 20:
            return self._read(size, "it ends in the middle of a file")
        parts = []
        while size:
            parts.append(self._read(min(size, 1 << 20), "it ends in the middle of a file"))
            size -= len(parts[-1])
        return b"".join(parts)

    def _read(self, size: int, why: str) -> bytes:
        """Return the next bytes; if there are fewer and ``why`` is not empty, raise it."""
        data = self._ahead[:size]
        self._ahead = self._ahead[size:]
        if len(data) < size:
            data += self._file.read(size - len(data))
        self._at += len(data)
        if why and len(data) < size:
            raise ValueError(why)
        return data

    def _not_a_tar(self, header: bytes) -> str:
        return f"it is not a tar file: it begins with {header[:16]!r}" if header else "it is empty"


class _Counted:
    """Wrap a file whose first bytes were already read, and count the bytes read."""

    def __init__(self, ahead: bytes, file: Readable) -> None:
        self._ahead, self._file = ahead, file
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._ahead[:size] if self._ahead else self._file.read(size)
        self._ahead = self._ahead[len(data) :]
        self.count += len(data)
        return data

    def seekable(self) -> bool:
        return False


class _Inflated:
    """Decompressed content of a file, with a limit of the compression ratio."""

    def __init__(self, file: IO[bytes], source: _Counted) -> None:
        self._file, self._source = file, source
        self._count = 0

    def read(self, size: int, /) -> bytes:
        data = self._file.read(size)
        self._count += len(data)
        if self._count > _SMALL + _GROWTH * self._source.count:
            raise ValueError(f"it inflates to more than {_GROWTH} times its size")
        return data


def _checksum_matches(header: bytes) -> bool:
    """Whether the checksum of a header is correct; old tars sum signed bytes."""
    try:
        given = _number(header[148:156])
    except ValueError:
        return False
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if given == total:
        return True
    rest = header[:148] + header[156:]
    return given == total - 256 * sum(byte >= 128 for byte in rest)


def _number(field: bytes) -> int:
    """Parse a number in a header: octal, or base 256 if the first bit is set."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise ValueError("it has a header with a negative number")
        return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("it has a header without a number where one must be")
    return int(digits or b"0", 8)


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError("it has a header without a number where one must be")
    return int(digits)


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Parse the records of an extended header: ``length key=value`` and a line feed."""
    fields, at = {}, 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 20)
        end = at + _decimal(data[at:space]) if space > at else 0
        if not at < space < end <= len(data):
            raise ValueError("it has a header that is damaged")
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        fields[key] = value
        at = end
    return fields


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0")[0]
    # The old GNU format uses this field differently
    folder = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return folder + b"/" + name if folder else name


def _text(name: bytes) -> str:
    if len(name) > _NAME:
        raise ValueError(f"it has a name of {len(name)} bytes")
    return name.decode("utf-8", "surrogateescape")
