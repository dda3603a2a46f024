"""``vissl-lite shard``: images as tar files, to stream them from a disk or an object store."""

import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np

from vissl_lite.data.images import find_images
from vissl_lite.data.path_list import PathList
from vissl_lite.data.shard_index import INDEX, write_index
from vissl_lite.errors import UserError, check_arguments, check_count
from vissl_lite.run import logged_to_console
from vissl_lite.training.progress import progress_bar

log = logging.getLogger(__name__)

_OURS = re.compile(r"train-\d{6,}\.tar(\.part)?|index\.json(\.part)?")


@dataclass(frozen=True)
class ShardResult:
    """What was written.

    Attributes:
        out: the folder.
        index: the file with the number of images of each shard.
        shards: how many.
        images: how many in all.
        left_out: image files that can't be read.
    """

    out: Path
    index: Path
    shards: int
    images: int
    left_out: list[str] = field(default_factory=list)


def shard(
    data: list[str] | str,
    out: str,
    shard_size_mb: int | None = None,
    images_per_shard: int | None = None,
    overwrite: bool = False,
) -> ShardResult:
    """Write images as shards: tar files that pretrain streams from a disk or a URL.

    The image files go in as they are, in an order by chance, the same each time: shards are read
    from front to back, and neighbours end up in one batch. They are not decoded: pretrain names and
    skips those that are broken. The file index.json says how many images each shard holds; it is
    written last.

    Args:
        data: Folders (searched recursively) or .txt files of paths.
        out: The folder to write train-000000.tar, train-000001.tar and so on to.
        shard_size_mb: Size of a shard in megabytes, about; default 100.
        images_per_shard: Number of images of a shard instead.
        overwrite: Replace the shards in --out.

    Returns:
        The folder, the index, how many shards and images.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    check_arguments(shard, locals())
    check_count("shard_size_mb", shard_size_mb)
    check_count("images_per_shard", images_per_shard)
    if shard_size_mb is not None and images_per_shard is not None:
        raise UserError("give --shard_size_mb or --images_per_shard, not both")
    sources = [data] if isinstance(data, str) else data
    folder = Path(out)
    _check_folder(folder, overwrite)
    paths = PathList(find_images(sources))
    base = _common_folder(sources, paths)
    most = (shard_size_mb or 100) * 10**6 if images_per_shard is None else None
    with logged_to_console():
        written: list[tuple[str, int, int]] = []
        left_out: list[str] = []
        members = _members(paths, base, left_out)
        waiting = next(members, None)
        if waiting is None:
            raise UserError(f"none of {len(paths)} image files can be read, the first {paths[0]}")
        folder.mkdir(parents=True, exist_ok=True)
        old = [folder / name for name in os.listdir(folder)]
        for file in sorted(old, key=lambda file: file.name != INDEX):  # it stands for the others
            file.unlink()
        while waiting is not None:
            name = f"train-{len(written):06}.tar"
            images = 0
            with _whole_tar(folder / name) as tar:
                while waiting is not None:
                    member, content = waiting
                    tar.addfile(member, BytesIO(content))
                    images += 1
                    waiting = next(members, None)
                    if images == images_per_shard or (most is not None and tar.offset >= most):
                        break
            written.append((name, images, os.path.getsize(folder / name)))
        index = write_index(folder, written)
        result = ShardResult(folder, index, len(written), sum(n for _, n, _ in written), left_out)
        if left_out:
            log.warning(
                "left out, as they can't be read: %d files, the first %s", len(left_out),
                left_out[0],
            )  # fmt: skip
        pattern = folder / f"train-{{000000..{len(written) - 1:06}}}.tar"
        log.info("%d images in %d shards. Next:", result.images, result.shards)
        log.info('  vissl-lite pretrain --data "%s" --out RUN', pattern)
    return result


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written to. Nothing is changed yet."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: --out must name a folder")
    names = os.listdir(folder) if folder.is_dir() else []
    if any(not _OURS.fullmatch(name) for name in names):
        raise UserError(f"{folder} holds other files: give a new folder with --out")
    if names and not overwrite:
        raise UserError(f"{folder} holds other shards: give a new folder, or --overwrite")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"{folder} can't be made: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{folder} can't be written: no permission in {parent}")


def _common_folder(sources: Sequence[str], paths: Sequence[str]) -> str:
    """The folder that names in the shards are relative to: it holds all sources."""
    if all(os.path.isdir(source) for source in sources):
        folders = {os.path.abspath(source) for source in sources}
    else:
        folders = {os.path.dirname(os.path.abspath(path)) for path in paths}
    return os.path.commonpath(folders)


def _members(
    paths: Sequence[str], base: str, left_out: list[str]
) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The image files as members of a tar, in an order by chance.

    Args:
        paths: the files.
        base: what their names are relative to.
        left_out: gets the files that can't be read.
    """
    keys: set[str] = set()
    with progress_bar() as bar:
        task = bar.add_task("shard", total=len(paths), info="")
        for index in np.random.default_rng(0).permutation(len(paths)):
            path = paths[int(index)]
            bar.update(task, advance=1)
            try:
                with open(path, "rb") as file:
                    content = file.read()
            except OSError:
                left_out.append(path)
                continue
            stem, suffix = os.path.splitext(os.path.relpath(os.path.abspath(path), base))
            member = tarfile.TarInfo(unique_key(stem, keys) + suffix.lower())
            member.size = len(content)
            yield member, content


def unique_key(name: str, taken: set[str]) -> str:
    """A key for an image in WebDataset: readable, without dots, and no other image's.

    Args:
        name: of the file, without its extension; with its folders.
        taken: the keys so far; the new one is added.
    """
    key = name.replace(os.sep, "/").replace(".", "_")
    while key.startswith("__"):  # WebDataset passes over what it takes for its own meta data
        key = key[1:]
    unique, number = key, 1
    while unique in taken:
        number += 1
        unique = f"{key}-{number}"
    taken.add(unique)
    return unique


@contextmanager
def _whole_tar(file: Path) -> Iterator[tarfile.TarFile]:
    """A tar file to write that appears whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    # names go in as they are on the disk, whatever they are encoded in
    with tarfile.open(part, "w", format=tarfile.GNU_FORMAT, encoding="utf-8",
                      errors="surrogateescape") as tar:  # fmt: skip
        yield tar
    os.replace(part, file)
