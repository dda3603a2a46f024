"""Images that tables name as not usable, for --exclude of ``select`` and ``pseudo-label``."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from vissl_lite.errors import UserError
from vissl_lite.transfer.sources.tables import read_table

log = logging.getLogger(__name__)


def read_excluded(tables: Sequence[str], pool: Sequence[str]) -> set[str]:
    """Read the paths that tables name; a warning is logged if some are not among the images.

    Args:
        tables: Tables (.csv) with a column ``path``, relative to the table or absolute.
        pool: Images of ``--data``.

    Returns:
        Absolute paths.

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
    return excluded
