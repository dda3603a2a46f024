import csv
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import blobs
from vissl_lite.data.fingerprints import fingerprints_of
from vissl_lite.errors import UserError
from vissl_lite.leakage.matching import Leaks, Policy, check_leaks, seen_by

Parts = dict[str, list[str]]


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """The package's log, whether or not a run was open before."""
    logger = logging.getLogger("vissl_lite")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.DEBUG, "vissl_lite")
    return caplog


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """Ten, four and six images, all different."""
    parts: Parts = {}
    seed = 0
    for name, count in (("train", 10), ("val", 4), ("test", 6)):
        (tmp_path / name).mkdir()
        parts[name] = [str(tmp_path / name / f"{index}.png") for index in range(count)]
        for path in parts[name]:
            blobs(seed).save(path)
            seed += 1
    return parts


def check(parts: Parts, leaks: Policy = "warn", seen: Sequence[str] | None = None) -> Leaks:
    known = {"runs/a": None if seen is None else fingerprints_of(seen)}
    return check_leaks(parts, known, leaks, Path("run/leaks.csv"))


def test_without_leaks_nothing_is_said(
    parts: Parts, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    found = check(parts, "error", parts["train"])
    assert (found.found, found.count, found.figures()) == ([], 0, {"leaks": 0})
    found.write(tmp_path)
    assert not (tmp_path / "leaks.csv").exists()
    assert log.messages == []


@pytest.mark.slow
def test_every_place_is_looked_at(
    parts: Parts, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    shutil.copy(parts["test"][0], pool / "copy.png")
    blobs(15, 60, 72).save(pool / "again.jpg", quality=50)  # test image 1
    shutil.copy(parts["val"][0], pool / "held_out.png")
    shutil.copy(parts["train"][3], parts["test"][2])
    shutil.copy(parts["val"][1], parts["test"][3])
    shutil.copy(parts["train"][4], parts["val"][2])
    found = check(parts, seen=[*parts["train"], *map(str, sorted(pool.iterdir()))])
    rows = [
        (one.part, Path(one.path).name, one.where, Path(one.twin).name, one.kind)
        for one in found.found
    ]
    assert rows == [
        ("test", "0.png", "pretraining", "copy.png", "exact"),
        ("test", "1.png", "pretraining", "again.jpg", "similar"),
        ("test", "2.png", "pretraining", "3.png", "exact"),
        ("test", "2.png", "train", "3.png", "exact"),
        ("test", "3.png", "val", "1.png", "exact"),
        ("val", "0.png", "pretraining", "held_out.png", "exact"),
        ("val", "2.png", "pretraining", "4.png", "exact"),
        ("val", "2.png", "train", "4.png", "exact"),
    ]
    assert found.count == 4
    assert found.left_out == {"test": set(), "val": set()}
    assert [record.levelname for record in log.records] == ["INFO", "WARNING"]
    assert (
        log.messages[0]
        == "Validation images among the images that the encoder was trained on, as is usual: 2"
    )
    for words in (
        "3 test images are among the images that the encoder was trained on (2 exact, 1 similar)",
        "1 test image is in the training part (1 exact)",
        "1 test image is in the validation part (1 exact)",
        "1 validation image is in the training part (1 exact)",
        "run/leaks.csv",
    ):
        assert words in log.messages[1]
    found.write(tmp_path)
    with (tmp_path / "leaks.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 8
    assert written[1]["encoder"] == "runs/a"
    assert written[1]["twin"] == str(pool / "again.jpg")
    assert 0.94 <= float(written[1]["similarity"]) <= 1


@pytest.mark.slow
def test_exclude_leaves_out_what_makes_the_parts_overlap(parts: Parts) -> None:
    shutil.copy(parts["train"][3], parts["test"][2])
    shutil.copy(parts["val"][1], parts["test"][3])  # the validation image goes
    shutil.copy(parts["train"][4], parts["val"][2])
    found = check(parts, "exclude", [parts["test"][5], parts["val"][3]])
    assert found.left_out == {
        "test": {parts["test"][2], parts["test"][5]},
        "val": {parts["val"][1], parts["val"][2]},
    }
    assert found.figures() == {"leaks": 3, "leaks_left_out": {"test": 2, "val": 2}}
    rest = {
        name: [p for p in paths if p not in found.left_out.get(name, ())]
        for name, paths in parts.items()
    }
    assert [one.where for one in check(rest, seen=[parts["test"][5]]).found] == []


@pytest.mark.parametrize(
    ("listed", "words"),
    [(Path("a/leaks.csv"), "images; all are listed in a/leaks.csv."), (None, "images.")],
)
def test_a_list_is_named_if_there_is_one(
    listed: Path | None, words: str, parts: Parts, log: pytest.LogCaptureFixture
) -> None:
    shutil.copy(parts["train"][3], parts["test"][2])
    check_leaks(parts, {}, "exclude", listed)
    assert log.messages[-1].endswith(f"Left out: 1 test and 0 validation {words}")


@pytest.mark.slow
def test_held_out_images_among_the_unlabelled_ones_are_no_error(
    parts: Parts, log: pytest.LogCaptureFixture
) -> None:
    found = check(parts, "error", [*parts["train"], *parts["val"]])
    assert (found.count, len(found.found)) == (0, 4)
    assert [record.levelname for record in log.records] == ["INFO"]
    assert check(parts, "exclude", parts["val"]).left_out == {"test": set(), "val": set()}


def test_an_error_names_how_many_and_the_first(parts: Parts) -> None:
    for index in (1, 4):
        shutil.copy(parts["train"][index], parts["test"][index])
    with pytest.raises(UserError) as error:
        check(parts, "error")
    message = str(error.value)
    assert "2 test images are in the training part" in message
    assert f"the first {parts['test'][1]} ({parts['train'][1]})" in message
    assert "--leaks exclude" in message
    assert "\n" not in message


def test_excluding_everything_is_refused(parts: Parts) -> None:
    with pytest.raises(UserError, match="leaves no test image: 6 test images are among"):
        check(parts, "exclude", parts["test"])


def test_excluding_all_but_an_unreadable_image_is_refused(parts: Parts) -> None:
    seen = fingerprints_of(parts["test"])
    Path(parts["test"][0]).write_bytes(b"no image")
    with pytest.raises(UserError, match="leaves no test image: 5 test images are among"):
        check_leaks(parts, {"run": seen}, "exclude", None)


def test_encoders_are_told_apart(parts: Parts) -> None:
    shutil.copy(parts["train"][0], parts["test"][0])
    seen = {"a": fingerprints_of(parts["test"][:3]), "b": fingerprints_of(parts["test"][5:])}
    found = check_leaks(parts, {**seen, "timm:c": None}, "warn", Path("leaks.csv"))
    assert [found.count_of(name) for name in ("a", "b", "timm:c")] == [3, 2, 1]
    assert found.count == 4


def test_empty_parts_and_broken_images_are_no_obstacle(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    copied = {
        "train": [*parts["train"], str(tmp_path / "broken.png")],
        "val": [],
        "test": [str(tmp_path / "broken.png"), parts["train"][0]],
    }
    assert check(copied).count == 1


def test_what_an_encoder_has_seen_lies_in_its_run(parts: Parts, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "encoder").mkdir(parents=True)
    (run / "other").mkdir()
    assert seen_by(str(run)) is None
    fingerprints_of(parts["val"]).save(run / "fingerprints.npz")
    for source in (run, run / "encoder"):
        seen = seen_by(str(source))
        assert seen is not None
        assert seen.paths == parts["val"]
    for source in ("timm:resnet18", "random:resnet18", str(run / "other"), "nowhere"):
        assert seen_by(source) is None
    (run / "fingerprints.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="damaged"):
        seen_by(str(run / "encoder"))
