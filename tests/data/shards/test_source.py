"""Shards: who gets which image, in what order, and what happens to those that are broken."""

import json
import os
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import blobs
from vissl_lite.data.fingerprints import fingerprints_of
from vissl_lite.data.shards import download
from vissl_lite.data.shards import source as shards
from vissl_lite.data.shards import stream as shard_stream
from vissl_lite.data.shards.index import find_shards, index_text
from vissl_lite.data.shards.source import Shards
from vissl_lite.data.shards.stream import ShardSource, ShardStream, mixed, read_images, write_sample
from vissl_lite.data.stream import Batch, ViewDataset
from vissl_lite.data.views import Views, flip, random_crop
from vissl_lite.errors import UserError
from vissl_lite.training.stream import StreamData

# three workers are to be tried on a machine with two cores as well
pytestmark = pytest.mark.filterwarnings("ignore:.*suggested max number of worker.*")

COUNTS = (7, 1, 13, 5, 11)  # 37 images
BATCH, PER_EPOCH, EPOCHS = 6, 6, 3


def views() -> Views:
    return Views([[random_crop(8, 0.5), flip()]], shortest=8)


def jpeg(number: int) -> bytes:
    file = BytesIO()
    blobs(number, 20, 24).save(file, "jpeg")
    return file.getvalue()


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of different lengths with 37 images, each with a label that is passed over."""
    folder = tmp_path_factory.mktemp("shards")
    number, listed = 0, []
    for shard, count in enumerate(COUNTS):
        members = {}
        for _ in range(count):
            members |= {f"some/{number:03}.jpg": jpeg(number), f"some/{number:03}.cls": b"1"}
            number += 1
        file = folder / f"train-{shard:06}.tar"
        write_tar(file, members)
        listed.append((file.name, count, file.stat().st_size))
    (folder / "index.json").write_text(index_text(listed))
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def found(folder: Path) -> Shards:
    one = find_shards([f"{folder}/train-{{000000..000004}}.tar"])
    assert one is not None
    return one


def read(
    folder: Path | Shards, workers: int = 0, start: int = 0, rank: int = 0, world: int = 1,
    seed: int = 0, epochs: int = EPOCHS,
) -> list[Batch]:  # fmt: skip
    source = ShardSource(found(folder) if isinstance(folder, Path) else folder, views(), seed)
    return list(source.loader(BATCH, epochs, start, rank, world, workers, pin_memory=False))


def numbers(batches: list[Batch]) -> list[int]:
    return [number for batch in batches for number in batch.indices.tolist()]


def content(batches: list[Batch]) -> list[tuple[bytes, ...]]:
    return [(b.indices.numpy().tobytes(), b.views[0].numpy().tobytes()) for b in batches]


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the shuffle window smaller than a worker's segment."""
    monkeypatch.setattr(shard_stream, "MIN_WINDOW", 4)
    monkeypatch.setattr(shard_stream, "MAX_WINDOW", 4)


# Who gets what


@pytest.mark.slow
@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 1), (3, 0), (3, 3)])
def test_every_epoch_has_each_image_once_but_for_the_remainder(
    world: int, workers: int, made: Path
) -> None:
    ranks = [read(made, workers, rank=rank, world=world) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {EPOCHS * PER_EPOCH}
    assert {len(batch.indices) for batches in ranks for batch in batches} == {BATCH // world}
    for epoch in range(EPOCHS):
        part = slice(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH)
        seen = [number for batches in ranks for number in numbers(batches[part])]
        assert len(seen) == len(set(seen)) == PER_EPOCH * BATCH
        assert set(seen) <= set(range(sum(COUNTS)))
    assert not any(batch.broken or batch.lost for batches in ranks for batch in batches)


@pytest.mark.slow
def test_the_order_is_by_chance_differs_between_epochs_and_follows_the_seed(made: Path) -> None:
    one = read(made)
    assert content(one) == content(read(made))
    assert numbers(one) != numbers(read(made, seed=1))
    first, second = numbers(one[:PER_EPOCH]), numbers(one[PER_EPOCH : 2 * PER_EPOCH])
    assert first != second
    steps = np.abs(np.diff(first))
    assert (steps > 1).mean() > 0.5  # not as they lie in the shards


def test_views_are_those_of_the_same_images_as_files(made: Path, tmp_path: Path) -> None:
    paths = []
    for number in range(sum(COUNTS)):
        paths.append(str(tmp_path / f"{number}.jpg"))
        Path(paths[-1]).write_bytes(jpeg(number))
    files = ViewDataset(paths, views(), 0)
    for number, batch in enumerate(read(made, epochs=2)):
        epoch = number // PER_EPOCH
        items = [files[epoch, index] for index in batch.indices.tolist()]
        for at, item in enumerate(items):
            np.testing.assert_array_equal(batch.views[0][at].permute(1, 2, 0), item.views[0])
        if epoch:
            assert batch.fingerprints is None
            continue
        assert batch.fingerprints is not None
        np.testing.assert_array_equal(batch.fingerprints, [item.fingerprint for item in items])
        assert [name.partition("!")[2] for name in batch.names] == [
            f"some/{index:03}.jpg" for index in batch.indices.tolist()
        ]


@pytest.mark.slow
@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize(
    ("start", "workers"), [(1, 0), (1, 3), (PER_EPOCH - 1, 1), (PER_EPOCH, 3), (PER_EPOCH + 2, 1)]
)
def test_starting_later_gives_the_tail_of_the_stream(start: int, workers: int, made: Path) -> None:
    whole = read(made, workers, rank=1, world=2)
    assert content(read(made, workers, start, rank=1, world=2)) == content(whole[start:])


def test_starting_later_opens_no_shard_that_is_not_needed(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    original = shards.open_regular
    monkeypatch.setattr(shards, "open_regular", lambda url: opened.append(url) or original(url))
    read(made, epochs=1)
    assert len(opened) >= len(COUNTS) - 1  # one image may be the remainder
    opened.clear()
    monkeypatch.setattr(shard_stream, "MAX_WINDOW", 4)
    read(made, start=PER_EPOCH - 1, epochs=1)
    assert 0 < len(opened) < len(COUNTS)


def test_a_stream_without_end_goes_on(made: Path) -> None:
    loader = ShardSource(found(made), views(), 0).loader(BATCH, None, 0, 0, 1, 0, pin_memory=False)
    with pytest.raises(TypeError, match="no end"):
        len(loader)
    batches = iter(loader)
    first = [next(batches) for _ in range(EPOCHS * PER_EPOCH)]
    assert content(first) == content(read(made))


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_drawn_at_the_resolution_of_their_batch(workers: int, made: Path) -> None:
    one = views()
    source = ShardSource(found(made), one, 0, smaller=[one.resized(0.5, round)])
    loader = source.loader(BATCH, 1, 1, 0, 1, workers, False, resolution=lambda batch: batch % 2)
    batches = list(loader)
    whole = read(made, workers, start=1, epochs=1)
    assert numbers(batches) == numbers(whole)
    sides = [batch.views[0].shape[-1] for batch in batches]
    assert sides == [
        whole[0].views[0].shape[-1] // (1 + batch % 2) for batch in range(1, PER_EPOCH)
    ]


def test_a_batch_that_is_not_the_next_one_can_be_asked_for(made: Path) -> None:
    stream = ShardStream(found(made), views(), 0, BATCH)
    whole = read(made)
    for batch in (3, 4, 1, PER_EPOCH):
        assert content([stream[batch, 0]]) == content([whole[batch]])


@pytest.mark.parametrize(("images", "window"), [(1000, 100), (50, 100), (1, 1)])
def test_mixing_takes_each_place_once_from_near(images: int, window: int) -> None:
    order = np.array(list(mixed(images, window, 10, (0, 1))))
    assert sorted(order) == list(range(images))
    assert (order - np.arange(images) < window).all()
    assert order[0] < 10  # the first batch waits for few
    if images == 1000:
        assert np.abs(order - np.arange(images)).mean() > window / 5


# What is broken


def broken_names(batches: list[Batch]) -> set[str]:
    return {one.path.rpartition("/")[2] for batch in batches for one in batch.broken}


def lost(batches: list[Batch]) -> dict[str, tuple[int, str]]:
    return {
        os.path.basename(one.shard): (one.images, one.why)
        for batch in batches
        for one in batch.lost
    }


@pytest.mark.slow
@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize("workers", [0, 3])
def test_a_shard_that_is_cut_off_gives_way_to_the_others(workers: int, copied: Path) -> None:
    file = copied / "train-000002.tar"  # images 8 to 20
    with tarfile.open(file) as tar:
        member = tar.getmember("some/012.jpg")
    os.truncate(file, member.offset_data + 100)
    given = Shards([str(copied / f"train-{i:06}.tar") for i in range(5)], np.array(COUNTS))
    ranks = [read(given, workers, rank=rank, world=2, epochs=2) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [2 * PER_EPOCH] * 2
    there = set(range(37)) - set(range(12, 21))
    for epoch in range(2):
        part = slice(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH)
        seen = [number for batches in ranks for number in numbers(batches[part])]
        assert len(seen) == 36
        assert set(seen) <= there
        assert len(set(seen)) >= 26  # of 28: nobody else gives way
    (missing,) = {one for batches in ranks for one in lost(batches).items()}
    assert missing[0] == "train-000002.tar"
    assert missing[1][0] == 9
    assert missing[1][1].startswith("from image 4 on: ")
    again = read(given, workers, start=4, rank=1, world=2, epochs=2)
    assert content(again) == content(ranks[1][4:])


def test_a_shard_that_is_not_there_is_named_and_skipped(copied: Path) -> None:
    given = found(copied)
    (copied / "train-000004.tar").unlink()
    batches = read(given)
    assert len(batches) == EPOCHS * PER_EPOCH
    assert set(numbers(batches)) <= set(range(26))
    assert lost(batches) == {"train-000004.tar": (11, "from image 0 on: No such file or directory")}
    assert len(found(copied)) == 37  # the index still has it


def test_an_image_that_is_broken_in_a_shard_gives_way_to_its_successor(copied: Path) -> None:
    file = copied / "train-000003.tar"
    members = {f"{i}.jpg": jpeg(i) if i != 23 else b"no image" for i in range(21, 26)}
    write_tar(file, members)
    batches = read(copied, epochs=1)
    assert broken_names(batches) <= {"train-000003.tar!23.jpg"}
    assert 23 not in numbers(batches)
    assert len(set(numbers(batches))) >= 34
    everything = read(copied, epochs=4)
    assert broken_names(everything) == {"train-000003.tar!23.jpg"}
    assert not lost(everything)
    found_prints = ShardSource(found(copied), views(), 0).fingerprints(np.array([22, 23, 30]))
    assert [name.partition("!")[2] for name in found_prints.paths] == ["22.jpg", "some/030.jpg"]


def test_shards_of_which_none_can_be_read_end_the_stream_in_one_line(copied: Path) -> None:
    given = found(copied)
    for file in copied.glob("*.tar"):
        file.write_bytes(b"no tar")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^/.*tar can't be read, nor can the 8 shards before"):
            read(given, workers)
    with pytest.raises(UserError, match=r"no image can be read in 5 shards, the first .*000000"):
        ShardSource(given, views(), 0).first()


# What is counted


def test_shards_without_an_index_are_counted(copied: Path) -> None:
    (copied / "index.json").unlink()
    write_tar(copied / "train-000001.tar", {"a.txt": b"nothing"})
    assert found(copied).counts.tolist() == [7, 0, 13, 5, 11]
    with tarfile.open(copied / "train-000000.tar") as tar:
        os.truncate(copied / "train-000000.tar", tar.getmember("some/003.jpg").offset_data + 9)
    (copied / "train-000004.tar").write_bytes(b"no tar")
    counted = found(copied)
    assert counted.counts.tolist() == [3, 0, 13, 5, 0]
    batches = read(counted)
    assert not lost(batches)
    assert set(numbers(batches)) == set(range(21))


def test_images_with_dots_in_their_names_are_said_to_be_left_out(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copied / "index.json").unlink()
    names = "T32_2020.01.05.jpg T32_2020.01.10.jpg a.cls.png a.jpg a.seg.png b.1.png".split()
    write_tar(copied / "train-000001.tar", {name: jpeg(0) for name in names})
    assert found(copied).counts[1] == 1
    said = f"3 images of {copied}/train-000001.tar are left out, the first T32_2020.01.05.jpg"
    assert said in caplog.text


def test_an_index_of_other_files_is_not_believed(copied: Path) -> None:
    write_tar(copied / "train-000001.tar", {f"{i}.png": jpeg(i) for i in range(20)})
    assert found(copied).counts.tolist() == [7, 20, 13, 5, 11]


def test_what_counts_as_an_image(tmp_path: Path) -> None:
    """One of each sample, as WebDataset has it; not what others leave in a tar."""
    names = ["a.jpg", "a.png", "a.json", "b.depth.png", "b.JPEG", "._c.jpg", "./d/c.webp",
             "__meta__/x.jpg", "v1.2/c.jpg", "nothing", ".jpg", "e.txt"]  # fmt: skip
    write_tar(tmp_path / "x.tar", {name: jpeg(1) for name in names})
    one = find_shards([str(tmp_path / "x.tar")])
    assert one is not None
    read_names = [item.name.partition("!")[2] for item in read_images(one, np.arange(len(one)))]
    assert read_names == ["a.jpg", "b.JPEG", "./d/c.webp", "v1.2/c.jpg"]


def test_sources_of_shards(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    whole = find_shards(["train-{000000..000004}.tar"])
    assert whole is not None
    for sources in (
        ["."],
        ["index.json"],
        [str(made)],
        ["train-{000000..000001}.tar", "train-{000001..000004}.tar"],
        [f"file://{made}/train-{{000000..000004}}.tar"],
        ["pipe:cat train-{000000..000004}.tar"],
    ):
        some = find_shards(sources)
        assert some is not None
        assert some.counts.tolist() == list(COUNTS)
        assert len(list(read_images(some, np.array([0, 36])))) == 2
    odd = tmp_path / "a:b {1}.tar"  # a file may be called whatever it likes
    shutil.copy(made / "train-000000.tar", odd)
    named_oddly = find_shards([str(odd)])
    assert named_oddly is not None
    assert len(named_oddly) == 7
    assert find_shards([str(tmp_path)]) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["train-{000000..000009}.tar"], "train-000005.tar does not exist"),
        ([".", "photos"], r"mixes shards \(.\) with others \(photos\)"),
        (["s3://bucket/train-000000.tar"], 'give "pipe:aws s3 cp s3://bucket/train-000000.tar -"'),
        (
            ["http://127.0.0.1:9/x-0.tar"],
            "http://127.0.0.1:9/index.json can't be read.*there is no connection",
        ),
        (["other.json"], "other.json is not an index of shards .* named shardlist"),
        (["evil.json"], "evil.json names a command, which is never run:  Pipe:touch http://x"),
        (["empty.tar"], "no images found in 1 shards, the first empty.tar"),
    ],
)
def test_mistakes(
    sources: list[str], message: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied)
    write_tar(copied / "empty.tar", {})
    (copied / "other.json").write_text("{}")
    evil = {"url": " Pipe:touch http://x", "nsamples": 3}
    (copied / "evil.json").write_text(json.dumps({"shardlist": [evil]}))
    with pytest.raises(UserError, match=message) as caught:
        find_shards(sources)
    assert "\n" not in str(caught.value)


def test_the_missing_extra_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vissl-lite\[shards\]'"):
        find_shards([str(made)])


# What is asked of it besides


def test_a_sample_comes_from_several_shards(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_stream, "SAMPLE_SHARDS", 3)
    monkeypatch.setattr(shard_stream, "SAMPLE_IMAGES", 6)
    write_sample(found(made), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"{number:09}.jpg" for number in (0, 1, 8, 9, 26, 27)
    ]
    assert (tmp_path / "000000026.jpg").read_bytes() == jpeg(26)


@pytest.mark.parametrize(
    ("batches", "world", "workers", "warned"),
    [(2, 1, 1, False), (2, 1, 0, False), (2, 1, 2, True), (2, 2, 1, True), (6, 2, 2, False)],
)
def test_another_order_within_an_epoch_is_warned_of(
    batches: int, world: int, workers: int, warned: bool, made: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    schedule: Any = SimpleNamespace(batches=batches)
    source = ShardSource(found(made), views(), 0)
    saved = StreamData(source, BATCH, EPOCHS, schedule, workers=1).state_dict()
    resumed = StreamData(source, BATCH, EPOCHS, schedule, workers)
    trainer: Any = SimpleNamespace(world_size=world, global_rank=0)
    resumed.trainer = trainer
    resumed.load_state_dict(saved)
    resumed.train_dataloader()
    assert [record.code for record in caplog.records] == ["shard.order"] * warned
    if warned:
        assert f"there were 1 with 1 each, and are {world} with {workers}" in caplog.text
    with pytest.raises(UserError, match="the training images are not those"):
        resumed.load_state_dict(saved | {"digest": "another"})


def test_names_and_fingerprints_by_number(made: Path, tmp_path: Path) -> None:
    source = ShardSource(found(made), views(), 0)
    assert len(source) == 37
    assert source.name(8) == f"{made}/train-000002.tar!0"
    (tmp_path / "36.jpg").write_bytes(jpeg(36))
    seen = source.fingerprints(np.array([36, 7]))
    assert seen.paths == [
        f"{made}/train-000001.tar!some/007.jpg",
        f"{made}/train-000004.tar!some/036.jpg",
    ]
    expected = fingerprints_of([str(tmp_path / "36.jpg")])
    np.testing.assert_array_equal(seen.exact[1], expected.exact[0])


# Over a connection


class Flaky(SimpleHTTPRequestHandler):
    """Drops the connection in the middle of a file, as often as ``drops`` says for its name."""

    drops: dict[str, int] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if not self.drops.get(name):
            super().do_GET()
            return
        self.drops[name] -= 1
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(copied: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Flaky, directory=str(copied)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_over_http_a_lost_connection_is_tried_again(
    served: str, made: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.01))
    given = find_shards([f"{served}/train-{{000000..000004}}.tar"])
    assert given is not None
    assert given.image_bytes == found(made).image_bytes
    monkeypatch.setattr(Flaky, "drops", {"train-000002.tar": 2})
    batches = read(given, epochs=1)
    assert Flaky.drops == {"train-000002.tar": 0}
    assert content(batches) == content(read(made, epochs=1))
    assert not lost(batches)

    monkeypatch.setattr(Flaky, "drops", {"train-000002.tar": 1000})
    (copied / "train-000004.tar").unlink()
    missing = lost(read(given, epochs=1))
    assert set(missing) == {"train-000002.tar", "train-000004.tar"}
    assert missing["train-000004.tar"] == (
        11,
        "from image 0 on: the server answers 404 Not Found",
    )
    assert missing["train-000002.tar"][1].endswith("the connection was lost")
    with pytest.raises(UserError, match=r"lists 5 shards, and train-000005.tar is not among them"):
        find_shards([f"{served}/train-{{000000..000005}}.tar"])
