"""Which loggers there are."""

import importlib.util
import sys
from pathlib import Path

import pytest

from vissl_lite.errors import UserError
from vissl_lite.training import loggers
from vissl_lite.training.loggers import logger_names, make_loggers


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that are found."""
    there: set[str] = set()
    monkeypatch.setattr(loggers, "find_spec", lambda name: name if name in there else None)
    return there


def test_tensorboard_where_it_is_installed(installed: set[str]) -> None:
    assert logger_names(None) == []
    installed.add("tensorboard")
    assert logger_names(None) == ["tensorboard"]
    assert logger_names("none") == []
    assert logger_names(["tensorboard", "tensorboard"]) == ["tensorboard"]


def test_a_missing_package_is_named_with_its_remedy(installed: set[str]) -> None:
    for name in ("wandb", "mlflow", "tensorboard"):
        with pytest.raises(UserError, match=f"pip install {name}"):
            logger_names([name])
        installed.add(name)
    assert logger_names(["wandb", "mlflow"]) == ["wandb", "mlflow"]


@pytest.mark.parametrize("given", ["tensorbord", ["none", "wandb"]])
def test_names_that_make_no_sense(given: list[str] | str, installed: set[str]) -> None:
    installed.add("wandb")
    with pytest.raises(UserError, match=r"did you mean tensorboard|none stands alone"):
        logger_names(given)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_writes_into_the_run(tmp_path: Path) -> None:
    (logger,) = make_loggers(["tensorboard"], tmp_path / "run")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert len(list((tmp_path / "run" / "tensorboard").glob("events.*"))) == 1


def test_no_logger_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    assert make_loggers([], tmp_path) == []
    assert "tensorboard" not in sys.modules
