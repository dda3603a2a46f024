"""Run folders whose files are damaged: checkpoints, results, logs, metrics, arrays."""

import copy
import csv
import json
import logging
import math
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from tampering import DELETED, TEXTS, Tried, changed, damaged, places
from torch import Tensor, nn

from vissl_lite.cli import main
from vissl_lite.commands.runs import summarize
from vissl_lite.comparison.protocols import Score
from vissl_lite.comparison.store import Cell, Store
from vissl_lite.data.fingerprints import EXACT_BYTES, LOOK_BYTES, Fingerprints
from vissl_lite.data.images import find_images
from vissl_lite.data.npz_file import read_npz
from vissl_lite.data.stream import Batch, ViewDataset
from vissl_lite.data.views import Views, random_crop
from vissl_lite.errors import UserError
from vissl_lite.evaluation.embedding import ImageMap
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.report import run_report
from vissl_lite.report.run_report import write_report
from vissl_lite.run import read_config
from vissl_lite.run_record import RunRecord, WarningRecord, read_record
from vissl_lite.training.fit import TrainingFiles, fit
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData

JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)

# Checkpoints


class Small(pl.LightningModule):
    """A convolution and a norm."""

    def __init__(self, width: int = 2, optimizer: str = "AdamW") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.optimizer = optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = (self.net(batch.views[0].float()) - 1).square().mean()
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind: Any = getattr(torch.optim, self.optimizer)
        more = {"momentum": 0.9} if self.optimizer == "SGD" else {}
        return kind(self.parameters(), lr=1e-3, **more)


class SaveHalfway(Callback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.file)


def train(photos: Path, folder: Path, resume: bool, module: pl.LightningModule | None = None,
          callbacks: tuple[Callback, ...] = ()) -> pl.LightningModule:  # fmt: skip
    schedule = Schedule(1e-3, 0.1, 0, 6)
    views = Views([[random_crop(16, 0.3)]], shortest=16)
    data = StreamData(ViewDataset(find_images([photos]), views, 0), 4, 1, schedule, workers=0)
    module = module or Small()
    files = TrainingFiles(None, folder, resume)
    fit(module, data, schedule, Hardware("32-true", devices=1), callbacks, files)
    return module


@pytest.fixture(scope="module")
def halfway(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint after three of six steps."""
    folder = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    train(photos, folder, False, callbacks=(SaveHalfway(folder / "half.ckpt"),))
    return (folder / "half.ckpt").read_bytes()


@pytest.fixture
def checkpoint(halfway: bytes, tmp_path: Path) -> Path:
    (tmp_path / "last.ckpt").write_bytes(halfway)
    return tmp_path / "last.ckpt"


def resuming(photos: Path, checkpoint: Path, module: Callable[[], Any] = Small) -> Tried:
    whole = checkpoint.read_bytes()

    def resume() -> None:
        content = checkpoint.read_bytes()
        try:
            trained = train(photos, checkpoint.parent, True, module())
        except UserError:
            assert checkpoint.read_bytes() == content  # as it was
            raise
        finally:
            checkpoint.write_bytes(whole)
        assert all(one.isfinite().all() for one in trained.state_dict().values())

    return Tried(resume)


TENSORS: tuple[Any, ...] = (torch.zeros(0), torch.zeros(2, 2, 2), torch.tensor(math.nan),
                            torch.tensor([1]), torch.tensor(1j))  # fmt: skip
SENSELESS: tuple[Any, ...] = (None, True, -1, 10**12, 10**30, math.nan, math.inf, "text", [], {},
                              [[]], ["x"], {"a": 1}, *TENSORS)  # fmt: skip


@pytest.mark.slow
def test_what_a_checkpoint_says_is_refused_or_works(photos: Path, checkpoint: Path) -> None:
    whole = torch.load(checkpoint, weights_only=True)
    tried = resuming(photos, checkpoint)
    cases = ((place, value) for place in places(whole) for value in (DELETED, *SENSELESS))
    for place, value in islice(cases, 0, None, 41):
        torch.save(changed(whole, place, value), checkpoint)
        tried(f"{place} {value!r:.40}")
    assert tried("as it was")
    assert tried.counts["refused"] > 20, tried.counts


@pytest.mark.slow
def test_bytes_of_a_checkpoint_are_refused_or_work(photos: Path, checkpoint: Path) -> None:
    tried = resuming(photos, checkpoint)
    for what, content in damaged(checkpoint.read_bytes(), flips=6):
        checkpoint.write_bytes(content)
        tried(what)
    for text in TEXTS:
        checkpoint.write_bytes(text)
        assert not tried(str(text[:40]))


@pytest.mark.parametrize(
    "other", [lambda: Small(3), lambda: Small(optimizer="SGD"), lambda: nn_module()]
)
def test_a_checkpoint_of_another_training_is_refused(
    other: Callable[[], Any], photos: Path, checkpoint: Path
) -> None:
    assert not resuming(photos, checkpoint, other)("another training")


def nn_module() -> Small:
    module = Small()
    module.net.append(nn.Conv2d(2, 2, 1))
    return module


# The report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with all that a report reads."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"data": ["images"], "pretext": {"name": "simclr"}, "backbone": "x", "lr": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    results = {
        "loss": 1.0, "steps": 3, "epochs": 1.5, "seconds": 4.0, "collapsed": False,
        "stopped": None, "warnings": ["one"], "test": {"top1": 0.5}, "knn": 0.5, "linear": 0.5,
        "layers": {"layer1": {"knn": 0.2, "linear": 0.3}}, "classes": ["cat", "dog"],
        "per_class": {"cat": {"f1": 0.5}, "dog": {"f1": 0.4}}, "leaks": 1, "baseline": "b",
        "scores": {"kNN": {"untrained": [0.1, 0.2], "pre-trained": [0.3]}}, "left_out": {"a": "b"},
        "protocols": {"knn": {
            "metric": "accuracy", "amounts": ["1%"],
            "arms": {"a": {"1%": {"mean": 0.4, "std": 0.1, "runs": [0.4], "labels": 15}}},
            "differences": {"a": {"1%": {"mean": 0.1, "low": 0.0, "high": 0.2},
                                  "overall": {"mean": 0.1, "low": 0.0, "high": 0.2}}},
            "verdicts": {"a": {"verdict": "helped", "sentence": "a helped"}},
            "layers": {"a": {"layer1": {"1%": 0.4}}}}},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "log.txt").write_text("2026-11-23 16:40:01,000 WARNING skipped: /a.png\n")
    RunRecord(
        "pretrain", "finished", None, "2026-11-23T16:40:00+00:00", 4.0, "0.1.0", {"torch": "2.15"},
        [WarningRecord("image.unreadable", "skipped: /a.png", {"path": "/a.png"})],
    ).write(folder)  # fmt: skip
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "seconds", "loss"])
        rows.writerows([[step, step / 10, 5 - step] for step in range(4)])
    (folder / "leaks.csv").write_text(
        "part,path,where,encoder,twin,kind,similarity\ntest,/a,train,,/b,exact,1.0\n"
    )
    an_image_map().save(folder / "map.npz")
    return folder


def an_image_map(count: int = 4) -> ImageMap:
    near = np.array([[(i + 1) % count, (i + 2) % count] for i in range(count)])
    return ImageMap(
        paths=[f"/images/{i}.png" for i in range(count)],
        labels=np.arange(count) % 2,
        classes=["cat", "dog"],
        coordinates={"pca": np.random.default_rng(0).random((count, 2)).astype(np.float32)},
        neighbors=near,
        similarities=np.ones((count, 2), np.float32),
        outlier_score=np.ones(count, np.float32),
        duplicates=np.array([[0, 1]]),
        thumbnails=[b"jpeg"] * count,
    )


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are made, but not written: Bokeh's own code is a megabyte each time."""
    monkeypatch.setattr(run_report, "write_page", lambda *_, **__: None)


@pytest.mark.slow
@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize("name", ["results.json", "run.json"])
def test_a_report_is_made_of_what_can_be_read(name: str, run: Path) -> None:
    """Whatever a file holds: the report is written, and damage is reported."""

    def report_and_list() -> None:
        write_report(run)
        summarize(run)

    tried = Tried(report_and_list)
    content = json.loads((run / name).read_bytes())
    cases = ((p, v) for p in places(content) for v in (DELETED, *SENSELESS[:13]))
    for place, value in islice(cases, 0, None, 13):
        (run / name).write_text(json.dumps(changed(content, place, value)))
        assert tried(f"{name}: {place} {value!r:.40}")


@pytest.mark.slow
@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(
    "name",
    [
        "results.json",
        "run.json",
        "log.txt",
        "metrics.csv",
        "map.npz",
        "leaks.csv",
        "config.yaml",
    ],
)
def test_a_report_leaves_damaged_files_out(name: str, run: Path) -> None:
    whole = (run / name).read_bytes()
    tried = Tried(lambda: write_report(run))
    for text in (*TEXTS[::3], b"\xff" * 100, b"9999-99-99 99:99:99,000 WARNING x\n",
                 b"step,step\n1,2\n",
                 b"step,seconds,loss\n1,1,1e999\n\x00,\x00\n1e30,nan,x\n"):  # fmt: skip
        (run / name).write_bytes(text)
        assert tried(f"{name}: {text[:40]!r}")
    for what, content in islice(damaged(whole, flips=2), 0, None, 4):
        (run / name).write_bytes(content)
        assert tried(f"{name}: {what}")
    (run / name).unlink()
    assert tried(f"{name} missing")
    (run / name).mkdir()
    assert tried(f"{name} is a folder")


@pytest.mark.slow
@pytest.mark.usefixtures("unwritten")
@given(JSON_LIKE)
def test_any_results_give_a_report(run: Path, content: Any) -> None:
    (run / "results.json").write_text(json.dumps(content))
    write_report(run)


@pytest.mark.slow
@pytest.mark.usefixtures("unwritten")
@given(st.binary() | JSON_LIKE.map(lambda one: yaml.safe_dump(one).encode("utf-8", "replace")))
def test_any_config_is_refused_or_read(run: Path, content: bytes) -> None:
    (run / "config.yaml").write_bytes(content)
    Tried(lambda: read_config(run))(repr(content))
    write_report(run)


def test_yaml_that_stands_for_more_is_refused(run: Path) -> None:
    tried = Tried(lambda: read_config(run))
    for text in (
        "a: &a [*a, *a]",
        "a: &a {b: *a}",
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
        "a: " + "9" * 400,
        "a: " + "9" * 5000,
        "- " * 50_000,
        "a: !!python/object/apply:os.system [ls]",
    ):
        (run / "config.yaml").write_text(text)
        assert not tried(text[:40])


def test_a_record_says_what_can_be_read_of_it(run: Path) -> None:
    record = read_record(run)
    assert record is not None
    assert [one.message for one in record.warnings] == ["skipped: /a.png"]
    content = json.loads((run / "run.json").read_text())
    content |= {"started": "yesterday", "seconds": float("nan")}
    content["warnings"] += [3, {"code": "leak"}]
    (run / "run.json").write_text(json.dumps(content))
    read = read_record(run)
    assert read is not None
    assert (read.start(), read.seconds, read.warnings) == (None, 0.0, record.warnings)
    (run / "run.json").write_text(json.dumps({**content, "status": "asleep"}))
    assert read_record(run) is None


def test_damaged_rows_of_metrics_are_left_out_and_said(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = run / "metrics.csv"
    whole = file.read_bytes()
    tried = Tried(lambda: MetricsFile(file).drop_after(2))
    for text in (*TEXTS, b"step\n1\n", b"step,seconds\nx,1\n", b"step,seconds\n1,x\n,\n"):
        file.write_bytes(text)
        assert tried(str(text[:40]))
    for what, content in damaged(whole):
        file.write_bytes(content)
        assert tried(what)
    file.write_bytes(whole + b"nan,1,2\n5,inf,3\n6,0.9\n7,0.9,0.1\n8,0.")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        metrics = MetricsFile(file)
    assert metrics.series("loss") == ([0, 1, 2, 3, 7], [5, 4, 3, 2, 0.1])
    assert "3 damaged rows of" in caplog.text


# Arrays


ARRAYS: tuple[Any, ...] = (
    np.zeros(0), np.zeros((0, 2)), np.zeros(()), np.array(["x"]), np.array([""] * 4), np.zeros(4),
    np.full(4, np.nan), np.full(4, 10**12), np.full((4, 2), -1), np.zeros((4, 2), complex),
    np.zeros(4, "V3"), np.zeros(4, "M8[s]"), np.array([1, 2, 3]), np.ones((4, 2), bool),
    np.full((4, 2), np.inf, np.float32), np.array(["/a", "b", "c", "d"]),
)  # fmt: skip


def sweep_arrays(file: Path, tried: Tried) -> None:
    with np.load(file) as opened:
        whole = dict(opened)
    for name in whole:
        np.savez(file, **{key: value for key, value in whole.items() if key != name})
        tried(f"{name} missing")
        for value in ARRAYS:
            np.savez(file, **{**whole, name: value})
            tried(f"{name} {value.dtype} {value.shape}")
        np.savez(file, **{**whole, name: np.array([{}], object)})
        assert not tried(f"{name} pickled")
    np.savez(file, **whole)
    content = file.read_bytes()
    for what, bad in damaged(content, flips=12):
        file.write_bytes(bad)
        tried(what)
    for text in TEXTS:
        file.write_bytes(text)
        assert not tried(str(text[:40]))
    file.write_bytes(content)
    assert tried("as it was")


@pytest.mark.slow
def test_a_map_is_refused_or_works(run: Path) -> None:
    from vissl_lite.report.map import map_layout

    tried = Tried(lambda: map_layout(ImageMap.load(run / "map.npz"), explore=True))
    sweep_arrays(run / "map.npz", tried)


@pytest.mark.slow
def test_fingerprints_are_refused_or_work(tmp_path: Path) -> None:
    file = tmp_path / "fingerprints.npz"
    rows = np.random.default_rng(0).integers(0, 256, (4, EXACT_BYTES + LOOK_BYTES), np.uint8)
    prints = Fingerprints.of(rows, list("abcd"))
    prints.save(file)
    tried = Tried(lambda: Fingerprints.load(file).join(prints))
    sweep_arrays(file, tried)


def bombs(folder: Path) -> Iterator[Path]:
    """Small files that would become large ones."""
    zeros = folder / "zeros.npz"
    packed = zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED)
    with packed as out, out.open("exact.npy", "w") as one:
        np.lib.format.write_array_header_1_0(
            one, {"descr": "|u1", "fortran_order": False, "shape": (2**29,)}
        )
        for _ in range(2**5):
            one.write(bytes(2**24))
    yield zeros
    for number, shape in enumerate([(2**62,), (10**9, 10**9), (2**40,), (10**30,), (-1,)]):
        promise = folder / f"promise{number}.npz"
        with zipfile.ZipFile(promise, "w") as out, out.open("exact.npy", "w") as one:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(one, header)
        yield promise
    nothing = folder / "nothing.npz"
    with zipfile.ZipFile(nothing, "w") as out, out.open("exact.npy", "w") as one:
        header = {"descr": "|V0", "fortran_order": False, "shape": (10**12,)}
        np.lib.format.write_array_header_1_0(one, header)
    yield nothing


@pytest.mark.slow
def test_npz_files_that_would_grow_are_refused(tmp_path: Path) -> None:
    for file in bombs(tmp_path):
        assert file.stat().st_size < 2**21
        tried = Tried(lambda file=file: read_npz(file))  # type: ignore[misc]
        assert not tried(file.name)
        assert not Tried(lambda file=file: read_npz(file, 2**28))(file.name)  # type: ignore[misc]


# Comparisons


@pytest.mark.slow
@pytest.mark.parametrize("per_image", [np.array([True, False, True]), np.array([0.5, -0.1, 1.25])])
def test_a_damaged_cell_is_done_again_and_said(
    per_image: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, about = Store(tmp_path), {"weights": "abc"}
    cell = Cell("runs/a", "knn", "1%", 0)
    score = Score(0.5, {"accuracy": 0.5}, {"penalty": 0.1}, per_image, {"layer1": 0.2})
    store.save(cell, score, about)
    file = store.path(cell).with_suffix(".json")
    whole = file.read_bytes()

    def load() -> None:
        found = store.load(cell, about)
        if found is None:
            raise UserError("is done again")
        assert all(isinstance(v, int | float) for v in found.metrics.values())
        assert isinstance(found.value, int | float)
        parts = found.per_image
        assert parts is None or parts.dtype == bool or np.isfinite(parts).all()

    tried = Tried(load)
    tried.sweep_json(file)
    tried.sweep_bytes(file)
    assert tried.counts["refused"] > 100
    caplog.clear()
    file.write_bytes(whole[:50])
    assert store.load(cell, about) is None
    assert "damaged, will be run again" in caplog.text
    caplog.clear()
    file.unlink()
    assert store.load(cell, about) is None
    assert not caplog.text


# Through the command line


@pytest.mark.slow
def test_report_and_resume_refuse_or_say_damage(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "results.json").write_bytes(b"\xff\xfe")
    assert main(["report", str(run)]) == 0
    assert "results.json is damaged" in (run / "report.html").read_text(encoding="utf-8")
    out = str(tmp_path / "trained")
    small = ["--backbone", "test_resnet", "--image_size", "32", "--epochs", "1"]
    small += ["--num_workers", "0", "--logger", "none"]
    assert main(["pretrain", "--data", str(photos), "--out", out, *small]) == 0
    for name, content in (
        ("results.json", b"{}"),
        ("results.json", b"\xff\xfe"),
        ("config.yaml", b"a: [1"),
        ("checkpoints/last.ckpt", b"PK"),
    ):
        file = tmp_path / "trained" / name
        whole = file.read_bytes()
        if name.startswith("checkpoints"):  # as if it had been stopped
            record = tmp_path / "trained" / "run.json"
            record.write_text(record.read_text().replace('"finished"', '"stopped"'))
            (tmp_path / "trained" / "results.json").unlink()
        file.write_bytes(content)
        capsys.readouterr()
        assert main(["pretrain", "--out", out, "--resume"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert file.name in lines[-1]
        file.write_bytes(whole)


def test_changed_at_one_place() -> None:
    """The tools themselves."""
    content = {"a": [1, {"b": 2}]}
    before = copy.deepcopy(content)
    assert changed(content, ("a", 1, "b"), 7) == {"a": [1, {"b": 7}]}
    assert changed(content, ("a", 0), DELETED) == {"a": [{"b": 2}]}
    assert content == before
    assert list(places(content)) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b")]
