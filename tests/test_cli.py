"""The command line: words to options, configuration files, help."""

import gc
import subprocess
import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import pytest

from vissl_lite.cli import find_command, main, parse_words
from vissl_lite.commands.finetune import FinetuneOptions
from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.errors import UserError
from vissl_lite.options import Options, Paths, options_of, parse_value


@dataclass(frozen=True)
class Some(Options):
    """Options of nothing."""

    what: str
    """What."""
    data: Paths = "here"
    _: KW_ONLY
    lr: float | list[float] | None = None
    epochs: int | None = None
    flag: bool = False
    weights: dict[str, float] | None = None


def parsed(options: type[Options], *words: str) -> dict[str, Any]:
    return options.merged(parse_words(options, words))


@pytest.mark.parametrize(
    ("words", "values"),
    [("--what a", {"what": "a"}), ("--what=a", {"what": "a"}), ("a", {"what": "a"}),
     ("a b --epochs 3", {"what": "a", "data": "b", "epochs": 3}),
     ("--flag", {"flag": True}), ("--flag false", {"flag": False}),
     ("--flag --what a", {"flag": True, "what": "a"}),
     ("--data a b", {"data": ["a", "b"]}), ("--data a --data b", {"data": ["a", "b"]}),
     ("--data [a,b]", {"data": ["a", "b"]}), ("--data {a,b}.tar", {"data": "{a,b}.tar"}),
     ("--epochs 1 --epochs 2", {"epochs": 2}), ("--epochs null", {"epochs": None}),
     ("--lr 1e-3", {"lr": 0.001}), ("--lr -1e-3 1", {"lr": [-0.001, 1]}),
     ("--weights={a: 1e-1}", {"weights": {"a": 0.1}}),
     ("--weights.a 1 --weights.b 2", {"weights": {"a": 1, "b": 2}}),
     ("--what=--flag", {"what": "--flag"})],
)  # fmt: skip
def test_words_become_values(words: str, values: dict[str, Any]) -> None:
    split = [words] if words.startswith("--weights=") else words.split()
    assert parsed(Some, *split) == values


@pytest.mark.parametrize(
    ("words", "message"),
    [("--what a b", "--what takes one value, not a b"), ("--what", "--what needs a value"),
     ("a b c", "c belongs to no option"), ("-x", "-x belongs to no option"),
     ("--flg", "unknown option --flg: did you mean --flag"),
     ("--epochs.x 1", "unknown option --epochs.x")],
)  # fmt: skip
def test_words_that_are_no_options(words: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        parsed(Some, *words.split())
    assert message in str(refused.value)


def test_the_command_line_wins_over_files_and_the_last_file_over_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("epochs: 1\nwhat: a\nlr: 1e-3\n")
    (tmp_path / "b.yaml").write_text("epochs: 2\nwhat: b\n")
    files = ["--config", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    assert parsed(Some, "--what", "c", *files) == {"what": "c", "epochs": 2, "lr": 0.001}


@pytest.mark.parametrize(
    ("value", "kind", "result"),
    [("1:00:00", str | int | None, "1:00:00"), ("90", str | int | None, 90), ("null", str, "null"),
     ("x", int | None, "x"), ("", int | None, ""), (["1", "x"], list[int], [1, "x"])],
)  # fmt: skip
def test_text_becomes_what_it_stands_for(value: Any, kind: Any, result: Any) -> None:
    assert parse_value("name", value, kind) == result


# The pretext and its hyperparameters


@pytest.mark.parametrize(
    ("words", "pretext"),
    [
        ("--pretext dino", {"name": "dino"}),
        ("--pretext.name dino", {"name": "dino"}),
        ("--pretext.temperature 0.5", {"name": "simclr", "temperature": 0.5}),
        ("--pretext.momentum 0.9 --pretext dino", {"name": "dino", "momentum": 0.9}),
    ],
)
def test_a_pretext_and_its_hyperparameters(words: str, pretext: dict[str, Any]) -> None:
    assert parsed(PretrainOptions, *words.split()) == {"pretext": pretext}


SHARED = """
epochs: 100
pretext: {name: simclr, temperature: 0.5}
overrides:
  dino: {epochs: 50, pretext: {momentum: 0.95}}
  mae: {batch_size: 32}
"""


@pytest.mark.parametrize(
    ("words", "values"),
    [("", {"epochs": 100, "pretext": {"name": "simclr", "temperature": 0.5}}),
     ("--pretext dino", {"epochs": 50, "pretext": {"name": "dino", "momentum": 0.95}}),
     ("--pretext dino --epochs 3 --pretext.momentum 0.9",
      {"epochs": 3, "pretext": {"name": "dino", "momentum": 0.9}}),
     ("--pretext mae", {"epochs": 100, "batch_size": 32, "pretext": {"name": "mae"}})],
)  # fmt: skip
def test_a_file_may_differ_by_pretext(words: str, values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "shared.yaml").write_text(SHARED)
    given = ["--config", str(tmp_path / "shared.yaml"), *words.split()]
    assert parsed(PretrainOptions, *given) == values


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("{dion: {epochs: 1}}", "unknown pretext dion: did you mean dino"),
        ("[dino]", "overrides must be a mapping"),
        ("{dino: 1}", "overrides must be a mapping"),
        ("{simclr: {epoch: 1}}", "unknown option --epoch"),
    ],
)
def test_overrides_with_a_mistake(overrides: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "shared.yaml").write_text(f"overrides: {overrides}\n")
    with pytest.raises(UserError) as refused:
        parsed(PretrainOptions, "--config", str(tmp_path / "shared.yaml"))
    assert message in str(refused.value)


# Help


def test_help_shows_the_hyperparameters_of_the_pretext(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--pretext", "mae", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--pretext.mask_ratio" in shown or "--pretext.masked" in shown
    assert "--on_collapse {warn,stop}" in shown
    assert "(default 0.1)" in shown
    assert shown.index("--data DATA ...") < shown.index("--epochs EPOCHS")


def test_rows_for_the_documentation() -> None:
    rows = {row.name: row for row in options_of(find_command("embed")).rows()}
    assert rows["data"].required
    assert rows["data"].values == "DATA ..."
    assert rows["format"].values == "{parquet,npz}"
    assert rows["overwrite"] == ("overwrite", "", None, False, "Replace an existing file.")
    assert all(row.help for row in rows.values())


def test_help_says_how_to_see_another_pretext(capsys: pytest.CaptureFixture[str]) -> None:
    for given, other in (("simclr", "mae"), ("mae", "dino")):
        assert main(["pretrain", "--pretext", given, "--help"]) == 0
        end = " ".join(capsys.readouterr().out.rpartition("\n\n")[2].split())
        assert f"are those of {given}" in end
        assert f"vissl-lite pretrain --pretext {other} --help" in end


# Spelling


def test_hyphens_stand_for_underscores() -> None:
    given = ("--image-size", "64", "--pretext.min-crop-scale=0.5", "--probe-data", "a-b")
    values = parsed(PretrainOptions, *given)
    assert values["image_size"] == 64
    assert values["probe_data"] == "a-b"
    assert values["pretext"] == {"name": "simclr", "min_crop_scale": 0.5}
    weights = parsed(FinetuneOptions, "--class-weights.red-fox", "2")["class_weights"]
    assert weights == {"red-fox": 2}


def test_names_match_without_case() -> None:
    given = ("--pretext", "SimCLR", "--on_collapse", "Stop", "--optimizer", "AdamW")
    values = parsed(PretrainOptions, *given, "--logger", "None")
    config = PretrainOptions(data="a", out="b", **values).as_config()
    assert config["pretext"]["name"] == "simclr"
    assert (config["on_collapse"], config["optimizer"], config["logger"]) == (
        "stop", "adamw", ["none"],
    )  # fmt: skip
    assert FinetuneOptions(data="a", out="b", task="Detection").as_config()["task"] == "detection"


def test_a_run_is_resumed_with_names_in_another_case() -> None:
    saved = FinetuneOptions(data="a", out="b", task="detection").as_config()
    assert FinetuneOptions(data="a", out="b", task="Detection").resumed(saved).task == "detection"
    with pytest.raises(UserError, match="contradict"):
        FinetuneOptions(data="a", out="b", task="segmentation").resumed(saved)


def test_only_the_program_keeps_its_modules_out_of_garbage_collection() -> None:
    code = (
        "import gc, vissl_lite.cli as cli; run = cli._run\n"
        "cli._run = lambda *words: (run(*words), print(gc.get_freeze_count()))\n"
        "cli.main(); print(gc.get_freeze_count())"
    )
    command = [sys.executable, "-c", code, "list", "pretexts"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    during, after = map(int, done.stdout.splitlines()[-2:])
    assert during > 10_000
    assert after == 0
    assert done.stderr == ""
    assert main(["list", "pretexts"]) == 0
    assert gc.get_freeze_count() == 0
