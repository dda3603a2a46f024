"""The images of ``vissl-lite pretrain``: files, or shards and a few of their images as files."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.data.cache import ImageCache
from vissl_lite.data.images import find_images
from vissl_lite.data.path_list import PathList
from vissl_lite.data.shards.index import find_shards
from vissl_lite.data.shards.source import Shards
from vissl_lite.data.shards.stream import ShardSource, write_sample
from vissl_lite.data.stream import Source, ViewDataset
from vissl_lite.data.views import Views
from vissl_lite.errors import UserError
from vissl_lite.options import path_list
from vissl_lite.run import is_main_process, show_warnings_early

SAMPLE = "sample"


@dataclass
class TrainingImages:
    """What a run trains on.

    Attributes:
        paths: image files to look at: all, or some of the shards'.
        shards: where the images are, if not in files.
        temporary: holds the files until there is a run to keep them in.
    """

    paths: PathList
    shards: Shards | None = None
    temporary: "tempfile.TemporaryDirectory[str] | None" = None

    def __len__(self) -> int:
        return len(self.paths if self.shards is None else self.shards)

    def source(self, views: Views, seed: int, cache: ImageCache | None) -> Source:
        """The images with their views."""
        if self.shards is not None:
            return ShardSource(self.shards, views, seed)
        return ViewDataset(self.paths, views, seed, cache)

    def keep(self, run: Path) -> None:
        """Move the files that are temporary into the run."""
        if self.temporary is None or not is_main_process():
            return
        part = run / f"{SAMPLE}.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self.temporary.name, part)
        part.rename(run / SAMPLE)  # a run that is resumed has all of them or none
        self.temporary.cleanup()
        self.temporary, self.paths = None, PathList(find_images([run / SAMPLE]))


def find_training_images(options: PretrainOptions, run: Path, resume: bool) -> TrainingImages:
    """The images that ``--data`` names.

    Args:
        options: of the run.
        run: may have kept files before.
        resume: whether to use them.

    Raises:
        UserError: there are none, or they can't be read.
    """
    sources = path_list(options.data)
    with show_warnings_early():
        shards = find_shards(sources)
    if shards is None:
        return TrainingImages(PathList(find_images(sources)))
    if options.cache:
        raise UserError(
            "--cache is for image files: shards are read from front to back, once an epoch"
        )
    if resume and (run / SAMPLE).is_dir():
        return TrainingImages(PathList(find_images([run / SAMPLE])), shards)
    if not is_main_process() and (options.image_size or Path(options.init).is_dir()):
        return TrainingImages(PathList([]), shards)  # it looks at none
    temporary = tempfile.TemporaryDirectory(prefix="vissl-lite-")
    with show_warnings_early():
        write_sample(shards, Path(temporary.name))
    return TrainingImages(PathList(find_images([temporary.name])), shards, temporary)
