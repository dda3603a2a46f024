"""Groups of images that belong together, such as those of a patient: no split divides them.

A group is read from a column of a table (``groups_of_rows`` in ``tables.py``), from the path by a
regular expression (``--group_by``), or from the file itself (``default_group``).
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vissl_lite.data.formats import DICOM_SUFFIXES, describe, split_path, split_suffix
from vissl_lite.data.images import BROKEN_IMAGE, EXTENSIONS
from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.sources.reading_log import ReadingLog

# Where groups come from that are read from the files themselves.
_OF_FILES = "patients or volumes"


def default_group(path: str) -> str | None:
    """The group that an image belongs to by its file: a volume, or the patient of a DICOM file.

    Args:
        path: Image file, or a slice of it such as ``scan.nii.gz#17``.

    Returns:
        Name of the group, the absolute path of a volume; None for an image that belongs to no
        other.
    """
    file, frame = split_path(path)
    if split_suffix(file)[1].lower() in EXTENSIONS - DICOM_SUFFIXES:
        return None if frame is None else os.path.abspath(file)
    try:
        group = describe(path).group
    except BROKEN_IMAGE:
        return None
    return os.path.abspath(file) if group == file else group


class Record(Protocol):
    """An image and its label."""

    @property
    def path(self) -> str:
        """The image file."""


def find_groups(
    paths: Sequence[str], sources: Sequence[Path], group_by: str | None, log: ReadingLog
) -> Callable[[Sequence[Record]], np.ndarray] | None:
    """Complete the groups of the images in the log.

    A regular expression takes precedence over a column, and a column over the files themselves.
    Groups of one image each count only where they come from files, of which others may be of the
    same patient or volume, or where rows of a table without a label share them.

    Args:
        paths: All labelled images.
        sources: Data folders, or files in them. The regular expression gets paths relative to the
            first folder that holds the image.
        group_by: The regular expression: its first capture group, or without one the whole match,
            is the group; None if none is given.
        log: Has the groups of a column, and gets those that count.

    Returns:
        Function to the group of each of N images, ``(N,)`` str, as ``complete_parts`` takes it;
        None if no two labelled images belong to the same group.

    Raises:
        UserError: The regular expression is invalid, or no image matches.
    """
    if group_by is not None:
        folders = [one if one.is_dir() else one.parent for one in sources]
        log.groups = _matches(paths, folders, group_by, log)
        log.grouped_by, log.group_by = f"--group_by {group_by}", group_by
    elif not log.groups:
        found = {path: group for path in paths if (group := default_group(path)) is not None}
        log.groups, log.grouped_by = found, _OF_FILES
    kept = {path: log.groups[path] for path in paths if path in log.groups}
    others = {path: group for path, group in log.groups.items() if path not in kept}
    of_files = log.group_by is None and log.grouped_by == _OF_FILES
    if not of_files and not _shared([*kept.values(), *others.values()]):
        kept, others = {}, {}
    log.groups, log.groups_of_unlabelled = kept, others
    log.grouped_by = log.grouped_by if kept else ""
    if not _shared(kept.values()):
        if group_by is not None:
            log.note(f"--group_by {brief(group_by)}: each image is a group of its own")
        return None
    return lambda images: _names([one.path for one in images], kept)


def named_groups(log: ReadingLog) -> dict[str, str]:
    """The groups by image that annotations name, also of images without a label.

    Args:
        log: Log of a data set that was read.

    Returns:
        Those of a column, or of a key ``group``; not those of ``--group_by`` or of the files.
    """
    if log.group_by is not None or log.grouped_by == _OF_FILES:
        return {}
    return {**log.groups_of_unlabelled, **log.groups}


def _shared(groups: Iterable[str]) -> bool:
    """Whether any group occurs twice."""
    return max(Counter(groups).values(), default=0) > 1


def _matches(
    paths: Sequence[str], folders: Sequence[Path], regex: str, log: ReadingLog
) -> dict[str, str]:
    """The group of each image whose path matches."""
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UserError(f"--group_by {brief(regex)} is not a regular expression: {error}") from None
    groups = {}
    unmatched = []
    for path in paths:
        name = _relative(path, folders)
        if group := _group_in(name, pattern):
            groups[path] = group
        else:
            unmatched.append(name)
    if not groups:
        raise UserError(
            f"--group_by {brief(regex)} matches none of the paths of {len(paths)} images in "
            f"{log.source}, the first {brief(unmatched[0]) if unmatched else ''}"
        )
    if unmatched:
        log.note(
            f"{len(unmatched)} of {len(paths)} images do not match --group_by, the first "
            f"{brief(unmatched[0])}: each of them is a group of its own"
        )
    return groups


def _group_in(name: str, pattern: re.Pattern[str]) -> str | None:
    """The first capture group of a match, or without one the whole match; may be empty."""
    match = pattern.search(name)
    return match[min(1, pattern.groups)] if match else None


def groups_of_others(paths: Sequence[str], log: ReadingLog) -> list[frozenset[str]]:
    """Groups of images that are not of the data set, such as those of pre-training.

    Args:
        paths: Image files, which need not exist anymore.
        log: Result of ``find_groups``. Its regular expression is for paths below the data folder.
            As the folder of other images is unknown, it is searched in their paths below each of
            the folders that they are in. A column has groups of the images of its table, labelled
            or not.

    Returns:
        Groups that each image may belong to: at most one without a regular expression.
    """
    if log.group_by is not None:
        pattern = re.compile(log.group_by)
        return [
            frozenset(group for name in _below_each(path) if (group := _group_in(name, pattern)))
            for path in paths
        ]
    if log.grouped_by == _OF_FILES:
        found = [default_group(path) for path in paths]
    else:
        rows = {**log.groups_of_unlabelled, **log.groups}
        known = {os.path.abspath(path): group for path, group in rows.items()}
        found = [known.get(os.path.abspath(path)) for path in paths]
    return [frozenset() if group is None else frozenset([group]) for group in found]


def _below_each(path: str) -> list[str]:
    """The whole path, and the path below each of its folders, such as ``a/b.png`` and ``b.png``.

    So is the name of an image in a shard, which stands behind ``!``.
    """
    whole = Path(path).as_posix()
    return [whole, *(whole[mark.end() :] for mark in re.finditer("[/!]", whole))]


def _relative(path: str, folders: Sequence[Path]) -> str:
    """The path below its folder, with forward slashes; an image elsewhere keeps its own."""
    place = Path(os.path.abspath(path))
    for above in map(os.path.abspath, folders):
        if place.is_relative_to(above):
            return place.relative_to(above).as_posix()
    return place.as_posix()


def group_names(paths: Sequence[str], groups: Mapping[str, str]) -> np.ndarray | None:
    """The group of each of N images.

    Args:
        paths: Images.
        groups: Groups by path; an image without one is a group of its own, named by its path.

    Returns:
        ``(N,)`` str; None if there are no groups at all.
    """
    return _names(paths, groups) if groups else None


def _names(paths: Sequence[str], groups: Mapping[str, str]) -> np.ndarray:
    return np.array([groups.get(path, path) for path in paths], dtype=str)
