from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vissl_lite.transfer.classification.data import load_labelled


def content(number: int) -> bytes:
    out = BytesIO()
    Image.fromarray(np.full((4, 4, 3), 9 * number, np.uint8)).save(out, "png")
    return out.getvalue()


def test_columns_of_parts_and_of_files_that_are_not_here(tmp_path: Path) -> None:
    rows = [
        {
            "path": f"/their/{number}.png",
            "file_name": f"{number}.png",
            "image": {"bytes": content(number), "path": None},
            "label": ("cat", "dog")[number % 2],
            "split": "train" if number < 6 else "test",
        }
        for number in range(10)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    data = load_labelled(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert len(data.train.paths) + len(data.val.paths) == 6
    assert data.test.labels.tolist() == [0, 1, 0, 1]
