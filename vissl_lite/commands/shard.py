"""``vissl-lite shard``: write images as tar files for streaming from a disk or an object store."""

import logging
import os
import re
import tarfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np

from vissl_lite.data.atomic_file import check_place
from vissl_lite.data.formats import encode_frame, split_path, split_suffix
from vissl_lite.data.formats.common import ARRAY_SUFFIXES, FRAME_SUFFIX
from vissl_lite.data.image_survey import check_axis
from vissl_lite.data.images import BROKEN_IMAGE, EXTENSIONS, find_images, read_content
from vissl_lite.data.path_list import PathList
from vissl_lite.data.reading import open_regular, slice_along
from vissl_lite.data.shards.index import INDEX, INDEX_PART, index_text, parse_index
from vissl_lite.data.shards.tar_reader import MAX_IMAGE_BYTES
from vissl_lite.errors import UserError, check_count
from vissl_lite.options import Options, Paths, StrPath, command, path_list
from vissl_lite.run import logged_to_console
from vissl_lite.run_folder import LOCK, check_apart, lock
from vissl_lite.training.progress import progress_bar

log = logging.getLogger(__name__)

# Index of the shards that are being replaced
_INDEX_BEFORE = f"{INDEX}.before"
_INDICES = (INDEX, INDEX_PART, _INDEX_BEFORE)
_SHARD = re.compile(r"train-\d{6,}\.tar")
_PART = re.compile(r"train-\d{6,}\.tar\.part")


@dataclass(frozen=True)
class ShardResult:
    """Result of ``shard``.

    Attributes:
        out: Output folder.
        index: File with the number of images in each shard.
        shards: Number of shards.
        images: Total number of images.
        left_out: Image files that can't be read.
    """

    out: Path
    index: Path
    shards: int
    images: int
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ShardOptions(Options):
    """Options of ``shard``."""

    data: Paths
    """Folders (searched recursively) or .txt files of paths."""
    out: StrPath
    """The folder to write train-000000.tar, train-000001.tar and so on to."""
    shard_size_mb: int | None = None
    """Approximate size of a shard in megabytes; default 100."""
    images_per_shard: int | None = None
    """Number of images per shard, instead of a size."""
    axis: int | None = None
    """Axis of the slices of volumes: 0 from left to right, 1 from back to front, 2 upwards.
    Default: the one along which slices are farthest apart."""
    overwrite: bool = False
    """Replace the shards in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_axis(self.axis)
        check_count("shard_size_mb", self.shard_size_mb)
        check_count("images_per_shard", self.images_per_shard)
        if self.shard_size_mb is not None and self.images_per_shard is not None:
            raise UserError("give --shard_size_mb or --images_per_shard, not both")


@command(ShardOptions)
def shard(options: ShardOptions) -> ShardResult:
    """Write images as shards: tar files that pretrain streams from a disk or a URL.

    Image files are copied unchanged, in a random but reproducible order, since shards are read
    sequentially and neighbors end up in one batch. They are not decoded; pretrain reports and skips
    broken ones. Slices of volumes, pages and frames are stored with their values as they are, so
    --bands, --window and --value_range are options of pretrain. The file index.json has --axis and
    the number of images in each shard, and is written last. Older shards are kept until all new
    ones are written, so the disk needs room for both.

    Returns:
        The folder, the index, and the numbers of shards and images.

    Raises:
        UserError: If an option is invalid; nothing is written then.
    """
    slice_along(options.axis)
    sources = path_list(options.data)
    folder = Path(options.out)
    check_place(folder)
    check_apart(folder, [("data", source) for source in sources])
    _check_folder(folder, options.overwrite)
    paths = PathList(find_images(sources))
    base = _common_folder(sources, paths)
    most = (options.shard_size_mb or 100) * 10**6 if options.images_per_shard is None else None
    left_out: list[str] = []
    with logged_to_console(), closing(_members(paths, base, left_out)) as members:
        first = next(members, None)
        if first is None:
            raise UserError(f"none of {len(paths)} image files can be read, the first {paths[0]}")
        with _locked(folder):
            old = _remove_unfinished(folder, _check_folder(folder, options.overwrite))
            try:
                written = _write_parts(
                    folder, chain([first], members), options.images_per_shard, most
                )
                text = index_text(written, options.axis)
                (folder / INDEX_PART).write_text(text, encoding="utf-8")
            except BaseException:
                _remove_parts(folder)
                raise
            index = _replace(folder, old, written)
        result = ShardResult(folder, index, len(written), sum(n for _, n, _ in written), left_out)
        if left_out:
            log.warning(
                "left out, as they can't be read: %(files)d files, the first %(first)s",
                {"files": len(left_out), "first": left_out[0]},
                extra={"code": "image.unreadable"},
            )
        pattern = folder / f"train-{{000000..{len(written) - 1:06}}}.tar"
        log.info("%d images in %d shards. Next:", result.images, result.shards)
        log.info('  vissl-lite pretrain --data "%s" --out RUN', pattern)
    return result


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create and lock a folder; remove it afterwards if it is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # It is not empty
                folder.rmdir()


def _check_folder(folder: Path, overwrite: bool) -> list[Path]:
    """List existing shards and partial shards that may be replaced, without changing anything.

    Raises:
        UserError: If the folder has other files, or shards and ``overwrite`` is False.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: --out must name a folder")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in files if file.name != LOCK]
    for file in files:
        ours = _SHARD.fullmatch(file.name) or _PART.fullmatch(file.name) or file.name in _INDICES
        if not ours or file.is_dir():
            raise UserError(
                f"{folder} holds other files, such as {file.name}: give a new folder with --out"
            )
    listed = {name for index in _INDICES for name in _listed(folder / index)}
    foreign = [f.name for f in files if _SHARD.fullmatch(f.name) and f.name not in listed]
    if foreign:
        raise UserError(
            f"{folder} holds {foreign[0]}, which no {INDEX} there lists, so that it may be of "
            f"another program: give a new folder with --out, or move it away"
        )
    if files and not overwrite:
        if not (folder / INDEX).is_file():
            raise UserError(
                f"{folder} holds shards that were not written to the end, as {INDEX} is missing: "
                f"write them again with --overwrite"
            )
        raise UserError(f"{folder} holds other shards: give a new folder, or --overwrite")
    return files


def _listed(index: Path) -> list[str]:
    """Names of the shards in an index; empty if it can't be read."""
    try:
        with open_regular(index) as file:
            return [entry.url for entry in parse_index(file.read())]
    except (OSError, ValueError):
        return []


def _common_folder(sources: Sequence[str], paths: Sequence[str]) -> str:
    """Folder that contains all sources; names in the shards are relative to it."""
    if all(os.path.isdir(source) for source in sources):
        folders = {os.path.abspath(source) for source in sources}
    else:
        folders = {os.path.dirname(os.path.abspath(path)) for path in paths}
    try:
        return os.path.commonpath(folders)
    except ValueError:
        raise UserError(
            "--data names folders on several drives, which have no common folder: shard the images "
            "of each drive into a folder of their own"
        ) from None


def _members(
    paths: Sequence[str], base: str, left_out: list[str]
) -> Generator[tuple[tarfile.TarInfo, bytes], None, None]:
    """Yield the image files as members of a tar in random order.

    Args:
        paths: Image files.
        base: Folder that names are relative to.
        left_out: List to which files that can't be read are appended.
    """
    keys: set[str] = set()
    with progress_bar() as bar:
        task = bar.add_task("shard", total=len(paths), info="")
        for index in np.random.default_rng(0).permutation(len(paths)):
            path = paths[int(index)]
            bar.update(task, advance=1)
            try:
                stem, suffix = split_suffix(os.path.relpath(os.path.abspath(path), base))
                if split_path(path)[1] is None and suffix.lower() not in ARRAY_SUFFIXES:
                    content = read_content(path)
                else:
                    content, suffix = encode_frame(path), FRAME_SUFFIX
                if len(content) > MAX_IMAGE_BYTES:
                    raise ValueError("no reader of shards would read it")
            except BROKEN_IMAGE:  # ValueError: too large
                left_out.append(path)
                continue
            if suffix.lower() not in {*EXTENSIONS, FRAME_SUFFIX}:  # DICOM files need none
                stem, suffix = stem + suffix, ".dcm"
            member = tarfile.TarInfo(unique_key(stem, keys) + suffix.lower())
            member.size = len(content)
            yield member, content


def unique_key(name: str, taken: set[str]) -> str:
    """Return a unique, readable WebDataset key without dots for an image.

    Args:
        name: Relative path of the file without its extension.
        taken: Keys in use; the new one is added.
    """
    key = name.replace(os.sep, "/").replace(".", "_")
    while key.startswith("__"):  # WebDataset skips such names as its own metadata
        key = key[1:]
    unique, number = key, 1
    while unique in taken:
        number += 1
        unique = f"{key}-{number}"
    taken.add(unique)
    return unique


def _remove_unfinished(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Remove files of a killed run, and keep complete shards.

    Returns:
        The complete shards.
    """
    finished = (folder / INDEX).is_file()
    # Remove shards before the index that lists them
    for file in sorted(files, key=lambda file: file.name in _INDICES):
        if file.name != INDEX and not (finished and _SHARD.fullmatch(file.name)):
            file.unlink()
    return [file for file in files if finished and _SHARD.fullmatch(file.name)]


def _write_parts(
    folder: Path,
    members: Iterator[tuple[tarfile.TarInfo, bytes]],
    images_per_shard: int | None,
    most: int | None,
) -> list[tuple[str, int, int]]:
    """Write shards under names that end in ``.part``.

    Args:
        folder: Output folder.
        members: Images.
        images_per_shard: Number of images per shard.
        most: Bytes after which a shard ends if ``images_per_shard`` is None.

    Returns:
        Name, number of images and size in bytes of each shard.
    """
    written: list[tuple[str, int, int]] = []
    waiting = next(members, None)
    while waiting is not None:
        name, images = f"train-{len(written):06}.tar", 0
        part = folder / f"{name}.part"
        # Keeps file names byte for byte, whatever their encoding
        with tarfile.open(
            part, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
        ) as tar:
            while waiting is not None:
                member, content = waiting
                tar.addfile(member, BytesIO(content))
                images += 1
                waiting = next(members, None)
                if images == images_per_shard or (most is not None and tar.offset >= most):
                    break
        written.append((name, images, os.path.getsize(part)))
    return written


def _remove_parts(folder: Path) -> None:
    """Remove partial shards and the partial index."""
    for file in folder.iterdir():
        if _PART.fullmatch(file.name) or file.name == INDEX_PART:
            file.unlink()


def _replace(folder: Path, old: Sequence[Path], written: Sequence[tuple[str, int, int]]) -> Path:
    """Replace old shards by new ones.

    The old index is moved first and the new one put in place last, so that ``index.json`` always
    lists complete shards. If the process is killed in between, all files are still listed in an
    index that ``_check_folder`` recognizes.
    """
    index = folder / INDEX
    if index.is_file():
        os.replace(index, folder / _INDEX_BEFORE)
    names = [name for name, _, _ in written]
    for name in names:
        os.replace(folder / f"{name}.part", folder / name)
    for file in old:
        if file.name not in names:
            file.unlink()
    (folder / _INDEX_BEFORE).unlink(missing_ok=True)
    os.replace(folder / INDEX_PART, index)
    return index
