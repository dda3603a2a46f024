"""Training images of ``vissl-lite pretrain``: image files, or shards with a sample as files."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.data.cache import ImageCache
from vissl_lite.data.image_reader import ImageReader, volume_of
from vissl_lite.data.images import BROKEN_IMAGE, find_images, walk
from vissl_lite.data.path_list import PathList
from vissl_lite.data.reading import slice_along
from vissl_lite.data.shards.index import find_shards
from vissl_lite.data.shards.source import Shards
from vissl_lite.data.shards.stream import ShardSource, write_sample
from vissl_lite.data.stream import Source, ViewDataset
from vissl_lite.data.views import Views
from vissl_lite.errors import UserError
from vissl_lite.options import path_list
from vissl_lite.run import is_main_process, show_warnings_early

SAMPLE_FOLDER = "sample"


@dataclass
class TrainingImages:
    """Training images of a run.

    Attributes:
        paths: Image files: all images, or a sample of the images in the shards.
        shards: Shards with the images; None for image files.
        temporary: Folder with the sample until it is moved into the run.
    """

    paths: PathList
    shards: Shards | None = None
    temporary: "tempfile.TemporaryDirectory[str] | None" = None

    def __len__(self) -> int:
        return len(self.paths if self.shards is None else self.shards)

    def source(
        self,
        views: Views,
        seed: int,
        cache: ImageCache | None,
        reader: ImageReader,
        smaller: Sequence[Views] = (),
    ) -> Source:
        """Source of the images and their views for the data loader; see ``ViewDataset``."""
        if self.shards is not None:
            return ShardSource(self.shards, views, seed, reader, smaller)
        return ViewDataset(self.paths, views, seed, cache, reader, smaller)

    def keep_sample(self, run: Path) -> None:
        """Move the sample of the shards from its temporary folder into the run."""
        if self.temporary is None or not is_main_process():
            return
        part = run / f"{SAMPLE_FOLDER}.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self.temporary.name, part)
        part.rename(run / SAMPLE_FOLDER)  # atomic: a resumed run finds all files or none
        self.temporary.cleanup()
        self.temporary, self.paths = None, _sample(run / SAMPLE_FOLDER)


def find_training_images(options: PretrainOptions, run: Path, resume: bool) -> TrainingImages:
    """Find the images of ``--data``; slices are then along the axis of the shards.

    Args:
        options: Options of the run.
        run: Run folder.
        resume: Whether to reuse the sample of shards in the run folder.

    Raises:
        UserError: There are no images, they can't be read, or --axis contradicts the shards.
    """
    sources = path_list(options.data)
    with show_warnings_early():
        shards = find_shards(sources)
    if shards is None:
        return TrainingImages(PathList(find_images(sources)))
    if options.cache:
        raise UserError("--cache is for image files: shards are read sequentially, once per epoch")
    if options.axis not in (None, shards.axis):
        known = "its own axis" if shards.axis is None else f"axis {shards.axis}"
        raise UserError(
            f"--axis {options.axis}: the shards hold slices of each volume along {known}: leave it "
            f"out, or write other shards with vissl-lite shard --axis {options.axis}"
        )
    slice_along(shards.axis)
    if resume and (run / SAMPLE_FOLDER).is_dir():
        kept = _sample(run / SAMPLE_FOLDER)
        if kept:
            return TrainingImages(kept, shards)
    temporary = tempfile.TemporaryDirectory(prefix="vissl-lite-")
    with show_warnings_early():
        write_sample(shards, Path(temporary.name))
    return TrainingImages(_sample(Path(temporary.name)), shards, temporary)


def _sample(folder: Path) -> PathList:
    """The files of a sample of shards, those of a volume together."""

    def volume(path: str) -> str:
        try:
            return volume_of(path) or ""
        except BROKEN_IMAGE:
            return ""

    return PathList(sorted(walk(folder), key=volume))
