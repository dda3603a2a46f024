"""``vissl-lite explore``: a folder of images as a map in one HTML file."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from vissl_lite.commands.embed import check_file, encoder_for_images
from vissl_lite.data.images import find_images
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.errors import UserError, check_count, check_image_size, check_seed
from vissl_lite.evaluation.embedding import make_map
from vissl_lite.options import Options, Paths, StrPath, command, path_list
from vissl_lite.report.map import map_layout
from vissl_lite.report.page import Block, write_page
from vissl_lite.run import logged_to_console
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.sources import VAL_NAMES

log = logging.getLogger(__name__)

# More folders than these are hardly classes.
CLASSES_MOST = 50


@dataclass(frozen=True, kw_only=True)
class ExploreOptions(Options):
    """Options of ``explore``."""

    encoder: StrPath
    """A run, an encoder folder, timm:NAME (pre-trained weights) or random:NAME."""
    data: Paths
    """Folders (searched recursively) or .txt files of paths. The names of class folders become
    colors."""
    out: StrPath
    """The file to write: FILE.html."""
    most: int = 5000
    """Show at most so many images; of more a sample."""
    image_size: int | None = None
    """Side in pixels; default the encoder's, or for random:NAME that of the images."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width): a small file may decode to billions. The
    default is what Pillow takes."""
    seed: int = 0
    """Of the sample and the map."""
    overwrite: bool = False
    """Replace the file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("most", self.most)
        check_image_size(self.image_size)
        check_seed(self.seed)


@command(ExploreOptions)
def explore(options: ExploreOptions) -> Path:
    """Make a map of images, by what an encoder sees in them: one HTML file that needs no network.

    Click a point for its nearest neighbors; see the odd ones out and near-duplicates; select
    points and save their paths as a text file, which pretrain --data and predict --data read.

    Returns:
        The file.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    limit_pixels(options.max_pixels)
    file = Path(options.out)
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {file} is no HTML file: give a name that ends in .html")
    check_file(file, options.overwrite)
    encoder, most, sources = os.fspath(options.encoder), options.most, path_list(options.data)
    paths = find_images(sources)
    labels, classes = folder_classes(sources, paths)
    judged = encoder_for_images(encoder, options.image_size, paths)
    with logged_to_console(), progress_bar() as bar:
        task = bar.add_task("embed", total=min(most, len(paths)), info="")
        image_map = make_map(
            judged, paths, labels, classes, most, options.seed, lambda done: bar.advance(task, done)
        )
        words = f"{len(image_map.paths)} images of {', '.join(sources)}, as {encoder} "
        words += f"sees them at {judged.image_size} pixels"
        if len(paths) > most:
            words += f"; a sample of {len(paths)}, --most {len(paths)} shows all"
        readable = words.encode(errors="replace").decode()  # names need not be UTF-8
        about = Markup("<h1>Map of images</h1><p>{}</p>").format(readable)
        blocks = [Block("", about), Block("", map_layout(image_map, explore=True))]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_page(file, "Map of images", blocks, wide=True)
        log.info("%s: %s", words, file)
    return file


def folder_classes(
    sources: Sequence[str], paths: Sequence[str]
) -> tuple[np.ndarray | None, list[str]]:
    """Classes of images by the folders they are in, where these look like classes.

    Args:
        sources: the folders that were searched.
        paths: N images in them.

    Returns:
        ``(N,)`` class indices and the names; None and no names unless every image is at
        ``<class>/`` or ``train/<class>/`` (or val or test), with 2 to 50 classes.
    """
    parts = ("train", "test", *VAL_NAMES)
    names = []
    for path in paths:
        source = next((one for one in sources if Path(path).is_relative_to(one)), None)
        if source is None:  # from a list of paths
            return None, []
        folders = Path(path).relative_to(source).parts[:-1]
        if len(folders) == 2 and folders[0].lower() in parts:
            folders = folders[1:]
        if len(folders) != 1:
            return None, []
        names.append(folders[0])
    classes = sorted(set(names))
    if not 2 <= len(classes) <= CLASSES_MOST:
        return None, []
    return np.searchsorted(classes, names), classes
