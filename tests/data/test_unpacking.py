import io
import logging
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from vissl_lite.data.unpacking import is_archive, unpack
from vissl_lite.errors import MachineError, UserError


def make_zip(file: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as out:
        for name, content in members.items():
            out.writestr(name, content)
    return file


def make_tar(file: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(file, "w") as out:
        for one in members:
            out.addfile(one, io.BytesIO(b"x" * one.size))
    return file


def member(
    name: str, size: int = 1, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tarfile.TarInfo:
    one = tarfile.TarInfo(name)
    one.size, one.type, one.linkname = size, kind, link
    return one


def test_names_of_archives() -> None:
    assert is_archive(Path("Birds.ZIP"))
    assert is_archive(Path("a.b.tar.gz"))
    assert not is_archive(Path("zip"))


def test_an_archive_is_unpacked_beside_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    archive = make_zip(tmp_path / "birds.v1.zip", {"owl/1.png": b"1", "tit/2.png": b"2"})
    folder = unpack(archive)
    assert folder == tmp_path / "birds.v1"
    assert (folder / "owl/1.png").read_bytes() == b"1"
    (folder / "owl/1.png").write_bytes(b"changed")
    assert unpack(archive) == folder
    assert (folder / "owl/1.png").read_bytes() == b"changed"
    assert [record.getMessage().split(" ", 1)[1] for record in caplog.records] == [
        f"is unpacked to {folder}",
        f"was unpacked to {folder} before: this is read",
    ]
    make_zip(archive, {"owl/3.png": b"3"})
    with pytest.raises(UserError, match="exists and holds something else"):
        unpack(archive)


@pytest.mark.parametrize(
    "one",
    [
        member("../out.png"),
        member("a/../../out.png"),
    ],
)
def test_no_member_of_a_tar_file_leaves_the_folder(one: tarfile.TarInfo, tmp_path: Path) -> None:
    archive = (
        make_tar(tmp_path / "in" / "a.tar", one) if (tmp_path / "in").mkdir() is None else None
    )
    assert archive is not None
    with pytest.raises(UserError, match="can't be unpacked"):
        unpack(archive)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_links_and_devices_of_a_tar_file_are_not_unpacked(tmp_path: Path) -> None:
    members = [
        member("link", 0, tarfile.SYMTYPE, "/etc/passwd"),
        member("device", 0, tarfile.CHRTYPE),
        member("1.png"),
    ]
    folder = unpack(make_tar(tmp_path / "a.tar", *members))
    assert [path.name for path in folder.iterdir() if path.suffix == ".png"] == ["1.png"]
    assert not (folder / "link").is_symlink()
    assert not (folder / "device").exists()


@pytest.mark.parametrize("name", ["../out.png", "/tmp/out.png", "a\\..\\..\\out.png"])
def test_no_member_of_a_zip_file_leaves_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a file inside of it"):
        unpack(make_zip(tmp_path / "a.zip", {name: b""}))
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_damaged_archives(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match=f"{name} can't be unpacked: "):
        unpack(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_truncated_archive(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", member("1.png", 10_000))
    archive.write_bytes(archive.read_bytes()[:5_000])
    with pytest.raises(UserError, match="can't be unpacked"):
        unpack(archive)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_an_encrypted_archive(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"1.png": b"1"})
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag of an encrypted member
    archive.write_bytes(content)
    with pytest.raises(UserError, match="is encrypted: unpack it, and give the folder"):
        unpack(archive)


def test_an_archive_that_does_not_fit_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 8, 2))
    with pytest.raises(MachineError, match=r"holds 0.0 GiB, but only 0.0 GiB of the disk are free"):
        unpack(make_zip(tmp_path / "a.zip", {"1.png": b"12345"}))
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
