"""Which images a model has the labels of: the labels that it makes must not train a model that is
tested on these images.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from vissl_lite.data.text_file import read_paths, write_paths

# File in a model folder, and in a data set of pseudo-labels, with one absolute path per line.
TRAINED_ON = "trained_on.txt"


def save_trained_on(folder: Path, paths: Iterable[str]) -> None:
    """Write ``trained_on.txt``.

    Args:
        folder: Model folder, or folder of the pseudo-labels that the model has made.
        paths: Images with true labels that the model was trained on; repetitions are dropped.
    """
    write_paths(folder / TRAINED_ON, dict.fromkeys(map(os.path.abspath, paths)))


def load_trained_on(folder: Path) -> list[str] | None:
    """Read what ``save_trained_on`` has written.

    Returns:
        Absolute paths; None if the folder has no such file.

    Raises:
        UserError: The file can't be read.
    """
    if not (folder / TRAINED_ON).is_file():
        return None
    return read_paths(folder / TRAINED_ON)
