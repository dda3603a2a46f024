"""``vissl-lite explore``: write a map of a folder of images as one HTML file."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from vissl_lite.commands.embed import check_file, encoder_for_images
from vissl_lite.data.archives import is_archive, unpack
from vissl_lite.data.image_survey import ImageSettings
from vissl_lite.data.images import find_images
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.encoders.folder import choose_slice_axis
from vissl_lite.errors import UserError, check_count, check_image_size, check_seed
from vissl_lite.evaluation.embedding import make_map
from vissl_lite.options import Options, Paths, StrPath, command, path_list
from vissl_lite.report.map import map_layout
from vissl_lite.report.page import Block, write_page
from vissl_lite.run import logged_to_console
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.sources.parts import part_of_name

log = logging.getLogger(__name__)

# With more folders than this, they are probably not classes.
MAX_CLASSES = 50


@dataclass(frozen=True, kw_only=True)
class ExploreOptions(Options, ImageSettings):
    """Options of ``explore``."""

    encoder: StrPath
    """A run, an encoder folder, timm:NAME (pre-trained weights) or random:NAME (untrained)."""
    data: Paths
    """Folders of images (searched recursively) or .txt files of paths. Images in class folders are
    colored by class."""
    out: StrPath
    """HTML file to write."""
    most: int = 5000
    """Maximum number of images to show. A random sample is shown if there are more."""
    image_size: int | None = None
    """Side length of the input in pixels. Default: that of the encoder, or for random:NAME that of
    the images."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width) than this; a small file can decode to
    billions of pixels. The default is Pillow's limit."""
    seed: int = 0
    """Seed for the sample and the map."""
    overwrite: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_images()
        check_count("most", self.most)
        check_image_size(self.image_size)
        check_seed(self.seed)


@command(ExploreOptions)
def explore(options: ExploreOptions) -> Path:
    """Write a map of images by their features, as one HTML file that works offline.

    The map is drawn by PCA and, if umap-learn is installed (the extra umap), also by UMAP. The page
    shows the nearest neighbors of a clicked point, outliers, and near-duplicates. The paths of
    selected points can be saved as a text file, for pretrain --data and predict --data.

    Returns:
        Path of the HTML file.

    Raises:
        UserError: An option is invalid; nothing is written then.
    """
    limit_pixels(options.max_pixels)
    choose_slice_axis(options.axis, options.encoder)
    file = Path(options.out)
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {file} is not an HTML file: give a name that ends in .html")
    check_file(file, options.overwrite)
    name, most, sources = os.fspath(options.encoder), options.most, path_list(options.data)
    paths = find_images(sources)
    places = [str(unpack(Path(one))) if is_archive(Path(one)) else one for one in sources]
    labels, classes = folder_classes(places, paths)
    encoder = encoder_for_images(name, options.image_size, paths, options)
    with logged_to_console(), progress_bar() as bar:
        task = bar.add_task("embed", total=min(most, len(paths)), info="")
        image_map = make_map(
            encoder,
            paths,
            labels,
            classes,
            most,
            options.seed,
            lambda done: bar.advance(task, done),
            unfold=True,
        )
        summary = f"{len(image_map.paths)} images of {', '.join(sources)}, features of {name} "
        summary += f"at {encoder.image_size} pixels"
        if len(paths) > most:
            summary += f"; a sample of {len(paths)}, --most {len(paths)} shows all"
        readable = summary.encode(errors="replace").decode()  # names need not be UTF-8
        heading = Markup("<h1>Map of images</h1><p>{}</p>").format(readable)
        blocks = [Block("", heading), Block("", map_layout(image_map, explore=True))]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_page(file, "Map of images", blocks, wide=True)
        log.info("%s: %s", summary, file)
    return file


def folder_classes(
    sources: Sequence[str], paths: Sequence[str]
) -> tuple[np.ndarray | None, list[str]]:
    """Infer the classes of images from their folders.

    Args:
        sources: Folders that were searched.
        paths: Paths of N images in them.

    Returns:
        ``(N,)`` class indices and the class names. None and an empty list unless every image is in
        ``<class>/`` or ``train/<class>/`` (or val or test) and there are 2 to 50 classes.
    """
    names = []
    for path in paths:
        source = next((one for one in sources if Path(path).is_relative_to(one)), None)
        if source is None:  # from a list of paths
            return None, []
        folders = Path(path).relative_to(source).parts[:-1]
        if len(folders) == 2 and part_of_name(folders[0]) is not None:
            folders = folders[1:]
        if len(folders) != 1 or part_of_name(folders[0]) is not None:
            return None, []
        names.append(folders[0])
    classes = sorted(set(names))
    if not 2 <= len(classes) <= MAX_CLASSES:
        return None, []
    return np.searchsorted(classes, names), classes
