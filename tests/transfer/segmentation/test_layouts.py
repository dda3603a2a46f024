"""Segmentation data as people have them: layouts, values, colors and polygons."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vissl_lite.errors import UserError
from vissl_lite.transfer.segmentation.data import LabelledMasks, load_masks
from vissl_lite.transfer.segmentation.mask_source import MaskSource
from vissl_lite.transfer.sources.shapes import Shape

HEIGHT, WIDTH = 8, 10
RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 99, np.uint8)).save(path)


def mask(path: Path, *values: Any) -> None:
    """Write a mask whose columns have these values or colors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.array([values[min(i, len(values) - 1)] for i in range(WIDTH)], np.uint8)
    Image.fromarray(np.repeat(row[None], HEIGHT, axis=0)).save(path)


def pairs(folder: Path, names: Mapping[str, str], values: tuple[Any, ...] = (0, 1, 2)) -> None:
    """Write images and masks of these paths."""
    for one, other in names.items():
        image(folder / one)
        mask(folder / other, *values)


def sizes(data: LabelledMasks) -> list[int]:
    return [len(data.train), len(data.val), len(data.test)]


def numbered(one: str, other: str, count: int = 5) -> dict[str, str]:
    return {one.replace("#", str(n)): other.replace("#", str(n)) for n in range(count)}


def refusal(source: Path, annotations: Path | None = None) -> str:
    with pytest.raises(UserError) as raised:
        load_masks(source, annotations)
    return str(raised.value)


# Folders and names


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("images/@/#.jpg", "masks/@/#.png"),
        ("@/images/#.jpg", "@/masks/#.png"),
        ("img_dir/@/#.jpg", "ann_dir/@/#.png"),
        ("@/#.png", "@_labels/#_L.png"),
        ("my_data/Images/@/#.jpg", "my_data/Labels/@/#.png"),
        ("leftImg8bit/@/ulm/ulm_#_leftImg8bit.png", "gtFine/@/ulm/ulm_#_gtFine_labelIds.png"),
        ("@/#.jpg", "@/#_mask.png"),
    ],
)
@pytest.mark.parametrize("parts", [("train", "val", "test"), ("Training", "valid"), ("train",), ()])
def test_parts(one: str, other: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    for part in parts or ("",):
        names = numbered(one.replace("@", part), other.replace("@", part or "all"))
        if not part:
            names = numbered(one.replace("@/", ""), other.replace("@/", "").replace("@_", ""))
        pairs(tmp_path, names)
    data = load_masks(tmp_path)
    expected = {3: [5, 5, 5], 2: [4, 1, 5], 1: [3, 1, 1], 0: [3, 1, 1]}
    assert sizes(data) == expected[len(parts)]
    for each in (*data.train, *data.val, *data.test):
        stem = Path(each.path).stem.removesuffix("_leftImg8bit")
        assert Path(each.mask.file).stem.startswith(stem)
    if len(parts) == 3:
        assert set(data.reading.origins) == {"train", "val", "test"}
    if "leftImg8bit" in one:
        assert data.reading.layout == "Cityscapes"


def test_ade20k(tmp_path: Path) -> None:
    for part in ("training", "validation"):
        names = numbered(f"images/{part}/ADE_{part}_#.jpg", f"annotations/{part}/ADE_{part}_#.png")
        pairs(tmp_path / "ADEChallengeData2016", names)
    data = load_masks(tmp_path)
    assert sizes(data) == [4, 1, 5]
    assert data.reading.origins["train"] == "training/"


def test_cityscapes_takes_train_ids_and_leaves_colors_and_instances(tmp_path: Path) -> None:
    for part in ("train", "val"):
        names = numbered(f"leftImg8bit/{part}/ulm/u_#_leftImg8bit.png", f"x/{part}#.png")
        for one in names:
            image(tmp_path / one)
            stem = one.replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit.png", "_gtFine_")
            mask(tmp_path / f"{stem}labelTrainIds.png", 0, 1, 255)
            mask(tmp_path / f"{stem}labelIds.png", 7, 8, 3)
            mask(tmp_path / f"{stem}color.png", RED, GREEN)
            mask(tmp_path / f"{stem}instanceIds.png", 7, 8)
    data = load_masks(tmp_path)
    assert sizes(data) == [4, 1, 5]
    assert all(one.mask.file.endswith("labelTrainIds.png") for one in data.train)
    assert data.reading.counts == {}


def test_pascal_voc_below_vocdevkit(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    pairs(root, numbered("JPEGImages/#.jpg", "SegmentationClass/#.png", 6))
    image(root / "JPEGImages" / "other.jpg")
    for name, text in (("train", "0\n1\n2\n"), ("val", "3\n4\n"), ("trainval", "0\n1\n")):
        file = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    data = load_masks(tmp_path)
    assert sizes(data) == [2, 1, 2]
    assert data.reading.layout == "Pascal VOC"


def test_lists_of_pascal_voc_may_have_file_names_and_trainval_alone(tmp_path: Path) -> None:
    pairs(tmp_path, numbered("JPEGImages/#.jpg", "SegmentationClass/#.png", 6))
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("0.jpg\n1.jpg\n2.jpg\n3.jpg\n")
    (lists / "test.txt").write_text("4.jpg\n5.jpg\n")
    data = load_masks(tmp_path)
    assert sorted(Path(path).stem for path in data.paths("test")) == ["4", "5"]
    (lists / "test.txt").unlink()
    assert sizes(load_masks(tmp_path)) == [2, 1, 1]


@pytest.mark.parametrize(
    "end",
    "_mask -mask _masks _label -label _labels _seg _segmentation _gt _L _labelIds _MASK".split(),
)
@pytest.mark.parametrize("folder", ["", "gt/", "SEGMENTATIONCLASS/"])
def test_names_of_masks(end: str, folder: str, tmp_path: Path) -> None:
    pictures = "imgs/" if folder else ""
    pairs(tmp_path, numbered(f"{pictures}a#.jpg", f"{folder}a#{end}.png"))
    assert sizes(load_masks(tmp_path)) == [3, 1, 1]


def test_a_folder_of_images_with_masks_beside_it(tmp_path: Path) -> None:
    pairs(tmp_path / "a", numbered("images/#.jpg", "masks/#.png"))
    pairs(tmp_path / "b", numbered("images/train/#.jpg", "masks/train/#.png"))
    assert sizes(load_masks(tmp_path / "a" / "images")) == [3, 1, 1]
    data = load_masks(tmp_path / "b" / "images" / "train")
    assert sizes(data) == [3, 1, 1]
    assert "masks/train" in data.reading.notes[0]


def test_several_masks_of_one_image_are_merged(tmp_path: Path) -> None:
    for n in range(5):
        image(tmp_path / "stage1_train" / f"id{n}" / "images" / f"id{n}.png")
        for k in range(3):
            columns = [255 if i == k + n % 2 else 0 for i in range(WIDTH)]
            mask(tmp_path / "stage1_train" / f"id{n}" / "masks" / f"{n}{k}ab.png", *columns)
        image(tmp_path / "busi" / f"x ({n}).png")
        mask(tmp_path / "busi" / f"x ({n})_mask.png", 255, 0)
        mask(tmp_path / "busi" / f"x ({n})_mask_1.png", 0, 0, 255, 0)
    one = load_masks(tmp_path / "stage1_train").train[0]
    assert len(one.mask.files) == 3
    assert int(one.mask.read()[0].sum()) == 3
    data = load_masks(tmp_path / "busi")
    assert data.classes == ["background", "foreground"]
    assert data.train[0].mask.read()[0].tolist() == [1, 0, 1] + [0] * 7


def test_an_image_of_another_part_or_folder_is_not_taken(tmp_path: Path) -> None:
    pairs(tmp_path, numbered("images/train/#.jpg", "masks/train/#.png"))
    pairs(tmp_path, numbered("images/val/v#.jpg", "masks/val/v#.png"))
    mask(tmp_path / "masks" / "val" / "1.png", 0, 1)
    data = load_masks(tmp_path)
    assert data.reading.counts == {"mask without an image, left out": 1}


def test_few_masks_are_warned_about(tmp_path: Path) -> None:
    pairs(tmp_path, numbered("images/#.jpg", "masks/#.png"))
    for n in range(10):
        image(tmp_path / "images" / f"more{n}.jpg")
    data = load_masks(tmp_path)
    assert sizes(data) == [3, 1, 1]
    assert data.reading.warnings[0][0] == "data.unmasked"


# Gray levels


@pytest.mark.parametrize(
    ("values", "names", "classes", "first"),
    [
        ((0, 127, 255), None, ["0", "127", "255"], [0, 1, 2]),
        ((0, 50, 100), None, ["0", "50", "100"], [0, 1, 2]),
        ((0, 76, 150, 255), None, ["0", "76", "150"], [0, 1, 2, 255]),
        ((0, 76, 150), "a\nb\nc\n", ["a", "b", "c"], [0, 1, 2]),
        ((0, 76, 150), "b\nc\n", ["background", "b", "c"], [0, 1, 2]),
        ((0, 1, 255), None, ["background", "foreground"], [0, 1, 255]),
        ((0, 3), "a\nb\nc\nd\n", ["a", "b", "c", "d"], [0, 3]),
    ],
)
def test_gray_levels(
    values: tuple[int, ...],
    names: str | None,
    classes: list[str],
    first: list[int],
    tmp_path: Path,
) -> None:
    pairs(tmp_path, numbered("images/#.jpg", "masks/#.png"), values)
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
    data = load_masks(tmp_path)
    assert data.classes == classes
    assert data.train[0].mask.read()[0, : len(first)].tolist() == first
    if max(values) > 3 and values != (0, 1, 255):
        assert "gray levels" in data.reading.notes[0]


def test_smoothed_masks_are_refused(tmp_path: Path) -> None:
    pairs(tmp_path, numbered("images/#.jpg", "masks/#.png"), (0,))
    for n in range(5):
        array = np.zeros((40, 40), np.uint8)
        array[:, 20:], array[:20, 20] = 255, np.arange(10, 250, 12)
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "images" / f"{n}.jpg")
        Image.fromarray(array).save(tmp_path / "masks" / f"{n}.png")
    assert "as from smoothing or resizing: save them as PNG with 0 below 128" in refusal(tmp_path)


# Colors


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("class_dict.csv", "name,r,g,b\nsky,0,0,0\nroad,255,0,0\ntree,0,255,0\n"),
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nsky:0,0,0::\nroad:255,0,0::\ntree:0,255,0::\n",
        ),
    ],
)
def test_a_table_of_colors(file: str, text: str, tmp_path: Path) -> None:
    pairs(tmp_path, numbered("images/#.jpg", "masks/#.png"), (RED, BLACK, GREEN))
    mask(tmp_path / "masks" / "3.png", BLACK)
    (tmp_path / file).write_text(text)
    data = load_masks(tmp_path)
    assert data.classes == ["sky", "road", "tree"]
    whole = next(
        one for one in (*data.train, *data.val, *data.test) if "3.png" not in one.mask.file
    )
    assert whole.mask.read()[0, :3].tolist() == [1, 0, 2]
    mask(tmp_path / "masks" / "2.png", (1, 2, 3))
    assert f"the color #010203, which {tmp_path / file} does not name" in refusal(tmp_path)


def test_colors_without_a_table(tmp_path: Path) -> None:
    pairs(tmp_path, numbered("images/#.jpg", "masks/#.png"), (RED, BLACK, GREEN))
    data = load_masks(tmp_path)
    assert data.classes == ["background", "#00ff00", "#ff0000"]  # most of the pixels are green
    assert data.train[0].mask.read()[0, :3].tolist() == [2, 0, 1]
    assert "#000000, #00ff00, #ff0000" in data.reading.notes[0].replace("background", "#000000")
    (tmp_path / "classes.txt").write_text("grass\nroad\n")
    assert load_masks(tmp_path).classes == ["background", "grass", "road"]


def test_colors_of_pascal_voc(tmp_path: Path) -> None:
    colors = (BLACK, (128, 0, 0), (224, 224, 192), (0, 64, 128))
    pairs(tmp_path, numbered("JPEGImages/#.jpg", "SegmentationClass/#.png"), colors)
    data = load_masks(tmp_path)
    assert len(data.classes) == 21
    assert data.train[0].mask.read()[0, :4].tolist() == [0, 1, 255, 20]
    assert data.train[0].classes == (0, 1, 20)


def test_too_many_colors_are_refused(tmp_path: Path) -> None:
    pairs(tmp_path, numbered("images/#.jpg", "masks/#.png"), (RED, BLACK))
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "masks" / "1.png")
    message = refusal(tmp_path)
    assert "1.png holds 80 colors, more than 64" in message
    assert "class_dict.csv" in message


# Polygons

SQUARE = [2.0, 2.0, 6.0, 2.0, 6.0, 6.0, 2.0, 6.0]


def coco(count: int, segmentation: Any = None) -> dict[str, Any]:
    return {
        "images": [
            {"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH}
            for n in range(count)
        ],
        "annotations": [
            {"image_id": n, "category_id": 7, "segmentation": segmentation or [SQUARE]}
            for n in range(count)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 1, "name": "never"}],
    }


def runs() -> dict[str, Any]:
    """Rows 2 to 5 of the columns 2 to 5."""
    counts = [2 * HEIGHT + 2, 4, 4, 4, 4, 4, 4, 4]
    return {"size": [HEIGHT, WIDTH], "counts": [*counts, HEIGHT * WIDTH - sum(counts)]}


def write_coco(folder: Path) -> None:
    (folder / "annotations.json").write_text(json.dumps(coco(5)))


def write_rle(folder: Path) -> None:
    (folder / "annotations.json").write_text(json.dumps(coco(5, runs())))


def write_compressed(folder: Path) -> None:
    text = "b04400000n0"  # 18, 4, 4, then differences to the run before the last: 0, ..., 0, 30
    write = coco(5, {"size": [HEIGHT, WIDTH], "counts": text})
    (folder / "annotations.json").write_text(json.dumps(write))


def write_yolo(folder: Path) -> None:
    scaled = [v / (WIDTH if i % 2 == 0 else HEIGHT) for i, v in enumerate(SQUARE)]
    for n in range(5):
        (folder / "images" / f"{n}.txt").write_text(f"0 {' '.join(map(str, scaled))}\n")
    (folder / "data.yaml").write_text("names: [cat]\n")


def write_labelme(folder: Path) -> None:
    points = [SQUARE[i : i + 2] for i in range(0, 8, 2)]
    for n in range(5):
        content = {
            "imagePath": f"{n}.jpg",
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
            "shapes": [{"label": "cat", "points": points, "shape_type": "polygon"}],
        }
        (folder / "images" / f"{n}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "write", [write_coco, write_rle, write_compressed, write_yolo, write_labelme]
)
def test_polygons(write: Callable[[Path], None], tmp_path: Path) -> None:
    for n in range(5):
        image(tmp_path / "images" / f"{n}.jpg")
    write(tmp_path)
    data = load_masks(tmp_path)
    assert sizes(data) == [3, 1, 1]
    assert data.classes == ["background", "cat"]
    assert data.reading.layout.endswith("polygons")
    one = data.train[0]
    assert one.classes == (0, 1)
    drawn = one.mask.read()
    assert drawn.shape == (HEIGHT, WIDTH)
    assert drawn[2:6, 2:6].all()
    assert not drawn[:2].any()
    assert not drawn[7:].any()
    assert 16 <= drawn.sum() <= 25
    (tmp_path / "run").mkdir()
    data.write_split(tmp_path / "run")
    again = load_masks(tmp_path / "run" / "split.csv")
    assert again.classes == data.classes
    np.testing.assert_array_equal(again.train[0].mask.read(), drawn)


def test_the_parts_of_a_yaml_file_are_kept(tmp_path: Path) -> None:
    write_parts = {"site_a": "0 1 2 3", "site_b": "4 5"}
    line = "0 " + " ".join(str(v / 10) for v in SQUARE)
    for site, numbers in write_parts.items():
        for n in numbers.split():
            image(tmp_path / site / "images" / f"{n}.jpg")
            label = tmp_path / site / "labels" / f"{n}.txt"
            label.parent.mkdir(exist_ok=True)
            label.write_text(line)
    (tmp_path / "Classes.txt").write_text("cat\n")
    content = "nc: 1\ntrain: {}/images\nval: site_b/images\n"
    (tmp_path / "data.yaml").write_text(content.format("site_a"))
    data = load_masks(tmp_path)
    # Without test images, the validation part is that of testing.
    assert {Path(path).stem for path in data.paths("test")} == {"4", "5"}
    assert {Path(path).stem for path in (*data.paths("train"), *data.paths("val"))} == set("0123")
    assert data.classes == ["background", "cat"]
    (tmp_path / "data.yaml").write_text(content.format("/gone"))  # of another machine
    assert sum(sizes(load_masks(tmp_path))) == 6
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.yaml").write_text(content.format("site_a") + "test: empty\n")
    assert {Path(path).stem for path in load_masks(tmp_path).paths("test")} == {"4", "5"}


def test_a_yaml_file_beside_the_labels_names_the_parts_too(tmp_path: Path) -> None:
    for n in range(6):
        image(tmp_path / "images" / f"{n}.jpg")
        label = tmp_path / "shapes" / f"{n}.txt"
        label.parent.mkdir(exist_ok=True)
        label.write_text("0 " + " ".join(str(v / 10) for v in SQUARE))
    for part, numbers in (("train", range(4)), ("val", (4, 5))):
        lines = [f"../images/{n}.jpg" for n in numbers]
        (tmp_path / "shapes" / f"{part}.txt").write_text("\n".join(lines))
    text = "names: [cat]\ntrain: train.txt\nval: val.txt\n"
    (tmp_path / "shapes" / "data.yaml").write_text(text)
    data = load_masks(tmp_path / "images", tmp_path / "shapes")
    assert {Path(path).stem for path in data.paths("test")} == {"4", "5"}


def test_ids_of_coco_may_be_fractions_and_text(tmp_path: Path) -> None:
    for n in range(5):
        image(tmp_path / "images" / f"{n}.jpg")
    content = coco(5)
    for one in content["annotations"]:
        one["image_id"] = float(one["image_id"])
    content["categories"][0]["id"] = "7"
    content["annotations"].append({"image_id": 99, "category_id": 7, "segmentation": [SQUARE]})
    content["annotations"].append(None)
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    data = load_masks(tmp_path)
    assert all(one.classes == (0, 1) for one in data.train)
    assert data.reading.counts == {
        "object of an image not listed, left out": 1,
        "object without a polygon or RLE that can be read, left out": 1,
    }


@pytest.mark.parametrize("damaged", ["0", "4"])
def test_a_damaged_file_of_labelme_is_left_out(damaged: str, tmp_path: Path) -> None:
    for n in range(5):
        image(tmp_path / "images" / f"{n}.jpg")
    write_labelme(tmp_path)
    (tmp_path / "images" / f"{damaged}.json").write_text('{"shapes": [')
    data = load_masks(tmp_path)
    assert sum(sizes(data)) == 4
    assert data.reading.counts["file not readable, left out"] == 1
    write_coco(tmp_path)
    (tmp_path / "annotations.json").write_text('{"images": [')
    for file in (tmp_path / "images").glob("*.json"):
        file.unlink()
    assert "annotations.json" in refusal(tmp_path)


def test_smaller_shapes_lie_on_larger_ones(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    shapes = tuple(
        (number, Shape((np.array(points, np.float32).tobytes(),)))
        for number, points in ((1, SQUARE), (2, [0, 0, 10, 0, 10, 8, 0, 8]))
    )
    made = MaskSource(("a.json",), shapes=shapes, image=str(tmp_path / "a.png"), size=(8, 10))
    assert set(np.unique(made.read())) == {1, 2}


def test_shapes_turn_with_the_image(tmp_path: Path) -> None:
    photo = Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.jpg", exif=exif)
    outline = np.array([0, 0, 3, 0, 3, 2, 0, 2], np.float32).tobytes()
    made = MaskSource(
        ("a.json",), shapes=((1, Shape((outline,))),), image=str(tmp_path / "a.jpg"), size=(8, 10)
    )
    drawn = made.read()
    assert drawn.shape == (WIDTH, HEIGHT)
    assert drawn[0, -1] == 1  # the upper left corner is on the upper right
    assert not drawn[:, 0].any()


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2]],
        [["x"] * 8],
        [[1e300] * 7],
        {"size": [HEIGHT, WIDTH], "counts": [5]},
        {"size": [10**9, 10**9], "counts": [10**18]},
        {"size": [HEIGHT, WIDTH], "counts": "\x00\xff~~~~~~~~~~~~~~~~"},
        [float("nan")],
        7,
    ],
)
def test_damaged_polygons_are_left_out(segmentation: Any, tmp_path: Path) -> None:
    for n in range(6):
        image(tmp_path / "images" / f"{n}.jpg")
    content = coco(6)
    content["annotations"][2]["segmentation"] = segmentation
    (tmp_path / "set.json").write_text(json.dumps(content))
    data = load_masks(tmp_path / "images", tmp_path / "set.json")
    assert sum(data.reading.counts.values()) == 1


# Other tasks


def test_data_of_other_tasks_are_named(tmp_path: Path) -> None:
    for n in range(4):
        image(tmp_path / "classes" / "cat" / f"{n}.jpg")
        image(tmp_path / "classes" / "dog" / f"{n}.jpg")
        image(tmp_path / "boxes" / "images" / f"{n}.jpg")
        image(tmp_path / "yolo" / "images" / f"{n}.jpg")
        image(tmp_path / "plain" / f"{n}.jpg")
        label = tmp_path / "yolo" / "labels" / f"{n}.txt"
        label.parent.mkdir(exist_ok=True)
        label.write_text("0 0.5 0.5 0.1 0.1\n")
    content = coco(4)
    for one in content["annotations"]:
        one.update(bbox=[0, 0, 2, 2], segmentation=[])
    (tmp_path / "boxes" / "set.json").write_text(json.dumps(content))
    assert "cat, dog it looks like a classification data set: give --task classification" in (
        refusal(tmp_path / "classes")
    )
    assert "1 .json it looks like a detection data set" in refusal(tmp_path / "boxes")
    assert "4 .txt it looks like a detection data set" in refusal(tmp_path / "yolo")
    assert "give --task detection" in refusal(
        tmp_path / "boxes" / "images", tmp_path / "boxes" / "set.json"
    )
    assert "expected images/ and masks/ in it" in refusal(tmp_path / "plain")
    (tmp_path / "plain" / "set.csv").write_text("path,label\n0.jpg,1\n1.jpg,0\n2.jpg,1\n")
    assert "holds 1, 0, which are not mask files: if they are classes of images, give --task" in (
        refusal(tmp_path / "plain" / "set.csv")
    )


# Writing


def test_mapped_masks_are_written_as_class_indices(tmp_path: Path) -> None:
    pairs(tmp_path / "set", numbered("images/#.jpg", "masks/#.png", 10), (RED, BLACK, GREEN))
    data = load_masks(tmp_path / "set")
    (tmp_path / "run").mkdir()
    data.write_split(tmp_path / "run")
    again = load_masks(tmp_path / "run" / "split.csv")
    assert again.classes == data.classes
    for ours, theirs in zip(data.train, again.train, strict=True):
        assert ours.path == theirs.path
        assert ours.classes == theirs.classes
        np.testing.assert_array_equal(ours.mask.read(), theirs.mask.read())
