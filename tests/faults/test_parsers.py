"""Labelled data and YAML that somebody has damaged: a result, or an error of one line, soon.

Each test begins with a valid set of files and puts odd values, damage or whole other content in
the place of parts of it. The process has a limit on its memory while it reads.
"""

import copy
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import trying
from vissl_lite.data.yaml_file import parse_yaml
from vissl_lite.errors import UserError
from vissl_lite.transfer.classification.data import LabelledImages, load_labelled
from vissl_lite.transfer.detection.data import LabelledBoxes, load_boxes
from vissl_lite.transfer.segmentation.data import load_masks

# In seconds and bytes; the bytes are on top of what the process has when it begins to read.
SOON, LITTLE = 5.0, 2**30


@contextmanager
def limits() -> Iterator[None]:
    """Fails where what is within takes long or much memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + LITTLE, before[1]))
    began = time.process_time()
    try:
        yield
    finally:
        took = time.process_time() - began
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert took < SOON


def read(load: Callable[[], Any]) -> Any:
    """What is read; None for an error of one line."""
    with limits():
        try:
            return load()
        except UserError as error:
            message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) < 2000
    return None


ODD = [
    None, True, False, 0, -1, 1, 2**63, -(2**63), 10**19, 1e308, -1e308, 1e-320, 0.5,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "1", "-1", "1e999", "nan", "1_0",
    "9" * 5000, "a\nb", "\0", "\x1b[31m", "é\u2028ü", "x" * 5000, "../../../etc/passwd",
    "/dev/zero",
    [], {}, [1], [None] * 4, [[]], {"a": 1}, [0, 0, 10, 10], [1, 2, 3], ["1", "2", "3", "4"],
    [float("nan")] * 4, [1e308] * 4, [1e-320] * 4, [-5, -5, 1e30, 1e30], [0, 0, -10, -10],
    [True] * 4, "1234", [[1], 2, 3, 4],
]  # fmt: skip
odd = st.sampled_from(ODD)
json_values = st.recursive(
    odd | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested lists and mappings."""
    found = [at] if at else []
    if isinstance(content, dict | list):
        inner = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in inner:
            found += places(value, (*at, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, content: Any, values: Any = json_values) -> Any:
    """The content with some of its parts replaced, removed or given twice."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 4))):
        where = places(content)
        if not where:
            return content
        *path, last = draw(st.sampled_from(where))
        holder = content
        for key in path:
            holder = holder[key]
        how = draw(st.sampled_from(("replace", "replace", "remove", "twice")))
        if how == "replace":
            holder[last] = draw(values)
        elif how == "remove":
            del holder[last]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
    return content


@st.composite
def damaged(draw: st.DrawFn, text: bytes) -> bytes:
    """Bytes cut short, with others put in, or with parts of them given again and again."""
    content = bytearray(text)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        to = draw(st.integers(at, min(len(content), at + 40)))
        piece = draw(
            st.binary(max_size=8)
            | st.sampled_from((b"", b"\0", b"\xff\xfe", b"\n", b'"', b"[" * 3000, b"{" * 3000,
                               b"<a>" * 3000, b"9" * 5000, b"&a [*a]", b"*a", b"- " * 3000, b"&x;",
                               b",", b",,,", b"1e999", b"nan", b"\r", b"<!--", b"<![CDATA["))
            | st.just(bytes(content[at:to]) * 50)
        )  # fmt: skip
        content[at:to] = piece
    return bytes(content)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 32 x 24 pixels, and masks for them."""
    folder = tmp_path_factory.mktemp("parsers")
    for name in ("images", "masks"):
        (folder / "set" / name).mkdir(parents=True)
    for number in range(6):
        pixels = np.full((24, 32, 3), 30 * number, np.uint8)
        Image.fromarray(pixels).save(folder / "set" / "images" / f"{number}.png")
        mask = np.zeros((24, 32), np.uint8)
        mask[:12] = 1
        Image.fromarray(mask).save(folder / "set" / "masks" / f"{number}.png")
    return folder


def check_boxes(data: LabelledBoxes | None) -> None:
    """Whatever comes of damaged annotations can be trained on."""
    if data is None:
        return
    for image in (*data.train, *data.val, *data.test):
        assert np.isfinite(image.boxes).all()
        assert (image.boxes >= 0).all()
        assert (image.boxes[:, 2:] <= (32, 24)).all()
        assert (image.boxes[:, 2:] > image.boxes[:, :2]).all()
        assert set(image.labels.tolist()) <= set(range(len(data.classes)))


def coco() -> dict[str, Any]:
    return {
        "images": [
            {"id": n, "file_name": f"{n}.png", "height": 24, "width": 32} for n in range(6)
        ],
        "annotations": [
            {"id": n, "image_id": n % 6, "category_id": 1 + n % 2, "bbox": [1 + n, 2, 10, 12],
             "area": 120, "iscrowd": 0}
            for n in range(8)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }  # fmt: skip


def read_coco(root: Path, content: bytes) -> LabelledBoxes | None:
    (root / "coco.json").write_bytes(content)
    data: LabelledBoxes | None = read(
        lambda: load_boxes(root / "set" / "images", root / "coco.json")
    )
    check_boxes(data)
    return data


@pytest.mark.slow
@given(content=mutated(coco()))
def test_coco_with_odd_values(root: Path, content: Any) -> None:
    read_coco(root, json.dumps(content).encode("utf-8", "replace"))


@pytest.mark.slow
@given(content=damaged(json.dumps(coco()).encode()))
def test_coco_that_is_damaged(root: Path, content: bytes) -> None:
    read_coco(root, content)


@pytest.mark.slow
def test_every_odd_value_at_every_place_of_coco(root: Path) -> None:
    first = ("images", 0), ("annotations", 0), ("categories", 0)
    bbox = ("annotations", 0, "bbox")
    keys = [(*one, key) for one in first for key in coco()[one[0]][0]]
    outcomes = set()
    where = (*(one[:1] for one in first), *first, *keys, (*bbox, 0), (*bbox, 2))
    for number, place in enumerate(where):
        for value in ODD[number % 3 :: 3]:
            content = coco()
            holder: Any = content
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = value
            with trying((place, value)):
                found = read_coco(root, json.dumps(content).encode("utf-8", "replace"))
                outcomes.add(found is None)
    assert outcomes == {True, False}


def test_ids_of_coco_are_told_apart(root: Path) -> None:
    content = coco()
    content["images"][1]["id"], content["annotations"][1]["image_id"] = 0.5, 0.5
    content["images"][2]["id"], content["annotations"][2]["image_id"] = "2", 2.0
    content["annotations"][6]["bbox"] = "1234"
    content["categories"].append({"id": 1, "name": "cow"})
    data = read_coco(root, json.dumps(content).encode())
    assert data is not None
    assert data.classes == ["cat", "dog"]
    assert data.reading.counts == {
        "category with the id of another, left out": 1,
        "box not readable, left out": 1,
        "box of an image not listed, left out": 1,
    }
    boxes = sorted(one.boxes.tolist()[0][0] for one in (*data.train, *data.val, *data.test))
    assert boxes == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_coco_with_too_much_of_everything(root: Path) -> None:
    content = coco()
    content["categories"] = [{"id": n, "name": "x"} for n in range(100_001)]
    assert read_coco(root, json.dumps(content).encode()) is None
    content = coco()
    content["annotations"] += [{"image_id": 0, "category_id": 1, "bbox": None}] * 30_000
    data = read_coco(root, json.dumps(content).encode())
    assert data is not None
    assert data.reading.counts["box not readable, left out"] == 30_000
    text = json.dumps(coco()).replace("[1, 2, 10, 12]", f"[{'9' * 400}, 2, 10, 12]")
    assert read_coco(root, text.encode()) is None
    assert read_coco(root, b"[" * 10**6) is None
    assert read_coco(root, b'{"images":' * 10**5) is None


def voc() -> str:
    return (
        "<annotation><filename>{n}.png</filename><size><width>32</width><height>24</height></size>"
        "<object><name>cat</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>3</ymin>"
        "<xmax>20</xmax><ymax>14</ymax></bndbox></object></annotation>"
    )


def read_voc(root: Path, content: bytes) -> LabelledBoxes | None:
    folder = root / "voc"
    folder.mkdir(exist_ok=True)
    for number in range(1, 6):
        (folder / f"{number}.xml").write_text(voc().format(n=number))
    (folder / "0.xml").write_bytes(content)
    data: LabelledBoxes | None = read(lambda: load_boxes(root / "set" / "images", folder))
    check_boxes(data)
    return data


@pytest.mark.slow
@given(content=damaged(voc().format(n=0).encode()))
def test_voc_that_is_damaged(root: Path, content: bytes) -> None:
    assert read_voc(root, content) is not None  # the other five are fine


@pytest.mark.slow
@given(
    tag=st.sampled_from(["filename", "width", "height", "name", "difficult", "xmin", "xmax"]),
    value=st.sampled_from([str(one) for one in ODD]) | st.text(max_size=30),
)
def test_voc_with_odd_values(root: Path, tag: str, value: str) -> None:
    begin, _, rest = voc().format(n=0).partition(f"<{tag}>")
    _, _, end = rest.partition(f"</{tag}>")
    content = f"{begin}<{tag}>{value}</{tag}>{end}"
    assert read_voc(root, content.encode("utf-8", "replace")) is not None


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))


MALICE = (
    f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>',
    '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename>'
    "</annotation>",
    "<a>" * 200_000, "<annotation>" + "<a>" * 50_000 + "</a>" * 50_000 + "</annotation>",
    "<annotation/>", "<annotation><object/></annotation>", "<other/>", "", "x" * (2**24 + 1),
    '<?xml version="1.0" encoding="utf-99"?><annotation/>',
    '<?xml version="1.0" encoding="shift_jis"?><annotation/>',
)  # fmt: skip


@pytest.mark.slow
def test_voc_with_malice(root: Path) -> None:
    for content in MALICE:
        with trying(content[-60:]):
            data = read_voc(root, content.encode())
            assert data is not None
            assert "passwd" not in str(data)
            assert "root:" not in str(data)


def yolo() -> dict[str, Any]:
    return {"path": ".", "train": "images/train", "val": "images/val", "test": "images/test",
            "nc": 2, "names": ["cat", "dog"]}  # fmt: skip


LABELS = b"0 0.5 0.5 0.2 0.3\n1 0.4 0.4 0.5 0.5\n0 0.1 0.1 0.5 0.1 0.5 0.5\n"


def read_yolo(root: Path, content: bytes, labels: bytes = LABELS) -> LabelledBoxes | None:
    folder = root / "yolo"
    for split in ("train", "val", "test"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        if not (folder / "images" / split / "0.png").exists():
            Image.new("RGB", (32, 24)).save(folder / "images" / split / "0.png")
        (folder / "labels" / split / "0.txt").write_bytes(LABELS)
    (folder / "data.yaml").write_bytes(content)
    (folder / "labels" / "val" / "0.txt").write_bytes(labels)
    data: LabelledBoxes | None = read(lambda: load_boxes(folder))
    check_boxes(data)
    return data


# no "/", below which there is the whole disk
yaml_values = json_values.filter(lambda value: "/dev" not in str(value))


@pytest.mark.slow
@given(content=mutated(yolo(), yaml_values))
def test_yolo_with_odd_values(root: Path, content: Any) -> None:
    read_yolo(root, yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "replace"))


@pytest.mark.slow
@given(content=damaged(yaml.safe_dump(yolo()).encode()))
def test_yolo_that_is_damaged(root: Path, content: bytes) -> None:
    if b"/\n" not in content and b": /" not in content:
        read_yolo(root, content)


@pytest.mark.slow
@given(labels=damaged(LABELS))
def test_labels_of_yolo_that_are_damaged(root: Path, labels: bytes) -> None:
    assert read_yolo(root, yaml.safe_dump(yolo()).encode(), labels) is not None


@pytest.mark.slow
@given(
    words=st.lists(
        st.sampled_from([str(one) for one in ODD if not isinstance(one, list | dict)])
        | st.floats().map(str)
        | st.integers().map(str),
        max_size=9,
    )
)
def test_labels_of_yolo_with_odd_values(root: Path, words: list[str]) -> None:
    labels = LABELS + " ".join(words).encode()
    assert read_yolo(root, yaml.safe_dump(yolo()).encode(), labels) is not None


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


BAD_YAML = (
    BOMB, BOMB + "names: *a11\ntrain: .", "&a [*a]", "names: &a {b: *a}\ntrain: .", "[" * 10**5,
    "{" * 10**5, "- " * 10**5, "? " * 10**5, "names: 5\ntrain: .", "names: [[a]]\ntrain: .",
    "names: {.nan: a}\ntrain: .", "names: {.inf: a}\ntrain: .", "names: {a: b}\ntrain: .",
    "names: [a]\nnames: [b]\ntrain: .", "names: [!!binary aGk=]\ntrain: .",
    "names: [a]\ntrain: images/gone", "names: [a]\ntrain: " + "x" * 5000,
    "names: [a]\ntrain: 'x\\0'", 'names: [a]\ntrain: "x\\0"', "names: [a]\ntrain: {a: b}",
    "names: [null]\ntrain: .", "\ufffe", "names: [a]\ntrain: [[[]]]", "0x" + "f" * 5000,
    "1" + ":00" * 5000, "'" * 10**5, "&a " * 1000, "%TAG ! !!\n---\n!binary a",
)  # fmt: skip


@pytest.mark.slow
def test_yaml_with_malice(root: Path) -> None:
    for text in BAD_YAML:
        with trying(text):
            data = read_yolo(root, text.encode())
            assert data is None or data.classes == ["0", "1"]  # of the label files alone
            read(lambda text=text: parse_yaml(text, "x"))


def test_yaml_has_values_of_few_types() -> None:
    text = "[1, 0x1f, 1.5, .nan, true, null, 2024-01-01, 2024-01-01 10:00:00, a, '1', ~, <<]"
    found = parse_yaml(text, "x")
    assert found[3] != found[3]
    assert [one for one in found if one == one] == [
        1, 31, 1.5, True, None, "2024-01-01", "2024-01-01 10:00:00", "a", "1", None, "<<",
    ]  # fmt: skip


@pytest.mark.slow
@given(
    content=damaged(b"a: [1, 2.5, x]\nb: {c: 'd', e: \"f\"}\n? g\n: |\n  h\n  i\nj: 2024-01-01\n")
)
def test_yaml_that_is_damaged(content: bytes) -> None:
    read(lambda: parse_yaml(content.decode("utf-8", "replace"), "x"))


NAMES = [f"set/images/{n % 6}.png" for n in range(18)]
CSV = "path,label,split\r\n" + "".join(
    f"{name},{'ab'[n % 2]},{'train' if n < 4 else 'test'}\r\n" for n, name in enumerate(NAMES[:6])
)
SEVERAL = "path,labels,split\n" + "".join(
    f"{name},{('a', 'b', 'a|b')[n % 3]},{'train' if n < 3 else 'test'}\n"
    for n, name in enumerate(NAMES[:6])
)
COLUMNS = "path,a,b,note\n" + "".join(
    f"{name},{n % 2},{1 - n % 2},x{n}\n" for n, name in enumerate(NAMES)
)
MASKS = "path,mask\n" + "".join(f"{name},{name.replace('images', 'masks')}\n" for name in NAMES)


def read_csv(root: Path, content: bytes, masks: bool = False) -> Any:
    (root / "set.csv").write_bytes(content)
    if masks:
        return read(lambda: load_masks(root / "set.csv"))
    data = read(lambda: load_labelled(root / "set.csv", multi_label=True))
    if data is not None:
        assert isinstance(data, LabelledImages)
        for part in (data.train, data.val, data.test):
            assert all(os.path.isfile(path) for path in part.paths)
    return data


def test_csv_files_that_are_fine(root: Path) -> None:
    for text in (CSV, SEVERAL, COLUMNS, MASKS):
        with trying(text):
            assert read_csv(root, text.encode(), masks=text is MASKS) is not None


@pytest.mark.slow
@given(
    content=st.one_of(damaged(CSV.encode()), damaged(SEVERAL.encode()), damaged(COLUMNS.encode()))
)
def test_csv_files_that_are_damaged(root: Path, content: bytes) -> None:
    read_csv(root, content)


@pytest.mark.slow
@given(content=damaged(MASKS.encode()))
def test_csv_files_of_masks_that_are_damaged(root: Path, content: bytes) -> None:
    read_csv(root, content, masks=True)


BAD_CSV = (
    b"", b"\n", b"path", b"path,label", CSV.encode("utf-16")[:-1],
    CSV.encode() + b'set/images/0.png,"a', CSV.encode() + b"set/images/0.png,\xe9,train",
    CSV.encode() + b"x" * 200_000 + b",a,train", CSV.encode() + b"x\0.png,a,train",
    CSV.replace("label", "path").encode(),
    ",".join(f"c{n}" for n in range(100_000)).encode() + b"\n" + b"1," * 100_000,
    b"path," + b"," * 100_000,
    b"path,labels\n" + b"".join(b"gone%d.png,c%d\n" % (n, n) for n in range(20_000)),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x" * 300 + ".png", ".", "/dev/zero", "pipe.png"])
def test_rows_without_a_regular_file_are_left_out(name: str, root: Path) -> None:
    if not (root / "pipe.png").exists():
        os.mkfifo(root / "pipe.png")
    data = read_csv(root, f"{CSV}{name},a,train".encode())
    assert data.reading.counts["image missing, or not the only one of its name, left out"] == 1


@pytest.mark.slow
def test_csv_files_with_malice(root: Path) -> None:
    for content in BAD_CSV:
        with trying(content[-60:]):
            assert read_csv(root, content) is None
            assert read_csv(root, content, masks=True) is None


@pytest.mark.slow
def test_a_column_of_notes_takes_no_time(root: Path) -> None:
    """Each note used to be compared with all others."""
    rows = (
        b"set/images/%d.png,%d,%d,note %d\n" % (n % 6, n % 2, 1 - n % 2, n) for n in range(15_000)
    )
    assert read_csv(root, b"path,a,b,note\n" + b"".join(rows)) is not None


def test_what_is_no_file(root: Path, tmp_path: Path) -> None:
    for name in ("pipe.csv", "pipe.json", "pipe.yaml", "voc/pipe.xml", "yolo/pipe.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    for name in ("folder.csv", "folder.json", "folder.yaml"):
        (tmp_path / name).mkdir()
    for kind in ("pipe", "folder"):
        assert read(lambda kind=kind: load_labelled(tmp_path / f"{kind}.csv")) is None
        assert read(lambda kind=kind: load_masks(tmp_path / f"{kind}.csv")) is None
        assert read(lambda kind=kind: load_boxes(tmp_path / f"{kind}.json")) is None
        assert read(lambda kind=kind: load_boxes(tmp_path / f"{kind}.yaml")) is None
    for name in ("pipe.json", "folder.json", "voc", "yolo", "nul\0byte", "x" * 300):
        read(lambda name=name: load_boxes(root / "set" / "images", tmp_path / name))
    for load in (load_boxes, load_masks, load_labelled):
        for name in ("nul\0byte", "x" * 300, "x" * 5000, ""):
            assert read(lambda load=load, name=name: load(tmp_path / name)) is None
