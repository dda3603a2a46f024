"""Which shards there are and how many images each holds: names with braces, indices, counting.

The index lies beside the shards, in the format that WebDataset 0.2 wrote for its ``wids``.
"""

import importlib.util
import json
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np

from vissl_lite.data.shards import BROKEN_TAR, ImageMembers, Shards, for_gopen, is_remote
from vissl_lite.errors import UserError

log = logging.getLogger(__name__)

INDEX = "index.json"

# The name of a shard in a command.
_TAR = re.compile(r"[^/\s]+\.(?:tar\.gz|tgz|tar)\b")


def are_shards(source: str) -> bool:
    """Whether a source of images is one of shards: tar files, URLs, an index or its folder."""
    if os.path.isdir(source):
        index = os.path.join(source, INDEX)
        return os.path.isfile(index) and _parse(Path(index).read_bytes()) is not None
    return is_remote(source) or bool(re.search(r"(\.tar|\.tar\.gz|\.tgz|\.json)$", source))


def find_shards(sources: Sequence[str]) -> Shards | None:
    """The shards that sources name, with their numbers of images.

    These come from the index beside the shards, or an index that is given itself. Local shards
    without one are counted.

    Args:
        sources: names with braces, as ``train-{000000..000099}.tar``, of files or of URLs that
            ``webdataset.gopen`` opens; indices, or folders with one.

    Returns:
        None where no source is of that kind.

    Raises:
        UserError: some are and some are not; shards do not exist, can't be counted or hold nothing.
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
    known: dict[str, dict[str, Any]] = {}  # what the indices say, by their places
    urls = list(dict.fromkeys(url for source in sources for url in _expand(source, known)))
    found = [_look_up(url, known) for url in urls]
    counts = np.array([count for count, _ in found], np.int64)
    if not counts.sum():
        raise UserError(f"no images found in {len(urls)} shards, the first {urls[0]}")
    sized = [(size, count) for count, size in found if size]
    mean = sum(s for s, _ in sized) / max(1, sum(c for _, c in sized)) if sized else None
    return Shards(urls, counts, mean)


def _expand(source: str, known: dict[str, dict[str, Any]]) -> list[str]:
    from webdataset.shardlists import expand_urls

    if os.path.isdir(source) or source.endswith(".json"):
        place = os.path.join(source, INDEX) if os.path.isdir(source) else source
        entries = _index(place, known)
        if entries is None:
            raise UserError(f"{place} is no index of shards that can be read")
        for entry in entries.values():  # commands are for who runs this to give
            if urlparse(entry["url"]).scheme == "pipe":
                raise UserError(f"{place} names a command, which is never run: {entry['url']}")
        # an index may list what is elsewhere
        urls = [_beside(place, entry["url"]) for entry in entries.values()]
        for url in urls:
            known[_beside(url, INDEX)] = entries
        return urls
    urls = [source] if os.path.exists(source) else expand_urls(source)
    return [url2pathname(urlparse(url).path) if url.startswith("file:") else url for url in urls]


def _beside(place: str, name: str) -> str:
    """The place of another file in the folder of an index or a shard; in a command, too."""
    if "://" in name or os.path.isabs(name):
        return name
    if place.startswith("pipe:"):
        return _TAR.sub(name, place)
    return re.sub(r"[^/]*$", "", _without_query(place)) + name


def _look_up(url: str, known: dict[str, dict[str, Any]]) -> tuple[int, int]:
    """How many images a shard holds and how many bytes it takes, 0 where that is not known."""
    place = _beside(url, INDEX)
    entries = _index(place, known)
    entry = None if entries is None else entries.get(_name(url))
    size = os.path.getsize(url) if os.path.isfile(url) else None
    if entry is not None and entry.get("filesize", size) == (size or entry.get("filesize")):
        return entry["nsamples"], entry.get("filesize", 0)
    if size is not None:  # there is no index, or it is of another file
        return _count(url), size
    if not is_remote(url):
        raise UserError(f"{url} does not exist")
    if entries is not None:
        raise UserError(
            f"{place} lists {len(entries)} shards, and {_name(url)} is not among them: the last is "
            f"{list(entries)[-1]}"
        )
    if url.startswith("s3:"):
        raise UserError(f'{url} can\'t be opened: give "pipe:aws s3 cp {url} -"')
    raise UserError(
        f"{place} can't be read, which says how many images the shards hold: vissl-lite shard "
        f'writes it, as {{"shardlist": [{{"url": "{_name(url)}", "nsamples": 1000}}]}}'
    )


def _name(url: str) -> str:
    if url.startswith("pipe:"):
        return (_TAR.findall(url) or [url])[-1]
    return os.path.basename(_without_query(url))


def _without_query(url: str) -> str:
    return url.split("?")[0] if "://" in url else url


def _index(place: str, known: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The entries of an index by the names of the shards; None where there is none."""
    from webdataset.gopen import gopen

    if place not in known:
        content = b""
        with suppress(*BROKEN_TAR), gopen(for_gopen(place)) as file:
            content = file.read()
        known[place] = _parse(content) or {}
    return known[place] or None


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        entries = json.loads(content)["shardlist"]
        return {_name(e["url"]): {**e, "nsamples": int(e["nsamples"])} for e in entries}
    except (ValueError, LookupError, TypeError):
        return None


def _count(file: str) -> int:
    """Images in a tar file, by its headers; what is wrong with it is said in the log."""
    images, size, whole = ImageMembers(), os.path.getsize(file), True
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                if member.isreg():
                    images(member.name)
    except BROKEN_TAR as error:
        # the header of an image that is cut off may have been there
        whole, images.count = False, images.whole
        log.warning("can't be read behind image %d: %s (%s)", images.count, file, error)
    if whole and not images.count:
        log.warning("holds no images: %s (%d bytes)", file, size)
    return images.count


def write_index(folder: Path, shards: Sequence[tuple[str, int, int]]) -> Path:
    """Write the index of shards; it appears whole or not at all.

    Args:
        folder: where the shards are.
        shards: name, number of images and bytes of each.
    """
    entries = [{"url": n, "nsamples": count, "filesize": size} for n, count, size in shards]
    content = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "images": sum(count for _, count, _ in shards),
        "shardlist": entries,
    }
    file = folder / INDEX
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)
    return file
