import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.conftest import blobs
from vissl_lite.data.fingerprints import (
    EXACT_BYTES,
    LOOK_BYTES,
    MIN_SIMILARITY,
    Fingerprints,
    find_matches,
    fingerprint,
    fingerprints_of,
    repeats,
)
from vissl_lite.data.images import read_image
from vissl_lite.errors import UserError

COUNT = 60


def picture(seed: int, side: int = 32) -> Image.Image:
    """Large and small shapes, as in a photograph."""
    random = np.random.default_rng(seed)
    image = np.asarray(blobs(seed, side, side)).astype(float)
    for size in (8, 16):
        coarse = random.normal(0, 160 / size, (size, size)).astype(np.float32)
        image += cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)[..., None]
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    for seed in range(COUNT):
        picture(seed).save(folder / f"{seed:02}.png")
    return folder


@pytest.fixture(scope="module")
def bank(folder: Path) -> Fingerprints:
    return fingerprints_of(sorted(map(str, folder.iterdir())))


def altered(image: Image.Image, how: str) -> Image.Image:
    side = image.width
    if how.startswith("resized"):
        side = round(side * float(how.split()[1]))
        return image.resize((side, side), Image.Resampling.BICUBIC)
    positions = {
        "side": Image.Transpose.FLIP_LEFT_RIGHT,
        "down": Image.Transpose.FLIP_TOP_BOTTOM,
        "both": Image.Transpose.ROTATE_180,
        "quarter": Image.Transpose.ROTATE_90,
        "three quarters": Image.Transpose.ROTATE_270,
        "transposed": Image.Transpose.TRANSPOSE,
        "transversed": Image.Transpose.TRANSVERSE,
    }
    return image.transpose(positions[how]) if how in positions else image


@pytest.mark.parametrize(
    ("how", "side"),
    [("encoded", 32), ("encoded", 200), ("resized 1.5", 32), ("resized 0.5", 200), ("side", 32),
     ("down", 200), ("both", 32), ("quarter", 200), ("three quarters", 32), ("transposed", 200),
     ("transversed", 32)],
)  # fmt: skip
def test_a_picture_is_recognized(how: str, side: int, tmp_path: Path) -> None:
    for name in ("bank", "queries"):
        (tmp_path / name).mkdir()
    for seed in range(12):
        image = picture(seed, side)
        image.save(tmp_path / "bank" / f"{seed:02}.png")
        if seed % 2:
            altered(image, how).save(tmp_path / "queries" / f"{seed:02}.jpg", quality=50)
    bank, queries = (
        fingerprints_of(sorted(map(str, (tmp_path / name).iterdir())))
        for name in ("bank", "queries")
    )
    matches = find_matches(queries, bank)
    assert [Path(match.path).stem for match in matches] == [f"{s:02}" for s in range(1, 12, 2)]
    for match in matches:
        assert Path(match.path).stem == Path(match.twin).stem
        assert match.kind == "similar"
        assert MIN_SIMILARITY <= match.similarity <= 1


def test_a_copy_is_exact_whatever_its_name(
    folder: Path, bank: Fingerprints, tmp_path: Path
) -> None:
    shutil.copy(folder / "07.png", tmp_path / "other.png")
    (match,) = find_matches(fingerprints_of([str(tmp_path / "other.png")]), bank)
    assert match == (str(tmp_path / "other.png"), str(folder / "07.png"), "exact", 1.0)


def test_other_pictures_are_not_recognized(bank: Fingerprints, tmp_path: Path) -> None:
    for seed in range(COUNT, 3 * COUNT):
        picture(seed).save(tmp_path / f"{seed}.jpg", quality=50)
    others = fingerprints_of(sorted(map(str, tmp_path.iterdir())))
    assert len(others) == 2 * COUNT
    assert find_matches(others, bank) == []


def test_pictures_of_one_color_resemble_nothing_but_are_found_as_copies(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        noise = random.integers(0, 2, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise + (90 if name == "a" else 200)).save(tmp_path / f"{name}.png")
    Image.new("L", (50, 50)).save(tmp_path / "black.png")
    Image.new("L", (60, 60)).save(tmp_path / "larger.png")
    shutil.copy(tmp_path / "black.png", tmp_path / "copy.png")
    names = ("a", "black", "b", "c", "larger", "copy")
    everything = fingerprints_of([str(tmp_path / f"{name}.png") for name in names])
    first, rest = (
        Fingerprints(everything.exact[part], everything.looks[part], everything.paths[part])
        for part in (slice(2), slice(2, None))
    )
    (match,) = find_matches(first, rest)
    assert (Path(match.path).stem, Path(match.twin).stem) == ("black", "copy")


def test_the_best_of_several_twins_is_given(tmp_path: Path) -> None:
    image = picture(3, 64)
    image.save(tmp_path / "query.png")
    image.resize((20, 20)).save(tmp_path / "a.jpg", quality=20)
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png")
    picture(4, 64).save(tmp_path / "c.png")
    bank = fingerprints_of([str(tmp_path / name) for name in ("a.jpg", "b.png", "c.png")])
    (match,) = find_matches(fingerprints_of([str(tmp_path / "query.png")]), bank)
    assert Path(match.twin).name == "b.png"


def test_of_a_picture_all_files_but_the_first_are_repeats(tmp_path: Path) -> None:
    paths = []
    for place in range(300):  # more than are looked through at a time
        seed, how = place % 250, "side" if place % 2 else "quarter"
        paths.append(tmp_path / f"{place:03}.png")
        altered(picture(seed), how if place >= 250 else "").save(paths[-1])
    shutil.copy(paths[260], tmp_path / "copy.png")
    paths[1:1] = [tmp_path / "copy.png"]  # is now the first of picture 10
    found = repeats(fingerprints_of(list(map(str, paths))))
    names = {Path(path).stem for path in found}
    assert names == {"010", *(f"{place:03}" for place in range(250, 300))}
    assert repeats(fingerprints_of([])) == set()


def test_a_jpeg_decoded_at_any_scale_has_the_same_look(tmp_path: Path) -> None:
    picture(5, 256).save(tmp_path / "large.jpg", quality=90)
    file = tmp_path / "large.jpg"
    looks = []
    for shortest in (None, 128, 64, 32):
        taken = fingerprint(file.read_bytes(), read_image(file, shortest))
        looks.append(taken[EXACT_BYTES:].view(np.int8).astype(int))
    for look in looks:
        assert look @ looks[0] / 127**2 > 0.995


def test_unreadable_files_are_left_out_and_progress_counts_all(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    paths = [str(tmp_path / "broken.jpg"), str(folder / "01.png"), str(tmp_path / "gone.png")]
    done: list[int] = []
    found = fingerprints_of(paths, done.append)
    assert found.paths == [str(folder / "01.png")]
    assert sum(done) == 3
    empty = fingerprints_of(paths[:1])
    assert (len(empty), find_matches(found, empty), find_matches(empty, found)) == (0, [], [])


def test_a_file_of_fingerprints_reads_back(bank: Fingerprints, tmp_path: Path) -> None:
    odd = Fingerprints(bank.exact[:2], bank.looks[:2], ["ünï\ncode.png", "bad\udcff.png"])
    for prints in (bank, odd, Fingerprints(bank.exact[:0], bank.looks[:0], [])):
        prints.save(tmp_path / "prints.npz")
        again = Fingerprints.load(tmp_path / "prints.npz")
        assert again.paths == prints.paths
        np.testing.assert_array_equal(again.exact, prints.exact)
        np.testing.assert_array_equal(again.looks, prints.looks)
    assert [file.name for file in tmp_path.iterdir()] == ["prints.npz"]


def test_a_damaged_file_is_the_users_to_know(bank: Fingerprints, tmp_path: Path) -> None:
    file = tmp_path / "prints.npz"
    bank.save(file)
    whole = file.read_bytes()
    half = np.zeros((3, LOOK_BYTES), np.int8)
    for damaged in (b"", b"nothing", whole[:100], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"prints\.npz is damaged"):
            Fingerprints.load(file)
    with file.open("wb") as out:
        np.savez(out, exact=np.zeros((2, 16), np.uint8), looks=half, paths=np.zeros(3, np.uint8))
    with pytest.raises(UserError, match="damaged"):
        Fingerprints.load(file)
    with file.open("wb") as out:
        np.savez(out, exact=np.array([print], object))
    with pytest.raises(UserError, match="damaged"):
        Fingerprints.load(file)


def test_joining_keeps_each_file_once(bank: Fingerprints) -> None:
    some = Fingerprints(bank.exact[:5], bank.looks[:5], bank.paths[:5])
    both = some.join(bank)
    assert both.paths == bank.paths
    np.testing.assert_array_equal(both.exact, bank.exact)
    np.testing.assert_array_equal(both.looks, bank.looks)
