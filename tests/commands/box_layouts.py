"""Layouts of detection data, each built small; see ``layouts``."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.commands.layouts import Layout, write_image, write_text

SIZE = 40  # height and width of an image in pixels

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]

# Of each image, a cat at 4, 8, 20, 24 (x1, y1, x2, y2) or a dog.
BOX = (4, 8, 20, 24)


def number_of(name: str) -> int:
    return int(Path(name).stem)


def label_of(name: str) -> str:
    return ("cat", "dog")[number_of(name) % 2]


def pictures(folder: Path, count: int = 10) -> list[str]:
    """Write numbered images; return their names."""
    return [write_image(folder / f"{number}.jpg", SIZE).name for number in range(count)]


def coco(file: Path, names: Sequence[str], **keys: Any) -> None:
    """Write a COCO file with a box for each image."""
    box = {"bbox": [4, 8, 16, 16], "area": 256, "iscrowd": 0}
    content = {
        "images": [
            {"id": number, "file_name": name, "height": SIZE, "width": SIZE}
            for number, name in enumerate(names)
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1 + (label_of(name) == "dog"), **box}
            for n, name in enumerate(names)
        ],
        "categories": CATEGORIES,
    }
    for key, value in keys.items():
        if key in content:
            content[key] = value
        else:
            for one in content["annotations"]:
                one |= {"bbox": [], key: value}
    write_text(file, json.dumps(content))


def _coco2017(folder: Path) -> None:
    for part in ("train2017", "val2017"):
        coco(folder / f"annotations/instances_{part}.json", pictures(folder / part))
        write_text(folder / f"annotations/captions_{part}.json", "{}")


def _one_file(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: coco(folder / "annotations.json", pictures(folder / "images"), **keys)


def _roboflow_coco(folder: Path) -> None:
    dummy = {"id": 0, "name": "pets", "supercategory": "none"}
    categories = [dummy, *({**one, "supercategory": "pets"} for one in CATEGORIES)]
    for part in ("train", "valid", "test"):
        coco(
            folder / part / "_annotations.coco.json", pictures(folder / part), categories=categories
        )


def voc(file: Path, name: str) -> None:
    """Write a VOC file with a box."""
    corners = "".join(
        f"<{key}>{value}</{key}>"
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (5, 9, 20, 24), strict=True)
    )
    write_text(
        file,
        f"<annotation><filename>{name}</filename><size><width>{SIZE}</width><height>{SIZE}"
        f"</height></size><object><name>{label_of(name)}</name><bndbox>{corners}</bndbox></object>"
        "</annotation>",
    )


def _voc(sets: Mapping[str, Sequence[int]], root: str = "") -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for name in pictures(folder / root / "JPEGImages"):
            voc(folder / root / "Annotations" / f"{number_of(name)}.xml", name)
        for part, numbers in sets.items():
            write_text(folder / root / f"ImageSets/Main/{part}.txt", *map(str, numbers))

    return build


def _voc_parts(folder: Path) -> None:
    for part in ("Train", "Valid"):
        for name in pictures(folder / part):
            voc(folder / part / f"{number_of(name)}.xml", name)


def yolo(folder: Path, names: Sequence[str]) -> None:
    """Write a label file for each image."""
    for name in names:
        kind = int(label_of(name) == "dog")
        write_text(folder / f"{number_of(name)}.txt", f"{kind} 0.3 0.4 0.4 0.4")


def _yolo_parts(folder: Path, *parts: str, inner: bool = True) -> None:
    for part in parts:
        images, labels = (
            (f"{part}/images", f"{part}/labels") if inner else (f"images/{part}", f"labels/{part}")
        )
        yolo(folder / labels, pictures(folder / images))


def _roboflow_yolo(folder: Path) -> None:
    _yolo_parts(folder, "train", "valid", "test")
    write_text(
        folder / "data.yaml",
        *("train: ../train/images", "val: ../valid/images", "test: ../test/images"),
        *("nc: 2", "names: ['cat', 'dog']"),
    )


def _ultralytics(folder: Path) -> None:
    _yolo_parts(folder, "train", "val", inner=False)
    write_text(
        folder / "pets.yaml",
        *("path: ../datasets/pets", "train: images/train", "val: images/val"),
        *("names:", "  0: cat", "  1: dog"),
    )


def _yolo_lists(folder: Path) -> None:
    yolo(folder / "labels", pictures(folder / "images"))
    write_text(folder / "train.txt", *(f"./images/{n}.jpg" for n in range(6)))
    write_text(folder / "val.txt", *(f"./images/{n}.jpg" for n in range(6, 10)))
    write_text(folder / "pets.names", "cat", "dog")
    write_text(folder / "data.yaml", "train: train.txt", "val: val.txt", "names: pets.names")


def _label_studio(folder: Path) -> None:
    yolo(folder / "labels", pictures(folder / "images"))
    write_text(folder / "classes.txt", "cat", "dog")
    write_text(folder / "notes.json", '{"categories": [], "info": {"contributor": "Label Studio"}}')


def _labelimg(folder: Path) -> None:
    yolo(folder, pictures(folder))
    write_text(folder / "classes.txt", "cat", "dog")


def _cvat_yolo(folder: Path) -> None:
    yolo(folder / "obj_train_data", pictures(folder / "obj_train_data"))
    write_text(
        folder / "obj.data", "classes = 2", "train = data/train.txt", "names = data/obj.names"
    )
    write_text(folder / "obj.names", "cat", "dog")
    write_text(folder / "train.txt", *(f"data/obj_train_data/{n}.jpg" for n in range(10)))


def _no_names(folder: Path) -> None:
    _yolo_parts(folder, "train", "val", inner=False)


def _labelme(folder: Path) -> None:
    shapes: dict[str, Any] = {
        "rectangle": [[4, 8], [20, 24]],
        "polygon": [[4, 8], [20, 8], [12, 24]],
        "circle": [[12, 16], [20, 16]],
    }
    for name in pictures(folder):
        kind = list(shapes)[number_of(name) % 3]
        shape = {"label": label_of(name), "shape_type": kind, "points": shapes[kind]}
        content = {"shapes": [shape], "imagePath": name, "imageHeight": SIZE, "imageWidth": SIZE}
        write_text(folder / f"{number_of(name)}.json", json.dumps(content))


def _cvat(folder: Path) -> None:
    shapes = (
        '<box label="{}" xtl="4" ytl="8" xbr="20" ybr="24"/>',
        '<polygon label="{}" points="4,8;20,8;12,24"/>',
        '<ellipse label="{}" cx="12" cy="16" rx="8" ry="8"/>',
    )
    images = [
        f'<image id="{n}" name="{name}" width="{SIZE}" height="{SIZE}">'
        f"{shapes[n % 3].format(label_of(name))}</image>"
        for n, name in enumerate(pictures(folder / "images"))
    ]
    write_text(folder / "annotations.xml", "<annotations>", *images, "</annotations>")


def _roboflow_csv(folder: Path) -> None:
    for part in ("train", "valid", "test"):
        rows = [f"{n},{SIZE},{SIZE},{label_of(n)},4,8,20,24" for n in pictures(folder / part)]
        header = "filename,width,height,class,xmin,ymin,xmax,ymax"
        write_text(folder / part / "_annotations.csv", header, *rows)


def _retinanet(folder: Path) -> None:
    rows = [f"images/{n},4,8,20,24,{label_of(n)}" for n in pictures(folder / "images")]
    write_text(folder / "boxes.csv", *rows[:-1], "images/9.jpg,,,,,")


def _wheat(folder: Path) -> None:
    names = pictures(folder / "train")
    rows = [f'{number_of(n)},{SIZE},{SIZE},"[4.0, 8.0, 16.0, 16.0]",{label_of(n)}' for n in names]
    write_text(folder / "train.csv", "image_id,width,height,bbox,class", *rows)


def _open_images(folder: Path) -> None:
    kinds = {"cat": "/m/01yrx", "dog": "/m/0bt9lr"}
    for part in ("train", "validation"):
        rows = [
            f"{number_of(n)},xclick,{kinds[label_of(n)]},1,0.1,0.5,0.2,0.6"
            for n in pictures(folder / part)
        ]
        header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax"
        write_text(folder / f"{part}-annotations-bbox.csv", header, *rows)
    names = (f"{code},{name}" for name, code in kinds.items())
    write_text(folder / "class-descriptions-boxable.csv", *names)


def _objects(folder: Path) -> None:
    rows = [
        json.dumps(
            {"file_name": n, "objects": {"bbox": [[4, 8, 16, 16]], "categories": [label_of(n)]}}
        )
        for n in pictures(folder / "train")
    ]
    write_text(folder / "train/metadata.jsonl", *rows)


def _detection(
    name: str,
    build: Callable[[Path], None],
    images: tuple[int, int, int],
    **more: Any,
) -> Layout:
    return Layout(name, build, images, task="detection", **more)


POLYGON = [[4, 8, 20, 8, 20, 24, 4, 24]]
RUNS = {"size": [SIZE, SIZE], "counts": [4 * SIZE + 8, 16, 15 * SIZE - 16, 16, 0]}
SETS = {"train": range(6), "val": range(6, 10)}

SPLIT = (6, 2, 2)
TRAIN_VAL = (8, 2, 10)  # of ten images each

DETECTION = [
    _detection("COCO 2017", _coco2017, TRAIN_VAL, says=("instances_train2017.json",)),
    _detection("COCO, one file", _one_file(), SPLIT),
    _detection("COCO, the file itself", _one_file(), SPLIT, data="annotations.json"),
    _detection(
        "COCO, images elsewhere",
        _one_file(),
        SPLIT,
        data="images",
        options=("--annotations", "annotations.json"),
    ),
    _detection("COCO with polygons alone", _one_file(segmentation=POLYGON), SPLIT),
    _detection("COCO with run lengths alone", _one_file(segmentation=RUNS), SPLIT),
    _detection(
        "COCO of Roboflow",
        _roboflow_coco,
        (10, 10, 10),
        says=("category of others without boxes: pets",),
    ),
    _detection(
        "Pascal VOC with `ImageSets`",
        _voc({"train": range(4), "val": range(4, 7), "test": range(7, 10)}),
        (4, 3, 3),
    ),
    _detection("Pascal VOC, train and val", _voc({**SETS, "trainval": range(10)}), (5, 1, 4)),
    _detection("Pascal VOC without `ImageSets`", _voc({}), SPLIT),
    _detection("Pascal VOC below `VOCdevkit/VOC2012`", _voc(SETS, "VOCdevkit/VOC2012"), (5, 1, 4)),
    _detection("Pascal VOC in folders of parts", _voc_parts, TRAIN_VAL),
    _detection("YOLO of Roboflow", _roboflow_yolo, (10, 10, 10)),
    _detection("YOLO of ultralytics", _ultralytics, TRAIN_VAL),
    _detection("YOLO, the yaml file itself", _ultralytics, TRAIN_VAL, data="pets.yaml"),
    _detection("YOLO with lists of images", _yolo_lists, (5, 1, 4)),
    _detection("YOLO of Label Studio", _label_studio, SPLIT, says=("names in classes.txt",)),
    _detection("YOLO of labelImg", _labelimg, SPLIT),
    _detection("YOLO of CVAT", _cvat_yolo, SPLIT),
    _detection(
        "YOLO without a yaml file",
        _no_names,
        TRAIN_VAL,
        classes="0 1",
        says=("has no classes.txt",),
    ),
    _detection("LabelMe", _labelme, SPLIT),
    _detection("CVAT", _cvat, SPLIT),
    _detection("table of boxes of Roboflow", _roboflow_csv, (10, 10, 10)),
    _detection(
        "table of boxes without a header", _retinanet, SPLIT, says=("1 image without boxes",)
    ),
    _detection("table of boxes as lists", _wheat, SPLIT),
    _detection("OpenImages", _open_images, TRAIN_VAL),
    _detection("`metadata.jsonl` with `objects`", _objects, SPLIT),
]
