"""Data folders that hold what is no image, images that can't be read, or that lose their images."""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vissl_lite.cli import main
from vissl_lite.data import reading as files
from vissl_lite.evaluation import embedding
from vissl_lite.sample.dataset import make_sample_data

BACKBONE = ["--image_size", 32, "--seed", 0]
ENCODER = ["--encoder", "random:test_resnet"]
SHORT = ["--epochs", 1, "--num_workers", 0]


@pytest.fixture(autouse=True)
def no_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "UMAP_LEAST", 10**9)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample data: ten classes, two training images and one for each other part."""
    folder = tmp_path_factory.mktemp("sample") / "data"
    return make_sample_data(folder, unlabelled=24, train=20, val=10, test=10, size=32, processes=1)


@pytest.fixture
def data(sample: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(sample, tmp_path / "data"))


@pytest.fixture(scope="module")
def models(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model for each task."""
    folder = tmp_path_factory.mktemp("models")
    for task in TASKS:
        assert run("finetune", *task_options(task, sample), *ENCODER, *SHORT, *BACKBONE,
                   "--out", folder / task) == 0  # fmt: skip
    return {task: folder / task for task in TASKS}


TASKS = ("classification", "detection", "segmentation")


def task_options(task: str, data: Path) -> list[Any]:
    source = data / "labelled" if task == "classification" else data
    return ["--task", task, "--data", source]


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def ends_well(*words: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command that must end without an error, or with one line that says what is wrong."""
    capsys.readouterr()
    status = run(*words)
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert status in (0, 2)
    if status == 2:
        output = [line for line in shown.splitlines() if line.startswith("vissl-lite: ")]
        assert len(output) == 1
        assert shown.rstrip().endswith(output[0])
    return status, shown


# What can stand in the place of an image.


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def link_to_pipe(file: Path) -> None:
    file.unlink()
    target = file.parents[1] / f"pipe-{file.stem}"
    os.mkfifo(target)
    file.symlink_to(target)


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("/nowhere/at/all.jpg")


def bomb(file: Path) -> None:
    """A PNG of 65,535 x 65,535 pixels in a few bytes."""
    file.write_bytes(png_header(65535, 65535))


def sparse(file: Path) -> None:
    """A hundred gigabytes of zeros that take no room."""
    with file.open("wb") as out:
        out.truncate(100 << 30)


def gone(file: Path) -> None:
    file.unlink()


LISTED = (empty, cut, bomb, sparse)  # these are found as images, and can't be read
NOT_LISTED = (pipe, folder, device, link_to_pipe, dangling)
KINDS = (*LISTED, *NOT_LISTED)


def png_header(width: int, height: int, depth: int = 8, kind: int = 2) -> bytes:
    """The start of a PNG, before any pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + name + content + check

    sides = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    palette = chunk(b"PLTE", bytes(768)) if kind == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", sides + bytes([depth, kind, 0, 0, 0]))
        + palette
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )


def images_of(data: Path, task: str, part: str, name: str = "") -> list[Path]:
    """The images of a part, or of a class of it."""
    return sorted((data / "labelled" / part / name).rglob("*.jpg"))


# One image of many


REASONS = {
    empty: "(no image of a format that is known)",
    cut: "(cut short)",
    bomb: "(4294836225 pixels, more than --max_pixels 178956970)",
    sparse: "(107374182400 bytes, more than",
}


def reading(command: str, models: dict[str, Path], out: Path) -> tuple[list[Any], Path]:
    """A command that reads images, and where it writes to."""
    if command == "pretrain":
        words = ["--backbone", "test_resnet", *SHORT, *BACKBONE, "--batch_size", 12]
    elif command in ("embed", "explore"):
        out = out.with_suffix(".npz" if command == "embed" else ".html")
        words = [*ENCODER, "--image_size", 32]
    else:
        words = ["--model", models[command]]
    return ["predict" if command in TASKS else command, *words, "--out", out], out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "embed", "explore", *TASKS])
def test_bad_images_are_skipped_and_named_with_the_reason(
    command: str,
    data: Path,
    tmp_path: Path,
    models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One of each kind; a pretraining bears fewer."""
    source = data / "unlabelled"
    kinds = (cut, bomb, pipe) if command == "pretrain" else KINDS
    bad = dict(zip(kinds, sorted(source.iterdir()), strict=False))
    for kind, file in bad.items():
        kind(file)
    words, out = reading(command, models, tmp_path / "out")
    status, shown = ends_well(*words, "--data", source, capsys=capsys)
    assert status == 0
    output = " ".join(shown.split())
    for kind, file in bad.items():
        if kind in LISTED:
            assert f"skipped, can't be read: {file} {REASONS[kind]}" in output
    links = [file for kind, file in bad.items() if kind not in (*LISTED, folder)]
    count = f"no regular files but pipes, devices or links to nothing: {len(links)}, the first"
    assert count in output
    assert any(f"{count} {file}" in output for file in links)
    left = 24 - len(bad)
    if command == "classification":
        assert len((out / "predictions.csv").read_text().splitlines()) == 1 + left
    elif command == "detection":
        assert len(json.loads((out / "predictions.json").read_text())["images"]) == left
    elif command == "segmentation":
        assert len(list((out / "masks").iterdir())) == left
    elif command == "embed":
        assert len(np.load(out)["paths"]) == left


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "embed", "explore", *TASKS])
def test_bad_images_alone_are_one_line_of_error(
    command: str,
    data: Path,
    tmp_path: Path,
    models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = data / "unlabelled"
    for kind in (cut, bomb, pipe):
        words, _ = reading(command, models, tmp_path / kind.__name__)
        shutil.rmtree(source)
        source.mkdir()
        for number in range(12):
            (source / f"{number}.jpg").write_bytes(png_header(8, 8))
            kind(source / f"{number}.jpg")
        status, shown = ends_well(*words, "--data", source, capsys=capsys)
        assert status == 2
        output = "none of 12 images can be read" if kind in LISTED else "no images found in"
        assert output in shown, kind
        assert "kinds" not in shown


# A class or a part of labelled data


def evaluation(command: str, data: Path, out: Path) -> list[Any]:
    more = {
        "probe": ENCODER,
        "finetune": [*ENCODER, *SHORT],
        "compare": ["--encoder", "random:test_resnet", "random:test_vit", "--fractions", 1],
    }[command]
    return [command, "--data", data / "labelled", *more, *BACKBONE, "--out", out]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["probe", "finetune", "compare"])
@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_class_or_a_part_that_can_not_be_read(
    part: str, command: str, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a class alone, and of all; cut short, and no files."""
    for number, (kind, whole) in enumerate([(pipe, False), (cut, False), (cut, True)]):
        data = Path(shutil.copytree(sample, tmp_path / f"data{number}"))
        classes = sorted(path.name for path in (data / "labelled" / part).iterdir())
        for file in images_of(data, "classification", part, "" if whole else classes[3]):
            kind(file)
        out = tmp_path / f"out{number}"
        status, shown = ends_well(*evaluation(command, data, out), capsys=capsys)
        if kind is pipe and part == "train":
            assert f"have the class {classes[3]!r}, which no training image has" in shown
            assert status == 2
        elif kind is pipe:
            assert f"Folders without images, skipped: {part}/{classes[3]}" in shown
            assert status == 0
        elif whole:
            assert f"{part} images can be read, the first" in shown
            assert status == 2
        elif part == "train":
            assert f"none of 2 training images of the class {classes[3]} can be read" in shown
            assert status == 2
        else:
            assert status == 0
            results = json.loads((out / "results.json").read_text())
            assert results["test_images"] == (9 if part == "test" else 10)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["probe", "finetune", "compare"])
def test_one_class_left_of_two(
    command: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = sorted(path.name for path in (data / "labelled" / "train").iterdir())
    for part in ("train", "val", "test"):
        for name in classes[2:]:
            shutil.rmtree(data / "labelled" / part / name)
    for file in images_of(data, "classification", "train", classes[0]):
        cut(file)
    status, shown = ends_well(*evaluation(command, data, tmp_path / "out"), capsys=capsys)
    assert status == 2
    assert f"training images of the class {classes[0]} can be read" in shown


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_part_of_detection_or_segmentation_data(
    task: str, part: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in (cut, gone):
        for file in images_of(data, task, part):
            kind(file)
        out = tmp_path / kind.__name__
        words = [*task_options(task, data), *ENCODER, *SHORT, *BACKBONE, "--out", out]
        status, shown = ends_well("finetune", *words, capsys=capsys)
        if part == "train" or kind is cut:
            assert status == 2
        else:  # the part is made
            assert status == 0
            assert f"No {'validation' if part == 'val' else 'test'} part was found" in shown
            assert "10 " in shown


@pytest.mark.slow
@pytest.mark.parametrize("what", ["mask", "annotations"])
def test_masks_and_annotations(
    what: str, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for kind in (one for one in (*KINDS, gone) if one is not sparse):
        data = Path(shutil.copytree(sample, tmp_path / kind.__name__))
        if what == "mask":
            kind(sorted((data / "masks" / "train").rglob("*.png"))[3])
            words = task_options("segmentation", data)
        else:
            kind(data / "annotations" / "train.json")
            words = task_options("detection", data)
        words += [*ENCODER, *SHORT, *BACKBONE, "--out", out]
        left_out = what == "mask" and kind in (*NOT_LISTED, gone)  # together with its image
        assert ends_well("finetune", *words, capsys=capsys)[0] == (0 if left_out else 2), kind
        assert out.exists() == left_out
        shutil.rmtree(out, ignore_errors=True)


# Images that go while a command runs


class Unmount:
    """Lets so many files be opened; then none is there any more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.left = 0, 10**9
        really = files._open

        def unless_gone(path: Any) -> tuple[int, int]:
            self.opened += 1
            if self.opened > self.left:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
            return really(path)

        monkeypatch.setattr(files, "_open", unless_gone)


@pytest.fixture
def unmount(monkeypatch: pytest.MonkeyPatch) -> Unmount:
    return Unmount(monkeypatch)


STEPS = 3
COMMANDS: dict[str, Callable[[Path, dict[str, Path]], list[Any]]] = {
    "pretrain": lambda data, models: [
        "pretrain", "--data", data / "unlabelled", "--backbone", "test_resnet", *SHORT, *BACKBONE,
        "--batch_size", 6, "--probe_data", data / "labelled",
    ],
    "probe": lambda data, models: evaluation("probe", data, Path())[:-2],
    "compare": lambda data, models: evaluation("compare", data, Path())[:-2],
    "embed": lambda data, models: [
        "embed", "--data", data / "unlabelled", *ENCODER, "--image_size", 32, "--format", "npz",
    ],
    "explore": lambda data, models: [
        "explore", "--data", data / "unlabelled", *ENCODER, "--image_size", 32,
    ],
}  # fmt: skip
for _task in TASKS:
    COMMANDS[f"finetune {_task}"] = lambda data, models, task=_task: [
        "finetune", *task_options(task, data), *ENCODER, *SHORT, *BACKBONE,
    ]  # fmt: skip
    COMMANDS[f"predict {_task}"] = lambda data, models, task=_task: [
        "predict", "--model", models[task], "--data", data / "unlabelled", "--pictures", 3,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_unmounted_while_a_command_runs(
    command: str,
    sample: Path,
    models: dict[str, Path],
    unmount: Unmount,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = COMMANDS[command](sample, models)
    suffix = ".html" if command == "explore" else ""
    out = ["--out", tmp_path / f"whole{suffix}"]
    assert ends_well(*words, *out, capsys=capsys)[0] == 0
    opened = unmount.opened
    assert opened >= 24
    for step in range(STEPS + 1):
        unmount.opened, unmount.left = 0, opened * step // STEPS
        out = ["--out", tmp_path / f"{step}{suffix}"]
        status, shown = ends_well(*words, *out, capsys=capsys)
        if step == 0:
            assert status == 2
            assert "No such file or directory" in shown or "0 images not readable" in shown
        if step == STEPS:
            assert status == 0


@pytest.mark.slow
def test_a_model_is_there_though_the_test_images_have_gone(
    sample: Path, unmount: Unmount, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vissl_lite.transfer.classification.task import Classification

    evaluate = Classification.evaluate

    def vanish_and_evaluate(self: Classification, *given: Any) -> Any:
        unmount.left = 0
        return evaluate(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "evaluate", vanish_and_evaluate)
        words = COMMANDS["finetune classification"](sample, {})
        status, shown = ends_well(*words, "--out", tmp_path / "run", capsys=capsys)
    assert status == 2
    assert "none of 10 images can be read" in shown
    unmount.left = 10**9
    assert run("predict", "--model", tmp_path / "run", "--data", sample / "unlabelled",
               "--out", tmp_path / "use") == 0  # fmt: skip
