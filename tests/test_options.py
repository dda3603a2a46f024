"""Options: dataclasses that check themselves, and functions that take their fields as keywords."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml

from vissl_lite.cli import find_command
from vissl_lite.commands.pretrain import PretrainResult
from vissl_lite.errors import UserError, check_count
from vissl_lite.options import (
    Options,
    Paths,
    StrPath,
    command,
    flatten,
    option_docs,
    options_of,
    path_list,
    required,
)


@dataclass(frozen=True, kw_only=True)
class Common(Options):
    """What several commands share."""

    out: StrPath
    """The folder
    to write."""
    seed: int = 0
    """Seed of everything random."""
    resume: bool = False
    """Continue."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Common):
    """Options of a training."""

    data: Paths
    """Images."""
    epochs: int | None = None
    """Passes over the images."""
    lr: float | list[float] | None = None
    method: str | dict[str, Any] = "simclr"
    """The method."""
    leaks: Literal["warn", "error"] = "warn"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("epochs", self.epochs)


@dataclass(frozen=True)
class Result:
    run: Path

    def __fspath__(self) -> str:
        return str(self.run)


@command(TrainOptions)
def train(options: TrainOptions) -> TrainOptions:
    """Train something.

    At length.

    Returns:
        The options.
    """
    return options


def test_values_become_plain_data() -> None:
    options = train(
        data=(Path("a"), "b"), out=Result(Path("run")), epochs=np.int64(3), lr=(np.float32(0.5), 1)
    )
    assert options.as_config() == {
        "out": "run", "seed": 0, "data": ["a", "b"], "epochs": 3, "lr": [0.5, 1],
        "method": "simclr", "leaks": "warn",
    }  # fmt: skip
    assert yaml.safe_load(yaml.safe_dump(options.as_config())) == options.as_config()
    assert path_list(options.data) == ["a", "b"]
    assert path_list(Path("a")) == ["a"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "ten"}, "--epochs ten is not of the type int"),
        ({"epochs": True}, "--epochs True is not of the type int"),
        ({"epochs": 0}, "--epochs 0 must be at least 1"),
        ({"lr": "x"}, "--lr x is not of the type float"),
        ({"lr": float("nan")}, "--lr nan must be a finite number"),
        ({"leaks": "no"}, "--leaks no is none of warn, error"),
        ({"out": 5}, "--out 5 is not of the type str"),
        ({"out": ""}, "--out must not be empty"),
        ({"data": []}, "--data must not be empty"),
        ({"data": ["a", 5]}, "is not of the type str"),
        ({"data": {"a": 1}}, "is not of the type str"),
        ({"seed": None}, "--seed None is not of the type int"),
    ],
)
def test_values_that_cannot_be_right(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        train(**{"data": "d", "out": "o", **values})
    assert message in str(refused.value)


def test_what_was_given_is_known() -> None:
    options = train(data=Path("d"), out="o", seed=0)
    assert options.given == {"data": "d", "out": "o", "seed": 0}
    changed = options.replace(epochs=5)
    assert changed.epochs == 5
    assert changed.given == options.given


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="epoch"):
        train(data="d", out="o", epoch=1)  # type: ignore[call-arg]


OWN = {"data": ["d"], "out": "o", "epochs": 10, "seed": 3, "lr": None, "leaks": "warn",
       "method": {"name": "simclr", "temperature": 0.5}}  # fmt: skip


def test_a_run_is_resumed_with_its_own_options() -> None:
    options = train(data="d", out="elsewhere", resume=True, method="simclr").resumed(OWN)
    assert options.as_config() == {**OWN, "out": "elsewhere"}
    assert options.resume


def test_options_that_contradict_a_run() -> None:
    options = train(data="d", out="o", seed=0, method={"name": "x", "temperature": 0.5}, epochs=10)
    with pytest.raises(UserError) as refused:
        options.resumed(OWN)
    assert str(refused.value) == (
        "these options contradict the run o: --seed 0 (the run has 3), "
        "--method.name x (the run has simclr)"
    )


def test_a_run_with_an_option_that_is_not_known() -> None:
    with pytest.raises(UserError, match="unknown option momentum"):
        train(data="d", out="o").resumed({**OWN, "momentum": 1})


def test_docs_are_the_strings_below_the_fields() -> None:
    docs = option_docs(TrainOptions)
    assert docs == {
        "out": "The folder to write.", "seed": "Seed of everything random.", "resume": "Continue.",
        "data": "Images.", "epochs": "Passes over the images.", "method": "The method.",
    }  # fmt: skip
    assert required(TrainOptions) == ["out", "data"]


def test_the_function_says_what_it_takes() -> None:
    assert options_of(train) is TrainOptions
    signature = inspect.signature(train)
    assert list(signature.parameters) == list(inspect.signature(TrainOptions).parameters)
    assert signature.parameters["epochs"].default is None
    assert signature.return_annotation is TrainOptions
    assert train.__name__ == "train"
    doc = inspect.getdoc(train)
    assert doc is not None
    assert doc.startswith("Train something.\n\nAt length.\n\nArgs:\n    out: The folder to write.")
    assert doc.endswith("    method: The method.\n\nReturns:\n    The options.")


def test_flatten_joins_keys_by_dots() -> None:
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": [3]}}}) == {"a": 1, "b.c": 2, "b.d.e": [3]}


def test_a_result_of_pretrain_stands_for_its_run() -> None:
    """So that it can be handed on as ``encoder=``."""
    result = PretrainResult(Path("run"), Path("run") / "encoder", {}, 1, 1.0)
    for name in ("finetune", "probe", "compare", "embed", "explore", "export"):
        options = options_of(find_command(name))
        given = dict.fromkeys(required(options), "x.html") | {"encoder": result}
        assert options(**given).as_config()["encoder"] in ("run", ["run"])
