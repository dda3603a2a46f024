"""Labelled images for classification: class folders or a CSV file, and their splits."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vissl_lite.data.images import find_images
from vissl_lite.data.splits import TEST_SHARE, VAL_NAMES, VAL_SHARE
from vissl_lite.errors import UserError

_PATH_COLUMNS = ("path", "image", "file", "filename")
_LABEL_COLUMNS = ("label", "class")


@dataclass(frozen=True)
class Part:
    """One part of a labelled data set.

    Attributes:
        paths: image files.
        labels: ``(N,)`` int64, indices into the data set's classes.
    """

    paths: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> "Part":
        """The part made of the images with these indices, in ascending order."""
        indices = np.sort(indices)
        return Part([self.paths[i] for i in indices], self.labels[indices])


@dataclass(frozen=True)
class LabelledImages:
    """Classes and the three parts; nothing is ever chosen on the test part.

    ``test`` is empty only where the caller asked for no test part.
    """

    classes: list[str]
    train: Part
    val: Part
    test: Part

    def write(self, file: Path) -> None:
        """Write down the splits: a CSV file that can be given as ``--data`` again."""
        with file.open("w", newline="", encoding="utf-8") as out:
            rows = csv.writer(out)
            rows.writerow(["path", "label", "split"])
            for name in ("train", "val", "test"):
                part: Part = getattr(self, name)
                for path, label in zip(part.paths, part.labels, strict=True):
                    rows.writerow([Path(path).absolute(), self.classes[label], name])


def load_labelled(
    source: str | Path, seed: int = 0, need_test: bool = True, need_val: bool = True
) -> LabelledImages:
    """Read a labelled data set.

    Args:
        source: a folder ``train/<class>/*`` with ``test/`` and optionally ``val/``; or plain class
            folders; or a CSV file with the columns ``path`` and ``label``, and optionally
            ``split`` (train, val, test), paths relative to the file. Without splits a seeded,
            stratified 60/20/20 split is made; without a validation part, 20 % of the training part
            becomes one.
        seed: of the splits that are made here.
        need_test: whether missing test images are an error.
        need_val: whether to take a missing validation part out of the training part.

    Returns:
        The parts, each sorted by path.

    Raises:
        UserError: nothing there, one class only, no test images, or a class in a part that the
            training part lacks.
    """
    source = Path(source)
    if source.is_dir():
        parts = _read_folder(source)
    elif source.is_file() and source.suffix.lower() == ".csv":
        parts = _read_csv(source)
    elif source.exists():
        raise UserError(f"{source} is neither a folder with class folders nor a .csv file")
    else:
        raise UserError(f"{source} does not exist")
    classes = sorted({label for _, label in parts["train"]})
    if len(classes) < 2:
        raise UserError(f"{source} has one class only ({classes[0]}): two or more are needed")
    for name in ("val", "test"):
        unknown = sorted({label for _, label in parts[name]} - set(classes))
        if unknown:
            raise UserError(f"{source}: the {name} images have the class {unknown[0]}, which no "
                            f"training image has")  # fmt: skip
    number = {name: index for index, name in enumerate(classes)}
    train, val, test = (
        Part([path for path, _ in part], np.array([number[c] for _, c in part], dtype=np.int64))
        for part in (parts["train"], parts["val"], parts["test"])
    )
    if need_test and len(test) == 0:
        raise UserError(
            f"{source} has no test images: add test/<class>/, or give plain class folders or a "
            f"CSV file without splits to have them split"
        )
    data = LabelledImages(classes, train, val, test)
    return hold_out_val(data, seed) if need_val and len(val) == 0 else data


def hold_out_val(data: LabelledImages, seed: int) -> LabelledImages:
    """Take a stratified validation part out of the training part; none where labels are too few."""
    held, kept = _stratified(data.train.labels, VAL_SHARE, seed)
    return replace(data, train=data.train.take(kept), val=data.train.take(held))


def take_labels(
    data: LabelledImages, fraction: float | None, shots: int | None, seed: int
) -> LabelledImages:
    """A seeded, stratified part of the labels, of training and validation alike.

    A smaller amount is always contained in a larger one of the same seed.

    Args:
        data: the whole.
        fraction: share of each class in (0, 1]; at least one image of each.
        shots: images a class, instead.
        seed: which ones.

    Raises:
        UserError: both are given, or a number is out of range.
    """
    if fraction is None and shots is None:
        return data
    if fraction is not None and shots is not None:
        raise UserError("give --fraction or --shots, not both")
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction} is not a share: it must be above 0 and at most 1")
    if shots is not None and shots < 1:
        raise UserError(f"--shots {shots} must be at least 1")

    def some(part: Part) -> Part:
        chosen = [
            members[: shots if shots is not None else max(1, round(len(members) * (fraction or 1)))]
            for members in _shuffled_classes(part.labels, seed)
        ]
        return part.take(np.concatenate(chosen)) if chosen else part

    return replace(data, train=some(data.train), val=some(data.val))


def _shuffled_classes(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """The indices of each class, shuffled."""
    return [
        np.random.default_rng((seed, int(label))).permutation(np.flatnonzero(labels == label))
        for label in np.unique(labels)
    ]


def _stratified(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off a share of each class: at least one image where there are two or more."""
    off, rest = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for members in _shuffled_classes(labels, seed):
        count = max(1, round(len(members) * share)) if len(members) > 1 else 0
        off.append(members[:count])
        rest.append(members[count:])
    return np.concatenate(off), np.concatenate(rest)


_Pairs = list[tuple[str, str]]  # (path, class name)


def _read_folder(folder: Path) -> dict[str, _Pairs]:
    if (folder / "train").is_dir():
        val = next((folder / name for name in VAL_NAMES if (folder / name).is_dir()), None)
        test = folder / "test"
        return {
            "train": _class_folders(folder / "train"),
            "val": _class_folders(val) if val else [],
            "test": _class_folders(test) if test.is_dir() else [],
        }
    return _split(_class_folders(folder))


def _class_folders(folder: Path) -> _Pairs:
    classes = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders: expected {folder}/<class>/*.jpg")
    return [(path, one.name) for one in classes for path in find_images([one])]


def _split(pairs: _Pairs) -> dict[str, _Pairs]:
    # The split of plain folders does not follow the run's seed: the test part must stay the test
    # part from one run to the next.
    labels = np.unique([label for _, label in pairs], return_inverse=True)[1]
    test, rest = _stratified(labels, TEST_SHARE, seed=0)
    within, _ = _stratified(labels[rest], VAL_SHARE / (1 - TEST_SHARE), seed=1)
    val = set(rest[within].tolist())
    return {
        "train": [pairs[i] for i in sorted(rest.tolist()) if i not in val],
        "val": [pairs[i] for i in sorted(val)],
        "test": [pairs[i] for i in sorted(test.tolist())],
    }


def _read_csv(file: Path) -> dict[str, _Pairs]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            rows = list(reader)
            columns = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} can't be read as a CSV file: {error}") from None
    path = _column(file, columns, _PATH_COLUMNS)
    label = _column(file, columns, _LABEL_COLUMNS)
    if not rows:
        raise UserError(f"{file} has no rows")
    for row in rows:
        for column in (path, label):
            if not row[column]:
                raise UserError(f"{file} has a row whose {column} is missing: {row}")
    rows.sort(key=lambda row: row[path])  # the split must not depend on the order of rows
    pairs = [(str(file.parent / row[path]), row[label]) for row in rows]
    missing = [one for one, _ in pairs if not Path(one).is_file()]
    if missing:
        raise UserError(f"{file} names {len(missing)} missing files, the first {missing[0]}")
    if "split" not in columns:
        return _split(pairs)
    parts: dict[str, _Pairs] = {"train": [], "val": [], "test": []}
    for pair, row in zip(pairs, rows, strict=True):
        name = "val" if row["split"] in VAL_NAMES else row["split"]
        if name not in parts:
            raise UserError(f"{file}: the split {row['split']!r} is none of train, val, test")
        parts[name].append(pair)
    if not parts["train"]:
        raise UserError(f"{file} has no training images (split train)")
    return parts


def _column(file: Path, columns: Sequence[str], names: Sequence[str]) -> str:
    for name in names:
        if name in columns:
            return name
    raise UserError(f"{file} has no column {' or '.join(names)}: it has {', '.join(columns)}")
