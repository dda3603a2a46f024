"""Reading of JSON files that may be damaged or malicious."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from vissl_lite.data.text_file import read_bytes
from vissl_lite.errors import UserError

# Size in bytes of the largest file that is read unless told otherwise: annotations of a data set.
MAX_JSON_BYTES = 4 * 2**30

# Digits of the longest integer: all of 64 bits. Longer ones overflow whatever takes them.
MAX_DIGITS = 20


def read_json(file: Path, largest: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file.

    The values are as JSON has them: of any type at any place, and floating-point numbers may be
    NaN or infinite. Who uses them checks them.

    Args:
        file: File in UTF-8, with or without a byte order mark.
        largest: Size in bytes of the largest file that is read.

    Returns:
        What it holds.

    Raises:
        UserError: There is no such file, it is larger, or it is not JSON. So are an object that has
            a key twice, an integer of more than 20 digits, and half of a character (a lone
            surrogate), which can't be printed, unless it stands for a byte of a file's name.
    """
    return parse_json(read_bytes(file, largest), str(file))


def parse_json(content: bytes, name: str) -> Any:
    """Parse JSON; see ``read_json``.

    Args:
        content: Content in UTF-8, with or without a byte order mark.
        name: Name of the file or URL, for errors.

    Raises:
        UserError: Likewise.
    """
    try:
        found = json.loads(
            content.decode("utf-8-sig"), object_pairs_hook=_object, parse_int=_integer
        )
        if b"\\ud" in content or b"\\uD" in content:
            # names of files that are not UTF-8 are written so (PEP 383)
            json.dumps(found, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except UnicodeDecodeError:
        raise UserError(f"{name} is not JSON that can be read: it is not in UTF-8") from None
    except UnicodeEncodeError:
        raise UserError(
            f"{name} is not JSON that can be read: a text has half a character"
        ) from None
    except RecursionError:
        raise UserError(f"{name} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{name} is not JSON that can be read: {error}") from None
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {twice[:80]!r} twice")
    return content


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(
            f"the number {digits[:MAX_DIGITS]}... has {len(digits.lstrip('-'))} digits"
        )
    return int(digits)
