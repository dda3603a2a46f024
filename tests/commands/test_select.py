import csv
import json
import re
import shutil
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import vissl_lite
from tests.conftest import blobs, trying, with_pictures
from vissl_lite.cli import main
from vissl_lite.encoders.folder import load_encoder
from vissl_lite.transfer.classification.linear_head import fit_linear
from vissl_lite.transfer.classification.model import (
    Classifier,
    class_logits,
    load_classifier,
    save_classifier,
)
from vissl_lite.transfer.confidence import Confidence
from vissl_lite.transfer.tasks import TASKS
from vissl_lite.transfer.trained_on import save_trained_on


@pytest.fixture(scope="module")
def model(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that knows nothing."""
    folder = tmp_path_factory.mktemp("tuned")
    save_classifier(Classifier(load_encoder(encoder), ["cat", "dog", "eel"]), folder / "model", {})
    return folder


def run(*words: object) -> int:
    return main(["select", *map(str, words)])


def page_content(file: Path) -> dict[str, Any]:
    """The data in a page for labelling."""
    found = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', file.read_text())
    assert found is not None
    content: dict[str, Any] = json.loads(found[1])
    return content


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_the_first_round(encoder: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with with_pictures():
        assert run("--encoder", encoder, "--data", photos, "--budget", 6, "--out", out) == 0
    chosen = rows(out / "selected.csv")
    assert [row["rank"] for row in chosen] == list("123456")
    assert len({row["path"] for row in chosen}) == 6
    assert all(Path(row["path"]).is_relative_to(photos) for row in chosen)
    assert sum(int(row["covers"]) for row in chosen) == 24
    assert all(row["reason"].startswith("raises the coverage by 0.") for row in chosen)
    to_label = [{"path": row["path"], "label": ""} for row in chosen]
    assert rows(out / "to_label.csv") == to_label
    results = json.loads((out / "results.json").read_text())
    assert (results["chosen"], results["images"], results["labelled"]) == (6, 24, 0)
    coverage = results["coverage"]
    assert [len(coverage[name]) for name in ("selected", "continued", "random")] == [7, 7, 13]
    assert coverage["selected"][-1] == coverage["continued"][0]
    assert Image.open(out / "selected.png").width > 1000
    assert all(row["path"] in (out / "label.html").read_text() for row in chosen)
    page = (out / "report.html").read_text()
    for words in ("Coverage by number of images", "Chosen images", "Map of the images"):
        assert f">{words}</h2>" in page
    for number, one in enumerate(page_content(out / "label.html")["images"]):
        places, similarities = zip(*one["similar"], strict=True)
        assert sorted(places) == [place for place in range(6) if place != number]
        assert list(similarities) == sorted(similarities, reverse=True)
    again = vissl_lite.select(encoder=encoder, data=photos, budget=6, out=tmp_path / "again")
    assert again.paths == [row["path"] for row in chosen]
    assert again.selected.read_bytes() == (out / "selected.csv").read_bytes()


@pytest.mark.parametrize("method", ["herding", "margin"])
def test_a_later_round_knows_what_is_labelled(
    method: str, encoder: Path, model: Path, photos: Path, tmp_path: Path
) -> None:
    known = sorted(photos.rglob("*.jpg"))[:10]
    copy = tmp_path / "elsewhere.jpg"
    copy.write_bytes(known[-1].read_bytes())  # of a labelled image that is not in the pool
    table = tmp_path / "labels.csv"
    lines = [*(f"{path},{'cat' if path == copy else 'dog'}" for path in [*known[:-1], copy])]
    table.write_text("\n".join(["path,label", *lines, f"{known[-1]},"]) + "\n")
    given = ("--encoder", encoder, "--data", photos, "--labelled", table, "--model", model)
    out = tmp_path / "run"
    assert run(*given, "--method", method, "--budget", 14, "--out", out) == 0
    chosen = rows(out / "selected.csv")
    assert not {row["path"] for row in chosen} & {str(path) for path in known}
    assert len({row["path"] for row in chosen}) == 14
    paths = [row["path"] for row in chosen]
    expected, _ = TASKS["classification"].uncertainty(
        load_classifier(model), 1.0, paths, lambda done: None
    )
    assert [float(row["uncertainty"]) for row in chosen] == pytest.approx(expected, abs=1e-3)
    if method == "margin":
        assert (np.diff(expected) <= 1e-6).all()
    results = json.loads((out / "results.json").read_text())
    assert (results["images"], results["labelled"]) == (24, 10)
    content = page_content(out / "label.html")
    assert content["classes"] == ["cat", "dog", "eel"]
    assert len(content["labelled"]) == 10
    assert [one["path"] for one in content["images"]] == paths
    for one in content["images"]:
        assert len(one["neighbors"]) == 5
        assert {label for _, label, _ in one["neighbors"]} <= {"cat", "dog"}


@pytest.mark.parametrize("column", ["split", "patient_id"])
def test_a_page_keeps_apart_what_its_table_would_mix(
    column: str, encoder: Path, photos: Path, tmp_path: Path
) -> None:
    """Parts and groups; labels of test images are no suggestions either."""
    known = sorted(photos.rglob("*.jpg"))[:8]
    table, out = tmp_path / "labels.csv", tmp_path / "run"
    given = ["train", "train", "train", "test"] if column == "split" else ["a", "b", "b", "c"]
    lines = [f"{path},{'aabc'[i % 4]},{given[i % 4]}" for i, path in enumerate(known)]
    table.write_text("\n".join([f"path,label,{column}", *lines]) + "\n")
    options = ("--encoder", encoder, "--data", photos, "--labelled", table, "--budget", 3)
    assert run(*options, "--out", out) == 0
    content = page_content(out / "label.html")
    assert content["labelled"] == []
    suggested = {label for one in content["images"] for _, label, _ in one["neighbors"]}
    assert suggested == ({"a", "b"} if column == "split" else {"a", "b", "c"})
    assert not {one["path"] for one in content["images"]} & {*map(str, known)}


def test_dropquery_fits_a_probe_to_the_labels(
    encoder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = sorted(photos.rglob("*.jpg"))[:10]
    table = tmp_path / "labels.csv"
    given = ("--encoder", encoder, "--data", photos, "--method", "dropquery")
    out = tmp_path / "run"

    def label(*names: str) -> None:
        lines = [f"{path},{names[i % len(names)]}" for i, path in enumerate(known)]
        table.write_text("\n".join(["path,label", *lines]) + "\n")

    for names, message in (
        (["cat"], "at least two classes in --labelled, which has 1: label more"),
        (["cat|dog", "cat"], "--method dropquery needs --labelled with one class for each image"),
    ):
        label(*names)
        assert run(*given, "--labelled", table, "--budget", 14, "--out", out) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    label("cat", "dog", "eel")
    assert run(*given, "--labelled", table, "--budget", 14, "--out", out) == 0
    chosen = rows(out / "selected.csv")
    assert {row["path"] for row in chosen} == {*map(str, photos.rglob("*.jpg"))} - {
        *map(str, known)
    }
    shares = [float(row["uncertainty"]) for row in chosen]
    assert {*shares} <= {0.0, 0.3333, 0.6667, 1.0}
    uncertain = [share > 0.5 for share in shares]
    assert 0 < sum(uncertain) < 14
    assert uncertain == sorted(uncertain, reverse=True)
    assert run(*given, "--budget", 3, "--out", tmp_path / "first") == 0
    assert rows(tmp_path / "first" / "selected.csv")[0]["reason"].startswith("center of a cluster")


def test_the_uncertainty_of_a_model_is_calibrated(
    encoder: Path, model: Path, photos: Path, tmp_path: Path
) -> None:
    tuned = Path(shutil.copytree(model, tmp_path / "tuned"))
    nothing = np.empty(0)
    Confidence.measured("images", nothing, nothing, nothing, 0.05).save(tuned / "model")
    given = ("--encoder", encoder, "--data", photos, "--method", "margin", "--budget", 24)
    assert run(*given, "--model", tuned, "--out", tmp_path / "run") == 0
    chosen = rows(tmp_path / "run" / "selected.csv")
    logits, _ = class_logits(load_classifier(model), [row["path"] for row in chosen])
    first, second = (logits / 0.05).softmax(dim=1).sort(dim=1, descending=True).values.T[:2]
    found = [float(row["uncertainty"]) for row in chosen]
    assert found == pytest.approx((1 - first + second).tolist(), abs=1e-3)


def test_near_duplicates_are_chosen_once(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        blobs(index, 64, 64).save(folder / f"{index}.png")
        ImageOps.mirror(blobs(index, 64, 64)).save(folder / f"{index}-mirrored.jpg", quality=90)
    given = ("--encoder", encoder, "--data", folder, "--budget", 5)
    assert run(*given, "--method", "random", "--out", tmp_path / "run") == 0
    names = [Path(row["path"]).name[0] for row in rows(tmp_path / "run" / "selected.csv")]
    assert sorted(names) == ["0", "1", "2"]
    assert "3 images are chosen instead of 5" in " ".join(capsys.readouterr().err.split())


def test_a_random_choice_respects_near_duplicates_and_groups_too(
    encoder: Path, tmp_path: Path
) -> None:
    for index in range(12):
        folder = tmp_path / "images" / f"p{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        blobs(index).save(folder / f"{index}.png")
        ImageOps.mirror(blobs(index)).save(folder / f"{index}-mirrored.jpg", quality=90)
    given = ("--encoder", encoder, "--data", tmp_path / "images", "--method", "random")
    groups = ("--per_group", 2, "--group_by", "^(p.)/", "--budget", 6)
    found = []
    for seed in range(3):  # those of the random orders of the first one
        out = tmp_path / f"run{seed}"
        assert run(*given, *groups, "--seed", seed, "--out", out) == 0
        found.append(json.loads((out / "results.json").read_text())["coverage"])
    expected = np.mean([one["selected"] for one in found], axis=0)
    assert found[0]["random"] == pytest.approx(expected.tolist())


def as_images(page: Path) -> list[np.ndarray]:
    """The pictures of a page for labelling."""
    uris = [one["picture"] for one in page_content(page)["images"]]
    parts = [b64decode(uri.partition(",")[2]) for uri in uris]
    return [np.asarray(Image.open(BytesIO(part))) for part in parts]


def test_pictures_have_the_value_range_of_the_encoder(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    coarse = [np.array(blobs(index).convert("L"), np.uint16) for index in range(6)]
    for index, values in enumerate(coarse):  # the last one is nearly empty
        Image.fromarray(values * (1 if index == 5 else 200)).save(folder / f"{index}.tif")
    given = ("--encoder", "random:test_resnet", "--image_size", 32, "--data", folder)
    brightest: dict[str, list[int]] = {}
    for name, words in {
        "default": (), "wide": ("--value_range", "0,65535"), "own": ("--value_range", "image"),
    }.items():  # fmt: skip
        out = tmp_path / name
        with with_pictures():
            assert run(*given, *words, "--budget", 6, "--out", out) == 0
        places = [Path(row["path"]).stem for row in rows(out / "selected.csv")]
        order = np.argsort(places)
        brightest[name] = [int(as_images(out / "label.html")[place].max()) for place in order]
    assert min(brightest["default"][:5]) > 200 > 20 > brightest["default"][5]
    assert 130 < max(brightest["wide"][:5]) < 220
    assert min(brightest["own"]) > 200
    for name in brightest:
        for file in ("label.html", "report.html"):
            said = "Each picture is drawn from the range" in (tmp_path / name / file).read_text()
            assert said == (name == "own")


def test_nothing_is_chosen_if_all_images_are_copies_of_labelled_ones(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(4):
        for folder, side in ((tmp_path / "pool", 64), (tmp_path / "known" / "ab"[index % 2], 48)):
            folder.mkdir(parents=True, exist_ok=True)
            blobs(index).resize((side, side)).save(folder / f"{index}.png")
    given = ("--encoder", encoder, "--data", tmp_path / "pool", "--labelled", tmp_path / "known")
    assert run(*given, "--budget", 2, "--out", tmp_path / "run") == 2
    assert "no image is left to choose: all without a label show" in capsys.readouterr().err
    assert not (tmp_path / "run" / "selected.csv").exists()


def test_excluded_images_are_not_chosen(
    encoder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = sorted(photos.rglob("*.jpg"))
    table = tmp_path / "not_usable.csv"
    table.write_text("\n".join(["path,not_usable", *(f"{path},1" for path in known[4:])]) + "\n")
    given = ("--encoder", encoder, "--data", photos, "--budget", 4, "--exclude", table)
    assert run(*given, "--out", tmp_path / "run") == 0
    chosen = {row["path"] for row in rows(tmp_path / "run" / "selected.csv")}
    assert chosen == {str(path) for path in known[:4]}
    assert "are not among the images" not in (tmp_path / "run" / "log.txt").read_text()
    # as a spreadsheet saves it, with a row that is cut short and a name that is not UTF-8
    lines = ["not_usable;path", *(f"1;{path}" for path in known[5:]), "1;caf\udce9.jpg", "1"]
    table.write_text("\n".join(lines), errors="surrogateescape")
    assert run(*given, "--out", tmp_path / "again") == 0
    said = (tmp_path / "again" / "log.txt").read_text()
    capsys.readouterr()
    assert "1 of the 20 images that --exclude names are not among the images of --data" in said
    assert run(*given[:4], "--budget", 6, "--exclude", table, "--out", tmp_path / "many") == 2
    assert "there are 5 images without a label that --exclude does not" in capsys.readouterr().err
    table.write_text(f"path,not_usable\n{known[0]},1\n")
    twice = ("--data", known[0].parent, photos)
    assert run(*given[:2], *twice, *given[4:], "--out", tmp_path / "twice") == 0
    assert "are not among the images" not in (tmp_path / "twice" / "log.txt").read_text()
    table.write_text("file\na.png\n")
    assert run(*given, "--out", tmp_path / "none") == 2
    assert f"--exclude {table} has no column path" in capsys.readouterr().err


def test_copies_of_excluded_images_are_not_chosen_either(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(4):
        blobs(index, 64, 64).save(folder / f"{index}.png")
        ImageOps.mirror(blobs(index, 64, 64)).save(folder / f"{index}-mirrored.png")
    gone = tmp_path / "gone.png"
    table = tmp_path / "not_usable.csv"
    table.write_text(f"path,not_usable\n{folder}/0.png,1\n{folder}/2-mirrored.png,1\n{gone},1\n")
    given = ("--encoder", encoder, "--data", folder, "--exclude", table, "--out", tmp_path / "run")
    assert run(*given, "--budget", 4) == 0
    chosen = rows(tmp_path / "run" / "selected.csv")
    assert sorted(Path(row["path"]).name[0] for row in chosen) == ["1", "3"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["labelled"], results["images"]) == (0, 6)
    assert results["coverage"]["selected"][0] == 0


def test_a_random_test_part_is_kept_apart(
    encoder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/labelling.md says, with two rounds of training images."""
    labels = tmp_path / "labels"
    labels.mkdir()
    given = ("--encoder", encoder, "--data", photos, "--budget", 6)

    def save(name: str, run_folder: Path) -> None:
        content = page_content(run_folder / "label.html")
        new = [(one["path"], "ab"[i % 2]) for i, one in enumerate(content["images"])]
        lines = [f"{path},{label}" for path, label in [*content["labelled"], *new]]
        (labels / name).write_text("\n".join(["path,class", *lines]) + "\n")

    assert run(*given, "--method", "random", "--out", tmp_path / "test") == 0
    save("test.csv", tmp_path / "test")
    given = (*given, "--exclude", tmp_path / "test" / "selected.csv")
    assert run(*given, "--out", tmp_path / "first") == 0
    save("train.csv", tmp_path / "first")
    assert run(*given, "--labelled", labels / "train.csv", "--out", tmp_path / "second") == 0
    save("train.csv", tmp_path / "second")
    test, train = (
        {row["path"] for row in rows(labels / f"{one}.csv")} for one in ("test", "train")
    )
    assert (len(test), len(train), len(test & train)) == (6, 12, 0)
    words = ["finetune", "--encoder", encoder, "--data", labels, "--out", tmp_path / "model"]
    assert main([*map(str, words), "--dry_run"]) == 0
    printed = capsys.readouterr().err
    assert re.search(r"test +6 +test.csv", printed)
    assert re.search(r"training +10 +train.csv", printed)


def test_groups_have_so_many_images(encoder: Path, tmp_path: Path) -> None:
    for index in range(12):
        folder = tmp_path / "images" / f"p{index % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        blobs(index).save(folder / f"{index}.png")
    given = ("--encoder", encoder, "--data", tmp_path / "images", "--out", tmp_path / "run")
    assert run(*given, "--budget", 8, "--per_group", 2, "--group_by", "^(p.)/") == 0
    chosen = rows(tmp_path / "run" / "selected.csv")
    groups = sorted(Path(row["path"]).parent.name for row in chosen)
    assert groups == ["p0", "p0", "p1", "p1", "p2", "p2", "p3", "p3"]
    # the table that is filled in has them, too, and so has that of the page
    table = rows(tmp_path / "run" / "to_label.csv")
    assert [row["group"] for row in table] == [Path(row["path"]).parent.name for row in table]
    known = page_content(tmp_path / "run" / "label.html")["groups"]
    assert {known[row["path"]] for row in table} == {"p0", "p1", "p2", "p3"}
    lines = [f"{row['path']},{'ab'[i % 2]},{row['group']}" for i, row in enumerate(table)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,class,group", *lines]) + "\n")
    later = (*given[:4], "--out", tmp_path / "later", "--labelled", tmp_path / "labels.csv")
    assert run(*later, "--budget", 4, "--per_group", 3, "--group_by", "(p.)/[0-9]+[.]png$") == 0
    content = page_content(tmp_path / "later" / "label.html")
    assert len(content["labelled"]) == 8
    assert {content["groups"][path] for path, _ in content["labelled"]} == {"p0", "p1", "p2", "p3"}


def test_groups_are_found_below_an_archive(encoder: Path, tmp_path: Path) -> None:
    for index in range(6):
        folder = tmp_path / "made" / f"p{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        blobs(index).save(folder / f"{index}.png")
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "made")
    given = ("--encoder", encoder, "--data", archive, "--out", tmp_path / "run")
    assert run(*given, "--budget", 2, "--per_group", 1, "--group_by", "^(p.)/") == 0
    chosen = rows(tmp_path / "run" / "selected.csv")
    assert sorted(Path(row["path"]).parent.name for row in chosen) == ["p0", "p1"]


def test_groups_of_a_table_are_those_that_finetune_uses(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows without a label have groups, too; an image that is not in the table has none."""
    folder, table = tmp_path / "images", tmp_path / "metadata.csv"
    folder.mkdir()
    for index in range(11):
        blobs(index).save(folder / f"{index}.png")
    patients = "aabbccdddd"  # six labelled images of a, b and c, and four others of d
    lines = [f"images/{i}.png,{'xy'[i % 2] if i < 6 else ''},{patients[i]}" for i in range(10)]
    table.write_text("\n".join(["path,label,patient_id", *lines]) + "\n")
    given = ("--encoder", encoder, "--data", folder, "--labelled", table, "--per_group", 1)
    assert run(*given, "--budget", 3, "--out", tmp_path / "run") == 2
    assert "there are 2 images without a label within --per_group 1" in capsys.readouterr().err
    assert run(*given, "--budget", 2, "--out", tmp_path / "run") == 0
    chosen = {int(Path(row["path"]).stem) for row in rows(tmp_path / "run" / "selected.csv")}
    assert 10 in chosen
    lines = [f"images/{i}.png,{'xy'[i % 2]},{'abc'[i]}" for i in range(3)]  # none occurs twice
    table.write_text("\n".join(["path,label,patient_id", *lines]) + "\n")
    assert run(*given, "--budget", 8, "--out", tmp_path / "others") == 0
    assert len(chosen & {6, 7, 8, 9}) == 1
    assert "10 of 11 images have a group" in (tmp_path / "run" / "log.txt").read_text()


def test_the_probe_of_dropquery_divides_no_group(
    encoder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = sorted(photos.rglob("*.jpg"))[:8]
    table = tmp_path / "labels.csv"
    lines = [f"{path},{'xy'[i % 2]},{'abcd'[i // 2]}" for i, path in enumerate(known)]
    table.write_text("\n".join(["path,label,patient_id", *lines]) + "\n")
    groups = []

    def fit(*values: Any) -> Any:
        groups.append(values[4].tolist())
        return fit_linear(*values)

    monkeypatch.setattr("vissl_lite.commands.select_images.fit_linear", fit)
    given = ("--encoder", encoder, "--data", photos, "--method", "dropquery", "--budget", 2)
    assert run(*given, "--labelled", table, "--out", tmp_path / "run") == 0
    assert [sorted(one) for one in groups] == [[*"aabbccdd"]]


def test_groups_of_one_image_each_are_no_limit(encoder: Path, photos: Path, tmp_path: Path) -> None:
    given = ("--encoder", encoder, "--data", photos, "--out", tmp_path / "run")
    assert run(*given, "--budget", 3, "--per_group", 1, "--group_by", r"(\d+)\.jpg") == 0
    assert len(rows(tmp_path / "run" / "selected.csv")) == 3
    assert "each image is a group of its own" in (tmp_path / "run" / "log.txt").read_text()


def test_labelled_images_of_another_folder_count_in_their_groups(
    encoder: Path, tmp_path: Path
) -> None:
    for index in range(8):
        name = "labelled" if index < 2 else "unlabelled"  # the labelled ones are of p0 and p1
        folder = tmp_path / name / f"p{index % 2}" / ("yes" if index else "no")
        folder.mkdir(parents=True, exist_ok=True)
        blobs(index).save(folder / f"{index}.png")
    table = tmp_path / "labelled" / "labels.csv"
    table.write_text("path,label\np0/no/0.png,no\np1/yes/1.png,yes\n")
    given = ("--encoder", encoder, "--data", tmp_path / "unlabelled", "--out", tmp_path / "run")
    given = (*given, "--labelled", table, "--per_group", 2, "--group_by", "^(p.)/")
    assert run(*given, "--budget", 3) == 2
    assert run(*given, "--budget", 2) == 0
    chosen = rows(tmp_path / "run" / "selected.csv")
    assert sorted(Path(row["path"]).parts[-3] for row in chosen) == ["p0", "p1"]


def test_a_model_that_does_not_count_is_said(
    encoder: Path, model: Path, photos: Path, tmp_path: Path
) -> None:
    given = ("--encoder", encoder, "--data", photos, "--out", tmp_path / "run", "--budget", 2)
    assert run(*given, "--model", model, "--method", "k_center") == 0
    assert "k_center does not use the uncertainty" in (tmp_path / "run" / "log.txt").read_text()


def test_a_model_that_is_equally_uncertain_of_all_images_is_said(
    encoder: Path, photos: Path, tmp_path: Path
) -> None:
    constant = Classifier(load_encoder(encoder), ["cat", "dog"])
    for weights in constant.network.get_classifier().parameters():
        weights.data.zero_()
    save_classifier(constant, tmp_path / "tuned" / "model", {})
    given = ("--encoder", encoder, "--data", photos, "--budget", 4, "--model", tmp_path / "tuned")
    said, chosen = {}, {}
    for method, seed in (("margin", 0), ("margin", 1), ("herding", 0)):
        out = tmp_path / f"{method}{seed}"
        assert run(*given, "--method", method, "--seed", seed, "--out", out) == 0
        said[method] = " ".join((out / "log.txt").read_text().split())
        chosen[method, seed] = [row["path"] for row in rows(out / "selected.csv")]
    same = "--model has the same uncertainty, 1.000, for all 24 images to choose from"
    assert all(text.count(same) == 1 for text in said.values())
    assert "the images are chosen at random" in said["margin"]
    assert "the images are chosen as without a model" in said["herding"]
    assert chosen["margin", 0] != chosen["margin", 1]
    table, later = tmp_path / "labels.csv", {}
    lines = [f"{path},cat" for path in sorted(photos.rglob("*.jpg"))[:3]]
    table.write_text("\n".join(["path,label", *lines]) + "\n")
    for name, words in (("with", given), ("without", given[:-2])):
        assert run(*words, "--labelled", table, "--out", tmp_path / name) == 0
        later[name] = [row["path"] for row in rows(tmp_path / name / "selected.csv")]
    assert later["with"] == later["without"]


def test_images_that_a_model_knows_and_nobody_named_are_said(
    encoder: Path, model: Path, photos: Path, tmp_path: Path
) -> None:
    known = sorted(photos.rglob("*.jpg"))[:4]
    tuned = tmp_path / "tuned"
    shutil.copytree(model, tuned)
    save_trained_on(tuned / "model", [str(path) for path in known])
    table = tmp_path / "labels.csv"
    given = ("--encoder", encoder, "--data", photos, "--budget", 2, "--model", tuned)
    for count in (3, 4):
        lines = "".join(f"{path},cat\n" for path in known[:count])
        table.write_text(f"path,class\n{lines}")
        assert run(*given, "--labelled", table, "--out", tmp_path / str(count)) == 0
    said = [(tmp_path / str(count) / "log.txt").read_text() for count in (3, 4)]
    assert "1 images of --data are among those that --model was trained on" in said[0]
    assert "that --model was trained on" not in said[1]


def test_a_model_of_several_labels_gets_no_page_of_one_class(
    encoder: Path, photos: Path, tmp_path: Path
) -> None:
    tuned, table = tmp_path / "tuned", tmp_path / "tags.csv"
    several = Classifier(load_encoder(encoder), ["cat", "dog"], multi_label=True)
    save_classifier(several, tuned / "model", {})
    first = sorted(photos.rglob("*.jpg"))[:2]
    table.write_text(f"path,labels\n{first[0]},cat\n{first[1]},dog\n")
    given = ("--encoder", encoder, "--data", photos, "--budget", 2, "--model", tuned)
    assert run(*given, "--labelled", table, "--out", tmp_path / "run") == 0
    assert not (tmp_path / "run" / "label.html").exists()


def test_a_page_of_too_many_images_is_not_written(
    encoder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vissl_lite.commands.select.MAX_PAGE_IMAGES", 3)
    given = ("--encoder", encoder, "--data", photos, "--method", "random")
    for budget, written in ((3, True), (4, False)):
        out = tmp_path / str(budget)
        assert run(*given, "--budget", budget, "--out", out) == 0
        assert (out / "label.html").exists() == written
        said = "No label.html is written" in (out / "log.txt").read_text()
        assert said != written


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("to_label.csv", b"path,label\n/a.png,cat\n/b.png,\n"),
        ("to_label.csv", b"path;label\r\n/a.png;cat\r\n"),
        ("to_label.csv", "path\tlabel\r\n/a.png\tcat\r\n".encode("utf-16")),
        ("to_label.csv", "path,Class\n/a.png,mà\n".encode("cp1252")),
        ("to_label.json", b'{"images": [], "annotations": [{"id": 1}], "categories": []}'),
        ("to_label.json", b"<xml>"),
    ],
)
def test_labels_that_were_filled_in_are_not_overwritten(
    encoder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str,
    content: bytes,
) -> None:  # fmt: skip
    task = "detection" if name.endswith("json") else "classification"
    given = ("--encoder", encoder, "--data", photos, "--out", tmp_path / "run", "--budget", 2)
    given = (*given, "--task", task, "--method", "random")
    assert run(*given) == 0
    assert run(*given, "--overwrite") == 0  # nothing was filled in
    file = tmp_path / "run" / name
    file.write_bytes(content)
    assert run(*given, "--overwrite") == 2
    assert f"{file} was changed since it was written" in capsys.readouterr().err
    assert file.read_bytes() == content


def test_other_tasks_get_a_coco_file(encoder: Path, photos: Path, tmp_path: Path) -> None:
    given = ("--encoder", encoder, "--data", photos, "--out", tmp_path / "run")
    assert run(*given, "--budget", 2, "--task", "detection", "--method", "k_center") == 0
    chosen = rows(tmp_path / "run" / "selected.csv")
    content = json.loads((tmp_path / "run" / "to_label.json").read_text())
    assert [one["file_name"] for one in content["images"]] == [row["path"] for row in chosen]
    assert {(one["height"], one["width"]) for one in content["images"]} == {(40, 48)}
    assert content["annotations"] == []
    assert not (tmp_path / "run" / "label.html").exists()  # for one class per image
    # a later round knows these two, which are too few for a training
    box = {"id": 1, "image_id": content["images"][0]["id"], "category_id": 1, "bbox": [2, 2, 9, 9]}
    content |= {"annotations": [box], "categories": [{"id": 1, "name": "cell"}]}
    labelled = tmp_path / "labelled.json"
    labelled.write_text(json.dumps(content))
    given = ("--encoder", encoder, "--data", photos, "--out", tmp_path / "next")
    assert run(*given, "--budget", 2, "--task", "detection", "--labelled", labelled) == 0
    later = {row["path"] for row in rows(tmp_path / "next" / "selected.csv")}
    assert len(later) == 2
    assert not later & {row["path"] for row in chosen}
    assert "validation part" not in (tmp_path / "next" / "log.txt").read_text()


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_the_coco_file_of_a_later_round_is_the_whole_data_set(
    task: str, encoder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--encoder", encoder, "--data", photos, "--budget", 3, "--task", task)
    square = [[4, 4, 20, 4, 20, 20, 4, 20]]

    def fill(run_folder: Path, file: Path) -> dict[str, Any]:
        """Add an object to each image without one, as a labelling tool does."""
        content: dict[str, Any] = json.loads((run_folder / "to_label.json").read_text())
        objects = content["annotations"]
        done = {one["image_id"] for one in objects}
        content["categories"] = content["categories"] or [
            {"id": 5, "name": "cell"},
            {"id": 9, "name": "dot"},
        ]
        for image in content["images"]:
            if image["id"] not in done:
                box = {"bbox": [4, 4, 16, 16], "area": 256, "segmentation": square}
                number = len(objects) + 1
                category = content["categories"][number % 2]["id"]
                objects.append(
                    {"id": number, "image_id": image["id"], "category_id": category, **box}
                )
        file.write_text(json.dumps(content))
        return content

    assert run(*given, "--out", tmp_path / "first") == 0
    first = fill(tmp_path / "first", tmp_path / "labels.json")
    given = (*given, "--labelled", tmp_path / "labels.json", "--out", tmp_path / "second")
    assert run(*given) == 0
    second = json.loads((tmp_path / "second" / "to_label.json").read_text())
    assert second["images"][:3] == first["images"]
    assert [one["id"] for one in second["images"]] == [1, 2, 3, 4, 5, 6]
    new = [row["path"] for row in rows(tmp_path / "second" / "selected.csv")]
    assert [one["file_name"] for one in second["images"][3:]] == new
    assert second["annotations"] == first["annotations"]
    assert second["categories"] == first["categories"]
    assert run(*given, "--overwrite") == 0  # nothing was filled in
    fill(tmp_path / "second", tmp_path / "second" / "to_label.json")
    assert run(*given, "--overwrite") == 2
    capsys.readouterr()
    whole = tmp_path / "second" / "to_label.json"
    words = ["finetune", "--encoder", encoder, "--task", task, "--out", tmp_path / "model"]
    assert main([*map(str, words), "--data", str(whole), "--dry_run"]) == 0
    printed = capsys.readouterr().err
    counts = re.findall(r"(?:training|validation|test) +(\d+) ", printed)
    assert sum(map(int, counts)) == 6


def test_the_coco_file_has_new_images_alone_where_parts_would_be_lost(
    encoder: Path, photos: Path, tmp_path: Path
) -> None:
    images = []
    for index, part in enumerate(("train", "test")):
        (tmp_path / "labelled" / part).mkdir(parents=True)
        blobs(50 + index).save(tmp_path / "labelled" / part / f"{index}.png")
        name = f"{part}/{index}.png"
        images.append({"id": index, "file_name": name, "height": 40, "width": 48})
    box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [2, 2, 9, 9]}
    categories = [{"id": 1, "name": "cell"}]
    labelled = tmp_path / "labelled" / "labels.json"
    labelled.write_text(
        json.dumps({"images": images, "annotations": [box], "categories": categories})
    )
    given = ("--encoder", encoder, "--data", photos, "--out", tmp_path / "run", "--budget", 2)
    assert run(*given, "--task", "detection", "--labelled", labelled) == 0
    content = json.loads((tmp_path / "run" / "to_label.json").read_text())
    assert [one["id"] for one in content["images"]] == [1, 2]
    assert content["annotations"] == []
    said = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert "new images only, since --labelled has a validation or test part" in said


def test_mistakes_are_said_before_anything_is_written(
    encoder: Path, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    for words, message in (
        ("--budget 25", "--budget 25: there are 24 images without a label; give at most 24"),
        ("--budget 0", "--budget 0 must be at least 1"),
        ("--method best", "--method best is none of herding, typiclust"),
        ("--method margin", "--method margin needs a model: give --model with a run of finetune"),
        (f"--method dropquery --model {model}", "fits a linear probe to --labelled: leave out"),
        (f"--model {photos}", f"{photos}"),
        (f"--model {model} --task detection", "is of --task classification"),
        ("--labelled nowhere.csv", "--labelled nowhere.csv does not exist"),
        ("--label_column a", "--label_column is for reading --labelled, which is not given"),
        ("--group_by a", "--group_by is for --per_group, which is not given"),
        ("--per_group 1", "give --group_by with a regular expression"),
        ("--budget 3 --per_group 1 --group_by ^(.)/", "there are 2 images without a label within"),
    ):
        budget = "" if "--budget" in words else "--budget 3"
        given = ("--encoder", encoder, "--data", photos, "--out", out)
        with trying(words):
            assert run(*given, *words.split(), *budget.split()) == 2
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1
    assert not out.exists()
