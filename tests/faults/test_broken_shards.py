"""Shards of whatever kind: servers that misbehave, tars and indices that are damaged, kills."""

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import re
import resource
import shutil
import signal
import socket
import socketserver
import struct
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import count, cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import braceexpand
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vissl_lite
import vissl_lite.commands.shard  # else the name is that of the function
from tests.conftest import blobs, trying
from vissl_lite.cli import main
from vissl_lite.data.shards import download, tar_reader
from vissl_lite.data.shards import index as shard_index
from vissl_lite.data.shards import stream as shard_stream
from vissl_lite.data.shards.braces import MAX_NAMES, count_names, expand
from vissl_lite.data.shards.index import find_shards, index_text, parse_index
from vissl_lite.data.shards.source import BrokenShardError, Shards
from vissl_lite.data.shards.stream import ShardSource
from vissl_lite.data.shards.tar_reader import BROKEN_TAR, TarReader
from vissl_lite.data.stream import Batch
from vissl_lite.data.views import Views, flip, random_crop
from vissl_lite.errors import UserError
from vissl_lite.run_folder import lock

shard_command = sys.modules["vissl_lite.commands.shard"]

IMAGES, EACH = 12, 4000  # images of a shard, and bytes of one at least


def image(number: int) -> bytes:
    """A small JPEG with something behind it, so that a shard is larger than what a socket holds."""
    file = BytesIO()
    blobs(number, 20, 24).save(file, "jpeg")
    return file.getvalue() + np.random.default_rng(number).bytes(EACH) + b"\xff\xd9"


def tar_of(members: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return file.getvalue()


CONTENT = {f"{number:02}.jpg": image(number) for number in range(IMAGES)}
TAR = tar_of(CONTENT)


def whole(size: int) -> int:
    """How many images there are in so many bytes of the shard."""
    with tarfile.open(fileobj=BytesIO(TAR)) as tar:
        return sum(one.offset_data + one.size <= size for one in tar)


# A server that misbehaves


class Server(socketserver.ThreadingTCPServer):
    """Answers by the first part of the path: ``/stall/x.tar`` stalls."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.ranges: list[int] = []
        self.files: dict[str, bytes] = {}
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the client has had enough


class Handler(socketserver.BaseRequestHandler):
    server: Server

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            more = self.request.recv(65536)
            if not more:
                return
            head += more
        target = head.split(b" ")[1].decode()
        self.path = re.sub(r"^http://[^/]*", "", target)  # a proxy is asked for whole URLs
        self.kind = self.path.split("/")[1]
        self.count = self.server.asked[self.path]
        self.server.asked[self.path] += 1
        begin = re.search(rb"(?i)range: bytes=(\d+)-", head)
        self.begin = int(begin[1]) if begin else 0
        self.server.ranges.append(self.begin)
        self.file = self.server.files.get(self.path, TAR)
        getattr(self, self.kind.replace("-", "_"))()

    def send(self, data: bytes) -> None:
        self.request.sendall(data)

    def header(self, status: str = "200 OK", **fields: object) -> None:
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        self.send("\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *lines, "", ""]).encode())

    def reset(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()

    def wait(self) -> None:
        self.server.ended.wait(60)

    def part(self) -> bytes:
        """The headers of what was asked for; what is to follow them."""
        size = len(self.file)
        if self.begin >= size > 0:
            self.header("416 Range Not Satisfiable", Content_Length=0)
            return b""
        if self.begin:
            content = f"bytes {self.begin}-{size - 1}/{size}"
            self.header(
                "206 Partial Content", Content_Length=size - self.begin, Content_Range=content
            )
        else:
            self.header(Content_Length=size)
        return self.file[self.begin :]

    # what it can do

    def ok(self) -> None:
        self.send(self.part())

    def no_ranges(self) -> None:
        self.header(Content_Length=len(TAR))
        self.send(TAR if self.count else TAR[: len(TAR) // 2])

    def cut_always(self) -> None:
        self.header(Content_Length=len(TAR))
        self.send(TAR[: len(TAR) // 2])

    def cut_every_second(self) -> None:
        rest = self.part()
        self.send(rest if self.count % 2 else rest[: len(rest) // 2])

    def cut_each_time(self) -> None:
        self.send(self.part()[:7000])

    def reset_each_time(self) -> None:
        self.send(self.part()[:7000])
        time.sleep(0.02)  # it arrives before the connection is reset
        self.reset()

    def a_byte_each_time(self) -> None:
        self.send(self.part()[:1])

    def status(self) -> None:
        self.header(self.path.split("/")[2], Content_Length=4)
        self.send(b"none")

    def busy_twice(self) -> None:
        if self.count < 2:
            self.header("503 Service Unavailable", Content_Length=0)
        else:
            self.ok()

    def nothing(self) -> None:
        self.wait()

    def headers_only(self) -> None:
        self.part()
        self.wait()

    def stall(self) -> None:
        rest = self.part()
        if not self.begin:
            self.send(rest[:20_000])
        self.wait()

    def stall_once(self) -> None:
        rest = self.part()
        self.send(rest[:20_000] if not self.count else rest)
        if not self.count:
            self.wait()

    def slowly(self) -> None:
        for byte in self.part():
            self.send(bytes([byte]))
            if self.server.ended.wait(0.05):
                return

    def slow_headers(self) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10_000:
            self.send(bytes([byte]))
            if self.server.ended.wait(0.05):
                return

    def close(self) -> None:
        pass

    def refuse(self) -> None:
        self.reset()

    def loop(self) -> None:
        self.header("302 Found", Location=self.path, Content_Length=0)

    def to_file(self) -> None:
        self.header("302 Found", Location="file:///etc/passwd", Content_Length=0)

    def moved(self) -> None:
        self.header("301 Moved", Location="/ok/x.tar", Content_Length=0)

    def garbage(self) -> None:
        self.send(np.random.default_rng(0).bytes(50_000))

    def html(self) -> None:
        page = b"<!DOCTYPE html><html><body>Please log in</body></html>" * 30
        self.header(Content_Length=len(page), Content_Type="text/html")
        self.send(page)

    def empty(self) -> None:
        self.header(Content_Length=0)

    def more(self) -> None:
        self.header(Content_Length=len(TAR))
        self.send(TAR + b"x" * 100_000)

    def more_without_length(self) -> None:
        self.header()
        self.send(TAR + b"x" * 100_000)

    def less_without_length(self) -> None:
        self.header()
        self.send(TAR[:30_000])

    def chunks_cut(self) -> None:
        self.header(Transfer_Encoding="chunked")
        self.send(b"%x\r\n%s\r\n" % (30_000, TAR[:30_000]))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PATIENCE", 2.0)
    monkeypatch.setattr(download, "WARN_AFTER", 0.5)
    monkeypatch.setattr(download, "MAX_SILENCE", 0.8)
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.01, 0.01, 0.01))
    monkeypatch.setattr(download, "_TICK", 0.05)


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What is logged."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    lines: list[str] = []
    handler = Keep()
    logging.getLogger("vissl_lite").addHandler(handler)
    yield lines
    logging.getLogger("vissl_lite").removeHandler(handler)


def images_of(url: str, count: int = IMAGES) -> tuple[dict[str, bytes], str]:
    """The images that a shard gives, and why it does not give all."""
    found: dict[str, bytes] = {}
    why, at = "", count
    try:
        for number, member in enumerate(Shards([url], np.array([count])).read(0, range(count))):
            assert member.position == number, "given twice, or left out"
            found[member.name] = member.data
    except BrokenShardError as error:
        why, at = str(error), error.at
    assert at == len(found)
    assert "\n" not in why
    return found, why


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("path", "images", "why"),
    [
        ("ok", IMAGES, None),
        ("moved", IMAGES, None),
        ("more", IMAGES, None),
        ("more-without-length", IMAGES, None),
        ("busy-twice", IMAGES, None),
        ("cut-every-second", IMAGES, None),
        ("cut-each-time", IMAGES, None),
        ("reset-each-time", IMAGES, None),
        ("no-ranges", IMAGES, None),
        ("stall-once", IMAGES, None),
        ("cut-always", whole(len(TAR) // 2), "the connection was lost"),
        ("status/404 Not Found", 0, "the server answers 404 Not Found"),
        ("status/403 Forbidden", 0, "the server answers 403 Forbidden"),
        ("status/410 Gone", 0, "the server answers 410 Gone"),
        ("status/999 Odd", 0, "the server answers 999"),
        ("status/500 Broken", 0, "the server answers 500 Internal Server Error"),
        ("status/429 Slowly", 0, "the server answers 429 Too Many Requests"),
        ("nothing", 0, "the server sends nothing, given up after 2 s"),
        ("headers-only", 0, "the server sends nothing, given up after 2 s"),
        ("slow-headers", 0, "the server sends nothing, given up after 2 s"),
        ("stall", whole(20_000), "the server sends nothing, given up after 2 s"),
        ("slowly", 0, "fewer than 10000 bytes per second come, given up after 2 s"),
        ("close", 0, "the connection was lost"),
        ("refuse", 0, "the connection was lost"),
        ("loop", 0, "the server redirects without end"),
        ("to-file", 0, "the server does not speak the protocol of the URL"),
        ("garbage", 0, "the server does not speak the protocol of the URL"),
        ("html", 0, "it is not a tar file: it begins with b'<!DOCTYPE html><'"),
        ("empty", 0, "it is empty"),
        ("less-without-length", whole(30_000), "it ends in the middle of a file"),
        ("chunks-cut", whole(30_000), "the connection was lost"),
    ],
)
def test_a_server_that_misbehaves(
    path: str, images: int, why: str | None, server: Server, log_lines: list[str]
) -> None:
    url = f"{server.url}/{path.replace(' ', '%20')}/x.tar"
    if path.startswith("status"):
        url = f"{server.url}/status/{path.split('/')[1].replace(' ', '%20')}/x.tar"
    start = time.monotonic()
    found, reason = images_of(url)
    seconds = time.monotonic() - start
    assert (len(found), reason) == (images, why or "")
    assert found == {name: CONTENT[name] for name in list(CONTENT)[:images]}
    assert seconds < 6
    waited = "given up after" in reason
    if waited:
        assert log_lines[0].startswith(f"waiting for {url}: ")
        assert re.search(r"; given up in [0-9] s at most$", log_lines[0])
        assert len(log_lines) == 1
    if path in ("cut-each-time", "reset-each-time", "cut-every-second"):
        assert server.ranges == sorted(set(server.ranges)), "read twice from the same place"
        assert len(server.ranges) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_server_that_sends_a_byte_per_connection(server: Server) -> None:
    """The connection is lost, or all is too slow: whichever is noticed first."""
    found, reason = images_of(f"{server.url}/a-byte-each-time/x.tar")
    assert not found
    assert reason.endswith("given up after 2 s")


@pytest.mark.slow
def test_who_reads_slowly_has_not_waited(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PATIENCE", 1.0)
    server.files["/ok/x.tar"] = tar_of({f"{n}.jpg": bytes(100_000) for n in range(30)})
    seen = 0
    for _ in Shards([f"{server.url}/ok/x.tar"], np.array([30])).read(0, range(30)):
        seen += 1
        time.sleep(0.06)
    assert seen == 30


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_connection_is_taken_up_where_it_was(server: Server) -> None:
    """Without ranges everything comes again, and is passed over."""
    images_of(f"{server.url}/cut-each-time/x.tar")
    assert sum(server.ranges[1:]) > 0
    found = images_of(f"{server.url}/no-ranges/x.tar")
    assert found == (CONTENT, "")
    assert server.asked["/no-ranges/x.tar"] == 3  # cut, no range, from the front


def test_proxies_of_the_environment_are_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    assert images_of("http://nowhere.invalid/ok/x.tar") == (CONTENT, "")
    monkeypatch.setenv("no_proxy", "nowhere.invalid")
    monkeypatch.setattr(download, "PAUSES", ())
    assert images_of("http://nowhere.invalid/ok/x.tar") == ({}, "the host is unknown")


def test_without_curl(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert images_of(f"{server.url}/ok/x.tar") == ({}, "curl is not installed, which opens it")
    with pytest.raises(UserError, match="curl is not installed") as caught:
        find_shards([f"{server.url}/ok/x.tar"])
    assert "\n" not in str(caught.value)


TAILS = ["x.tar;touch PWNED", "$(touch PWNED).tar", "`touch PWNED`.tar", "'; touch PWNED; '.tar",
     '"; touch PWNED; ".tar', "x.tar|touch PWNED", "x.tar&&touch PWNED", "[1-999999].tar",
     "{a,b}.tar", "x.tar -o PWNED", "x.tar --output PWNED"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_hostile_url_in_an_index_reaches_no_shell(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tails = [f"{start}{tail}" for tail, start in zip(TAILS, cycle(["", "-o"]), strict=False)]
    urls = [(tail, url) for tail in tails for url in (f"{server.url}/ok/{tail}", tail)]
    for tail, url in urls:
        entry = {"url": url, "nsamples": IMAGES}
        server.files["/ok/index.json"] = json.dumps({"shardlist": [entry]}).encode()
        found = find_shards([f"{server.url}/ok/index.json"])
        assert found is not None
        assert found.urls == [f"{server.url}/ok/{tail}"]
        images, why = images_of(found.urls[0])
        assert images == CONTENT or why == "it is not a URL"  # curl refuses blanks
    assert os.listdir() == []


NAMED = [
    ("pipe:touch PWNED", "names a command, which is never run: pipe:touch PWNED"),
    (" PIPE:touch PWNED", "names a command, which is never run"),
    ("file:///etc/passwd", "an index must give names beside it, or URLs"),
    ("FILE:x.tar", "an index must give names beside it, or URLs"),
    ("gopher://x/y.tar", "gopher://x/y.tar can't be opened: there are "),
    ("://x", "can't be opened: there are "),
    ("x\n.tar", "shard 0 in it has a url that is none"),
    ("x\0.tar", "shard 0 in it has a url that is none"),
    ("\x1b[2Jx.tar", "shard 0 in it has a url that is none"),
    ("", "shard 0 in it has a url that is none"),
    ("x" * 5000, "shard 0 in it has a url that is none"),
    (7, "shard 0 in it has a url that is none"),
    (None, "shard 0 in it has a url that is none"),
]


@pytest.mark.slow
def test_what_an_index_must_not_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for url, message in NAMED:
        content = json.dumps({"shardlist": [{"url": url, "nsamples": 3}]})
        server.files["/ok/index.json"] = content.encode()
        (tmp_path / "index.json").write_text(content)
        for index in (f"{server.url}/ok/index.json", "index.json"):
            with trying((url, index)), pytest.raises(UserError, match=re.escape(message)) as caught:
                find_shards([index])
            assert "\n" not in str(caught.value)
    assert os.listdir() == ["index.json"]


def test_an_index_from_a_server_names_nothing_on_this_machine(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "x.tar").write_bytes(TAR)
    for url, place in (
        (f"{tmp_path}/x.tar", f"{server.url}{tmp_path}/x.tar"),
        ("../../../x.tar", f"{server.url}/x.tar"),
        ("~/x.tar", f"{server.url}/ok/~/x.tar"),
    ):
        listed = {"shardlist": [{"url": url, "nsamples": 3}]}
        server.files["/ok/index.json"] = json.dumps(listed).encode()
        found = find_shards([f"{server.url}/ok/index.json"])
        assert found is not None
        assert found.urls == [place]


INDICES = [
    (b"", "it is not JSON that can be read"),
    (b"<!DOCTYPE html>", "it begins with b'<!DOCTYPE html>'"),
    (b"\xff\xfe\xff", "it is not JSON that can be read"),
    (b"[" * 100_000, "it is not JSON that can be read"),
    (b'{"a":' * 100_000, "it is not JSON that can be read"),
    (b"[]", "it has no list of shards, named shardlist"),
    (b"null", "it has no list of shards, named shardlist"),
    (b'{"shardlist": {}}', "it has no list of shards, named shardlist"),
    (b'{"shardlist": [3]}', "shard 0 in it has no url and no nsamples"),
    (b'{"shardlist": [{"url": "x.tar"}]}', "an nsamples that is not a number"),
    (b'{"shardlist": [{"url": "x.tar", "nsamples": -1}]}', "an nsamples that is not a number"),
    (b'{"shardlist": [{"url": "x.tar", "nsamples": 1.5}]}', "an nsamples that is not a number"),
    (b'{"shardlist": [{"url": "x.tar", "nsamples": true}]}', "an nsamples that is not a number"),
    (b'{"shardlist": [{"url": "x.tar", "nsamples": NaN}]}', "an nsamples that is not a number"),
    (b'{"shardlist": [{"url": "x.tar", "nsamples": 1e400}]}', "an nsamples that is not a number"),
    (b'{"shardlist": [{"url": "x.tar", "nsamples": %s}]}' % (b"9" * 400), "has 400 digits"),
    (b'{"shardlist": [{"url": "x.tar", "nsamples": %s}]}' % (b"9" * 9999), "has 9999 digits"),
    (b'{"shardlist": [{"url": "x.tar", "nsamples": 1, "filesize": -1}]}', "a filesize that"),
    (
        b'{"shardlist": [{"url": "x.tar", "nsamples": 9, "filesize": 512}]}',
        "can't hold 9 images in 512 bytes",
    ),
    (
        b'{"shardlist": [%s, %s]}' % ((b'{"url": "x.tar", "nsamples": 1}',) * 2),
        "it names a shard twice",
    ),
    (b'{"shardlist": []}', "lists no shards"),
    (b'{"shardlist": [], "shardlist": 3}', "has the key 'shardlist' twice"),
]


@pytest.mark.slow
def test_a_damaged_index(server: Server, tmp_path: Path, log_lines: list[str]) -> None:
    """It is named; shards on a disk are counted then, of others nothing is known."""
    (tmp_path / "x.tar").write_bytes(TAR)
    for content, why in INDICES:
        log_lines.clear()
        server.files["/ok/index.json"] = content
        (tmp_path / "index.json").write_bytes(content)
        empty = content == b'{"shardlist": []}'
        with trying(content):
            for source in (
                f"{server.url}/ok/index.json",
                f"{server.url}/ok/x.tar",
                str(tmp_path / "index.json"),
            ):
                if empty and source.endswith(".tar"):
                    continue
                with pytest.raises(UserError, match=re.escape(why)) as caught:
                    find_shards([source])
                assert "\n" not in str(caught.value)
            assert not log_lines
            counted = find_shards([str(tmp_path / "x.tar")])
            assert counted is not None
            assert len(counted) == IMAGES
            if not empty:
                (line,) = log_lines
                assert line.startswith(f"{tmp_path}/index.json can't be used, and the shards are")
                assert why in line


@pytest.mark.slow
def test_an_index_that_is_too_large_or_no_file(tmp_path: Path, server: Server) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(10**12)
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    server.files["/ok/large.json"] = bytes(shard_index._LARGEST + 1)
    for source, why in (
        (tmp_path / "large.json", "it is larger than 32 MiB"),
        (tmp_path / "fifo.json", "not a regular file"),
        (tmp_path / "zero.json", "not a regular file"),
        (f"{server.url}/ok/large.json", "it is larger than 32 MiB"),
    ):
        with pytest.raises(UserError, match=why):
            find_shards([str(source)])


def test_counts_that_are_not_those_of_the_shards(server: Server, log_lines: list[str]) -> None:
    url = f"{server.url}/ok/x.tar"
    found, why = images_of(url, IMAGES + 5)
    assert (found, why) == (CONTENT, "it ends there")
    few = Shards([url], np.array([IMAGES - 5]))
    assert len(list(few.read(0, range(IMAGES - 5), name_rest=True))) == IMAGES - 5
    assert log_lines == [
        f"{url} holds more images than the 7 that its index.json says: the rest is left out"
    ]
    right = Shards([url], np.array([IMAGES]))
    assert len(list(right.read(0, range(IMAGES), name_rest=True))) == IMAGES
    assert len(log_lines) == 1


@pytest.mark.slow
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text()
        | st.sampled_from(["pipe:x", "x.tar", "file:///x", "http://x/y.tar", 10**18]),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
            st.sampled_from(["shardlist", "url", "nsamples", "filesize", "x"]), inner, max_size=4
        ),
        max_leaves=20,
    ),
    st.binary(max_size=3),
)  # fmt: skip
def test_any_index(value: object, tail: bytes) -> None:
    for content in (json.dumps(value).encode() + tail, json.dumps({"shardlist": value}).encode()):
        try:
            entries = parse_index(content)
        except ValueError:
            continue
        for entry in entries:
            assert isinstance(entry.url, str)
            assert 0 <= entry.images <= 10**8


# The stream


def views() -> Views:
    return Views([[random_crop(8, 0.5), flip()]], shortest=8)


def stream(urls: list[str], workers: int, epochs: int = 1) -> list[Batch]:
    source = ShardSource(Shards(urls, np.full(len(urls), IMAGES)), views(), 0)
    return list(source.loader(6, epochs, 0, 0, 1, workers, pin_memory=False))


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_goes_on_with_other_shards_and_says_what_it_waits_for(
    workers: int, server: Server, log_lines: list[str]
) -> None:
    kinds = ["ok", "stall", "cut-every-second", "status/404", "html", "cut-each-time"]
    urls = [f"{server.url}/{kind}/{n}.tar" for n, kind in enumerate(kinds)]
    batches = stream(urls, workers)
    numbers = [number for batch in batches for number in batch.indices.tolist()]
    assert len(numbers) == 12 * IMAGES // 2
    good = {n for s in (0, 2, 5) for n in range(s * IMAGES, (s + 1) * IMAGES)}
    assert good <= set(numbers) <= good | set(range(IMAGES, 2 * IMAGES))
    lost = {one.shard: one for batch in batches for one in batch.lost}
    assert set(lost) == {urls[1], urls[3], urls[4]}
    assert "given up after 2 s" in lost[urls[1]].why
    assert lost[urls[1]].images == IMAGES - whole(20_000)
    time.sleep(0.1)
    assert {line.split(": ")[0] for line in log_lines} == {f"waiting for {urls[1]}"}


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_dead_ends_the_stream_in_one_line(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PATIENCE", 0.5)
    monkeypatch.setattr(shard_stream, "MAX_FAILED_SHARDS", 2)
    urls = [f"{server.url}/nothing/{n}.tar" for n in range(4)]
    for workers in (0, 1):
        start = time.monotonic()
        with pytest.raises(UserError, match="nor can the 2 shards before it: the server") as caught:
            stream(urls, workers)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - start < 3 * 0.5 + 3
    with pytest.raises(UserError, match=r"no image can be read in 4 shards.*the server sends noth"):
        ShardSource(Shards(urls, np.full(4, IMAGES)), views(), 0).first()


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_pretrain_from_a_server_that_misbehaves(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["ok"] * 9 + ["stall"]
    listed = [{"url": f"/{kind}/{n}.tar", "nsamples": IMAGES} for n, kind in enumerate(kinds)]
    server.files["/ok/index.json"] = json.dumps({"shardlist": listed}).encode()
    run = tmp_path / "run"
    command = ["pretrain", "--backbone", "test_resnet", "--image_size", "32", "--batch_size", "8"]
    command += ["--data", f"{server.url}/ok/index.json", "--epochs", "2", "--out", str(run)]
    assert main([*command, "--num_workers", "1"]) == 0
    log = (run / "log.txt").read_text()
    assert log.count(f"skipped, can't be read: {server.url}/stall/9.tar (from image 3 on: ") == 1
    assert f"WARNING waiting for {server.url}/stall/9.tar: " in log
    listed[:3] = [{"url": f"/nothing/{n}.tar", "nsamples": IMAGES} for n in range(3)]
    server.files["/ok/index.json"] = json.dumps({"shardlist": listed}).encode()
    capsys.readouterr()
    assert main([*command[:-1], str(tmp_path / "other"), "--num_workers", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.match(r"vissl-lite: \d+ of 120 images can't be read, the first http", lines[-1])
    assert "Traceback" not in "".join(lines)
    server.files["/ok/index.json"] = b"<html>"
    assert main([*command[:-1], str(tmp_path / "third")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "third").exists()


# Tars of all kinds


class Pipe(io.RawIOBase):
    """Bytes that can't be sought in, as those of a connection."""

    def __init__(self, data: bytes) -> None:
        self.data = BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self.data.readinto(buffer)


def members_of(data: bytes) -> tuple[list[tuple[str, bytes]], str]:
    """The regular files in a tar, and what is wrong with it: as a file and as a connection."""
    results = []
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(data)
        file.seek(0)
        for opened in (io.BufferedReader(file), io.BufferedReader(Pipe(data))):
            found, why = [], ""
            try:
                tar = TarReader(opened)
                while (name := tar.next()) is not None:
                    found.append((name, tar.read()))
            except BROKEN_TAR as error:
                why = str(error)
            results.append((found, why))
    assert results[0] == results[1]
    assert "\n" not in why
    return results[0]


def header(name: bytes, size: int, kind: bytes, **fields: bytes) -> bytes:
    """A header of a tar, with sizes that may be anything."""
    info = tarfile.TarInfo(name.decode())
    info.type = kind
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    data[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    for place, value in fields.items():
        data[int(place[1:]) : int(place[1:]) + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


IMAGE = ("07.jpg", CONTENT["07.jpg"])
AFTER = tar_of(dict([IMAGE]))

ODD_TARS = {
    "empty": (b"", [], "it is empty"),
    "only zeros": (bytes(10_000), [], ""),
    "no end": (AFTER[:5632], [IMAGE], ""),
    "no padding": (AFTER[: 512 + len(IMAGE[1])], [IMAGE], "it ends in the middle of a file"),
    "junk": (b"junk" * 1000, [], "it is not a tar file: it begins with b'junkjunkjunkjunk'"),
    "short junk": (b"junk", [], "it is not a tar file: it begins with b'junk'"),
    "junk behind": (AFTER[:5632] + b"x" * 512, [IMAGE], "it is damaged at byte 5632"),
    "half a header": (AFTER[:5632] + AFTER[:100], [IMAGE], "it ends in the middle of a header"),
    "links": (header(b"a.jpg", 0, b"1", _157=b"/etc/passwd") + header(b"b.jpg", 0, b"2")
              + AFTER, [IMAGE], ""),
    "devices": (header(b"a.jpg", 0, b"3") + header(b"b.jpg", 0, b"4") + header(b"c.jpg", 0, b"6")
                + AFTER, [IMAGE], ""),
    "folders": (header(b"a.jpg", 0, b"5") + AFTER, [IMAGE], ""),
    "sizes of links": (header(b"a.jpg", 10**12, b"2") + AFTER, [IMAGE], ""),
    "unknown kinds": (header(b"a.jpg", 5, b"V") + padded(b"12345") + AFTER, [IMAGE], ""),
    "names outside": (tar_of({"/etc/x.jpg": b"1", "../../x.jpg": b"2"}),
                      [("/etc/x.jpg", b"1"), ("../../x.jpg", b"2")], ""),
    "the same name": (tar_of({"x.jpg": b"1"})[:1024] + tar_of({"x.jpg": b"2"}),
                      [("x.jpg", b"1"), ("x.jpg", b"2")], ""),
    "10^15 bytes": (header(b"x.jpg", 10**15, b"0") + bytes(5000), [],
                    "it ends in the middle of a file"),
    "2^80 bytes": (header(b"x.jpg", 2**80, b"0") + bytes(5000), [],
                   "it ends in the middle of a file"),
    "10^15 bytes of a name": (header(b"x", 10**15, b"L") + bytes(5000), [],
                              "it has a header of 1000000000000000 bytes"),
    "fewer than no bytes": (header(b"x.jpg", 0, b"0", _124=b"\xff" * 12), [],
                            "it has a header with a negative number"),
    "no number": (header(b"x.jpg", 0, b"0", _124=b"-0000000777\0"), [],
                  "it has a header without a number where one must be"),
    "a link in its number": (header(b"x.jpg", 0, b"0", _124=b"1_0\0"), [],
                             "it has a header without a number where one must be"),
    "a long name": (tar_of({"y" * 5000 + ".jpg": b"1"}), [], "it has a name of 5004 bytes"),
    "a PAX header of 100 MB": (header(b"x", 100 * 10**6, b"x") + bytes(5000), [],
                               "it has a header of 100000000 bytes"),
    "a PAX header that is damaged": (header(b"x", 9, b"x") + padded(b"0 path=x\n") + AFTER, [],
                                     "it has a header that is damaged"),
    "a PAX header of digits": (header(b"x", 10**6, b"x") + padded(b"1" * 10**6) + AFTER, [],
                               "it has a header that is damaged"),
    "a PAX size": (header(b"x", 13, b"x") + padded(b"13 size=10^9\n") + AFTER, [],
                   "it has a header without a number where one must be"),
    "a thousand PAX headers": (
        (header(b"x", 12, b"x") + padded(b"12 path=abc\n")) * 1000 + header(b"", 1, b"0")
        + padded(b"1"), [("abc", b"1")], ""),
    "a global PAX header": (header(b"x", 12, b"g") + padded(b"12 path=abc\n") + AFTER, [IMAGE], ""),
    "a sparse file": (header(b"x.jpg", 512, b"S", _483=b"%012o" % 10**9) + bytes(512) + AFTER,
                      [("x.jpg", b""), IMAGE], ""),
    "a sparse file that goes on": (
        header(b"x.jpg", 0, b"S", _482=b"\1") + (bytes(504) + b"\1" + bytes(7)) * 100, [],
        "it ends in the middle of a file"),
}  # fmt: skip


def test_odd_tars() -> None:
    for kind, (data, members, why) in ODD_TARS.items():
        start = time.process_time()
        assert members_of(data) == (members, why), kind
        assert time.process_time() - start < 5, kind  # a thousand headers are no loop of loops


@pytest.mark.parametrize("opened", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars(opened: Callable[[bytes], bytes]) -> None:
    data = opened(TAR)
    assert members_of(data) == (list(CONTENT.items()), "")
    found, why = members_of(data[: len(data) // 2])
    assert found == list(CONTENT.items())[: len(found)]
    assert why
    members_of(data[:-200] + bytes(200))  # what is wrong with the last image decoding shows


@pytest.mark.parametrize(
    ("opened", "name"), [(gzip, b"a.jpg"), (gzip, b"a.txt"), (bz2, b"a.jpg"), (lzma, b"a.jpg")]
)
def test_a_bomb(
    opened: ModuleType,
    name: bytes,
    tmp_path: Path,
    log_lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many zeros in a small file: a fraction of them is read."""
    monkeypatch.setattr(tar_reader, "_SMALL", 2 << 20)
    file = tmp_path / "x.tar.gz"
    with opened.open(file, "wb") as out:
        out.write(header(name, 10**15, b"0"))
        for _ in range(10):
            out.write(bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, why = images_of(str(file), 1)
    assert (found, why) == ({}, "it inflates to more than 200 times its size")
    with pytest.raises(UserError, match="no images found in 1 shards"):
        find_shards([str(file)])
    assert "it inflates to more than 200 times its size" in log_lines[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_an_image_that_is_too_large_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_reader, "MAX_IMAGE_BYTES", 4000)
    (tmp_path / "x.tar").write_bytes(
        tar_of({"a.jpg": bytes(4000), "b.jpg": bytes(4001), "c.jpg": b"c"})
    )
    found, why = images_of(str(tmp_path / "x.tar"), 3)
    assert (found, why) == ({"a.jpg": bytes(4000), "b.jpg": b"", "c.jpg": b"c"}, "")


def test_what_is_not_a_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "link.tar").symlink_to("nowhere")
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.tar"))
        for name, why in (
            ("fifo", "not a regular file"),
            ("zero", "not a regular file"),
            ("socket", "No such device or address"),
            ("folder", "not a regular file"),
            ("link", "No such file or directory"),
            ("loop", "Too many levels of symbolic links"),
        ):
            assert images_of(str(tmp_path / f"{name}.tar"), 1) == ({}, why)
            if name != "folder":  # one of images, perhaps
                with pytest.raises(UserError, match=r"not a regular file|does not exist"):
                    find_shards([str(tmp_path / f"{name}.tar")])
            listed = [(f"{name}.tar", 1, 0)]
            (tmp_path / "index.json").write_text(index_text(listed).replace(": 0", ": 512"))
            if name != "folder":
                found = find_shards([str(tmp_path)])
                assert found is not None
                assert images_of(found.urls[0], 1) == ({}, why)


NAMES = st.text(
    st.characters(blacklist_characters="\0\n", blacklist_categories=["Cs"]),
    min_size=1,
    max_size=150,
).map(lambda name: name.strip("/") or "x")


@pytest.mark.slow
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1500)), min_size=1, max_size=5),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_tars_are_read_as_python_does(members: list[tuple[str, bytes]], kind: int) -> None:
    try:
        data = tar_of(dict(members), kind)
    except ValueError:  # a name that is too long for the format
        return
    with tarfile.open(fileobj=BytesIO(data)) as tar:
        expected = [(one.name, tar.extractfile(one).read()) for one in tar]
    assert members_of(data) == (expected, "")


@given(
    st.lists(st.tuples(st.integers(0, 12_000), st.binary(min_size=1, max_size=8)), max_size=8),
    st.none() | st.integers(0, 12_000),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.booleans(),
)
def test_any_damage_to_a_tar(
    changes: list[tuple[int, bytes]], end: int | None, kind: int, compressed: bool
) -> None:
    names = {"a.jpg": b"1" * 700, "b" * 90 + ".jpg": b"2" * 512, "ü.jpg": b"", "d.jpg": b"4" * 99}
    data = bytearray(tar_of(names, kind))
    if compressed:
        data = bytearray(gzip.compress(bytes(data)))
    for place, what in changes:
        data[place % len(data) : place % len(data) + len(what)] = what
    members_of(bytes(data[:end]))


# Names with braces


PATTERNS = [
    ("x-{0..9999999999}.tar", "stands for 10,000,000,000 shards: at most 1,000,000"),
    ("{0..9999}{0..9999}.tar", "stands for 100,000,000 shards"),
    ("{0..999}-{a..z}-{0..999}.tar", "stands for 26,000,000 shards"),
    ("{,}" * 60 + ".tar", "stands for far too many shards"),
    ("{a,{0..999}{0..9999}}.tar", "stands for 10,000,001 shards"),
    (f"{{0..{'9' * 5000}}}.tar", "stands for far too many shards"),
    ("http://127.0.0.1:9/{0..9999999}.tar", "stands for 10,000,000 shards"),
    ("{" * 100 + "}" * 100 + ".tar", "has braces more than 20 deep"),
    ("{1{2,3}.tar", "has braces that are not balanced"),
    ("a}.tar", "has braces that are not balanced"),
    ("{.tar", "has braces that are not balanced"),
    ("a{0..}.tar", "a{0..}.tar does not exist"),
    ("a{9..0}.tar", "a9.tar does not exist"),
    ("a{a..z}.tar", "aa.tar does not exist"),
    ("a{}.tar", "a{}.tar does not exist"),
    ("${NOT_SET}.tar", "the environment must set WDS_NAME for each ${NAME}"),
]


def test_names_with_braces() -> None:
    for pattern, message in PATTERNS:
        start = time.process_time()
        with trying(pattern), pytest.raises(UserError, match=re.escape(message)) as caught:
            find_shards([pattern])
        assert "\n" not in str(caught.value)
        assert time.process_time() - start < 5, pattern  # 10^18 names are not made


@given(
    st.lists(
        st.sampled_from(["{", "}", ",", "..", "1", "07", "-3", "a", "Z", "\\", "x"]), max_size=14
    ).map("".join)
)
def test_names_are_counted_as_they_are_made(pattern: str) -> None:
    try:
        count = count_names(pattern)
    except UserError:
        return
    if count <= min(10_000, MAX_NAMES):
        assert len(list(braceexpand.braceexpand(pattern))) == count
        assert len(expand(pattern)) == count


# Writing shards


def tars_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def write(photos: Path, out: Path, *options: str) -> int:
    return main(
        ["shard", "--data", str(photos), "--out", str(out), "--images_per_shard", "5", *options]
    )


class KilledError(BaseException):
    """Stands for a kill: nothing is cleaned up, as what would do so is stubbed out."""


@pytest.mark.parametrize("each", [0, pytest.param(12, marks=pytest.mark.slow)])
def test_a_kill_between_any_two_changes_of_files_is_made_good(
    each: int,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before there are no shards, fewer, or more."""
    whole = tmp_path / "whole"
    assert write(photos, whole) == 0
    changes = last = 0

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def changed(*arguments: object, **options: object) -> object:
            nonlocal changes
            changes += 1
            if changes > last:
                raise KilledError
            return change(*arguments, **options)

        return changed

    states = set()
    for last in [0, 1, 5, 6, *range(20, 200)]:
        out = tmp_path / f"out-{last}"
        if each:
            vissl_lite.shard(data=str(photos), out=str(out), images_per_shard=each)
        old = tars_in(out) if each else {}
        changes, killed = 0, False
        with monkeypatch.context() as patch:
            patch.setattr(shard_command, "_remove_parts", lambda folder: None)
            patch.setattr(tarfile.TarFile, "addfile", counted(tarfile.TarFile.addfile))
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            patch.setattr(Path, "write_text", counted(Path.write_text))
            try:
                write(photos, out, "--overwrite")
            except KilledError:
                killed = True
        left = tars_in(out)
        if "index.json" in left:  # it stands for the older set, as it was, or the new one
            there = {n: data for n, data in left.items() if not n.endswith((".part", ".lock"))}
            assert there in (old, tars_in(whole))
        capsys.readouterr()
        assert write(photos, out) == 2
        message = capsys.readouterr().err
        finished = "index.json" in left
        assert finished or "shards that were not written to the end" in message
        assert "--overwrite" in message
        states.add((finished, frozenset(re.sub(r"\d+", "", name) for name in left)))
        assert write(photos, out, "--overwrite") == 0
        assert tars_in(out) == tars_in(whole)
        if not killed:
            break
    assert not killed
    assert len(states) > 3


@pytest.mark.slow
def test_kills_while_shards_are_written(tmp_path: Path) -> None:
    photos, out, whole = tmp_path / "photos", tmp_path / "out", tmp_path / "whole"
    photos.mkdir()
    for number in range(60):
        (photos / f"{number}.jpg").write_bytes(CONTENT["00.jpg"] + b"%d" % number)
    vissl_lite.shard(data=str(photos), out=str(whole), images_per_shard=5)
    expected, left = tars_in(whole), set()
    vissl_lite.shard(data=str(photos), out=str(out), images_per_shard=5)
    for kill in (3, 30, 58):
        child = os.fork()
        if not child:
            calls, add = count(), tarfile.TarFile.addfile

            def add_or_die(
                *given: object, add: Any = add, calls: Any = calls, at: int = kill
            ) -> None:
                if next(calls) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                add(*given)

            tarfile.TarFile.addfile = add_or_die  # type: ignore[method-assign]
            vissl_lite.shard(data=str(photos), out=str(out), images_per_shard=6, overwrite=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        left.add(len(os.listdir(out)))
    assert len(left) > 1  # it was killed in different states
    vissl_lite.shard(data=str(photos), out=str(out), images_per_shard=5, overwrite=True)
    assert tars_in(out) == expected


def test_two_processes_never_write_the_same_shards(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write(photos, tmp_path / "out") == 0
    before = tars_in(tmp_path / "out")
    capsys.readouterr()
    with lock(tmp_path / "out"):
        assert write(photos, tmp_path / "out", "--overwrite") == 2
    assert "another process is writing to" in capsys.readouterr().err
    (tmp_path / "out" / ".lock").unlink(missing_ok=True)
    assert tars_in(tmp_path / "out") == before


def test_a_full_disk_leaves_what_was_there(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert write(photos, out) == 0
    before = tars_in(out)
    written = 0

    def full(self: tarfile.TarFile, *arguments: object) -> None:
        nonlocal written
        written += 1
        if written > 12:
            raise OSError(28, "No space left on device")
        added(self, *arguments)

    added = tarfile.TarFile.addfile
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    for folder in (out, tmp_path / "new"):
        written = 0
        with pytest.raises(OSError, match="No space left"):
            vissl_lite.shard(data=str(photos), out=str(folder), images_per_shard=5, overwrite=True)
    assert tars_in(out) == before
    assert not (tmp_path / "new").exists()


def test_shards_are_never_written_where_the_images_are(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path(shutil.copytree(photos, tmp_path / "out" / "photos"))
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "list.txt").write_text("photos/a/01.jpg\n")
    (tmp_path / "list.txt").write_text("out/photos/a/01.jpg\n")
    count = len(list(tmp_path.rglob("*")))
    for data, out, message in (
        (mine, tmp_path / "out", "lies in --out"),
        (mine, tmp_path / "link", "lies in --out"),
        (mine, mine, "lies in --out"),
        (mine / "a" / "01.jpg", mine / "a", "lies in --out"),
        (tmp_path / "out" / "list.txt", tmp_path / "out", "lies in --out"),
        (tmp_path / "list.txt", mine, "names out/photos/a/01.jpg, which lies in --out"),
        (mine, mine / "shards", "lies in --data"),
        (tmp_path / "link", tmp_path / "out" / "new", "lies in --data"),
        (photos, tmp_path / "out", "holds other files, such as list.txt"),
    ):
        for options in ((), ("--overwrite",)):
            assert write(data, out, *options) == 2
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1
            assert message in lines[0]
    assert len(list(tmp_path.rglob("*"))) == count


def test_shards_of_others_are_never_overwritten(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert write(photos, out) == 0
    (out / "train-000007.tar").write_bytes(b"mine")
    assert write(photos, out, "--overwrite") == 2
    assert "holds train-000007.tar, which no index.json there lists" in capsys.readouterr().err
    (out / "train-000007.tar").unlink()
    (out / "train-000008.tar.part").mkdir()
    assert write(photos, out, "--overwrite") == 2
    assert "holds other files, such as train-000008.tar.part" in capsys.readouterr().err
    (out / "train-000008.tar.part").rmdir()
    (out / "index.json").write_text("{")
    assert write(photos, out, "--overwrite") == 2
    assert (out / "train-000004.tar").is_file()


def test_what_is_no_file_or_vanishes_is_left_out(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Path(shutil.copytree(photos, tmp_path / "photos"))
    monkeypatch.setattr(shard_command, "MAX_IMAGE_BYTES", 10**6)
    os.mkfifo(mine / "fifo.jpg")
    (mine / "zero.jpg").symlink_to("/dev/zero")
    (mine / "large.jpg").write_bytes(bytes(10**6 + 1))
    (mine / "gone.jpg").write_bytes(b"x")
    found = sorted(map(str, mine.rglob("*.jpg")))  # as they were when they were listed
    (mine / "gone.jpg").unlink()
    monkeypatch.setattr(shard_command, "find_images", lambda sources: found)
    result = vissl_lite.shard(data=str(mine), out=str(tmp_path / "out"))
    assert result.images == 24
    assert {Path(path).name for path in result.left_out} == {
        "fifo.jpg",
        "zero.jpg",
        "large.jpg",
        "gone.jpg",
    }
