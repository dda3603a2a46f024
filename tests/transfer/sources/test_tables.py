from pathlib import Path

import pytest

from vissl_lite.errors import UserError
from vissl_lite.transfer.options import SourceOptions
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.sources.tables import (
    Table,
    parts_of_rows,
    read_table,
    yes_or_no,
)


def table_of(folder: Path, text: str, name: str = "t.csv", encoding: str = "utf-8") -> Table:
    file = folder / name
    file.write_text(text, encoding=encoding)
    return read_table(file, lambda cell: cell.endswith(".jpg"))


@pytest.mark.parametrize(
    ("text", "columns", "first"),
    [
        ("path,label\n1.jpg,a\n", ["path", "label"], ["1.jpg", "a"]),
        (
            "path;label;n\n1.jpg;a, b;1,5\n2.jpg;c;2\n",
            ["path", "label", "n"],
            ["1.jpg", "a, b", "1,5"],
        ),
        ("path,labels\n1.jpg,a;b\n2.jpg,c;d\n", ["path", "labels"], ["1.jpg", "a;b"]),
        ("path\tlabel\n1.jpg\ta\n", ["path", "label"], ["1.jpg", "a"]),
        ("1.jpg,a\n2.jpg,b\n", ["1", "2"], ["1.jpg", "a"]),
        ('"a, b.jpg",x\n"c.jpg","y ""z"""\n', ["1", "2"], ["a, b.jpg", "x"]),
        ("path,label\n\n1.jpg,a\n\n", ["path", "label"], ["1.jpg", "a"]),
    ],
)
def test_separators_and_headers(
    text: str, columns: list[str], first: list[str], tmp_path: Path
) -> None:
    table = table_of(tmp_path, text)
    assert table.columns == columns
    assert list(table.rows[0].values()) == first


def test_a_list_with_spaces_in_paths(tmp_path: Path) -> None:
    table = table_of(tmp_path, "my images/1.jpg a\nmy images/2.jpg b\n", "list.txt")
    assert table.rows[1] == {"1": "my images/2.jpg", "2": "b"}


def test_json_lines(tmp_path: Path) -> None:
    text = '{"file": "1.jpg", "tags": ["a", "b"], "n": null}\n\n{"file": "2.jpg", "ok": true}\n'
    table = table_of(tmp_path, text, "t.jsonl")
    assert table.columns == ["file", "tags", "n", "ok"]
    assert table.cells("tags") == ["a|b", ""]
    assert table.cells("ok") == ["", "true"]
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        table_of(tmp_path, "{}\n[1]\n", "t.jsonl")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(encoding: str, tmp_path: Path) -> None:
    assert table_of(tmp_path, "path,label\n1.jpg,ä\n", encoding=encoding).cells("label") == ["ä"]


def test_columns_are_found_in_any_case(tmp_path: Path) -> None:
    table = table_of(tmp_path, "Image Path,My Label\n1.jpg,a\n")
    assert table.column(["label", "image_path"]) == "Image Path"
    assert table.given_column("label_column", "my label") == "My Label"
    with pytest.raises(UserError, match=r"--label_column x: .* no such column, but Image Path, My"):
        table.given_column("label_column", "x")


@pytest.mark.parametrize(
    ("column", "cells", "parts"),
    [
        ("split", ["train", "Valid", "TEST", "x"], ["train", "val", "test", None]),
        ("Set", ["training", "dev", "eval", ""], ["train", "val", "test", None]),
        ("is_valid", ["False", "True", "0", "1"], ["train", "val", "train", "val"]),
        ("is_test", ["no", "yes", "", "no"], ["train", "test", "train", "train"]),
        ("fold", ["0", "1", "2", "3"], [None] * 4),
        ("dataset", ["a", "b", "c", "d"], [None] * 4),
    ],
)
def test_parts_of_rows(
    column: str, cells: list[str], parts: list[str | None], tmp_path: Path
) -> None:
    table = table_of(tmp_path, f"path,{column}\n" + "".join(f"1.jpg,{cell}\n" for cell in cells))
    assert parts_of_rows(table, SourceOptions(), ReadingLog("t")) == parts


def test_a_fold_is_the_test_part(tmp_path: Path) -> None:
    table = table_of(tmp_path, "path,fold\n1.jpg,0.0\n2.jpg,1.0\n")
    log = ReadingLog("t")
    assert parts_of_rows(table, SourceOptions(test_fold="1"), log) == ["train", "test"]
    with pytest.raises(UserError, match=r"--test_fold 7: .* has the folds 0, 1"):
        parts_of_rows(table, SourceOptions(test_fold="7"), log)


def test_yes_or_no() -> None:
    assert yes_or_no(["1", "0.0", "", "True"]) == [True, False, False, True]
    assert yes_or_no(["1", "-1"]) == [True, False]
    assert yes_or_no(["1", "-1", "0"]) is None
    assert yes_or_no(["1", "2"]) is None
    assert yes_or_no(["", ""]) is None
    assert yes_or_no(["0", "0"]) == [False, False]
