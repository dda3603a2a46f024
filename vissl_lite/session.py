"""What a command changes in its process while it runs; all is as it was before when it ends."""

from collections.abc import Iterator
from contextlib import contextmanager

from vissl_lite.data.reading import pixel_limit, silence_decoders
from vissl_lite.log import command_log


@contextmanager
def session() -> Iterator[None]:
    """Run a command, from Python or from the command line.

    While it runs, messages of the package go to the console and into its run, and not to the
    handlers of the root logger; Pillow and OpenCV do not print about broken images, which our own
    log names; and ``--max_pixels`` is the limit of Pillow, too.
    """
    restore = silence_decoders()
    try:
        with pixel_limit(), command_log():
            yield
    finally:
        restore()
