"""Shards of whatever kind: servers that misbehave, tars and indices that are damaged, kills."""

import bz2
import gzip
import json
import logging
import lzma
import os
import re
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vissl_lite
from tests.conftest import blobs
from vissl_lite.cli import main
from vissl_lite.commands import shard as shard_command
from vissl_lite.data import download, shard_index, shard_stream, shards, tar_reader
from vissl_lite.data.braces import MOST, count_names, expand
from vissl_lite.data.shard_index import find_shards, index_text, parse_index
from vissl_lite.data.shard_stream import ShardSource, read_images
from vissl_lite.data.shards import BrokenShardError, Shards
from vissl_lite.data.stream import Batch
from vissl_lite.data.tar_reader import BROKEN_TAR, TarReader
from vissl_lite.data.views import Views, flip, random_crop
from vissl_lite.errors import UserError

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
        if self.begin >= size:
            self.header("416 Range Not Satisfiable", Content_Length=0)
            return b""
        if self.begin:
            content = f"bytes {self.begin}-{size - 1}/{size}"
            self.header("206 Partial Content", Content_Length=size - self.begin,
                        Content_Range=content)  # fmt: skip
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
        self.send(self.part()[:20_000])
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
    monkeypatch.setattr(download, "PATIENCE", 1.0)
    monkeypatch.setattr(download, "SAY_AFTER", 0.3)
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.01, 0.01, 0.01))
    monkeypatch.setattr(download, "_TICK", 0.05)


@pytest.fixture
def said() -> Iterator[list[str]]:
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
    try:
        for number, member in enumerate(Shards([url], np.array([count])).read(0, range(count))):
            assert member.position == number, "given twice, or left out"
            found[member.name] = member.data
    except BrokenShardError as error:
        assert error.at == len(found)
        assert "\n" not in str(error)
        return found, str(error)
    return found, ""


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
        ("cut-always", whole(len(TAR) // 2), "the connection was lost"),
        ("a-byte-each-time", 0, "the connection was lost, given up after 1 s"),
        ("status/404 Not Found", 0, "the server answers 404 Not Found"),
        ("status/403 Forbidden", 0, "the server answers 403 Forbidden"),
        ("status/410 Gone", 0, "the server answers 410 Gone"),
        ("status/999 Odd", 0, "the server answers 999"),
        ("status/500 Broken", 0, "the server answers 500 Internal Server Error"),
        ("status/429 Slowly", 0, "the server answers 429 Too Many Requests"),
        ("nothing", 0, "the server sends nothing, given up after 1 s"),
        ("headers-only", 0, "the server sends nothing, given up after 1 s"),
        ("slow-headers", 0, "the server sends nothing, given up after 1 s"),
        ("stall", whole(20_000), "fewer than 10000 bytes per second come, given up after 1 s"),
        ("slowly", 0, "fewer than 10000 bytes per second come, given up after 1 s"),
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
)  # fmt: skip
def test_a_server_that_misbehaves(
    path: str, images: int, why: str | None, server: Server, said: list[str]
) -> None:
    url = f"{server.url}/{path.replace(' ', '%20')}/x.tar"
    if path.startswith("status"):
        url = f"{server.url}/status/{path.split('/')[1].replace(' ', '%20')}/x.tar"
    start = time.monotonic()
    found, reason = images_of(url)
    seconds = time.monotonic() - start
    assert (len(found), reason) == (images, why or "")
    assert found == {name: CONTENT[name] for name in list(CONTENT)[:images]}
    assert seconds < 4
    waited = "given up after" in reason
    assert bool(said) == waited
    if waited:
        assert said[0].startswith(f"waiting for {url}: ")
        assert re.search(r"; given up in [01] s$", said[0])
        assert len(said) == 1
    if path in ("cut-each-time", "reset-each-time", "cut-every-second"):
        assert server.ranges == sorted(set(server.ranges)), "read twice from the same place"
        assert len(server.ranges) > 1
