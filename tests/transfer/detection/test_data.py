import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vissl_lite.data.images import read_image
from vissl_lite.errors import UserError
from vissl_lite.sample.dataset import make_sample_data
from vissl_lite.transfer.detection.data import BoxedImage, LabelledBoxes, load_boxes
from vissl_lite.transfer.options import SourceOptions

HEIGHT, WIDTH = 30, 40
Object = tuple[str, Sequence[float]]  # class, corners


def picture(path: Path, orientation: int = 1, height: int = HEIGHT, width: int = WIDTH) -> Path:
    """Write a black image with a white box at 5, 10, 15, 14 of the stored pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[10:14, 5:15] = 255
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def coco(
    file: Path,
    images: Sequence[str],
    boxes: Sequence[tuple[int, int, Sequence[float]]],
    **keys: Any,
) -> Path:
    """Write a COCO file. Boxes are (image number, class id, (x, y, width, height))."""
    content = {
        "images": [
            {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(images)
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": list(box), "iscrowd": 0}
            for i, (image, category, box) in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content | keys))
    return file


def voc(
    file: Path,
    objects: Sequence[Object],
    size: tuple[int, int] = (HEIGHT, WIDTH),
    filename: str = "elsewhere.jpg",
    difficult: int = 0,
) -> Path:
    """Write an XML file in VOC's format."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    listed = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, corners, strict=True))
        + "</bndbox></object>"
        for name, corners in objects
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"<annotation><filename>{filename}</filename><size><width>{size[1]}</width>"
        f"<height>{size[0]}</height></size>{listed}</annotation>"
    )
    return file


def voc_set(folder: Path, objects: Sequence[Object], count: int = 6, **keys: Any) -> Path:
    """Write images with the same objects, without splits."""
    for number in range(count):
        picture(folder / "images" / f"{number}.png")
        voc(folder / "annotations" / f"{number}.xml", objects, **keys)
    return folder


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def every(data: LabelledBoxes) -> list[BoxedImage]:
    return [*data.train, *data.val, *data.test]


def found(data: LabelledBoxes, root: Path) -> dict[str, list[tuple[str, float]]]:
    """By split: image file below the root, and the left edge of its only box."""
    return {
        split: [
            (Path(one.path).relative_to(root).as_posix(), float(one.boxes[0, 0]))
            for one in getattr(data, split)
        ]
        for split in ("train", "val", "test")
    }


def assert_same(a: LabelledBoxes, b: LabelledBoxes) -> None:
    assert a.classes == b.classes
    for split in ("train", "val", "test"):
        for ours, theirs in zip(getattr(a, split), getattr(b, split), strict=True):
            assert (ours.path, ours.size) == (theirs.path, theirs.size)
            for name in ("boxes", "labels", "ignored"):
                one, other = getattr(ours, name), getattr(theirs, name)
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)


# Layouts


@pytest.mark.slow
def test_the_sample_data(tmp_path: Path) -> None:
    folder = make_sample_data(tmp_path / "s", 0, 5, train=20, val=10, test=10, processes=1)
    data = load_boxes(folder)
    assert [len(part) for part in (data.train, data.val, data.test)] == [20, 10, 10]
    assert data.reading.counts == {}
    for one in every(data):  # the masks give the same boxes
        mask = Path(one.path.replace("/labelled/", "/masks/")).with_suffix(".png")
        rows, columns = np.nonzero(np.asarray(Image.open(mask)))
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert one.boxes.tolist() == [box]
        assert data.classes[one.labels[0]] == Path(one.path).parent.name


@pytest.mark.parametrize(
    ("annotations", "images", "names"),
    [
        ("annotations/instances_{}2017.json", "{}2017", ("train", "val", "test")),
        ("annotations/{}.json", "images/{}", ("train", "val", "test")),
        ("annotations/{}.json", "images/{}2017", ("train", "val", "test")),
        ("{}.json", "{}", ("train", "val", "test")),
        ("{}/_annotations.coco.json", "{}", ("train", "valid", "test")),
    ],
)
def test_layouts_of_coco(
    annotations: str, images: str, names: Sequence[str], tmp_path: Path
) -> None:
    """Images of the three splits have the same names, and are told apart by folder."""
    for left, name in enumerate(names):
        coco(
            tmp_path / annotations.format(name),
            ["1.png", "2.png"],
            [(0, 3, (left, 1, 5, 5)), (1, 7, (left + 10, 1, 5, 5))],
        )
        for file in ("1.png", "2.png"):
            picture(tmp_path / images.format(name) / file)
    picture(tmp_path / "masks" / "1.png")
    coco(tmp_path / "annotations" / "captions_train2017.json", [], [])
    if "_annotations" in annotations:
        (tmp_path / "annotations" / "captions_train2017.json").unlink()
    data = load_boxes(tmp_path)
    place = [images.format(name) for name in names]
    assert found(data, tmp_path) == {
        split: [(f"{place[i]}/1.png", i), (f"{place[i]}/2.png", i + 10)]
        for i, split in enumerate(("train", "val", "test"))
    }
    assert data.classes == ["cat", "dog"]  # in the order of the ids, which are not consecutive
    assert [one.labels.tolist() for one in data.train] == [[0], [1]]
    assert data.reading.counts == {}


def test_an_image_missing_in_its_split_is_not_taken_from_another_split(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        coco(
            tmp_path / f"{split}.json",
            ["1.png", "2.png"],
            [(0, 3, (1, 1, 5, 5)), (1, 3, (1, 1, 5, 5))],
        )
        picture(tmp_path / split / "1.png")
    picture(tmp_path / "train" / "2.png")
    data = load_boxes(tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [2, 1, 1]
    assert data.reading.counts == {"image missing, or not the only one of its name, left out": 2}


@pytest.mark.parametrize("given", ["folder", "file", "annotations"])
def test_one_coco_file_is_split_alike_for_every_seed(given: str, tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(10)]
    file = coco(
        tmp_path / "set" / "labels.json",
        [f"C:\\data\\{name}" for name in names],
        [(i, 3, (i, 1, 5, 5)) for i in range(10)],
    )
    for name in names:
        picture(tmp_path / ("other" if given == "annotations" else "set") / "deep" / name)
    sources: dict[str, tuple[Path, Path | None]] = {
        "folder": (file.parent, None),
        "file": (file, None),
        "annotations": (tmp_path / "other", file),
    }
    data = load_boxes(*sources[given], seed=0)
    assert [len(part) for part in (data.train, data.val, data.test)] == [6, 2, 2]
    assert all(int(Path(one.path).stem) == one.boxes[0, 0] for one in every(data))
    assert_same(data, load_boxes(*sources[given], seed=5))


@pytest.mark.parametrize("explicit", [False, True])
def test_the_layout_of_voc(explicit: bool, tmp_path: Path) -> None:
    for number in range(8):
        voc(tmp_path / "Annotations" / f"{number}.xml", [("dog", (number + 2, 3, 30, 20))])
        picture(tmp_path / "JPEGImages" / f"{number}.jpg")
        picture(tmp_path / "SegmentationClass" / f"{number}.png")
    for name, members in (("train", "0 1 2"), ("val", "3"), ("test", "4 5"), ("trainval", "0 3")):
        write(tmp_path / "ImageSets" / "Main" / f"{name}.txt", members.replace(" ", "\n"))
    given = (tmp_path / "JPEGImages", tmp_path / "Annotations") if explicit else (tmp_path,)
    data = load_boxes(*given)
    numbers = {"train": (0, 1, 2), "val": (3,), "test": (4, 5)}
    assert found(data, tmp_path) == {  # coordinates count from 1, so that the left edge is one less
        split: [(f"JPEGImages/{i}.jpg", i + 1) for i in members]
        for split, members in numbers.items()
    }
    assert data.train[0].boxes.tolist() == [[1, 2, 30, 20]]
    assert data.reading.counts == {}


def test_a_validation_part_is_held_out_by_seed(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("test", 2)):
        for number in range(count):  # as Roboflow exports VOC
            picture(tmp_path / split / f"{number}_jpg.rf.0a.jpg")
            voc(tmp_path / split / f"{number}_jpg.rf.0a.xml", [("dog", (2, 3, 30, 20))])
    a, b, again = (load_boxes(tmp_path, seed=seed) for seed in (0, 1, 0))
    assert [len(part) for part in (a.train, a.val, a.test)] == [16, 4, 2]
    assert_same(a, again)
    assert [one.path for one in a.val] != [one.path for one in b.val]
    assert {one.path for one in every(a)} == {one.path for one in every(b)}


def test_coordinates_of_voc_that_count_from_0_stay(tmp_path: Path) -> None:
    voc_set(tmp_path, [("dog", (2, 3, 30, 20))])
    voc(tmp_path / "annotations" / "3.xml", [("dog", (0, 3, 30, 20))], difficult=1)
    by_stem = {Path(one.path).stem: one for one in every(load_boxes(tmp_path))}
    assert by_stem["0"].boxes.tolist() == [[2, 3, 30, 20]]
    assert by_stem["3"].boxes.tolist() == [[0, 3, 30, 20]]
    assert [by_stem[stem].ignored.tolist() for stem in "03"] == [[False], [True]]


def test_the_layout_of_yolo_as_roboflow_writes_it(tmp_path: Path) -> None:
    # next to another data set, which the literal path leads to
    picture(tmp_path / "train" / "images" / "wrong.png")
    root = tmp_path / "set"
    write(
        root / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
        "names: {0: cat, 4: dog}\n",
    )
    for split in ("train", "valid", "test"):
        for name in ("a", "b"):
            picture(root / split / "images" / f"{name}.png")
        write(root / split / "labels" / "a.txt", "4 0.5 0.5 0.5 0.2\n0 0.1 0.2 0.3 0.2 0.2 0.6\n")
    data = load_boxes(root)
    assert data.classes == ["cat", "dog"]
    assert [len(part) for part in (data.train, data.val, data.test)] == [2, 2, 2]
    labelled, background = data.train
    np.testing.assert_allclose(labelled.boxes, [[10, 12, 30, 18], [4, 6, 12, 18]], rtol=1e-6)
    assert labelled.labels.tolist() == [1, 0]  # the second is a polygon
    assert background.boxes.shape == (0, 4)
    assert data.reading.counts == {"image without boxes, kept as background": 3}
    assert_same(data, load_boxes(root / "data.yaml"))


def test_lists_of_yolo(tmp_path: Path) -> None:
    write(tmp_path / "my.yaml", "path: /gone\ntrain: train.txt\ntest: [test.txt]\nnames: [cat]\n")
    write(tmp_path / "train.txt", "./images/0.png\nimages\\1.png\n/gone/2.png\n")
    write(tmp_path / "test.txt", "images/3.png\nimages/4.png\n")
    for number in range(4):
        picture(tmp_path / "images" / f"{number}.png")
        write(tmp_path / "labels" / f"{number}.txt", "0 0.5 0.5 0.5 0.2\n")
    data = load_boxes(tmp_path)
    assert sorted(Path(one.path).stem for one in (*data.train, *data.val)) == ["0", "1", "2"]
    assert [Path(one.path).stem for one in data.test] == ["3"]
    assert list(data.reading.counts.values()) == [1]  # the image 4


def test_folders_of_yolo_labels_and_of_coco_files_as_annotations(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / "images" / "deep" / f"{number}.png")
        write(tmp_path / "labels" / f"{number}.txt", f"{3 * (number % 2)} 0.5 0.5 0.5 0.2\n")
    data = load_boxes(tmp_path / "images", tmp_path / "labels")
    assert data.classes == ["0", "3"]
    assert {tuple(one.labels) for one in every(data)} == {(0,), (1,)}
    write(tmp_path / "labels" / "classes.txt", "a\nb\nc\nd\n")
    assert load_boxes(tmp_path / "images", tmp_path / "labels").classes == ["a", "b", "c", "d"]
    for number, split in enumerate(("train", "val", "test")):
        coco(tmp_path / "j" / f"my_{split}.json", [f"{number}.png"], [(0, 3, (1, 1, 5, 5))])
    data = load_boxes(tmp_path / "images", tmp_path / "j")
    assert [Path(one.path).stem for one in every(data)] == ["0", "1", "2"]


# Invalid annotations


def test_every_kind_of_invalid_box_is_counted_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes: list[tuple[int, int, Any]] = [
        (0, 3, (1, 2, 3, 4)), (0, 3, (1, 2, 3, 4)), (0, 7, (1, 2, 3, 4)),  # 2nd: a duplicate
        (0, 3, (5, 5, 0, 9)), (0, 3, (5, 5, 9, 0)),
        (0, 3, (20, 20, -10, -5)),
        (0, 3, (float("nan"), 1, 2, 3)), (0, 3, (1, 1, float("inf"), 3)),
        (0, 3, (WIDTH, 5, 9, 9)), (0, 3, (-9, 5, 9, 9)),
        (0, 3, (-2, 25, 12, 50)),
        (0, 99, (1, 1, 5, 5)), (0, 3, (1, 1, 5)), (0, 3, "no"), (50, 3, (1, 1, 5, 5)),
    ]  # fmt: skip
    names = [f"{number}.png" for number in range(4)]
    coco(tmp_path / "train.json", names, boxes)
    coco(tmp_path / "val.json", ["4.png"], [(0, 3, (1, 1, 5, 5))])
    for name in (*names, "4.png"):
        picture(tmp_path / name)
    with caplog.at_level(logging.INFO):
        data = load_boxes(tmp_path, complete=False)
    one = data.train[0]
    assert one.boxes.tolist() == [[1, 2, 4, 6], [1, 2, 4, 6], [10, 15, 20, 20], [0, 25, 10, 30]]
    assert one.labels.tolist() == [0, 1, 0, 0]
    assert data.reading.counts == {
        "box not readable, left out": 2,
        "box of an image not listed, left out": 1,
        "box of an unknown class, left out": 1,
        "box not finite, left out": 2,
        "box with swapped corners, corrected": 1,
        "box without area, left out": 2,
        "box outside the image, left out": 2,
        "box past the edge of the image, clipped": 1,
        "box given twice, left out": 1,
        "image without boxes, kept as background": 3,
    }
    lines = [(line.levelname, line.getMessage()) for line in caplog.records]
    assert len(lines) == len(data.reading.counts)
    assert ("WARNING", f"2 boxes without area, left out, the first in {one.path}") in lines
    background = f"3 images without boxes, kept as background, the first in {tmp_path / '1.png'}"
    assert ("INFO", background) in lines


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_annotated_before_the_exif_rotation_are_rotated(
    orientation: int, tmp_path: Path
) -> None:
    """The box is at the white box of the image as it is read."""
    voc_set(tmp_path, [("dog", (6, 11, 15, 14))])
    path = picture(tmp_path / "images" / "0.jpg", orientation)
    (tmp_path / "images" / "0.png").unlink()
    if orientation in (
        2,
        3,
        4,
    ):  # the size is the same either way: boxes refer to the rotated image
        mirrored = {2: (26, 11, 35, 14), 3: (26, 17, 35, 20), 4: (6, 17, 15, 20)}[orientation]
        voc(tmp_path / "annotations" / "0.xml", [("dog", mirrored)])
    data = load_boxes(tmp_path)
    (one,) = [one for one in every(data) if one.path == str(path)]
    image = read_image(path)
    assert one.size == image.shape[:2]
    x1, y1, x2, y2 = one.boxes[0].astype(int)
    assert image[y1:y2, x1:x2].min() > 128
    assert (x2 - x1) * (y2 - y1) == 40 == np.count_nonzero(image[..., 0] > 128)
    rotated = data.reading.counts.get("image annotated before its EXIF rotation, boxes rotated", 0)
    assert rotated == (orientation >= 5)


@pytest.mark.parametrize("orientation", range(1, 5))
def test_boxes_stay_where_the_size_is_swapped_and_the_image_is_not_on_its_side(
    orientation: int, tmp_path: Path
) -> None:
    voc_set(tmp_path, [("dog", (0, 2, 20, 14))], size=(WIDTH, HEIGHT))
    for number in range(6):
        picture(tmp_path / "images" / f"{number}.png", orientation)
    data = load_boxes(tmp_path)
    assert all(one.boxes.tolist() == [[0, 2, 20, 14]] for one in every(data))
    assert data.reading.counts == {"size with height and width swapped, read from the image": 6}


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "gif", "bmp"])
def test_sizes_are_those_of_the_decoded_image(suffix: str, tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "images" / f"{number}.{suffix}", 6)
        write(tmp_path / "labels" / f"{number}.txt", "0 0.5 0.5 0.5 0.2\n")
    data = load_boxes(tmp_path / "images", tmp_path / "labels")
    assert [one.size for one in every(data)] == [
        read_image(one.path).shape[:2] for one in every(data)
    ]


@pytest.mark.parametrize(
    ("size", "box", "repair"),
    [
        ((0, 0), (0, 2, 20, 14), "size not given, read from the image"),
        ((60, 80), (0, 1, 10, 7), "image annotated at another size, boxes scaled"),
        ((40, 30), (0, 2, 20, 14), "size with height and width swapped, read from the image"),
    ],
)
def test_an_annotated_size_that_differs_from_the_image(
    size: tuple[int, int], box: Sequence[float], repair: str, tmp_path: Path
) -> None:
    data = load_boxes(voc_set(tmp_path, [("dog", (0, 2, 20, 14))], size=size))
    assert all(
        one.size == (HEIGHT, WIDTH) and one.boxes.tolist() == [list(box)] for one in every(data)
    )
    assert data.reading.counts == {repair: 6}


def test_damaged_and_missing_files_are_left_out(tmp_path: Path) -> None:
    voc_set(tmp_path, [("dog", (2, 3, 30, 20)), ("dog", (5, 5, 5, 9))], count=8)
    xml = tmp_path / "annotations"
    (xml / "0.xml").write_text("<annotation><object>")
    (xml / "1.xml").write_text("<svg/>")
    (tmp_path / "images" / "2.png").unlink()
    (tmp_path / "images" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "images" / "4.png").rename(tmp_path / "images" / "renamed.png")
    voc(xml / "4.xml", [("dog", (2, 3, 30, "x"))], filename="C:\\x\\renamed.png")  # type: ignore[list-item]
    voc(xml / "more" / "5.xml", [("cat", (1, 1, 9, 9))])
    data = load_boxes(tmp_path)
    remaining = {Path(one.path).stem: len(one.boxes) for one in every(data)}
    assert remaining == {"5": 2, "6": 1, "7": 1, "renamed": 0}
    assert data.classes == ["cat", "dog"]
    assert data.reading.counts == {
        "file not readable, left out with the image": 2,
        "image missing, or not the only one of its name, left out": 1,
        "image not readable, left out": 1,
        "annotation of an image that has one already, merged": 1,
        "box not readable, left out": 1,
        "box without area, left out": 4,
        "image without boxes, kept as background": 1,
    }


def test_damaged_lines_of_yolo_are_left_out(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "images" / f"{number}.png")
    good = "0 0.5 0.5 0.5 0.2"
    bad = ["0 0.5 0.5", "cat 0.5 0.5 0.5 0.2", "0 0.5 0.5 0.5 0.2 0.9", "-1 0.5 0.5 0.5 0.2",
           "0.5 0.5 0.5 0.5 0.2", "nan 0.5 0.5 0.5 0.2"]  # fmt: skip
    for number in range(2):
        write(tmp_path / "labels" / f"{number}.txt", "\n".join([*bad, "", good]))
    (tmp_path / "labels" / "2.txt").write_bytes(b"\xff\xfe\x00")
    picture(tmp_path / "images" / "3.png")
    write(tmp_path / "labels" / "3.txt", f"{good}\n1 0.5 0.5 0.5 0.2")
    write(tmp_path / "labels" / "classes.txt", "cat\n")
    data = load_boxes(tmp_path / "images", tmp_path / "labels")
    assert {Path(one.path).stem: len(one.boxes) for one in every(data)} == {"0": 1, "1": 1, "3": 1}
    assert data.reading.counts == {
        "line not readable, left out": 12,
        "file not readable, left out with the image": 1,
        "box of an unknown class, left out": 1,
    }


def test_test_images_are_not_trained_on(tmp_path: Path) -> None:
    voc_set(tmp_path, [("dog", (2, 3, 30, 20))])
    for name, members in (("train", "0 1 2 3"), ("val", "1 4"), ("test", "2 4 5")):
        write(tmp_path / "ImageSets" / "Main" / f"{name}.txt", members.replace(" ", "\n"))
    data = load_boxes(tmp_path)
    parts = (data.train, data.val, data.test)
    assert [[int(Path(one.path).stem) for one in part] for part in parts] == [
        [0, 3],
        [1],
        [2, 4, 5],
    ]
    assert data.reading.counts == {"image of two splits, left out of the first": 3}


def test_a_class_without_training_boxes_is_kept_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split, kind in (("train", "cat"), ("val", "dog"), ("test", "cat")):
        picture(tmp_path / split / f"{split}.png")
        voc(tmp_path / split / f"{split}.xml", [(kind, (2, 3, 30, 20))])
    assert load_boxes(tmp_path).classes == ["cat", "dog"]
    assert "the class dog has boxes in val, but none in train" in caplog.text


# Writing and subsampling


def test_written_data_is_read_back_unchanged(tmp_path: Path) -> None:
    for number in range(9):
        picture(tmp_path / "images" / f"{number}.jpg", orientation=number % 9)
        text = f"3 0.51 0.47 0.{number}1 0.23\n" if number else ""
        write(tmp_path / "labels" / f"{number}.txt", text)
    for number in range(6):
        picture(tmp_path / "other" / f"{number}.png")
    for data in (
        load_boxes(tmp_path / "images", tmp_path / "labels"),
        load_boxes(tmp_path / "other", write(tmp_path / "x" / "a.json", json.dumps({
            "images": [{"id": i, "file_name": f"{i}.png"} for i in range(6)],
            "annotations": [{"image_id": i, "category_id": 2, "iscrowd": i % 2,
                             "bbox": [0.1 + i, 1 / 3, 10.7, 11.9]} for i in range(6)]
            + [{"image_id": i, "category_id": "2", "bbox": [3, 4, 5, 6]} for i in range(6)],
            "categories": [{"id": 2, "name": "dog"}, {"id": 5, "name": "never seen"}],
        }))),
    ):  # fmt: skip
        data.write(tmp_path / "run" / "boxes")
        crowded = {Path(one.path).stem for one in every(data) if one.ignored.any()}
        assert crowded == ({"1", "3", "5"} if data.classes == ["dog", "never seen"] else set())
        assert_same(data, load_boxes(tmp_path / "run" / "boxes"))


def test_other_boxes_are_another_data_set(tmp_path: Path) -> None:
    def identity(name: str, right: int) -> list[str]:
        return load_boxes(voc_set(tmp_path, [(name, (2, 3, right, 20))], count=6)).identity()

    assert identity("dog", 30) == identity("dog", 30)
    assert identity("dog", 30) != identity("dog", 31)


def test_a_subsample_is_part_of_a_larger_one(tmp_path: Path) -> None:
    data = load_boxes(voc_set(tmp_path, [("dog", (2, 3, 30, 20))], count=40))
    small, large = (data.subsample(share, None, 3) for share in (0.25, 0.5))
    assert [len(part) for part in (small.train, small.val, small.test)] == [6, 2, 8]
    assert [len(part) for part in (large.train, large.val, large.test)] == [12, 4, 8]
    assert {one.path for one in small.train} < {one.path for one in large.train}
    assert_same(data.subsample(None, None, 3), data)
    with pytest.raises(UserError, match=r"--fraction 1.5 is not a share"):
        data.subsample(1.5, None, 3)


# User errors


def refusal(*given: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load_boxes(*given, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_sources_and_annotations(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert "does not exist" in refusal(tmp_path / "gone")
    assert "does not exist" in refusal(tmp_path, tmp_path / "gone")
    message = refusal(tmp_path)
    assert all(word in message for word in ("COCO", "VOC", "YOLO", "data.yaml", "--annotations"))
    assert "holds no boxes in a known format, but 1 .png" in refusal(tmp_path, tmp_path)
    assert "give a folder, a .json (COCO), .yaml (YOLO)" in refusal(tmp_path / "a.png")


def test_files_in_another_format(tmp_path: Path) -> None:
    file = write(tmp_path / "notes.json", '{"images": [], "annotations": {}}')
    assert "notes.json is not in COCO's format: it has no list 'annotations'" in refusal(tmp_path)
    file.write_text("[1, 2]")
    assert "no list 'images'" in refusal(file)
    file.write_text("{")
    assert "notes.json is not JSON that can be read" in refusal(tmp_path)
    other = write(tmp_path / "a.yaml", "lr: 3")
    assert "a.yaml is not YOLO's data.yaml" in refusal(other)
    other.write_text("names: [a\nb: {")
    assert "a.yaml is not YAML that can be read" in refusal(other)
    other.write_text("names: [a]\ntrain: nowhere")
    assert "a.yaml names nowhere for train, which does not exist" in refusal(other)


def test_two_formats(tmp_path: Path) -> None:
    voc_set(tmp_path, [("dog", (2, 3, 30, 20))])
    write(tmp_path / "notes.json", '{"by": "me"}')
    load_boxes(tmp_path)  # an unrelated JSON file is not a second format
    coco(tmp_path / "notes.json", ["1.png"], [(0, 3, (1, 1, 5, 5))])
    message = refusal(tmp_path)
    assert "COCO and Pascal VOC" in message
    assert "--annotations" in message
    for name, members in (("train", "0\n1"), ("test", "2")):
        write(tmp_path / "ImageSets" / "Main" / f"{name}.txt", members)
    assert load_boxes(tmp_path).classes == ["dog"]  # the only one with splits


def test_without_a_test_part_the_validation_part_becomes_it(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / split / f"{split}.png")
        coco(tmp_path / f"{split}.json", [f"{split}.png"], [(0, 3, (1, 1, 5, 5))])
    assert [Path(one.path).name for one in load_boxes(tmp_path).test] == ["val.png"]
    assert load_boxes(tmp_path, complete=False).test == []
    (tmp_path / "train" / "train.png").unlink()
    assert "no training images, only val" in refusal(tmp_path)
    assert len(load_boxes(tmp_path, complete=False).val) == 1


def test_nothing_to_train_on(tmp_path: Path) -> None:
    voc_set(tmp_path, [("dog", (2, 3, 30, 20))], difficult=1)
    assert "has no boxes to train on" in refusal(tmp_path)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    assert "none of the 6 images in its annotations exists" in refusal(tmp_path)
    voc_set(tmp_path / "two", [("dog", (2, 3, 30, 20))], count=2)
    assert "2 images, too few to train, validate and test" in refusal(tmp_path / "two")


def test_folders_name_the_parts_of_one_coco_file(tmp_path: Path) -> None:
    names = [f"{part}/{number}.png" for part in ("train", "val", "test") for number in range(2)]
    for name in names:
        picture(tmp_path / name)
    coco(tmp_path / "annotations.json", names, [(i, 3, (1, 1, 5, 5)) for i in range(len(names))])
    data = load_boxes(tmp_path)
    for part in ("train", "val", "test"):
        assert {Path(one.path).parent.name for one in data.part(part)} == {part}


def test_folders_name_the_parts_of_a_table_of_boxes(tmp_path: Path) -> None:
    names = [f"{part}/{number}.png" for part in ("train", "val", "test") for number in range(2)]
    for name in names:
        picture(tmp_path / name)
    rows = "".join(f"{name},1,1,20,20,dog\n" for name in names)
    write(tmp_path / "boxes.csv", f"path,xmin,ymin,xmax,ymax,label\n{rows}")
    data = load_boxes(tmp_path)
    assert [len(data.part(part)) for part in ("train", "val", "test")] == [2, 2, 2]


def test_a_fold_needs_a_table(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / f"{number}.png")
    coco(tmp_path / "a.json", [f"{n}.png" for n in range(6)], [(0, 3, (1, 1, 5, 5))])
    with pytest.raises(UserError, match="--test_fold 1 is for a table with a column fold, and"):
        load_boxes(tmp_path, options=SourceOptions(test_fold="1"))


def test_turned_shapes_of_cvat_get_the_box_around_them(tmp_path: Path) -> None:
    shapes = (
        '<box label="dog" xtl="10" ytl="12" xbr="30" ybr="16" rotation="90"/>'
        '<box label="dog" xtl="16" ytl="10" xbr="24" ybr="18" rotation="45"/>'
        '<ellipse label="dog" cx="20" cy="14" rx="8" ry="2" rotation="90"/>'
        '<ellipse label="dog" cx="20" cy="14" rx="5" ry="5" rotation="30"/>'
    )
    picture(tmp_path / "0.png")
    image = f'<image name="0.png" width="{WIDTH}" height="{HEIGHT}">{shapes}</image>'
    write(tmp_path / "annotations.xml", f"<annotations>{image}</annotations>")
    (one,) = every(load_boxes(tmp_path, complete=False))
    half = 4 * 2**0.5
    expected = [
        [18, 4, 22, 24], [20 - half, 14 - half, 20 + half, 14 + half], [18, 6, 22, 22],
        [15, 9, 25, 19],
    ]  # fmt: skip
    np.testing.assert_allclose(one.boxes, expected, rtol=1e-5)
