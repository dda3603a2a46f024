"""Archives are unpacked beside, once, completely or not at all, and never out of their folder."""

import io
import logging
import os
import struct
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from vissl_lite.data import archives
from vissl_lite.data.archives import MARKER, is_archive, unpack
from vissl_lite.errors import MachineError, UserError

FILES = {"train/a/1.png": b"one", "train/b/2.png": os.urandom(70_000), "classes.txt": b"a\nb\n"}
MODES = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


def make(file: Path, members: dict[str, bytes] = FILES) -> Path:
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
            for name, data in members.items():
                out.writestr(name, data)
        return file
    return make_tar(file, [(member(name, data), data) for name, data in members.items()])


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tarfile.TarInfo:
    one = tarfile.TarInfo(name)
    one.size, one.type, one.linkname = len(data), kind, link
    return one


def make_tar(file: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    mode = next(m for end, m in MODES.items() if file.name.endswith(end))
    with tarfile.open(file, mode) as out:  # type: ignore[call-overload]
        for one, data in members:
            out.addfile(one, io.BytesIO(data))
    return file


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(archive: Path, *words: str, kind: type[UserError] = UserError) -> None:
    """It is an error of one line, and nothing is left beside the archive."""
    before = sorted(archive.parent.iterdir())
    with pytest.raises(kind) as error:
        unpack(archive)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    for word in (archive.name, *words):
        assert word in str(error.value)
    assert sorted(archive.parent.iterdir()) == before


@pytest.mark.parametrize("suffix", [".zip", ".ZIP", *MODES])
def test_each_kind_is_unpacked_beside(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = make(tmp_path / f"my.birds{suffix.lower()}")
    archive = archive.rename(tmp_path / f"my.birds{suffix}")
    assert is_archive(archive)
    with caplog.at_level(logging.INFO, "vissl_lite"):
        folder = unpack(archive)
    assert folder == tmp_path / "my.birds"
    assert content(folder) == FILES
    assert [one.getMessage() for one in caplog.records] == [f"Unpacking {archive} into {folder}"]
    assert sorted(tmp_path.iterdir()) == sorted([archive, folder])


@pytest.mark.parametrize(
    "name", ["a.png", "a.gz", "zip", ".zip", "a.tar.zst", "folder.zip", "gone.zip"]
)
def test_other_paths_are_not_archives(name: str, tmp_path: Path) -> None:
    if name == "folder.zip":
        (tmp_path / name).mkdir()
    elif name != "gone.zip":
        (tmp_path / name).write_bytes(b"")
    assert not is_archive(tmp_path / name)


def test_an_unpacked_folder_is_used_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    archive = make(tmp_path / "a.zip")
    folder = unpack(archive)
    (folder / "classes.txt").write_text("changed by hand")
    with caplog.at_level(logging.INFO, "vissl_lite"):
        assert unpack(archive) == folder
    assert "using" in caplog.messages[0]
    assert (folder / "classes.txt").read_text() == "changed by hand"
    make(archive, {"other.png": b""})
    refused(archive, f"give {folder} itself, or rename it")


def test_a_folder_of_another_origin_is_left_alone(tmp_path: Path) -> None:
    archive = make(tmp_path / "a.zip")
    (tmp_path / "a").mkdir()
    refused(archive, f"give {tmp_path / 'a'} itself, or rename it")
    assert not any((tmp_path / "a").iterdir())


def test_of_two_processes_one_unpacks_and_both_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, extract = make(tmp_path / "a.zip"), archives._extract

    def slower(archive: Path, part: Path) -> None:
        monkeypatch.setattr(archives, "_extract", extract)
        unpack(archive)
        extract(archive, part)

    monkeypatch.setattr(archives, "_extract", slower)
    assert content(unpack(archive)) == FILES
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a", archive]


def test_members_cannot_forge_the_marker(tmp_path: Path) -> None:
    for name in ("a.zip", "b.tar"):
        folder = unpack(
            make(tmp_path / name, {MARKER: b"forged", f"./{MARKER}": b"too", "1.png": b""})
        )
        assert "forged" not in (folder / MARKER).read_text()
        assert content(folder) == {"1.png": b""}


# Members that lead out


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "a/b/../../../out.png"])
@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_no_member_leaves_the_folder(name: str, suffix: str, tmp_path: Path) -> None:
    refused(make(tmp_path / f"a{suffix}", {"1.png": b"", name: b"evil"}), "out of the folder")


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_absolute_names_become_relative(suffix: str, tmp_path: Path) -> None:
    folder = unpack(make(tmp_path / f"a{suffix}", {f"{tmp_path}/out.png": b"1"}))
    assert list(content(folder)) == [f"{tmp_path}/out.png"[1:]]
    assert not (tmp_path / "out.png").exists()


SYMLINK, HARDLINK = tarfile.SYMTYPE, tarfile.LNKTYPE


@pytest.mark.parametrize(
    "members",
    [
        [member("l", kind=SYMLINK, link="/etc/passwd")],
        [member("l", kind=SYMLINK, link="../..")],
        [member("l", kind=HARDLINK, link="/etc/passwd")],
        [member("l", kind=HARDLINK, link="../a.tar")],
        [member("pipe", kind=tarfile.FIFOTYPE)],
        [member("null", kind=tarfile.CHRTYPE)],
        [member("disk", kind=tarfile.BLKTYPE)],
        # what follows a link could be led out by it
        [member("l", kind=SYMLINK, link="d"), member("l", b"x")],
        [member("l", kind=SYMLINK, link="d"), member("L/x", b"x")],
        [member("l", kind=SYMLINK, link="d"), member("m", kind=HARDLINK, link="l")],
    ],
)  # fmt: skip
def test_links_out_and_devices_are_refused(members: list[tarfile.TarInfo], tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", [(one, b"x" * one.size) for one in members])
    refused(archive, "give an archive of plain files")


def test_links_within_are_kept(tmp_path: Path) -> None:
    members = [
        (member("a/1.png", b"one"), b"one"),
        (member("l.png", kind=SYMLINK, link="a/1.png"), b""),
    ]
    folder = unpack(make_tar(tmp_path / "a.tar", members))
    assert (folder / "l.png").read_bytes() == b"one"


# Damage


@pytest.mark.parametrize("suffix", [".zip", *MODES])
def test_archives_that_are_cut_short_are_damaged(suffix: str, tmp_path: Path) -> None:
    archive = make(tmp_path / f"a{suffix}")
    data = archive.read_bytes()
    # of a tar without compression also at the end of a member, and in a header
    for length in (0, 100, len(data) // 2, *((1024, 1024 + 100) if suffix == ".tar" else ())):
        archive.write_bytes(data[:length])
        refused(archive, "is damaged", "download it again")


@pytest.mark.parametrize("suffix", [".zip", *MODES])
def test_changed_bytes_are_damage_or_do_not_matter(suffix: str, tmp_path: Path) -> None:
    archive = make(tmp_path / f"a{suffix}")
    data = archive.read_bytes()
    for at in range(0, len(data), len(data) // 40):
        archive.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            folder = unpack(archive)
        except UserError:
            assert list(tmp_path.iterdir()) == [archive]
        else:
            folder.rename(tmp_path.parent / f"{tmp_path.name}-{at}")


def test_a_broken_header_does_not_end_a_tar(tmp_path: Path) -> None:
    archive = make(tmp_path / "a.tar")
    data = bytearray(archive.read_bytes())
    data[1024 + 100] ^= 0xFF  # in the second header, whose checksum is wrong then
    archive.write_bytes(data)
    refused(archive, "is damaged (a header is broken)")


def test_an_encrypted_zip(tmp_path: Path) -> None:
    archive = make(tmp_path / "a.zip", {"1.png": b"one"})
    data = bytearray(archive.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + at] |= 1
    archive.write_bytes(data)
    refused(archive, "encrypted", "password")


def test_a_compression_that_python_does_not_know(tmp_path: Path) -> None:
    archive = make(tmp_path / "a.zip", {"1.png": b"one"})
    data = bytearray(archive.read_bytes())
    for signature, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(signature) + at] = 9  # Deflate64, which Windows uses for large files
    archive.write_bytes(data)
    refused(archive, "another program")


def test_a_name_that_is_a_file_and_a_folder(tmp_path: Path) -> None:
    refused(make(tmp_path / "a.zip", {"a": b"", "a/b": b""}), "can't be unpacked")


# The disk


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.xz"])
def test_what_does_not_fit_on_the_disk(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage(archives.RESERVE + 80_000))
    archive = make(tmp_path / f"a{suffix}", {"1.png": bytes(50_000), "2.png": bytes(90_000)})
    refused(archive, "free some space", kind=MachineError)


def test_a_zip_does_not_give_more_than_it_announces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make(tmp_path / "a.zip", {"1.png": bytes(10_000_000)})
    data = bytearray(archive.read_bytes())
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.index(signature) + at, 1000)
    archive.write_bytes(data)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage(archives.RESERVE + 2000))
    refused(archive, "damaged")


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(archives, "_copy", full)
    refused_by = pytest.raises(MachineError, match="the disk is full")
    archive = make(tmp_path / "a.zip")
    with refused_by:
        unpack(archive)
    assert list(tmp_path.iterdir()) == [archive]


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    archive = make(tmp_path / "a.tar")
    monkeypatch.setattr(Path, "mkdir", forbidden)
    refused(archive, "Permission denied", "unpack it elsewhere, and give the folder")


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    archive = make(tmp_path / "a.zip")
    monkeypatch.setattr(archives, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive)
    assert list(tmp_path.iterdir()) == [archive]
