"""Every option of every command with values that can't be right: one line, status 2, no file.

What is tried follows from the signatures of the commands, so that a new option is tried too. The
jobs are not done: a command that has found nothing wrong is stopped where it begins to write.
"""

import importlib
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import required
from vissl_lite.cli import COMMANDS, find_command, main
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.errors import (
    LISTS,
    MAPPINGS,
    UserError,
    admits_path,
    annotations,
    check_argument,
    kinds_of,
    takes_any,
)
from vissl_lite.options import Paths, StrPath, option_types, options_of
from vissl_lite.pretext import PRETEXTS

# Where commands begin to write, after all checks.
STARTS = ("open_run", "logged_to_console", "_temporary_folder")


class Started(BaseException):
    """A command has passed all checks."""


class _Start:
    """Stands for what a command opens when it begins to work."""

    def __init__(self, *_: object, **__: object) -> None:
        raise Started


def files(place: Path) -> set[str]:
    """All that is below a folder; every command is tried there."""
    return {
        os.path.join(*one)
        for at, folders, names in os.walk(place)
        for one in product([at], [*folders, *names])
    }


Tried = Callable[..., str | None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and an encoder that all commands can do with, and a folder to run in."""
    root = tmp_path_factory.mktemp("options")
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2), ("test", 3)):
        for name in ("cats", "dogs"):
            folder = root / "labelled" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    save_encoder(build_encoder("test_resnet", 32), root / "encoder", {})
    (root / "here").mkdir()
    return root


@pytest.fixture
def tried(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Tried:
    """Runs a command: the line that refuses it, or None if it would have started."""
    monkeypatch.chdir(place / "here")
    for command in COMMANDS:
        module = importlib.import_module(f"vissl_lite.commands.{command.replace('-', '_')}")
        for name in STARTS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, _Start)
    before = files(place)

    def run(*given: str) -> str | None:
        try:
            status = main(given)
        except Started:
            status = 0
        shown = capsys.readouterr()
        assert files(place) == before, given
        if status == 0:
            return None
        assert status == 2, given
        assert shown.out == "", given
        assert shown.err.startswith("vissl-lite: "), given
        assert shown.err.count("\n") == 1, (given, shown.err)
        assert shown.err.endswith("\n"), given
        assert len(shown.err) < 2000, (given, shown.err)
        return shown.err

    return run


Called = Callable[..., str | None]


@pytest.fixture
def called(tried: Tried, place: Path) -> Called:
    """Calls a command's function: the error that refuses it, or None if it would have started."""
    before = files(place)

    def run(command: str, given: Mapping[str, Any]) -> str | None:
        error_message = None
        try:
            find_command(command)(**given)
        except UserError as error:
            error_message = str(error)
            assert len(error_message.splitlines()) == 1, given
        except Started:
            pass
        assert files(place) == before, given
        return error_message

    return run


def needed(command: str, place: Path) -> dict[str, str]:
    """Options that make a command start."""
    encoder, data = str(place / "encoder"), str(place / "labelled")
    train = str(place / "labelled" / "train")
    return {
        "demo": {"out": "run"},
        "pretrain": {"data": train, "out": "run", "encoder": encoder, "epochs": "1"},
        "check": {"data": data, "task": "classification"},
        "probe": {"encoder": encoder, "data": data, "out": "run"},
        "finetune": {"encoder": encoder, "data": data, "out": "run"},
        "predict": {"model": encoder, "data": train, "out": "run"},
        "pseudo-label": {"model": encoder, "data": train, "out": "run"},
        "compare": {"encoder": encoder, "data": data, "out": "run"},
        "report": {"run": str(place)},
        "embed": {"encoder": encoder, "data": train, "out": "features.npz"},
        "explore": {"encoder": encoder, "data": train, "out": "map.html"},
        "select": {"encoder": encoder, "data": train, "budget": "5", "out": "run"},
        "export": {"encoder": encoder, "out": "encoder.onnx"},
        "shard": {"data": train, "out": "shards"},
        "list": {"what": "pretexts"},
        "runs": {"folder": str(place)},
    }[command]


def words(given: Mapping[str, str], **changed: str) -> list[str]:
    return [f"--{name}={value}" for name, value in {**given, **changed}.items()]


LONG = "x" * 300
PATHS = ("", " ", LONG, "/".join(["long"] * 1250), "nul\0byte", "nul\0byte.npz")
NUMBERS = (
    "1e400", "-1e400", "nan", ".nan", ".inf", "-.inf", "inf", "x", "", "true", "[1, 2]", "{a: 1}",
    "*a", "&a [*a]", "{{{{", "1 2", "9" * 400, "-" + "9" * 400, "9" * 5000, "0x" + "f" * 5000,
    str(-(2**64)), "-1", "2024-01-01", "\u0661\u0662x", "[" * 2000, "!!binary aGk=",
)  # fmt: skip


def hostile(kind: Any) -> list[str]:
    """Values that no option of a type can have."""
    kinds = kinds_of(kind)
    lists = [one for one in kinds if get_origin(one) in (*LISTS, tuple)]
    texts = any(str in kinds_of(part) for one in lists for part in get_args(one))
    values: list[str] = []
    if str in kinds or texts:
        values += [one for one in PATHS if one != LONG or admits_path(kind)]
    if texts:
        values += ["[]", "['']", "[1, 2", "[[a]]"]
    if {int, float}.intersection(kinds) and str not in kinds:
        values += [one for one in NUMBERS if not (lists and one == "[1, 2]")]
    if lists and str not in kinds and not texts:
        values += ["[]", "[[1]]", "[x]", "0.5x", "[.nan, 1]", "[1e400]", "{a: 1}", "*a"]
    if int in kinds and str not in kinds:
        values += ["0.5", "1e3", str(2**64)]
    if bool in kinds:
        values += ["x", "2", "", "[true]", "*a", "nan", "null true"]
    if any(get_origin(one) is Literal for one in kinds):
        values += ["x", "", "1", "[a]", "*a", "nan", "{a: 1, a: 2}", "{a: [1]}"]
    if NoneType not in kinds and str not in kinds:
        values.append("null")
    return list(dict.fromkeys(values))


# Options that take any number: a value of pixels.
ANY_NUMBER = ("nodata",)

# Values of the right type that may be out of range: refused, or taken and then of use.
EXTREMES = (-1, 0, 10**12, 1e30)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_values_that_no_option_of_the_type_can_have(
    command: str, tried: Tried, place: Path
) -> None:
    given = needed(command, place)
    for name, kind in option_types(options_of(find_command(command))).items():
        for value in hostile(kind):
            if name in ANY_NUMBER and re.fullmatch(r"-?\d{1,30}", value):
                continue
            assert tried(command, *words(given, **{name: value})) is not None, (name, value[:80])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_values_that_may_be_out_of_range(command: str, called: Called, place: Path) -> None:
    given = {
        name: int(one) if one.isdigit() else one for name, one in needed(command, place).items()
    }
    for name, kind in option_types(options_of(find_command(command))).items():
        kinds = kinds_of(kind)
        for value in EXTREMES:
            if float in kinds or (int in kinds and isinstance(value, int)):
                error_message = called(command, {**given, name: value})
                assert error_message is not None or value != -1 or name in ANY_NUMBER, name


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_configurations_in_which_every_option_is_of_a_wrong_type(
    command: str, tried: Tried, place: Path, tmp_path: Path
) -> None:
    given = needed(command, place)
    wrong: dict[Any, list[Any]] = {
        str: [None, 5, True, ["a"], {"a": "b"}, ""],
        int: [None, "x", True, 0.5, [1], {"a": 1}, math.nan, 10**19],
        float: [None, "x", False, [0.5], {"a": 1}, math.nan, math.inf, -math.inf],
        bool: [None, "x", 1, 0, [True], math.nan],
    }
    for name, kind in option_types(options_of(find_command(command))).items():
        kinds = kinds_of(kind)
        for value in [{"a": {"b": [1]}}, [[1]], [None], [], *wrong.get(kind, ())]:
            if value is None and NoneType in kinds:
                continue
            file = tmp_path / "config.yaml"
            file.write_text(yaml.safe_dump({**given, name: value}))
            assert tried(command, "--config", str(file)) is not None, (name, value)


NO_CONFIGURATIONS = [
    "*a", "a: &a [*a]", "{{{{", "a: b: c", "- a", "5", "", "null", "out: !!binary aGk=",
    "out: a\nout: b", "? [a]\n: b", "1: 2", "null: 1", "config: other.yaml", "x: " + "[" * 5000,
    "out: " + "9" * 5000, "out: 0x" + "f" * 5000, "out: a\0b", "pretext: {name: simclr, x: 1}",
    "pretext: [simclr]", "pretext: {temperature: {a: 1}}", "pretext: {name: null}",
    "pretext.name: [a]", "pretext: *p", "out: [", "out: 'a", "\t- a", "a\n---\nb", "%YAML 9",
    "out+: a", "data+: [a]", "__path__: a", "help: true", "unknown: {a: {b: c}}",
    *("a: &a" + f"{index} [{', '.join([f'*a{index - 1}'] * 10)}]" for index in (1, 9)),
]  # fmt: skip


def test_configurations_that_are_none(tried: Tried, place: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    given = [*words(needed("pretrain", place)), "--config", str(file)]
    for text in NO_CONFIGURATIONS:
        file.write_text(text)
        assert tried("pretrain", *given) is not None, text[:80]


@pytest.mark.slow
def test_configurations_that_are_no_text(tried: Tried, place: Path, tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "utf16.yaml").write_bytes("epochs: 1".encode("utf-16"))
    (tmp_path / "large.yaml").write_bytes(b"# " + b"x" * 2**25)
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("binary.yaml", "utf16.yaml", "large.yaml", "pipe.yaml", "gone.yaml", "", LONG,
                 "nul\0byte"):  # fmt: skip
        given = words(needed("pretrain", place))
        assert tried("pretrain", *given, "--config", str(tmp_path / name)) is not None, name


@pytest.mark.parametrize("command", COMMANDS)
def test_options_that_are_no_options(command: str, tried: Tried, place: Path) -> None:
    given = needed(command, place)
    for name, kind in option_types(options_of(find_command(command))).items():
        rest = words({other: one for other, one in given.items() if other != name})
        if bool not in kinds_of(kind):
            assert tried(command, *rest, f"--{name}") is not None, name
        if name in given and not takes_any(kind, LISTS):
            value = given[name]
            assert tried(command, *rest, f"--{name}", value, value) is not None, name
    for stray in ("--", "--=", "-x", "--x.y.z", "---out=x", "x", "--out.x=y", "--data+=x",
                  "--seed.init_args.x=1", "--print_config", "--config"):  # fmt: skip
        assert tried(command, *words(given), stray) is not None, stray
    assert tried(command, "stray", "word", "third", *words(given)) is not None


def _large(value: object) -> bool:
    return isinstance(value, int) and value >= 256


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETEXTS)
def test_hyperparameters(name: str, tried: Tried, called: Called, place: Path) -> None:
    given = {"data": str(place / "labelled" / "train"), "out": "run", "epochs": 1,
             "backbone": "test_resnet", "image_size": 32}  # fmt: skip
    if PRETEXTS[name].info.backbones not in ("any", "CNN"):
        given |= {"backbone": "test_vit", "image_size": 64}
    hyperparameters = annotations(PRETEXTS[name])
    del hyperparameters["encoder"]
    defaults = inspect.signature(PRETEXTS[name]).parameters
    small = {one: 32 for one in hyperparameters if _large(defaults[one].default)}  # quickly built
    small |= required(name)
    assert called("pretrain", {**given, "pretext": {"name": name, **small}}) is None
    text = words({option: str(value) for option, value in given.items()}, pretext=name)
    seen = set()
    for one, kind in hyperparameters.items():
        # what is refused follows from the type alone
        for value in [] if str(kind) in seen else hostile(kind)[::3]:
            if value not in ("-1", "null"):  # below; of the right type for some
                error_message = tried("pretrain", *text, f"--pretext.{one}={value}")
                assert error_message is not None, (one, value[:80])
        seen.add(str(kind))
        kinds = kinds_of(kind)
        for number in (*EXTREMES, None):
            if float in kinds or (int in kinds and (number is None or isinstance(number, int))):
                error_message = called(
                    "pretrain", {**given, "pretext": {"name": name, **small, one: number}}
                )
                good = number is None and NoneType in kinds
                assert error_message is not None or good or 0 <= number < 10**6, (one, number)


SAID = [
    ("precision", "foo", "--precision foo is not known"),
    ("precision", "b16-mixed", "did you mean bf16-mixed"),
    ("precision", "transformer-engine", "pip install transformer_engine"),
    ("strategy", "foo", "--strategy foo is not known"),
    ("strategy", "dpp", "did you mean ddp"),
    ("devices", "-2", "--devices -2 must be auto or from 1 to"),
    ("devices", "0", "--devices 0 must be auto or from 1 to"),
    ("devices", "foo", "--devices foo must be auto or from 1 to"),
    ("devices", "1000000", "--devices 1000000 must be auto or from 1 to"),
    ("num_nodes", "0", "--num_nodes 0 must be at least 1"),
    ("num_workers", "-1", "--num_workers -1 must be from 0 to"),
    ("num_workers", "10000", "--num_workers 10000 must be from 0 to"),
    ("seed", str(2**64), "too large a number"),
    ("seed", str(2**32), "--seed 4294967296 must be at most 4294967295"),
    ("seed", str(10**400), "(401 characters) is not of the type int"),
    ("weight_decay", "-1", "--weight_decay -1 must not be negative"),
    ("lr", "1e400", "--lr inf must be a finite number"),
    ("lr", "1e30", "--lr 1e+30 must be at most 1e+06"),
    ("data", "", "--data must not be empty"),
    ("out", "", "--out must not be empty"),
    ("out", LONG, "is too long"),
    ("out", "a" * 252, "is too long"),
    ("image_size", "1", "--image_size 1 must be from 8 to 4096"),
    ("image_size", str(10**9), "--image_size 1000000000 must be from 8 to 4096"),
    ("batch_size", str(10**12), "is larger than the data set: 12 images"),
    ("max_time", "9" * 5000, "too many digits"),
    ("max_time", "9999999:00:00", "is longer than 3650 days"),
    ("max_time", "[1]", "is not of the type"),
    ("max_time", "1:2:3:4:5", "is not a time"),
    ("max_time", "1e3", "is not a time"),
    ("max_time", "-1", "is not a time"),
    ("max_time", "", "--max_time must not be empty"),
    ("accumulate_grad_batches", str(10**9), "must be at most"),
    ("warmup", "1", "--warmup 1 is not a share"),
]


@pytest.mark.slow
def test_what_is_said(tried: Tried, place: Path) -> None:
    for option, value, message in SAID:
        given = needed("pretrain", place)
        if option == "max_time":
            del given["epochs"]
        error_message = tried("pretrain", *words(given, **{option: value}))
        assert error_message is not None, (option, value[:80])
        assert message in error_message, (option, value[:80])


def test_the_functions_themselves_refuse_them() -> None:
    for command, given in (
        ("probe", {"encoder": "e", "data": "d", "out": ""}),
        ("probe", {"encoder": "e", "data": "d", "out": "o", "k": None}),
        ("probe", {"encoder": "e", "data": "d", "out": "o", "temperature": math.nan}),
        ("finetune", {"data": "d", "out": "o", "seed": "x"}),
        ("finetune", {"data": "d", "out": "o", "precision": None}),
        ("pretrain", {"data": [], "out": "o"}),
        ("compare", {"encoder": ["a", 5], "data": "d", "out": "o"}),
        ("export", {"out": "o\0", "encoder": "e"}),
        ("shard", {"data": "", "out": "o"}),
        ("demo", {"seeds": True}),
    ):
        with pytest.raises(UserError) as refused:
            find_command(command)(**given)
        assert "\n" not in str(refused.value)


def test_only_paths_are_limited_like_paths() -> None:
    text = ",".join(str(number) for number in range(1, 129))
    kind: Any
    for kind in (str, str | None, Sequence[str], Mapping[str, float]):
        value = {text: 1.0} if get_origin(kind) in MAPPINGS else text
        check_argument("bands", [text] if get_origin(kind) in LISTS else value, kind)
    for kind in (StrPath, StrPath | None, Paths):
        with pytest.raises(UserError, match=r"1,2,3.* is too long: a path has at most"):
            check_argument("data", text, kind)
    with pytest.raises(UserError, match="is too long: give at most 4095 bytes"):
        check_argument("bands", text * 20, str)


@pytest.mark.slow
def test_names_of_classes_may_look_like_numbers(tried: Tried, place: Path) -> None:
    given = words(needed("finetune", place))
    for weights in ("{1: 2}", "{1: 2, cats: 1}", "{1.5: 1e-3}"):
        error_message = tried("finetune", *given, f"--class_weights={weights}")
        assert error_message is not None
        assert "unknown class 1" in error_message
    assert tried("finetune", *given, "--class_weights={cats: 1e-3, dogs: '2'}") is None


def test_numbers_of_numpy_and_paths_are_taken() -> None:
    options = options_of(find_command("probe"))
    given = {"encoder": Path("e"), "data": "d", "out": "o", "k": np.int64(3), "fraction": 1}
    made = options(**given, temperature=np.float32(0.5))
    assert made.as_config().items() >= {"encoder": "e", "k": 3, "temperature": 0.5}.items()


def test_a_message_is_one_line() -> None:
    assert str(UserError("a\n  b\r\nc\x1b[0m\0\u2028d")) == "a b c\\x1b[0m\\x00 d"
