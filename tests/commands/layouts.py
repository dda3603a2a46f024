"""Layouts of labelled data, each built small; ``docs/data.md`` lists them.

A layout is a function that writes a data set below a folder, and what ``check`` must find in it.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Counts = tuple[int, int, int]  # images for training, validation and test


def write_image(file: Path, size: int = 12) -> Path:
    """Write an image that differs from all others, as its pixels follow from its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    seed = list(str(file).encode())
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def write_images(folder: Path, counts: Mapping[str, int], ending: str = "png") -> None:
    """Write numbered images into folders."""
    for name, count in counts.items():
        for number in range(count):
            write_image(folder / name / f"{number}.{ending}")


def write_text(file: Path, *lines: str, encoding: str = "utf-8") -> Path:
    """Write lines of text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding=encoding)
    return file


@dataclass(frozen=True)
class Layout:
    """A layout, and what is read of it.

    Attributes:
        name: Name in ``docs/data.md``.
        build: Writes the data into an empty folder.
        command: Options after ``--data``, whose value follows the folder: a path below it.
        images: Images of each part.
        classes: Names of the classes, sorted.
        task: Task that ``check`` finds.
        multi_label: Whether labels per image are counted.
        says: Phrases that the output has.
    """

    name: str
    build: Callable[[Path], None]
    images: Counts
    classes: str = "cat dog"
    data: str = ""
    options: tuple[str, ...] = ()
    task: str = "classification"
    says: tuple[str, ...] = field(default=())


def _both(counts: Mapping[str, int]) -> Callable[[Path], None]:
    return lambda folder: write_images(folder, counts)


def _pairs(*parts: str, count: int = 5) -> dict[str, int]:
    return {f"{part}/{name}": count for part in parts for name in ("cat", "dog")}


def _table(*lines: str, name: str = "labels.csv") -> Callable[[Path], None]:
    """A table beside the images ``images/0.png`` to ``images/9.png``."""

    def build(folder: Path) -> None:
        write_images(folder, {"images": 10})
        write_text(folder / name, *lines)

    return build


def _rows(form: str, count: int = 10) -> list[str]:
    """Lines with the number of an image and its class."""
    names = ("cat", "dog")
    return [form.format(n=n, label=names[n % 2], other=names[1 - n % 2]) for n in range(count)]


def _imagenet(folder: Path) -> None:
    root = folder / "ILSVRC/Data/CLS-LOC"
    write_images(root, {"train/n01440764": 5, "train/n01443537": 5, "val": 4, "test": 4}, "JPEG")


def _nested(folder: Path) -> None:
    kinds = {"animal/cat": 5, "animal/dog": 5, "plant/fir": 5}
    write_images(folder, kinds)


def _names(folder: Path) -> None:
    for n in range(10):
        write_image(folder / "train" / f"{('cat', 'dog')[n % 2]}.{n}.jpg")


def _kaggle(folder: Path) -> None:
    write_images(folder, {"train_images": 10, "test_images": 4})
    write_text(folder / "train.csv", "id,breed_label,label", *_rows("{n},x,{label}"))
    write_text(folder / "sample_submission.csv", "id,label", *(f"{n},cat" for n in range(4)))


def _ham10000(folder: Path) -> None:
    for n in range(10):
        write_image(folder / f"HAM10000_images_part_{1 + n % 2}" / f"ISIC_{n}.jpg")
    lines = _rows("HAM_{n},ISIC_{n},{label},histo,{n}0.0")
    write_text(folder / "HAM10000_metadata.csv", "lesion_id,image_id,dx,dx_type,age", *lines)


def _nih(folder: Path) -> None:
    for n in range(10):
        write_image(folder / f"images_00{1 + n % 2}" / "images" / f"{n}.png")
    finding = ("cat", "dog", "cat|dog")
    lines = [f"{n}.png,{finding[n % 3]},{n}" for n in range(10)]
    write_text(folder / "Data_Entry_2017.csv", "Image Index,Finding Labels,Patient ID", *lines)


def _birds(folder: Path) -> None:
    write_images(folder, _pairs("train", "valid", "test", count=3))
    lines = [
        f"{i}.0,{part}/{name}/{n}.png,{name},{part}"
        for part in ("train", "valid", "test")
        for i, name in enumerate(("cat", "dog"))
        for n in range(3)
    ]
    write_text(folder / "birds.csv", "class id,filepaths,labels,data set", *lines)


def _metadata(folder: Path) -> None:
    for part in ("train", "validation"):
        write_images(folder, {part: 10})
        lines = _rows('{{"file_name": "{n}.png", "label": "{label}"}}')
        write_text(folder / part / "metadata.jsonl", *lines)


def _lists(folder: Path) -> None:
    write_images(folder, {"images": 10})
    write_text(folder / "meta/train.txt", *_rows("images/{n}.png {label}", 8))
    write_text(folder / "meta/val.txt", *_rows("images/{n}.png {label}")[8:])


def _food101(folder: Path) -> None:
    write_images(folder, {"images/cat": 5, "images/dog": 5})
    for part, numbers in (("train", range(3)), ("test", range(3, 5))):
        lines = (f"{name}/{n}" for name in ("cat", "dog") for n in numbers)
        write_text(folder / f"meta/{part}.txt", *lines)


def _celeba(folder: Path) -> None:
    write_images(folder, {"img_align_celeba": 10})
    lines = [f"{n}.png,{(-1) ** n},{1 if n % 3 else -1}" for n in range(10)]
    write_text(folder / "list_attr_celeba.csv", "image_id,cat,dog", *lines)


def _dirty(folder: Path) -> None:
    write_images(folder, {"images": 10})
    rows = [*_rows("images/{n}.png,{label}"), "images/99.png,cat", "images/98.png,dog"]
    rows[3], rows[4] = "images/3.png,", "images/4.png"
    write_text(folder / "labels.csv", "image,label", *rows)


def _litter(folder: Path) -> None:
    write_images(folder, {"cat": 5, "dog": 5, "__MACOSX/cat": 5})
    (folder / "empty").mkdir()
    for name in ("Thumbs.db", "cat/.DS_Store", "notes.txt", "dog/scan.npy"):
        (folder / name).write_bytes(b"x")


def _archive(ending: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        write_images(folder / "pets", _pairs("train", "test"))
        kind = {"zip": "zip", "tar.gz": "gztar"}[ending]
        shutil.make_archive(str(folder / "pets"), kind, folder, "pets")
        shutil.rmtree(folder / "pets")

    return build


def _image_rows(folder: Path) -> tuple[list[dict[str, object]], dict[bytes, str]]:
    """Rows of images as Hugging Face stores them, and the metadata of their schema."""
    rows: list[dict[str, object]] = []
    for n in range(10):
        file = write_image(folder / f"{n}.png")
        rows.append({"image": {"bytes": file.read_bytes(), "path": None}, "label": n % 2})
        file.unlink()
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": label}
    return rows, {b"huggingface": json.dumps({"info": {"features": features}})}


def _parquet(folder: Path) -> None:
    rows, metadata = _image_rows(folder)
    for part, some in (("train", rows[:6]), ("test", rows[6:])):
        table = pa.Table.from_pylist(some).replace_schema_metadata(metadata)
        (folder / "pets/data").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / f"pets/data/{part}-00000-of-00001.parquet")


def _saved(folder: Path) -> None:
    rows, metadata = _image_rows(folder)
    for part, some in (("train", rows[:6]), ("test", rows[6:])):
        table = pa.Table.from_pylist(some).replace_schema_metadata(metadata)
        write_text(folder / "pets" / part / "dataset_info.json", "{}")
        with pa.ipc.new_stream(folder / f"pets/{part}/data-0.arrow", table.schema) as out:
            out.write_table(table)
    write_text(folder / "pets/dataset_dict.json", "{}")


SPLIT_COLUMN = [
    f"images/{n}.png,{('cat', 'dog')[n % 2]},{'train' if n < 6 else 'test'}" for n in range(10)
]

CLASSIFICATION = [
    Layout("class folders", _both({"cat": 5, "dog": 5}), (6, 2, 2), says=("No parts were found",)),
    Layout("`train/`, `val/`, `test/`", _both(_pairs("train", "val", "test")), (10, 10, 10)),
    Layout("`train/` and `test/`", _both(_pairs("train", "test")), (8, 2, 10)),
    Layout(
        "`train/` and `val/` (ImageNet, Imagenette)",
        _both(_pairs("train", "val")),
        (8, 2, 10),
        says=("the given validation part is the test part. 2 of the training images",),
    ),
    Layout("`train/` alone", _both(_pairs("train")), (6, 2, 2), says=("60 %",)),
    Layout("names of parts in any case", _both(_pairs("Training", "Testing")), (8, 2, 10)),
    Layout("`dev/`, `eval/`", _both(_pairs("TRAIN", "dev", "Eval")), (10, 10, 10)),
    Layout(
        "parts inside the classes",
        _both({f"{c}/{p}": 5 for c in ("cat", "dog") for p in ("train", "test")}),
        (8, 2, 10),
        says=("<class>/train/",),
    ),
    Layout("in a folder of its own", _both(_pairs("my_data/train", "my_data/val")), (8, 2, 10)),
    Layout("below `images/`", _both({"images/cat": 5, "images/dog": 5}), (6, 2, 2)),
    Layout("parts below `images/`", _both(_pairs("images/train", "images/test")), (8, 2, 10)),
    Layout(
        "ImageNet of Kaggle",
        _imagenet,
        (6, 2, 2),
        "n01440764 n01443537",
        says=("8 images outside the class folders",),
    ),
    Layout(
        "a part twice, `seg_train/seg_train/`",
        _both({**_pairs("seg_train/seg_train", "seg_test/seg_test"), "seg_pred": 3}),
        (8, 2, 10),
        says=("3 images outside the folders of parts",),
    ),
    Layout("lists of the images of each part (Food-101)", _food101, (4, 2, 4)),
    Layout("attributes of CelebA", _celeba, (6, 2, 2)),
    Layout(
        "nested classes",
        _nested,
        (9, 3, 3),
        "animal plant",
        says=("--class_level 1 gives 2 classes, 2 gives 3 classes; 1 is used",),
    ),
    Layout(
        "nested classes, inner level",
        _nested,
        (9, 3, 3),
        "cat dog fir",
        options=("--class_level", "2"),
    ),
    Layout("class in the file name", _names, (6, 2, 2), options=("--label_regex", "^([a-z]+)")),
    Layout(
        "folders with litter",
        _litter,
        (6, 2, 2),
        says=("Folders without images, skipped: empty", "Files not read: 1 .npy, 1 .txt"),
    ),
    Layout(
        "CSV", _table("path,label", *_rows("images/{n}.png,{label}")), (6, 2, 2), data="labels.csv"
    ),
    Layout(
        "CSV in the folder of the images",
        _table("filename,class", *_rows("{n}.png,{label}")),
        (6, 2, 2),
        says=("images in column filename",),
    ),
    Layout(
        "CSV with `;`, without a header",
        _table(*_rows("images/{n}.png;{label}")),
        (6, 2, 2),
        data="labels.csv",
        says=("separated by semicolons, without a header",),
    ),
    Layout(
        "TSV",
        _table("Image\tSpecies", *_rows("images/{n}.png\t{label}"), name="labels.tsv"),
        (6, 2, 2),
        data="labels.tsv",
    ),
    Layout(
        "JSON Lines",
        _table(*_rows('{{"image": "images/{n}.png", "label": "{label}"}}'), name="labels.jsonl"),
        (6, 2, 2),
        data="labels.jsonl",
    ),
    Layout(
        "Windows paths",
        _table("Path,Label", *_rows('"images\\{n}.png",{label}')),
        (6, 2, 2),
        data="labels.csv",
    ),
    Layout(
        "names without ending, images elsewhere",
        _kaggle,
        (6, 2, 2),
        data="train.csv",
        options=("--image_root", "train_images"),
    ),
    Layout("Kaggle: `train.csv`, `train_images/`", _kaggle, (6, 2, 2)),
    Layout(
        "other columns",
        _table("where,what,note", *_rows("images/{n}.png,{label},x")),
        (6, 2, 2),
        data="labels.csv",
        options=("--path_column", "where", "--label_column", "what"),
    ),
    Layout(
        "a column for each class, exclusive (ISIC)",
        _table("image,cat,dog", *(f"{n},{1.0 - n % 2},{float(n % 2)}" for n in range(10))),
        (6, 2, 2),
        data="labels.csv",
        says=("2 columns of 0 and 1",),
    ),
    Layout(
        "a column for each class, several labels",
        _table("image,cat,dog", *(f"{n},{n % 2},{int(n % 3 > 0)}" for n in range(10))),
        (6, 2, 2),
        data="labels.csv",
    ),
    Layout(
        "`tags` with spaces (Planet)",
        _table("image_name,tags", *(f"{n},{('cat', 'dog', 'cat dog')[n % 3]}" for n in range(10))),
        (6, 2, 2),
        data="labels.csv",
    ),
    Layout("HAM10000", _ham10000, (6, 2, 2), says=("column dx",)),
    Layout("ChestX-ray14", _nih, (6, 2, 2)),
    Layout("class folders and a table", _birds, (6, 6, 6)),
    Layout(
        "a column `split`", _table("path,label,split", *SPLIT_COLUMN), (4, 2, 4), data="labels.csv"
    ),
    Layout(
        "a column `is_valid` (fastai)",
        _table(
            "name,label,is_valid",
            *_rows("images/{n}.png,{label},False", 8),
            *_rows("images/{n}.png,{label},True")[8:],
        ),
        (6, 2, 2),
        data="labels.csv",
    ),
    Layout(
        "a column `fold`",
        _table(
            "path,label,fold",
            *(f"images/{n}.png,{('cat', 'dog')[n % 2]},{n // 2}" for n in range(10)),
        ),
        (6, 2, 2),
        data="labels.csv",
        options=("--test_fold", "4"),
    ),
    Layout("`metadata.jsonl` (Hugging Face)", _metadata, (8, 2, 10)),
    Layout("lists of paths and labels", _lists, (6, 2, 2)),
    Layout(
        "a list of paths and labels",
        _table(*_rows("images/{n}.png {label}"), name="list.txt"),
        (6, 2, 2),
        data="list.txt",
    ),
    Layout(
        "pandas' row numbers",
        _table(",image,label", *_rows("{n},images/{n}.png,{label}")),
        (6, 2, 2),
        data="labels.csv",
    ),
    Layout(
        "missing images and labels",
        _dirty,
        (4, 2, 2),
        data="labels.csv",
        says=("2 images missing", "1 image without a label", "1 row that is cut short"),
    ),
    Layout("`.zip`", _archive("zip"), (8, 2, 10), data="pets.zip", says=("Unpacking ",)),
    Layout("`.tar.gz`", _archive("tar.gz"), (8, 2, 10), data="pets.tar.gz"),
    Layout("Parquet files (Hugging Face)", _parquet, (4, 2, 4), data="pets"),
    Layout("a folder saved by `datasets`", _saved, (4, 2, 4), data="pets"),
]
