"""``compare`` through the command line: equal arms, verdicts, resuming, what is left out."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import with_pictures
from vissl_lite.cli import main
from vissl_lite.comparison import runner
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.sample.dataset import make_sample_data
from vissl_lite.transfer.classification.data import LabelledImages, load_labelled


def run(*words: object) -> int:
    return main([str(word) for word in words])


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that is nearly the same for all images."""
    folder = tmp_path_factory.mktemp("blind")
    torch.manual_seed(3)
    encoder = build_encoder("test_resnet", 32)
    with torch.no_grad():
        for parameter in encoder.model.conv1.parameters():
            parameter.zero_()
    save_encoder(encoder, folder, {})
    return folder


@pytest.fixture(scope="module")
def compared(
    encoder: Path, blind: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("runs") / "compared"
    arms = ("--encoder", blind, "--encoder", encoder)
    amounts = ("--shots", 1, 3, 10)
    assert run("compare", *arms, "--data", labelled, "--out", out, *amounts, "--layers") == 0
    return out


@pytest.mark.slow
def test_the_table_the_verdict_and_the_baseline(compared: Path, blind: Path, encoder: Path) -> None:
    found = results(compared)
    assert found["baseline"] == "random:test_resnet"  # added, of the first encoder's backbone
    assert list(found["arms"]) == [str(blind), str(encoder), "random:test_resnet"]
    assert list(found["protocols"]) == ["knn", "linear"]
    assert found["verdict"] == "hurt"
    verdicts = found["protocols"]["linear"]["verdicts"]
    assert verdicts[str(blind)]["sentence"].startswith(f"{blind} hurt: linear accuracy -0.")
    assert verdicts[str(encoder)]["verdict"] == "no difference"  # it is as untrained
    for arm in found["arms"].values():
        assert list(arm) == ["1 per class", "3 per class", "10 per class"]
    assert found["labels"] == {"1 per class": 6, "3 per class": 15, "10 per class": 36}
    assert list(found["protocols"]["linear"]["layers"][str(encoder)]) == [
        "act1", "layer1", "layer2", "layer3", "layer4",
    ]  # fmt: skip
    assert (compared / "compare.png").stat().st_size > 3000
    assert (compared / "runs.csv").is_file()


@pytest.mark.slow
def test_every_arm_has_the_same_labels_and_smaller_amounts_are_parts_of_larger_ones(
    labelled: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[int, int], list[tuple[str, ...]]] = {}
    original = runner.evaluate_frozen
    calls = []

    def remember(protocol: str, features: Any, data: LabelledImages, k: int) -> Any:
        calls.append(tuple(data.train.paths))
        seen.setdefault((len(data.train), len(calls) % 2), []).append(calls[-1])
        return original(protocol, features, data, k)

    monkeypatch.setattr(runner, "evaluate_frozen", remember)
    given = ("--encoder", "random:test_resnet", "random:test_vit", "--protocols", "linear")
    out = tmp_path / "run"
    assert run("compare", *given, "--data", labelled, "--out", out, "--shots", 2, 5) == 0
    first, second = calls[:6], calls[6:]
    assert first == second  # arm by arm, seed by seed
    assert len(set(first)) == 6  # each seed has labels of its own
    for few, more in zip(first[::2], first[1::2], strict=True):
        assert len(few) == 12  # those that were held out as validation part, too
        assert set(few) < set(more)


@pytest.mark.slow
def test_test_labels_cannot_change_what_is_chosen(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(out: Path) -> list[tuple[str, str]]:
        arms = ("--encoder", "random:test_resnet", "random:test_vit")
        how = ("--protocols", "linear", "finetune", "--epochs", 1, "--lr", 0.001, 0.01)
        common = ("--data", labelled, "--out", out, "--shots", 4, "--num_workers", 0)
        assert run("compare", *arms, *how, *common) == 0
        with (out / "runs.csv").open(newline="") as file:
            return [(row["value"], row["chosen"]) for row in csv.DictReader(file)]

    before = chosen(tmp_path / "a")

    def shuffled(*arguments: Any, **options: Any) -> LabelledImages:
        data = load_labelled(*arguments, **options)
        np.random.default_rng(0).shuffle(data.test.labels)
        return data

    monkeypatch.setattr("vissl_lite.transfer.classification.task.load_labelled", shuffled)
    after = chosen(tmp_path / "b")
    assert [one for _, one in before] == [one for _, one in after]
    assert [value for value, _ in before] != [value for value, _ in after]
    assert {one.split("=")[0] for _, one in before} == {"penalty", "lr"}


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_stopped(
    labelled: Path, encoder: Path, blind: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--data", labelled, "--protocols", "knn", "--shots", 1, 6)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("compare", "--encoder", encoder, blind, *common, "--out", whole) == 0
    original, calls = runner.evaluate_frozen, []

    def until_killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(runner, "evaluate_frozen", until_killed)
    assert run("compare", "--encoder", encoder, blind, *common, "--out", cut) == 130
    assert not (cut / "results.json").exists()
    calls.clear()
    monkeypatch.setattr(
        runner, "evaluate_frozen", lambda *given: calls.append(given) or original(*given)
    )
    assert run("compare", "--out", cut, "--resume") == 0
    assert len(calls) == 3 * 3 * 2 - 7
    assert results(cut) == results(whole)
    # an arm and a seed more
    calls.clear()
    more = ("--encoder", encoder, blind, "random:test_vit", "--seeds", 4)
    assert run("compare", "--out", cut, "--resume", *more) == 0
    assert len(calls) == (1 + 1 + 4) * 2  # random:test_vit is the baseline now
    assert results(cut)["seeds"] == [0, 1, 2, 3]
    # an encoder that has changed since is judged again, by itself alone
    calls.clear()
    torch.manual_seed(8)
    save_encoder(build_encoder("test_resnet", 32), blind, {})
    assert run("compare", "--out", cut, "--resume", "--seeds", 4) == 0
    assert len(calls) == 4 * 2


def features_used(
    one: Path, other: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, np.ndarray]:
    """The features by which a comparison judges two encoders first and last."""
    original, used = runner.evaluate_frozen, []

    def noted(protocol: Any, features: Any, *more: Any) -> Any:
        used.append(features.by_layer["last"])
        return original(protocol, features, *more)

    monkeypatch.setattr(runner, "evaluate_frozen", noted)
    arms = ("--encoder", one, other, "--baseline", one)
    how = ("--protocols", "knn", "--shots", 2, "--out", one.parent / "run")
    assert run("compare", *arms, *how, "--data", labelled) == 0
    return used[0], used[-1]


def test_the_same_weights_at_two_sizes_are_two_encoders(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_encoder("test_resnet", 32)
    save_encoder(encoder, tmp_path / "small", {})
    larger = build_encoder("test_resnet", 64)
    larger.load_state_dict(encoder.state_dict())
    save_encoder(larger, tmp_path / "large", {})
    first, last = features_used(tmp_path / "small", tmp_path / "large", labelled, monkeypatch)
    assert np.abs(first - last).max() > 1e-3


def test_the_same_weights_pooled_in_another_way_are_another_encoder(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_encoder("test_resnet", 128)
    save_encoder(encoder, tmp_path / "mean", {})
    save_encoder(encoder, tmp_path / "max", {})
    config = tmp_path / "max" / "config.json"
    content = json.loads(config.read_text())
    content["model_args"] = {**content.get("model_args", {}), "global_pool": "max"}
    config.write_text(json.dumps(content))
    first, last = features_used(tmp_path / "mean", tmp_path / "max", labelled, monkeypatch)
    assert np.abs(first - last).max() > 1e-3


@pytest.mark.slow
def test_an_arm_that_can_not_be_had_is_left_out(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    out = tmp_path / "run"
    arms = ("--encoder", "timm:test_resnet.r160_in1k", "--encoder", "random:test_vit")
    more = ("--encoder", "random:test_resnet", "--baseline", "random:test_resnet")
    common = ("--data", labelled, "--out", out, "--protocols", "knn", "--shots", 2)
    assert run("compare", *arms, *more, *common) == 0
    found = results(out)
    assert "can't be downloaded" in found["left_out"]["timm:test_resnet.r160_in1k"]
    assert list(found["arms"]) == ["random:test_vit", "random:test_resnet"]
    assert "left out: timm:test_resnet.r160_in1k" in capsys.readouterr().err


@pytest.mark.slow
def test_intervals_are_taken_over_groups(labelled: Path, tmp_path: Path) -> None:
    arms = ("--encoder", "random:test_resnet", "--encoder", "random:test_vit")
    common = ("--data", labelled, "--fractions", 1, "--protocols", "linear")
    by_number = (*arms, *common, "--group_by", r"(\d+)\.")
    assert run("compare", *by_number, "--out", tmp_path / "run") == 0
    found = results(tmp_path / "run")
    assert (found["test_groups"], found["test_images"], found["leaking_groups"]) == (6, 18, 6)
    assert "6 groups of test images" in found["sentences"][0]


@pytest.mark.slow
def test_segmentation_is_compared_by_fine_tuning(tmp_path: Path) -> None:
    sample = make_sample_data(
        tmp_path / "data", unlabelled=0, train=12, val=6, test=6, size=32, processes=1
    )
    out = tmp_path / "run"
    arms = ("--encoder", "random:test_resnet", "random:test_resnet2")
    given = ("--task", "segmentation", "--data", sample, "--out", out, "--fractions", 0.5, 1)
    how = ("--epochs", 1, "--lr", 0.001, "--num_workers", 0, "--image_size", 32)
    arms = ("--encoder", "random:test_resnet", "random:test_convnext")
    assert run("compare", *arms, *given, *how) == 0
    found = results(out)
    assert found["protocols"]["finetune"]["metric"] == "miou"
    assert found["arms"]["random:test_convnext"]["50%"]["labels"] == 9
    assert found["verdict"] in ("helped", "no difference", "hurt")


def test_ways_to_choose_images_are_compared_with_random_ones(
    encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    out, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(labelled, images)
    first = min(path for path in (images / "train").rglob("*") if path.is_file())
    shutil.copyfile(first, first.with_stem("copy"))
    given = ("--encoder", encoder, "--data", images, "--out", out, "--seeds", 3)
    ways = ("--selection", "herding", "margin", "--budgets", 1, 29, "--protocols", "linear")
    with with_pictures():
        assert run("compare", *given, *ways) == 0
    found = results(out)
    assert list(found["arms"]) == ["herding", "margin", "random"]
    assert found["baseline"] == "random"
    assert "<th>choice</th>" in (out / "report.html").read_text()
    assert found["labels"] == {"1 images": 1, "29 images": 29}  # one image: one class
    assert found["protocols"]["linear"]["verdicts"]["herding"]["sentence"].startswith("herding ")
    with (out / "selected.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 29
    assert {row["method"] for row in rows} == {"herding", "margin", "random"}
    assert all(Path(row["path"]).is_file() for row in rows)
    assert not {str(first), str(first.with_stem("copy"))} <= {row["path"] for row in rows}
    again = [out / "results.json", out / "selected.csv"]
    before = [file.read_text() for file in again]
    (out / "run.json").write_text((out / "run.json").read_text().replace("finished", "stopped"))
    assert run("compare", *given, *ways, "--resume") == 0
    assert [file.read_text() for file in again] == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--encoder", "random:test_vit"), "nothing to compare random:test_vit with"),
        (("--encoder", "random:test_vit", "random:test_vit"), "random:test_vit is given twice"),
        (("--encoder", "timm:test_vit", "--seeds", 2), "--seeds 2 must be at least 3"),
        (("--encoder", "nowhere"), "no encoder at nowhere"),
        (("--encoder", "random:test_vit", "random:test_resnet", "--protocols", "cnn"),
         "none of knn, linear, finetune"),
        (("--encoder", "random:test_vit", "random:test_resnet", "--fractions", 2),
         "--fractions 2 must be above 0"),
        (("--encoder", "random:test_vit", "random:test_resnet", "--fractions", 1, "--shots", 1),
         "give --fractions or --shots, not both"),
        (("--encoder", "random:test_vit", "random:test_resnet", "--baseline", "random:test_vti"),
         "unknown backbone test_vti"),
        (("--encoder", "random:test_vit", "random:test_resnet", "--layers", "--protocols",
          "finetune"), "--layers requires"),
        (("--encoder", "random:test_vit", "--selection", "herding", "--shots", 1),
         "--selection and --shots do not go together: give --budgets"),
        (("--encoder", "random:test_vit", "random:test_resnet", "--selection", "herding"),
         "--selection compares ways to choose images: give one --encoder"),
        (("--encoder", "random:test_vit", "--selection", "herdin"), "none of random, herding"),
        (("--encoder", "random:test_vit", "--selection", "herding", "--refit", "true"),
         "--selection trains on all labels that are chosen: leave --refit out"),
        (("--encoder", "random:test_vit", "--selection", "random"),
         "--selection random has nothing that it is compared with"),
        (("--encoder", "random:test_vit", "--selection", "herding", "--budgets", 5000),
         "--budgets 5000 is more than there is to choose from"),
        (("--encoder", "random:test_vit", "random:test_resnet", "--budgets", 10),
         "--budgets belongs to --selection"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_written(
    given: tuple[object, ...], message: str, labelled: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    assert run("compare", *given, "--data", labelled, "--out", out) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not out.exists()
