"""Images that tables name as not usable, for --exclude of ``select`` and ``pseudo-label``."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from vissl_lite.errors import UserError
from vissl_lite.transfer.sources.tables import read_table

log = logging.getLogger(__name__)


def without_excluded(pool: Sequence[str], tables: Sequence[str]) -> tuple[list[str], list[str]]:
    """Leave out images that tables name; a warning is logged if some are not among the images.

    Args:
        pool: Images of ``--data``.
        tables: Tables (.csv) with a column ``path``, relative to the table or absolute.

    Returns:
        The other images, and the absolute paths of those that the tables name.

    Raises:
        UserError: A table can't be read, or has no column ``path``.
    """
    excluded: set[str] = set()
    for name in tables:
        # The first line is a header, whatever it says.
        table = read_table(Path(name), is_image=lambda cell: False)
        column = table.column(["path"])
        if column is None:
            raise UserError(f"--exclude {name} has no column path")
        folder = Path(name).parent
        excluded |= {os.path.abspath(folder / path) for path in table.cells(column) if path}
    missing = len(excluded.difference(map(os.path.abspath, pool)))
    if missing:
        log.warning(
            "%(missing)d of the %(excluded)d images that --exclude names are not among the images "
            "of --data, which may have been moved since",
            {"missing": missing, "excluded": len(excluded)},
            extra={"code": "selection.not_excluded"},
        )
    return [path for path in pool if os.path.abspath(path) not in excluded], sorted(excluded)
