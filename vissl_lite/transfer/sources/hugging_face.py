"""Unpacking of Hugging Face's data sets: Parquet files, or a folder saved by ``datasets``."""

import csv
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from vissl_lite.data.archives import unpack_beside
from vissl_lite.data.headers import opened_image
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.errors import UserError
from vissl_lite.transfer.sources.file_tree import FileTree
from vissl_lite.transfer.sources.parts import part_of_name
from vissl_lite.transfer.sources.tables import PATH_COLUMNS, normalized

# Files that ``datasets.save_to_disk`` writes for one part, and for a folder of several.
INFO, SPLITS = "dataset_info.json", "dataset_dict.json"

# Types of columns that become text.
_SCALARS = ("string", "large_string", "bool", "double", "float")

# Rows that are held in memory at a time.
_ROWS = 64

# Name of the table that is written beside the images.
_TABLE = "metadata.csv"


def hugging_face_files(source: Path) -> list[Path]:
    """The files of images and labels in a folder, or the file itself; empty if it is another one.

    Args:
        source: A .parquet file, a folder with such files at its top or in ``data/``, or a folder
            that ``datasets`` saved.
    """
    if source.is_file():
        return [source] if source.suffix.lower() == ".parquet" else []
    if (source / INFO).is_file() or (source / SPLITS).is_file():
        files = [*source.glob("*.arrow"), *source.glob("*/*.arrow")]
    else:
        files = [*source.glob("*.parquet"), *source.glob("data/*.parquet")]
    return sorted(files) if files and not FileTree(source).image_files else []


def unpack_hugging_face(source: Path, files: list[Path]) -> Path:
    """Write the images of Parquet or Arrow files into a folder beside, with a table of labels.

    Args:
        source: File or folder that was given.
        files: Result of ``hugging_face_files``.

    Returns:
        The folder, with the images of each part and ``metadata.csv``.

    Raises:
        UserError: pyarrow is not installed, or the files have no column of images.
    """
    folder = source.with_name(f"{source.stem}_images")
    return unpack_beside(source, files, folder, lambda target: _extract(files, target))


class _Columns(NamedTuple):
    """The columns of a file: images, and others with the names of their classes."""

    image: str
    others: dict[str, list[str] | None]


def _extract(files: list[Path], target: Path) -> None:
    others: dict[str, None] = {}
    rows: list[dict[str, str]] = []
    for file in files:
        words = (file.stem.split("-")[0], file.parent.name)
        part = next(filter(None, map(part_of_name, words)), None)
        folder = target / (part or "images")
        folder.mkdir(exist_ok=True)
        columns, records = _open(file)
        others.update(dict.fromkeys(columns.others))
        for record in records:
            content = record[columns.image]
            content = content.get("bytes") if isinstance(content, dict) else content
            if not isinstance(content, bytes):
                raise UserError(f"{file}: the column {columns.image} holds no bytes of images")
            try:
                with opened_image(BytesIO(content), file) as image:
                    ending = (image.format or "png").lower()
            except BROKEN_IMAGE:
                ending = "png"  # counted as unreadable when it is read
            path = folder / f"{len(rows):07d}.{ending}"
            path.write_bytes(content)
            cells = {
                name: _as_text(record[name], classes) for name, classes in columns.others.items()
            }
            cells["split"] = part or cells.get("split", "")
            rows.append({**cells, "file_name": str(path.relative_to(target))})
    with (target / _TABLE).open("w", newline="", encoding="utf-8") as out:
        others.pop("split", None)
        names = ["file_name", *others, *(["split"] if any(row["split"] for row in rows) else [])]
        writer = csv.DictWriter(out, names, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _open(file: Path) -> tuple[_Columns, Iterator[dict[str, Any]]]:
    """The columns of a file, and its rows."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"{file} needs pyarrow, which is not installed: pip install 'vissl-lite[parquet]'"
        ) from None

    def damaged(error: Exception) -> UserError:
        return UserError(f"{file} can't be read: {error}")

    try:
        if file.suffix.lower() == ".parquet":
            opened = pq.ParquetFile(file)
            columns = _columns(file, opened.schema_arrow)
            batches = opened.iter_batches(_ROWS, columns=[columns.image, *columns.others])
        else:
            stream = pa.ipc.open_stream(pa.memory_map(str(file)))
            columns = _columns(file, stream.schema)
            batches = iter(stream)
    except (pa.ArrowException, OSError) as error:
        raise damaged(error) from None

    def rows() -> Iterator[dict[str, Any]]:
        try:
            for batch in batches:
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise damaged(error) from None

    return columns, rows()


def _columns(file: Path, schema: Any) -> _Columns:
    features: dict[str, Any] = {}
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata["info"]["features"]
    except (ValueError, LookupError, TypeError):
        pass
    images, others = [], {}
    for field in schema:
        kind = str(field.type)
        if kind in ("binary", "large_binary") or kind.startswith("struct<bytes: "):
            images.append(field.name)
        elif normalized(field.name) in PATH_COLUMNS:  # of files that are not here
            continue
        elif kind.startswith("list<") or kind in _SCALARS or "int" in kind:
            others[field.name] = _class_names(features, field.name)
    if not images:
        raise UserError(
            f"{file} has no column of images: it has {', '.join(schema.names)}; the bytes of an "
            f"image are expected, as Hugging Face stores them"
        )
    return _Columns(images[0], others)


def _class_names(features: Any, column: str) -> list[str] | None:
    """The names of a ClassLabel, or of a list of them."""
    try:
        feature = features[column]
        feature = feature[0] if isinstance(feature, list) else feature
        names = feature.get("feature", feature).get("names")
    except (LookupError, AttributeError, TypeError):
        return None
    return list(map(str, names)) if isinstance(names, list) else None


def _as_text(value: Any, classes: list[str] | None) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "|".join(_as_text(one, classes) for one in value)
    if classes is not None and isinstance(value, int) and 0 <= value < len(classes):
        return classes[value]
    return str(value)
