"""The leak guard through the command line."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vissl_lite.cli import main
from vissl_lite.commands.leaks import guard
from vissl_lite.data.fingerprints import (
    EXACT_BYTES,
    LOOK_BYTES,
    Fingerprints,
    fingerprints_of,
)
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.errors import UserError
from vissl_lite.transfer.classification.data import load_labelled
from vissl_lite.transfer.segmentation.data import load_masks
from vissl_lite.transfer.trained_on import save_trained_on

COLORS = ("blue", "red")


def stripes(seed: int, color: str) -> Image.Image:
    """Two classes that a color tells apart, in pictures that are all different."""
    coarse = np.random.default_rng(seed).integers(0, 120, (6, 6, 3), dtype=np.uint8)
    coarse[..., 0 if color == "red" else 2] += 120
    return Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten training and five test images of each class; of these, one is a copy of a training image
    under the other's label, one a flipped one that is encoded anew."""
    folder = tmp_path / "data"
    seed = 0
    for part, count in (("train", 10), ("test", 5)):
        for color in COLORS:
            (folder / part / color).mkdir(parents=True)
            for index in range(count):
                stripes(seed, color).save(folder / part / color / f"{index}.png")
                seed += 1
    shutil.copy(folder / "train" / "red" / "3.png", folder / "test" / "blue" / "0.png")
    twin = Image.open(folder / "train" / "blue" / "7.png")
    (folder / "test" / "red" / "4.png").unlink()
    twin.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
        folder / "test" / "red" / "4.jpg", quality=50
    )
    return folder


def probe(data: Path, out: Path, *options: object) -> int:
    given = ["--encoder", "random:test_resnet", "--data", data, "--out", out, *options]
    return main(["probe", *map(str, given)])


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def listed(run: Path) -> list[dict[str, str]]:
    with (run / "leaks.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_by_default_leaks_are_counted_listed_and_warned_of(data: Path, tmp_path: Path) -> None:
    assert probe(data, tmp_path / "run") == 0
    assert results(tmp_path / "run")["leaks"] == 2
    assert results(tmp_path / "run")["test_images"] == 10
    rows = [row for row in listed(tmp_path / "run") if row["part"] == "test"]
    assert [(Path(row["path"]).name, row["kind"], Path(row["twin"]).name) for row in rows] == [
        ("0.png", "exact", "3.png"),
        ("4.jpg", "similar", "7.png"),
    ]
    log = (tmp_path / "run" / "log.txt").read_text()
    (line,) = [line for line in log.splitlines() if str(tmp_path / "run" / "leaks.csv") in line]
    assert " WARNING Leaks: 2 test images are in the " in line


@pytest.mark.slow
def test_excluding_them_changes_the_figures(data: Path, tmp_path: Path) -> None:
    assert probe(data, tmp_path / "with") == 0
    assert probe(data, tmp_path / "without", "--leaks", "exclude") == 0
    leaky, clean = results(tmp_path / "with"), results(tmp_path / "without")
    assert clean["leaks"] == 2
    assert clean["leaks_left_out"] == {"test": 2, "val": 0}
    assert clean["test_images"] == 8
    assert clean["knn"] == 1.0  # the leaks have the wrong labels
    assert leaky["knn"] < 1.0
    names = [row["path"] for row in csv.DictReader((tmp_path / "without" / "split.csv").open())]
    assert not any(name.endswith(("test/blue/0.png", "test/red/4.jpg")) for name in names)
    assert len(listed(tmp_path / "without")) == len(listed(tmp_path / "with"))


@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_an_error_stops_before_anything_is_written(
    command: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = ["--encoder", "random:test_resnet", "--data", data, "--out", out, "--leaks", "error"]
    assert main([command, *map(str, given)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vissl-lite: 2 test images are in the ")
    assert error.count("\n") == 1
    assert str(data / "test" / "blue" / "0.png") in error
    assert not out.exists()


def test_an_unknown_policy_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe(data, tmp_path / "run", "--leaks", "ignore") == 2
    assert "--leaks" in capsys.readouterr().err


@pytest.mark.slow
def test_images_that_the_encoder_was_pretrained_on(
    data: Path, encoder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "pretrained"
    shutil.copytree(encoder, run / "encoder")
    seen = sorted(map(str, (data / "test").glob("*/2.png"))) + [
        str(path) for path in (data / "train").glob("*/*.png")
    ]
    fingerprints_of(seen).save(run / "fingerprints.npz")
    for source in (run, run / "encoder"):
        out = tmp_path / f"probe-{source.name}"
        assert probe(data, out, "--encoder", source, "--leaks", "exclude") == 0
        assert results(out)["test_images"] == 6
        where = [row["where"] for row in listed(out) if row["part"] == "test"]
        assert where.count("pretraining") == 4
        assert where.count("train") == 2


def test_labels_that_a_fine_tuned_encoder_has_seen(
    data: Path, encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Path(shutil.copytree(encoder, tmp_path / "model"))
    tested = sorted((data / "test").glob("*/2.png"))
    save_trained_on(model, map(str, tested))
    _, found = guard(load_labelled(data, seed=0), [str(model)], "warn", None)
    seen = {leak.path for leak in found.found if leak.where == "pretraining"}
    assert seen == set(map(str, tested))
    assert "true labels of 2 images" in caplog.text


@pytest.mark.slow
def test_finetune_leaves_them_out_too(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = ["--encoder", "random:test_resnet", "--data", data, "--out", out, "--epochs", 1,
             "--num_workers", 0, "--leaks", "exclude"]  # fmt: skip
    assert main(["finetune", *map(str, given)]) == 0
    assert (results(out)["leaks"], results(out)["test_images"]) == (2, 8)
    assert len(listed(out)) >= 2


def test_masks_are_left_out_with_their_images(tmp_path: Path) -> None:
    for index, part in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 3):
        for kind in ("images", "masks"):
            (tmp_path / kind / part).mkdir(parents=True, exist_ok=True)
        twin = stripes({7: 1, 5: 0}.get(index, index), "red")
        twin.save(tmp_path / "images" / part / f"{index}.png")
        mask = np.zeros((32, 32), np.uint8)
        mask[: 8 + index] = 1
        Image.fromarray(mask).save(tmp_path / "masks" / part / f"{index}.png")
    data, found = guard(load_masks(tmp_path), ["random:test_resnet"], "exclude", "run")
    for part, names in (("train", "0123"), ("val", "4"), ("test", "68")):
        assert [Path(one.path).stem for one in getattr(data, part)] == list(names)
        assert [Path(one.mask.file).stem for one in getattr(data, part)] == list(names)
    assert found.figures() == {"leaks": 1, "leaks_left_out": {"test": 1, "val": 1}}


def test_several_labels_an_image_need_some_images_with_and_some_without(tmp_path: Path) -> None:
    rows = ["path,labels,split"]
    for index, part in enumerate(["train"] * 3 + ["val"] + ["test"] * 3):
        stripes({4: 1}.get(index, index), "red").save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png,{'a|b' if index == 1 else 'a' if index % 2 else ''},{part}")
    rows[5] = "4.png,a|b,test"
    rows[6:] = ["5.png,,test", "6.png,,test"]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    data = load_labelled(tmp_path / "labels.csv", multi_label=True)
    assert guard(data, [], "warn", "run")[1].count == 1
    with pytest.raises(UserError, match="leaves no class that some test images have"):
        guard(data, [], "exclude", "run")


@pytest.mark.slow
def test_without_leaks_there_is_no_list(data: Path, tmp_path: Path) -> None:
    (data / "test" / "blue" / "0.png").unlink()
    (data / "test" / "red" / "4.jpg").unlink()
    assert probe(data, tmp_path / "run", "--leaks", "error") == 0
    assert results(tmp_path / "run")["leaks"] == 0
    assert "leaks_left_out" not in results(tmp_path / "run")
    assert not (tmp_path / "run" / "leaks.csv").exists()


def test_patients_on_both_sides_of_a_given_split(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "test" / "blue" / "0.png").unlink()
    (data / "test" / "red" / "4.jpg").unlink()
    by_number = ("--group_by", r"(\d)\.", "--leaks")  # 0 to 9 in train, 0 to 4 in test
    assert probe(data, tmp_path / "run", *by_number, "warn") == 0
    found = results(tmp_path / "run")
    assert (found["leaks"], found["leaking_groups"], found["test_images"]) == (0, 5, 8)
    warnings = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    (leak,) = [one for one in warnings if one["code"] == "leak"]
    assert "5 groups are in the training part and the test part, the first 0" in leak["message"]
    assert leak["figures"]["groups"] == 5
    assert probe(data, tmp_path / "other", *by_number, "exclude") == 2
    assert (
        "leaves no test image: 0 are leaks, and others are of 5 groups" in capsys.readouterr().err
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_fine_tuned_encoder_passes_on_what_it_was_pre_trained_on(
    data: Path, tmp_path: Path
) -> None:
    encoder = tmp_path / "pretrained"
    save_encoder(build_encoder("test_resnet", 32), encoder / "encoder", {})
    inner = [str(data / "test" / "red" / f"{number}.png") for number in (1, 2)]
    fingerprints_of(inner).save(encoder / "fingerprints.npz")
    options = ("--data", data, "--epochs", 1, "--batch_size", 8, "--num_workers", 0)
    run = tmp_path / "tuned"
    given = ("--encoder", encoder, "--out", run, *options)
    assert main(["finetune", *map(str, given)]) == 0
    assert probe(data, tmp_path / "run", "--encoder", run / "model") == 0
    rows = [row for row in listed(tmp_path / "run") if row["part"] == "test"]
    found = [row["path"] for row in rows if row["where"] == "pretraining"]
    # and the labelled images that fine-tuning saw, of which two are leaks already
    assert set(inner) <= set(found)
    assert len(found) == 4


def test_groups_of_pretraining_are_leaks(data: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for file in (data / part).rglob("*.*"):
            file.rename(file.with_name(f"{part}{file.name}"))
    encoder = tmp_path / "pretrained"
    save_encoder(build_encoder("test_resnet", 32), encoder / "encoder", {})
    other = np.full((1, EXACT_BYTES + LOOK_BYTES), 255, np.uint8)
    Fingerprints.of(other, ["old/test3.dcm"]).save(encoder / "fingerprints.npz")
    by_name = ("--group_by", r"(test\d|train\d)", "--encoder", encoder)
    assert probe(data, tmp_path / "run", *by_name) == 0
    assert results(tmp_path / "run")["leaking_groups"] == 1
    warnings = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    (leak,) = [one for one in warnings if "1 group" in one["message"]]
    assert f"1 group is in the training images of {encoder} and the test" in leak["message"]
