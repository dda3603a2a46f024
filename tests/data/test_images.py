import os
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from vissl_lite.data.images import (
    BROKEN_IMAGE,
    find_images,
    read_image,
    resize_and_crop,
    suitable_size,
)
from vissl_lite.errors import UserError

RED, BLUE = (200, 40, 20), (30, 60, 220)


def halves(height: int = 32, width: int = 48, left: Any = RED, right: Any = BLUE) -> np.ndarray:
    """An image whose left half has one color and whose right half another."""
    image = np.empty((height, width, 3), np.uint8)
    image[:, : width // 2], image[:, width // 2 :] = left, right
    return image


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(halves()).convert(mode)


def noise(height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(image: Image.Image | np.ndarray, file: Path, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(file, **options)
    return file


def assert_reads_as(file: Path, expected: np.ndarray, tolerance: int = 0) -> None:
    image = read_image(file)
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    difference = np.abs(image.astype(int) - expected)
    assert difference.max() <= tolerance


def names(paths: list[str], folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in paths]


# Finding


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Images at several depths, beside things that are none."""
    folder = tmp_path / "tree"
    for name in ("b.jpg", "a/x.PNG", "a/deep/y.webp", ".hidden.jpg", ".cache/z.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "notes.md").write_text("no image")
    return folder


def test_folders_are_searched_recursively_and_hidden_ones_left_out(tree: Path) -> None:
    assert sorted(names(find_images([tree]), tree)) == ["a/deep/y.webp", "a/x.PNG", "b.jpg"]


def test_a_flat_folder_comes_sorted(tmp_path: Path) -> None:
    for name in ("c.jpg", "a.bmp", "b.TIFF"):
        (tmp_path / name).write_bytes(b"")
    assert names(find_images([tmp_path]), tmp_path) == ["a.bmp", "b.TIFF", "c.jpg"]


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.jpeg", "a.JPG", "a.png", "a.webp", "a.bmp", "a.tif", "a.tiff", "a.gif"]
)
def test_each_format_is_found(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    assert find_images([tmp_path]) == [str(tmp_path / name)]


def test_links_to_folders_are_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "linking").mkdir()
    (tmp_path / "linking" / "to").symlink_to(tree / "a", target_is_directory=True)
    found = names(find_images([tmp_path / "linking"]), tmp_path / "linking")
    assert sorted(found) == ["to/deep/y.webp", "to/x.PNG"]


@pytest.mark.parametrize(("link", "target"), [("a/deep/back", "."), ("a/self", "a")])
def test_a_loop_of_links_ends_with_each_image_once(link: str, target: str, tree: Path) -> None:
    (tree / link).symlink_to(tree / target, target_is_directory=True)
    real = [os.path.realpath(path) for path in find_images([tree])]
    assert len(real) == len(set(real)) == 3


def test_a_folder_has_its_own_files_first_then_its_folders_all_sorted(tmp_path: Path) -> None:
    expected = ["Z.jpg", "b.jpg", "a/2.jpg", "a/a.jpg/1.png", "a.b/1.jpg", "a0/1.jpg", "c/10.jpg"]
    for name in reversed(expected):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert names(find_images([tmp_path]), tmp_path) == expected
    assert find_images([f"{tmp_path}/"]) == find_images([tmp_path])
    assert find_images([tmp_path, tmp_path]) == find_images([tmp_path])


def test_odd_names_are_found_as_they_are(tmp_path: Path) -> None:
    odd = [b"caf\xe9.jpg", b"two\nlines.jpg", "日本.JPG".encode()]
    try:
        for name in odd:
            (tmp_path / os.fsdecode(name)).write_bytes(name)
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    found = find_images([tmp_path])
    assert sorted(Path(path).read_bytes() for path in found) == sorted(odd)


def test_links_that_lead_nowhere_do_no_harm(tree: Path) -> None:
    (tree / "gone").symlink_to(tree / "nothing")
    (tree / "itself").symlink_to(tree / "itself")
    assert names(find_images([tree]), tree) == ["b.jpg", "a/x.PNG", "a/deep/y.webp"]


def test_several_sources_come_in_order_without_repetition(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "o.gif").write_bytes(b"")
    found = find_images([other, tree / "a", tree, other, tree / "b.jpg"])
    assert found[0] == str(other / "o.gif")
    assert sorted(names(found[1:3], tree)) == ["a/deep/y.webp", "a/x.PNG"]
    assert names(found[3:], tree) == ["b.jpg"]


def test_a_source_may_be_one_image_or_text(tree: Path) -> None:
    assert find_images([str(tree / "b.jpg")]) == [str(tree / "b.jpg")]


def test_a_text_file_names_paths_relative_to_itself(tree: Path, tmp_path: Path) -> None:
    absolute = tmp_path / "absolute.png"
    absolute.write_bytes(b"")
    listing = tree / "list.txt"
    listing.write_text(f"# the good ones\n\na/x.PNG\n  b.jpg  \n{absolute}\na/x.PNG\n")
    assert find_images([listing]) == [str(tree / "a/x.PNG"), str(tree / "b.jpg"), str(absolute)]


def test_a_text_file_of_missing_paths_names_the_first(tree: Path) -> None:
    listing = tree / "list.txt"
    listing.write_text("b.jpg\ngone.jpg\nlost.jpg\n")
    with pytest.raises(UserError, match=r"list\.txt names 2 missing files.*gone\.jpg"):
        find_images([listing])


def test_an_empty_folder_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no image")
    with pytest.raises(UserError, match="no images found in"):
        find_images([tmp_path])


def test_a_text_file_of_comments_alone_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="no images found in"):
        find_images([tmp_path / "list.txt"])


def test_a_text_file_that_is_no_text_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00\xd8\xff")
    with pytest.raises(UserError, match="can't be read as a text file"):
        find_images([tmp_path / "list.txt"])


def test_a_missing_folder_is_a_mistake(tree: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_images([tree, tree / "nowhere"])


def test_a_file_of_another_kind_is_a_mistake(tree: Path) -> None:
    with pytest.raises(UserError, match=r"notes\.md is neither a folder, an archive, an image nor"):
        find_images([tree / "notes.md"])


def test_an_unreadable_folder_is_a_mistake(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may read everything, so the refusal is simulated
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if os.path.basename(path) == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="deep can't be read: Permission denied"):
        find_images([tree])


# Decoding


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.jpg", {"quality": 95}, 6),
        ("progressive.jpg", {"quality": 95, "progressive": True}, 6),
        ("a.png", {}, 0),
        ("a.webp", {"lossless": True}, 0),
        ("lossy.webp", {"quality": 95}, 12),
        ("a.bmp", {}, 0),
        ("a.tif", {}, 0),
        ("packed.tif", {"compression": "tiff_lzw"}, 0),
        ("a.gif", {}, 6),
    ],
)
def test_each_format_gives_its_colors_in_rgb(
    name: str, options: dict[str, Any], tolerance: int, tmp_path: Path
) -> None:
    expected = halves()
    image = read_image(save(expected, tmp_path / name, **options))
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    # away from the edge, where lossy formats mix the halves
    for part in (np.s_[:, :20], np.s_[:, 28:]):
        difference = np.abs(image[part].astype(int) - expected[part])
        assert difference.max() <= tolerance


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
def test_a_wrong_suffix_does_not_matter(name: str, tmp_path: Path) -> None:
    buffer = BytesIO()
    picture().save(buffer, "BMP")
    (tmp_path / name).write_bytes(buffer.getvalue())
    assert_reads_as(tmp_path / name, halves())


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.bmp", "a.gif"])
def test_gray_becomes_three_equal_channels(name: str, tmp_path: Path) -> None:
    gray = halves()[..., 0]
    assert_reads_as(save(gray, tmp_path / name), np.stack([gray] * 3, axis=2), tolerance=3)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_black_and_white(name: str, tmp_path: Path) -> None:
    bits = halves(left=0, right=255)
    assert_reads_as(save(Image.fromarray(bits).convert("1"), tmp_path / name), bits)


def test_the_first_frame_of_an_animated_gif(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in (RED, BLUE, BLUE)]
    file = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert_reads_as(file, np.full((20, 20, 3), RED), tolerance=6)


def test_a_palette_gives_its_colors(tmp_path: Path) -> None:
    indexed = picture().quantize(2)
    assert indexed.mode == "P"
    assert_reads_as(save(indexed, tmp_path / "a.png"), halves(), tolerance=1)


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    indexed = Image.new("P", (8, 8), 0)
    indexed.putpalette([*RED, *BLUE])
    indexed.putpixel((0, 0), 1)
    image = read_image(save(indexed, tmp_path / "a.png", transparency=0))
    assert tuple(image[0, 0]) == BLUE
    assert tuple(image[5, 5]) == (255, 255, 255)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_alpha_is_laid_over_white(name: str, tmp_path: Path) -> None:
    rgba = np.dstack([halves(), np.full((32, 48), 255, np.uint8)])
    rgba[:, :24, 3] = 0
    rgba[:16, 24:, 3] = 128
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    image = read_image(save(rgba, tmp_path / name, **options))
    assert (image[:, :24] == 255).all()
    assert (image[16:, 24:] == BLUE).all()
    mixed = [round(255 + (value - 255) * 128 / 255) for value in BLUE]
    assert np.abs(image[:16, 24:].astype(int) - mixed).max() <= 1


def test_a_transparent_color_of_a_png_is_white(tmp_path: Path) -> None:
    expected = halves(left=(255, 255, 255))
    assert_reads_as(save(picture(), tmp_path / "a.png", transparency=RED), expected)


def test_a_transparent_color_after_a_large_profile_is_white(tmp_path: Path) -> None:
    profile = bytes(np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8))
    file = save(picture(), tmp_path / "a.png", transparency=RED, icc_profile=profile)
    assert_reads_as(file, halves(left=(255, 255, 255)))


def test_gray_with_alpha_is_laid_over_white(tmp_path: Path) -> None:
    values = np.full((8, 8), 50, np.uint8)
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 255
    both = Image.merge("LA", [Image.fromarray(values), Image.fromarray(alpha)])
    expected = np.full((8, 8, 3), 255)
    expected[:4] = 50
    assert_reads_as(save(both, tmp_path / "a.png"), expected)


def test_a_cmyk_jpeg_gives_its_colors(tmp_path: Path) -> None:
    file = save(picture("CMYK"), tmp_path / "a.jpg", quality=98)
    image = read_image(file)
    assert np.abs(image[:, :20].astype(int) - RED).max() <= 6
    assert np.abs(image[:, 28:].astype(int) - BLUE).max() <= 6


@pytest.mark.parametrize(
    ("name", "orientation"),
    [*(("a.jpg", number) for number in range(1, 9)), ("a.png", 6), ("a.tif", 5), ("a.webp", 8)],
)
def test_exif_orientation_is_applied(name: str, orientation: int, tmp_path: Path) -> None:
    image = halves()
    image[:16, :24] = (20, 200, 40)  # four corners that no turn leaves alike
    image[16:, 24:] = (240, 240, 240)
    undo = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.transpose(1, 0, 2),
        6: np.rot90,  # the viewer turns clockwise, so the file is turned the other way
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo[orientation](image))
    options: dict[str, Any] = {"quality": 100} if name.endswith("jpg") else {}
    options |= {"lossless": True} if name.endswith("webp") else {}
    read = read_image(save(stored, tmp_path / name, exif=exif, **options))
    assert read.shape == image.shape
    for y, x in ((4, 4), (4, 44), (28, 4), (28, 44)):
        assert np.abs(read[y, x].astype(int) - image[y, x]).max() <= 6


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("high", [65535, 4095, 37])
def test_sixteen_bit_gray_is_stretched_to_its_percentiles(
    name: str, high: int, tmp_path: Path
) -> None:
    ramp = np.linspace(0, high, 256).round().astype(np.uint16).reshape(16, 16)
    image = read_image(save(ramp, tmp_path / name))
    low, top = np.percentile(ramp, (1, 99))
    expected = np.clip((ramp - low) * 255 / (top - low), 0, 255).round()
    assert np.abs(image - expected[..., None]).max() <= 1


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_color_keeps_its_colors(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    assert cv2.imwrite(str(file), halves()[..., ::-1].astype(np.uint16) * 257)
    # stretched from the smallest value, 20, to the largest, 220
    assert_reads_as(file, ((halves() - 20.0) * 255 / 200).round(), tolerance=1)


def test_a_floating_point_tiff_is_stretched_without_nan(tmp_path: Path) -> None:
    ramp = np.linspace(-3.0, 7.0, 10_000, dtype=np.float32).reshape(100, 100)
    ramp[50, 50], ramp[50, 51] = np.nan, np.inf
    image = read_image(save(ramp, tmp_path / "a.tif"))
    assert image[0, 0, 0] == image[50, 50, 0] == image[50, 51, 0] == 0
    assert image[99, 99, 0] == 255
    assert abs(int(image[49, 99, 0]) - 127) <= 1


def test_a_constant_floating_point_tiff_can_be_read(tmp_path: Path) -> None:
    file = save(np.full((4, 4), 2.5, np.float32), tmp_path / "a.tif")
    assert read_image(file).shape == (4, 4, 3)


@pytest.mark.parametrize(("height", "width"), [(256, 391), (401, 257)])
def test_a_large_jpeg_is_never_decoded_below_what_is_needed(
    height: int, width: int, tmp_path: Path
) -> None:
    file = save(noise(height, width), tmp_path / "a.jpg")
    for shortest in (20, 32, 33, 50, 64, 65, 100, 128, 200, 256, 300, 1000):
        side = min(read_image(file, shortest).shape[:2])
        assert side >= min(shortest, height, width)
        assert side < 2 * shortest or side <= -(-min(height, width) // 8)


def test_a_large_jpeg_is_decoded_smaller_with_the_same_colors(tmp_path: Path) -> None:
    file = save(halves(512, 768), tmp_path / "a.jpg", quality=95)
    image = read_image(file, shortest=100)
    assert image.shape == (128, 192, 3)
    assert np.abs(image[:, :90].astype(int) - RED).max() <= 6
    assert np.abs(image[:, 102:].astype(int) - BLUE).max() <= 6


def test_a_large_jpeg_that_lies_on_its_side_is_decoded_smaller_and_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = save(halves(512, 768), tmp_path / "a.jpg", exif=exif, quality=95)
    image = read_image(file, shortest=100)
    assert image.shape == (192, 128, 3)
    assert np.abs(image[:90].astype(int) - RED).max() <= 6


# Broken files


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif", "a.gif"])
def test_a_file_that_is_cut_short_is_broken(name: str, tmp_path: Path) -> None:
    file = save(noise(), tmp_path / name)
    data = file.read_bytes()
    headers = [1, 2, 3, 8, 12, 20, 24, 25, 26, 33, 40]
    for length in headers + [int(len(data) * share) for share in (0.02, 0.3, 0.6, 0.9, 0.99)]:
        file.write_bytes(data[:length])
        with pytest.raises(BROKEN_IMAGE):
            read_image(file)


def test_a_cut_jpeg_is_broken_even_if_its_thumbnail_is_whole(tmp_path: Path) -> None:
    thumbnail = BytesIO()
    Image.fromarray(noise(16, 16)).save(thumbnail, "JPEG")
    # an application segment that holds a whole JPEG, as cameras write it
    segment = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail.getvalue()
    whole = save(noise(), tmp_path / "a.jpg").read_bytes()
    whole = whole[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + whole[2:]
    file = tmp_path / "camera.jpg"
    file.write_bytes(whole)
    assert read_image(file).shape == (64, 64, 3)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BROKEN_IMAGE):
        read_image(file)


@pytest.mark.parametrize("content", [b"", b"this is a text, not a picture\n" * 20])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_what_is_no_image_is_broken(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BROKEN_IMAGE):
        read_image(tmp_path / name)


def test_a_missing_file_and_a_folder_are_broken(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.jpg", tmp_path):
        with pytest.raises(BROKEN_IMAGE):
            read_image(path)


# Sizes


@pytest.mark.parametrize("size", [32, 57])
def test_the_central_square_has_the_size_asked_for(size: int) -> None:
    for shape in ((32, 32), (64, 48), (20, 100), (31, 33), (300, 41)):
        cropped = resize_and_crop(noise(*shape), size)
        assert cropped.shape == (size, size, 3)
        assert cropped.dtype == np.uint8


def test_the_crop_is_central() -> None:
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, 32:64] = 255
    assert (resize_and_crop(image, 32) == 255).all()
    assert resize_and_crop(image, 16)[:, 1:-1].min() == 255


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    np.testing.assert_array_equal(resize_and_crop(noise(32, 32), 32), noise(32, 32))


def test_the_resized_image_keeps_its_mean() -> None:
    image = noise(128, 128)
    assert abs(resize_and_crop(image, 32).mean() - image.mean()) < 1


@pytest.mark.parametrize(
    ("sides", "expected"),
    [([32], 32), ([20], 32), ([70, 64, 40], 64), ([100], 96), ([500, 600], 224), ([3], 32)],
)
def test_suitable_size_follows_the_median_shorter_side(
    sides: list[int], expected: int, tmp_path: Path
) -> None:
    paths = [
        str(save(noise(side, side + 10), tmp_path / f"{index}.png"))
        for index, side in enumerate(sides)
    ]
    assert suitable_size(paths) == expected


def test_suitable_size_passes_over_broken_files(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_text("broken")
    whole = str(save(noise(64, 64), tmp_path / "whole.png"))
    assert suitable_size([str(tmp_path / "broken.jpg"), whole]) == 64
    assert suitable_size([str(tmp_path / "broken.jpg")]) == 224
