"""Find shards and the number of images in each: expand names, read indices, count members.

The index is in the folder of the shards, in the ``wids`` format of WebDataset 0.2.
"""

import importlib.util
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urljoin, urlparse
from urllib.request import url2pathname

import numpy as np

from vissl_lite.data.json_file import parse_json
from vissl_lite.data.reading import open_regular
from vissl_lite.data.shards.braces import expand
from vissl_lite.data.shards.download import CURL_SCHEMES, fetch, scheme
from vissl_lite.data.shards.source import ImageMembers, Shards, is_remote
from vissl_lite.data.shards.tar_reader import BROKEN_TAR, TarReader
from vissl_lite.errors import UserError

log = logging.getLogger(__name__)

INDEX = "index.json"
INDEX_PART = f"{INDEX}.part"  # Index of shards that are still being written
_MISSING = "it does not exist"

# Maximum bytes of an index, enough for 300,000 shards
_LARGEST = 32 << 20

# Plausible maximum of images and bytes per shard and of images in total; an image takes at least
# one block of a tar
_MOST_IMAGES, _MOST_BYTES, _MOST_IN_ALL, _BLOCK = 10**8, 1 << 50, 10**10, 512

# Name of a shard in a command
_TAR = re.compile(r"[^/\s]+\.(?:tar\.gz|tgz|tar)\b")


class Entry(NamedTuple):
    """A shard in an index.

    Attributes:
        url: URL or name as listed.
        images: Number of images.
        size: Size in bytes; None if unknown.
        axis: Axis of the slices of volumes; None for each volume's own.
    """

    url: str
    images: int
    size: int | None
    axis: int | None = None


@dataclass(frozen=True)
class _Index:
    """Result of looking for an index.

    Attributes:
        entries: Entries by location of the shard; None if there is no usable index.
        named: Entries by file name; empty if names repeat.
        why: Reason why the index can't be used.
    """

    entries: dict[str, Entry] | None
    named: dict[str, Entry]
    why: str = ""


def are_shards(source: str) -> bool:
    """Whether a source is shards: tar files, URLs, an index or a folder with one."""
    if os.path.isdir(source):
        return _index(os.path.join(source, INDEX), {}).entries is not None
    return is_remote(source) or bool(re.search(r"(\.tar|\.tar\.gz|\.tgz|\.json)$", source))


def find_shards(sources: Sequence[str]) -> Shards | None:
    """Find the shards of some sources and their numbers of images.

    The numbers come from the index in the folder of the shards, or an index given as a source.
    Images in local shards without an index are counted.

    Args:
        sources: Files or URLs that curl or ``webdataset.gopen`` can open, with braces as in
            ``train-{000000..000099}.tar``; indices; or folders with an index.

    Returns:
        The shards, or None if no source is shards.

    Raises:
        UserError: If only some sources are shards, shards are missing, uncountable or empty, or
            their slices are along different axes.
    """
    kinds = {are_shards(source): source for source in sources}
    if True not in kinds:
        return None
    if False in kinds:
        raise UserError(
            f"--data mixes shards ({kinds[True]}) with others ({kinds[False]}): make shards of all "
            f"with vissl-lite shard"
        )
    if importlib.util.find_spec("webdataset") is None:
        raise UserError("shards need webdataset: pip install 'vissl-lite[shards]'")
    known: dict[str, _Index] = {}  # By location
    urls = list(dict.fromkeys(url for source in sources for url in _expand(source, known)))
    found = [_look_up(url, known) for url in urls]
    for place, index in known.items():
        if index.why not in ("", _MISSING):
            log.warning(
                "%(index)s can't be used, and the shards are counted: %(why)s",
                {"index": place, "why": index.why},
                extra={"code": "index.unusable"},
            )
    counts = np.array([entry.images for entry in found], np.int64)
    if counts.sum() > _MOST_IN_ALL:
        raise UserError(f"{len(urls)} shards are said to hold {counts.sum():,} images: they can't")
    if not counts.sum():
        if not urls:
            raise UserError(f"{sources[0]} lists no shards")
        raise UserError(f"no images found in {len(urls)} shards, the first {urls[0]}")
    sized = [(entry.size, entry.images) for entry in found if entry.size]
    mean = sum(s for s, _ in sized) / max(1, sum(c for _, c in sized)) if sized else None
    axes = {entry.axis: url for entry, url in zip(found, urls, strict=True)}
    if len(axes) > 1:
        words = ", ".join(f"{url}: {'none' if a is None else a}" for a, url in axes.items())
        raise UserError(f"the shards hold slices along different axes ({words})")
    return Shards(urls, counts, mean, found[0].axis)


def _expand(source: str, known: dict[str, _Index]) -> list[str]:
    """Expand a source to shards."""
    if os.path.isdir(source) or source.endswith(".json"):
        place = os.path.join(source, INDEX) if os.path.isdir(source) else _local(source)
        if place.startswith("pipe:"):
            raise UserError(f"{place} can't give an index: give commands that write the shards")
        index = _index(place, known)
        if index.entries is None:
            raise UserError(f"{place} is not an index of shards that can be read: {index.why}")
        for url in index.entries:
            known[_beside(url, INDEX)] = index
        return list(index.entries)
    urls = [source] if os.path.exists(source) else expand(source)
    return [_local(url) for url in urls]


def _local(url: str) -> str:
    """Convert a ``file:`` URL to a path; return others unchanged."""
    if not url.startswith("file:"):
        return url
    try:
        return url2pathname(urlparse(url).path)
    except ValueError as error:
        raise UserError(f"{url} is not a URL: {error}") from None


def _beside(place: str, name: str) -> str:
    """Location of another file in the folder of an index or shard, also within a command."""
    if place.startswith("pipe:"):
        return _TAR.sub(name, place)
    return re.sub(r"[^/]*$", "", _without_query(place)) + name


def _look_up(url: str, known: dict[str, _Index]) -> Entry:
    """The entry of a shard in an index; or else made by counting its images."""
    place = _beside(url, INDEX)
    index = _index(place, known)
    entry = None
    if index.entries is not None:
        entry = index.entries.get(url) or index.named.get(_name(url))
    size = os.path.getsize(url) if os.path.isfile(url) else None
    if entry is not None and (None in (size, entry.size) or entry.size == size):
        return entry
    if size is not None:  # No index, or it describes another file
        of_others = next(iter((index.entries or {}).values()), None)
        return Entry(url, _count(url), size, None if of_others is None else of_others.axis)
    if not is_remote(url):
        wrong = "is not a regular file" if os.path.exists(url) else "does not exist"
        raise UserError(f"{url} {wrong}")
    _check_scheme(url)
    if index.entries is not None:
        raise UserError(
            f"{place} lists {len(index.entries)} shards, and {_name(url)} is not among them: the "
            f"last is {_name(list(index.entries)[-1])}"
        )
    raise UserError(
        f"{place} can't be read, which says how many images the shards hold ({index.why}): "
        f'vissl-lite shard writes it, as {{"shardlist": [{{"url": "{_name(url)}", '
        f'"nsamples": 1000}}]}}'
    )


def _check_scheme(url: str) -> None:
    """Raise a UserError for an unsupported URL scheme."""
    from webdataset.gopen import gopen_schemes

    kind = scheme(url)
    if kind == "s3":
        raise UserError(f'{url} can\'t be opened: give "pipe:aws s3 cp {url} -"')
    known = {*CURL_SCHEMES, *gopen_schemes} - {"__default__"}
    if kind not in known:
        raise UserError(f"{url} can't be opened: there are {', '.join(sorted(known))}")


def _name(url: str) -> str:
    if url.startswith("pipe:"):
        return (_TAR.findall(url) or [url])[-1]
    return os.path.basename(_without_query(url))


def _without_query(url: str) -> str:
    return url.split("?")[0] if "://" in url else url


def _index(place: str, known: dict[str, _Index]) -> _Index:
    """Read an index, with a cache."""
    if place not in known:
        known[place] = _read_index(place)
    return known[place]


def _read_index(place: str) -> _Index:
    try:
        if is_remote(place):
            content = fetch(place, _LARGEST)
        else:
            with open_regular(place) as file:
                content = file.read(_LARGEST + 1)
            if len(content) > _LARGEST:
                raise ValueError(f"it is larger than {_LARGEST >> 20} MiB")
        entries = parse_index(content)
        placed = {_resolve(place, entry.url): entry for entry in entries}
        if len(placed) < len(entries):
            raise ValueError("it names a shard twice")
    except FileNotFoundError:
        return _Index(None, {}, _MISSING)
    except BROKEN_TAR as error:
        return _Index(None, {}, getattr(error, "strerror", None) or str(error))
    names = [_name(url) for url in placed]
    once = dict(zip(names, placed.values(), strict=True))
    if len(once) < len(names):
        once = {}
    return _Index(placed, once)


def parse_index(content: bytes) -> list[Entry]:
    """Parse an index.

    Args:
        content: JSON object with a list ``shardlist`` of objects with ``url``, ``nsamples`` and
            optionally ``filesize``, and optionally an ``axis``; other keys are ignored.

    Raises:
        ValueError: If the content is not a valid index.
    """
    try:
        read = parse_json(content, "it")
    except UserError as error:
        raise ValueError(f"{error}; it begins with {content[:16]!r}") from None
    listed = read.get("shardlist") if isinstance(read, dict) else None
    if not isinstance(listed, list):
        raise ValueError("it has no list of shards, named shardlist")
    axis = read.get("axis")
    if axis is not None and (type(axis) is not int or not 0 <= axis <= 2):
        raise ValueError("its axis is not 0, 1 or 2")
    entries = []
    for number, one in enumerate(listed):
        if not isinstance(one, dict):
            raise ValueError(f"shard {number} in it has no url and no nsamples")
        url, images, size = one.get("url"), one.get("nsamples"), one.get("filesize")
        if not isinstance(url, str) or not url or len(url) > 4096 or not url.isprintable():
            raise ValueError(f"shard {number} in it has a url that is none")
        if type(images) is not int or not 0 <= images <= _MOST_IMAGES:
            raise ValueError(f"{url} in it has an nsamples that is not a number of images")
        if size is not None and (type(size) is not int or not 0 <= size <= _MOST_BYTES):
            raise ValueError(f"{url} in it has a filesize that is not a number of bytes")
        if size is not None and images * _BLOCK > size:
            raise ValueError(f"{url} in it can't hold {images} images in {size} bytes")
        entries.append(Entry(url, images, size, axis))
    return entries


def _resolve(place: str, url: str) -> str:
    """Resolve the location of a shard that an index lists.

    Raises:
        UserError: If the index names a command or a ``file:`` URL.
    """
    kind = url.strip().partition(":")[0].lower()
    if kind == "pipe":  # Commands are accepted from the user only
        raise UserError(f"{place} names a command, which is never run: {url}")
    if kind == "file":
        raise UserError(f"{place} names {url}: an index must give names beside it, or URLs")
    if "://" in url:
        _check_scheme(url)
        return url
    if scheme(place) in ("http", "https") and is_remote(place):
        return urljoin(_without_query(place), url)  # Never resolves to a local file
    return os.path.join(os.path.dirname(place), url)


def _count(file: str) -> int:
    """Count the images in a tar file by its headers; warn if it is damaged or empty."""
    images, whole, complete = ImageMembers(), 0, True
    try:
        with open_regular(file) as opened:
            tar = TarReader(opened)
            while (name := tar.next()) is not None:
                images(name)
                tar.skip()
                whole = images.count
    except BROKEN_TAR as error:
        complete = False
        why = getattr(error, "strerror", None) or str(error)
        log.warning(
            "can't be read behind image %(images)d: %(shard)s (%(why)s)",
            {"images": whole, "shard": file, "why": why},
            extra={"code": "shard.unreadable"},
        )
    if images.dotted:
        log.warning(
            "%(images)d images of %(shard)s are left out, the first %(first)s: a name must have no "
            "dot but that of its extension; vissl-lite shard writes such shards",
            {"images": len(images.dotted), "shard": file, "first": images.dotted[0]},
            extra={"code": "shard.dotted"},
        )
    if complete and not whole:
        log.warning(
            "holds no images: %(shard)s (%(bytes)d bytes)",
            {"shard": file, "bytes": os.path.getsize(file)},
            extra={"code": "shard.empty"},
        )
    return whole


def index_text(shards: Sequence[tuple[str, int, int]], axis: int | None = None) -> str:
    """Format an index.

    Args:
        shards: Name, number of images and size in bytes of each shard.
        axis: Axis of the slices of volumes; None for each volume's own.
    """
    entries = [{"url": n, "nsamples": count, "filesize": size} for n, count, size in shards]
    content = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "images": sum(count for _, count, _ in shards),
        **({} if axis is None else {"axis": axis}),
        "shardlist": entries,
    }
    return json.dumps(content, indent=1) + "\n"
