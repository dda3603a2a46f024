"""``vissl-lite list``: list pretexts and timm backbones."""

import sys
from dataclasses import dataclass
from fnmatch import fnmatch

import timm
from rich.console import Console
from rich.table import Table

from vissl_lite.encoders import backbones as _registers_our_own  # noqa: F401
from vissl_lite.errors import UserError, canonical_name, did_you_mean
from vissl_lite.options import Options, command
from vissl_lite.pretext import PRETEXTS
from vissl_lite.pretext.base import BACKBONE_KINDS

LISTABLE = ("pretexts", "backbones")


@dataclass(frozen=True)
class ListOptions(Options):
    """Options of ``list``."""

    what: str
    """What to list: pretexts (with family, backbones, views, paper and when to use each) or
    backbones."""
    pattern: str = "*"
    """Pattern that names must match, with shell wildcards (resnet*, *small*). A pattern without
    wildcards matches all names that contain it."""


@command(ListOptions)
def list_(options: ListOptions) -> list[str]:
    """Print the names that --pretext or --backbone accepts.

    Returns:
        The names.

    Raises:
        UserError: There is no such list, or no name matches.
    """
    what, pattern = canonical_name(options.what, LISTABLE), options.pattern.lower()
    if what not in LISTABLE:
        raise UserError(f"no list of {what}: {did_you_mean(what, LISTABLE)}")
    names = list(PRETEXTS) if what == "pretexts" else timm.list_models()
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = [name for name in names if fnmatch(name, wanted)]
    if not found:
        raise UserError(
            f"no {what.removesuffix('s')} matches {pattern}: {did_you_mean(pattern, names)}"
        )
    if what == "pretexts":
        _print_pretexts(found)
    else:
        sys.stdout.write("".join(f"{name}\n" for name in found))
    return found


def _print_pretexts(names: list[str]) -> None:
    table = Table("pretext", "family", "backbones", "views", "paper", "when to use it", box=None)
    for name in names:
        info = PRETEXTS[name].info
        kind = BACKBONE_KINDS[info.backbones][0]
        table.add_row(name, info.family, kind, info.views, info.paper, info.use)
    # One line per pretext if the output is not a terminal.
    Console(width=None if sys.stdout.isatty() else 240).print(table)
