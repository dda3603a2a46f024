"""Layouts of segmentation data, each built small; see ``layouts``."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.commands.box_layouts import POLYGON, RUNS, SIZE, coco, pictures
from tests.commands.layouts import Counts, Layout, write_image, write_text

COUNT = 10  # images of each part

RED, GREEN, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 0)


def _mask(file: Path, *values: int | tuple[int, int, int]) -> None:
    """Write a mask of stripes of these values or colors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    row = np.array(values, np.uint8).repeat(SIZE // len(values) + 1, axis=0)[:SIZE]
    Image.fromarray(np.stack([row] * SIZE)).save(file)


def _pairs(
    image: str,
    mask: str,
    parts: Sequence[str] = ("",),
    values: Sequence[int | tuple[int, int, int]] = (0, 1, 2),
    **texts: str,
) -> Callable[[Path], None]:
    """Images and masks of these paths, in which ``@`` stands for the part and ``#`` for a number.

    Args:
        image: Path of an image.
        mask: Path of a mask.
        parts: Names of parts.
        values: Values or colors of the stripes of each mask.
        texts: Further files by name, with ``_`` before the suffix instead of a dot.
    """

    def build(folder: Path) -> None:
        for part in parts:
            for number in range(COUNT):
                one, other = (
                    folder / path.replace("@", part).replace("#", str(number))
                    for path in (image, mask)
                )
                write_image(one, SIZE)
                _mask(other, *values)
        for name, text in texts.items():
            stem, _, suffix = name.rpartition("_")
            write_text(folder / f"{stem}.{suffix}", *text.split("\n"))

    return build


def _voc(folder: Path) -> None:
    root = folder / "VOCdevkit" / "VOC2012"
    _pairs("JPEGImages/#.jpg", "SegmentationClass/#.png")(root)
    for part, numbers in (("train", range(6)), ("val", range(6, 9))):
        write_text(root / "ImageSets/Segmentation" / f"{part}.txt", *map(str, numbers))


def _nuclei(folder: Path) -> None:
    for number in range(COUNT):
        root = folder / "stage1_train" / str(number)
        write_image(root / "images" / f"{number}.png", SIZE)
        for cell in range(2):
            _mask(
                root / "masks" / f"{100 + cell}.png", *(255 if n == cell else 0 for n in range(4))
            )


def _table(folder: Path) -> None:
    _pairs("images/#.jpg", "drawn/mask_#.png")(folder)
    rows = [f"images/{n}.jpg,drawn/mask_{n}.png" for n in range(COUNT)]
    write_text(folder / "pairs.csv", "image,mask", *rows)


def _yolo(folder: Path) -> None:
    points = " ".join(str(value / SIZE) for value in POLYGON[0])
    for name in pictures(folder / "images"):
        stem = Path(name).stem
        write_text(folder / "labels" / f"{stem}.txt", f"{int(stem) % 2} {points}")
    write_text(folder / "data.yaml", "names: [cat, dog]")


def _labelme(folder: Path) -> None:
    points = np.reshape(POLYGON[0], (-1, 2)).tolist()
    for name in pictures(folder):
        label = ("cat", "dog")[int(Path(name).stem) % 2]
        shapes = [{"label": label, "points": points, "shape_type": "polygon"}]
        content = {"imagePath": name, "imageHeight": SIZE, "imageWidth": SIZE, "shapes": shapes}
        write_text((folder / name).with_suffix(".json"), json.dumps(content))


def _coco(**keys: object) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        coco(folder / "annotations.json", pictures(folder / "images"), **keys)

    return build


def _segmentation(
    name: str,
    build: Callable[[Path], None],
    images: Counts,
    classes: str = "0 1 2",
    data: str = "",
    options: tuple[str, ...] = (),
    says: tuple[str, ...] = (),
) -> Layout:
    return Layout(name, build, images, classes, data, options, "segmentation", says)


SPLIT = (6, 2, 2)
TRAIN_VAL = (8, 2, 10)
ALL = ("train", "val", "test")
OBJECTS = "background cat dog"
SHAPES = ("--task", "segmentation")

SEGMENTATION = [
    _segmentation("`images/` and `masks/`", _pairs("images/#.jpg", "masks/#.png"), SPLIT),
    _segmentation(
        "parts below `images/` and `masks/`",
        _pairs("images/@/#.jpg", "masks/@/#.png", ALL),
        (COUNT, COUNT, COUNT),
    ),
    _segmentation(
        "`images/` and `masks/` below parts",
        _pairs("@/images/#.jpg", "@/masks/#_mask.png", ("Training", "Testing")),
        TRAIN_VAL,
    ),
    _segmentation(
        "the folder of the images", _pairs("images/#.jpg", "masks/#.png"), SPLIT, data="images"
    ),
    _segmentation(
        "masks elsewhere",
        _pairs("photos/#.jpg", "drawn/#.png"),
        SPLIT,
        data="photos",
        options=("--annotations", "drawn"),
    ),
    _segmentation("masks beside the images", _pairs("#.jpg", "#_mask.png"), SPLIT),
    _segmentation("CamVid", _pairs("@/#.png", "@_labels/#_L.png", ("train", "val")), TRAIN_VAL),
    _segmentation(
        "ADE20K",
        _pairs("images/@/ADE_#.jpg", "annotations/@/ADE_#.png", ("training", "validation")),
        TRAIN_VAL,
    ),
    _segmentation(
        "MMSegmentation", _pairs("img_dir/@/#.jpg", "ann_dir/@/#.png", ("train", "val")), TRAIN_VAL
    ),
    _segmentation(
        "Cityscapes",
        _pairs(
            "leftImg8bit/@/ulm/ulm_#_leftImg8bit.png",
            "gtFine/@/ulm/ulm_#_gtFine_labelIds.png",
            ("train", "val"),
        ),
        TRAIN_VAL,
    ),
    _segmentation("Pascal VOC for segmentation", _voc, (5, 1, 3)),
    _segmentation("several masks per image (nuclei)", _nuclei, SPLIT, "background foreground"),
    _segmentation(
        "black and white masks",
        _pairs("images/#.jpg", "gt/#.png", values=(0, 255)),
        SPLIT,
        "background foreground",
    ),
    _segmentation(
        "gray levels",
        _pairs("images/#.jpg", "labels/#.png", values=(0, 127, 255)),
        SPLIT,
        "0 127 255",
        says=("gray levels",),
    ),
    _segmentation(
        "colors with `class_dict.csv`",
        _pairs(
            "images/#.jpg",
            "masks/#.png",
            values=(RED, BLACK, GREEN),
            class_dict_csv="name,r,g,b\nsky,0,0,0\nroad,255,0,0\ntree,0,255,0",
        ),
        SPLIT,
        "road sky tree",
    ),
    _segmentation(
        "colors with `labelmap.txt` (CVAT)",
        _pairs(
            "JPEGImages/#.jpg",
            "SegmentationClass/#.png",
            values=(RED, BLACK, GREEN),
            labelmap_txt="# label:color_rgb\nsky:0,0,0::\nroad:255,0,0::\ntree:0,255,0::",
        ),
        SPLIT,
        "road sky tree",
    ),
    _segmentation(
        "colors alone",
        _pairs("images/#.jpg", "masks/#.png", values=(BLACK, RED, GREEN)),
        SPLIT,
        "#00ff00 #ff0000 background",
        says=("Each color in the masks is made a class",),
    ),
    _segmentation("table of masks", _table, SPLIT, data="pairs.csv"),
    _segmentation("polygons of COCO", _coco(segmentation=POLYGON), SPLIT, OBJECTS, options=SHAPES),
    _segmentation("run lengths of COCO", _coco(segmentation=RUNS), SPLIT, OBJECTS, options=SHAPES),
    _segmentation("polygons of YOLO", _yolo, SPLIT, OBJECTS, options=SHAPES),
    _segmentation("polygons of LabelMe", _labelme, SPLIT, OBJECTS, options=SHAPES),
]
