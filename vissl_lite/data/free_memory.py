"""The memory that this process may still use."""

import re
from collections.abc import Iterator
from pathlib import Path


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that are available, within the limits of the control groups that the process is in.

    Args:
        root: Folder of ``proc`` and ``sys``.

    Returns:
        None where the system doesn't say (not on Linux).
    """
    known = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if known is None:
        return None
    return max(0, min([1024 * int(known[1]), *_rooms(root)]))


def _rooms(root: Path) -> Iterator[int]:
    """Bytes left below the limit of each control group (version 1 or 2)."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, most, used, cached = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, most, used = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        top = root / "sys/fs/cgroup" / base
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            limit, taken = _text(folder / most).strip(), _text(folder / used).strip()
            if limit.isdigit() and taken.isdigit():  # "max": there is none
                # what files have in memory is given up where it is needed
                files = re.search(rf"^{cached} (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
                yield int(limit) - int(taken) + (int(files[1]) if files else 0)
            if folder == top:
                break


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
