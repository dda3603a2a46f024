"""``vissl-lite report``: write the report of a run again."""

import os
from dataclasses import dataclass
from pathlib import Path

from vissl_lite.errors import UserError
from vissl_lite.options import Options, StrPath, command
from vissl_lite.run import console
from vissl_lite.run_record import RUN


@dataclass(frozen=True)
class ReportOptions(Options):
    """Options of ``report``."""

    run: StrPath
    """Run folder of any command; the run may still be running or have been stopped."""


@command(ReportOptions)
def report(options: ReportOptions) -> Path:
    """Write report.html of a run again, from the files in its folder.

    Returns:
        Path of the report.

    Raises:
        UserError: The folder is not a run, or can't be written.
    """
    from vissl_lite.report.run_report import write_report  # importing Bokeh is slow

    run = os.fspath(options.run)
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"no run at {run}: give a folder that another command wrote with --out")
    if not (folder / RUN).is_file():
        raise UserError(
            f"{run} is not a run ({RUN} is missing): give a folder that another command wrote "
            f"with --out"
        )
    try:
        file = write_report(folder)
    except OSError as error:
        raise UserError(f"the report of {run} can't be written: {error.strerror}") from None
    console.print(f"Written: {file}", highlight=False, soft_wrap=True, markup=False)
    return file
