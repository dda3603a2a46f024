"""Pretext tasks: one file each. A new one is a file and a line here."""

from vissl_lite.errors import UserError, did_you_mean
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.rotation import Rotation
from vissl_lite.pretext.simclr import SimCLR

PRETEXTS: dict[str, type[PretextTask]] = {
    made.about.name: made
    for made in (
        Rotation,
        SimCLR,
    )
}


def pretext_class(name: str) -> type[PretextTask]:
    """The class of a pretext.

    Raises:
        UserError: the name is unknown.
    """
    if name not in PRETEXTS:
        raise UserError(f"unknown pretext {name}: {did_you_mean(name, PRETEXTS)}")
    return PRETEXTS[name]
