import csv
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from vissl_lite.data.formats import read_raw
from vissl_lite.errors import UserError
from vissl_lite.sample.dataset import make_sample_data
from vissl_lite.transfer.segmentation.data import LabelledMasks, load_masks
from vissl_lite.transfer.segmentation.mask_source import (
    IGNORE_INDEX,
    MaskSource,
    color_codes,
    read_colors,
    read_mask,
)

HEIGHT, WIDTH = 6, 8


def image(path: Path, height: int = HEIGHT, width: int = WIDTH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 99, np.uint8)).save(path)


def mask(path: Path, *values: int, mode: str | None = None) -> None:
    """Write a mask that holds only these values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))
    picture = Image.fromarray(array)
    picture.convert(mode).save(path) if mode else picture.save(path)


def write_pairs(
    images: Path, masks: Path, count: int, values: tuple[int, ...] = (0, 1, 2), end: str = ""
) -> None:
    for index in range(count):
        image(images / f"{index}.jpg")
        mask(masks / f"{index}{end}.png", *values)


def sizes(data: LabelledMasks) -> list[int]:
    return [len(data.train), len(data.val), len(data.test)]


def assert_paired(data: LabelledMasks) -> None:
    for one in (*data.train, *data.val, *data.test):
        assert Path(one.mask.file).stem.startswith(Path(one.path).stem)
        assert one.mask.file != one.path


# Layouts


@pytest.mark.parametrize(
    ("name", "end"),
    [("masks", ""), ("labels", "_mask"), ("annotations", "-mask"), ("gt", "_label"), ("gt", "_gt")],
)
def test_two_folders_are_split_60_20_20(name: str, end: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "images" / "a", tmp_path / name / "a", 5, end=end)
    write_pairs(tmp_path / "images" / "b", tmp_path / name / "b", 5, end=end)
    data = load_masks(tmp_path)
    assert sizes(data) == [6, 2, 2]
    assert data.classes == ["0", "1", "2"]
    assert_paired(data)
    for one in (*data.train, *data.val, *data.test):
        assert Path(one.path).parent.name == Path(one.mask.file).parent.name
    assert load_masks(tmp_path, seed=3).test == data.test


def test_folders_of_splits_are_used_as_given(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("validation", 2), ("test", 3)):
        write_pairs(tmp_path / "a" / "images" / part, tmp_path / "a" / "masks" / part, count)
        write_pairs(tmp_path / "b" / part / "images", tmp_path / "b" / part / "labels", count)
    for folder in ("a", "b"):
        data = load_masks(tmp_path / folder)
        assert sizes(data) == [4, 2, 3]
        assert_paired(data)
        assert all("validation" in Path(one.mask.file).parts for one in data.val)


def test_masks_may_be_in_another_folder(tmp_path: Path) -> None:
    write_pairs(tmp_path / "photos", tmp_path / "else" / "drawn", 5)
    assert sizes(load_masks(tmp_path / "photos", tmp_path / "else" / "drawn")) == [3, 1, 1]


def test_validation_images_are_held_out_if_there_are_none(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_pairs(tmp_path / "images" / part, tmp_path / "masks" / part, 10)
    data = load_masks(tmp_path)
    assert sizes(data) == [8, 2, 10]
    assert not set(data.train) & set(data.val)
    assert load_masks(tmp_path, seed=1).val != data.val


def test_pascal_voc_uses_only_the_listed_images(tmp_path: Path) -> None:
    write_pairs(tmp_path / "JPEGImages", tmp_path / "SegmentationClass", 6, (0, 3, IGNORE_INDEX))
    image(tmp_path / "JPEGImages" / "without_mask.jpg")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n2\n3\n")
    (lists / "val.txt").write_text("1\n5\n")
    data = load_masks(tmp_path, complete=False)
    assert [Path(one.path).stem for one in data.train] == ["0", "2", "3"]
    assert [Path(one.path).stem for one in data.val] == ["1", "5"]
    assert_paired(data)
    (lists / "test.txt").write_text("4\nwithout_mask\n")
    data = load_masks(tmp_path)
    assert sizes(data) == [3, 2, 1]
    assert data.reading.counts == {"name without a mask in a list, left out": 1}
    (lists / "test.txt").write_text("1\n4\n")
    data = load_masks(tmp_path)
    assert sizes(data) == [3, 1, 2]  # no image of the test part is in another
    assert data.reading.counts == {"image of several parts, left out of the first": 1}


def test_the_sample_data(tmp_path: Path) -> None:
    made = make_sample_data(tmp_path / "s", 0, 0, train=4, val=2, test=3, size=32, processes=1)
    data = load_masks(made)
    assert sizes(data) == [4, 2, 3]
    names = (made / "classes.txt").read_text().split()
    assert data.classes == ["background", *names]  # although only four of the objects occur
    for one in data.train:
        seen = set(np.unique(one.mask.read()).tolist()) - {0}
        assert seen == {data.classes.index(Path(one.path).parent.name)}


def test_written_data_is_read_back_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "set" / "images", tmp_path / "set" / "masks", 20, (0, 255))
    (tmp_path / "set" / "classes.txt").write_text("road, wet\n")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    data = load_masks("set").subsample(0.5, None, 0)
    assert data.classes == ["background", "road, wet"]
    data.write(Path("run/split.csv"))
    monkeypatch.chdir("/")
    again = load_masks(tmp_path / "run" / "split.csv", seed=9)
    assert again.classes == data.classes
    for ours, theirs in ((data.train, again.train), (data.val, again.val), (data.test, again.test)):
        assert [str(tmp_path / one.path) for one in ours] == [one.path for one in theirs]
        assert all(one.mask.is_plain for one in theirs)
        for one, other in zip(ours, theirs, strict=True):
            read = MaskSource((str(tmp_path / one.mask.file),), one.mask.levels).read()
            np.testing.assert_array_equal(read, other.mask.read())


def test_the_identity_of_slices_is_that_of_their_volumes(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(5):
        volume = np.random.default_rng(number).integers(0, 3, (5, 16, 16)).astype(np.uint16)
        pages: dict[str, Any] = {"photometric": "minisblack"}
        tifffile.imwrite(tmp_path / "images" / f"{number}.tif", volume * 100, **pages)
        tifffile.imwrite(tmp_path / "labels" / f"{number}.tif", volume.astype(np.uint8), **pages)
    data = load_masks(tmp_path)
    assert len(data.train) + len(data.val) + len(data.test) == 25
    assert data.identity() == load_masks(tmp_path).identity()


@pytest.mark.parametrize("name", ["ct_{}_mask", "mask_ct_{}", "ct_{}"])
def test_names_of_masks_of_pages_have_their_usual_ends(name: str, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        volume = np.random.default_rng(number).integers(0, 3, (3, 16, 16)).astype(np.uint8)
        mask_name = name.format(number)
        for file in (f"images/ct_{number}_img.tif", f"masks/{mask_name}.tif"):
            tifffile.imwrite(tmp_path / file, volume, photometric="minisblack")
    data = load_masks(tmp_path)
    pairs = [
        (one.path, one.mask.file) for part in (data.train, data.val, data.test) for one in part
    ]
    assert len(pairs) == 12
    for image, of in pairs:
        stem, _, page = Path(image).name.partition(".tif#")
        number = stem.split("_")[1]
        assert Path(of).name == f"{name.format(number)}.tif#{page}"


def volume_pair(
    folder: Path, number: int, image_affine: np.ndarray, mask_affine: np.ndarray
) -> None:
    """A volume with a bright cube off the center, and its mask of the same voxels."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    cube = np.zeros((8, 8, 8), np.uint8)
    cube[1:4, 1:4] = 1
    name = f"scan{number}.nii.gz"
    image = (cube * 100 + number).astype(np.int16)
    nib.save(nib.Nifti1Image(image, image_affine), folder / "images" / name)
    nib.save(nib.Nifti1Image(cube, mask_affine), folder / "labels" / name)


@pytest.mark.parametrize(
    ("of_image", "of_mask", "said"),
    [
        ((-1, -1, 1), (1, 1, 1), r"\(RAS, .*\) than its image .*\(LPS, "),
        ((1, 1, 1), (1, 3, 1), r".*along axis 1\) than its image .*along axis 2\)"),
    ],
)
def test_volumes_and_masks_of_other_orientations_are_refused(
    of_image: tuple[int, ...], of_mask: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    one, other = (np.diag([*spacing, 1]).astype(float) for spacing in (of_image, of_mask))
    for number in range(4):
        volume_pair(tmp_path / "good", number, one, one)
        volume_pair(tmp_path / "bad", number, one, other)
    data = load_masks(tmp_path / "good")
    first = data.train[0]
    assert ((read_raw(first.path).pixels[..., 0] >= 100) == first.mask.read()).all()
    with pytest.raises(UserError, match=f"another orientation {said}"):
        load_masks(tmp_path / "bad")


def test_masks_that_are_stored_otherwise_at_the_same_place_are_read(tmp_path: Path) -> None:
    affine = np.diag([-1.0, -1, 3, 1])
    affine[:3, 3] = 10, 20, 30
    for number in range(4):
        volume_pair(tmp_path, number, affine, affine)
        place = tmp_path / "labels" / f"scan{number}.nii.gz"
        nib.save(nib.as_closest_canonical(nib.load(place)), tmp_path / "turned.nii.gz")
        (tmp_path / "turned.nii.gz").replace(place)
    for one in load_masks(tmp_path).train:
        assert ((read_raw(one.path).pixels[..., 0] >= 100) == one.mask.read()).all()


@pytest.mark.parametrize("color", [False, True])
def test_masks_are_turned_as_their_exif_data_say(color: bool, tmp_path: Path) -> None:
    stored = np.zeros((6, 8), np.uint8)
    stored[0, :3] = 1
    pixels = stored[..., None] * np.array([200, 0, 0], np.uint8) if color else stored
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "mask.png", exif=exif)
    found = read_colors(tmp_path / "mask.png") if color else read_mask(tmp_path / "mask.png")
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "mask.png")))
    expected = color_codes(upright) if color else upright
    assert found.shape == (8, 6)
    np.testing.assert_array_equal(found, expected)


def test_other_masks_are_another_data_set(tmp_path: Path) -> None:
    write_pairs(tmp_path / "images", tmp_path / "masks", 6)
    before = load_masks(tmp_path).identity()
    assert load_masks(tmp_path).identity() == before
    mask(tmp_path / "masks" / "0.png", *range(3), *range(3), 1)
    assert load_masks(tmp_path).identity() != before


def test_subsampling_keeps_the_test_split(tmp_path: Path) -> None:
    write_pairs(tmp_path / "images", tmp_path / "masks", 30)
    data = load_masks(tmp_path)
    few, more = data.subsample(0.2, None, 0), data.subsample(0.7, None, 0)
    assert sizes(few) == [4, 1, 6]
    assert set(few.train) < set(more.train) < set(data.train)
    assert few.test == data.test


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,mask\n0.jpg,0.png\n1.jpg,1.png\n2.jpg,2.png\n", None),
        ("path,mask,split\n0.jpg,0.png,train\n1.jpg,1.png,valid\n2.jpg,2.png,test\n", None),
        ("path,file2\n0.jpg,0.png\n", "no column mask: it has path, file2"),
        ("path,mask\n", "has no rows"),
        ("path,mask\n0.jpg\n", "the column mask is empty"),
        ("path,mask\n0.jpg,9.png\n", r"1 do not exist, the first 9\.png"),
        ("path,mask,split\n0.jpg,0.png,odd\n", "the split 'odd' is none of train, val, test"),
        ("path,mask,split\n0.jpg,0.png,test\n", "no training images"),
    ],
)
def test_a_csv_file(text: str, message: str | None, tmp_path: Path) -> None:
    write_pairs(tmp_path, tmp_path, 3)
    (tmp_path / "data.csv").write_text(text)
    if message is None:
        assert sizes(load_masks(tmp_path / "data.csv")) == [1, 1, 1]
    else:
        with pytest.raises(UserError, match=message):
            load_masks(tmp_path / "data.csv")


def test_rows_of_one_image_are_its_masks_in_one_part(tmp_path: Path) -> None:
    write_pairs(tmp_path, tmp_path, 9, (0, 255))
    rows = [f"{n}.jpg,{m}.png" for n in range(8) for m in (n, n + 1)]
    (tmp_path / "data.csv").write_text("\n".join(["path,mask", *rows, rows[0]]))
    data = load_masks(tmp_path / "data.csv")
    assert sum(sizes(data)) == 8  # none in two parts
    for one in (*data.train, *data.val, *data.test):
        number = int(Path(one.path).stem)
        pieces = [read_mask(tmp_path / f"{n}.png") for n in (number, number + 1)]
        np.testing.assert_array_equal(one.mask.read(), np.maximum(*pieces) > 0)
    assert data.reading.counts == {"row that repeats another, left out": 1}
    rows = [f"{n}.jpg,{n}.png,{part}" for n in range(4) for part in ("train", "test")]
    (tmp_path / "data.csv").write_text("\n".join(["path,mask,split", *rows]))
    with pytest.raises(UserError, match="no training images, only test"):
        load_masks(tmp_path / "data.csv")


# Mask formats and values


def test_a_palette_mask_gives_its_indices_whatever_the_colors(tmp_path: Path) -> None:
    truth = np.random.default_rng(0).integers(0, 4, (HEIGHT, WIDTH), np.uint8)
    made = Image.fromarray(truth)
    made.putpalette([255, 0, 0, 0, 255, 0, 9, 9, 9, 9, 9, 9])
    made.save(tmp_path / "0.png")
    read = read_mask(tmp_path / "0.png")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, truth)


@pytest.mark.parametrize("kind", ["gray", "16 bits", "RGB", "RGBA", "LA", "tif"])
def test_indices_are_read_from_many_formats(kind: str, tmp_path: Path) -> None:
    truth = np.random.default_rng(0).integers(0, 40, (HEIGHT, WIDTH), np.uint8)
    truth[0, 0] = IGNORE_INDEX
    path = tmp_path / ("0.tif" if kind == "tif" else "0.png")
    gray = Image.fromarray(truth)
    if kind == "16 bits":
        Image.fromarray(truth.astype(np.uint16)).save(path)
    else:
        gray.convert(kind if kind in ("RGB", "RGBA", "LA") else "L").save(path)
    np.testing.assert_array_equal(read_mask(path), truth)


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (0, 255, 1)])
def test_binary_masks(values: tuple[int, ...], tmp_path: Path) -> None:
    """255 is the second class if a whole data set has no other; else it is ignored."""
    write_pairs(tmp_path / "images", tmp_path / "masks", 5, values)
    mask(tmp_path / "masks" / "3.png", 0, 255 if 255 in values else 1)
    data = load_masks(tmp_path)
    assert data.classes == ["background", "foreground"]
    plain = {one.mask.is_plain for one in (*data.train, *data.val, *data.test)}
    assert plain == {values != (0, 255)}
    one = data.train[0]
    expected = {0, 1} if values != (0, 255, 1) else {0, 1, IGNORE_INDEX}
    assert set(np.unique(one.mask.read()).tolist()) <= expected
    assert one.mask.read()[0, 1] in (1, IGNORE_INDEX)


def test_1_bit_masks_mix_with_those_of_0_and_255(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pairs(tmp_path / "images", tmp_path / "masks", 5, (0, 255))
    for index in (0, 2):
        mask(tmp_path / "masks" / f"{index}.png", 0, 255, mode="1")
    with caplog.at_level(logging.INFO, "vissl_lite"):
        data = load_masks(tmp_path)
    assert "255 is used as the second class" in caplog.text
    for one in (*data.train, *data.val, *data.test):
        truth = np.resize([0, 1], (HEIGHT, WIDTH))
        np.testing.assert_array_equal(one.mask.read(), truth)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ("sky\nsea\nland\n", ["sky", "sea", "land"]),
        ("sea\nland", ["background", "sea", "land"]),
        ("sky\nsea\n\nland\nmoon\n", ["sky", "sea", "land", "moon"]),
    ],
)
def test_names_of_classes(names: str, classes: list[str], tmp_path: Path) -> None:
    write_pairs(tmp_path / "images", tmp_path / "masks", 5)
    (tmp_path / "labels.txt").write_text(names)
    assert load_masks(tmp_path).classes == classes
    assert load_masks(tmp_path / "images", tmp_path / "masks").classes == classes


# User errors


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "images", tmp_path / "masks", 6)
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        load_masks(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_images_without_masks_and_masks_without_images_are_counted(data: Path) -> None:
    (data / "masks" / "2.png").unlink()
    (data / "masks" / "4.png").unlink()
    (data / "images" / "0.jpg").unlink()
    read = load_masks(data)
    assert sizes(read) == [1, 1, 1]
    assert read.reading.counts == {
        "image without a mask, left out": 2,
        "mask without an image, left out": 1,
    }


def test_names_that_do_not_match_at_all(data: Path) -> None:
    for file in list((data / "masks").iterdir()):
        file.rename(file.with_stem(f"seg{file.stem}"))
    assert "name each mask like its image, as images/a/1.jpg" in refused(data)


def test_two_masks_for_one_image_and_two_images_for_one_mask(data: Path) -> None:
    image(data / "images" / "3.png")
    assert "3.jpg and " in refused(data)
    (data / "images" / "3.png").unlink()
    mask(data / "masks" / "3_mask.png", 0)
    assert "has two masks" in refused(data)


def test_a_colored_mask_among_gray_ones_is_refused(data: Path) -> None:
    colored = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(colored).save(data / "masks" / "2.png")
    message = refused(data)
    assert "2.png holds colors, but 5 others hold class numbers: convert each color" in message


def test_jpeg_masks_are_refused(data: Path) -> None:
    (data / "masks" / "2.png").unlink()
    mask(data / "masks" / "2.jpg", 0, 1)
    assert "2.jpg is in the format JPEG" in refused(data)


def test_instance_numbers_are_refused(data: Path) -> None:
    numbers = np.full((HEIGHT, WIDTH), 26001, np.uint16)
    Image.fromarray(numbers).save(data / "masks" / "2.png")
    assert "2.png holds values from 26001 to 26001: expected class numbers" in refused(data)


def test_a_mask_of_another_size_and_a_rotated_image(data: Path) -> None:
    image(data / "images" / "1.jpg", WIDTH, HEIGHT)
    assert "1.png has 8 x 6 pixels, its image" in refused(data)
    photo = Image.fromarray(np.zeros((WIDTH, HEIGHT, 3), np.uint8))
    exif = photo.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    photo.save(data / "images" / "1.jpg", exif=exif)
    assert sizes(load_masks(data)) == [4, 1, 1]


def test_a_value_that_is_not_a_class(data: Path) -> None:
    (data / "classes.txt").write_text("a\nb\nc\n")
    mask(data / "masks" / "5.png", 0, 7)
    assert "5.png holds 7, which is neither a class (0 to 2) nor 255" in refused(data)


def test_a_broken_mask_is_an_error_and_a_broken_image_is_not(data: Path) -> None:
    content = (data / "images" / "1.jpg").read_bytes()
    (data / "images" / "1.jpg").write_bytes(content[:20])
    assert sizes(load_masks(data)) == [4, 1, 1]
    content = (data / "masks" / "1.png").read_bytes()
    (data / "masks" / "1.png").write_bytes(content[: len(content) // 2])
    assert "1.png can't be read" in refused(data)


def test_one_class_no_images_and_missing_folders(tmp_path: Path) -> None:
    write_pairs(tmp_path / "one" / "images", tmp_path / "one" / "masks", 5, (0,))
    assert "hold 1 class: two or more are needed" in refused(tmp_path / "one")
    (tmp_path / "none").mkdir()
    assert "expected images/ and masks/ in it" in refused(tmp_path / "none")
    assert "nowhere does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "classes.txt").write_text("a\nb\na\n")
    write_pairs(tmp_path / "images", tmp_path / "masks", 5)
    assert "names the class a twice" in refused(tmp_path)


def test_the_csv_file_lists_every_split(data: Path) -> None:
    load_masks(data).write(data / "split.csv")
    with (data / "split.csv").open(newline="") as file:
        assert [row["split"] for row in csv.DictReader(file)] == ["train"] * 4 + ["val", "test"]
