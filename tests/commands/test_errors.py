"""Mistakes of the user's: status 2, one line that says what would work, nothing written."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from vissl_lite.cli import COMMANDS, find_command, main
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.run_record import RunRecord

Refused = Callable[..., str]

SMALL = ("--backbone", "test_resnet", "--image_size", "32", "--epochs", "1")


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None
        for f in folder.rglob("*")
    }


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Runs a command in an empty folder of its own; gives the line that refuses it."""
    here = tmp_path / "here"
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)

    def run(*arguments: object) -> str:
        before = tree(tmp_path)
        assert main([str(argument) for argument in arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("vissl-lite: ")
        assert shown.err.count("\n") == 1
        assert shown.err.endswith("\n")
        assert "Traceback" not in shown.err
        assert tree(tmp_path) == before
        return shown.err

    return run


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Four small images."""
    folder = tmp_path / "few"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (40, 40), (60 * index, 0, 0)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    save_encoder(build_encoder("test_resnet", 32), tmp_path / "encoder", {})
    return tmp_path / "encoder"


@pytest.fixture
def old_run(tmp_path: Path, few: Path) -> Path:
    """A run of pretrain that stopped early."""
    config = {
        "data": [str(few)],
        "out": str(tmp_path / "old"),
        "pretext": {"name": "simclr", "temperature": 0.5},
        "backbone": "test_resnet",
        "image_size": 32,
        "epochs": 10,
        "batch_size": 4,
    }
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "old" / "log.txt").write_text("stopped\n")
    RunRecord("pretrain", "stopped").write(tmp_path / "old")
    return tmp_path / "old"


def classes(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (32, 32)).save(folder / name / f"{index}.png")
    return folder


# Names


def test_an_unknown_command(refused: Refused) -> None:
    assert "unknown command pretrian: did you mean pretrain?" in refused("pretrian", "--data", "x")


def test_an_unknown_option(refused: Refused, few: Path) -> None:
    error = refused("pretrain", "--data", few, "--out", "run", "--epoch", 3)
    assert "unknown option --epoch: did you mean --epochs" in error


@pytest.mark.parametrize("command", ["probe", "finetune", "predict", "demo"])
def test_an_unknown_option_of_each_command(command: str, refused: Refused) -> None:
    needed = {"demo": [], "predict": ["--model", "m", "--data", "d"]}
    given = needed.get(command, ["--encoder", "e", "--data", "d"])
    error = refused(command, *given, "--out", "run", "--overwrit")
    assert "unknown option --overwrit: did you mean --overwrite" in error


@pytest.mark.parametrize("form", [("--pretext", "simcrl"), ("--pretext=simcrl",)])
def test_an_unknown_pretext(form: tuple[str, ...], refused: Refused, few: Path) -> None:
    error = refused("pretrain", "--data", few, "--out", "run", *form)
    assert "unknown pretext simcrl: did you mean simclr?" in error


def test_an_unknown_hyperparameter(refused: Refused, few: Path) -> None:
    given = ("pretrain", "--data", few, "--out", "run", *SMALL)
    error = refused(*given, "--pretext.temprature", 0.1)
    assert "unknown option --pretext.temprature: did you mean --pretext.temperature" in error


def test_a_hyperparameter_of_another_pretext(refused: Refused, few: Path) -> None:
    given = ("pretrain", "--data", few, "--out", "run", *SMALL, "--pretext", "rotation")
    error = refused(*given, "--pretext.temperature", 0.1)
    assert "unknown option --pretext.temperature" in error


def test_an_unknown_backbone(refused: Refused, few: Path) -> None:
    error = refused("pretrain", "--data", few, "--out", "run", "--backbone", "resnet81")
    assert "unknown backbone resnet81: did you mean " in error
    assert "resnet18" in error


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_an_unknown_optimizer(command: str, refused: Refused, labelled: Path) -> None:
    error = refused(command, "--data", labelled, "--out", "run", "--optimizer", "adamww")
    assert "unknown optimizer adamww: did you mean " in error


# Values


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [("--epochs", "ten", "int"), ("--lr", "small", "float"), ("--resume", "perhaps", "bool"),
     ("--batch_size", "2.5", "int"), ("--pretext.temperature", "hot", "float")],
)  # fmt: skip
def test_a_value_of_the_wrong_type(
    option: str, value: str, kind: str, refused: Refused, few: Path
) -> None:
    error = refused("pretrain", "--data", few, "--out", "run", option, value)
    assert option in error
    assert value in error
    assert f"of the type {kind}" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_needed_is_said(command: str, refused: Refused) -> None:
    if command == "demo":
        assert "--seeds 0 must be at least 3" in refused(command, "--seeds", 0)
    elif command == "list":
        assert "--what must be given" in refused(command)
    elif command == "report":
        assert "--run must be given" in refused(command)
    elif command == "runs":  # which needs nothing
        assert "no folder nowhere" in refused(command, "nowhere")
    elif command == "export":
        assert "--out must be given" in refused(command)
    else:
        error = refused(command)
        assert "--data" in error
        assert "--out" in error or command == "check"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--epochs", 0), ("--batch_size", 0), ("--image_size", 0), ("--lr", 0), ("--warmup", 1),
     ("--warmup", -0.1), ("--seed", -1)],
)  # fmt: skip
def test_a_number_out_of_range(option: str, value: float, refused: Refused, few: Path) -> None:
    error = refused(
        "pretrain", "--data", few, "--out", "run", "--backbone", "test_resnet", f"{option}={value}"
    )
    assert f"{option} {value}" in error


@pytest.mark.parametrize(
    ("option", "value"),
    [("--epochs", 0), ("--batch_size", 0), ("--lr", 0), ("--seed", -1), ("--warmup", 1),
     ("--min_crop_scale", 0), ("--min_crop_scale", 2)],
)  # fmt: skip
def test_a_number_out_of_range_in_finetune(
    option: str, value: float, refused: Refused, labelled: Path
) -> None:
    error = refused("finetune", "--data", labelled, "--out", "run",
                    "--encoder", "random:test_resnet", f"{option}={value}")  # fmt: skip
    assert f"{option} {value}" in error


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", 0), ("temperature", -1), ("min_crop_scale", 0), ("min_crop_scale", 2)],
)
def test_a_hyperparameter_out_of_range(
    option: str, value: float, refused: Refused, few: Path
) -> None:
    error = refused(
        "pretrain", "--data", few, "--out", "run", *SMALL, f"--pretext.{option}={value}"
    )
    assert option in error


@pytest.mark.parametrize(
    ("time", "message"),
    [("soon", "is not a time: give HH:MM:SS, seconds or auto"), ("1:2:3:4:5", "is not a time"),
     ("00:00:00", "must be longer than 0 seconds"), ("-5", "is not a time")],
)  # fmt: skip
def test_a_time_that_is_none(time: str, message: str, refused: Refused, few: Path) -> None:
    error = refused(
        "pretrain", "--data", few, "--out", "run", "--backbone", "test_resnet", f"--max_time={time}"
    )
    assert f"--max_time {time} {message}" in error


def test_a_logger_that_is_none(refused: Refused, few: Path) -> None:
    error = refused("pretrain", "--data", few, "--out", "run", *SMALL, "--logger", "tensorbord")
    assert "unknown --logger tensorbord: did you mean tensorboard?" in error


def test_a_logger_that_is_not_installed(
    refused: Refused, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vissl_lite.training.loggers.find_spec", lambda name: None)
    arguments = ("--data", few, "--out", "run", *SMALL, "--logger", "tensorboard", "wandb")
    assert "pip install tensorboard" in refused("pretrain", *arguments)


def test_norms_of_an_untrained_encoder_are_not_kept(refused: Refused, labelled: Path) -> None:
    arguments = ("--data", labelled, "--out", "run", "--encoder", "random:test_resnet")
    error = refused("finetune", *arguments, "--frozen_norm", "true")
    assert "of a pre-trained encoder, which random:test_resnet is not" in error


def test_what_to_do_on_collapse(refused: Refused, few: Path) -> None:
    error = refused("pretrain", "--data", few, "--out", "run", *SMALL, "--on_collapse", "cry")
    assert "--on_collapse cry is none of warn, stop" in error


def test_epochs_with_a_time(refused: Refused, few: Path) -> None:
    error = refused("pretrain", "--data", few, "--out", "run", "--epochs", 3, "--max_time", 60)
    assert "give --epochs or --max_time, not both" in error


def test_fraction_with_shots(refused: Refused, labelled: Path) -> None:
    for command in ("probe", "finetune"):
        error = refused(command, "--encoder", "random:test_resnet", "--data", labelled,
                        "--out", "run", "--fraction", 0.5, "--shots", 3)  # fmt: skip
        assert "give --fraction or --shots, not both" in error


# Data


def test_no_images(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    error = refused("pretrain", "--data", tmp_path / "none", "--out", "run")
    assert "no images found in" in error


def test_a_missing_folder(refused: Refused, few: Path) -> None:
    error = refused("pretrain", "--data", few, "nowhere", "--out", "run")
    assert "nowhere does not exist" in error


def test_one_image(refused: Refused, few: Path) -> None:
    error = refused("pretrain", "--data", few / "1.png", "--out", "run", *SMALL)
    assert "at least two images" in error


def test_a_batch_larger_than_the_data_set(refused: Refused, few: Path) -> None:
    error = refused("pretrain", "--data", few, "--out", "run", *SMALL, "--batch_size", 5)
    assert "--batch_size 5 is larger than the data set: 4 images" in error


def test_a_batch_that_devices_cannot_share(refused: Refused, few: Path) -> None:
    shared = ("--batch_size", 4, "--devices", 3)
    error = refused("pretrain", "--data", few, "--out", "run", *SMALL, *shared)
    assert "--batch_size 4 can't be divided by 3 devices: give a multiple of 3" in error


def test_a_batch_of_one_image(refused: Refused, few: Path) -> None:
    error = refused("pretrain", "--data", few, "--out", "run", *SMALL, "--batch_size", 1)
    assert "--batch_size 1 is too small" in error


def test_a_batch_larger_than_the_training_part(refused: Refused, labelled: Path) -> None:
    error = refused("finetune", "--data", labelled, "--out", "run", "--batch_size", 500)
    assert "--batch_size 500 is larger than the training part: 30 images" in error


@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_one_class_only(command: str, refused: Refused, tmp_path: Path) -> None:
    data = classes(tmp_path / "set", "cats")
    error = refused(command, "--encoder", "random:test_resnet", "--data", data, "--out", "run")
    assert "has one class only (cats): two or more are needed" in error


def test_labelled_images_to_watch_by_that_have_one_class(
    refused: Refused, few: Path, tmp_path: Path
) -> None:
    data = classes(tmp_path / "set", "cats")
    error = refused("pretrain", "--data", few, "--out", "run", *SMALL, "--probe_data", data)
    assert "has one class only" in error


# Encoders


def test_no_encoder(refused: Refused, labelled: Path) -> None:
    error = refused("probe", "--encoder", "nowhere", "--data", labelled, "--out", "run")
    assert "no encoder at nowhere: give a run, an encoder folder, timm:NAME or random" in error


def test_no_model(refused: Refused, few: Path) -> None:
    error = refused("predict", "--model", "nowhere", "--data", few, "--out", "run")
    assert "no model at nowhere: give a run of finetune" in error


def test_an_encoder_is_no_classifier(refused: Refused, few: Path, encoder: Path) -> None:
    error = refused("predict", "--model", encoder, "--data", few, "--out", "run")
    assert "is not a classifier" in error


@pytest.mark.parametrize("command", ["probe", "finetune"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_encoder(
    file: str, command: str, refused: Refused, encoder: Path, labelled: Path
) -> None:
    content = (encoder / file).read_bytes()
    (encoder / file).write_bytes(content[: len(content) // 2])
    error = refused(command, "--encoder", encoder, "--data", labelled, "--out", "run")
    assert file in error


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_weights_with_code_in_them(refused: Refused, few: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": Evil(tmp_path / "executed")}, tmp_path / "evil.pth")
    error = refused(
        "pretrain", "--data", few, "--out", "run", *SMALL, "--encoder", tmp_path / "evil.pth"
    )
    assert "evil.pth can't be loaded: it holds pickled Python objects" in error
    assert not (tmp_path / "executed").exists()


def test_weights_that_are_missing_or_no_weights(
    refused: Refused, few: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.pth").write_text("these are notes")
    command = ("pretrain", "--data", few, "--out", "run", *SMALL, "--encoder")
    for encoder, message in (
        ("gone.pth", "no encoder at gone.pth: give a run, an encoder folder, timm:NAME"),
        (tmp_path / "notes.pth", "notes.pth can't be loaded"),
    ):
        assert message in refused(*command, encoder)


def test_an_encoder_of_another_backbone(refused: Refused, few: Path, encoder: Path) -> None:
    error = refused(
        "pretrain", "--data", few, "--out", "run", "--encoder", encoder, "--backbone", "resnet18"
    )
    assert "is a test_resnet, not --backbone resnet18" in error


def test_a_size_that_does_not_suit_the_backbone(
    refused: Refused, few: Path, labelled: Path
) -> None:
    # the patches of test_vit have 16 pixels
    given = ("--out", "run", "--image_size", 40)
    error = refused("pretrain", "--data", few, "--backbone", "test_vit", "--epochs", 1, *given)
    assert "test_vit can't be built for 40 pixels" in error
    assert "32 pixels fit" in error
    for command in ("probe", "finetune"):
        error = refused(command, "--data", labelled, "--encoder", "random:test_vit", *given)
        assert "test_vit can't be built for 40 pixels" in error


@pytest.mark.slow
def test_a_size_that_does_not_suit_an_encoder_folder(
    refused: Refused, labelled: Path, tmp_path: Path
) -> None:
    save_encoder(build_encoder("test_vit", 32), tmp_path / "vit", {})
    error = refused("probe", "--data", labelled, "--encoder", tmp_path / "vit", "--out", "run",
                    "--image_size", 40)  # fmt: skip
    assert "40 pixels" in error


# The run


@pytest.mark.parametrize("command", ["pretrain", "probe", "finetune"])
def test_another_run_in_out(command: str, refused: Refused, old_run: Path, labelled: Path) -> None:
    given = () if command == "pretrain" else ("--encoder", "random:test_resnet")
    error = refused(command, "--data", labelled, "--out", old_run, *given)
    if command == "pretrain":
        assert "has not finished: --resume continues it, --overwrite replaces it" in error
    else:
        assert "holds another run: give a new folder, or --overwrite" in error


def test_other_files_in_out(refused: Refused, few: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    error = refused("pretrain", "--data", few, "--out", tmp_path / "other", "--overwrite")
    assert "holds other files, and --overwrite replaces runs of vissl-lite only" in error
    error = refused("pretrain", "--data", few, "--out", few, "--overwrite")
    assert f"--data {few} lies in --out {few}" in error


def test_nothing_to_resume(refused: Refused, few: Path, tmp_path: Path) -> None:
    """Then the run starts, as a job's script always resumes: with options of its own."""
    error = refused("pretrain", "--out", "run", "--resume")
    assert "--data must be given" in error
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    error = refused("pretrain", "--data", few, "--out", tmp_path / "other", "--resume")
    assert "holds other files" in error


def test_options_that_contradict_the_run_to_resume(refused: Refused, old_run: Path) -> None:
    error = refused("pretrain", "--out", old_run, "--resume", "--epochs", 20,
                    "--backbone", "test_vit", "--pretext.temperature", 0.1)  # fmt: skip
    assert "these options contradict the run" in error
    assert "--epochs 20 (the run has 10)" in error
    assert "--backbone test_vit (the run has test_resnet)" in error
    assert "--pretext.temperature 0.1 (the run has 0.5)" in error


def test_another_pretext_contradicts_the_run_to_resume(refused: Refused, old_run: Path) -> None:
    error = refused("pretrain", "--out", old_run, "--resume", "--pretext", "rotation")
    assert "--pretext.name rotation (the run has simclr)" in error


# Configuration files


def test_a_missing_configuration(refused: Refused) -> None:
    error = refused("pretrain", "--config", "gone.yaml")
    assert "--config gone.yaml can't be read: No such file or directory" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is not YAML"), ("- 1", "holds no options"), ("epoch: 3", "unknown option --epoch"),
     ("epochs: ten", "--epochs ten is not of the type int"),
     ("pretext: simcrl", "unknown pretext simcrl: did you mean simclr"),
     ("pretext: 3", "pretext"), ("pretext: {name: [a]}", "pretext"),
     ("pretext: {name: simclr, temprature: 1}", "temprature")],
)  # fmt: skip
def test_a_configuration_with_a_mistake(
    text: str, message: str, refused: Refused, few: Path, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    error = refused("pretrain", "--config", tmp_path / "c.yaml", "--data", few, "--out", "run")
    assert message in error


# Help


@pytest.mark.slow
def test_help_and_version_take_no_time() -> None:
    for option, expected in (("--help", "pretrain"), ("--version", "vissl-lite ")):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "vissl_lite", option],
            capture_output=True,
            text=True,
            check=True,
        )
        assert expected in done.stdout
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "vissl_lite.cli" in imported
        slow = ("torch", "timm", "lightning", "cv2", "albumentations", "numpy")
        assert not imported.intersection(slow)


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert all(f"  {command} " in shown.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_its_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert {"list": "--what", "report": "--run", "runs": "--folder"}.get(command, "--out") in shown
    summary = (find_command(command).__doc__ or "").partition("\n\n")[0]
    assert " ".join(summary.split()) in " ".join(shown.split())


def test_a_pretext_that_the_backbone_can_not_do(refused: Refused, few: Path) -> None:
    error = refused(
        "pretrain", "--data", few, "--out", "run", "--pretext", "mae", "--backbone", "resnet18"
    )
    assert "mae needs a plain ViT, which resnet18 is not: try one of vit_tiny_patch16_224" in error


def test_an_optimizer_without_its_learning_rate(refused: Refused, few: Path) -> None:
    error = refused("pretrain", "--data", few, "--out", "run", "--optimizer", "sgd")
    assert "--optimizer sgd needs an --lr: the default 0.002 of simclr is for adamw" in error


def test_a_list_of_nothing(refused: Refused) -> None:
    assert "no list of pretext: did you mean pretexts?" in refused("list", "pretext")
    assert "did you mean resnet18" in refused("list", "backbones", "resnt18")


def test_an_encoder_that_has_diverged(refused: Refused, labelled: Path, tmp_path: Path) -> None:
    encoder = build_encoder("test_resnet", 32)
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("nan"))
    save_encoder(encoder, tmp_path / "nan", {})
    error = refused("probe", "--encoder", tmp_path / "nan", "--data", labelled, "--out", "run")
    assert "its training has diverged" in error
