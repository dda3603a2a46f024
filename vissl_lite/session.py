"""Process-wide settings that a command changes while it runs and restores afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from vissl_lite.data.reading import pixel_limit, silence_decoders
from vissl_lite.log import command_log


@contextmanager
def session() -> Iterator[None]:
    """Apply process-wide settings for the duration of a command.

    Messages of the package go to the console and to the run instead of the root logger's handlers.
    Pillow and OpenCV do not print messages about broken images, which the package logs itself.
    ``--max_pixels`` also sets the limit of Pillow.
    """
    restore = silence_decoders()
    try:
        with pixel_limit(), command_log():
            yield
    finally:
        restore()
