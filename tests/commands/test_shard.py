"""``vissl-lite shard``, and ``pretrain`` from what it writes: files, HTTP, two processes."""

import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vissl_lite
from tests.conftest import blobs, with_pictures
from vissl_lite.cli import main
from vissl_lite.commands.shard import unique_key
from vissl_lite.data.fingerprints import EXACT_BYTES, Fingerprints
from vissl_lite.data.shards.index import find_shards
from vissl_lite.data.shards.stream import read_images
from vissl_lite.errors import UserError
from vissl_lite.training.checkpoints import Checkpoints

SMALL = ["--backbone", "test_resnet", "--image_size", "32", "--batch_size", "8"]


def pretrain(*arguments: object) -> int:
    return main(["pretrain", *SMALL, *map(str, arguments)])


def seen(run: Path) -> list[str]:
    """Names of the images that a run has trained on."""
    return Fingerprints.load(run / "fingerprints.npz").paths


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 photographs in three shards."""
    folder = tmp_path_factory.mktemp("made") / "shards"
    result = vissl_lite.shard(data=str(photos), out=str(folder), images_per_shard=10)
    assert (result.shards, result.images, result.left_out) == (3, 24, [])
    assert result.index == folder / "index.json"
    return folder


def test_the_files_go_in_as_they_are_in_an_order_by_chance(made: Path, photos: Path) -> None:
    names, contents = [], {}
    for file in sorted(made.glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                names.append(member.name)
                contents[member.name] = tar.extractfile(member).read()
    files = {str(file.relative_to(photos)): file.read_bytes() for file in photos.rglob("*.jpg")}
    assert contents == files
    assert names != sorted(names)
    first = {name[0] for name in names[:10]}
    assert first == {"a", "b"}  # no shard is of one class
    index = json.loads((made / "index.json").read_text())
    assert index["images"] == 24
    assert [one["nsamples"] for one in index["shardlist"]] == [10, 10, 4]


def test_names_that_would_become_one_sample_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    content = {}
    for number, name in enumerate(
        ["x/a.jpg", "y/a.jpg", "x/a.png", "x/a.b.jpg", "x/a_b.JPG", "x/Grüße 日本.png",
         "v1.0/c.jpg", "__private__/d.png", os.fsdecode(b"x/caf\xe9.jpg"), "x/two\nlines.jpg"]
    ):  # fmt: skip
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        blobs(number).save(file, "png")
        content[name] = file.read_bytes()
    with (folder / "x" / "huge.jpg").open("wb") as out:
        out.truncate(10**11)  # zeros that take no room
    result = vissl_lite.shard(data=str(folder), out=str(tmp_path / "shards"), shard_size_mb=1)
    assert result.images == len(content)
    assert result.left_out == [str(folder / "x" / "huge.jpg")]
    shards = find_shards([str(tmp_path / "shards")])
    assert shards is not None
    found = list(read_images(shards, np.arange(len(shards))))
    assert sorted(one.data for one in found) == sorted(content.values())
    names = {one.name.partition("!")[2]: one.data for one in found}
    assert names["y/a.jpg"] == content["y/a.jpg"]
    assert names["x/Grüße 日本.png"] == content["x/Grüße 日本.png"]
    assert names["v1_0/c.jpg"] == content["v1.0/c.jpg"]
    assert names[os.fsdecode(b"x/caf\xe9.jpg")] == content[os.fsdecode(b"x/caf\xe9.jpg")]


def test_keys_are_unique() -> None:
    taken: set[str] = set()
    names = ["a", "a", "a-2", "b.c", "b_c", "__x__/y", "_x__/y"]
    assert [unique_key(name, taken) for name in names] == [
        "a", "a-2", "a-2-2", "b_c", "b_c-2", "_x__/y", "_x__/y-2"
    ]  # fmt: skip


def test_several_sources_keep_their_folders(photos: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{photos}/a/01.jpg\n{photos}/b/02.jpg\n")
    for sources, names in (
        ([str(photos / "a"), str(photos / "b")], {"a/01.jpg", "b/02.jpg"}),
        ([str(listed)], {"a/01.jpg", "b/02.jpg"}),
        ([str(photos / "a")], {"01.jpg", "03.jpg"}),
    ):
        vissl_lite.shard(data=sources, out=str(tmp_path / "shards"), overwrite=True)
        with tarfile.open(tmp_path / "shards" / "train-000000.tar") as tar:
            assert names <= set(tar.getnames())


def test_replaces_shards_only_when_asked_and_nothing_else_ever(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    command = ["shard", "--data", str(photos), "--out", str(out)]
    assert main([*command, "--images_per_shard", "5"]) == 0
    assert f'--data "{out}/train-{{000000..000004}}.tar"' in capsys.readouterr().err
    before = {file: file.read_bytes() for file in out.iterdir()}
    assert main(command) == 2
    assert "holds other shards" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    assert main([*command, "--overwrite"]) == 0
    assert {file.name for file in out.iterdir()} == {"train-000000.tar", "index.json"}
    (out / "mine.txt").write_text("mine")
    assert main([*command, "--overwrite"]) == 2
    assert "holds other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size_mb": 0}, "--shard_size_mb 0 must be at least 1"),
        ({"shard_size_mb": 1, "images_per_shard": 1}, "not both"),
        ({"data": "nowhere"}, "nowhere does not exist"),
        ({"out": "/dev/null/x"}, "can't be made"),
    ],
)
def test_mistakes(options: dict[str, object], message: str, photos: Path, tmp_path: Path) -> None:
    given = {"data": str(photos), "out": str(tmp_path / "out"), **options}
    with pytest.raises(UserError, match=message):
        vissl_lite.shard(**given)
    assert not (tmp_path / "out").exists()


# Training from shards


@pytest.mark.slow
def test_pretrain_streams_shards_and_knows_what_it_has_seen(
    made: Path, photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pattern = made / "train-{000000..000002}.tar"
    with with_pictures():
        assert pretrain("--data", pattern, "--out", run, "--epochs", 2, "--num_workers", 1) == 0
    results = json.loads((run / "results.json").read_text())
    assert (results["steps"], results["images"]) == (6, 24)
    assert len(list((run / "sample").iterdir())) == 24
    names = seen(run)
    assert len(set(names)) == 24
    for name, exact in zip(names, Fingerprints.load(run / "fingerprints.npz").exact, strict=True):
        data = (photos / name.partition("!")[2]).read_bytes()
        assert exact.tobytes() == blake2b(data, digest_size=EXACT_BYTES).digest()
    assert {name.partition("!")[2] for name in names} == {
        str(file.relative_to(photos)) for file in photos.rglob("*.jpg")
    }
    assert all(name.startswith(f"{made}/train-0000") for name in names)
    for file in ("views.png", "map.npz", "report.html", "encoder/model.safetensors"):
        assert (run / file).is_file(), file


@pytest.mark.slow
def test_a_run_from_shards_resumes_with_what_came_next(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data", made, "--epochs", 2, "--num_workers", 0]
    assert pretrain(*options, "--out", tmp_path / "whole") == 0
    saved = Checkpoints.on_train_batch_end

    def save_then_die(self, trainer, module, outputs, batch, batch_idx):
        self.save(trainer)
        if batch_idx == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", save_then_die)
    with pytest.raises(BaseException):  # noqa: B017, PT011 # as Lightning passes it on
        vissl_lite.pretrain(data=str(made), out=str(tmp_path / "resumed"), backbone="test_resnet",
                            image_size=32, batch_size=8, epochs=2, num_workers=0)  # fmt: skip
    monkeypatch.setattr(Checkpoints, "on_train_batch_end", saved)
    assert main(["pretrain", "--out", str(tmp_path / "resumed"), "--resume"]) == 0
    one, other = (
        load_file(tmp_path / name / "encoder" / "model.safetensors")
        for name in ("whole", "resumed")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], msg=name, atol=1e-6, rtol=1e-5)
    assert sorted(seen(tmp_path / "resumed")) == sorted(seen(tmp_path / "whole"))


@pytest.fixture
def served(made: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(made)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_pretrain_streams_shards_over_http(served: str, made: Path, tmp_path: Path) -> None:
    """The same training as from the disk."""
    options = ["--epochs", 1, "--num_workers", 1]
    shards = "train-{000000..000002}.tar"
    assert pretrain("--data", f"{served}/{shards}", "--out", tmp_path / "http", *options) == 0
    assert pretrain("--data", made / shards, "--out", tmp_path / "disk", *options) == 0
    one, other = (
        load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("http", "disk")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], msg=name, atol=1e-6, rtol=1e-5)
    assert all(name.startswith(f"{served}/train-") for name in seen(tmp_path / "http"))


@pytest.mark.slow
def test_two_processes_train_one_encoder_and_see_every_image_once(
    made: Path, tmp_path: Path
) -> None:
    """``--devices 2 --strategy ddp`` on the CPU: as many steps as one process, at equal batch."""
    run = tmp_path / "ddp"
    command = [sys.executable, "-m", "vissl_lite", "pretrain", *SMALL, "--data", str(made)]
    command += ["--out", str(run), "--epochs", "1", "--devices", "2", "--strategy", "ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "results.json").read_text())["steps"] == 3
    names = seen(run)
    assert len(names) == len(set(names)) == 24
    weights = load_file(run / "encoder" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.slow
def test_a_broken_shard_is_named_once_and_too_many_stop_the_run(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for file in made.iterdir():
        (shards / file.name).write_bytes(file.read_bytes())
    pattern = shards / "train-{000000..000002}.tar"
    (shards / "train-000002.tar").unlink()  # 4 of 24 images
    assert pretrain("--data", pattern, "--out", tmp_path / "a", "--epochs", 2) == 0
    log = (tmp_path / "a" / "log.txt").read_text()
    assert log.count("train-000002.tar (from image 0 on: No such file or directory)") == 1
    capsys.readouterr()
    teacher = ("--pretext", "distillation", "--pretext.teacher", "random:test_vit")
    teacher += ("--pretext.fixed_views", "true")
    assert pretrain("--data", pattern, "--out", tmp_path / "b", *teacher) == 2
    assert "shards are read sequentially: give the files" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    (shards / "train-000001.tar").unlink()
    assert pretrain("--data", pattern, "--out", tmp_path / "b", "--epochs", 2) == 2
    assert "of 24 images can't be read, the first" in capsys.readouterr().err
    assert pretrain("--data", pattern, "--out", tmp_path / "c", "--cache") == 2
    assert "--cache is for image files" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
